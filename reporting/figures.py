"""The pictures of a run: losses over rounds, and those of a sweep."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils import writing

# Told apart by the colour-blind (Okabe and Ito 2008); their black is for axes.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442")

GREY = "#7f7f7f"

LEGEND = 24  # runs that a sweep's legend names


def smooth(values: list[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average whose early values are not drawn to zero.

    The same formula as TensorBoard's smoothing slider.
    """
    smoothed, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


@contextmanager
def figure(
    path: Path, rows: int = 1, columns: int = 1, height: float = 4.2, **more: Any
) -> Iterator[list[Any]]:
    """The axes of a new figure, 8 inches wide, which is then saved as a PNG.

    Text is text, whatever it holds; letters are 12 pixels high where it is 800 wide.
    """
    import matplotlib

    matplotlib.use("Agg")
    from cycler import cycler
    from matplotlib import pyplot

    lines = cycler(linestyle=["-", "--", ":", "-."], marker=["o", "s", "^", "D"])
    lines *= cycler(color=COLOURS[:6])
    style = {"text.parse_math": False, "axes.grid": True, "axes.grid.axis": "y"}
    style |= {"grid.alpha": 0.3, "axes.axisbelow": True, "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    style |= {"axes.prop_cycle": lines, "font.size": 9.5, "lines.markersize": 5}
    with pyplot.rc_context(style):
        drawn, axes = pyplot.subplots(
            rows,
            columns,
            figsize=(8, height),
            layout="constrained",
            squeeze=False,
            **more,
        )
        yield list(axes.flat)
        for axis in [axis for each in axes.flat for axis in (each.xaxis, each.yaxis)]:
            if axis.get_scale() == "log":
                # Its own labels are mathematics, and would be shown as they are written.
                count_tens(axis)
        with writing(path):
            drawn.savefig(path, dpi=120)
        pyplot.close(drawn)


def draw_over_rounds(axes: Any, curve: dict[int, float], **style: Any) -> Any:
    """Draw values by their rounds, as points too where they are few; returns the line."""
    few = {} if len(curve) <= 30 else {"marker": ""}
    (line,) = axes.plot(list(curve), list(curve.values()), **few | style)
    return line


def count_rounds(axes: Any) -> None:
    """Let the axes of what is drawn over rounds count whole ones."""
    axes.set_xlabel("round")
    axes.xaxis.get_major_locator().set_params(integer=True)
    first, last = axes.dataLim.intervalx
    if first == last:  # matplotlib would count in fractions
        axes.set_xticks([first])


def count_tens(axis: Any) -> None:
    """Let a logarithmic axis say 1, 2 and 5 of each power of ten, in plain figures."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def plot_run(history: dict[str, Any], title: str, per: str, path: Path) -> None:
    """Draw the losses of one run over its rounds, into a PNG.

    `history`: of `history.json`; `per`: what its losses are means over. Training, the test
    questions, and what clients hold back of their own; as far as they were measured, the last two of the base as well, as round 0.
    """
    rounds = history["rounds"]
    entries = [history["before"], *rounds] if history.get("before") else rounds
    own = [e["eval_clients"] for e in entries if e.get("eval_clients")]
    held = [client["num-examples"] for client in own[-1]] if own else []
    names = {
        "train_loss": "training, mean of the round's clients",
        "test_loss": "test questions",
        "eval_loss": f"held back by the clients: {sum(held):g} records",
    }
    with figure(path) as (axes,):
        each = [
            (e["round"], client["train_loss"])
            for e in rounds
            for client in e.get("clients", [])
        ]
        if len(each) > len(rounds):  # who was asked moves the mean as well
            style = {
                "color": COLOURS[0],
                "alpha": 0.3,
                "label": "training, each client",
            }
            axes.plot(*zip(*each, strict=True), ".", **style)
        for (name, label), colour in zip(names.items(), COLOURS, strict=False):
            curve = {e["round"]: e[name] for e in entries if name in e}
            if curve:
                draw_over_rounds(axes, curve, color=colour, label=label)
        count_rounds(axes)
        axes.set_ylabel(f"loss, nats per {per}")
        axes.set_title(title, loc="left", fontsize="medium", wrap=True)
        if axes.lines:
            axes.legend()


def plot_search(
    points: list[tuple[dict[str, Any], float, str]],
    metric: str,
    searched: dict[str, bool],
    path: Path,
) -> None:
    """Draw what the trials of a search came to over each of the settings that were searched.

    `points`: of each trial its settings, its metric and what became of it; `searched`: the
    settings by their keys, and whether their axis is logarithmic.
    """
    styles = {  # from the back to the front
        "running": ("goes on", {"marker": ".", "color": GREY}),
        "fail": ("failed later", {"marker": "x", "color": COLOURS[3]}),
        "pruned": (
            "pruned before its last round",
            {"marker": "o", "color": GREY, "mfc": "none"},
        ),
        "complete": ("complete", {"marker": "o", "color": COLOURS[0]}),
        "best": ("best", {"marker": "*", "color": COLOURS[1], "markersize": 14}),
    }
    values = [value for _, value, _ in points]
    rows = len(searched)
    with figure(path, rows=rows, height=0.8 + 3.4 * rows) as each:
        for axes, (key, log) in zip(each, searched.items(), strict=True):
            for state, (label, style) in styles.items():
                drawn = [(s[key], value) for s, value, what in points if what == state]
                if drawn:
                    label = f"{label} ({len(drawn)})" if state != "best" else label
                    axes.plot(*zip(*drawn, strict=True), ls="", label=label, **style)
            if log:
                axes.set_xscale("log")
            if 0 < 10 * min(values) < max(values):  # else the best would all look alike
                axes.set_yscale("log")
            axes.set_xlabel(key)
            axes.set_ylabel(metric)
        each[0].legend()


def plot_sweep(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Draw the smoothed training loss of several runs, by round, and the values in pale."""
    columns = 1 if max(map(len, curves)) > 40 else 2 if len(curves) < 9 else 3
    height = 4 + 0.2 * min(len(curves), LEGEND) / columns
    with figure(path, height=height) as (axes,):
        for place, (name, losses) in enumerate(curves.items()):
            smoothed = dict(zip(losses, smooth(list(losses.values())), strict=True))
            label = name if place < LEGEND else None
            line = draw_over_rounds(axes, smoothed, label=label)
            style = {"ls": "-", "alpha": 0.2, "marker": ""}
            draw_over_rounds(axes, losses, color=line.get_color(), **style)
        count_rounds(axes)
        axes.set_ylabel("loss, nats")
        axes.set_title(
            "training, smoothed; in pale as it was", loc="left", fontsize="medium"
        )
        more = len(curves) - LEGEND
        axes.figure.legend(
            loc="outside lower center",
            ncols=columns,
            title=f"and {more} more, in losses.md" if more > 0 else None,
        )
