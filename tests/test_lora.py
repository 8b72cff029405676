"""pytest tests/test_lora.py: LoRA as a function, its exact mean, and what is made of it."""

import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from methods import lora
from methods.base import Contribution
from utils import PROJECT

D, K = 11, 7
A, B = "m.lora_A.default.weight", "m.lora_B.default.weight"
POWERS = st.sampled_from([1.0, 0.5])
SEEDS = st.integers(0, 2**31)
RANKS = st.integers(1, 6)
ALPHAS = st.sampled_from([0.5, 4.0, 16.0])


def drawn(seed: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {A: (rank, K), B: (D, rank)}
    return {k: torch.randn(v, generator=generator) for k, v in shapes.items()}


def function(layer: lora.Layer, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """s B A, as a matrix."""
    rank = len(state[A])
    scale = layer.alpha / (rank if layer.power == 1 else math.sqrt(rank))
    return scale * state[B].double() @ state[A].double()


def reply(partition: int, sent: dict, after: dict, weight: int = 1) -> Contribution:
    update = {name: after[name] - sent[name] for name in after}
    return Contribution(partition, sent, update, weight, loss=1.0)


def tiny(**more) -> peft.PeftModel:
    config = AutoConfig.from_pretrained(PROJECT / "assets/tiny_llama")
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        return peft.get_peft_model(base, peft.LoraConfig(**more))


# --- layers, as PEFT has them ------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [True, False])
def test_layers_are_those_of_peft_with_its_scales(rslora):
    frame = tiny(
        r=8,
        lora_alpha=12,
        use_rslora=rslora,
        target_modules=["q_proj", "v_proj", "embed_tokens"],
        rank_pattern={"layers.0.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 5},
    )
    found = lora.layers(frame)
    names = {n: p for n, p in frame.named_parameters() if p.requires_grad}
    assert {name for layer in found for name in (layer.a, layer.b)} == names.keys()
    for layer in found:
        module = frame.get_submodule(layer.a.split(".lora_")[0])
        rank = len(names[layer.a])
        assert names[layer.b].shape[1] == rank
        assert layer.scale(rank) == pytest.approx(module.scaling["default"])
    assert lora.rank(names) == 8


def test_what_is_no_sum_of_products_has_no_layers():
    assert lora.layers(tiny(r=2, target_modules=["q_proj"], use_dora=True)) == ()
    config = AutoConfig.from_pretrained(PROJECT / "assets/tiny_llama")
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        frame = peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM"))
    assert lora.layers(frame) == ()
    assert lora.rank(dict(frame.named_parameters())) is None


def test_the_difference_an_adapter_makes_is_what_peft_adds():
    torch.manual_seed(0)
    net = peft.get_peft_model(
        torch.nn.ModuleDict(
            {"q": torch.nn.Linear(K, D), "e": torch.nn.Embedding(9, 5)}
        ),
        peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["q", "e"]),
    )
    state = {n: torch.randn_like(p) for n, p in net.named_parameters() if "lora" in n}
    net.load_state_dict(state, strict=False)
    for layer in lora.layers(net):
        b, a = lora.factors(layer, state[layer.a], state[layer.b])
        module = net.get_submodule(layer.a.split(".lora_")[0])
        added = module.get_delta_weight("default").double()
        added = added.T if "embedding" in layer.a else added
        assert torch.allclose(b @ a, added, atol=1e-5)


# --- sums of products --------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.lists(RANKS, min_size=1, max_size=4), POWERS, ALPHAS)
def test_products_and_distances_are_those_of_the_matrices(seed, ranks, power, alpha):
    layer = lora.Layer(A, B, alpha, power)
    states = [drawn(seed + i, rank) for i, rank in enumerate(ranks)]
    each = [lora.factors(layer, state[A], state[B]) for state in states]
    whole = torch.stack([function(layer, state).flatten() for state in states])
    assert torch.allclose(lora.gram(each), whole @ whole.T)
    assert lora.inner(each[0], each[-1]) == pytest.approx((whole[0] @ whole[-1]).item())


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.integers(1, 20), st.integers(1, 13))
def test_the_best_of_a_rank_is_at_the_distance_of_eckart_and_young(seed, terms, rank):
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(D, terms, generator=generator).double()
    a = torch.randn(terms, K, generator=generator).double()
    left, right = lora.best((b, a), rank)
    assert left.shape == (D, rank)
    assert right.shape == (rank, K)
    tail = torch.linalg.svdvals(b @ a)[rank:].square().sum().sqrt()
    assert torch.linalg.norm(left @ right - b @ a) == pytest.approx(
        tail.item(), abs=1e-9
    )
    rows = right[: min(rank, terms, K)]
    assert torch.allclose(rows @ rows.T, torch.eye(len(rows)).double())
    # The strongest first, and no sign left to chance.
    lengths = left.norm(dim=0)
    assert (lengths[:-1] >= lengths[1:] - 1e-9).all()
    assert all(column[column.abs().argmax()] >= 0 for column in left.T)


def test_a_direction_without_strength_can_still_be_trained():
    _, right = lora.best((torch.zeros(D, 4).double(), drawn(0, 4)[A].double()), 4)
    assert torch.allclose(right @ right.T, torch.eye(4).double())


@settings(max_examples=50, deadline=None)
@given(SEEDS, RANKS, RANKS, POWERS, ALPHAS)
def test_a_cut_adapter_is_the_best_of_its_rank(seed, rank, most, power, alpha):
    layer = lora.Layer(A, B, alpha, power)
    whole = lora.factors(layer, *drawn(seed, rank).values())
    left, right = lora.best(whole, rank)
    state = {A: right, B: left / layer.scale(rank), "other": torch.ones(3)}
    made = lora.cut(state, most, power)
    assert len(made[A]) == made[B].shape[1] == min(rank, most)
    wanted = lora.best(whole, min(rank, most))
    assert torch.allclose(function(layer, made), wanted[0] @ wanted[1])
    assert made["other"] is state["other"]


# --- the exact mean, and how far an adapter is from it -----------------------------------------


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.lists(st.integers(1, 9), min_size=1, max_size=5), RANKS, POWERS)
def test_the_mean_is_that_of_the_products(seed, weights, rank, power):
    layer = lora.Layer(A, B, 4.0, power)
    start = drawn(seed, rank)
    after = [drawn(seed + 1 + i, rank) for i in range(len(weights))]
    replies = [reply(i, start, after[i], w) for i, w in enumerate(weights)]
    b, a = lora.mean(layer, start, replies)
    wanted = sum(
        w / sum(weights) * function(layer, x)
        for w, x in zip(weights, after, strict=True)
    )
    assert torch.allclose(b @ a, wanted, atol=1e-5)


def test_a_reply_of_one_half_leaves_the_other_as_it_was_sent():
    layer, start, after = lora.Layer(A, B, 4.0, 1.0), drawn(0, 3), drawn(1, 3)
    for half, other in ((A, B), (B, A)):
        one = reply(0, {half: start[half]}, {half: after[half]})
        one.rest = {other: start[other]}
        b, a = lora.mean(layer, start, [one])
        wanted = function(layer, {half: after[half], other: start[other]})
        assert torch.allclose(b @ a, wanted, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.lists(st.integers(1, 9), min_size=1, max_size=5), RANKS)
def test_the_error_is_the_distance_of_the_matrices(seed, weights, rank):
    layer = lora.Layer(A, B, 4.0, 1.0)
    start, new = drawn(seed, rank), drawn(seed + 99, rank)
    after = [drawn(seed + 1 + i, rank) for i in range(len(weights))]
    exact = lora.Exactness([layer])
    for i, weight in enumerate(weights):
        exact.add(reply(i, start, after[i], weight))
    m = sum(
        w / sum(weights) * function(layer, x)
        for w, x in zip(weights, after, strict=True)
    )
    off = torch.linalg.norm(function(layer, new) - m)
    moved = torch.linalg.norm(m - function(layer, start))
    assert exact.error(start, new) == pytest.approx((off / moved).item(), rel=1e-5)


def test_small_changes_of_a_large_adapter_are_told_apart_from_none():
    layer, start = lora.Layer(A, B, 4.0, 1.0), drawn(0, 3)
    exact = lora.Exactness([layer])
    for i in (1, 2):
        moved = {B: start[B] + 2**-20 * drawn(i, 3)[B], A: start[A]}
        exact.add(reply(i, start, moved))
    mean = sum(one.value(B) for one in exact.replies) / 2
    assert exact.error(start, {A: start[A], B: mean}) < 1e-6
    assert exact.error(start, start) == pytest.approx(1)


def test_the_error_is_not_known_where_nobody_moved_or_too_much_would_be_kept(
    monkeypatch,
):
    layer, start = lora.Layer(A, B, 4.0, 1.0), drawn(0, 3)
    exact = lora.Exactness([layer])
    assert exact.error(start, start) is None
    exact.add(reply(0, start, start))
    assert exact.error(start, start) is None
    for limit in ("MOST_REPLIES", "MOST_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(lora, limit, 1)
            exact = lora.Exactness([layer])
            for i in range(3):
                exact.add(reply(i, start, drawn(i, 3)))
            assert exact.replies == []
            assert exact.error(start, start) is None
    assert lora.Exactness(()).error(start, start) is None
