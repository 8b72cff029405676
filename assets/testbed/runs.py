"""Runs of the app that benchmarks make and read, each in a process of its own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from server import runs
from utils import PROJECT, read_json


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """The summary of the run in `folder`, which is made where it is not there yet.

    Ends the process where the run fails, and where the folder's is one of other overrides.
    """
    begun = (folder / runs.OVERRIDES).exists()
    # Hydra keeps those of its own elsewhere.
    own = [text for text in overrides if not text.startswith("hydra.")]
    if begun and (other := runs.read(folder, runs.OVERRIDES)) != own:
        sys.exit(f"{folder} holds another run: {' '.join(other)}. Name another folder.")
    if not (folder / "summary.json").exists():
        command = [sys.executable, "main.py", *overrides, f"hydra.run.dir={folder}"]
        done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(f"{' '.join(overrides)}: exit code {done.returncode}")
    return read_json(folder / "summary.json")
