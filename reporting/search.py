"""The table and the figure that a search for settings leaves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pandas import DataFrame

from reporting.figures import plot_search
from utils import public, table


@dataclass
class Tried:
    """A trial: the settings that were searched, and `value` after `rounds` of training.

    `state`: complete, pruned, fail or running, as Optuna has it; a trial that failed before
    its first rung has no value.
    """

    number: int
    settings: dict[str, Any]
    state: str
    rounds: int
    value: float | None


def summarise_search(
    trials: list[Tried],
    best: int | None,
    metric: str,
    searched: dict[str, bool],
    folder: Path,
) -> None:
    """Write `search.csv`, `search.md` and `search.png` over all trials into a search's folder.

    `best`: the number of the best that is complete; `searched`: the settings by their keys,
    and whether they were drawn evenly in their logarithm.
    """
    header = ["trial", *searched, "rounds", metric, "state"]
    rows = [
        [
            *(trial.number, *trial.settings.values(), trial.rounds or "", trial.value),
            "best" if trial.number == best else trial.state,
        ]
        for trial in trials
    ]
    DataFrame(rows, columns=header).to_csv(folder / "search.csv", index=False)
    short = [[_short(cell) for cell in row] for row in rows]
    (folder / "search.md").write_text(table(header, short) + "\n")
    points = [
        (trial.settings, trial.value, "best" if trial.number == best else trial.state)
        for trial in trials
        if trial.value is not None
    ]
    if points:
        plot_search(points, metric, searched, folder / "search.png")


def _short(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else public(str(cell))
