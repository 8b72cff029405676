"""What each method of federated learning costs and gives, side by side."""

import math
from pathlib import Path
from statistics import fmean

from pandas import DataFrame

from reporting.figures import figure
from reporting.runs import Run, Section
from reporting.scores import Estimate, lower_is_better, scale, show
from reporting.tables import by_client
from utils import table


def rows(section: Section) -> list[str]:
    """The methods of a section, in the order in which they were run."""
    return [*dict.fromkeys(map(section.row, section.runs))]


def costs(section: Section) -> DataFrame:
    """By method what a run takes, on the mean over seeds."""
    frame = DataFrame(
        {
            "method": section.row(run),
            "aggregation error": aggregation_error(run),
            "MB down": run.summary["bytes_down"] / 1e6,
            "MB up": run.summary["bytes_up"] / 1e6,
            "seconds": run.summary["seconds"],
        }
        for run in section.runs
    )
    return frame.groupby("method", sort=False).mean()


def aggregation_error(run: Run) -> float:
    """The mean over the rounds in which it is known; NaN where it never is."""
    each = [entry.get("aggregation_error") for entry in run.rounds]
    known = [error for error in each if error is not None]
    return fmean(known) if known else math.nan


def method_table(section: Section) -> str:
    """Scores, each with its interval and its difference to the first method, and costs."""
    name, taken = section.headline, costs(section)
    first, *_ = methods = rows(section)
    title = f"{section.named(name)} ({section.basis(name)})" if name else "score"
    header = ["method", title, f"less {first}"]
    header += [section.named("eval_loss"), f"own loss below {first}'s", *taken]
    body = []
    for method in methods:
        error, *spent = taken.loc[method]
        less = section.less(name, method, first) if method != first and name else None
        cells = [
            show(name, section.score(name, method)) if name else "-",
            show(name, less, sign="+") if name else "-",
            show("eval_loss", section.score("eval_loss", method)),
            "-" if method == first else wins(section, method, first),
            "-" if math.isnan(error) else f"{error:.2g}",
            *(f"{value:,.1f}" for value in spent),
        ]
        # A narrow page breaks a line before an interval, not in it.
        body.append([method, *(cell.replace(", ", ",\u00a0") for cell in cells)])
    return table(header, body)


def wins(section: Section, one: str, other: str) -> str:
    """In how many cases (each client with each seed) its own loss is lower with `one`."""
    theirs = section.clients("eval_loss", other, few=False)
    pairs = [
        (loss, theirs[seed][client])
        for seed, losses in section.clients("eval_loss", one, few=False).items()
        for client, loss in losses.items()
        if client in theirs.get(seed, {})
    ]
    return f"{sum(a < b for a, b in pairs)} of {len(pairs)}" if pairs else "-"


def answer(section: Section) -> str:
    """Which method scores best, which are not told apart from it, and the cheapest of them."""
    name = section.headline
    known = {
        m: found for m in rows(section) if (found := section.score(name, m)) is not None
    }
    if not known:
        return "There is no score, so nothing can be compared."
    sign = -1 if lower_is_better(name) else 1
    best = max(known, key=lambda method: sign * known[method].value)
    percent, points = (" %", " points") if scale(name) == 100 else ("", "")
    score = section.named(name).removesuffix(", %")
    text = f"{best} has the best {score}: {show(name, known[best])}{percent}."
    gaps = {m: section.less(name, best, m) for m in known if m != best}
    alike = [m for m, gap in gaps.items() if gap is None or not gap.apart()]
    if alike:
        text += f" Not told apart from it: {', '.join(alike)}."
    spent = costs(section)
    total = (spent["MB down"] + spent["MB up"])[[*known]]
    cheapest, least = total[[best, *alike]].idxmin(), total.idxmin()
    whom = "these" if alike else "those that are as good"
    text += f" Of {whom}, {cheapest} sends least: {total[cheapest]:,.1f} MB a run."
    if least != cheapest:
        behind = Estimate(abs(known[best].value - known[least].value))
        text += f" {least} sends {total[least]:,.1f} MB, and is {show(name, behind)}"
        text += f"{points} behind the best."
    return text


def client_table(section: Section) -> str:
    """Every client's loss on the records that it holds back, with every seed and method."""
    cells = [
        (seed, client, method, show("eval_loss", Estimate(loss)))
        for method in rows(section)
        for seed, losses in section.clients("eval_loss", method).items()
        for client, loss in losses.items()
    ]
    if not cells:
        return "No client measured on records of its own."
    return by_client(cells)


def draw_costs(parts: list[Section], name: str, path: Path) -> None:
    """A point for each method: quality, with its interval, over the bytes of a run."""
    more = {"sharey": True}
    with figure(path, 1, len(parts), 4.6, **more) as panels:
        for axes, section in zip(panels, parts, strict=True):
            spent = costs(section)
            for method in rows(section):
                if not (found := section.score(name, method)):
                    continue
                value, low, high = found.times(scale(name))
                total = spent.loc[method, ["MB down", "MB up"]].sum()
                error = [[value - low], [high - value]] if found.known else None
                style = {"ls": "", "capsize": 4, "markersize": 7, "label": method}
                axes.errorbar(total, value, yerr=error, **style)
            axes.set_xscale("log")
            axes.set_xlabel("MB a run, both ways")
            axes.set_title(section.title or "all runs", fontsize="medium")
        panels[0].set_ylabel(
            parts[0].named(name) + " (lower is better)" * lower_is_better(name)
        )
        named = dict(
            pair[::-1]
            for axes in panels
            for pair in zip(*axes.get_legend_handles_labels(), strict=True)
        )
        style = {"loc": "outside upper center", "ncols": 4}
        panels[0].figure.legend(named.values(), named.keys(), **style)
