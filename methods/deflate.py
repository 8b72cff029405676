"""Tensors compressed without loss: zlib over all of them together.

All bytes of the same significance of a tensor come one after another: a float's first byte,
its sign and exponent, tells little, and its last is noise. What comes in is foreign: it is
known how long it has to be, and never more than that is made of it.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from methods.base import Contribution, State, Step, Unusable
from methods.wire import Layout, values

NAME = "zlib"  # of the one array that all tensors are in


class Deflated(Step):
    """All of an update's tensors in one array of bytes, compressed."""

    def __init__(self, layout: Callable[[dict[str, Any]], Layout]) -> None:
        self.layout = layout

    def leave(self, update: State, kept: Any) -> State:
        return deflate(update)

    def arrive(self, one: Contribution) -> Contribution:
        return replace(one, update=inflate(one.update, self.layout(one.before)))


def deflate(packed: State) -> State:
    """These tensors, in the order of their names, as one of bytes."""
    parts = (planes(packed[name].numpy()).tobytes() for name in sorted(packed))
    made = zlib.compress(b"".join(parts))
    return {NAME: torch.frombuffer(bytearray(made), dtype=torch.uint8)}


def inflate(arrays: Any, layout: Layout) -> State:
    """The tensors of this `layout` that `deflate` made an `ArrayRecord`'s one array of.

    Raises `Unusable`.
    """
    sizes = {name: size_of(*layout[name]) for name in sorted(layout)}
    whole = sum(sizes.values())
    data = unzipped(arrays, whole)
    if len(data) != whole:
        raise Unusable(f"it decompresses to fewer bytes than the {whole} of its update")
    packed, start = {}, 0
    for name, size in sizes.items():
        dtype, shape = layout[name]
        found = joined(data[start : start + size], dtype).reshape(shape)
        packed[name] = torch.from_numpy(found)
        start += size
    return packed


def unzipped(arrays: Any, most: int) -> np.ndarray:
    """The bytes, `most` of them at most, that an `ArrayRecord`'s one array decompresses to.

    Raises `Unusable`.
    """
    if len(arrays) != 1 or NAME not in arrays:
        raise Unusable("it holds more or less than one compressed array")
    array = arrays[NAME]
    length = math.prod(array.shape)
    if length > bound(most):
        raise Unusable(f"it is longer than {most} bytes, compressed, can be")
    data = values(NAME, array, np.dtype(np.uint8), (length,))
    stream = zlib.decompressobj()
    try:
        # One more than there should be: zlib then also comes to the end that it checks.
        made = stream.decompress(data.tobytes(), max_length=most + 1)
    except zlib.error:
        raise Unusable("it is not what zlib has compressed") from None
    if len(made) > most or not stream.eof or stream.unused_data:
        raise Unusable(f"it decompresses to more than {most} bytes, or has no end")
    return np.frombuffer(made, np.uint8)


def bound(size: int) -> int:
    """The most bytes that zlib makes of so many: its own bound, and some."""
    return size + (size >> 10) + 64


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def planes(array: np.ndarray) -> np.ndarray:
    """The bytes of an array: the lowest of all values, then the next of all, and so on."""
    kind = array.dtype.newbyteorder("<")
    flat = np.ascontiguousarray(array, kind).reshape(-1, 1)
    return flat.view(np.uint8).T.reshape(-1)


def joined(data: np.ndarray, dtype: str) -> np.ndarray:
    """The values whose `planes` these bytes are."""
    kind = np.dtype(dtype).newbyteorder("<")
    each = np.ascontiguousarray(data.reshape(kind.itemsize, -1).T)
    return each.view(kind).reshape(-1).astype(dtype)
