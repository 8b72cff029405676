"""pytest tests/test_weights.py: Krum and a bound by what adapters do, not by their factors."""

import flwr.serverapp.strategy as flower
import pytest
import torch
from flwr.serverapp.strategy.multikrum import compute_distances
from hypothesis import given, settings
from hypothesis import strategies as st

from methods import aggregate, lora, steps
from methods.base import Contribution, State
from utils import UserError

D, K, RANK = 13, 9, 3
A, B, BIAS = "m.lora_A.default.weight", "m.lora_B.default.weight", "m.bias"
LAYER = lora.Layer(A, B, 6.0, 1.0)
SEEDS = st.integers(0, 2**31)
KRUM = {"_target_": "flwr.serverapp.strategy.Krum", "num_malicious_nodes": 1}
MULTI = KRUM | {
    "_target_": "flwr.serverapp.strategy.MultiKrum",
    "num_nodes_to_select": 3,
}
BULYAN = KRUM | {"_target_": "flwr.serverapp.strategy.Bulyan"}
examples = settings(max_examples=40, deadline=None)


def drawn(seed: int, size: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {A: (RANK, K), B: (D, RANK), BIAS: (D,)}
    return {k: size * torch.randn(v, generator=generator) for k, v in shapes.items()}


def function(state: State) -> torch.Tensor:
    return LAYER.alpha / RANK * state[B].double() @ state[A].double()


def reply(partition: int, sent: State, after: State, weight: int = 1) -> Contribution:
    update = {name: after[name] - sent[name] for name in after}
    return Contribution(partition, sent, update, weight, loss=1.0)


def turned(state: State, seed: int) -> State:
    """The same function, of other factors."""
    r = torch.linalg.qr(drawn(seed)[A][:, :RANK])[0] * 5
    return state | {A: torch.linalg.inv(r) @ state[A], B: state[B] @ r}


def aggregated(node: dict, state: State, after: list[State], layers=(LAYER,)) -> State:
    made = aggregate.build(node, layers)
    made.begin(state, 1)
    for i in reversed(range(len(after))):
        made.add(reply(i, state, after[i]))
    return made.apply(made.gathered())


# --- Krum and its kin ------------------------------------------------------------------------


@examples
@given(SEEDS, st.integers(2, 6))
def test_places_are_at_the_distances_of_what_the_adapters_do(seed, count):
    start = drawn(seed)
    after = [drawn(seed + 1 + i) for i in range(count)]
    replies = [reply(i, start, each) for i, each in enumerate(after)]
    places = lora.places([LAYER], start, replies)
    for one, here in zip(after, places, strict=True):
        for other, there in zip(after, places, strict=True):
            wanted = (function(one) - function(other)).square().sum()
            wanted = wanted + (one[BIAS] - other[BIAS]).double().square().sum()
            assert torch.allclose((here - there).square().sum(), wanted, atol=1e-3)


def test_krum_takes_one_that_does_the_same_however_its_factors_are_turned():
    start, aim = drawn(0), drawn(1)
    after = [
        turned({k: v + drawn(10 + i, 0.01)[k] for k, v in aim.items()}, 30 + i)
        for i in range(6)
    ]
    # In factors the attack is in the middle; what it does is far from all.
    after.append({k: torch.stack([one[k] for one in after]).mean(0) for k in aim})
    plain = aggregated(KRUM, start, after, layers=())
    assert torch.allclose(plain[A], after[-1][A], atol=1e-5)
    assert (function(plain) - function(aim)).norm() > 0.5 * function(aim).norm()
    made = aggregated(KRUM, start, after)
    assert (function(made) - function(aim)).norm() < 0.1 * function(aim).norm()


@pytest.mark.parametrize("node", [KRUM, MULTI])
def test_krum_chooses_as_its_rule_does_of_whole_matrices(node):
    start = drawn(0)
    after = [drawn(1 + i) for i in range(7)]
    whole = [{"f": function(one).float(), BIAS: one[BIAS]} for one in after]
    oracle = flower.MultiKrum(
        num_malicious_nodes=1, num_nodes_to_select=node.get("num_nodes_to_select", 1)
    )
    records = [aggregate.Reply(one, 1, 1.0) for one in whole]
    kept: list = []
    oracle.train_metrics_aggr_fn = lambda contents, key: kept.extend(contents)
    oracle.aggregate_train(1, records)
    pairs = zip(after, records, strict=True)
    wanted = [one for one, r in pairs if any(r.content is x for x in kept)]
    made = aggregated(node, start, after)
    for name in made:
        mean = torch.stack([one[name] for one in wanted]).mean(0)
        assert torch.allclose(made[name], mean, atol=1e-5)


def test_bulyan_leaves_out_by_what_adapters_do(monkeypatch):
    start = drawn(0)
    after = [drawn(1 + i, 0.01) for i in range(6)] + [drawn(9, 100)]
    made = aggregated(BULYAN, start, after)
    honest = torch.stack([one[A] for one in after[:6]])
    assert (made[A] >= honest.amin(0) - 1e-5).all()
    assert (made[A] <= honest.amax(0) + 1e-5).all()
    asked = []
    rule = aggregate.select_multikrum
    monkeypatch.setattr(
        aggregate, "select_multikrum", lambda *a: asked.append(a) or rule(*a)
    )
    aggregated(BULYAN, start, after)
    [(stands, malicious, count)] = asked
    assert (malicious, count) == (1, 5)
    found = compute_distances([stand["arrays"] for stand in stands])
    wanted = (function(after[0]) - function(after[6])).square().sum()
    wanted = wanted + (after[0][BIAS] - after[6][BIAS]).double().square().sum()
    assert found[0, 6] == pytest.approx(wanted.item(), rel=1e-6)


def test_what_stays_with_a_client_is_not_taken_for_nothing():
    """Of halves alone, whose others are unknown here, distances are those of the halves."""
    start = drawn(0)
    start[B].zero_()
    replies = [
        Contribution(i, {A: start[A]}, {A: drawn(1 + i)[A]}, 1, 1.0, {B: start[B]})
        for i in range(3)
    ]
    places = lora.places([LAYER], start, replies)
    one, other = (reply.update[A].double() for reply in replies[:2])
    assert torch.allclose((places[0] - places[1]).norm(), (one - other).norm())


# --- a bound of the weights' update -------------------------------------------------------------


@examples
@given(SEEDS, st.sampled_from([0.01, 1.0, 10.0, 1e4]), st.sampled_from([1e-3, 1, 100]))
def test_what_an_update_does_is_bounded_and_as_much_as_may_be(seed, longest, size):
    start = drawn(seed)
    after = {k: v + size * drawn(seed + 1)[k] for k, v in start.items()}

    def length(one: Contribution) -> float:
        made = {k: one.value(k) for k in start}
        moved = (function(made) - function(start)).square().sum()
        rest = (made[BIAS] - start[BIAS].double()).square().sum()
        return (moved + rest).sqrt().item()

    one = reply(0, start, after)
    clipped = steps.ClipWeights(longest, [LAYER]).arrive(one)
    if length(one) <= longest:
        for name in start:
            assert torch.equal(clipped.update[name], one.update[name])
    else:
        assert length(clipped) == pytest.approx(longest, rel=1e-3)
    assert steps.ClipWeights(None, []).arrive(one) is one


def test_half_an_update_is_bounded_too():
    start = drawn(0)
    one = Contribution(
        0, {B: start[B]}, {B: drawn(1)[B]}, 1, 1.0, {A: start[A], BIAS: start[BIAS]}
    )
    clipped = steps.ClipWeights(2.0, [LAYER]).arrive(one)
    moved = function({A: start[A], B: clipped.update[B]})
    assert moved.norm().item() == pytest.approx(2, rel=1e-5)


@pytest.mark.slow
def test_a_bound_of_weights_needs_weights_that_are_added_to(configure):
    assert configure("strategy.clip_weights=2").strategy.clip_weights == 2
    with pytest.raises(UserError, match=r"strategy.clip_weights=2.*no LoRA"):
        configure("strategy.clip_weights=2.0", "peft=ia3")
    with pytest.raises(UserError, match=r"strategy\.clip_weights=0"):
        configure("strategy.clip_weights=0.0")
