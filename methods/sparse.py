"""A few of many values: where they are, and what they are.

Of an update its largest ones (top-k, Aji and Heafield 2017, arXiv 1704.05021); what is left
out is added to the next one (error feedback, Stich et al. 2018, arXiv 1809.07599), and so is
what rounding takes of those that are sent.
"""

import math
from typing import Any

import numpy as np
import torch

from methods.base import State, Unusable
from methods.deflate import joined, planes
from methods.wire import SCALE, Layout, Wire, pack, unpack

NAME = "top_k"  # of the one array that the values of all tensors are in


class TopK(Wire):
    """The largest `share` of an update's values, over all of its tensors together."""

    def __init__(self, dtype: str, share: float) -> None:
        super().__init__(dtype)
        self.share = share

    def pack(self, update: State, before: State) -> tuple[State, State | None]:
        whole = {k: v + before[k] if k in before else v for k, v in update.items()}
        values = flat(whole)
        places = largest(values, count(self.share, len(values)))
        data = encode(values[places], places, len(values), self.dtype)
        packed = {NAME: torch.from_numpy(data)}
        sent = self.unpack(packed, update)
        # What is not finite is refused by the server, and is not to come again.
        left = {k: torch.nan_to_num(v - sent[k], 0, 0, 0) for k, v in whole.items()}
        return packed, left

    def unpack(self, packed: State, expected: dict[str, Any]) -> State:
        size = size_of(expected)
        places, values = decode(packed[NAME].numpy(), size, self.dtype)
        whole = torch.zeros(size)
        whole[places] = values
        return parted(whole, expected)

    def layout(self, expected: dict[str, Any]) -> Layout:
        size = size_of(expected)
        sent = count(self.share, size)
        return {NAME: ("uint8", (length(sent, size, self.dtype),))}


def flat(state: State) -> torch.Tensor:
    """All values, float32, in the order of the tensors' names."""
    return torch.cat([state[name].reshape(-1) for name in sorted(state)])


def parted(whole: torch.Tensor, expected: dict[str, Any]) -> State:
    """What was `flat`, as tensors shaped like those `expected`, in their order."""
    names = sorted(expected)
    parts = whole.split([math.prod(expected[name].shape) for name in names])
    found = dict(zip(names, parts, strict=True))
    return {k: found[k].reshape(each.shape).clone() for k, each in expected.items()}


def size_of(expected: dict[str, Any]) -> int:
    """How many values tensors of these shapes have."""
    return sum(math.prod(each.shape) for each in expected.values())


def count(share: float, size: int) -> int:
    """How many of `size` values a share is: one at least."""
    return max(1, math.ceil(share * size))


def largest(values: torch.Tensor, number: int) -> torch.Tensor:
    """Where the largest values are, by their size without the sign, in ascending order."""
    return values.abs().topk(number, sorted=False).indices.sort().values


BLOCK = 256  # of places, in which each is told in a byte


def length(number: int, size: int, dtype: str) -> int:
    """Bytes of so many of `size` values."""
    blocks = math.ceil(size / BLOCK)
    return 2 * blocks + number * (1 + np.dtype(dtype).itemsize) + 4 * (dtype == "int8")


def encode(
    values: torch.Tensor, places: torch.Tensor, size: int, dtype: str
) -> np.ndarray:
    """Bytes: how many values each block has, their places in it, and the values; in int8
    also the scale of all of them.

    `values` float32, `places` ascending, both of the same length.
    """
    blocks, within = np.divmod(places.numpy(), BLOCK)
    counts = np.bincount(blocks, minlength=math.ceil(size / BLOCK))
    packed, _ = pack({NAME: values}, dtype)
    parts = [counts.astype(np.uint16), within.astype(np.uint8)]
    parts += [tensor.numpy() for tensor in packed.values()]
    return np.concatenate([planes(part) for part in parts])


def decode(
    data: np.ndarray, size: int, dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The places, int64, and the float32 values that `encode` told of in these bytes.

    Raises `Unusable` for places that are not ascending, or not below `size`.
    """
    each, begin = np.dtype(dtype).itemsize, 2 * math.ceil(size / BLOCK)
    number, rest = divmod(len(data) - length(0, size, dtype), 1 + each)
    if rest or not 0 <= number <= size:
        raise Unusable(f"{len(data)} bytes are not places and values of {size}")
    middle, end = begin + number, begin + number * (1 + each)
    counts = joined(data[:begin], "uint16")
    wrong = Unusable("the places of its values are not ascending, or not there")
    if counts.sum(dtype=np.int64) != number:
        raise wrong
    places = np.repeat(np.arange(len(counts)) * BLOCK, counts) + data[begin:middle]
    if number and ((np.diff(places) < 1).any() or places[-1] >= size):
        raise wrong
    packed = {NAME: torch.from_numpy(joined(data[middle:end], dtype))}
    if dtype == "int8":
        packed[NAME + SCALE] = torch.from_numpy(joined(data[end:], "float32"))
    return torch.from_numpy(places), unpack(packed)[NAME]
