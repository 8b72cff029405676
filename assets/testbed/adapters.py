"""Adapters to compare: whether two are the same, or close, and one to begin with."""

from typing import Any

import torch

import client
from model import State


def same(one: State, other: State) -> bool:
    """Whether two adapters have the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(one[k].equal(other[k]) for k in one)


def assert_close(one: State, other: State, start: State) -> None:
    """Two adapters that were trained from `start` are the same up to rounding in float32."""
    assert one.keys() == other.keys() == start.keys()
    for name, value in one.items():
        assert (value - start[name]).abs().max() > 1e-4
        assert torch.allclose(other[name], value, rtol=1e-5, atol=5e-7), name


def adapter(cfg: dict[str, Any]) -> State:
    """One in which every weight has a gradient, as LoRA's A has not at its start."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: value + 0.02 * torch.randn(value.shape, generator=generator)
        for name, value in client.initial_adapter(cfg).items()
    }
