"""pytest tests/test_privacy.py: what is released of clients, with which noise, and its ledger."""

import json
import math
import random
import re

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from scipy.stats import kstest

import client
from assets.testbed.loopback import Killed
from methods import accounting, aggregate, privacy, steps
from methods.base import Contribution, clipped, norm
from methods.store import Kept
from methods.wire import pack, unpack
from reporting import tables
from server import checkpoint, rounds, runs
from server.cohort import Clients
from server.ledger import Ledger, Spent
from server.rounds import Server, run
from settings import plan, preflight
from settings.compose import compose, resolve
from utils import Refusal, UserError, read_json

NODE = {"secure_aggregation": False, "clip_norm": 0.5, "delta": 1e-5}
CLIENT = {"_target_": "methods.privacy.Client", "adaptive": False, **NODE}
LOCAL = {"_target_": "methods.privacy.Local", **NODE}
BARE = ("privacy=client", "privacy.epsilon=null", "privacy.clip_norm=0.5")
ALL = ("strategy.fraction_fit=1", "num_clients=3")
QUIET = 1e-9  # as good as no noise
# What is a client's own word, by its name in any file.
OWN = {
    *(
        "train_loss",
        "train_loss_first",
        "num-examples",
        "records",
        "tokens",
        "peak_memory",
    ),
    *(
        "update_norm",
        "norm",
        "micro_batch",
        "truncated",
        "dropped",
        "peak_memory_client",
    ),
}


def level(node: dict, noise: float = 1.0, epsilon: float | None = None, **more):
    settings = {"noise_multiplier": noise, "epsilon": epsilon, **more}
    return privacy.build(node | settings)


def sent(partition: int, update: dict, weight: int = 1) -> Contribution:
    before = {k: torch.zeros_like(v) for k, v in update.items()}
    return Contribution(partition, before, update, weight, loss=1.0)


def summed(step, cohort: int, updates: list[dict], weights: list[int]) -> dict:
    """What a round makes of these updates, by FedAvg and this step."""
    made = aggregate.build({"_target_": "flwr.serverapp.strategy.FedAvg"})
    made.begin({k: torch.zeros_like(v) for k, v in updates[0].items()}, 1)
    for i, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        made.add(step.arrive(sent(i, update, weight)))
    return step.total(made.gathered(), len(updates))


def words(node) -> set[str]:
    """Every key anywhere in nested JSON."""
    if isinstance(node, dict):
        return {*node, *(word for value in node.values() for word in words(value))}
    return (
        {w for value in node for w in words(value)} if isinstance(node, list) else set()
    )


# --- the noise ---------------------------------------------------------------------------------


def test_noise_is_gaussian_of_the_standard_deviation_that_is_asked_for():
    drawn = privacy.noise(torch.Size([400, 500]), 3.0)
    assert drawn.shape == (400, 500)
    assert drawn.dtype == torch.float64
    assert torch.isfinite(drawn).all()
    values = drawn.flatten().numpy()
    assert kstest(values, "norm", args=(0, 3.0)).pvalue > 1e-6
    assert values.std() == pytest.approx(3.0, rel=0.01)
    along = np.corrcoef(values[:-1], values[1:])[0, 1]
    assert abs(along) < 0.012  # 5 standard deviations
    assert privacy.noise(torch.Size([]), 1.0).shape == ()


def test_noise_follows_from_no_seed():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        drawn.append(privacy.noise(torch.Size([50]), 1.0))
    assert not set(drawn[0].tolist()) & set(drawn[1].tolist())


def test_the_quantiles_are_finite_at_both_ends(monkeypatch):
    for byte, sign in ((b"\x00", -1), (b"\xff", 1)):
        monkeypatch.setattr("methods.noise.os.urandom", lambda n, byte=byte: byte * n)
        assert 8 < sign * privacy.noise(torch.Size([1]), 1.0).item() < 8.3


# --- client level: the sum ------------------------------------------------------------------


def test_updates_are_clipped_and_count_alike_whatever_their_examples():
    step = level(CLIENT, QUIET).step(4)
    updates = [
        {"w": torch.tensor([3.0, 4.0])},  # ten times the bound
        {"w": torch.tensor([0.1, 0.0])},
    ]
    for weights in ([1, 1], [1000, 1]):
        mean = summed(step, 4, updates, weights)["w"]
        # 0.5 of the first one's direction, and the other, over the planned four.
        assert mean.tolist() == pytest.approx([(0.3 + 0.1) / 4, 0.4 / 4], abs=1e-7)


def test_the_divisor_is_the_planned_cohort_whoever_answers():
    step = level(CLIENT, QUIET).step(10)
    one = {"w": torch.full((4,), 0.25)}
    for answered in (1, 5, 10):
        mean = summed(step, 10, [one] * answered, [1] * answered)["w"]
        assert mean.tolist() == pytest.approx([0.25 * answered / 10] * 4, abs=1e-7)


def test_no_client_moves_the_sum_by_more_than_the_bound():
    """Without it, with it, or with anything in its place, over the planned cohort."""
    step = level(CLIENT, QUIET).step(5)
    draw = torch.Generator().manual_seed(1)
    others = [{"w": torch.randn(6, generator=draw)} for _ in range(3)]
    without = summed(step, 5, others, [1, 2, 3])["w"]
    for size in (1e-3, 1.0, 1e6):
        one = {"w": size * torch.randn(6, generator=draw)}
        moved = summed(step, 5, [*others, one], [1, 2, 3, 1000])["w"] - without
        assert moved.norm() <= 0.5 / 5 * (1 + 1e-6)


def test_noise_is_on_the_sum_once_and_new_each_time():
    step, zeros = level(CLIENT, 2.0).step(4), {"w": torch.zeros(200, 100)}
    first, second = (summed(step, 4, [zeros] * 4, [1] * 4)["w"] for _ in range(2))
    std = 2.0 * 0.5 / 4
    for drawn in (first, second):
        assert drawn.std().item() == pytest.approx(std, rel=0.03)
        assert kstest(drawn.flatten().numpy(), "norm", args=(0, std)).pvalue > 1e-6
    assert (first - second).std().item() == pytest.approx(std * math.sqrt(2), rel=0.03)


def test_a_server_optimiser_gets_what_is_noisy_already(monkeypatch):
    """FedAvgM's momentum is of the noisy mean: nothing else of the updates is kept."""
    loud = torch.full((3,), 7.0, dtype=torch.float64)
    monkeypatch.setattr(privacy, "noise", lambda shape, std: loud)
    step = level(CLIENT, 1.0).step(1)
    node = {"_target_": "flwr.serverapp.strategy.FedAvgM", "server_momentum": 0.9}
    made = aggregate.build(node)
    made.begin({"w": torch.zeros(3)}, 1)
    made.add(step.arrive(sent(0, {"w": torch.full((3,), 0.1)})))
    state = made.apply(step.total(made.gathered(), 1))
    assert state["w"].tolist() == pytest.approx([7.1] * 3)
    kept = made.memory()["momentum_vector"]["w"]
    assert kept.abs().tolist() == pytest.approx([7.1] * 3)


@pytest.mark.slow
def test_a_round_is_the_mean_of_clipped_updates_over_all_who_were_asked(
    configure, loopback
):
    """Of three clients one fails, and counts as 0."""
    cfg = configure(
        *BARE, *ALL, f"privacy.noise_multiplier={QUIET}", "comm.dtype=float32"
    )

    def fail(partition: int, reply: Message) -> Message:
        if partition == 1 and "metrics" in reply.content:
            reply.content["metrics"]["train_loss"] = math.nan
        return reply

    server = Server(cfg, loopback(cfg, fail))
    start = server.initial_adapter()
    state, entry = server.train_round(1, start)
    assert (entry["sampled"], entry["replied"]) == (3, 2)
    received = unpack(pack(start, "float32")[0])
    total = {k: torch.zeros_like(v) for k, v in start.items()}
    for partition in (0, 2):
        after, _ = client.train(cfg, received, partition, 1)
        update = clipped({k: after[k] - received[k] for k in after}, 0.5)
        assert norm(update) <= 0.5 + 1e-6
        total = {k: total[k] + update[k] for k in total}
    for name in start:
        assert torch.allclose(state[name], start[name] + total[name] / 3, atol=1e-7)


def test_parts_of_the_noise_add_up_where_no_update_is_seen():
    """With secure aggregation, of five clients of whom three at least are in the sum."""
    made = level(CLIENT | {"secure_aggregation": True}, 2.0)
    assert made.released == "asked"  # who drops out late may be in the sum
    update = {"w": torch.full((40000,), 1.0)}
    parts = [made.share(update, least=3)["w"] for _ in range(5)]
    each = 0.5 / 200  # the bound, spread over the values
    for count in (3, 5):
        total = sum(parts[:count])
        assert total.mean().item() == pytest.approx(count * each, abs=0.05)
        std = 2.0 * 0.5 * math.sqrt(count / 3)
        assert total.std().item() == pytest.approx(std, rel=0.03)
    # The server divides by the plan, and adds none.
    mean = made.step(5).total({"w": torch.ones(4, dtype=torch.float64)}, 3)["w"]
    assert mean.tolist() == [3 / 5] * 4
    assert {*made.tells({"num-examples": 7, "train_loss": 2.0}).values()} == {0, 1}


# --- the bound that adapts ---------------------------------------------------------------------


@pytest.mark.slow
def test_the_bound_nears_the_median_of_the_norms():
    made = level(CLIENT, 0.5, adaptive=True, clip_norm=8.0)
    step = made.step(200)
    lengths = np.linspace(0.1, 1.9, 200)  # median 1
    updates = [{"w": torch.tensor([x, 0.0], dtype=torch.float32)} for x in lengths]
    for _ in range(60):
        mean = summed(step, 200, updates, [1] * 200)
        assert mean.keys() == {"w"}
    assert 0.7 < made.clip_norm < 1.4


def test_the_bits_are_in_the_budget():
    """The noise on the sum is raised, so that the sum and the count are one release of z."""
    z, cohort = 1.5, 100
    step = level(CLIENT, z, adaptive=True).step(cohort)
    assert step.noise_multiplier > z
    # A client reaches 1 (in bounds) in the sum and 1/2 in the count of bits.
    both = math.hypot(1 / step.noise_multiplier, 0.5 / step.bits)
    assert both == pytest.approx(1 / z)
    zeros = {"w": torch.zeros(100, 100)}
    drawn = summed(step, cohort, [zeros] * cohort, [1] * cohort)["w"]
    std = step.noise_multiplier * 0.5 / cohort
    assert drawn.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.slow
def test_the_count_of_bits_has_noise_of_its_own():
    found = []
    for _ in range(300):
        made = level(CLIENT, 1.0, adaptive=True)
        step = made.step(40)
        summed(step, 40, [{"w": torch.zeros(1)}] * 40, [1] * 40)
        found.append(-math.log(made.clip_norm / 0.5) / privacy.RATE - 0.5)
    # All are within the bound: 1/2 above the quantile, and noise of a twentieth.
    assert np.mean(found) == pytest.approx(0, abs=0.02)
    assert np.std(found) == pytest.approx(privacy.BITS, rel=0.3)


@pytest.mark.slow
def test_the_bound_goes_on_from_where_it_was(configure, loopback, tmp_path):
    cfg = configure(
        *BARE,
        *("privacy.noise_multiplier=0.1", "privacy.adaptive=true", "num_rounds=2"),
    )
    run(cfg, loopback(cfg, folder=tmp_path), tmp_path)
    history = read_json(tmp_path / "history.json")["rounds"]
    known = [entry["clip_norm"] for entry in history]
    assert known[0] != 0.5
    released = read_json(tmp_path / "privacy.json")
    assert [one["clip_norm"] for one in released] == [0.5, known[0]]
    again = cfg | {"resume": str(tmp_path), "num_rounds": 3}
    run(again, loopback(again, folder=tmp_path), tmp_path)
    assert read_json(tmp_path / "privacy.json")[2]["clip_norm"] == known[1]


# --- what is told --------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_of_single_clients_is_told(configure, loopback, tmp_path, capsys):
    cfg = configure(*BARE, *ALL, "privacy.noise_multiplier=1", "tracking=tensorboard")
    run(cfg, loopback(cfg), tmp_path)
    rounds_of = runs.read(tmp_path, "history.json")["rounds"]
    summary = runs.read(tmp_path, "summary.json")
    for file in tmp_path.glob("*.json"):
        assert not words(read_json(file)) & OWN, file
    for entry in rounds_of:
        assert entry["clients"] == []
        assert entry["aggregation_error"] is None
    said = capsys.readouterr().out
    assert "round 2/2" in said
    assert "loss" not in said
    assert "tokens" not in said
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert not set(events.Tags()["scalars"]) & OWN
    assert events.Scalars("epsilon")[-1].value == pytest.approx(summary["epsilon"])
    # Three clients, each in both rounds.
    assert [e["epsilon"] for e in rounds_of] == [
        pytest.approx(4.38, abs=0.01),
        pytest.approx(6.57, abs=0.01),
    ]
    assert summary["epsilon"] == rounds_of[-1]["epsilon"]
    assert summary["delta"] == 1e-5
    assert "added or removed" in summary["adjacency"]
    assert summary["epsilon_clients"].keys() == {"0", "1", "2"}


def test_each_client_has_the_epsilon_of_its_own_rounds():
    ledger = Ledger(level(CLIENT, 1.0), 4, None)
    for number, who in enumerate([(0, 1), (0, 2), (0, 2)], start=1):
        ledger.enter("asked", number, (0, 1, 2, 3))  # not what this level releases
        ledger.enter("summed", number, who)
    told = ledger.by_client()
    known = [accounting.of_releases([1.0] * n, 1e-5) for n in (3, 1, 2, 0)]
    assert [told[i] for i in range(4)] == known
    assert ledger.told()["epsilon"] == known[0]


@pytest.mark.slow
def test_a_report_and_a_sweep_of_such_runs_can_be_made(configure, loopback, tmp_path):
    from omegaconf import OmegaConf

    from reporting import runs as reported
    from reporting.sweep import summarise_sweep
    from server import journal
    from settings.compose import record

    overrides = (*BARE, *ALL, "privacy.noise_multiplier=1")
    cfg = configure(*overrides)
    (job := tmp_path / "0").mkdir()
    run(cfg, loopback(cfg), job)
    record(OmegaConf.create(json.loads(json.dumps(cfg))), [*overrides], job)
    summarise_sweep(tmp_path)
    assert "| 2 |" in (tmp_path / "losses.md").read_text()
    found, _ = reported.read(tmp_path)
    costs = tables.cost_table(reported.Section("", found))
    assert "epsilon" in costs
    assert "6.6" in costs
    assert "examples" not in costs
    journal.report(cfg, job)


@pytest.mark.slow
def test_the_last_line_tells_epsilon(configure, loopback, tmp_path, capsys):
    from server import journal

    cfg = configure(*BARE, *ALL, "privacy.noise_multiplier=1")
    run(cfg, loopback(cfg), tmp_path)
    journal.report(cfg, tmp_path)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.match(
        r"Privacy: epsilon 6\.57 or less for every client, at delta 1e-05", last
    )
    assert "one client's updates added or removed" in last


# --- the ledger -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_release_is_on_the_disk_before_it_is_made(
    configure, loopback, tmp_path, monkeypatch
):
    cfg = configure(*BARE, "privacy.noise_multiplier=1", "num_rounds=1")

    def die(shape, std):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(privacy, "noise", die)
        with pytest.raises(Killed):
            run(cfg, loopback(cfg, folder=tmp_path), tmp_path)
    [one] = runs.fit(read_json(tmp_path / "privacy.json"), list[runs.Release], tmp_path)
    assert one["round"] == 1
    assert len(one["clients"]) == 2
    assert one["noise_multiplier"] == 1


@pytest.mark.slow
def test_a_round_that_is_done_again_counts_twice_with_other_noise(
    configure, loopback, tmp_path, monkeypatch
):
    """Killed after the release of round 2, before its checkpoint."""
    cfg = configure(*BARE, *ALL, "privacy.noise_multiplier=1", "num_rounds=2")
    save, drawn = checkpoint.save, []

    def die_in_round_2(folder, done, state, *rest):
        drawn.append({k: v.clone() for k, v in state.items()})
        if done == 2:
            raise Killed
        save(folder, done, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(rounds.checkpoint, "save", die_in_round_2)
        with pytest.raises(Killed):
            run(cfg, loopback(cfg, folder=tmp_path), tmp_path)
    again = cfg | {"resume": str(tmp_path)}
    run(again, loopback(again, folder=tmp_path), tmp_path)
    released = read_json(tmp_path / "privacy.json")
    assert [one["round"] for one in released] == [1, 2, 2]
    state, done, *_ = checkpoint.read(checkpoint.newest(tmp_path))
    assert done == 2
    apart = torch.cat([(state[k] - drawn[1][k]).flatten() for k in state])
    # The same updates with two drawings of noise: sqrt(2) z C / m apart.
    assert apart.std().item() == pytest.approx(math.sqrt(2) * 0.5 / 3, rel=0.05)
    three = accounting.of_releases([1.0] * 3, 1e-5)
    assert read_json(tmp_path / "summary.json")["epsilon"] == pytest.approx(three)
    assert read_json(tmp_path / "history.json")["rounds"][-1]["epsilon"] == (
        pytest.approx(three)
    )


@pytest.mark.slow
def test_a_sum_that_makes_no_adapter_counts_and_too_few_replies_do_not(
    configure, loopback, monkeypatch
):
    cfg = configure(
        *BARE, *ALL, "privacy.noise_multiplier=1", "strategy.min_fit_replies=2"
    )
    broken = []

    def fail(partition: int, reply: Message) -> Message:
        """The first attempt has one usable reply."""
        if "metrics" in reply.content and len(broken) < 2:
            broken.append(partition)
            reply.content["metrics"]["train_loss"] = math.nan
        return reply

    server = Server(cfg, loopback(cfg, fail))
    start = server.initial_adapter()
    check, checked = server._check, []

    def refuse_once(state, before):
        checked.append(state)
        if len(checked) == 1:
            raise rounds.OutOfRange("it is refused")
        check(state, before)

    monkeypatch.setattr(server, "_check", refuse_once)
    _, entry = server.train_round(1, start)
    assert entry["retries"] == 2
    assert len(server.ledger.releases) == 2
    assert entry["epsilon"] == accounting.of_releases([1.0] * 2, 1e-5)
    # Nobody is named for the length of its update.
    assert not any("longest" in failure["cause"] for failure in entry["failures"])


@pytest.mark.slow
def test_the_run_stops_before_a_release_beyond_its_budget(
    configure, loopback, tmp_path
):
    cfg = configure(
        "privacy=client",
        *ALL,
        *("privacy.noise_multiplier=1", "privacy.epsilon=6.6", "num_rounds=5"),
        "train.save_every_round=5",
    )
    with pytest.raises(Spent) as told:
        run(cfg, loopback(cfg, folder=tmp_path), tmp_path)
    epsilon = accounting.of_releases([1.0] * 3, 1e-5)
    assert f"the most exposed client to epsilon {epsilon:.3f}" in str(told.value)
    assert f"{tmp_path}/peft_2" in str(told.value)
    assert (tmp_path / "peft_2/adapter_model.safetensors").is_file()
    assert len(read_json(tmp_path / "privacy.json")) == 2
    again = cfg | {"resume": str(tmp_path)}
    with pytest.raises(Spent):
        run(again, loopback(again, folder=tmp_path), tmp_path)
    assert len(read_json(tmp_path / "privacy.json")) == 2


def test_a_ledger_that_lacks_a_round_or_is_broken_is_refused(tmp_path):
    made = level(CLIENT)
    (file := tmp_path / "privacy.json").write_text("[]")
    with pytest.raises(UserError, match="lacks round 1, which is done"):
        Ledger(made, 2, None).keep(file, 1)
    file.unlink()
    with pytest.raises(UserError, match="lacks round 1"):
        Ledger(made, 2, None).keep(file, 2)
    file.write_text('[{"round": 1, "noise_multiplier": "none"}]')
    with pytest.raises(UserError, match="is broken"):
        Ledger(made, 2, None).keep(file, 1)
    none = privacy.build(
        {"_target_": "methods.privacy.Privacy", "secure_aggregation": False}
    )
    Ledger(none, 2, None).keep(tmp_path / "none.json", 7)


def test_no_run_begins_in_the_folder_of_a_ledger(tmp_path):
    (tmp_path / "privacy.json").write_text("[]")
    with pytest.raises(UserError, match=r"holds a run already \(privacy\.json\)"):
        runs.own(tmp_path)


# --- a secret cohort --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_secret_cohort_is_by_chance_and_by_no_seed(configure, loopback):
    cfg = configure("num_clients=60") | {}
    cfg["strategy"] = cfg.strategy | {"sampling": "poisson", "fraction_fit": 0.5}
    drawn = []
    for _ in range(2):
        clients = Clients(cfg, loopback(cfg), named=False)
        drawn.append([clients.sample("fraction_fit", n) for n in range(1, 101)])
    assert drawn[0] != drawn[1]
    sizes = [len(cohort) for each in drawn for cohort in each]
    assert np.mean(sizes) == pytest.approx(30, abs=2)
    assert np.var(sizes) == pytest.approx(15, rel=0.5)  # n q (1 - q): not of one size


@pytest.mark.slow
def test_a_secret_cohort_is_told_by_nothing(configure_once, loopback_once, tmp_path):
    cfg = configure_once(
        *BARE,
        *("privacy.noise_multiplier=1", "strategy.sampling=poisson", "num_rounds=1"),
        *("num_clients=60", "strategy.fraction_fit=0.5"),
        "train.training_arguments.max_steps=1",
        "train.training_arguments.per_device_train_batch_size=1",
    )
    run(cfg, loopback_once(cfg), tmp_path)
    [entry] = runs.read(tmp_path, "history.json")["rounds"]
    assert (entry["asked"], entry["failures"], entry["clients"]) == ([], [], [])
    assert (entry["sampled"], entry["replied"]) == (30, 30)
    assert entry["bytes_up"] % 30 == entry["bytes_down"] % 30 == 0
    [one] = read_json(tmp_path / "privacy.json")
    assert "clients" not in one
    known = accounting.amplified([1.0], 0.5, 1e-5)
    assert entry["epsilon"] == pytest.approx(known)
    assert known < 4.37
    told = runs.read(tmp_path, "summary.json")["epsilon_clients"]
    assert len(told) == 60
    assert {*told.values()} == {entry["epsilon"]}


# --- local: before it leaves -------------------------------------------------------------------------


def test_what_leaves_a_client_is_clipped_and_noisy(tmp_path):
    step, kept = level(LOCAL, 2.0).step(3), Kept(tmp_path, 0, 1)
    update = {"w": torch.full((100, 200), 5.0), "b": torch.zeros(20000)}
    left = [step.leave(update, kept) for _ in range(2)]
    for one in left:
        assert one["w"].dtype == torch.float32
        values = one["b"].numpy()
        assert kstest(values, "norm", args=(0, 2.0 * 0.5)).pvalue > 1e-6
        # What was clipped is spread over 20 000 values.
        assert one["w"].mean().item() == pytest.approx(0.5 / math.sqrt(20000), abs=0.04)
    assert not torch.equal(left[0]["b"], left[1]["b"])
    assert step.arrive(sent(0, update, weight=640)).weight == 1


def test_a_client_counts_all_that_has_left_and_ends_it_at_its_budget(tmp_path):
    """Also a round that a server asks for again, and again."""
    made = level(LOCAL, 2.0, epsilon=10.1)  # two updates are 2 bounds apart: mu is 1
    step, update = made.step(3), {"w": torch.zeros(3)}
    assert made.spent([2.0]) == pytest.approx(4.38, abs=0.01)
    for number in (1, 1, 1, 2):
        step.leave(update, Kept(tmp_path, 0, number))
    with pytest.raises(Refusal, match=r"its privacy\.epsilon is spent"):
        step.leave(update, Kept(tmp_path, 0, 2))
    assert Kept(tmp_path, 0, 9).listed("releases") == [2.0] * 4
    step.leave(update, Kept(tmp_path, 1, 2))  # another client's is its own


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["update", "control"])
def test_a_client_tells_a_server_that_it_does_not_trust_nothing_else(
    kind, configure, loopback
):
    cfg = configure("privacy=local", "num_rounds=1", *ALL)
    seen = {}

    def look(partition: int, reply: Message) -> Message:
        if "metrics" in reply.content:
            seen[partition] = dict(reply.content["metrics"])
        return reply

    grid = loopback(cfg, look)
    server = Server(cfg, grid)
    start = server.initial_adapter()
    if kind == "update":
        _, entry = server.train_round(1, start)
        same = {"num-examples": 1, "train_loss": 0.0, "peak_memory": 0, "tokens": 0}
        assert seen == dict.fromkeys(range(3), same)
        assert not words(entry) & OWN
        assert entry["epsilon"] <= 8 < entry["epsilon"] * 1.001
        assert "replaced by any others" in entry["adjacency"]
        assert server.ledger.releases[0]["clients"] == [0, 1, 2]
    # A server that asks for more than it should.
    arrays = ArrayRecord(pack(start, cfg.comm.dtype)[0])
    config = ConfigRecord({"server-round": 1, "partition": 0})
    asked = RecordDict({"arrays": arrays, "config": config})
    if kind == "control":
        asked["control"] = arrays
    message = Message(asked, 5, "train" if kind == "control" else "evaluate")
    message.metadata.__dict__["_message_id"] = "message"
    reply = grid.client_app(message, Context(1, 5, {}, RecordDict(), {}))
    assert reply.has_error()
    assert reply.error.code == Refusal.code
    assert "noisy updates, and no" in reply.error.reason


def test_what_was_asked_of_a_client_counts_even_if_the_server_makes_nothing_of_it():
    ledger = Ledger(level(LOCAL, 2.0), 2, None)
    ledger.enter("asked", 1, [0, 1])
    ledger.enter("summed", 1, [0])
    assert ledger.by_client()[1] == pytest.approx(4.38, abs=0.01)


# --- before the run -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("strategy=fedmedian", "that makes none. Take strategy=fedavg"),
        ("strategy=krum strategy.fraction_fit=1", "that makes none"),
        ("strategy=svd", "that makes none"),
        ("strategy=qfedavg", "that makes none"),
        ("strategy=scaffold", "control variates come without noise"),
        ("strategy.clip_norm=1", "privacy.clip_norm bounds the updates"),
        ("strategy.clip_weights=1", "privacy.clip_norm bounds the updates"),
        ("strategy.weighted_by=records", "all clients count the same"),
        ("strategy.fraction_evaluate=0.5", "is in no budget"),
        ("personal=ditto strategy.fraction_evaluate=1", "is in no budget"),
        ("mode=centralized", "there is no sum of clients"),
        ("mode=local", "there is no sum of clients"),
        (
            "privacy.epsilon=null",
            "privacy.noise_multiplier is needed, or privacy.epsilon",
        ),
        ("privacy.delta=0.3", "privacy.delta=0.3"),
        (
            "privacy.delta=0.1 num_clients=10",
            "that allows to publish one of them whole",
        ),
        ("privacy.clip_norm=0", "privacy.clip_norm=0"),
        ("privacy.clip_norm=null", "privacy.clip_norm and privacy.delta are needed"),
        ("privacy.delta=null", "privacy.clip_norm and privacy.delta are needed"),
        ("privacy.noise_multiplier=0.1", "one release is epsilon 91.8"),
        ("privacy.noise_multiplier=1e-300", "privacy.noise_multiplier=1e-300"),
        ("privacy.noise_multiplier=0", "privacy.noise_multiplier=0"),
        ("privacy.epsilon=-1", "privacy.epsilon=-1"),
        ("privacy.adaptive=true", "Take more than"),
        (
            "privacy.adaptive=true privacy.secure_aggregation=true",
            "counts no updates within the bound",
        ),
        ("strategy.sampling=poisson", "2 clients a round would at times be none"),
        (
            "strategy.sampling=poisson num_clients=100 strategy.min_fit_replies=2",
            "would tell how many there were",
        ),
    ],
)
def test_what_would_void_it_is_refused_in_a_line(overrides, told):
    given = f"experiment=quickstart num_clients=4 strategy.fraction_fit=0.5 {overrides}"
    with pytest.raises(UserError, match=re.escape(told)) as error:
        preflight.check(compose(f"privacy=client {given}"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("strategy=scaffold", "control variates come without noise"),
        ("strategy.fraction_evaluate=0.5", "is in no budget"),
        ("mode=local", "there is no sum of clients"),
        ("strategy.sampling=poisson", "it is for privacy=client"),
    ],
)
def test_what_would_void_local_noise_is_refused(overrides, told):
    with pytest.raises(UserError, match=re.escape(told)):
        preflight.check(compose(f"experiment=quickstart privacy=local {overrides}"))


def test_a_public_cohort_takes_no_secret_sampling_without_privacy():
    with pytest.raises(UserError, match="it is for privacy=client"):
        preflight.check(compose("experiment=quickstart strategy.sampling=poisson"))


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedavgm", "fedadam"])
def test_what_is_a_function_of_the_mean_goes_with_it(strategy, configure):
    cfg = configure(*BARE, "privacy.noise_multiplier=1", f"strategy={strategy}")
    assert cfg.privacy.noise_multiplier == 1


@pytest.mark.slow
def test_the_noise_is_found_for_an_epsilon(configure, capsys):
    cfg = configure("privacy=client", "num_rounds=20")  # 10 rounds for each of four
    assert accounting.of_releases([cfg.privacy.noise_multiplier] * 10, 1e-5) == (
        pytest.approx(8, rel=1e-6)
    )
    assert "times as long as privacy.clip_norm, and drown" in capsys.readouterr().out
    found = configure("privacy=local", "num_rounds=20").privacy.noise_multiplier
    # Any two updates are two bounds apart, and not one.
    assert found == pytest.approx(2 * cfg.privacy.noise_multiplier)


def test_no_privacy_is_what_it_was(configure, capsys):
    cfg = configure()
    assert cfg.privacy == {
        "_target_": "methods.privacy.Privacy",
        "secure_aggregation": False,
    }
    assert "privacy" not in capsys.readouterr().out
    one = sent(0, {"w": torch.ones(2)}, weight=7)
    made = steps.build(cfg).steps[2]
    assert made.arrive(one) is one
    assert made.total(one.update, 3) is one.update


def test_the_plan_tells_epsilon_and_the_noise(capsys):
    known = f"experiment=quickstart {' '.join(BARE)} privacy.noise_multiplier=1"
    cfg = resolve(compose(f"{known} num_clients=40 strategy.fraction_fit=0.25"))
    rows = dict(plan.plan(cfg))  # each in 5 of 20 rounds
    epsilon = accounting.of_releases([1.0] * 5, 1e-5)
    assert rows["epsilon"].startswith(f"{epsilon:.3g} at delta 1e-05, at most")
    assert "in 5 of 20 rounds" in rows["epsilon"]
    assert "added or removed" in rows["epsilon"]
    size = int(re.search(r"([\d,]+) values", rows["noise"])[1].replace(",", ""))
    assert f"{math.sqrt(size) / 10:.3g} times as long" in rows["noise"]
    half = dict(
        plan.plan(cfg | {"sharing": {"_target_": "methods.sharing.FFA", "stays": []}})
    )
    assert half["noise"] != rows["noise"]  # B alone is fewer values
    assert "epsilon" not in dict(plan.plan(resolve(compose("experiment=quickstart"))))


def test_a_node_finds_the_same_noise(monkeypatch, tmp_path):
    from node import permit

    monkeypatch.chdir(tmp_path)
    overrides = "experiment=quickstart privacy=local num_clients=4"
    told = {"overrides": overrides, "run": "run"}
    own = {"partition-id": 0, "num-partitions": 4, "cache-path": str(tmp_path)}
    cfg, _ = permit.settle(told, own | {"cpus": 1})
    mine = privacy.settled(resolve(compose(overrides)))
    assert cfg.privacy == mine.privacy
    assert cfg.privacy.noise_multiplier > 0


@pytest.mark.parametrize(
    "overrides",
    [
        "privacy=client",
        "privacy=client privacy.adaptive=true strategy.fraction_fit=0.75",
        "privacy=client privacy.secure_aggregation=true strategy.fraction_fit=1",
        "privacy=local",
        "privacy=record",
    ],
)
def test_a_node_takes_the_noise_that_the_server_finds(overrides, tmp_path):
    """Whatever is left to be found for an epsilon: both have it from the same settings."""
    from node import permit

    chosen = f"experiment=quickstart num_clients=40 {overrides}"
    own = {"partition-id": 0, "num-partitions": 40, "cache-path": str(tmp_path)}
    cfg, _ = permit.settle({"overrides": chosen, "run": "a"}, own | {"cpus": 1})
    wanted = preflight.check_privacy(resolve(compose(chosen)))
    assert cfg.privacy == wanted.privacy


def test_the_shipped_settings_send_gradients_that_the_bound_does_not_cut():
    cfg = preflight.check(compose("experiment=private"))
    state = client.initial_adapter(cfg)
    for partition in (3, 77):
        trained, metrics = client.train(cfg, state, partition, server_round=1)
        moved = norm({name: trained[name] - state[name] for name in trained})
        assert metrics["num-examples"] <= 4
        # The gradient of a fresh adapter is far longer than max_grad_norm, which scales it.
        assert cfg.privacy.clip_norm * 0.99 < moved <= cfg.privacy.clip_norm * 1.001
