"""The runs of a sweep, read from their folders, and what they say of each other."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from operator import sub
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from pandas import DataFrame

from reporting.scores import (
    ROWS,
    SCORES,
    Estimate,
    interval,
    linear,
    lower_is_better,
    scale,
)
from server.runs import (
    CONFIG,
    Answer,
    History,
    Questions,
    Summary,
    by_key,
    per,
    read_overrides,
    telling,
    varied,
)
from server.runs import read as read_file
from utils import UserError, public, read_yaml

PerSeed = dict[int, float]

PerClient = dict[int, dict[int, float]]  # by seed, then by partition


@dataclass
class Run:
    """A finished run: its overrides, configuration, and what its files tell."""

    folder: Path
    overrides: dict[str, str]
    cfg: DictConfig
    summary: Summary
    history: History
    answers: list[Answer]
    questions: dict[str, Questions]  # of `base` and `tuned`

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return self.history["rounds"]

    @property
    def last(self) -> dict[str, Any]:
        return self.rounds[-1]

    @property
    def per(self) -> str:
        """What losses are means over, and accuracies shares of."""
        return per(self.history)

    def named(self, name: str) -> str:
        """What a score is called, with its unit."""
        return SCORES[name].format(per=self.per.removeprefix("answer "))

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
        cfg = OmegaConf.create(read_file(job, CONFIG))
        history = read_file(job, "history.json", {"rounds": []})
        rounds = history["rounds"]
        seen.append(overrides)
        if summary := read_file(job, "summary.json", {}):
            if not rounds:
                raise UserError(f"{job}/history.json is broken: it tells of no round.")
            answers = read_file(job, "answers.json", [])
            questions = read_file(job, "test_scores.json", {})
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
    config = read_yaml(file, dict)
    try:
        swept = config["hydra"]["sweeper"].get("params") or {}
        texts = [f"{key}={values}" for key, values in swept.items()]
        texts += config["hydra"]["overrides"]["task"]
        parsed = OverridesParser.create().parse_overrides(texts)
        jobs = BasicSweeper.split_arguments(parsed, None)[0]
    except Exception as error:  # whatever YAML and Hydra make of a broken file
        raise UserError(f"{file} is broken ({type(error).__name__}).") from error
    return list(map(by_key, jobs))


def _words(overrides: dict[str, str]) -> str:
    return " ".join(public(f"{key}={value}") for key, value in overrides.items())


class Section:
    """The runs that differ in seed and in what is compared only, and their scores.

    `row`: what a run stands for in the comparison, its mode unless told otherwise.
    """

    def __init__(
        self,
        title: str,
        runs: list[Run],
        row: Callable[[Run], str] = lambda run: run.cfg.mode,
    ) -> None:
        self.title = title
        self.runs = runs
        self.row = row
        # By score, row and seed.
        self.scores: dict[str, dict[str, PerSeed]] = {}
        for name in SCORES:
            rows: dict[str, PerSeed] = {each: {} for each in (*ROWS, *map(row, runs))}
            worst = max if lower_is_better(name) else min
            for run in runs:
                found = {row(run): run.score(name), "base": run.before(name)}
                if run.cfg.mode == "local":
                    each = run.clients(name, few=False).values()
                    found["worst"] = worst(each, default=None)
                for each, value in found.items():
                    if value is not None:
                        rows[each][run.cfg.seed] = value
            if any(rows.values()):
                self.scores[name] = rows
        self.headline = next(iter(self.scores), None)

    def named(self, name: str) -> str:
        return self.runs[0].named(name)

    def of(self, row: str) -> list[Run]:
        return [run for run in self.runs if self.row(run) == row]

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
        known = DataFrame(self.scores.get(name, {}), columns=rows).dropna()
        if known.empty:
            return None
        seeds = [*known.index]
        values = combine(*(known[row].tolist() for row in rows))
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
            r for r in self.runs if row in ("base", self.row(r)) and r.cfg.seed in seeds
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
    """One for each combination of what was varied besides what is compared, and seed.

    Modes are compared, or where there is one, whatever was varied but the partitions.
    """
    keys = [key for key in varied_keys(runs) if key != "seed"]
    row = {}
    if by_method(runs):
        compared = [key for key in keys if key != "partitioner"]
        keys = [key for key in keys if key == "partitioner"]
        row = {"row": lambda run: _method(run, compared)}
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        words = [
            f"{value} partitions" if key == "partitioner" else public(f"{key}={value}")
            for key in keys
            if key != "mode" and (value := run.overrides.get(key))
        ]
        groups[", ".join(words)].append(run)
    return [Section(title, group, **row) for title, group in groups.items()]


def by_method(runs: list[Run]) -> bool:
    """Whether a sweep compares methods of federated learning, and not federation itself."""
    keys = {*varied_keys(runs)}
    return "mode" not in keys and bool(keys - {"seed", "partitioner"})


def _method(run: Run, keys: list[str]) -> str:
    """What a run has of these keys: the name in `method=svd`, and all of `sharing=ffa`."""
    words = {key: run.overrides.get(key, "") for key in keys}
    told = [v if k == "method" else public(f"{k}={v}") for k, v in words.items() if v]
    return ", ".join(told) or "as it is"


def varied_keys(runs: list[Run]) -> list[str]:
    return varied([run.overrides for run in runs])
