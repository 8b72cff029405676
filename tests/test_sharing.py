"""pytest tests/test_sharing.py: what of an adapter travels, what stays, and what it makes."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file

import client
import model
from assets.testbed.adapters import same
from assets.testbed.federation import Federation
from assets.testbed.loopback import killed_in
from methods import aggregate, sharing
from methods.base import Contribution
from methods.store import Kept
from node import permit, processes
from server import rounds
from server.rounds import Server
from settings import plan, preflight
from settings.compose import compose, record, resumed
from utils import PROJECT, UserError

A, B = "model.q.lora_A.default.weight", "model.q.lora_B.default.weight"
METHODS = {
    "ffa": (sharing.FFA(), 1),
    "rolora, B": (sharing.RoLoRA(), 1),
    "rolora, A": (sharing.RoLoRA(), 2),
}


def layer(seed: int, rank: int, d: int = 7, k: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        A: torch.randn(rank, k, generator=generator),
        B: torch.randn(d, rank, generator=generator),
    }


def function(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a layer adds to its weight, but for the scale that all have."""
    return state[B].double() @ state[A].double()


def play(made, state, updates, weights, number=1, order=None):
    """The state that an aggregation makes of a round's updates."""
    made.begin(state, number)
    for i in order or range(len(updates)):
        sent = {name: state[name] for name in updates[i]}
        made.add(Contribution(i, sent, updates[i], weights[i], loss=1.0))
    return made.apply(made.gathered())


def mean():
    return aggregate.build({"_target_": "flwr.serverapp.strategy.FedAvg"})


# --- averaging one half is averaging what the adapters do ------------------------------------


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    rank=st.integers(1, 7),
    weights=st.lists(st.integers(1, 500), min_size=1, max_size=5),
)
def test_the_mean_is_that_of_the_products(method, seed, rank, weights):
    part, number = METHODS[method]
    start = layer(seed, rank)
    goes = part.goes(start, number)
    trained = [layer(seed + 1 + i, rank) for i in range(len(weights))]
    updates = [{n: one[n] - start[n] for n in goes} for one in trained]
    made = play(mean(), start, updates, weights)
    total = sum(weights)
    wanted = sum(
        w / total * function({**start, **{n: start[n] + u[n] for n in goes}})
        for w, u in zip(weights, updates, strict=True)
    )
    assert torch.allclose(function(made), wanted, rtol=1e-5, atol=1e-5)
    order = random.Random(seed).sample(range(len(weights)), len(weights))
    assert same(made, play(mean(), start, updates, weights, order=order))
    still = [{n: torch.zeros_like(start[n]) for n in goes} for _ in weights]
    assert same(start, play(mean(), start, still, weights))


def test_averaging_both_halves_is_another_thing():
    """The counter-example: half the difference of the one times that of the other is lost."""
    start, one, other = layer(0, 4), layer(1, 4), layer(2, 4)
    updates = [{n: c[n] - start[n] for n in start} for c in (one, other)]
    made = function(play(mean(), start, updates, [1, 1]))
    wanted = (function(one) + function(other)) / 2
    assert (made - wanted).norm() > 0.3 * wanted.norm()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    rank=st.integers(1, 7),
    zero=st.integers(0, 7),
)
def test_refactoring_changes_no_function(seed, rank, zero):
    start = layer(seed, rank)
    start[B][:, rank - min(zero, rank) :] = 0  # of any rank, 0 as well
    b, a = sharing.refactored(start[B], start[A])
    assert (b.shape, a.shape) == (start[B].shape, start[A].shape)
    made = {A: a, B: b}
    scale = function(start).norm()
    assert (function(made) - function(start)).norm() <= 1e-6 * scale
    eye = torch.eye(rank)
    assert torch.allclose(a @ a.T, eye, atol=1e-5)
    values = torch.linalg.svdvals(function(start))[:rank].float()
    assert torch.allclose(b.norm(dim=0), values, atol=1e-5 * (1 + float(scale)))
    highest = b.gather(0, b.abs().argmax(dim=0, keepdim=True))
    assert (highest >= 0).all()


def test_refactoring_is_due_every_so_many_rounds():
    state = layer(0, 3)
    part = sharing.FFA(refactor_every=3)
    assert [n for n in range(1, 8) if part.finish(state, n) is not state] == [3, 6]
    assert sharing.FFA(stays=["q"], refactor_every=1).finish(state, 1) == state
    assert part.changes(state, 3) == [A, B]
    assert part.changes(state, 4) == [B]


# --- strategies that see one half --------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_a_half_that_is_not_sent_moves_neither_it_nor_its_moments(name):
    made = aggregate.build(_plain(name))
    part, state = sharing.RoLoRA(), layer(0, 3)
    for number in range(1, 6):
        goes = part.goes(state, number)
        update = {n: torch.full_like(state[n], 0.01 * number) for n in goes}
        before, memory = state, made.memory()
        state = play(made, state, [update], [1], number)
        [rest] = state.keys() - set(goes)
        [sent] = goes
        assert state[rest].equal(before[rest])
        assert not state[sent].equal(before[sent])
        for kept, each in made.memory().items():
            old = memory.get(kept, {}).get(rest, torch.zeros_like(state[rest]))
            assert each[rest].equal(old), (number, kept)
            assert not each[sent].equal(memory.get(kept, {}).get(sent, 0 * each[sent]))


@pytest.mark.slow
def test_momentum_of_a_half_is_as_if_there_were_no_other():
    both, alone = (aggregate.build(_plain("fedavgm")) for _ in range(2))
    part, state = sharing.RoLoRA(), layer(0, 3)
    only = {B: state[B]}
    for number in range(1, 6):
        update = {n: torch.full_like(state[n], 0.5) for n in part.goes(state, number)}
        state = play(both, state, [update], [1], number)
        if B in update:
            only = play(alone, only, [update], [1], number)
    assert state[B].equal(only[B])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan", "qfedavg"]
)
def test_robust_strategies_take_what_is_sent(name):
    start = layer(0, 3)
    updates = [{B: layer(i, 3)[B] * 0.01} for i in range(1, 8)]
    state = play(aggregate.build(_plain(name)), start, updates, [1] * 7)
    alone = play(aggregate.build(_plain(name)), {B: start[B]}, updates, [1] * 7)
    assert state[A].equal(start[A])
    assert state[B].equal(alone[B])
    assert not state[B].equal(start[B])


def _plain(name: str) -> dict:
    return dict(compose(f"experiment=quickstart strategy={name}").strategy)


# --- what is here, and what comes ------------------------------------------------------------


def joined(part, tmp_path, received, unsent, number=1):
    return part.join(
        received, unsent, Kept(tmp_path, 0, number), lambda: dict(layer(0, 3))
    )


def told(state: dict[str, torch.Tensor]) -> str:
    return sharing.fingerprint({n: sharing.digest(t) for n, t in state.items()})


def test_what_is_not_sent_is_made_or_kept_and_compared(tmp_path):
    part, start, later = sharing.FFA(), layer(0, 3), layer(1, 3)
    made = joined(part, tmp_path, {B: later[B]}, told({A: start[A]}))
    assert same(made, {A: start[A], B: later[B]})
    for wrong in (told({A: later[A]}), told({}), None, "x"):
        if (
            wrong is None
        ):  # nothing told, and nothing of it here: refused with the model
            continue
        with pytest.raises(UserError, match="were not sent are not here as the server"):
            joined(part, tmp_path, {B: later[B]}, wrong)
    part.hold(later, later, Kept(tmp_path, 0, 1))
    made = joined(part, tmp_path, {B: start[B]}, told({A: later[A]}), number=2)
    assert same(made, {A: later[A], B: start[B]})
    # A round that is done again does not see what it has left.
    with pytest.raises(UserError, match="were not sent"):
        joined(part, tmp_path, {B: start[B]}, told({A: later[A]}), number=1)


@pytest.mark.slow
def test_a_client_on_a_base_of_another_type_makes_the_same_half(
    configure, loopback, monkeypatch
):
    """Left to itself, PEFT rounds an adapter to the type of the base."""
    monkeypatch.setattr(model, "compute_dtype", lambda device: torch.bfloat16)
    cfg = configure("sharing=ffa", "num_clients=2", "model.quantization=null", "seed=3")
    model.forget()
    server = Server(cfg, loopback(cfg))
    made = client.initial_adapter(cfg)
    state = server.initial_adapter()
    model.forget()
    assert same(made, state)
    assert same(processes.first_adapter(cfg), state)


def test_one_bit_is_another_adapter():
    one = layer(0, 3)
    other = {A: one[A].clone(), B: one[B]}
    other[A].view(torch.int32)[0, 0] ^= 1
    assert sharing.digest(one[A]) != sharing.digest(other[A])
    assert sharing.digest(one[A]) != sharing.digest(one[A].reshape(9, 3))
    assert told(one) != told(other) != told({A: one[B], B: one[A]})


def test_what_stays_is_not_taken_from_a_server_that_sends_it(tmp_path):
    part = sharing.Adapter(stays=["lora_B"])
    own, sent = layer(5, 3), layer(6, 3)
    Kept(tmp_path, 0, 1).save("own", {B: own[B]})
    made = joined(part, tmp_path, sent, None, number=2)
    assert same(made, {A: sent[A], B: own[B]})
    assert joined(part, tmp_path, sent, None, number=1)[B].equal(layer(0, 3)[B])
    # Nor does it go because the server has it otherwise by now.
    assert joined(sharing.Adapter(), tmp_path, sent, None, number=2) is sent


@pytest.mark.parametrize(
    ("stays", "name", "own"),
    [
        ("lora_B", "model.layers.3.q.lora_B.default.weight", True),
        ("lora", "model.layers.3.q.lora_B.default.weight", False),
        ("layers.3", "model.layers.3.q.lora_B.default.weight", True),
        ("layers.3", "model.layers.31.q.lora_B.default.weight", False),
        ("model", "model.layers.31.q", True),
        ("weight", "model.q.weight", True),
        ("model.q.weight", "model.q.weight", True),
    ],
)
def test_names_that_stay_are_told_by_whole_parts(stays, name, own):
    assert sharing.Adapter(stays=[stays]).own([name]) == [name] * own


# --- from end to end -------------------------------------------------------------------------

# Overrides, whether A ends as it began, and whether B does.
COMBINED = [
    ("sharing=ffa comm.dtype=int8 strategy=fedadam", True, False),
    ("sharing=ffa comm.dtype=float32", True, False),
    ("sharing=ffa sharing.refactor_every=2", False, False),
    ("sharing=rolora comm.dtype=int8", False, False),
    ("sharing=rolora strategy=fedadam comm.dtype=float32", False, False),
    ("sharing=rolora strategy=fedmedian strategy.fraction_evaluate=1", False, False),
    ("sharing=fedsa comm.dtype=int8 strategy.fraction_evaluate=1", False, True),
    ("sharing=fedsa strategy=fedavgm peft=dora", False, True),
    ("sharing=ffa strategy=krum", True, False),
    ("sharing=ffa sharing.stays=[layers.3] peft=rslora", True, False),
    # FedProx pulls from its second step on.
    (
        "sharing=ffa sharing.refactor_every=1 strategy=fedprox "
        "train.training_arguments.max_steps=2",
        *(False, False),
    ),
    ("sharing=rolora sharing.stays=[layers.3] strategy=fedyogi", False, False),
    ("sharing=rolora strategy=qfedavg comm.dtype=float32", False, False),
    ("sharing=all sharing.stays=[layers.3] peft=ia3", None, None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "a_stays", "b_stays"), COMBINED)
def test_a_run_that_was_killed_twice_ends_bit_identical(
    words, a_stays, b_stays, configure, loopback, tmp_path
):
    cfg = configure(
        *("num_rounds=5", "num_clients=3", "strategy.fraction_fit=0.7"),
        *("train.training_arguments.max_steps=1", "evaluate.holdout=0.01", words),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    rounds.run(cfg, loopback(cfg, folder=whole), whole)
    killed_in(cfg, parts, replies=4)  # in its second round
    again = cfg | {"resume": str(parts)}
    killed_in(again, parts, replies=6)  # its third round, the fourth of all
    rounds.run(again, loopback(again, folder=parts), parts)
    file = "peft_5/adapter_model.safetensors"
    made = load((whole / file).read_bytes())
    assert same(made, load((parts / file).read_bytes()))
    one, other = (
        json.loads((folder / "history.json").read_text())["rounds"]
        for folder in (whole, parts)
    )
    for name in ("train_loss", "failures", "bytes_up"):
        assert [e[name] for e in one] == [e[name] for e in other]
    assert [e["failures"] for e in one] == [[]] * 5
    seeded = model.seeded(cfg.model, cfg.peft, cfg.seed)
    for half, stays in (("lora_A", a_stays), ("lora_B", b_stays)):
        for name, first in seeded.items():
            if half in name and not sharing.build(cfg.sharing).own([name]):
                assert made[_saved(name)].equal(first) == stays, name
    for name in sharing.build(cfg.sharing).own(
        seeded
    ):  # the server has the first alone
        assert made[_saved(name)].equal(seeded[name]) or "magnitude" in name


def _saved(name: str) -> str:
    """A tensor's name in PEFT's file."""
    return name.replace(".default", "")


def values(content) -> int:
    """Bytes of the arrays in a message without numpy's header of 128."""
    return sum(len(array.data) - 128 for array in content["arrays"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "sharing=all",
        "sharing=ffa",
        "sharing=ffa comm.dtype=int8",
        "sharing=ffa sharing.refactor_every=2",
        "sharing=rolora comm.dtype=float32",
        "sharing=rolora comm.dtype=int8",
        "sharing=fedsa",
    ],
)
def test_the_plan_is_what_travels(words, configure, loopback):
    cfg = configure(
        *(words, "num_clients=2", "strategy.fraction_fit=1", "num_rounds=4"),
        "train.training_arguments.max_steps=1",
    )
    up = []

    def count(partition, reply):
        if "metrics" in reply.content:
            up.append(values(reply.content))
        return reply

    grid = loopback(cfg, count)
    server = Server(cfg, grid)
    state = server.initial_adapter()
    asked = len(grid.sent)
    for number in range(1, 5):
        state, entry = server.train_round(number, state)
        assert entry["failures"] == []
    down = sum(values(message.content) for message in grid.sent[asked:])
    rows = dict(plan.plan(cfg))
    assert rows["bytes a round"] == (
        f"{plan._bytes(down // 4)} down, {plan._bytes(sum(up) // 4)} up"
    )
    assert rows["bytes in 4 rounds"].startswith(f"{plan._bytes(down + sum(up))} both")


@pytest.mark.slow
def test_what_is_asked_of_some_is_planned_for_at_most(configure):
    cfg = configure("sharing=rolora", "num_clients=8", "strategy.fraction_fit=0.25")
    assert dict(plan.plan(cfg))["bytes a round"].startswith("at most ")
    cfg = configure("sharing=ffa", "num_clients=8", "strategy.fraction_fit=0.25")
    assert not dict(plan.plan(cfg))["bytes a round"].startswith("at most ")


@pytest.mark.slow
def test_a_client_that_has_another_half_is_sent_it_when_it_is_asked_again(
    configure, loopback
):
    cfg = configure(
        "sharing=ffa",
        "sharing.refactor_every=1",
        "num_clients=2",
        "strategy.fraction_fit=1",
        "comm.dtype=float32",
    )
    grid = loopback(cfg)
    server = Server(cfg, grid)
    # Refactored once, and not after round 2.
    server.sharing.every = None
    state = server.initial_adapter()
    server.sharing.every = 1
    state, _ = server.train_round(1, state)
    server.sharing.every = None
    state, entry = server.train_round(2, state)
    both = entry["clients"][0]["bytes_down"]
    assert entry["failures"] == []
    [kept] = (grid.folder / "residuals").glob("1/held-*")
    kept.unlink()
    state, entry = server.train_round(3, state)
    [failure] = entry["failures"]
    assert failure["partition"] == 1
    assert "were not sent are not here" in failure["cause"]
    assert entry["clients"][0]["bytes_down"] < 0.6 * both
    state, entry = server.train_round(4, state)
    assert entry["failures"] == []
    assert [c["bytes_down"] < 0.6 * both for c in entry["clients"]] == [True, False]
    state, entry = server.train_round(5, state)
    assert [c["bytes_down"] < 0.6 * both for c in entry["clients"]] == [True, True]
    server.train_round(6, state)


@pytest.mark.slow
def test_nothing_that_stays_is_in_any_message(configure, loopback, tmp_path):
    cfg = configure(
        "sharing=fedsa",
        "comm.dtype=float32",
        "num_clients=4",
        "num_rounds=3",
        "strategy.fraction_fit=1",
        "strategy.fraction_evaluate=0.25",
        "evaluate.holdout=0.01",
    )
    travelled: list[bytes] = []
    stayed: set[bytes] = set()

    def read(partition, reply):
        for arrays in reply.content.array_records.values():
            travelled.extend(array.data for array in arrays.values())
            names.append({*arrays})
        for file in (tmp_path / "residuals").glob("*/own-*"):
            stayed.update(t.numpy().tobytes() for t in load_file(file).values())
        return reply

    names: list[set[str]] = []
    grid = loopback(cfg, read, tmp_path)
    rounds.run(cfg, grid, tmp_path)
    for message in grid.sent:
        travelled.extend(array.data for array in message.content["arrays"].values())
        names.append({*message.content["arrays"]})
    # The first adapter is as everybody makes it; after that no name of a B is told.
    trained = [each for each in names if any("lora_B" in name for name in each)]
    assert len(trained) == len(
        [m for m in grid.sent if m.metadata.message_type == "query"]
    )
    blob = b"".join(travelled)
    assert len(stayed) > 3 * 4  # of each client in each round
    assert not [one for one in stayed if any(one) and one in blob]
    # Row by row as well, where an update would be told in parts.
    assert not [row for one in stayed if any(row := one[:64]) and row in blob]
    shared = load_file(tmp_path / "checkpoints/000002/adapter.safetensors")
    sent = [t.numpy().tobytes() for name, t in shared.items() if "lora_A" in name]
    assert all(one in blob for one in sent)


@pytest.mark.slow
def test_each_client_is_measured_with_its_own_part(configure, loopback, tmp_path):
    """The personal part, from round to round, is what lowers the loss of its client."""
    cfg = configure(
        "sharing=fedsa",
        "num_clients=2",
        "num_rounds=2",
        "strategy.fraction_fit=1",
        "strategy.fraction_evaluate=1",
        "evaluate.holdout=0.01",
        "comm.dtype=float32",
    )
    rounds.run(cfg, loopback(cfg, folder=tmp_path), tmp_path)
    entry = json.loads((tmp_path / "history.json").read_text())["rounds"][-1]
    shared = load_file(tmp_path / "checkpoints/000002/adapter.safetensors")
    for one in entry["eval_clients"]:
        own = Kept(tmp_path / "residuals", one["partition"], 3).load("own")
        found = client.evaluate(cfg, shared | own, one["partition"])
        assert found["eval_loss"] == one["eval_loss"]
        assert all("lora_B" in name for name in own)


@pytest.mark.slow
def test_in_a_federation_nodes_keep_what_is_not_sent(tmp_path):
    """In a process for every message, each of which makes or reads it again."""
    run = (
        "experiment=quickstart num_clients=2 num_rounds=3 strategy.fraction_fit=1 "
        "evaluate.exact_match=false train.training_arguments.max_steps=2 "
    )
    with Federation(tmp_path / "federation") as federation:
        for i in (0, 1):
            base, cache = PROJECT / "assets/tiny_llama", tmp_path / f"cache-{i}"
            federation.supernode(
                f"node-{i}",
                f'partition-id={i} num-partitions=2 cpus=1 model-path="{base}" '
                f'cache-path="{cache}"',
            )
        for name, method in (
            ("first", "sharing=ffa sharing.refactor_every=2"),
            ("second", "sharing=fedsa"),
        ):
            status, output = federation.run(
                PROJECT, f"{run}{method} hydra.run.dir=results/{name}"
            )
            assert status == "finished:completed", output
        results = federation.superlink.folder / "results"
        first, second = (
            json.loads((results / name / "history.json").read_text())["rounds"]
            for name in ("first", "second")
        )
    assert [entry["failures"] for entry in first + second] == [[]] * 6
    down = [entry["bytes_down"] for entry in first]
    assert down[0] == down[1] < down[2] / 2  # A, in float32, after round 2
    assert len({entry["bytes_down"] for entry in second}) == 1
    for i in (0, 1):
        kept = [file.name for file in (tmp_path / f"cache-{i}/runs").glob("*/*/*")]
        assert sorted(kept) == [
            "held-000003.safetensors",
            *(f"own-00000{number}.safetensors" for number in (1, 2, 3)),
        ]


@pytest.mark.slow
def test_sharing_all_sends_all_to_everybody_in_every_round(configure, loopback):
    cfg = configure("num_clients=2", "strategy.fraction_fit=1")
    server = Server(cfg, grid := loopback(cfg))
    state = server.initial_adapter()
    before = len(grid.sent)
    state, _ = server.train_round(1, state)
    server.train_round(2, state)
    for message in grid.sent[before:]:
        assert message.content["arrays"].keys() == state.keys()
        assert "unsent" not in message.content["config"]


# --- what makes no sense ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("sharing=ffa peft=dora", "sharing=ffa: lora_magnitude_vector is no half"),
        ("sharing=rolora peft=dora", "sharing=rolora: lora_magnitude_vector is no"),
        ("sharing=ffa peft=ia3", "sharing=ffa: this adapter has no lora_A and lora_B"),
        ("sharing=rolora peft=prompt", "this adapter has no lora_A and lora_B. Take"),
        (
            "sharing=ffa sharing.refactor_every=2 strategy=fedadam",
            "sharing.refactor_every=2 with strategy=fedadam",
        ),
        ("sharing=ffa sharing.refactor_every=2 strategy=fedavgm", "strategy=fedavgm"),
        ("sharing=ffa sharing.refactor_every=2 comm.dtype=int8", "comm.dtype=int8"),
        (
            "sharing=ffa sharing.refactor_every=0",
            "refactor_every=0: it must be 1 or more",
        ),
        (
            "sharing=ffa sharing.refactor_every=1 model.lora.peft_lora_r=256",
            "has a higher rank than its layer",
        ),
        ("sharing=fedsa mode=local", "nobody shares anything there"),
        ("sharing=fedsa mode=centralized", "nobody shares anything there"),
        ("sharing.stays=[lora_C]", "no tensor of the adapter has lora_C in its name"),
        ("sharing.stays=[lora]", "no tensor of the adapter has lora in its name"),
        ("sharing=fedsa peft=ia3", "no tensor of the adapter has lora_B in its name"),
        (
            "sharing.stays=[lora_A,lora_B]",
            "leaves nothing for clients to send in round 1",
        ),
        ("sharing=rolora sharing.stays=[lora_A]", "clients to send in round 2"),
        ("sharing=ffa sharing.stays=[lora_B]", "clients to send in round 1"),
        ("sharing.stays=lora_B", "sharing.stays=lora_B: a list of parts of names"),
        ("sharing.stays=null", "sharing.stays=null: a list of parts of names"),
        ("sharing.stays=[3]", "a list of parts of names is needed"),
        ("'sharing.stays=[\".*\"]'", "a list of parts of names is needed"),
        ("+sharing.refactor_every=2", "Adapter refuses its settings"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(words, told, configure):
    with pytest.raises(UserError) as refused:
        configure(words)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_run_that_was_begun_before_goes_on(tmp_path):
    """Its configuration has neither `stays` nor the file's name of today."""
    record(config := compose(words := "experiment=quickstart"), [words], tmp_path)
    file = tmp_path / ".hydra/config.yaml"
    text = file.read_text()
    assert "  stays: []\n" in text
    file.write_text(text.replace("  stays: []\n", ""))
    again, _ = resumed(str(tmp_path), [])
    assert again.sharing == config.sharing
    with pytest.raises(UserError, match=r"sharing\.stays was"):
        resumed(str(tmp_path), ["sharing=fedsa"])


def test_a_node_takes_the_choice_and_the_names_from_a_run():
    words = "experiment=quickstart sharing=ffa sharing.stays=[layers.3]"
    config = permit.compose(permit.parse(words))
    assert sharing.build(config.sharing).stays == [".layers.3."]
    cfg = preflight.validated(preflight.resolve(config))
    assert cfg.sharing.stays == ["layers.3"]
