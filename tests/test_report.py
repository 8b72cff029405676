"""pytest tests/test_report.py: the report on a sweep, of made-up runs and (slow) of real ones."""

import base64
import csv
import functools
import html
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import hydra
import numpy as np
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.utils import get_class
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from scipy.stats import binomtest, bootstrap

import utils
from reporting import comparison, figures, report, scores, tables, words
from reporting.runs import Run, Section, read, sections
from reporting.sweep import summarise_sweep
from settings.compose import compose, record
from utils import public

# By mode, the exact match for seeds 0, 1 and 2; in `local` of each of two clients.
EXACT = {
    "natural": {
        "federated": [0.8, 0.85, 0.75],
        "centralized": [0.9, 0.94, 0.86],
        "local": [[0.1, 0.3], [0.4, 0.2], [0.3, 0.5]],
    },
    "dirichlet": {
        "federated": [0.5, 0.9, 0.7],
        "centralized": [0.6, 0.8, 0.7],
        "local": [[0.5, 0.7], [0.5, 0.7], [0.7, 0.7]],
    },
}
# Losses on what two clients hold back: with natural partitions the second has a better one
# of its own.
OWN = {"federated": [0.2, 0.3], "centralized": [0.2, 0.2], "local": [0.4, 0.1]}
HELD = [12, 20]  # how many records that is
# What every round tells.
COUNTS = ("bytes_down", "bytes_up", "peak_memory_client", "peak_memory_server")
ENTRY = dict.fromkeys(COUNTS, 1) | {"sampled": 2, "failures": [], "clients": []}
QUESTIONS = 200  # of which `write_run` has each adapter answer its share
NASTY = [
    "<script>document.body.innerHTML = 'taken over'</script>",
    "<img src=x onerror=alert(1)> &amp; </td></table>",
    "a | b\nc ![x](http://evil.example/x.png) [y](http://evil.example) $x$ `z` **w** \\",
    '"><iframe src="http://evil.example"></iframe> src="methods.png"',
]


def right(share: float, draw: random.Random) -> list[float]:
    """Of each question whether it is answered rightly: exactly that share, by chance."""
    values = [1.0] * round(share * QUESTIONS)
    values += [0.0] * (QUESTIONS - len(values))
    draw.shuffle(values)
    return values


def write_run(job: Path, overrides: list[str], score, seed: int, cfg) -> None:
    """What a run leaves that the report reads."""
    settings = dict(text.split("=") for text in overrides)
    mode = settings["mode"]
    cfg.mode, cfg.seed = mode, seed
    record(cfg, overrides, job)
    each = score if mode == "local" else [score]
    own = [
        {"partition": i, "num-examples": HELD[i], "eval_loss": loss}
        for i, loss in enumerate(OWN[mode])
    ]
    client = {"num-examples": 160, "records": 90, "train_loss": 2.0}
    clients = [{"partition": i, **client} for i in (0, 1)]
    entry = ENTRY | {"clients": clients, "eval_clients": own}
    rounds = [
        {**entry, "round": r, "train_loss": 2.0 - r / 10 + seed / 10, "test_loss": 1.0}
        for r in (1, 2, 3)
    ]
    utils.write_json(job / "history.json", {"rounds": rounds})
    summary = {
        **dict.fromkeys((*COUNTS, "train_loss_first", "train_loss_last"), 1),
        "rounds": 3,
        "seconds": 40.0,
        "bytes_up": 3_000_000,
        "bytes_down": 3_000_000,
        "failures": 0,
        "exact_match_before": 0.05,
        "exact_match_after": sum(each) / len(each),
        "test_questions": QUESTIONS,
    }
    draw = random.Random(f"{mode} {seed}")
    utils.write_json(
        job / "test_scores.json",
        {
            "base": {"exact_match": right(0.05, random.Random(0))},
            "tuned": {"exact_match": right(sum(each) / len(each), draw)},
        },
    )
    if mode == "local":
        summary["clients"] = [
            {"partition": i, "exact_match": value} for i, value in enumerate(each)
        ]
    utils.write_json(job / "summary.json", summary)
    questions = [f"What is {i} plus 1?" for i in range(8)]
    wrong = {"federated": 1, "centralized": 0, "local": 4}[mode]
    answers = [
        {
            "instruction": question,
            "input": "",
            "output": str(i + 1),
            "base": NASTY[i % len(NASTY)],
            "tuned": str(i + 1) if i >= wrong else NASTY[i % len(NASTY)],
        }
        for i, question in enumerate(questions)
    ]
    utils.write_json(job / "answers.json", answers)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """A sweep of 18 runs, as Hydra numbers them."""
    folder = tmp_path_factory.mktemp("sweep")
    cfg = compose("experiment=quickstart num_clients=2 num_rounds=3")
    number = 0
    for partitioner, modes in EXACT.items():
        for mode, each in modes.items():
            for seed, score in enumerate(each):
                overrides = [
                    f"partitioner={partitioner}",
                    f"mode={mode}",
                    f"seed={seed}",
                ]
                write_run(folder / str(number), overrides, score, seed, cfg)
                number += 1
    params = {
        "partitioner": "natural,dirichlet",
        "mode": ",".join(modes),
        "seed": "0,1,2",
    }
    config = {"sweeper": {"params": params}, "overrides": {"task": []}}
    OmegaConf.save({"hydra": config}, folder / "multirun.yaml")
    report.write(folder)
    return folder


@pytest.fixture
def mine(sweep, tmp_path) -> Path:
    """A copy of the sweep that a test may change."""
    return shutil.copytree(sweep, tmp_path / "sweep")


def of(folder: Path) -> dict[str, Section]:
    return {part.title: part for part in sections(read(folder)[0])}


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text of its table cells and images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.cells: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.inside = True
            self.cells.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


# --- figures ----------------------------------------------------------------------------


def test_interval_is_students():
    mean, half = scores.interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.302653 / 3**0.5)  # t(0.975, 2) from a printed table
    assert scores.interval([5.0, 7.0]) == (6, pytest.approx(12.7062 * 2**0.5 / 2**0.5))
    # One value, or values that are all alike, tell nothing of how sure they are.
    assert scores.interval([0.4]) == (0.4, None)
    assert scores.interval([0.1 + 0.2, 0.3, 0.3]) == (pytest.approx(0.3), None)
    assert scores.interval([1.0, math.inf]) == (math.inf, None)


def made(*scores: dict[str, list[float]], name="exact_match", tokens=None):
    """A section of one-seed runs (federated, local, centralised): each question's score.

    `scores`: by seed, each mode's values.
    """
    runs = []
    for seed, modes in enumerate(scores):
        for mode, values in modes.items():
            told = {name: values}
            total = sum(values) / len(values)
            if tokens:
                kind = {"test_loss": "nats", "test_accuracy": "right"}[name]
                told = {kind: values, "tokens": tokens}
                total = sum(values) / sum(tokens)
            cfg = SimpleNamespace(mode=mode, seed=seed)
            questions = {"base": {}, "tuned": told}
            history = {"rounds": [{}]}
            summary = {f"{name}_after": total}
            runs.append(Run(Path(), {}, cfg, summary, history, [], questions))
    return Section("", runs)


def test_one_seeds_difference_is_as_sure_as_a_bootstrap_over_questions_says():
    draw = np.random.default_rng(0)
    for low, high in ((0.3, 0.45), (0.8, 0.97), (0.5, 0.5)):
        one, other = (draw.binomial(1, p, 335).astype(float) for p in (low, high))
        section = made({"federated": list(other), "local": list(one)})
        found = section.less("exact_match", "federated", "local")
        wanted = bootstrap((other - one,), np.mean, rng=1, method="BCa")
        bounds = wanted.confidence_interval
        width = bounds.high - bounds.low
        assert found.value == pytest.approx(np.mean(other) - np.mean(one))
        assert found.low == pytest.approx(bounds.low, abs=0.1 * width)
        assert found.high == pytest.approx(bounds.high, abs=0.1 * width)
        assert found.unit == "335 questions"


def test_token_scores_are_ratios_over_questions_of_unlike_lengths():
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 60, 300)
    one, other = (tokens * draw.gamma(3, m / 3, 300) for m in (3.1, 2.9))
    runs = {"federated": list(other), "local": list(one)}
    section = made(runs, name="test_loss", tokens=list(tokens))
    found = section.less("test_loss", "federated", "local")

    def ratio(a, b, t, axis):
        return (a.sum(axis) - b.sum(axis)) / t.sum(axis)

    wanted = bootstrap((other, one, tokens), ratio, paired=True, rng=1, method="BCa")
    bounds = wanted.confidence_interval
    assert found.value == pytest.approx((other - one).sum() / tokens.sum())
    assert found.low == pytest.approx(bounds.low, abs=0.1 * (bounds.high - bounds.low))
    assert found.high == pytest.approx(
        bounds.high, abs=0.1 * (bounds.high - bounds.low)
    )


def test_how_much_of_a_gap_is_closed_is_as_sure_as_a_bootstrap_says():
    draw = np.random.default_rng(0)
    modes = {"local": 0.3, "federated": 0.7, "centralized": 0.9}
    scores = {m: draw.binomial(1, p, 400).astype(float) for m, p in modes.items()}
    section = made({mode: list(values) for mode, values in scores.items()})
    found = section.closed("exact_match")

    def ratio(a, f, c, axis):
        return (f - a).mean(axis) / (c - a).mean(axis)

    wanted = bootstrap(tuple(scores.values()), ratio, paired=True, rng=1)
    bounds = wanted.confidence_interval
    assert found.value == pytest.approx(ratio(*scores.values(), 0))
    assert found.low == pytest.approx(bounds.low, abs=0.03)
    assert found.high == pytest.approx(bounds.high, abs=0.03)


@pytest.mark.parametrize(
    ("right", "of"), [(0, 335), (335, 335), (1, 40), (0, 5), (20, 42)]
)
def test_a_share_of_few_questions_is_never_certain(right, of):
    found = made({"federated": [1.0] * right + [0.0] * (of - right)}).score(
        "exact_match", "federated"
    )
    wilson = binomtest(right, of).proportion_ci(method="wilson")
    assert 0 <= found.low < found.high <= 1
    # Agresti and Coull's interval holds Wilson's, and is little wider.
    assert found.low <= wilson.low + 1e-3
    assert found.high >= wilson.high - 1e-3
    assert found.high - found.low < 1.6 * (wilson.high - wilson.low)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("questions", "share"), [(5, 0.5), (42, 0.95), (335, 0.9)])
def test_equal_modes_are_rarely_told_apart_and_unequal_ones_are(
    seeds, questions, share
):
    draw = np.random.default_rng(0)

    def verdicts(one: float, other: float, times: int) -> float:
        found = 0
        for _ in range(times):
            runs = [
                {
                    mode: draw.binomial(1, p, questions).astype(float).tolist()
                    for mode, p in (("federated", one), ("local", other))
                }
                for _ in range(seeds)
            ]
            found += made(*runs).less("exact_match", "federated", "local").apart()
        return found / times

    # 5 %, and what 200 cases leave to chance: three standard errors are 4.6 %.
    assert verdicts(share, share, 200) <= 0.096
    if questions > 300:
        assert verdicts(share, share - 0.3, 20) == 1


def test_an_interval_of_shares_ends_at_all_of_them():
    found = made(
        *({"federated": [float(i < n) for i in range(100)]} for n in (96, 88, 81))
    )
    estimate = found.score("exact_match", "federated")
    assert scores.show("exact_match", estimate) == "88.3 [69.7, 100.0]"


@pytest.mark.slow
def test_scores_are_means_over_seeds(sweep):
    section = of(sweep)["natural partitions"]
    shown = {
        row: scores.show("exact_match", section.score("exact_match", row))
        for row in scores.ROWS
    }
    # A standard deviation of 10 points over three seeds is an interval of 24.8 to each side.
    assert shown == {
        # The same with each seed: the interval is over the 200 questions.
        "base": "5.0 [2.6, 9.1]",
        "local": "30.0 [5.2, 54.8]",
        "worst": "20.0 [0.0, 44.8]",
        "federated": "80.0 [67.6, 92.4]",
        "centralized": "90.0 [80.1, 99.9]",
    }
    lines = tables.score_table(section).replace("\u00a0", " ").splitlines()
    exact = next(line for line in lines if line.startswith("| exact match"))
    assert exact.startswith("| exact match, % (200 test questions) |")
    assert exact.endswith(r"| +50.0 \[+17.1, +82.9\] | -10.0 \[-12.5, -7.5\] |")
    # What clients hold back has a loss for each of them: the worst is the highest.
    assert section.scores["eval_loss"]["worst"] == dict.fromkeys(range(3), 0.4)


@pytest.mark.slow
def test_answer_says_better_worse_and_how_much_of_the_gap(sweep):
    text = words.answer(of(sweep)["natural partitions"])
    assert (
        "scores 80.0 [67.6, 92.4] % (exact match; 200 test questions, 3 seeds)" in text
    )
    assert "a client alone 30.0 [5.2, 54.8] % on average" in text
    assert (
        "better than a client alone (+50.0 [+17.1, +82.9] points, over 3 seeds)" in text
    )
    assert "worse than pooled data (-10.0 [-12.5, -7.5] points, over 3 seeds)" in text
    assert "closes 83% [" in text  # (80 - 30) / (90 - 30)
    assert "lower loss in 3 of 6 cases" in text


def test_answer_is_careful_within_the_interval(sweep):
    text = words.answer(of(sweep)["dirichlet partitions"])
    assert "not told apart from a client alone (+6.7" in text
    assert (
        "not told apart from pooled data (+0.0 [-24.8, +24.8] points, over 3 seeds)"
        in text
    )
    assert "better than" not in text.replace("measurably better than", "")
    assert "no gap to close" in text


def only_seed_0(folder: Path) -> None:
    for job in folder.iterdir():
        if (job / ".hydra").is_dir() and "seed=0" not in str(
            OmegaConf.load(job / ".hydra/overrides.yaml")
        ):
            shutil.rmtree(job)


def test_one_seed_is_judged_by_its_questions(mine):
    only_seed_0(mine)
    text = words.answer(of(mine)["natural partitions"])
    assert "+60.0 [" in text
    assert "better than a client alone" in text
    assert "closes 86% [" in text  # (80 - 20) / (90 - 20)
    assert "200 test questions, 1 seed" in text
    assert text.count("points, over 200 questions)") == 2
    assert text.endswith("not of what another seed would give.")


def test_one_seed_without_scores_of_questions_is_not_judged(mine):
    only_seed_0(mine)
    for file in mine.glob("*/test_scores.json"):
        file.unlink()
    text = words.answer(of(mine)["natural partitions"])
    assert text.count("One run of each, without scores of single questions") == 2
    assert "cannot be told (+60.0 points)" in text
    assert not re.search(r"It is|closes|\[", text)


def test_other_questions_are_not_compared():
    tokens = [3.0, 5.0, 8.0, 2.0]
    one = made({"federated": [9.0, 4, 8, 1]}, name="test_loss", tokens=tokens)
    other = made({"local": [2.0, 1, 3, 0]}, name="test_loss", tokens=tokens[::-1])
    section = Section("", [*one.runs, *other.runs])
    assert not section.less("test_loss", "federated", "local").known


def test_a_client_with_few_records_is_not_the_worst(mine):
    for file in mine.glob("*/history.json"):
        history = json.loads(file.read_text())
        history["rounds"][-1]["eval_clients"][0]["num-examples"] = 1
        utils.write_json(file, history)
    section = of(mine)["natural partitions"]
    assert section.scores["eval_loss"]["worst"] == dict.fromkeys(range(3), 0.1)
    assert section.scores["eval_loss"]["worst"].keys() == {0, 1, 2}
    text = words.answer(section)
    assert "lower loss in 0 of 3 cases" in text
    assert "3 of 6 are left out of this and of the worst client" in text
    # They stand in the table, with what they rest on.
    rows = [
        line for line in tables.client_table(section).splitlines() if "client 0" in line
    ]
    assert [row.split(" | ")[1] for row in rows] == ["1", "1", "1"]


def test_loss_is_better_when_it_is_lower():
    tokens = [1.0] * 60
    noise = np.random.default_rng(0).normal(0, 0.1, 60)
    losses = {"local": 2.0, "federated": 1.25, "centralized": 1.0}
    values = {m: list(loss + noise * i) for i, (m, loss) in enumerate(losses.items())}
    section = made(values, name="test_loss", tokens=tokens)
    assert "closes 7" in words.closed(section)
    assert "It is better than a client alone" in words.answer(section)
    values["centralized"] = list(2.5 + noise)
    section = made(values, name="test_loss", tokens=tokens)
    assert "no gap to close" in words.closed(section)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seeds", [1, 2])
def test_where_all_score_the_same_there_is_no_gap_to_close(value, seeds):
    modes = {mode: [value] * 9 for mode in ("federated", "local", "centralized")}
    section = made(*[modes] * seeds)
    assert section.closed("exact_match") is None
    assert "It is not told apart from pooled data" in words.answer(section)
    assert "Federation closes" not in words.answer(section)


def test_clients_are_ranked_within_their_seed(sweep):
    section = of(sweep)["natural partitions"]
    alone = section.clients("exact_match", "local")
    ranks = comparison.by_rank("exact_match", alone, alone)
    assert ranks == [
        [(0, 0, 10), (1, 1, 20), (2, 0, 30)],
        [(0, 1, 30), (1, 0, 40), (2, 1, 50)],
    ]
    # The weakest by loss has the highest; the other's is that of the same client.
    losses, others = {0: {0: 0.1, 1: 0.9}}, {0: {0: 5.0, 1: 6.0}}
    ranks = comparison.by_rank("eval_loss", losses, others)
    assert ranks == [[(0, 1, 6.0)], [(0, 0, 5.0)]]


def test_budget_is_the_configurations(sweep):
    text = words.budget(of(sweep)["natural partitions"])
    assert "3 rounds of 10 steps with 16 examples" in text
    assert "2 of 2 clients a round, so 60 steps in all" in text
    assert "30 in all, as deep as" in text


# --- runs that are not there -------------------------------------------------------------


@pytest.mark.slow
def test_what_failed_or_never_started_is_named(mine):
    (mine / "4/summary.json").unlink()
    shutil.rmtree(mine / "17")
    text = (report.write(mine) / "report.md").read_text()
    assert "2 runs are missing" in text
    assert "Run 4 (partitioner=natural mode=centralized seed=1) stopped after 3" in text
    assert "partitioner=dirichlet mode=local seed=2 was never started" in text
    assert "16 finished runs" in text
    rows = of(mine)["natural partitions"].scores["exact_match"]
    assert rows["centralized"].keys() == {0, 2}


@pytest.mark.slow
def test_whole_modes_may_be_missing(mine):
    for number in (*range(6, 9), *range(9, 12)):  # natural alone, dirichlet federated
        shutil.rmtree(mine / str(number))
    text = (report.write(mine) / "report.md").read_text()
    assert "With natural partitions.** The federated adapter scores 80.0 [" in text
    assert "With dirichlet partitions.** There is no score of a federated run" in text


def test_nothing_finished_is_an_error(tmp_path):
    with pytest.raises(utils.UserError, match="no finished run"):
        report.write(tmp_path)


def three_runs(folder: Path) -> Path:
    """Keep natural partitions with seed 0: runs 0, 3 and 6."""
    for job in folder.glob("*[0-9]"):
        if job.name not in ("0", "3", "6"):
            shutil.rmtree(job)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "0/history.json",
        "0/summary.json",
        "0/answers.json",
        "0/test_scores.json",
        "0/.hydra/config.yaml",
        "0/.hydra/overrides.yaml",
        "multirun.yaml",
        "environment.json",
    ],
)
def test_a_broken_file_is_named(name, mine):
    file = three_runs(mine) / name
    whole = file.read_text() if file.exists() else "{}"
    bomb = "a0: &a0 [x]\n"  # 2^64 values, for who unfolds them
    bomb += "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 65))
    broken = ["{", "[" * 5_000, "7", bomb, whole[: len(whole) // 2], '{"rounds": [{}]}']
    # Half of a list of overrides, or of what somebody wrote, may be whole.
    kept = {"environment.json": broken[4:], "0/.hydra/overrides.yaml": broken[4:5]}
    for content in broken:
        if content in kept.get(name, ()):
            continue
        file.write_text(content)
        with pytest.raises(utils.UserError, match=f"{name} is broken") as told:
            report.write(mine)
        assert len(str(told.value).splitlines()) == 1
        assert len(str(told.value)) < 600


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("history.json", "rounds", []),
        ("history.json", "rounds", [{"round": 1}]),
        ("summary.json", "seconds", "long"),
        ("summary.json", "exact_match_after", None),
        ("summary.json", "clients", [{"partition": "x"}]),
        ("test_scores.json", "tuned", {"exact_match": ["x"]}),
        (".hydra/config.yaml", "seed", "zero"),
        (".hydra/config.yaml", "mode", "federal"),
        (".hydra/config.yaml", "train", {}),
    ],
)
def test_a_file_that_lacks_what_is_read_is_named(name, key, value, mine):
    file = three_runs(mine) / "6" / name
    content = OmegaConf.to_container(OmegaConf.load(file)) | {key: value}
    file.write_text(json.dumps(content))
    with pytest.raises(utils.UserError, match=f"6/{name} is broken") as told:
        report.write(mine)
    assert len(str(told.value).splitlines()) == 1


def test_no_path_of_this_machine_is_told(mine, monkeypatch):
    secret = "/home/jane/ward 7/notes.jsonl"
    for job in three_runs(mine).glob("[0-9]"):
        cfg = OmegaConf.load(job / ".hydra/config.yaml")
        cfg.dataset.path = cfg.dataset.test_path = secret
        cfg.model.name = "/srv/jane/models/mine"
        cfg.tracking = {"uri": "sqlite:////home/jane/mlflow.db"}
        OmegaConf.save(cfg, job / ".hydra/config.yaml")
        file = job / ".hydra/overrides.yaml"
        more = [f'dataset.path="{secret}"', "model.name=/srv/jane/models/mine"]
        OmegaConf.save([*OmegaConf.load(file), *more], file)
    command = f"python main.py 'dataset.path=\"{secret}\"' hydra.sweep.dir={mine}"
    utils.write_json(mine / "environment.json", {"command": command})
    (mine / "0/summary.json").unlink()  # whose overrides are told
    report.write(mine)
    for name in ("report.md", "report.html"):
        text = html.unescape((mine / "report" / name).read_text())
        for private in ("jane", "ward", "/home", "/srv", str(mine.parent)):
            assert private not in text, private
        assert "notes.jsonl" in text
        assert "python main.py partitioner=natural mode=centralized seed=0" in text


def test_settings_of_strangers_are_shown_as_text(mine):
    text = " ".join(NASTY)
    for number in ("0", "3", "6"):
        file = three_runs(mine) / number / ".hydra/overrides.yaml"
        OmegaConf.save([*OmegaConf.load(file), f"dataset.name={text}"], file)
        cfg = OmegaConf.load(file.with_name("config.yaml"))
        cfg.dataset.name = cfg.dataset.path = text
        OmegaConf.save(cfg, file.with_name("config.yaml"))
    report.write(mine)
    page = Page((mine / "report/report.html").read_text())
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "a", "link"})
    assert {of.get("src", "data:")[:5] for _, of in page.tags} == {"data:"}
    assert not any(name.startswith("on") for _, of in page.tags for name in of)
    # The commands give each setting to Hydra as one word.
    words = shlex.split(tables.commands(read(mine)[0]).partition("bash\n")[2])
    assert words.count(public(f"dataset.name={text}")) == 3


@pytest.mark.slow
def test_callback_reports_after_a_failure_and_at_the_end(mine, capsys):
    shutil.rmtree(mine / "report")
    config = OmegaConf.create(
        {"dry_run": False, "hydra": {"sweep": {"dir": str(mine)}}}
    )
    callback = report.Report()
    callback.on_multirun_start(config)
    callback.on_job_end(config, JobReturn(status=JobStatus.COMPLETED))
    assert not (mine / "report").exists()
    # Hydra announces no end after this.
    callback.on_job_end(config, JobReturn(status=JobStatus.FAILED))
    assert (mine / "report/report.html").is_file()
    assert str(mine) in capsys.readouterr().out
    about = json.loads((mine / "environment.json").read_text())
    assert about["torch"].startswith("2.")
    assert about["command"] in html.unescape((mine / "report/report.html").read_text())

    config.dry_run = True
    shutil.rmtree(mine / "report")
    dry = report.Report()
    dry.on_multirun_start(config)
    dry.on_multirun_end(config)
    assert not (mine / "report").exists()


# --- the two renderings ------------------------------------------------------------------


def test_answers_are_shown_as_text_whatever_they_hold(sweep):
    page = Page((sweep / "report/report.html").read_text())
    for answer in NASTY:
        assert " ".join(answer.split()) in page.cells
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "a", "link"})
    assert not any(name.startswith("on") for _, of in page.tags for name in of)
    markdown = (sweep / "report/report.md").read_text()
    assert "\n| --- | --- |" in markdown
    assert r"\<script\>" in markdown
    assert r"a \| b c \!\[x\](http" in markdown


def test_html_holds_everything_itself(sweep):
    text = (sweep / "report/report.html").read_text()
    images = [of["src"] for tag, of in Page(text).tags if tag == "img"]
    pictures = re.findall(
        r"^!\[.*\]\((.*)\)$", (sweep / "report/report.md").read_text(), re.M
    )
    assert len(pictures) == 5
    # The figures are those that the Markdown names, byte by byte and in its order.
    for source, name in zip(images, pictures, strict=True):
        assert source.startswith("data:image/png;base64,")
        content = base64.b64decode(source.split(",")[1])
        assert content == (sweep / "report" / name).read_bytes()
    loaded = [of.get("src", of.get("href")) for _, of in Page(text).tags]
    assert set(filter(None, loaded)) == set(images)
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(" not in text


def test_both_renderings_have_the_same_tables(sweep):
    cells = []
    for line in (sweep / "report/report.md").read_text().splitlines():
        if line.startswith("|") and "---" not in line:
            found = re.split(r"(?<!\\)\|", line)[1:-1]
            cells += [re.sub(r"\\([^a-z0-9\s])", r"\1", cell.strip()) for cell in found]
    page = Page((sweep / "report/report.html").read_text())
    assert cells == [cell.strip() for cell in page.cells]
    assert len(cells) > 200


# --- pictures and tables of runs and sweeps -----------------------------------------------


def drawn(monkeypatch) -> list:
    """The figures that are saved from now on, for a look at what stands in them."""
    kept: list = []
    save = Figure.savefig

    def keep(figure, *args, **more):
        figure.draw_without_rendering()
        kept.append(figure)
        save(figure, *args, **more)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def test_a_sweeps_picture_names_what_differs_and_fits(tmp_path, monkeypatch):
    pictures = drawn(monkeypatch)
    same = [f"train.training_arguments.setting_{i}=value" for i in range(25)]
    paths = [f"/home/jane/data/{'long' * 30}/{name}.jsonl" for name in "ab"]
    for number, (path, seed) in enumerate((p, s) for p in paths for s in (0, 1)):
        job = tmp_path / str(number)
        mine = [*same, f"seed={seed}", f"dataset.path={path}"]
        record(OmegaConf.create({}), mine, job)
        rounds = [ENTRY | {"round": r, "train_loss": 3.0 - r / 10} for r in range(1, 4)]
        utils.write_json(job / "history.json", {"rounds": rounds[: number + 1]})
    (tmp_path / "3/history.json").unlink()  # it failed at once
    summarise_sweep(tmp_path)
    header, *rows = csv.reader((tmp_path / "losses.csv").read_text().splitlines())
    assert header == ["run", "seed", "dataset.path", "rounds", "last smoothed loss"]
    assert [row[:3] for row in rows] == [
        [str(i), str(i % 2), paths[i // 2]] for i in range(4)
    ]
    assert [row[3:] for row in rows][::3] == [["1", "2.9000"], ["0", ""]]
    assert "jane" not in (tmp_path / "losses.md").read_text()
    [figure] = pictures
    [legend] = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [
        "0: seed=0, path=a.jsonl",
        "1: seed=1, path=a.jsonl",
        "2: seed=0, path=b.jsonl",
    ]
    width, _ = figure.canvas.get_width_height()
    for box in (legend.get_window_extent(), figure.axes[0].get_tightbbox()):
        assert 0 <= box.x0 < box.x1 <= width
    assert not legend.get_window_extent().overlaps(figure.axes[0].bbox)
    assert figure.axes[0].get_ylabel() == "loss, nats"


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize(
    "before", [None, {"round": 0, "test_loss": 4.6, "eval_loss": 4.5}]
)
def test_a_runs_picture_has_all_its_losses(count, before, tmp_path, monkeypatch):
    pictures = drawn(monkeypatch)
    clients = [{"train_loss": 2.0}, {"train_loss": 3.0}]
    rounds = [
        {"round": r, "train_loss": 2.5, "clients": clients, "test_loss": 2.2}
        for r in range(1, count + 1)
    ]
    rounds[-1] |= {"eval_loss": 2.1, "eval_clients": [{"num-examples": 7}] * 2}
    history = {"rounds": rounds} | ({"before": before} if before else {})
    figures.plot_run(
        history, "a_base (4-bit): $x$", "pair", tmp_path / "train_loss.png"
    )
    [axes] = pictures[0].axes
    assert axes.get_ylabel() == "loss, nats per pair"
    lines = {line.get_label(): line for line in axes.lines}
    assert lines.keys() == {
        "training, each client",
        "training, mean of the round's clients",
        "test questions",
        "held back by the clients: 14 records",
    }
    first = 0 if before else 1
    assert list(lines["test questions"].get_xdata()) == [*range(first, count + 1)]
    own = lines["held back by the clients: 14 records"]
    assert list(own.get_xdata()) == [0, count] if before else [count]
    assert own.get_marker() == "o"  # one value is a point, and no empty picture
    # The axes are the data's, and count whole rounds.
    low, high = axes.get_ylim()
    assert 1.5 < low < 2 < 3 < high
    ticks = [t for t in axes.get_xticks() if first <= t <= count]
    assert ticks == [round(t) for t in ticks] != []
    assert axes.get_title(loc="left") == "a_base (4-bit): $x$"


# --- in a browser ------------------------------------------------------------------------

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
# The report in a frame as wide as a phone; what came of it is left in the page.
FRAME = """<!doctype html><pre id="found"></pre>
<iframe src="report.html" style="width: 390px; height: 800px"></iframe>
<script>
// How opaque the last pixel is: 0 where the image was not decoded to its end.
const last = (image) => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(canvas.width - 1, canvas.height - 1, 1, 1).data[3];
};
document.querySelector("iframe").onload = (event) => {
  const inner = event.target.contentDocument;
  document.getElementById("found").textContent = JSON.stringify({
    images: [...inner.images].map((image) => [image.naturalWidth, image.width, last(image)]),
    text: inner.body.innerText,
    overflow: inner.documentElement.scrollWidth - inner.documentElement.clientWidth,
    folded: inner.querySelector("details table").checkVisibility(),
  });
};
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium here: apt-get install chromium")
def test_a_browser_shows_it(sweep, tmp_path):
    (tmp_path / "frame.html").write_text(FRAME)
    shutil.copy(sweep / "report/report.html", tmp_path)
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = subprocess.run(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",  # which a container's root has to do without
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
                "--no-proxy-server",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--dump-dom",
                f"http://127.0.0.1:{server.server_port}/frame.html",
            ],
            capture_output=True,
            text=True,
            timeout=600,
        )
    finally:
        server.shutdown()
        server.server_close()
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    shown = json.loads(html.unescape(found[1]))
    assert len(shown["images"]) == 5
    for natural, width, opaque in shown["images"]:
        assert natural >= 800
        assert 300 < width < 390
        assert opaque == 255
    assert shown["overflow"] <= 0
    assert not shown["folded"]
    assert "closes 83% [" in shown["text"]
    assert "+50.0 [+17.1,\u00a0+82.9]" in shown["text"]
    assert NASTY[0] in shown["text"]
    assert "# " not in shown["text"]
    assert set(asked) <= {"/frame.html", "/report.html", "/favicon.ico"}


# --- experiment=compare ------------------------------------------------------------------


@pytest.mark.slow
def test_compare_is_every_mode_with_three_seeds_and_two_partitionings():
    conf = str(utils.PROJECT / "conf")
    with hydra.initialize_config_dir(conf, version_base="1.3"):
        cfg = hydra.compose("config", ["experiment=compare"], return_hydra_config=True)
    assert cfg.hydra.mode.name == "MULTIRUN"
    assert get_class(cfg.hydra.callbacks.report._target_) is report.Report
    sweeps = [f"{key}={values}" for key, values in cfg.hydra.sweeper.params.items()]
    parsed = OverridesParser.create().parse_overrides(sweeps)
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    assert len(jobs) == len(set(map(tuple, jobs))) == 18
    for job in jobs[::9]:
        one = compose(" ".join(["experiment=compare", *job]))
        assert one.num_clients == 16
    lines = (utils.PROJECT / one.dataset.path).read_text().splitlines()
    assert len({json.loads(line)[one.dataset.label] for line in lines}) == 16


def run_compare(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    sweep = ["experiment=compare", "partitioner=dirichlet", "seed=0"]
    command = [
        sys.executable,
        "main.py",
        *sweep,
        f"hydra.sweep.dir={folder}",
        "+simulation.init_args.num_cpus=1",  # one worker has the libraries to load
        *overrides,
    ]
    return subprocess.run(
        command,
        cwd=utils.PROJECT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_compare_runs_and_reports(tmp_path):
    short = "num_clients=2 num_rounds=2 strategy.fraction_fit=1 evaluate.every_round=1"
    short += " train.training_arguments.max_steps=1 evaluate.max_new_tokens=2"
    lines = (utils.PROJECT / "assets/tiny_qa/test.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:12]))
    short += f" dataset.test_path={tmp_path / 'test.jsonl'}"
    done = run_compare(tmp_path, *short.split())
    assert done.returncode == 0, done.stderr
    assert f"Report: {tmp_path}/report/report.html" in done.stdout
    ((title, section),) = of(tmp_path).items()
    assert title == ""
    for row in scores.ROWS:
        assert section.scores["test_loss"][row].keys() == {0}
    for mode in scores.MODES:
        assert section.clients("eval_loss", mode)[0].keys() == {0, 1}
    assert section.clients("exact_match", "local")[0].keys() == {0, 1}
    text = (tmp_path / "report/report.md").read_text()
    assert "missing" not in text
    assert "| question | expected | base | local | federated | centralised |" in text
    assert text.count(".png)") == 3


@pytest.mark.slow
def test_compare_says_when_all_failed(tmp_path):
    done = run_compare(tmp_path, "model.name=nowhere/at-all")
    assert done.returncode == 1
    assert done.stdout.count("No report:") == 3
