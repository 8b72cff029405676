"""What a run needs in order to go on after any stop: written after every round, atomically.

A checkpoint is a folder `checkpoints/<round>/` that appears under its name only when all of
it is on the disk. Whatever else a round depends on (who is sampled, the order of the data,
the learning rate) follows from the configuration and the round's number.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from methods.base import State
from methods.wire import misshapen
from utils import UserError, commit, read_json, say

KEPT = 2  # so that a damaged newest checkpoint costs one round


def save(
    folder: Path, done: int, state: State, memory: dict[str, State], seconds: float
) -> None:
    """Write the state after round `done` of the run in `folder`; drop all but the newest two.

    `memory` is the aggregation's, `seconds` what the run has taken so far. Raises
    `Unwritable` where the disk is full, with the earlier checkpoints intact.
    """
    kept = {f"{k}/{n}": v for k, each in memory.items() for n, v in each.items()}
    target = folder / "checkpoints" / f"{done:06d}"
    with commit(target) as temporary:
        save_file(state, temporary / "adapter.safetensors")
        save_file(kept, temporary / "strategy.safetensors")
        # With the names in order, which a safetensors file loses.
        about = {
            "round": done,
            "seconds": seconds,
            "adapter": [*state],
            "memory": [*memory],
        }
        (temporary / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    for old in found(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of the run in `folder` that can be read; None before the first.

    Raises `UserError` where there are checkpoints, and none of them can be read.
    """
    checkpoints = found(folder)
    for checkpoint in reversed(checkpoints):
        if _fault(checkpoint) is None:
            return checkpoint
    if checkpoints:
        raise UserError(
            f"No checkpoint of {folder} can be read. {_fault(checkpoints[-1])}. Put a copy of "
            "one into its place, or begin the run anew."
        )
    return None


def read(checkpoint: Path) -> tuple[State, int, float, dict[str, State]]:
    """The state, its round, the seconds until then, and the aggregation's memory.

    Raises whatever the libraries do where something is missing or broken, and `ValueError`
    for what no run has written.
    """
    about = read_json(checkpoint / "about.json")
    state = load_file(checkpoint / "adapter.safetensors")
    state = {name: state[name] for name in about["adapter"]}
    if about["round"] != int(checkpoint.name):
        raise ValueError(f"about.json is of round {about['round']}")
    if not 0 <= (seconds := float(about["seconds"])) < float("inf"):
        raise ValueError(f"about.json tells of {seconds} seconds")
    tensors = load_file(checkpoint / "strategy.safetensors")
    if any(tensor.dtype != torch.float32 for tensor in state.values()):
        raise ValueError("its adapter is not in float32")
    if "memory" not in about:
        raise ValueError("an earlier version of this program wrote it")
    memory: dict[str, State] = {}
    for kept in about["memory"]:
        memory[kept] = {name: tensors[f"{kept}/{name}"] for name in state}
        if misshapen(memory[kept], state):
            raise ValueError(f"the strategy's {kept} is none of this adapter")
    for name, tensor in (state | tensors).items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds values that are not finite")
    return state, about["round"], seconds, memory


def load(checkpoint: Path, *keepers: Any) -> tuple[State, int, float]:
    """The state, its round and the seconds until then; who keeps something recalls it.

    `keepers`: the run's `Aggregation`, and its `Downlink`.

    Later checkpoints could not be read: they are named and go, as their rounds are done
    again. Raises `UserError` for the memory of another strategy.
    """
    state, done, seconds, memory = read(checkpoint)
    if more := memory.keys() - {name for one in keepers for name in one.keeps}:
        raise UserError(f"{checkpoint} is of another strategy: it holds {min(more)}.")
    for one in keepers:
        one.recall({k: v for k, v in memory.items() if k in one.keeps})
    for later in found(checkpoint.parent.parent):
        if later.name > checkpoint.name:
            say(f"{_fault(later)}. The one before it is taken.")
            shutil.rmtree(later, ignore_errors=True)
    return state, done, seconds


def found(folder: Path) -> list[Path]:
    """The run's checkpoints by round, unread: each came into being whole."""
    return sorted((folder / "checkpoints").glob("[0-9]" * 6))


def _fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be read, or None."""
    try:
        read(checkpoint)
    except UserError as error:
        return f"{checkpoint} cannot be read ({error})"
    except Exception as error:
        return f"{checkpoint} cannot be read ({type(error).__name__}: {error})"
    return None
