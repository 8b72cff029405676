"""pytest tests/test_cpu.py: attention in blocks against torch's own, and dropout."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compute import cpu

LONGEST, HEADS, SIZE = 23, 4, 8


def look(side: str, lengths: list[int]) -> torch.Tensor:
    """Where each query may look: at what is before it and no padding."""
    mask = torch.zeros(len(lengths), LONGEST, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = True
    before = torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()
    return (before & mask[:, None])[:, None]


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("block", [7, 128])
@pytest.mark.parametrize("side", ["left", "right", None])
def test_blocks_equal_the_whole(side, block, key_heads, monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK", block)
    lengths = [LONGEST, 5, 1]
    mask = look(side, lengths) if side else None
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(3, heads, LONGEST, SIZE, generator=generator, dtype=torch.float64)
        for heads in (HEADS, key_heads, key_heads)
    ]
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // key_heads
    module.is_causal = True
    results = []
    for attend in (cpu.blocked_attention, sdpa_attention_forward):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output, _ = attend(module, *leaves, mask, scaling=0.3)
        # A query of padding sees nothing, and nobody reads what it gets.
        read = output if mask is None else output[mask.any(-1)[:, 0]]
        read.square().sum().backward()
        results.append((read.detach(), *(leaf.grad for leaf in leaves)))
    for blocked, whole in zip(*results, strict=True):
        assert torch.allclose(blocked, whole, rtol=1e-9, atol=1e-10)


def test_a_row_of_padding_makes_no_nan():
    mask = look("left", [LONGEST, 5, 1])
    query = torch.randn(3, HEADS, LONGEST, SIZE, requires_grad=True)
    output, _ = cpu.blocked_attention(
        torch.nn.Module(), query, query, query, mask, scaling=1.0
    )
    output.sum().backward()
    assert torch.isfinite(output).all()
    assert torch.isfinite(query.grad).all()


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dropout_keeps_the_mean_and_repeats_by_seed(rate):
    dropout = cpu.Dropout(rate).train()
    x = torch.ones(1001, 1003, requires_grad=True)  # no multiple of four
    torch.manual_seed(0)
    kept = dropout(x)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), kept)
    assert not torch.equal(dropout(x), kept)
    share = (kept == 0).double().mean().item()
    assert share == pytest.approx(rate, abs=0.002)  # four standard deviations
    assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - rate)], rel=1e-4)
    kept.sum().backward()
    assert torch.equal(x.grad, kept.detach())


def test_dropout_rests_outside_training():
    x = torch.ones(5, 7)
    assert cpu.Dropout(0.5).eval()(x) is x
    assert cpu.Dropout(0.0).train()(x) is x
