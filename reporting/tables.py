"""The tables of a report, in Markdown."""

import math
import shlex
import textwrap
from collections import Counter, defaultdict
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf
from pandas import DataFrame

from reporting.runs import Run, Section, varied_keys
from reporting.scores import MODES, ROWS, Estimate, show
from server.runs import trained_records
from utils import code, public, table

# The settings that matter, beside those that were varied.
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
    "strategy.sampling",
    "train.learning_rate_max",
    "train.seq_length",
    "train.training_arguments.max_steps",
    "train.training_arguments.per_device_train_batch_size",
    "comm.dtype",
)


def score_table(section: Section) -> str:
    body = []
    for name in section.scores:
        cells = [show(name, section.score(name, row)) for row in ROWS]
        for other in ("local", "centralized"):
            cells.append(show(name, section.less(name, "federated", other), sign="+"))
        # A narrow page breaks a line before an interval, not in it.
        cells = [cell.replace(", ", ",\u00a0") for cell in cells]
        body.append([f"{section.named(name)} ({section.basis(name)})", *cells])
    less = [f"federated less {MODES[mode]}" for mode in ("local", "centralized")]
    counts = ", ".join(
        f"{title} {len(section.of(mode))}" for mode, title in MODES.items()
    )
    return f"{table(['', *ROWS.values(), *less], body)}\n\nRuns: {counts}."


def cost_table(section: Section) -> str:
    first = "a run, on average"
    costs = DataFrame(
        {
            first: MODES[run.cfg.mode],
            "MB down": run.summary["bytes_down"] / 1e6,
            "MB up": run.summary["bytes_up"] / 1e6,
            "seconds": run.summary["seconds"],
            "examples trained on": examples(run),
            "epsilon": run.summary.get("epsilon", math.nan),
            "failed replies": run.summary["failures"],
            "aggregation error, %": aggregation_error(run),
        }
        for run in section.runs
    )
    means = costs.groupby(first).mean().dropna(axis=1, how="all")
    means = means.map(lambda mean: "-" if math.isnan(mean) else f"{mean:,.1f}")
    return of_frame(means.loc[[mode for mode in MODES.values() if mode in means.index]])


def examples(run: Run) -> float:
    """That all clients have trained on; NaN where no round tells it."""
    each = [client["num-examples"] for r in run.rounds for client in r["clients"]]
    return sum(each) if each else math.nan


def aggregation_error(run: Run) -> float:
    """The mean over the rounds, in per cent; NaN where no round tells it."""
    told = (entry.get("aggregation_error") for entry in run.rounds)
    known = [100 * error for error in told if error is not None]
    return fmean(known) if known else math.nan


def of_frame(frame: DataFrame) -> str:
    return table([frame.index.name, *frame], frame.reset_index().to_numpy())


def run_table(runs: list[Run], name: str | None) -> str:
    keys = varied_keys(runs)
    body = []
    for run in runs:
        value = run.score(name) if name else None
        shown = show(name, None if value is None else Estimate(value)) if name else ""
        settings = [public(run.overrides.get(key, "")) for key in keys]
        seconds = f"{run.summary['seconds']:.0f}"
        body.append([run.folder.name, *settings, seconds, shown])
    return table(
        ["run", *keys, "seconds", runs[0].named(name) if name else "score"], body
    )


def client_table(section: Section) -> str:
    """Every client with every seed: what the figure of the clients is drawn from."""
    held = {
        (run.cfg.seed, client): n
        for run in section.runs
        for client, n in run.held().items()
    }
    cells = [
        (
            seed,
            client,
            f"{MODES[mode]}: {section.named(name)}",
            show(name, Estimate(value)),
        )
        for name in {section.headline: None, "eval_loss": None}
        for mode in MODES
        for seed, scores in section.clients(name, mode).items()
        for client, value in scores.items()
    ]
    if not cells:
        return ""
    whom = {(seed, client): None for seed, client, *_ in cells}
    counts = [(*who, "records held back", str(held.get(who, "-"))) for who in whom]
    return by_client([*counts, *cells])


def by_client(cells: list[tuple[int, int, str, str]]) -> str:
    """A row for each seed and client, of (seed, client, column, what it shows)."""
    frame = DataFrame(cells, columns=["seed", "client", "column", "shown"])
    wide = frame.pivot(index=["seed", "client"], columns="column", values="shown")
    wide = wide[frame["column"].unique()].fillna("-")
    wide.index = [f"seed {seed}, client {client}" for seed, client in wide.index]
    return of_frame(wide.rename_axis(""))


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
    columns = ("expected", "base", *tuned)
    body = [
        [short(q), *(short(answers[q].get(column, "-")) for column in columns)]
        for q in spread(differ, 6) + spread(alike, 3)
    ]
    how = (
        f"Of {len(answers)} test questions with seed {seed}, {len(differ)} are answered "
        "rightly by some tuned adapters and not by others. Here are up to six of these, then "
        "up to three of the rest, evenly spaced in the order of the test file. Local is the "
        "client in the middle by loss."
    )
    header = ["question", "expected", "base", *(MODES[mode] for mode in tuned)]
    return f"{how}\n\n{table(header, body, numbers=False)}"


def spread(items: list[str], count: int) -> list[str]:
    """At most `count` of them, evenly spaced."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def short(text: str) -> str:
    return textwrap.shorten(text, 240, placeholder=" ...")


def commands(runs: list[Run]) -> str:
    """What to type for each run again, by itself."""
    lines = [
        shlex.join(["python", "main.py", *(public(f"{k}={v}") for k, v in each)])
        for each in (run.overrides.items() for run in runs)
    ]
    note = "Of paths outside of the project the last part is told."
    return f"{note}\n\n{code('bash', *lines)}"


def settings(runs: list[Run]) -> str:
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
    trained = dict.fromkeys(trained_records(run.cfg, run.rounds) for run in runs)
    body.append(
        ["records to train on", ", ".join(filter(None, trained)) or "not known"]
    )
    return table(["setting", "value"], body, numbers=False)


def made_with(about: dict[str, Any]) -> str:
    """A sweep's `environment.json`; without a command, what this report is made with."""
    title = "not known what it was made with; this report by"
    title = "made with" if "command" in about else title
    rows = [[key, public(str(value))] for key, value in about.items()]
    return table([title, ""], rows, numbers=False)
