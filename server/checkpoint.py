"""What a run needs in order to go on after any stop: written after every round, atomically.

A checkpoint is a folder `checkpoints/<round>/` that appears under its name only when all of
it is on the disk. Whatever else a round depends on (who is sampled, the order of the data,
the learning rate) follows from the configuration and the round's number.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from safetensors.torch import load_file, save_file

from methods.wire import State
from utils import UserError, commit, read_json, say

KEPT = 2  # the newest ones: who deletes the last goes back by a round


def save(folder: Path, done: int, state: State, strategy: Any, seconds: float) -> None:
    """Write the state after round `done` of the run in `folder`; drop all but the newest two.

    `seconds` that the run has taken so far. Raises `Unwritable` where the disk is full, with
    the earlier checkpoints intact.
    """
    tensors, kept = _strategy_state(strategy)
    target = folder / "checkpoints" / f"{done:06d}"
    with commit(target) as temporary:
        save_file(state, temporary / "adapter.safetensors")
        save_file(tensors, temporary / "strategy.safetensors")
        # With the names in order, which a safetensors file loses: FedAvgM's momentum is a
        # list beside it.
        about = {
            "round": done,
            "seconds": seconds,
            "adapter": [*state],
            "strategy": kept,
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


def read(checkpoint: Path) -> tuple[State, int, float, dict[str, Any]]:
    """The adapter, its round, the seconds until then, and the strategy's own state.

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
    shapes = [tuple(tensor.shape) for tensor in state.values()]
    own = {}
    for attribute, (kind, names) in about["strategy"].items():
        make = _KINDS[kind]
        arrays = {name: tensors[f"{attribute}/{name}"].numpy() for name in names}
        # Whatever a strategy remembers, it has of each tensor of the adapter.
        same = kind == "list" or names == about["adapter"]
        if not same or [array.shape for array in arrays.values()] != shapes:
            raise ValueError(f"the strategy's {attribute} is none of this adapter")
        own[attribute] = make(arrays)
    for name, tensor in (state | tensors).items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds values that are not finite")
    return state, about["round"], seconds, own


def load(checkpoint: Path, strategy: Any) -> tuple[State, int, float]:
    """The adapter, its round and the seconds until then; `strategy` gets its own state.

    Later checkpoints could not be read: they are named and go, as their rounds are done
    again. Raises `UserError` for the state of another strategy.
    """
    state, done, seconds, own = read(checkpoint)
    for attribute in own:
        # What is to hold arrays is None in a new strategy; a setting is not.
        if vars(strategy).get(attribute, "") is not None:
            raise UserError(
                f"{checkpoint} is of another strategy: it holds {attribute}."
            )
    vars(strategy).update(own)
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


def _strategy_state(strategy: Any) -> tuple[State, dict[str, tuple[str, list[str]]]]:
    """Every array that a strategy of Flower's has come to hold, by attribute and name.

    Momenta and second moments are dicts or lists of ndarrays, or ArrayRecords. Also gives
    each attribute's kind and names.
    """
    tensors: State = {}
    kept: dict[str, tuple[str, list[str]]] = {}
    for attribute, value in vars(strategy).items():
        if isinstance(value, ArrayRecord):
            kind, arrays = "record", {k: v.numpy() for k, v in value.items()}
        elif isinstance(value, list) and _arrays(value):
            kind, arrays = "list", {str(i): v for i, v in enumerate(value)}
        elif isinstance(value, dict) and _arrays(list(value.values())):
            kind, arrays = "dict", value
        else:
            continue
        kept[attribute] = kind, list(arrays)
        for name, array in arrays.items():
            tensor = torch.from_numpy(np.array(array))
            tensors[f"{attribute}/{name}"] = tensor
    return tensors, kept


def _arrays(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, np.ndarray) for value in values)


_KINDS = {
    "record": lambda arrays: ArrayRecord(
        {k: torch.tensor(v) for k, v in arrays.items()}
    ),
    "list": lambda arrays: list(arrays.values()),
    "dict": dict,
}
