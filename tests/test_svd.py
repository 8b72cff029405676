"""pytest tests/test_svd.py: invariants of aggregation, on what adapters do."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from methods import aggregate, lora
from methods.base import Contribution, State
from reporting import tables
from server import tracking
from server.rounds import Server, run
from utils import UserError, read_json

D, K = 13, 9
A, B, BIAS = "m.lora_A.default.weight", "m.lora_B.default.weight", "m.bias"
SEEDS = st.integers(0, 2**31)
RANKS = st.integers(1, 5)
ALPHAS = st.sampled_from([0.5, 4.0, 16.0])
POWERS = st.sampled_from([1.0, 0.5])
WEIGHTS = st.lists(st.integers(1, 9), min_size=1, max_size=4)
SVD = {"_target_": "methods.aggregate.Svd"}
MEAN = {"_target_": "flwr.serverapp.strategy.FedAvg"}
examples = settings(max_examples=40, deadline=None)


def drawn(seed: int, rank: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {A: (rank, K), B: (D, rank), BIAS: (D,)}
    return {k: torch.randn(v, generator=generator) for k, v in shapes.items()}


def function(layer: lora.Layer, state: State) -> torch.Tensor:
    """s B A, as a matrix: what the tested code never forms."""
    rank = len(state[A])
    scale = layer.alpha / (rank if layer.power == 1 else math.sqrt(rank))
    return scale * state[B].double() @ state[A].double()


def reply(partition: int, sent: State, after: State, weight: int = 1) -> Contribution:
    update = {name: after[name] - sent[name] for name in after}
    return Contribution(partition, sent, update, weight, loss=1.0)


def aggregated(
    node: dict, layer: lora.Layer, state: State, replies: list[Contribution]
) -> State:
    made = aggregate.build(node, [layer])
    made.begin(made.start(state, len(replies)), 1)
    for one in replies:
        made.add(one)
    return made.apply(made.gathered())


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """But for what float32 rounds away of factors."""
    return bool((one - other).norm() <= 1e-5 * max(1.0, other.norm().item()))


@examples
@given(SEEDS, RANKS, ALPHAS, POWERS, st.integers(1, 9))
def test_1_one_client_is_taken_as_it_is(seed, rank, alpha, power, weight):
    layer, start = lora.Layer(A, B, alpha, power), drawn(seed, rank)
    after = drawn(seed + 1, rank)
    for node in (SVD, MEAN):
        made = aggregated(node, layer, start, [reply(0, start, after, weight)])
        assert near(function(layer, made), function(layer, after))
        assert near(made[BIAS], after[BIAS])


@examples
@given(SEEDS, RANKS, ALPHAS, POWERS, WEIGHTS)
def test_2_and_3_clients_that_agree_are_taken_at_their_word(
    seed, rank, alpha, power, weights
):
    layer, start = lora.Layer(A, B, alpha, power), drawn(seed, rank)
    for node in (SVD, MEAN):
        for after in (drawn(seed + 1, rank), start):
            replies = [reply(i, start, after, w) for i, w in enumerate(weights)]
            made = aggregated(node, layer, start, replies)
            assert near(function(layer, made), function(layer, after))


@examples
@given(SEEDS, RANKS, ALPHAS, POWERS, st.integers(1, 9), st.integers(1, 9))
def test_4_two_clients_are_met_at_the_distance_of_eckart_and_young(
    seed, rank, alpha, power, one, other
):
    layer, start = lora.Layer(A, B, alpha, power), drawn(seed, rank)
    after = [drawn(seed + 1, rank), drawn(seed + 2, rank)]
    replies = [reply(0, start, after[0], one), reply(1, start, after[1], other)]
    p = one / (one + other)
    exact = p * function(layer, after[0]) + (1 - p) * function(layer, after[1])
    tail = torch.linalg.svdvals(exact)[rank:].square().sum().sqrt()
    made = aggregated(SVD, layer, start, replies)
    off = torch.linalg.norm(function(layer, made) - exact)
    assert off == pytest.approx(tail.item(), rel=1e-5, abs=1e-5 * exact.norm().item())
    assert near(made[BIAS], p * after[0][BIAS] + (1 - p) * after[1][BIAS])
    # No other of that rank is nearer, that of plain averaging included.
    plain = aggregated(MEAN, layer, start, replies)
    assert torch.linalg.norm(function(layer, plain) - exact) >= off - 1e-4


@examples
@given(SEEDS, RANKS, ALPHAS, POWERS, WEIGHTS)
def test_5_the_same_update_in_twice_the_rank_is_the_same(
    seed, rank, alpha, power, weights
):
    """As (r, alpha), and as (2 r zero-padded, 2 alpha); sqrt(2) alpha with rsLoRA."""

    def wide(state: State) -> State:
        pad = torch.nn.functional.pad
        halves = {A: pad(state[A], (0, 0, 0, rank)), B: pad(state[B], (0, rank))}
        return state | halves

    layer, start = lora.Layer(A, B, alpha, power), drawn(seed, rank)
    double = lora.Layer(A, B, alpha * 2**power, power)
    after = [drawn(seed + 1 + i, rank) for i in range(len(weights))]
    narrow = [reply(i, start, after[i], w) for i, w in enumerate(weights)]
    broad = [reply(i, wide(start), wide(after[i]), w) for i, w in enumerate(weights)]
    exact = lora.mean(layer, start, narrow), lora.mean(double, wide(start), broad)
    (b, a), (d, c) = exact
    assert near(b @ a, d @ c)
    made = aggregated(MEAN, layer, start, narrow)
    other = aggregated(MEAN, double, wide(start), broad)
    assert near(function(layer, made), function(double, other))
    if len(weights) == 1 or rank >= min(D, K):  # else twice the rank holds more
        made = aggregated(SVD, layer, start, narrow)
        other = aggregated(SVD, double, wide(start), broad)
        assert near(function(layer, made), function(double, other))


@examples
@given(SEEDS, RANKS, WEIGHTS, st.randoms(use_true_random=False))
def test_6_order_of_arrival_changes_no_bit(seed, rank, weights, random):
    layer, start = lora.Layer(A, B, 4.0, 1.0), drawn(seed, rank)
    replies = [
        reply(i, start, drawn(seed + 1 + i, rank), w) for i, w in enumerate(weights)
    ]
    late = random.sample(replies, len(replies))
    for node in (SVD, MEAN):
        made = aggregated(node, layer, start, replies)
        again = aggregated(node, layer, start, late)
        assert all(torch.equal(made[name], again[name]) for name in start)


@examples
@given(SEEDS, RANKS, WEIGHTS)
def test_6_which_client_has_which_number_changes_nothing(seed, rank, weights):
    layer, start = lora.Layer(A, B, 4.0, 1.0), drawn(seed, rank)
    last = len(weights) - 1
    each = [(drawn(seed + 1 + i, rank), w) for i, w in enumerate(weights)]
    replies = [reply(i, start, after, w) for i, (after, w) in enumerate(each)]
    turned = [reply(last - i, start, after, w) for i, (after, w) in enumerate(each)]
    for node in (SVD, MEAN):
        made, other = (aggregated(node, layer, start, x) for x in (replies, turned))
        assert near(function(layer, made), function(layer, other))


@examples
@given(SEEDS, st.integers(2, 5), ALPHAS, POWERS)
def test_7_a_client_that_rotates_its_factors_changes_nothing(seed, rank, alpha, power):
    layer, start = lora.Layer(A, B, alpha, power), drawn(seed, rank)
    one, other = drawn(seed + 1, rank), drawn(seed + 2, rank)
    r = torch.linalg.qr(drawn(seed + 3, rank)[A][:, :1] @ torch.ones(1, rank))[0]
    turned = other | {A: r.T @ other[A], B: other[B] @ r}
    assert near(function(layer, turned), function(layer, other))
    replies = [reply(0, start, one), reply(1, start, other)]
    rotated = [reply(0, start, one), reply(1, start, turned)]
    made, again = (aggregated(SVD, layer, start, x) for x in (replies, rotated))
    assert near(function(layer, made), function(layer, again))
    # Plain averaging is the counter-example, whenever anything was turned.
    if torch.linalg.norm(r - torch.eye(rank)) > 0.1:
        made, again = (aggregated(MEAN, layer, start, x) for x in (replies, rotated))
        assert not near(function(layer, made), function(layer, again))


def test_8_a_server_optimiser_is_no_setting_of_it():
    with pytest.raises(UserError, match="refuses its settings"):
        aggregate.build(SVD | {"server_momentum": 0.9})
    assert aggregate.build(SVD).keeps == ()


@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        (["peft=dora"], "as DoRA is"),
        (["peft=ia3"], "it is no LoRA"),
        (["peft=prefix"], "it is no LoRA"),
    ],
)
def test_what_is_no_sum_of_products_is_refused_in_a_line(overrides, cause, configure):
    with pytest.raises(UserError, match=cause) as refused:
        configure("strategy=svd", *overrides)
    assert "strategy._target_=methods.aggregate.Svd" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["sharing=ffa"],
        ["sharing=rolora"],
        ["sharing=fedsa"],
        ["sharing.stays=[lora_B]"],
    ],
)
def test_a_part_of_the_adapter_is_refused(overrides, configure):
    with pytest.raises(UserError, match="leaves a part of the adapter out") as refused:
        configure("strategy=svd", *overrides)
    assert "\n" not in str(refused.value)


# --- in a run ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_takes_the_best_of_the_mean_and_goes_on_bit_for_bit(
    configure, loopback, tmp_path
):
    cfg = configure(
        "strategy=svd", "peft=rslora", "num_rounds=3", "strategy.fraction_fit=0.75"
    )
    (tmp_path / "whole").mkdir()
    run(cfg, loopback(cfg), tmp_path / "whole")
    [*_, last] = read_json(tmp_path / "whole/history.json")["rounds"]
    assert last["failures"] == []
    # Killed after round 2, and gone on with.
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoints/000003")
    again = cfg | {"resume": str(tmp_path / "part")}
    run(again, loopback(again), tmp_path / "part")
    whole, part = (
        load_file(tmp_path / name / "peft_3/adapter_model.safetensors")
        for name in ("whole", "part")
    )
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    # The right singular vectors, as they are.
    for name, tensor in whole.items():
        if "lora_A" in name:
            assert torch.allclose(tensor @ tensor.T, torch.eye(len(tensor)), atol=1e-5)
    told, retold = (
        read_json(tmp_path / n / "history.json")["rounds"] for n in ("whole", "part")
    )
    errors = [entry["aggregation_error"] for entry in told]
    assert errors == [entry["aggregation_error"] for entry in retold]
    assert all(0 <= error < 1 for error in errors)
    figures = tracking.figures(last)
    assert figures["aggregation_error"] == errors[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "known"),
    [([], True), (["peft=dora"], False), (["peft=ia3"], False)],
)
def test_every_round_tells_its_aggregation_error_where_it_is_known(
    overrides, known, configure, loopback
):
    cfg = configure("comm.dtype=float32", *overrides)
    server = Server(cfg, loopback(cfg))
    state = server.initial_adapter()
    _, entry = server.train_round(1, state)
    assert (entry["aggregation_error"] is not None) == known
    if known:
        assert 0.01 < entry["aggregation_error"] < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "exact"),
    [
        (["sharing=ffa"], True),
        (["sharing=ffa", "sharing.refactor_every=1"], True),
        (["sharing=rolora"], True),
        (["sharing=fedsa"], False),
    ],
)
def test_half_of_an_adapter_is_averaged_exactly_or_not_known(
    overrides, exact, configure, loopback
):
    cfg = configure("comm.dtype=float32", *overrides)
    server = Server(cfg, loopback(cfg))
    _, entry = server.train_round(1, server.initial_adapter())
    error = entry["aggregation_error"]
    assert error < 1e-5 if exact else error is None


def test_the_report_tells_the_mean_over_rounds_that_know_it():
    def told(*errors: float | None) -> SimpleNamespace:
        rounds = [{"aggregation_error": error} for error in errors]
        return SimpleNamespace(rounds=[{}, *rounds])  # an older run tells of none

    assert tables.aggregation_error(told(0.25, None, 0.75)) == 50
    assert math.isnan(tables.aggregation_error(told(None)))
