"""What a client keeps between rounds."""

import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from methods.wire import State


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
