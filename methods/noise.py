"""Randomness that nobody can repeat: of the operating system, in float64."""

import math
import os
from collections.abc import Sequence

import numpy as np
import torch


def uniform(count: int) -> np.ndarray:
    """`count` draws between 0 and 1, neither of them: of 2^52 equal chances."""
    bits = np.frombuffer(os.urandom(8 * count), np.uint64)
    return ((bits >> 12) + 0.5) * 2.0**-52


def noise(shape: Sequence[int], std: float) -> torch.Tensor:
    """Gaussian noise, each value of bits of its own.

    Not of a generator, however seeded: the noise of a tensor whose update is known to be 0
    would show its state, and with it the noise of all others. The outermost quantiles of
    `uniform` are at 8.1 standard deviations.
    """
    draws = torch.from_numpy(uniform(math.prod(shape)))
    return std * torch.special.ndtri(draws).reshape(tuple(shape))
