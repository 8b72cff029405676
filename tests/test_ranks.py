"""pytest tests/test_ranks.py: clients of different ranks, in a simulation and of nodes."""

import math

import peft
import pytest
import torch
from flwr.app import ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import client
import model
from methods import aggregate, lora
from methods.base import Contribution, State
from node import permit
from server.rounds import Server
from settings import plan, preflight
from settings.compose import compose, resolve
from utils import Refusal, UserError

D, K, RUN = 13, 9, 6
A, B = "m.lora_A.default.weight", "m.lora_B.default.weight"
SEEDS = st.integers(0, 2**31)
RANKS = st.lists(st.integers(1, RUN), min_size=1, max_size=4)
POWERS = st.sampled_from([1.0, 0.5])
SVD = {"_target_": "methods.aggregate.Svd"}
examples = settings(max_examples=40, deadline=None)


def drawn(seed: int, rank: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {A: (rank, K), B: (D, rank)}
    return {k: torch.randn(v, generator=generator) for k, v in shapes.items()}


def function(layer: lora.Layer, state: State) -> torch.Tensor:
    rank = len(state[A])
    scale = layer.alpha / (rank if layer.power == 1 else math.sqrt(rank))
    return scale * state[B].double() @ state[A].double()


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).norm() <= 1e-5 * max(1.0, other.norm().item()))


def played(layer, ranks, start, train):
    """What clients of these ranks are sent, have trained, and make together."""
    made = aggregate.build(SVD | {"ranks": ranks}, [layer])
    made.begin(start, 1)
    sent = [made.down(start, i) for i in range(len(ranks))]
    after = [train(i, each) for i, each in enumerate(sent)]
    for i, (one, other) in enumerate(zip(sent, after, strict=True)):
        update = {name: other[name] - one[name] for name in one}
        made.add(Contribution(i, one, update, weight=i + 1, loss=1.0))
    return sent, after, made.apply(made.gathered())


@examples
@given(SEEDS, RANKS, POWERS)
def test_the_mean_is_of_what_each_has_changed(seed, ranks, power):
    layer, start = lora.Layer(A, B, 4.0, power), drawn(seed, RUN)
    sent, after, made = played(
        layer, ranks, start, lambda i, one: drawn(seed + 1 + i, len(one[A]))
    )
    assert [len(one[A]) for one in sent] == ranks
    total = sum(range(1, len(ranks) + 1))
    exact = function(layer, start) + sum(
        (i + 1) / total * (function(layer, other) - function(layer, one))
        for i, (one, other) in enumerate(zip(sent, after, strict=True))
    )
    tail = torch.linalg.svdvals(exact)[RUN:].square().sum().sqrt()
    off = torch.linalg.norm(function(layer, made) - exact)
    assert off == pytest.approx(tail.item(), rel=1e-4, abs=1e-5 * exact.norm().item())


@examples
@given(SEEDS, RANKS, POWERS)
def test_where_nobody_moves_nothing_is_lost_beyond_their_ranks(seed, ranks, power):
    layer, start = lora.Layer(A, B, 4.0, power), drawn(seed, RUN)
    *_, made = played(layer, ranks, start, lambda i, one: one)
    assert near(function(layer, made), function(layer, start))


@examples
@given(SEEDS, st.integers(1, RUN), POWERS)
def test_one_client_of_a_lower_rank_is_taken_as_it_is(seed, rank, power):
    layer, start = lora.Layer(A, B, 4.0, power), drawn(seed, RUN)
    start[B].zero_()  # as every run begins
    _, [after], made = played(
        layer, [rank], start, lambda i, one: drawn(seed + 1, rank)
    )
    assert near(function(layer, made), function(layer, after))
    # And all that it did comes back to it, though its scale is another than the run's.
    again = aggregate.build(SVD | {"ranks": [rank]}, [layer]).down(made, 0)
    assert near(function(layer, again), function(layer, after))


def test_ranks_are_dealt_out_as_a_list_or_by_shares():
    listed = aggregate.build(SVD | {"ranks": [4, 2, 8]})
    assert [listed.rank(i) for i in range(5)] == [4, 2, 8, 4, 2]
    shared = aggregate.build(SVD | {"ranks": {4: 0.5, 16: 0.3, 32: 0.2}})
    dealt = [shared.rank(i) for i in range(20)]
    assert [dealt.count(rank) for rank in (4, 16, 32)] == [10, 6, 4]
    assert {*dealt[:5]} == {4, 16, 32}  # mixed, as clients often stand in an order
    assert aggregate.build(SVD).rank(0) is None


# --- clients -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_goes_from_rank_to_rank_and_leaves_no_trace(configure):
    cfg = configure("strategy=svd", "peft=rslora")
    whole = client.initial_adapter(cfg)
    small = lora.cut(whole, 2, 0.5)
    one, _ = client.train(cfg, small, 0, 1)
    before, _ = client.train(cfg, whole, 1, 1)
    again, _ = client.train(cfg, small, 0, 1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    # As a run of that rank would have trained it.
    own = cfg | {"peft": model.capped(cfg.peft, 2)}
    plain, _ = client.train(own, small, 0, 1)
    assert all(torch.equal(one[name], plain[name]) for name in one)
    after, _ = client.train(cfg, whole, 1, 1)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_bytes_follow_ranks_and_each_adapter_is_a_plain_one(
    configure, loopback, tmp_path
):
    cfg = configure(
        "strategy=svd", "strategy.fraction_fit=1", "strategy.ranks=[2,8,16,16]"
    )
    server = Server(cfg, loopback(cfg))
    start = server.initial_adapter()
    state, entry = server.train_round(1, start)
    assert entry["failures"] == []
    assert [c["rank"] for c in entry["clients"]] == [2, 8, 16, 16]
    down, up = ([c[k] for c in entry["clients"]] for k in ("bytes_down", "bytes_up"))
    assert down == up
    assert down[0] < down[1] / 2 < down[2] / 4 * 1.2
    assert down[2] == down[3]
    assert {n: t.shape for n, t in state.items()} == {
        n: t.shape for n, t in start.items()
    }
    # The folder of a client is PEFT's own, of its rank and scale.
    own = server.aggregation.down(state, 0)
    frame = model.skeleton(cfg.model, model.capped(cfg.peft, 2))
    tokenizer = model.load_tokenizer(cfg.model.name)
    about = {"template": cfg.dataset.template, "model": {"name": cfg.model.name}}
    model.save_adapter(frame, own, tokenizer, about, tmp_path / "own")
    told = peft.PeftConfig.from_pretrained(str(tmp_path / "own"))
    assert (told.r, told.lora_alpha) == (2, cfg.peft.lora_alpha)
    weights = load_file(tmp_path / "own/adapter_model.safetensors")
    assert {len(t) for n, t in weights.items() if "lora_A" in n} == {2}


@pytest.mark.slow
def test_a_node_of_a_lower_rank_trains_that_and_is_sent_no_more(configure, loopback):
    cfg = configure("strategy=svd", "strategy.fraction_fit=1", "num_clients=2")
    server = Server(cfg, loopback(cfg | {"rank": 4}))
    state = server.initial_adapter()
    state, first = server.train_round(1, state)
    state, second = server.train_round(2, state)
    assert first["failures"] == second["failures"] == []
    assert [c["rank"] for c in first["clients"]] == [4, 4]
    assert second["bytes_down"] == second["bytes_up"] == first["bytes_up"]
    assert first["bytes_down"] > 3 * first["bytes_up"]
    assert first["aggregation_error"] is not None
    # Gone on with, the server knows it from the history.
    other = Server(cfg, loopback(cfg | {"rank": 4}))
    for told in first["clients"]:
        other.aggregation.hear(told)
    again, retold = other.train_round(2, server.aggregation.state)
    assert retold["bytes_down"] == second["bytes_down"]
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [3, 99, 0, 2.5])
def test_a_rank_is_a_bounded_number_and_shapes_are_held_to_it(
    rank, configure, loopback
):
    cfg = configure("strategy=svd", "strategy.fraction_fit=1", "num_clients=2")

    def lie(partition, reply):
        if partition == 1 and "metrics" in reply.content:
            reply.content["metrics"]["rank"] = rank
        return reply

    def wide(partition, reply):
        lie(partition, reply)
        if rank == 99 and partition == 1 and "metrics" in reply.content:
            state = reply.content["arrays"].to_torch_state_dict()
            state = {n: torch.zeros(99, *t.shape[1:]).half() for n, t in state.items()}
            reply.content["arrays"] = ArrayRecord(state)
        return reply

    server = Server(cfg, loopback(cfg, wide))
    _, entry = server.train_round(1, server.initial_adapter())
    assert [f["partition"] for f in entry["failures"]] == [1]
    cause = entry["failures"][0]["cause"]
    assert "shape" in cause if rank in (3, 99) else "its rank" in cause


@pytest.mark.slow
def test_a_node_has_its_own_rank_or_takes_no_part():
    def settled(*overrides: str, **own: int) -> dict:
        cfg = resolve(compose(" ".join(["experiment=quickstart", *overrides])))
        permit.settle_rank(cfg, permit.check_settings(own))
        return cfg

    assert settled("strategy=svd", rank=4).rank == 4
    assert "rank" not in settled("strategy=svd", rank=64)
    assert "rank" not in settled("strategy=svd")
    assert "rank" not in settled("peft=ia3", rank=4)
    assert "rank" not in settled(rank=64)
    with pytest.raises(Refusal, match="strategy=svd"):
        settled(rank=4)
    with pytest.raises(UserError, match="rank must be 1 or more"):
        permit.check_settings({"rank": 0})


# --- before the run ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        (["strategy.ranks=[4,64]"], "the run's adapter has rank 16"),
        (["strategy.ranks=[]"], "take a list"),
        (["strategy.ranks=[0]"], "take a list"),
        (["strategy.ranks=8"], "take a list"),
        (["strategy.ranks={4:0}"], "take a list"),
        (["strategy.ranks=[4]", "+peft.init_lora_weights=olora"], "different bases"),
        (["comm.dtype=int8"], "comm.dtype=float16"),
        (["personal=ditto", "strategy.fraction_evaluate=1"], "Leave out the one"),
    ],
)
def test_ranks_that_cannot_be_are_refused_in_a_line(overrides, cause, configure):
    with pytest.raises(UserError, match=cause) as refused:
        configure("strategy=svd", "model.quantization=null", *overrides)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_ranks_are_the_nodes_own_in_a_federation():
    cfg = compose("experiment=quickstart strategy=svd strategy.ranks=[4]")
    with pytest.raises(UserError, match="--node-config rank=8"):
        preflight.check(cfg, deployed=True)


@pytest.mark.slow
def test_the_plan_tells_what_each_rank_takes():
    cfg = resolve(
        compose(
            "experiment=quickstart strategy=svd strategy.ranks={4:0.5,16:0.5} "
            "model.gradient_checkpointing=false"
        )
    )
    rows = dict(plan.plan(cfg))
    whole = dict(plan.plan(cfg | {"strategy": cfg.strategy | {"ranks": None}}))
    assert rows["rank 4"].startswith("10 clients, ")
    assert rows["rank 16"].startswith("10 clients, ")
    assert whole["adapter on the wire"].split(" (")[0] in rows["rank 16"]
    assert rows["bytes a round"] != whole["bytes a round"]
    assert rows["memory a client"] == whole["memory a client"]
