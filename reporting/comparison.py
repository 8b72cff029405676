"""The figures of a report: methods, clients, and losses over the rounds."""

import textwrap
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from pandas import DataFrame

from reporting.figures import GREY, count_rounds, draw_over_rounds, figure
from reporting.runs import PerClient, Section
from reporting.scores import (
    MODES,
    ROWS,
    Estimate,
    count,
    lower_is_better,
    scale,
    show,
)

COLOURS = {
    "base": GREY,
    "local": "#e69f00",
    "federated": "#0072b2",
    "centralized": "#009e73",
}

MARKERS = {"base": "X", "local": "s", "federated": "o", "centralized": "D"}


def draw_methods(parts: list[Section], name: str, path: Path) -> None:
    """A point for each method and section, with its confidence interval."""
    with figure(path) as (axes,):
        for place, method in enumerate(COLOURS):
            label = ROWS[method]
            for x, section in enumerate(parts):
                if found := section.score(name, method):
                    value, low, high = found.times(scale(name))
                    at = x + (place - 1.5) * 0.22
                    style = {"color": COLOURS[method], "fmt": MARKERS[method]}
                    style |= {"capsize": 5, "markersize": 8, "label": label}
                    error = [[value - low], [high - value]] if found.known else None
                    axes.errorbar(at, value, yerr=error, **style)
                    text = show(name, Estimate(found.value))
                    axes.annotate(text, (at, value), (6, 6), textcoords="offset points")
                    label = None
        titles = []
        for part in parts:
            seeds = count(len({run.cfg.seed for run in part.runs}), "seed")
            lines = (textwrap.fill(part.title, 40), part.basis(name), seeds)
            titles.append("\n".join(filter(None, lines)))
        axes.set_xticks(range(len(parts)), titles)
        axes.set_xlim(-0.5, len(parts) - 0.5)
        axes.set_ylabel(
            parts[0].named(name) + " (lower is better)" * lower_is_better(name)
        )
        axes.margins(y=0.1)
        axes.figure.legend(loc="outside upper center", ncols=4)


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
                    value, low, high = found.times(scale(name))
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
            unit = section.named(name).replace(", on own", ",\non own")
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
    losses = DataFrame(
        {"mode": run.cfg.mode, "round": entry["round"]}
        | {name: entry[name] for name in titles if name in entry}
        for run in section.runs
        for entry in run.rounds
    )
    names = [name for name in titles if name in losses]
    with figure(path, 1, len(names), 3.6) as panels:
        for axes, name in zip(panels, names, strict=True):
            for mode, title in MODES.items():
                own = losses[losses["mode"] == mode].groupby("round")[name]
                curve = own.agg(["mean", "min", "max"]).dropna()
                if not curve.empty:
                    style = {"color": COLOURS[mode], "label": title, "ls": "-"}
                    few = {"marker": MARKERS[mode]} if len(curve) <= 30 else {}
                    draw_over_rounds(axes, curve["mean"].to_dict(), **style, **few)
                    style = {"color": COLOURS[mode], "alpha": 0.2, "lw": 0}
                    axes.fill_between(curve.index, curve["min"], curve["max"], **style)
            base = [b for run in section.runs if (b := run.before(name)) is not None]
            if base:
                style = {"color": GREY, "marker": MARKERS["base"], "ls": ""}
                axes.plot([0], [fmean(base)], label="base", **style)
                axes.axhline(fmean(base), color=GREY, ls=":", lw=1, marker="")
            count_rounds(axes)
            axes.set_title(titles[name], fontsize="medium")
        panels[0].set_ylabel(f"loss, nats per {section.runs[0].per}")
        named = {
            label: handle
            for axes in panels
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        legend = {"loc": "outside upper center", "ncols": 4}
        panels[0].figure.legend(named.values(), named.keys(), **legend)
