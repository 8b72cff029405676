"""What federation was worth: a report on a sweep over `mode`, for a manager and a reviewer.

    python main.py experiment=compare            writes it when the sweep has ended
    python report.py multirun/<date>/<time>      writes it again, of what is there

Reads what the runs left in their folders and nothing else: no model, no data. The text is
written once, as Markdown; the HTML is the same, rendered, with the figures inside.
"""

import argparse
import base64
import html
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from utils import PROJECT, UserError, say, write_json

PerSeed = dict[int, float]
PerClient = dict[int, dict[int, float]]  # by seed, then by partition

# The answer is about the first that was measured.
SCORES = {
    "exact_match": "exact match, %",
    "choice_accuracy": "choice accuracy, %",
    "f1": "F1, %",
    "rouge_l": "ROUGE-L, %",
    "test_accuracy": "token accuracy, %",
    "test_loss": "loss",
    "test_perplexity": "perplexity",
    "eval_accuracy": "token accuracy on own records, %",
    "eval_loss": "loss on own records",
}
MODES = {"local": "local", "federated": "federated", "centralized": "centralised"}
ROWS = {"base": "base", "local": "local", "worst": "local, worst client", **MODES}
# Told apart by the colour-blind as well (Okabe and Ito 2008).
COLOURS = {
    "base": "#8c8c8c",
    "local": "#e69f00",
    "federated": "#0072b2",
    "centralized": "#009e73",
}
SETTINGS = (
    "model.name",
    "model.quantization",
    "peft._target_",
    "dataset.name",
    "dataset.path",
    "partitioner._target_",
    "num_clients",
    "num_rounds",
    "strategy._target_",
    "strategy.fraction_fit",
    "train.learning_rate_max",
    "train.seq_length",
    "train.training_arguments.max_steps",
    "train.training_arguments.per_device_train_batch_size",
    "comm.dtype",
)


class Report(Callback):
    """Hydra callback: a multirun leaves a report."""

    folder: Path | None = None  # of the sweep
    failed = False

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if not config.dry_run:
            self.folder = Path(config.hydra.sweep.dir)
            write_json(self.folder / "environment.json", environment())

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        # A job that failed keeps Hydra from announcing the end of the sweep.
        self.failed |= job_return.status == JobStatus.FAILED
        if self.failed:
            self.on_multirun_end(config)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if self.folder:
            try:
                say(f"Report: {write(self.folder)}/report.html, report.md")
            except UserError as error:  # which Hydra would hide in the log
                say(f"No report: {error}")


def write(folder: Path) -> Path:
    """Write `report/` into a sweep's folder, and return its path.

    Raises `UserError` where no run has finished.
    """
    runs, absent = read(folder)
    target = folder / "report"
    target.mkdir(exist_ok=True)
    text, more = content(folder, runs, absent, target)
    folded = [FOLDED.format(html.escape(title), part) for title, part in more.items()]
    (target / "report.md").write_text("\n\n".join([text, *folded]) + "\n")
    (target / "report.html").write_text(page(text, more, target))
    return target


# --- what the runs left -----------------------------------------------------------------------


@dataclass
class Run:
    """A finished run: its overrides, configuration, `summary.json` and `history.json`."""

    folder: Path
    overrides: dict[str, str]
    cfg: DictConfig
    summary: dict[str, Any]
    rounds: list[dict[str, Any]]

    def score(self, name: str) -> float | None:
        """Of the adapter that the run ended with."""
        return self.summary.get(f"{name}_after", self.rounds[-1].get(name))

    def clients(self, name: str) -> dict[int, float]:
        """By partition: an `eval_` score on the records that each client held back, another
        score of each client's own adapter on the test questions (in `mode=local`)."""
        each = self.summary.get("clients", []) + self.rounds[-1].get("eval_clients", [])
        return {client["partition"]: client[name] for client in each if name in client}


def read(folder: Path) -> tuple[list[Run], list[str]]:
    """The finished runs of a sweep, and a line on each that failed or was never started.

    Raises `UserError` where nothing has finished.
    """
    runs, absent, seen = [], [], []
    jobs = [path.parent.parent for path in folder.glob("*/.hydra/overrides.yaml")]
    for job in sorted(jobs, key=lambda job: (len(job.name), job.name)):
        overrides = _settings(OmegaConf.load(job / ".hydra/overrides.yaml"))
        cfg = OmegaConf.load(job / ".hydra/config.yaml")
        rounds = _load(job / "history.json", {"rounds": []})["rounds"]
        seen.append(overrides)
        if summary := _load(job / "summary.json", {}):
            runs.append(Run(job, overrides, cfg, summary, rounds))
        else:
            done = f"stopped after {len(rounds)} of {cfg.num_rounds} rounds"
            absent.append(f"Run {job.name} ({_words(overrides)}) {done}.")
    absent += [
        f"{_words(overrides)} was never started."
        for overrides in _planned(folder)
        if overrides not in seen
    ]
    if not runs:
        raise UserError(f"{folder} holds no finished run of a multirun.")
    return runs, absent


def _planned(folder: Path) -> list[dict[str, str]]:
    """The overrides of each job that Hydra's own sweeper makes of this sweep."""
    if not (file := folder / "multirun.yaml").exists():
        return []
    config = OmegaConf.load(file).hydra
    texts = [f"{key}={values}" for key, values in (config.sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*texts, *config.overrides.task])
    return [_settings(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]


def _settings(overrides: Iterable[str]) -> dict[str, str]:
    pairs = (text.lstrip("+~").partition("=")[::2] for text in overrides)
    return {key: value for key, value in pairs if key != "resume"}


def _words(overrides: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in overrides.items())


def _load(path: Path, default: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else default


class Section:
    """The runs that differ in mode and seed only, and their scores."""

    def __init__(self, title: str, runs: list[Run]) -> None:
        self.title = title
        self.runs = runs
        # By score, row and seed.
        self.scores: dict[str, dict[str, PerSeed]] = {}
        for name in SCORES:
            rows: dict[str, PerSeed] = {row: {} for row in ROWS}
            worst = max if lower_is_better(name) else min
            for run in runs:
                found = {run.cfg.mode: run.score(name)}
                found["base"] = run.summary.get(f"{name}_before")
                if run.cfg.mode == "local":
                    found["worst"] = worst(run.clients(name).values(), default=None)
                for row, value in found.items():
                    if value is not None:
                        rows[row][run.cfg.seed] = value
            if any(rows.values()):
                self.scores[name] = rows
        self.headline = next(iter(self.scores), None)

    def of(self, mode: str) -> list[Run]:
        return [run for run in self.runs if run.cfg.mode == mode]

    def clients(self, name: str, mode: str) -> PerClient:
        found = {run.cfg.seed: run.clients(name) for run in self.of(mode)}
        return {seed: each for seed, each in found.items() if each}


def sections(runs: list[Run]) -> list[Section]:
    """One for each combination of what was varied besides mode and seed."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        words = [
            f"{value} partitions" if key == "partitioner" else f"{key}={value}"
            for key in varied_keys(runs)
            if key not in ("mode", "seed") and (value := run.overrides.get(key))
        ]
        groups[", ".join(words)].append(run)
    return [Section(title, group) for title, group in groups.items()]


def varied_keys(runs: list[Run]) -> list[str]:
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    return [key for key in keys if len({run.overrides.get(key) for run in runs}) > 1]


# --- statistics -------------------------------------------------------------------------------


def interval(values: Iterable[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % confidence interval: t s / sqrt(n).

    t is the 0.975 quantile of Student's distribution (Student 1908) with n - 1 degrees of
    freedom, s the standard deviation of the sample. Of one value there is no interval.
    """
    from scipy.stats import t

    values = list(values)
    if (count := len(values)) < 2:
        return fmean(values), None
    quantile = float(t.ppf(0.975, count - 1))
    return fmean(values), quantile * stdev(values) / math.sqrt(count)


def differences(rows: dict[str, PerSeed], one: str, other: str) -> list[float]:
    """One row less the other, for each seed that both have."""
    return [rows[one][s] - rows[other][s] for s in rows[one] if s in rows[other]]


def told_apart(values: list[float]) -> bool:
    """Whether the interval of these differences leaves out zero. A single one is believed."""
    mean, half = interval(values)
    return abs(mean) > (half or 0)


def lower_is_better(name: str) -> bool:
    return name.endswith(("loss", "perplexity"))


def scale(name: str) -> int:
    return 100 if SCORES[name].endswith("%") else 1


def show(name: str, values: Iterable[float], sign: str = "") -> str:
    """Mean and interval as `97.9 ± 1.2`: shares in percent, as `SCORES` says."""
    if not (values := [value * scale(name) for value in values]):
        return "-"
    mean, half = interval(values)
    size = abs(mean)
    form = (
        ".2e" if size >= 1e5 else ".1f" if size >= 100 or scale(name) == 100 else ".3f"
    )
    text = f"{mean:{sign}{form}}"
    return text if half is None else f"{text} ± {half:{form}}"


# --- in words ---------------------------------------------------------------------------------


def answer(section: Section) -> str:
    """What came out, in plain words; every figure of it is in the section's tables."""
    name, rows = section.headline, section.scores.get(section.headline, {})
    if not rows.get("federated"):
        return "There is no score of a federated run, so nothing can be compared."
    percent, points = (" %", " points") if scale(name) == 100 else ("", "")
    said = {row: show(name, rows[row].values()) + percent for row in ROWS if rows[row]}
    title = SCORES[name].removesuffix(", %")
    title += " on the test questions" * (not name.startswith("eval"))
    title += "; lower is better" * lower_is_better(name)
    text = f"The federated adapter scores {said['federated']} ({title})."
    others = {
        "local": "a client alone {} on average",
        "worst": "the worst client alone {}",
        "centralized": "pooled data {}",
        "base": "the base before tuning {}",
    }
    beside = [words.format(said[row]) for row, words in others.items() if row in said]
    text += f" Beside it: {', '.join(beside)}." if beside else ""
    for row, whom in (("local", "a client alone"), ("centralized", "pooled data")):
        if gains := differences(rows, "federated", row):
            wins = (fmean(gains) < 0) == lower_is_better(name)
            verdict = "better than" if wins else "worse than"
            verdict = verdict if told_apart(gains) else "not told apart from"
            text += f" It is {verdict} {whom} ({show(name, gains, '+')}{points})."
    text += closed(name, rows) + on_own_records(section)
    return text + " One seed has no interval." * (len(rows["federated"]) == 1)


def closed(name: str, rows: dict[str, PerSeed]) -> str:
    """How far federation goes from local to centralised: (f - l) / (c - l) of the means."""
    order = ("local", "federated", "centralized")
    seeds = set.intersection(*(set(rows[row]) for row in order))
    if not seeds:
        return ""
    local, federated, pooled = (fmean(rows[row][s] for s in seeds) for row in order)
    gap = differences(rows, "centralized", "local")
    if not told_apart(gap) or (pooled < local) != lower_is_better(name):
        return " Pooling is not measurably better than a client alone: no gap to close."
    share = (federated - local) / (pooled - local)
    return f" Federation closes {share:.0%} of the gap between alone and pooled."


def on_own_records(section: Section) -> str:
    federated = section.clients("eval_loss", "federated")
    pairs = [
        (federated[seed][client], loss)
        for seed, losses in section.clients("eval_loss", "local").items()
        for client, loss in losses.items()
        if client in federated.get(seed, {})
    ]
    if not pairs:
        return ""
    wins = sum(together < alone for together, alone in pairs)
    others = ", the client's own adapter in the others" * (wins < len(pairs))
    return (
        " On the records that each client held back of its own, the federated adapter has "
        f"the lower loss in {wins} of {len(pairs)} cases (each client with each seed){others}."
    )


def budget(section: Section) -> str:
    """What each mode was given to train with."""
    cfg, train = section.runs[0].cfg, section.runs[0].cfg.train.training_arguments
    clients, rounds, steps = cfg.num_clients, cfg.num_rounds, train.max_steps
    federated = section.of("federated")
    if not federated or steps < 1:
        return f"Every mode has {rounds} rounds."
    cohort = federated[0].rounds[0]["sampled"]
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
    return (
        f"Every mode has {rounds} rounds of {steps} steps with {batch} examples. Federated: "
        f"{cohort} of {clients} clients a round, so {rounds * cohort * steps} steps in all. "
        f"Centralised: the same {cohort * steps} steps a round, one after the other, on "
        f"everybody's records. Local: each client takes {steps} steps a round on its own "
        f"records, {rounds * steps} in all, as deep as the federated adapter goes; over all "
        f"clients that is {rounds * clients * steps} steps, {clients / cohort:.3g} times "
        "the federated work."
    )


INTERVALS = (
    "± is half of the 95 % confidence interval of the mean over the seeds: t s / sqrt(n), "
    "with s the standard deviation over n seeds and t the 0.975 quantile of Student's "
    "distribution with n - 1 degrees of freedom (for 3 seeds, 4.30). Differences are taken "
    "seed by seed; two methods are told apart where the interval of their differences "
    "leaves out zero. The interval covers what the seed decides: the first adapter, who "
    "takes part when, the order of the records, how they are dealt out where that is "
    "random. It does not cover the choice of the test questions. Local is the mean over "
    "clients, each with an adapter of its own; the worst client is each seed's worst. Bytes "
    "and seconds are the simulation's: sites that train alone would send nothing, and "
    "pooling would send the data."
)


# --- tables -----------------------------------------------------------------------------------


def escape(text: str) -> str:
    """As Markdown that shows this text on one line, whatever it holds."""
    return re.sub(r"([\\`*_\[\]|<>&~$!#])", r"\\\1", " ".join(text.split()))


def table(header: list[str], rows: Iterable[list[str]], numbers: bool = True) -> str:
    """In Markdown, the columns after the first to the right if they are of numbers."""
    rules = [" --- ", *[" ---: " if numbers else " --- "] * (len(header) - 1)]
    lines = [" " + " | ".join(map(escape, cells)) + " " for cells in (header, *rows)]
    return "\n".join(f"|{line}|" for line in (lines[0], "|".join(rules), *lines[1:]))


def score_table(section: Section) -> str:
    body = []
    for name, rows in section.scores.items():
        cells = [show(name, rows[row].values()) for row in ROWS]
        for other in ("local", "centralized"):
            cells.append(show(name, differences(rows, "federated", other), sign="+"))
        body.append([SCORES[name], *cells])
    less = [f"federated less {MODES[mode]}" for mode in ("local", "centralized")]
    return table(["", *ROWS.values(), *less], body)


def cost_table(section: Section) -> str:
    columns = {
        "MB down": lambda run: run.summary["bytes_down"] / 1e6,
        "MB up": lambda run: run.summary["bytes_up"] / 1e6,
        "seconds": lambda run: run.summary["seconds"],
        "examples trained on": lambda run: sum(
            client["num-examples"] for r in run.rounds for client in r["clients"]
        ),
        "failed replies": lambda run: run.summary["failures"],
    }
    body = [
        [title, *(f"{fmean(map(of, runs)):,.1f}" for of in columns.values())]
        for mode, title in MODES.items()
        if (runs := section.of(mode))
    ]
    return table(["a run, on average", *columns], body)


def run_table(runs: list[Run], name: str | None) -> str:
    keys = varied_keys(runs)
    body = []
    for run in runs:
        values = [run.score(name)] if name and run.score(name) is not None else []
        settings = [run.overrides.get(key, "") for key in keys]
        seconds = f"{run.summary['seconds']:.0f}"
        body.append([run.folder.name, *settings, seconds, show(name, values)])
    return table(["run", *keys, "seconds", SCORES.get(name, "score")], body)


def client_table(section: Section) -> str:
    """Every client with every seed: what the figure of the clients is drawn from."""
    titles: dict[str, None] = {}
    cells: dict[tuple[int, int], dict[str, str]] = defaultdict(dict)
    for name in {section.headline: None, "eval_loss": None}:
        for mode in MODES:
            for seed, scores in section.clients(name, mode).items():
                titles[title := f"{MODES[mode]}: {SCORES[name]}"] = None
                for client, value in scores.items():
                    cells[seed, client][title] = show(name, [value])
    body = [
        [f"seed {seed}, client {client}", *(row.get(title, "-") for title in titles)]
        for (seed, client), row in sorted(cells.items())
    ]
    return table(["", *titles], body) if body else ""


def samples(section: Section) -> str:
    """A few test questions with everybody's answers, and how they were picked."""
    seed = Counter(run.cfg.seed for run in section.runs).most_common(1)[0][0]
    answers: dict[str, dict[str, str]] = defaultdict(dict)
    for run in section.runs:
        if run.cfg.seed == seed:
            for record in _load(run.folder / "answers.json", []):
                row = answers[f"{record['instruction']} {record['input']}"]
                row |= {"expected": record["output"], "base": record["base"]}
                row[run.cfg.mode] = record["tuned"]
    if not answers:
        return ""
    tuned = [mode for mode in MODES if any(mode in row for row in answers.values())]
    differ, alike = [], []
    for question, row in answers.items():
        right = {row.get(mode, "").strip() == row["expected"].strip() for mode in tuned}
        (differ if len(right) > 1 else alike).append(question)
    body = [
        [
            short(q),
            *(short(answers[q].get(c, "-")) for c in ("expected", "base", *tuned)),
        ]
        for q in spread(differ, 6) + spread(alike, 3)
    ]
    how = (
        f"Of {len(answers)} test questions with seed {seed}, {len(differ)} are answered "
        "rightly by some tuned adapters and not by others. Here are up to six of these, then "
        "up to three of the rest, evenly spaced in the order of the test file. Local is the "
        "client in the middle by exact match."
    )
    header = ["question", "expected", "base", *(MODES[mode] for mode in tuned)]
    return f"{how}\n\n{table(header, body, numbers=False)}"


def spread(items: list[str], count: int) -> list[str]:
    """At most `count` of them, evenly spaced."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def short(text: str) -> str:
    return textwrap.shorten(text, 240, placeholder=" ...")


# --- figures ----------------------------------------------------------------------------------


@contextmanager
def figure(path: Path, rows: int, columns: int, height: float) -> Iterator[list[Any]]:
    """The axes of a new figure, which is then saved as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"text.parse_math": False, "axes.grid": True, "axes.grid.axis": "y"}
    style |= {"grid.alpha": 0.3, "axes.axisbelow": True, "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        drawn, axes = pyplot.subplots(
            rows, columns, figsize=(7, height), layout="constrained", squeeze=False
        )
        yield list(axes.flat)
        drawn.savefig(path, dpi=120)
        pyplot.close(drawn)


def draw_methods(parts: list[Section], name: str, path: Path) -> None:
    """A bar for each method and section, with the confidence interval over seeds."""
    form = "{:.1f}" if scale(name) == 100 else "{:.2f}"
    with figure(path, 1, 1, 4) as (axes,):
        for place, (method, colour) in enumerate(COLOURS.items()):
            for x, section in enumerate(parts):
                values = section.scores.get(name, {}).get(method, {}).values()
                if values:
                    mean, half = interval(value * scale(name) for value in values)
                    at, label = (
                        x + (place - 1.5) * 0.21,
                        ROWS[method] if x == 0 else None,
                    )
                    style = {"color": colour, "label": label, "capsize": 4}
                    bars = axes.bar(at, mean, 0.19, yerr=half, **style)
                    axes.bar_label(bars, fmt=form, padding=3)
        axes.set_xticks(range(len(parts)), [section.title for section in parts])
        axes.set_ylabel(SCORES[name])
        axes.margins(y=0.1)
        axes.figure.legend(loc="outside upper center", ncols=4)


def by_rank(name: str, alone: PerClient, shown: PerClient) -> list[list[float]]:
    """What `shown` says of the weakest client alone, of the next, ...: a value for each seed.

    By rank, because where each seed deals the data out anew, the number of a client means
    another one with every seed.
    """
    ranks: dict[int, list[float]] = defaultdict(list)
    for seed, scores in alone.items():
        order = sorted(scores, key=scores.__getitem__, reverse=lower_is_better(name))
        for rank, client in enumerate(order, start=1):
            if client in shown.get(seed, {}):
                ranks[rank].append(shown[seed][client] * scale(name))
    return [ranks[rank] for rank in sorted(ranks)]


def draw_clients(section: Section, path: Path) -> bool:
    """Each client alone, and what it gets from the others. False where nothing is known."""
    names = {section.headline: None, "eval_loss": None}
    names = [name for name in names if section.clients(name, "local")]
    if not names:
        return False
    with figure(path, len(names), 1, 3.4 * len(names)) as panels:
        for axes, name in zip(panels, names, strict=True):
            alone = section.clients(name, "local")
            modes = [m for m in ("local", "federated") if section.clients(name, m)]
            width = 0.8 / len(modes)
            for place, mode in enumerate(modes):
                ranks = by_rank(name, alone, section.clients(name, mode))
                means, low, high = (list(map(of, ranks)) for of in (fmean, min, max))
                at = np.arange(len(means)) + 1 + (place - len(modes) / 2 + 0.5) * width
                whose = "its own adapter" if mode == "local" else MODES[mode]
                axes.bar(at, means, width * 0.9, color=COLOURS[mode], label=whose)
                axes.vlines(at, low, high, color="black", alpha=0.6, linewidth=1)
            # On the test questions, all have the same of these two.
            for mode in ("federated", "centralized") if len(modes) == 1 else ():
                if values := section.scores[name][mode].values():
                    mean, half = interval(value * scale(name) for value in values)
                    low, high = mean - (half or 0), mean + (half or 0)
                    axes.axhspan(
                        low, high, color=COLOURS[mode], alpha=0.15, linewidth=0
                    )
                    axes.axhline(mean, color=COLOURS[mode], label=MODES[mode])
            axes.set_xlabel("clients, from the weakest alone to the strongest")
            axes.set_ylabel(SCORES[name] + " (lower is better)" * lower_is_better(name))
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return True


def draw_losses(section: Section, path: Path) -> None:
    """Losses over the rounds: the mean over seeds, in a band from the lowest to the highest."""
    entries = [entry for run in section.runs for entry in run.rounds]
    titles = {"train_loss": "training loss", "test_loss": "loss on the test questions"}
    names = [name for name in titles if any(name in entry for entry in entries)]
    with figure(path, 1, len(names), 3.4) as panels:
        for axes, name in zip(panels, names, strict=True):
            for mode, colour in COLOURS.items():
                curve: dict[int, list[float]] = defaultdict(list)
                for run in section.of(mode):
                    for entry in run.rounds:
                        if name in entry:
                            curve[entry["round"]].append(entry[name])
                if curve:
                    values = list(curve.values())
                    means, low, high = (list(map(f, values)) for f in (fmean, min, max))
                    axes.plot(list(curve), means, color=colour, label=MODES[mode])
                    axes.fill_between(list(curve), low, high, color=colour, alpha=0.2)
            axes.set_xlabel("round")
            axes.set_ylabel(titles[name])
            axes.set_ylim(bottom=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[0].legend()


# --- the whole --------------------------------------------------------------------------------


def content(
    folder: Path, runs: list[Run], absent: list[str], target: Path
) -> tuple[str, dict[str, str]]:
    """The report as Markdown, and what can be folded away, by title. Draws its figures."""

    def picture(name: str, caption: str) -> str:
        return f"![{caption}]({name}.png)\n\n{caption}."

    parts, cfg = sections(runs), runs[0].cfg
    data = cfg.dataset.path or cfg.dataset.name
    seeds = ", ".join(map(str, sorted({run.cfg.seed for run in runs})))
    blocks = [
        "# Federated, alone or pooled?",
        "Is the federated model better than what each site could do alone, and how far is it "
        f"from pooling the data? {len(runs)} finished runs of {escape(str(cfg.model.name))} on "
        f"{escape(str(data))}, seeds {seeds}.",
    ]
    if absent:
        blocks.append(f"**{len(absent)} runs are missing from every figure here:**")
        blocks.append("\n".join(f"- {escape(line)}" for line in absent))
    blocks.append("## The answer")
    for section in parts:
        title = f"**With {escape(section.title)}.** " if section.title else ""
        blocks.append(title + answer(section))
    if headline := parts[0].headline:
        draw_methods(parts, headline, target / "methods.png")
        caption = (
            f"{SCORES[headline]}: mean over seeds, and its 95 % confidence interval"
        )
        blocks.append(picture("methods", caption))
    more = {"Every run": run_table(runs, headline)}
    for number, section in enumerate(parts, start=1):
        title = escape(section.title or "All runs")
        blocks += [f"## {title[0].upper()}{title[1:]}", score_table(section)]
        name = f"clients_{number}"
        if draw_clients(section, target / f"{name}.png"):
            caption = (
                "Each client by itself, and what it gets from the others: mean over seeds, "
                "the thin lines from the lowest seed to the highest"
            )
            blocks.append(picture(name, caption))
            title = f"Every client, {section.title}".removesuffix(", ")
            more[title] = client_table(section)
        name = f"losses_{number}"
        draw_losses(section, target / f"{name}.png")
        caption = (
            "Loss over the rounds: mean over seeds, from the lowest to the highest"
        )
        blocks += [picture(name, caption), cost_table(section)]
        blocks += [samples(section)]
    blocks += ["## How to read it", INTERVALS, *dict.fromkeys(map(budget, parts))]
    about = _load(folder / "environment.json", None) or environment()
    blocks += [
        "## How to get the same",
        table(["setting", "value"], settings(runs), numbers=False),
        table(["made with", ""], map(list, about.items()), numbers=False),
    ]
    name = f"The whole configuration of run {runs[0].folder.name}"
    more[name] = textwrap.indent(OmegaConf.to_yaml(cfg), "    ")
    return "\n\n".join(filter(None, blocks)), more


def settings(runs: list[Run]) -> list[list[str]]:
    """The settings that matter, and what was varied, each with every value of the runs."""
    body = []
    for key in dict.fromkeys([*varied_keys(runs), *SETTINGS]):
        values = [
            run.overrides.get(key, OmegaConf.select(run.cfg, key)) for run in runs
        ]
        texts = dict.fromkeys(str(value) for value in values if value is not None)
        if texts:
            body.append([key, ", ".join(texts)])
    return body


def environment() -> dict[str, str]:
    """The command, commit, machine and versions of what runs now."""

    def ask(*command: str) -> str:
        if not shutil.which(command[0]):
            return ""
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        return done.stdout.strip()

    commit = ask("git", "rev-parse", "HEAD") or "not a git checkout"
    changed = ", with local changes" if ask("git", "status", "--porcelain") else ""
    cpu = platform.machine()
    if (information := Path("/proc/cpuinfo")).exists():
        cpu = (re.findall(r"model name\s*: (.*)", information.read_text()) or [cpu])[0]
    gpus = ask("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    libraries = [re.match(r"[\w-]+", text)[0] for text in project["dependencies"]]
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit + changed,
        "processor": f"{os.cpu_count()} cores of {cpu}",
        "GPU": ", ".join(gpus.splitlines()) or "none",
        "Python": platform.python_version(),
        **{name: version(name) for name in libraries},
    }


def page(text: str, more: dict[str, str], folder: Path) -> str:
    """The Markdown as one HTML file, with the figures of `folder` inside."""
    from markdown_it import MarkdownIt

    # HTML in the text stays text.
    render = MarkdownIt("commonmark", {"html": False}).enable("table").render
    body = render(text)
    for title, part in more.items():
        body += FOLDED.format(html.escape(title), render(part))

    def inside(match: re.Match) -> str:
        image = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{image}"'

    return PAGE + re.sub(r'src="(\w+\.png)"', inside, body)


FOLDED = "<details><summary>{}</summary>\n\n{}\n\n</details>"
# The policy: nothing is loaded and nothing runs, whatever an answer holds.
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Federated, alone or pooled?</title>
<style>
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8888; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: 0.8rem;
  font-variant-numeric: tabular-nums; margin: 1.5rem 0; }
td[style] { white-space: nowrap; }
td:first-child { min-width: 8rem; }
th, td { padding: 0.3rem 0.45rem; border-bottom: 1px solid #8886; text-align: left;
  vertical-align: top; }
img { max-width: 100%; background: white; }
p:has(img) + p { font-size: 0.85rem; opacity: 0.8; margin-top: -1rem; }
pre { overflow-x: auto; font-size: 0.85rem; }
@media print {
  body { max-width: none; font-size: 10pt; }
  img, tr { break-inside: avoid; }
}
</style>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the report of a multirun.")
    parser.add_argument("folder", type=Path, help="multirun/<date>/<time>")
    try:
        print(write(parser.parse_args().folder) / "report.html")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
