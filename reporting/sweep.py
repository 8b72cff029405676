"""The table and the picture that a multirun leaves."""

from pathlib import Path

from pandas import DataFrame

from reporting.figures import plot_sweep, smooth
from server.runs import read, read_overrides, varied
from utils import public, table


def summarise_sweep(folder: Path) -> None:
    """Write `losses.png`, `losses.csv` and `losses.md` over all runs of a multirun.

    Runs are named by what differs between them. One that left no history stands in the tables
    with an empty loss.
    """
    jobs = [job for job in folder.iterdir() if (job / ".hydra/overrides.yaml").exists()]
    jobs.sort(key=lambda job: (len(job.name), job.name))
    if not jobs:
        return
    overrides = [read_overrides(job) for job in jobs]
    keys = varied(overrides)
    curves: dict[str, dict[int, float]] = {}
    rows = []
    for job, settings in zip(jobs, overrides, strict=True):
        rounds = read(job, "history.json", {"rounds": []})["rounds"]
        told = [entry for entry in rounds if "train_loss" in entry]
        losses = {entry["round"]: entry["train_loss"] for entry in told}
        last = f"{smooth(list(losses.values()))[-1]:.4f}" if losses else ""
        rows.append([job.name, *(settings.get(k, "") for k in keys), len(rounds), last])
        if losses:
            curves[_label(job.name, {key: settings.get(key, "") for key in keys})] = (
                losses
            )
    header = ["run", *keys, "rounds", "last smoothed loss"]
    DataFrame(rows, columns=header).to_csv(folder / "losses.csv", index=False)
    short = [[_cut(public(str(cell)), 60) for cell in row] for row in rows]
    (folder / "losses.md").write_text(table(header, short) + "\n")
    if curves:
        plot_sweep(curves, folder / "losses.png")


def _label(run: str, settings: dict[str, str]) -> str:
    """What tells a run of a sweep from the others, short enough for a legend."""
    last = [key.rpartition(".")[2] for key in settings]
    parts = [
        f"{name if last.count(name) == 1 else key}={_cut(public(value), 24)}"
        for name, (key, value) in zip(last, settings.items(), strict=True)
    ]
    return f"{run}: {_cut(', '.join(parts), 72)}" if parts else f"run {run}"


def _cut(text: str, most: int) -> str:
    """The end of a text that is too long: of paths and names, that is what differs."""
    return text if len(text) <= most else f"...{text[3 - most :]}"
