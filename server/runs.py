"""A run's folder: whose it is, and what stands in its files."""

import fcntl
import itertools
import math
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils import (
    FEW,
    UserError,
    _literal,
    command,
    fit,
    read_json,
    read_yaml,
    say,
    writing,
)

# What every round's entry in `history.json` tells, of which the summary is made.
NUMBERS = (
    "round",
    "train_loss",
    "bytes_down",
    "bytes_up",
    "peak_memory_client",
    "peak_memory_server",
)
SCORES = ("test_loss", "eval_loss")  # by which the best round is found, if it is
# What clients measure on records of their own.
OWN = ("eval_loss", "eval_perplexity", "eval_accuracy")
MEASURED = (*SCORES, *OWN)

# What else the summary and its picture look into.
LISTS = {
    "failures": [{"partition": int, "cause": str}],
    "clients?": [{"partition": int, "train_loss": float, "records?": float}],
    "eval_clients?": [{"num-examples": float}],
}


def read_rounds(folder: Path, done: int) -> list[dict[str, Any]]:
    """The first `done` rounds in a run's `history.json`.

    Raises `UserError` where it does not tell of them all that a summary is made of.
    """
    try:
        rounds = read_json(folder / "history.json")["rounds"][:done]
        if [entry["round"] for entry in rounds] != list(range(1, done + 1)):
            raise ValueError(f"{done} rounds are done, and it tells of {len(rounds)}")
        for entry in rounds:
            _check_entry(entry)
            fit(entry, LISTS, folder / "history.json", f"round {entry['round']}")
    except (UserError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"{folder}/history.json does not fit the run: {error}. Put a copy of it into "
            "its place, or begin the run anew."
        ) from error
    return rounds


def _check_entry(entry: dict[str, Any]) -> None:
    """Raise `ValueError` unless a round's entry tells what it has to, in the right kinds."""
    for name in (*NUMBERS, *(name for name in MEASURED if name in entry)):
        if not _is_finite(entry.get(name)):
            raise ValueError(f"its entry of round {entry['round']} lacks a {name}")
    if entry.get("best") and not any(name in entry for name in SCORES):
        raise ValueError(f"round {entry['round']} is the best by no measure")


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def read_before(folder: Path) -> dict[str, Any]:
    """What the base scored, by a run's `history.json`; nothing in those without it."""
    before = read_json(folder / "history.json").get("before", {})
    fits = isinstance(before, dict) and (not before or before.get("round") == 0)
    if not fits or not all(_is_finite(before.get(name, 0.0)) for name in MEASURED):
        raise UserError(
            f"{folder}/history.json: its entry `before` is not what the base scored in "
            "round 0. Take it out, or put a copy of the file into its place."
        )
    return before


# --- a run's folder ------------------------------------------------------------------------

# What a run leaves in its folder, and no other run may find there.
LEFT = ("history.json", "summary.json", "checkpoints", "peft_*", "residuals")

LEFT_BY_SWEEPS = ("multirun.yaml", *(f"*/{name}" for name in LEFT))


def begin(folder: Path, named: bool) -> Path:
    """Make the folder of a new run: `folder`, or unless the user `named` it the first of
    `folder`, `folder-2`, `folder-3` ... that was not there. Raises `UserError`.
    """
    if "${" in str(folder):
        raise UserError(
            f"{folder}: Hydra takes ${{ for a reference. Name another folder."
        )
    first = folder
    with writing(folder):
        for number in itertools.count(2):
            try:
                folder.mkdir(parents=True, exist_ok=named)
                break
            except FileExistsError:
                if not folder.is_dir():
                    raise
                folder = first.with_name(f"{first.name}-{number}")
    return folder


def own(folder: Path, without: Iterable[str] = LEFT) -> TextIO:
    """Make this process the only one that writes into a run's folder, until the result is
    closed or the process ends, however it does: the kernel keeps the lock.

    Raises `UserError` where another process has it, or something `without` which the folder
    should be is in it; `Unwritable` where the disk does not take what a run begins with.
    """
    with writing(folder):
        lock = (folder / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        with lock:
            raise UserError(
                f"{folder}: another run writes into it, process {lock.read(300)}. Wait for "
                "its end, or end it with kill and that number."
            ) from None
    except OSError as error:
        say(f"{folder} cannot be locked ({error.strerror}): keep other runs out of it.")
    if found := next((path for name in without for path in folder.glob(name)), None):
        lock.close()
        place = found.parent
        raise UserError(
            f"{place} holds a multirun already. Name another folder: "
            "hydra.sweep.dir=/path/to/folder"
            if found.name == "multirun.yaml"
            else f"{place} holds a run already ({found.name}). Go on with it: "
            f"{command('main.py', resume=place)}. Or begin in another folder: "
            "hydra.run.dir=/path/to/folder (hydra.sweep.dir for a multirun)."
        )
    with writing(folder):
        (probe := folder / ".writable").write_bytes(bytes(2**16))  # as much as .hydra/
        probe.unlink()
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}")
        lock.flush()
    return lock


def read_config(run: Path) -> DictConfig:
    """A run's `.hydra/config.yaml`, of which only references inside of it are resolved.

    What asks for more (`${oc.env:...}`) is read as text: the folder may be a stranger's. Raises
    `UserError` where the file is missing or broken.
    """
    path = run / ".hydra/config.yaml"
    cfg = OmegaConf.create(_literal(read_yaml(path, dict)))
    try:
        OmegaConf.resolve(cfg)
    except (OmegaConfBaseException, RecursionError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path} is broken ({type(error).__name__}: {line}).") from None
    return cfg


def read_overrides(run: Path) -> dict[str, str]:
    """The overrides of a run by their keys, from `.hydra/overrides.yaml`. Raises `UserError`."""
    path = run / ".hydra/overrides.yaml"
    return by_key(fit(read_yaml(path, list), [str], path))


def by_key(overrides: Iterable[str]) -> dict[str, str]:
    """Hydra overrides by their keys, without a `+` or `~`; `resume` is not told."""
    pairs = (text.lstrip("+~").partition("=")[::2] for text in overrides)
    return {key: value for key, value in pairs if key != "resume"}


def varied(runs: list[dict[str, str]]) -> list[str]:
    """The keys whose values differ between runs, given the overrides of each."""
    keys = dict.fromkeys(key for run in runs for key in run)
    return [key for key in keys if len({run.get(key) for run in runs}) > 1]


def telling(clients: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The clients whose own figures rest on enough records (`FEW`) to be compared by them."""
    return [client for client in clients if client["num-examples"] >= FEW]


def trained_records(rounds: list[dict[str, Any]]) -> str:
    """How many records the clients of these rounds train from, in words; "" if not known."""
    clients = [client for entry in rounds for client in entry.get("clients", [])]
    held = {c["partition"]: c["records"] for c in clients if "records" in c}
    return (
        f"{sum(held.values()):g} of {len(held)} clients that took part" if held else ""
    )
