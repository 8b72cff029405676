"""What federation was worth: a report on a sweep over `mode`, for a manager and a reviewer.

    python main.py experiment=compare            writes it when the sweep has ended
    python -m reporting.report multirun/<date>/<time>      writes it again, of what is there

Reads what the runs left in their folders and nothing else: no model, no data. The text is
written once, as Markdown; the HTML is the same, rendered, with the figures inside.
"""

import argparse
import base64
import html
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from operator import sub
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from typing_extensions import TypedDict

import utils
from reporting import figures
from reporting.figures import GREY, LOSS, figure
from server import runs as runs_
from server.runs import (
    CONFIG,
    by_key,
    fit,
    read_overrides,
    telling,
    trained_records,
    varied,
)
from utils import (
    FEW,
    PROJECT,
    UserError,
    code,
    escape,
    public,
    public_values,
    read_json,
    say,
    table,
    write_json,
)

PerSeed = dict[int, float]

PerClient = dict[int, dict[int, float]]  # by seed, then by partition

# The answer is about the first that was measured.
SCORES = {
    "exact_match": "exact match, %",
    "choice_accuracy": "choice accuracy, %",
    "f1": "F1, %",
    "rouge_l": "ROUGE-L, %",
    "test_accuracy": "token accuracy, %",
    "test_loss": LOSS,
    "test_perplexity": "perplexity",
    "eval_accuracy": "token accuracy on own records, %",
    "eval_loss": f"{LOSS}, on own records",
}

MODES = {"local": "local", "federated": "federated", "centralized": "centralised"}

ROWS = {"base": "base", "local": "local", "worst": "local, worst client", **MODES}

COLOURS = {
    "base": GREY,
    "local": "#e69f00",
    "federated": "#0072b2",
    "centralized": "#009e73",
}

MARKERS = {"base": "X", "local": "s", "federated": "o", "centralized": "D"}

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


class Tasks(TypedDict):
    task: list[str]


class Hydra(TypedDict):
    sweeper: dict
    overrides: Tasks


class Multirun(TypedDict):
    """What is read of Hydra's own `multirun.yaml`."""

    hydra: Hydra


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
    """A finished run: its overrides, configuration, and what its files tell."""

    folder: Path
    overrides: dict[str, str]
    cfg: DictConfig
    summary: dict[str, Any]
    history: dict[str, Any]
    answers: list[dict[str, str]]
    questions: dict[str, dict[str, list[float]]]  # of `base` and `tuned`, by score

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return self.history["rounds"]

    @property
    def last(self) -> dict[str, Any]:
        return self.rounds[-1]

    def score(self, name: str) -> float | None:
        """Of the adapter that the run ended with."""
        return self.summary.get(f"{name}_after", self.last.get(name))

    def before(self, name: str) -> float | None:
        """Of the base."""
        known = self.history.get("before", {}).get(name)
        return self.summary.get(f"{name}_before", known)

    def clients(self, name: str, few: bool = True) -> dict[int, float]:
        """By partition: an `eval_` score on the records that each client held back, another
        score of each client's own adapter on the test questions (in `mode=local`).

        Without `few`, clients with fewer than `utils.FEW` records of their own are left out of
        `eval_` scores.
        """
        own = self.last.get("eval_clients", [])
        each = self.summary.get("clients", []) + (own if few else telling(own))
        return {client["partition"]: client[name] for client in each if name in client}

    def held(self) -> dict[int, int]:
        """By partition, the records that a client held back."""
        own = self.last.get("eval_clients", [])
        return {client["partition"]: int(client["num-examples"]) for client in own}

    def asked(self) -> int:
        """The number of test questions; 0 where that is not known."""
        told = self.questions.get("tuned", {})
        counts = [len(told[name]) for name in ("exact_match", "tokens") if name in told]
        known = self.summary.get("test_questions") or len(self.answers)
        return known or max(counts, default=0)

    def by_question(self, whose: str, name: str) -> list[float] | None:
        """A value for each test question, whose mean is the score of `base` or `tuned`."""
        told = self.questions.get(whose, {})
        sums = {"test_loss": "nats", "test_accuracy": "right"}.get(name)
        if not sums:
            return told.get(name)
        if not told.get(sums) or len(told[sums]) != len(told.get("tokens", [])):
            return None
        return linear(told[sums], told["tokens"])


def read(folder: Path) -> tuple[list[Run], list[str]]:
    """The finished runs of a sweep, and a line on each that failed or was never started.

    Raises `UserError` where nothing has finished, or a file is broken.
    """
    runs, absent, seen = [], [], []
    jobs = [path.parent.parent for path in folder.glob("*/.hydra/overrides.yaml")]
    for job in sorted(jobs, key=lambda job: (len(job.name), job.name)):
        overrides = read_overrides(job)
        cfg = OmegaConf.create(runs_.read(job, CONFIG))
        history = runs_.read(job, "history.json", {"rounds": []})
        rounds = history["rounds"]
        seen.append(overrides)
        if summary := runs_.read(job, "summary.json", {}):
            if not rounds:
                raise UserError(f"{job}/history.json is broken: it tells of no round.")
            answers = runs_.read(job, "answers.json", [])
            questions = runs_.read(job, "test_scores.json", {})
            runs.append(Run(job, overrides, cfg, summary, history, answers, questions))
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
    config = fit(utils.read_yaml(file, dict), Multirun, file)["hydra"]
    swept, tasks = config["sweeper"].get("params"), config["overrides"]["task"]
    try:
        texts = [f"{key}={values}" for key, values in (swept or {}).items()]
        parsed = OverridesParser.create().parse_overrides([*texts, *tasks])
        jobs = BasicSweeper.split_arguments(parsed, None)[0]
    except Exception as error:  # whatever YAML and Hydra make of a broken file
        raise UserError(f"{file} is broken ({type(error).__name__}).") from error
    return list(map(by_key, jobs))


def _words(overrides: dict[str, str]) -> str:
    return " ".join(public(f"{key}={value}") for key, value in overrides.items())


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
                found = {run.cfg.mode: run.score(name), "base": run.before(name)}
                if run.cfg.mode == "local":
                    each = run.clients(name, few=False).values()
                    found["worst"] = worst(each, default=None)
                for row, value in found.items():
                    if value is not None:
                        rows[row][run.cfg.seed] = value
            if any(rows.values()):
                self.scores[name] = rows
        self.headline = next(iter(self.scores), None)

    def of(self, mode: str) -> list[Run]:
        return [run for run in self.runs if run.cfg.mode == mode]

    def clients(self, name: str, mode: str, few: bool = True) -> PerClient:
        found = {run.cfg.seed: run.clients(name, few) for run in self.of(mode)}
        return {seed: each for seed, each in found.items() if each}

    def score(self, name: str, row: str) -> "Estimate | None":
        """Of a row, over its seeds."""
        share = scale(name) == 100
        # "Add two successes and two failures" (Agresti and Coull 1998), so that all or
        # nothing of a few questions right is no certainty.
        more = (0, 0, 1, 1) if share else ()
        least = 1 if name.endswith("perplexity") else 0
        return self._estimate(
            name, [row], list, more, (least, 1 if share else math.inf)
        )

    def less(self, name: str, one: str, other: str) -> "Estimate | None":
        """One row less the other, seed by seed or question by question."""
        share = scale(name) == 100
        # One question more to each side, both in all (Agresti and Min 2005).
        more = (math.sqrt(0.5), -math.sqrt(0.5)) if share else ()
        bounds = (-1, 1) if share else (-math.inf, math.inf)
        return self._estimate(
            name, [one, other], lambda *two: list(map(sub, *two)), more, bounds
        )

    def closed(self, name: str) -> "Estimate | None":
        """How far federation goes from local to centralised: (f - l) / (c - l)."""

        def share(local, federated, pooled):
            return linear(map(sub, federated, local), map(sub, pooled, local))

        return self._estimate(name, ["local", "federated", "centralized"], share)

    def _estimate(
        self,
        name: str,
        rows: list[str],
        combine: Callable[..., list[float]],
        more: tuple[float, ...] = (),
        bounds: tuple[float, float] = (-math.inf, math.inf),
    ) -> "Estimate | None":
        """What `combine` makes of these rows, each a list of values, and its interval.

        Over the seeds that all rows have; where there is one, or they all say the same, over
        the test questions, and `more` values that keep few questions from being certain.
        """
        known = self.scores.get(name, {})
        seeds = sorted(set.intersection(*(set(known.get(row, {})) for row in rows)))
        if not seeds:
            return None
        values = combine(*([known[row][s] for s in seeds] for row in rows))
        if not values:  # a share of nothing
            return None
        mean, half = interval(values)
        centre, unit = mean, f"{len(seeds)} seeds"
        if half is None:
            lists = [self._by_question(name, row, seeds) for row in rows]
            if all(lists) and len(set(map(len, lists))) == 1:
                if values := combine(*lists):
                    centre, half = interval([*values, *more])
                unit = f"{len(lists[0])} questions"
        if half is None:
            return Estimate(mean)
        low, high = (max(bounds[0], centre - half), min(bounds[1], centre + half))
        return Estimate(mean, low, high, unit)

    def _by_question(self, name: str, row: str, seeds: list[int]) -> list[float] | None:
        """For each test question, the mean over these seeds."""
        whose = "base" if row == "base" else "tuned"
        runs = [
            r for r in self.runs if row in ("base", r.cfg.mode) and r.cfg.seed in seeds
        ]
        lists = [run.by_question(whose, name) for run in runs]
        tokens = [run.questions.get(whose, {}).get("tokens") for run in self.runs]
        tokens = [each for each in tokens if each]
        same = all(each == tokens[0] for each in tokens)  # the same questions, that is
        if not lists or not same or not all(lists) or len(set(map(len, lists))) > 1:
            return None
        return list(map(fmean, zip(*lists, strict=True)))

    def basis(self, name: str) -> str:
        """What a score rests on: so many test questions or records."""
        runs = self.of("federated") or self.runs
        if name.startswith("eval"):
            held = runs[0].held().values()
            return f"{sum(held)} records that {len(held)} clients held back"
        counts = sorted({run.asked() for run in runs})
        return f"{counts[-1] or 'an unknown number of'} test questions"


def sections(runs: list[Run]) -> list[Section]:
    """One for each combination of what was varied besides mode and seed."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        words = [
            f"{value} partitions" if key == "partitioner" else public(f"{key}={value}")
            for key in varied_keys(runs)
            if key not in ("mode", "seed") and (value := run.overrides.get(key))
        ]
        groups[", ".join(words)].append(run)
    return [Section(title, group) for title, group in groups.items()]


def varied_keys(runs: list[Run]) -> list[str]:
    return varied([run.overrides for run in runs])


# --- statistics -------------------------------------------------------------------------------


@dataclass
class Estimate:
    """A figure and its 95 % confidence interval; without, its uncertainty is not known."""

    value: float
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""  # what the interval is over

    @property
    def known(self) -> bool:
        return bool(self.unit)

    def apart(self) -> bool:
        """Whether the interval leaves out zero. What has none is not told apart."""
        return self.low > 0 or self.high < 0


def interval(values: Iterable[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % confidence interval: t s / sqrt(n).

    t is the 0.975 quantile of Student's distribution (Student 1908) with n - 1 degrees of
    freedom, s the standard deviation of the sample. Of one value, or values that are all the
    same, the uncertainty is not known: None.
    """
    from scipy.stats import t

    values = list(values)
    finite = all(map(math.isfinite, values))
    spread = stdev(values) if finite and len(values) > 1 else 0.0
    if not finite or spread <= 1e-12 * max(map(abs, values)):
        return fmean(values), None
    quantile = float(t.ppf(0.975, len(values) - 1))
    return fmean(values), quantile * spread / math.sqrt(len(values))


def linear(above: Iterable[float], below: Iterable[float]) -> list[float]:
    """Values whose mean is sum(above) / sum(below), and whose spread is that ratio's.

    To the first order: the ratio, and what is above it in each pair (Cochran 1977, 6.3).
    """
    above, below = list(above), list(below)
    total = sum(below)
    if not total:
        return []
    ratio, size = sum(above) / total, total / len(below)
    return [ratio + (a - ratio * b) / size for a, b in zip(above, below, strict=True)]


def lower_is_better(name: str) -> bool:
    return name.endswith(("loss", "perplexity"))


def scale(name: str) -> int:
    return 100 if SCORES[name].endswith("%") else 1


def show(name: str, found: Estimate | None, sign: str = "") -> str:
    """Figure and interval as `97.9 [96.7, 99.1]`: shares in percent, as `SCORES` says."""
    if found is None:
        return "-"
    value, low, high = (x * scale(name) for x in (found.value, found.low, found.high))
    size = abs(value)
    form = (
        ".2e" if size >= 1e5 else ".1f" if size >= 100 or scale(name) == 100 else ".3f"
    )
    text = f"{value:{sign}{form}}"
    return f"{text} [{low:{sign}{form}}, {high:{sign}{form}}]" if found.known else text


# --- in words ---------------------------------------------------------------------------------


def answer(section: Section) -> str:
    """What came out, in plain words; every figure of it is in the section's tables."""
    name, rows = section.headline, section.scores.get(section.headline, {})
    if not rows.get("federated"):
        return "There is no score of a federated run, so nothing can be compared."
    percent, points = (" %", " points") if scale(name) == 100 else ("", "")
    said = {
        row: show(name, section.score(name, row)) + percent for row in ROWS if rows[row]
    }
    seeds = len(rows["federated"])
    title = SCORES[name].removesuffix(", %").removesuffix(", on own records")
    title += f"; {section.basis(name)}, {seeds} seed{'s' * (seeds > 1)}"
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
        if gain := section.less(name, "federated", row):
            text += (
                f" {verdict(name, gain, whom, seeds)} ({show(name, gain, '+')}{points}"
            )
            text += f", over {gain.unit})." if gain.known else ")."
    text += closed(section) + on_own_records(section)
    if seeds == 1:
        text += (
            " With one seed, an interval is over the test questions: it tells of these "
            "adapters, not of what another seed would give."
        )
    return text


def verdict(name: str, gain: Estimate, whom: str, seeds: int) -> str:
    """Better, worse, or neither, as far as the interval of this difference allows."""
    if not gain.known:
        why = "All seeds agree" if seeds > 1 else "One run of each"
        return (
            f"{why}, without scores of single questions: whether it is better or worse than "
            f"{whom} cannot be told"
        )
    if not gain.apart():
        return f"It is not told apart from {whom}"
    wins = (gain.value < 0) == lower_is_better(name)
    return f"It is {'better' if wins else 'worse'} than {whom}"


def closed(section: Section) -> str:
    """How much of the gap between local and centralised is closed, if there is a gap."""
    name = section.headline
    gap, share = section.less(name, "centralized", "local"), section.closed(name)
    if gap is None or share is None or not gap.known:
        return ""
    if not gap.apart() or (gap.value < 0) != lower_is_better(name):
        return " Pooling is not measurably better than a client alone: no gap to close."
    if not share.known:
        return ""
    return (
        f" Federation closes {share.value:.0%} [{share.low:.0%}, {share.high:.0%}] of the "
        "gap between alone and pooled."
    )


def on_own_records(section: Section) -> str:
    federated = section.clients("eval_loss", "federated", few=False)
    pairs = [
        (federated[seed][client], loss)
        for seed, losses in section.clients("eval_loss", "local", few=False).items()
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
        f"{left_out(section)}"
    )


def left_out(section: Section) -> str:
    """Who held back too little to be compared."""
    held = [n for run in section.of("local") for n in run.held().values()]
    few = [n for n in held if n < FEW]
    if not few:
        return ""
    return (
        f" {len(few)} of {len(held)} are left out of this and of the worst client: they held "
        f"back fewer than {FEW} records."
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
    "The brackets hold 95 % confidence intervals of the mean: plus and minus t s / sqrt(n), with "
    "s the standard deviation over n seeds and t the 0.975 quantile of Student's distribution "
    "with n - 1 degrees of freedom (for 3 seeds, 4.30). Differences are taken seed by seed; "
    "two methods are told apart where the interval of their differences leaves out zero. The "
    "interval covers what the seed decides: the first adapter, who takes part when, the order "
    "of the records, how they are dealt out where that is random. It does not cover the choice "
    "of the test questions. Where there is one seed, or all seeds agree to the last digit, the "
    "same is done over the test questions, pair by pair; that covers their choice, and not "
    "what another seed would give. Shares of few questions are then given four more of which "
    "two are right (Agresti and Coull), differences one more to each side (Agresti and Min). "
    "Intervals end where the score does, at 0 and 100 %. A figure without brackets has no "
    "known uncertainty, and nothing is concluded from it. Loss is in nats per answer token, "
    "token accuracy the share of answer tokens that the adapter finds likeliest; exact match, "
    "F1 and ROUGE-L compare whole answers. Local is the mean over clients, each with an "
    "adapter of its own; the worst client is each seed's worst, among those that held back at "
    f"least {FEW} records where it is about those. Bytes and seconds are the simulation's: "
    "sites that train alone would send nothing, and pooling would send the data."
)

# --- tables -----------------------------------------------------------------------------------


def score_table(section: Section) -> str:
    body = []
    for name in section.scores:
        cells = [show(name, section.score(name, row)) for row in ROWS]
        for other in ("local", "centralized"):
            cells.append(show(name, section.less(name, "federated", other), sign="+"))
        # A narrow page breaks a line before an interval, not in it.
        cells = [cell.replace(", ", ",\u00a0") for cell in cells]
        body.append([f"{SCORES[name]} ({section.basis(name)})", *cells])
    less = [f"federated less {MODES[mode]}" for mode in ("local", "centralized")]
    counts = ", ".join(
        f"{title} {len(section.of(mode))}" for mode, title in MODES.items()
    )
    return f"{table(['', *ROWS.values(), *less], body)}\n\nRuns: {counts}."


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
        value = run.score(name) if name else None
        shown = show(name, None if value is None else Estimate(value)) if name else ""
        settings = [public(run.overrides.get(key, "")) for key in keys]
        seconds = f"{run.summary['seconds']:.0f}"
        body.append([run.folder.name, *settings, seconds, shown])
    return table(["run", *keys, "seconds", SCORES.get(name, "score")], body)


def client_table(section: Section) -> str:
    """Every client with every seed: what the figure of the clients is drawn from."""
    titles: dict[str, None] = {}
    cells: dict[tuple[int, int], dict[str, str]] = defaultdict(dict)
    held: dict[tuple[int, int], int] = {}
    for run in section.runs:
        held |= {(run.cfg.seed, client): n for client, n in run.held().items()}
    for name in {section.headline: None, "eval_loss": None}:
        for mode in MODES:
            for seed, scores in section.clients(name, mode).items():
                titles[title := f"{MODES[mode]}: {SCORES[name]}"] = None
                for client, value in scores.items():
                    cells[seed, client][title] = show(name, Estimate(value))
    body = [
        [
            f"seed {seed}, client {client}",
            str(held.get((seed, client), "-")),
            *(row.get(title, "-") for title in titles),
        ]
        for (seed, client), row in sorted(cells.items())
    ]
    return table(["", "records held back", *titles], body) if body else ""


def samples(section: Section) -> str:
    """A few test questions with everybody's answers, and how they were picked."""
    seed = Counter(run.cfg.seed for run in section.runs).most_common(1)[0][0]
    answers: dict[str, dict[str, str]] = defaultdict(dict)
    for run in section.runs:
        if run.cfg.seed == seed:
            for record in run.answers:
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


def draw_methods(parts: list[Section], name: str, path: Path) -> None:
    """A point for each method and section, with its confidence interval."""
    with figure(path) as (axes,):
        for place, method in enumerate(COLOURS):
            label = ROWS[method]
            for x, section in enumerate(parts):
                if found := section.score(name, method):
                    value, low, high = (
                        scale(name) * y for y in (found.value, found.low, found.high)
                    )
                    at = x + (place - 1.5) * 0.22
                    style = {"color": COLOURS[method], "fmt": MARKERS[method]}
                    style |= {"capsize": 5, "markersize": 8, "label": label}
                    error = [[value - low], [high - value]] if found.known else None
                    axes.errorbar(at, value, yerr=error, **style)
                    axes.annotate(
                        show(name, Estimate(found.value)),
                        (at, value),
                        (6, 6),
                        textcoords="offset points",
                    )
                    label = None
        titles = [
            "\n".join(
                filter(
                    None,
                    [textwrap.fill(part.title, 40), part.basis(name), _seeds(part)],
                )
            )
            for part in parts
        ]
        axes.set_xticks(range(len(parts)), titles)
        axes.set_xlim(-0.5, len(parts) - 0.5)
        axes.set_ylabel(SCORES[name] + " (lower is better)" * lower_is_better(name))
        axes.margins(y=0.1)
        axes.figure.legend(loc="outside upper center", ncols=4)


def _seeds(section: Section) -> str:
    count = len({run.cfg.seed for run in section.runs})
    return f"{count} seed{'s' * (count > 1)}"


def by_rank(
    name: str, alone: PerClient, shown: PerClient
) -> list[list[tuple[int, int, float]]]:
    """What `shown` says of the weakest client alone, of the next, ...: for each seed the
    seed, the client, and its value.

    By rank, because where each seed deals the data out anew, the number of a client means
    another one with every seed.
    """
    ranks: dict[int, list[tuple[int, int, float]]] = defaultdict(list)
    for seed, scores in alone.items():
        order = sorted(scores, key=scores.__getitem__, reverse=lower_is_better(name))
        for rank, client in enumerate(order, start=1):
            if client in shown.get(seed, {}):
                ranks[rank].append((seed, client, shown[seed][client] * scale(name)))
    return [ranks[rank] for rank in sorted(ranks)]


def draw_clients(section: Section, path: Path) -> bool:
    """Each client alone, and what it gets from the others. False where nothing is known."""
    names = {section.headline: None, "eval_loss": None}
    names = [name for name in names if section.clients(name, "local", few=False)]
    if not names:
        return False
    held = {run.cfg.seed: run.held() for run in section.of("local")}
    with figure(path, len(names), 1, 3.6 * len(names)) as panels:
        for axes, name in zip(panels, names, strict=True):
            alone = section.clients(name, "local", few=False)
            modes = [
                m for m in ("local", "federated") if section.clients(name, m, few=False)
            ]
            for place, mode in enumerate(modes):
                ranks = by_rank(name, alone, section.clients(name, mode, few=False))
                values = [[value for *_, value in rank] for rank in ranks]
                means, low, high = (list(map(of, values)) for of in (fmean, min, max))
                at = [
                    x + 0.2 * (place - (len(modes) - 1) / 2) for x in range(len(ranks))
                ]
                whose = "its own adapter" if mode == "local" else MODES[mode]
                axes.vlines(at, low, high, color=COLOURS[mode], linewidth=1.5)
                style = {"color": COLOURS[mode], "label": whose}
                axes.plot(at, means, ls="", marker=MARKERS[mode], **style)
            # On the test questions, all have the same of these two.
            for mode in ("federated", "centralized") if len(modes) == 1 else ():
                if found := section.score(name, mode):
                    value, low, high = (
                        scale(name) * y for y in (found.value, found.low, found.high)
                    )
                    if found.known:
                        axes.axhspan(low, high, color=COLOURS[mode], alpha=0.15, lw=0)
                    style = {"color": COLOURS[mode], "label": MODES[mode], "zorder": 1}
                    axes.axhline(value, marker="", ls="-", **style)
            ranks = by_rank(name, alone, alone)
            if len(alone) == 1 and len(ranks) <= 20:  # one seed: they have numbers
                counts = [
                    (client, held[seed].get(client)) for [(seed, client, _)] in ranks
                ]
                ticks = [
                    f"{client}\nn={n}" if n else f"{client}" for client, n in counts
                ]
                axes.set_xticks(range(len(ranks)), ticks)
                label = "client (n: records held back), the weakest alone first"
            else:
                axes.set_xticks([])
                label = f"{len(ranks)} clients, from the weakest alone to the strongest"
            axes.set_xlabel(label)
            axes.set_xlim(-0.6, len(ranks) - 0.4)
            unit = SCORES[name].replace(", on own", ",\non own")
            axes.set_ylabel(unit + "\n(lower is better)" * lower_is_better(name))
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return True


def draw_losses(section: Section, path: Path) -> None:
    """Losses over the rounds: the mean over seeds, in a band from the lowest to the highest."""
    titles = {
        "train_loss": "training",
        "test_loss": f"{section.basis('test_loss')}",
        "eval_loss": "records held back by clients",
    }
    entries = [entry for run in section.runs for entry in run.rounds]
    names = [name for name in titles if any(name in entry for entry in entries)]
    with figure(path, 1, len(names), 3.6) as panels:
        for axes, name in zip(panels, names, strict=True):
            for mode in MODES:
                curve: dict[int, list[float]] = defaultdict(list)
                for run in section.of(mode):
                    for entry in run.rounds:
                        if name in entry:
                            curve[entry["round"]].append(entry[name])
                if curve:
                    style = {"color": COLOURS[mode], "label": MODES[mode], "ls": "-"}
                    means = {n: fmean(values) for n, values in curve.items()}
                    few = {"marker": MARKERS[mode]} if len(curve) <= 30 else {}
                    figures.draw_over_rounds(axes, means, **style, **few)
                    low, high = (list(map(of, curve.values())) for of in (min, max))
                    axes.fill_between(
                        list(curve), low, high, color=COLOURS[mode], alpha=0.2, lw=0
                    )
            base = [b for run in section.runs if (b := run.before(name)) is not None]
            if base:
                style = {"color": GREY, "marker": MARKERS["base"], "ls": ""}
                axes.plot([0], [fmean(base)], label="base", **style)
                axes.axhline(fmean(base), color=GREY, ls=":", lw=1, marker="")
            figures.count_rounds(axes)
            axes.set_title(titles[name], fontsize="medium")
        panels[0].set_ylabel(LOSS)
        named = {
            label: handle
            for axes in panels
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        legend = {"loc": "outside upper center", "ncols": 4}
        panels[0].figure.legend(named.values(), named.keys(), **legend)


# --- the whole --------------------------------------------------------------------------------


def content(
    folder: Path, runs: list[Run], absent: list[str], target: Path
) -> tuple[str, dict[str, str]]:
    """The report as Markdown, and what can be folded away, by title. Draws its figures."""

    def picture(name: str, caption: str) -> str:
        return f"![{caption}]({name}.png)\n\n{caption}."

    file = folder / "environment.json"
    about = fit(read_json(file), dict, file) if file.exists() else {}
    parts, cfg = sections(runs), runs[0].cfg
    data = cfg.dataset.get("path") or cfg.dataset.get("name")
    seeds = sorted({run.cfg.seed for run in runs})
    finished = f"{len(runs)} finished run{'s' * (len(runs) > 1)}"
    blocks = [
        "# Federated, alone or pooled?",
        "Is the federated model better than what each site could do alone, and how far is it "
        f"from pooling the data? {finished} of {escape(public(cfg.model.name))} on "
        f"{escape(public(str(data)))}, seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}.",
    ]
    if absent:
        many = "runs are" if len(absent) > 1 else "run is"
        blocks.append(f"**{len(absent)} {many} missing from every figure here:**")
        blocks.append("\n".join(f"- {escape(line)}" for line in absent))
    blocks.append("## The answer")
    for section in parts:
        title = f"**With {escape(section.title)}.** " if section.title else ""
        blocks.append(title + answer(section))
    if headline := parts[0].headline:
        draw_methods(parts, headline, target / "methods.png")
        caption = f"{SCORES[headline]}: mean, and its 95 % confidence interval"
        blocks.append(picture("methods", caption))
    more = {"Every run": run_table(runs, headline)}
    for number, section in enumerate(parts, start=1):
        title = escape(section.title or "All runs")
        blocks += [f"## {title[0].upper()}{title[1:]}", score_table(section)]
        name = f"clients_{number}"
        if draw_clients(section, target / f"{name}.png"):
            caption = (
                "Each client by itself, and what it gets from the others: mean over seeds, "
                "the lines from the lowest seed to the highest"
            )
            blocks.append(picture(name, caption) + left_out(section))
            title = f"Every client, {section.title}".removesuffix(", ")
            more[title] = client_table(section)
        name = f"losses_{number}"
        draw_losses(section, target / f"{name}.png")
        caption = (
            "Loss over the rounds: mean over seeds, from the lowest to the highest; the base "
            "without training as round 0"
        )
        blocks += [picture(name, caption), cost_table(section)]
        blocks += [samples(section)]
    blocks += ["## How to read it", INTERVALS, *dict.fromkeys(map(budget, parts))]
    blocks += [
        "## How to get the same",
        table(["setting", "value"], settings(runs), numbers=False),
    ]
    title = "made with" if about else "not known what it was made with; this report by"
    about = about or {k: v for k, v in environment().items() if k != "command"}
    rows = [[key, public(str(value))] for key, value in about.items()]
    blocks.append(table([title, ""], rows, numbers=False))
    more["The command of every run"] = commands(runs)
    name = f"The whole configuration of run {runs[0].folder.name}"
    whole = public_values(OmegaConf.to_container(cfg))
    more[name] = textwrap.indent(OmegaConf.to_yaml(OmegaConf.create(whole)), "    ")
    return "\n\n".join(filter(None, blocks)), more


def commands(runs: list[Run]) -> str:
    """What to type for each run again, by itself."""
    lines = [
        shlex.join(["python", "main.py", *(public(f"{k}={v}") for k, v in each)])
        for each in (run.overrides.items() for run in runs)
    ]
    note = "Of paths outside of the project the last part is told."
    return f"{note}\n\n{code('bash', *lines)}"


def settings(runs: list[Run]) -> list[list[str]]:
    """The settings that matter, and what was varied, each with every value of the runs."""
    body = []
    for key in dict.fromkeys([*varied_keys(runs), *SETTINGS]):
        values = [
            run.overrides.get(key, OmegaConf.select(run.cfg, key)) for run in runs
        ]
        texts = [public(str(value)) for value in values if value is not None]
        if texts:
            body.append([key, ", ".join(dict.fromkeys(texts))])
    asked = dict.fromkeys(str(run.asked()) for run in runs if run.asked())
    body.append(["test questions", ", ".join(asked) or "none, or not known"])
    trained = dict.fromkeys(trained_records(run.rounds) for run in runs)
    body.append(
        ["records to train on", ", ".join(filter(None, trained)) or "not known"]
    )
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
