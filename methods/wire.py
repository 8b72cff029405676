"""The adapter on the wire: float32, float16, or int8 with a scale for each row or column.

Down goes the adapter, up comes the update that a client made to it. In int8 a client keeps
what rounding took from its update and adds it to the next one (error feedback, Seide et al.
2014, arXiv 1901.09847), so that small changes add up instead of getting lost.

What comes up is foreign data: `decode` looks at names, types, shapes and sizes before it
makes a tensor of anything.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from methods.base import Contribution, State, Step, Unusable

SCALE = ":scale"  # no parameter's name holds a colon

Layout = dict[str, tuple[str, tuple[int, ...]]]  # type and shape, by name

HEADER = 1024  # bytes of `np.save` before the values: 128 for an adapter's shapes


class Wire(Step):
    """An update in a type that takes fewer bytes; in int8 with error feedback."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def leave(self, update: State, kept: Any) -> State:
        before = kept.load("residual") or {}
        packed, left = self.pack(update, before)
        if left is not None:
            kept.save("residual", before | left)
        return packed

    def arrive(self, one: Contribution) -> Contribution:
        return replace(one, update=finite(self.unpack(one.update, one.before)))

    def pack(self, update: State, before: State) -> tuple[State, State | None]:
        """The tensors to send, and what they leave out; `before`: what earlier ones did."""
        return pack(update, self.dtype, before)

    def unpack(self, packed: State, expected: dict[str, Any]) -> State:
        """The float32 tensors that `packed` stands for, shaped like those `expected`."""
        return unpack(packed)

    def layout(self, expected: dict[str, Any]) -> Layout:
        """Type and shape of all that `pack` makes of tensors shaped like `expected`."""
        return layout(expected, self.dtype)


class Arrays(Step):
    """An array for each tensor: what Flower makes of them."""

    def __init__(self, layout: Callable[[dict[str, Any]], Layout]) -> None:
        self.layout = layout

    def arrive(self, one: Contribution) -> Contribution:
        return replace(one, update=read(one.update, self.layout(one.before)))


def pack(
    state: State, dtype: str, residual: State | None = None
) -> tuple[State, State | None]:
    """Tensors to send for `state`, and in int8 what they leave out of it.

    `residual` is what the last call left out; it is added before rounding. In int8 each
    tensor is joined by its scales, float32: one for each row of a matrix, or for each column
    where these are fewer (LoRA's B: a scale for each of its r columns, not for d rows of r
    values), and one in all for a vector.
    """
    if dtype != "int8":
        return {k: v.to(getattr(torch, dtype)) for k, v in state.items()}, None
    packed: State = {}
    left: State = {}
    for name, tensor in state.items():
        whole = tensor + residual[name] if name in (residual or {}) else tensor
        rows = whole.T if _tall(whole.shape) else whole
        scale = rows.reshape(_scales(whole.shape), -1).abs().amax(dim=1) / 127
        steps = whole / _along(torch.where(scale > 0, scale, 1), whole.shape)
        packed[name] = steps.round().to(torch.int8)
        packed[name + SCALE] = scale
        left[name] = whole - packed[name] * _along(scale, whole.shape)
    return packed, left


def lost(state: State, dtype: str) -> str | None:
    """The name of a tensor that would not arrive as finite values, or None.

    float16 ends at 65504: a value beyond it is finite here and infinite on the wire.
    """
    for name, tensor in state.items():
        packed, _ = pack({name: tensor}, dtype)
        if not all(torch.isfinite(each).all() for each in packed.values()):
            return name
    return None


def layout(expected: dict[str, Any], dtype: str) -> Layout:
    """Type and shape of all that `pack` makes of tensors shaped like `expected`, by name."""
    wire = {name: (dtype, tuple(each.shape)) for name, each in expected.items()}
    if dtype == "int8":
        for name, (_, shape) in list(wire.items()):
            wire[name + SCALE] = "float32", (_scales(shape),)
    return wire


def decode(arrays: Any, expected: dict[str, Any], dtype: str) -> State:
    """The float32 tensors in a reply's `ArrayRecord`, which must be `layout`'s.

    Raises `Unusable`.
    """
    return finite(unpack(read(arrays, layout(expected, dtype))))


def read(arrays: Any, wire: Layout) -> State:
    """The tensors in a reply's `ArrayRecord`, which must be those of `wire`.

    Nothing is decoded before everything has the right name, type, shape and size, so what
    is refused costs no more memory than it came with. Raises `Unusable`.
    """
    if odd := wire.keys() - arrays.keys():
        raise Unusable(
            f"{len(odd)} adapter tensors missing or unknown, {min(odd)} among them"
        )
    if len(arrays) > len(wire):
        raise Unusable(
            f"{len(arrays) - len(wire)} unknown tensors beside the adapter's"
        )
    for name, (kind, shape) in wire.items():
        _look(name, arrays[name], np.dtype(kind), shape)
    packed: State = {}
    for name, (kind, shape) in wire.items():
        found = values(name, arrays[name], np.dtype(kind), shape)
        packed[name] = torch.from_numpy(np.array(found, order="C"))
    return packed


def finite(state: State) -> State:
    """The same. Raises `Unusable` where a value is not finite."""
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise Unusable(f"{name} holds values that are not finite")
    return state


def values(name: str, array: Any, kind: np.dtype, shape: tuple) -> np.ndarray:
    """What a serialised array holds, where it lies. Raises `Unusable` as `decode` does."""
    start, order = _look(name, array, kind, shape)
    return np.frombuffer(array.data, kind, offset=start).reshape(shape, order=order)


def _look(name: str, array: Any, kind: np.dtype, shape: tuple) -> tuple[int, str]:
    """Where the values of a serialised array begin, and their order in memory (C or F).

    Raises `Unusable` unless it is exactly such an array as numpy's `.npy` format has it.
    """
    if array.dtype != kind.name or array.stype != "numpy.ndarray":
        raise Unusable(f"{name} is not of type {kind.name}, as comm.dtype has it")
    if tuple(array.shape) != shape:
        raise Unusable(f"{name} has shape other than {shape}")
    size = math.prod(shape) * kind.itemsize
    wrong = Unusable(f"{name} is not serialised as {kind.name} of shape {shape}")
    if not size < len(array.data) <= size + HEADER:
        raise wrong
    file = io.BytesIO(array.data[:HEADER])
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise wrong
        told, fortran, type_ = np.lib.format.read_array_header_1_0(file)
    except Exception:  # whatever numpy makes of a forged header
        raise wrong from None
    if (told, type_) != (shape, kind) or len(array.data) != file.tell() + size:
        raise wrong
    return file.tell(), "F" if fortran else "C"


def unpack(packed: State) -> State:
    """The float32 tensors that `packed` stands for.

    Raises `ValueError` for integers without scales that fit.
    """
    state: State = {}
    for name, tensor in packed.items():
        if name.endswith(SCALE):
            continue
        if tensor.dtype.is_floating_point:
            state[name] = tensor.to(torch.float32)
            continue
        scale = packed.get(name + SCALE)
        count = _scales(tensor.shape)
        if scale is None or scale.shape != (count,):
            raise ValueError(f"{name} has no scale for each of its {count} rows")
        state[name] = tensor * _along(scale, tensor.shape)
    return state


def _tall(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and shape[0] > shape[1]


def _scales(shape: Sequence[int]) -> int:
    """How many scales a tensor of this shape has in int8."""
    return shape[_tall(shape)] if len(shape) > 1 else 1


def _along(scale: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The scales, to be multiplied with a tensor of this shape."""
    return scale if _tall(shape) else scale.reshape(-1, *[1] * (len(shape) - 1))


def mismatch(state: State, expected: dict[str, Any]) -> str | None:
    """What keeps `state` from standing for `expected`, both by name, or None.

    Names and shapes must be equal and all values finite.
    """
    if fault := misshapen(state, expected):
        return fault
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            return f"{name} holds values that are not finite"
    return None


def misshapen(state: State, expected: dict[str, Any]) -> str | None:
    """Likewise, of names and shapes alone."""
    if state.keys() != expected.keys():
        odd = sorted(state.keys() ^ expected.keys())
        return f"{len(odd)} adapter tensors missing or unknown, {odd[0]} among them"
    for name, tensor in state.items():
        if tuple(tensor.shape) != tuple(expected[name].shape):
            return (
                f"{name} has shape {tuple(tensor.shape)}, "
                f"not {tuple(expected[name].shape)}"
            )
    return None
