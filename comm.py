"""The adapter on the wire: float32, float16, or int8 with a scale for each row.

Down goes the adapter, up comes the update that a client made to it. In int8 a client keeps
what rounding took from its update and adds it to the next one (error feedback, Seide et al.
2014, arXiv 1901.09847), so that small changes add up instead of getting lost.
"""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DTYPES = ("float32", "float16", "int8")
SCALE = ":scale"  # no parameter's name holds a colon

State = dict[str, torch.Tensor]


def pack(
    state: State, dtype: str, residual: State | None = None
) -> tuple[State, State | None]:
    """Tensors to send for `state`, and in int8 what they leave out of it.

    `residual` is what the last call left out; it is added before rounding. In int8 each
    tensor is joined by its scales, float32, one for each row (one in all for a vector).
    """
    if dtype != "int8":
        return {k: v.to(getattr(torch, dtype)) for k, v in state.items()}, None
    packed: State = {}
    left: State = {}
    for name, tensor in state.items():
        whole = tensor + residual[name] if residual else tensor
        rows = whole.reshape(len(whole) if whole.ndim > 1 else 1, -1)
        scale = rows.abs().amax(dim=1) / 127
        steps = rows / torch.where(scale > 0, scale, 1)[:, None]
        packed[name] = steps.round().to(torch.int8).reshape(whole.shape)
        packed[name + SCALE] = scale
        left[name] = whole - _expand(packed[name], scale)
    return packed, left


def load_residual(folder: Path, partition: int, server_round: int) -> State | None:
    """What a client's updates before `server_round` have left out, or None.

    A run that goes on after a stop may do a round again: what that round has left is of no
    use to it.
    """
    earlier = [file for file in _residuals(folder, partition) if file[0] < server_round]
    return load_file(max(earlier)[1]) if earlier else None


def save_residual(
    folder: Path, partition: int, server_round: int, residual: State
) -> None:
    """Keep what the update of `server_round` leaves out, and what the one before it left."""
    file = folder / f"{partition}-{server_round:06d}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(residual, temporary := file.with_suffix(".tmp"))
    os.replace(temporary, file)
    for _, old in sorted(_residuals(folder, partition))[:-2]:
        old.unlink()


def _residuals(folder: Path, partition: int) -> list[tuple[int, Path]]:
    files = folder.glob(f"{partition}-*.safetensors")
    return [(int(file.stem.rpartition("-")[2]), file) for file in files]


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
        rows = len(tensor) if tensor.ndim > 1 else 1
        if scale is None or scale.shape != (rows,):
            raise ValueError(f"{name} has no scale for each of its {rows} rows")
        state[name] = _expand(tensor, scale)
    return state


def _expand(steps: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (steps.reshape(len(scale), -1) * scale[:, None]).reshape(steps.shape)


def update(after: State, before: State) -> State:
    """What training changed."""
    return {name: after[name] - before[name] for name in after}
