"""pytest tests/test_byzantine.py: forged updates, and what each strategy makes of them."""

import gc
import json
import subprocess
import sys

import pytest
import torch
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from assets.testbed import attacks
from methods import wire
from server import rounds
from utils import PROJECT

ROBUST = ("fedmedian", "fedtrimmedavg", "krum", "bulyan")
ATTACKS = ("scaled", "sign-flipped", "random")
SHAPE = (30, 40)
BROKEN = None  # the partition whose client answers with an error, where a test has one


def update(partition: int) -> torch.Tensor:
    """What an honest client sends: all go the same way, each a little off."""
    generator = torch.Generator().manual_seed(partition)
    noise = torch.randn(SHAPE, generator=generator)
    return (0.05 + 0.01 * noise).half().float()


HONEST_APP = ClientApp()


@HONEST_APP.train()
def train(message: Message, context: Context) -> Message:
    partition = message.content["config"]["partition"]
    if partition == BROKEN:
        return Message(Error(2, "RuntimeError: broken"), reply_to=message)
    packed, _ = wire.pack({"w": update(partition)}, "float16")
    metrics = {"num-examples": 8, "train_loss": 1.0, "peak_memory": 0}
    content = {"arrays": ArrayRecord(packed), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)


class Round:
    """One round of twenty clients under an attack, without training.

    `moved` is what it did to the adapter, `sent` each client's update by partition,
    `honest` the updates of those that do not attack, stacked.
    """

    def __init__(self, cfg, grid, attack: str, number: int = 1) -> None:
        self.malicious = attacks.malicious(cfg)
        self.sent: dict[int, torch.Tensor] = {}
        grid.client_app = attacks.byzantine(HONEST_APP, cfg, attacks.ATTACKS[attack])
        grid.tamper = self.note
        server = rounds.Server(cfg, grid)
        start = {"w": torch.ones(SHAPE)}
        state, self.entry = server.train_round(number, start)
        self.moved = state["w"] - start["w"]
        others = sorted(self.sent.keys() - self.malicious)
        self.honest = torch.stack([update(partition) for partition in others])

    def note(self, partition: int, reply: Message) -> Message:
        if not reply.has_error() and "metrics" in reply.content:
            [self.sent[partition]] = wire.unpack(
                reply.content["arrays"].to_torch_state_dict()
            ).values()
        return reply

    def outside(self) -> float:
        """The share of weights that left the range of the honest updates."""
        low, high = self.honest.amin(0) - 1e-6, self.honest.amax(0) + 1e-6
        return ((self.moved < low) | (self.moved > high)).float().mean().item()


@pytest.fixture
def attacked(configure, loopback, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "BROKEN", None)

    def play(attack: str, name: str = "fedavg", *overrides: str, number=1) -> Round:
        chosen = "num_clients=20", "strategy.fraction_fit=1", attacks.STRATEGIES[name]
        cfg = configure(*chosen, *overrides)
        return Round(cfg, loopback(cfg), attack, number)

    gc.freeze()  # Bulyan collects garbage for every reply: all that was ever imported
    yield play
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "factor"), [("scaled", 50), ("sign-flipped", -10)])
def test_the_malicious_multiply_their_updates(attack, factor, attacked):
    played = attacked(attack)
    assert len(played.malicious) == 4
    assert len(played.sent) == 20
    for partition, sent in played.sent.items():
        honest = update(partition)
        if partition in played.malicious:
            assert torch.allclose(sent, factor * honest, rtol=1e-3)
        else:
            assert torch.equal(sent, honest)
    # Forged or not, nothing of it gives the server a reason to leave it out.
    assert played.entry["failures"] == []
    norms = {c["partition"]: c["update_norm"] for c in played.entry["clients"]}
    for partition, norm in norms.items():
        assert norm == pytest.approx(update(partition).norm().item(), rel=1e-5)


@pytest.mark.slow
def test_the_malicious_send_noise_of_their_own(attacked):
    played, again, later = (attacked("random", number=n) for n in (1, 1, 2))
    forged = torch.stack([played.sent[p] for p in sorted(played.malicious)])
    assert forged.std().item() == pytest.approx(1.0, abs=0.05)
    assert torch.corrcoef(forged.flatten(1)).fill_diagonal_(0).abs().max() < 0.2
    for partition, sent in played.sent.items():
        assert torch.equal(sent, again.sent[partition])
        changed = not torch.equal(sent, later.sent[partition])
        assert changed == (partition in played.malicious)


@pytest.mark.slow
def test_without_an_attack_nothing_is_forged_and_errors_come_through(
    attacked, monkeypatch
):
    played = attacked("none")
    assert all(torch.equal(sent, update(p)) for p, sent in played.sent.items())
    broken = next(iter(played.malicious))
    monkeypatch.setattr(sys.modules[__name__], "BROKEN", broken)
    failures = attacked("scaled").entry["failures"]
    assert failures == [{"partition": broken, "cause": "RuntimeError: broken"}]


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_robust_strategies_stay_among_the_honest_and_a_mean_does_not(attack, attacked):
    for name in ROBUST:
        assert attacked(attack, name).outside() == 0, name
    # A single client's own adapter, not a mixture.
    krum = attacked(attack, "krum")
    assert any(torch.allclose(krum.moved, each, atol=1e-6) for each in krum.honest)
    assert attacked(attack, "fedavg").outside() > 0.5


@pytest.mark.slow
def test_clipped_updates_still_go_the_honest_way(attacked):
    norm = update(0).norm().item()
    mean = torch.stack([update(partition) for partition in range(20)]).mean(0)
    mean /= mean.norm()
    # (16 - 4 * 10) / 20 of an honest update, and clipped (16 - 4) / 20.
    plain = attacked("sign-flipped")
    clipped = attacked("sign-flipped", "fedavg", f"strategy.clip_norm={norm}")
    assert (plain.moved * mean).sum().item() == pytest.approx(-1.2 * norm, rel=0.05)
    assert (clipped.moved * mean).sum().item() == pytest.approx(0.6 * norm, rel=0.05)
    for attack in ATTACKS:
        moved = attacked(attack, "fedavg", f"strategy.clip_norm={norm}").moved
        assert moved.norm().item() <= norm * 1.001


@pytest.mark.slow
def test_finished_cells_are_not_run_again_and_costs_are_against_fedavg_in_peace(
    tmp_path,
):
    scores = {("fedavg", "none"): 0.97, ("krum", "none"): 0.95}
    scores |= {("fedavg", "scaled"): 0.01, ("krum", "scaled"): 0.925}
    done = {
        f"{attack}: {attacks.SETTINGS} {attacks.STRATEGIES[name]}": {
            "exact_match": score,
            "update_norms": [5.25, 0.5],
        }
        for (name, attack), score in scores.items()
    }
    (tmp_path / "done.json").write_text(json.dumps(done))
    command = "benchmarks/byzantine.py --attacks none scaled --strategies fedavg krum"
    printed = subprocess.run(
        [sys.executable, *command.split(), f"--out={tmp_path / 'done.json'}"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert printed.returncode == 0, printed.stderr
    assert json.loads((tmp_path / "done.json").read_text()) == done
    lines = printed.stdout.splitlines()
    assert "| fedavg | 97.0% | 1.0% | 96.0 |" in lines
    assert "| krum | 95.0% | 92.5% | 4.5 |" in lines
    assert lines[-1].endswith("by round: 5.2 0.5")


@pytest.mark.slow
def test_the_benchmark_attacks_a_real_run(few, tmp_path):
    # With one worker and eight questions: neither is what is looked at.
    command = (
        "benchmarks/byzantine.py --attacks none scaled --strategies fedavg "
        f"--out={tmp_path}/done.json "
        "-- num_clients=5 num_rounds=2 train.training_arguments.max_steps=2 "
        f"+simulation.init_args.num_cpus=1 {few}"
    )
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    peace, war = json.loads((tmp_path / "done.json").read_text()).values()
    # The first updates are made before there is anything forged; the second are not.
    assert war["update_norms"][0] == peace["update_norms"][0]
    assert war["update_norms"][1] != peace["update_norms"][1]
