"""How unequal the clients are: how much they hold, of what, how long; and a plot of it."""

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.naming import camelcase_to_snakecase

import dataset
import model
import tasks
from reporting.figures import COLOURS, GREY, figure
from utils import Settings, UserError, local_path

# Records that are tokenised to tell their lengths: of a client, and of all of them, at most.
SAMPLE = 200

SAMPLE_OF_ALL = 2_000

UNCUT = sys.maxsize

HATCHES = (
    None,
    "///",
)  # with `utils.COLOURS`, the categories that the plot tells apart

NAMED = 40  # clients at most that are named one by one


def describe(cfg: Settings) -> dict[str, Any]:
    """What each client holds and how far apart they are, in plain values (for JSON).

    `category`: the column whose values are counted. `sampled`: how many records of a client
    were tokenised, at most. `clients`, by partition: `records`, `categories` (records by
    value) and `tokens`, the 10th, 50th and 90th percentile of its examples' lengths (prompt
    and answer, before `train.seq_length` cuts them). `summary`: `records` (smallest,
    median, largest client) and their `gini`; `mix_distance`, and `mix_by_chance`, the same
    for these records dealt out at random to the same sizes; `median_tokens` and
    `p90_tokens` (lowest and highest client). None where there is no such column, or no
    tokenizer.

    Raises `UserError` where the data is not on this machine (nothing is downloaded), or
    cannot be dealt out like this.
    """
    settings = cfg.dataset
    if not (settings.path or _is_here(str(settings.name))):
        raise UserError(f"{settings.name} has not been downloaded to this machine.")
    dataset.check(cfg)
    parts = [dataset.load_partition(cfg, i) for i in range(cfg.num_clients)]
    column = _category(cfg, parts[0].column_names)
    mixes = [Counter(map(str, part[column])) if column else None for part in parts]
    sampled = min(SAMPLE, max(1, SAMPLE_OF_ALL // len(parts)))
    tokenizer = _tokenizer(cfg.model)
    lengths = [
        _lengths(cfg, part, tokenizer, sampled) if tokenizer else None for part in parts
    ]
    sizes = np.array([len(part) for part in parts])
    known = [tokens for tokens in lengths if tokens]
    summary = {
        "records": [int(sizes.min()), float(np.median(sizes)), int(sizes.max())],
        "gini": gini(sizes),
        "mix_distance": None,
        "mix_by_chance": None,
        "median_tokens": _range(median for _, median, _ in known),
        "p90_tokens": _range(high for _, _, high in known),
    }
    if column:
        names = sorted(set().union(*mixes))
        counts = np.array([[mix[name] for name in names] for mix in mixes])
        summary["mix_distance"] = mix_distance(counts)
        summary["mix_by_chance"] = mix_distance(deal_anew(counts, cfg.seed))
    clients = [
        {"records": len(part), "categories": mix and dict(mix), "tokens": tokens}
        for part, mix, tokens in zip(parts, mixes, lengths, strict=True)
    ]
    return {
        "category": column,
        "sampled": sampled,
        "clients": clients,
        "summary": summary,
    }


def gini(sizes: np.ndarray) -> float:
    """The Gini coefficient: 0 where all have the same, towards 1 where one has all.

    Half the mean absolute difference between two of them, over the mean.
    """
    ranks = 2 * np.arange(1, len(sizes) + 1) - len(sizes) - 1
    return float((ranks * np.sort(sizes)).sum() / (len(sizes) * sizes.sum()))


def mix_distance(counts: np.ndarray) -> float:
    """The clients' mean total variation distance from the mix of all records together.

    `counts`: records, (clients, categories). The share of a client's records that would
    have to be of another category: 0 where all have the same mix, towards 1 where each has
    categories of its own. Half the earth mover's distance of Zhao et al. (arXiv 1806.00582).
    """
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    pooled = counts.sum(axis=0) / counts.sum()
    return float(np.abs(shares - pooled).sum(axis=1).mean() / 2)


def deal_anew(counts: np.ndarray, seed: int) -> np.ndarray:
    """The same records, dealt out at random to clients of the same sizes.

    `counts` and what is returned: records, (clients, categories).
    """
    clients, categories = counts.shape
    owners = np.repeat(np.arange(clients), counts.sum(axis=1))
    labels = np.repeat(np.arange(categories), counts.sum(axis=0))
    dealt = np.zeros_like(counts)
    np.add.at(dealt, (owners, np.random.default_rng(seed).permutation(labels)), 1)
    return dealt


def _is_here(name: str) -> bool:
    """Whether a dataset of the hub is in the cache, or a local folder."""
    owner, _, own = name.rpartition("/")
    folder = "___".join(filter(None, (owner, camelcase_to_snakecase(own))))
    cached = Path(datasets.config.HF_DATASETS_CACHE) / folder
    return cached.is_dir() or local_path(name) is not None


def _category(cfg: Settings, columns: list[str]) -> str | None:
    """The column that tells what a record is about: first, what clients are dealt by."""
    dealt_by = cfg.partitioner.get("partition_by")
    known = (name for name in ("cluster", dealt_by, cfg.dataset.label))
    return next((name for name in known if name in columns), None)


def _tokenizer(settings: dict[str, Any]) -> Any:
    """The base's tokenizer, or None: a plan needs no more than the base's configuration."""
    try:
        return model.load_tokenizer(settings.name, settings.use_fast_tokenizer)
    except (OSError, ValueError):
        return None


def _lengths(
    cfg: Settings, rows: datasets.Dataset, tokenizer: Any, count: int
) -> list[float] | None:
    """Percentiles of the lengths of `count` examples; None where none can be trained on."""
    columns = cfg.dataset.columns
    task = tasks.build(cfg | {"train": cfg.train | {"seq_length": UNCUT}})
    drawn = np.random.default_rng(cfg.seed).permutation(len(rows))[:count]
    examples = (
        task.encode(dataset.to_record(row, columns), tokenizer)
        for row in rows.select(drawn)
    )
    lengths = [task.length(example) for example in examples if example]
    return np.percentile(lengths, (10, 50, 90)).tolist() if lengths else None


def _range(values: Iterable[float]) -> list[float] | None:
    ordered = sorted(values)
    return [ordered[0], ordered[-1]] if ordered else None


# --- the plot -----------------------------------------------------------------------------


def plot(data: dict[str, Any], path: Path) -> None:
    """Draw what `describe` returns into a PNG, the clients side by side, smallest first.

    One panel each for records, mix of categories and lengths, where they are known. Where
    each client has records of one category alone, that is its name, in the place of the mix.
    """
    order = sorted(enumerate(data["clients"]), key=lambda item: item[1]["records"])
    clients = [client for _, client in order]
    named = order if len(order) <= NAMED else []
    pure = data["category"] and all(len(c["categories"]) == 1 for c in clients)
    panels = [(_draw_records, 2)]
    if data["category"] and not (pure and named):
        panels.append((_draw_mix, 3))
    if data["summary"]["median_tokens"]:
        panels.append((_draw_lengths, 2))
    heights = [height for _, height in panels]
    shape = {"height_ratios": heights, "sharex": True}
    with figure(path, len(panels), height=1 + sum(heights), **shape) as column:
        for (draw, _), axes in zip(panels, column, strict=True):
            draw(axes, clients, data)
        axes.set_xlim(-0.5, len(clients) - 0.5)
        labels = [str(number) for number, _ in named]
        if pure and named:
            axes.set_xlabel(f"client: its {data['category']}; by number of records")
            names = [next(iter(client["categories"])) for client in clients]
            labels = [
                f"{label}: {name[:24]}"
                for label, name in zip(labels, names, strict=True)
            ]
            style = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
        else:
            axes.set_xlabel(f"{len(clients)} clients, by number of records")
            style = {"fontsize": "small"} if len(named) > 20 else {}
        axes.set_xticks(range(len(named)), labels, **style)


def _draw_records(axes: Any, clients: list[dict[str, Any]], data: Any) -> None:
    sizes = np.array([client["records"] for client in clients])
    _stack(axes, np.zeros(len(sizes)), sizes, color=GREY)
    axes.set_ylabel("records")
    if len(sizes) <= NAMED:  # a bar of two beside one of a thousand cannot be seen
        style = {"ha": "center", "va": "bottom"}
        style |= {"fontsize": "small", "rotation": 90 if len(sizes) > 20 else 0}
        for place, size in enumerate(sizes):
            axes.text(place, size, f"{size}", **style)
        axes.margins(y=0.2)
        axes.set_ylim(bottom=0)


def _draw_mix(axes: Any, clients: list[dict[str, Any]], data: dict[str, Any]) -> None:
    total: Counter[str] = Counter()
    for client in clients:
        total.update(client["categories"])
    looks = [(colour, hatch) for hatch in HATCHES for colour in COLOURS]
    shown = [name for name, _ in total.most_common()]
    if len(shown) > len(looks):
        shown = shown[: len(looks)]
    sizes = np.array([max(1, client["records"]) for client in clients])
    bottom = np.zeros(len(clients))
    for name, (colour, hatch) in zip(shown, looks, strict=False):
        held = np.array([client["categories"].get(name, 0) for client in clients])
        style = {"facecolor": colour, "hatch": hatch, "edgecolor": "white", "lw": 0}
        _stack(axes, bottom, bottom + held / sizes, label=name[:32], **style)
        bottom = bottom + held / sizes
    if rest := len(total) - len(shown):
        _stack(axes, bottom, np.ones(len(clients)), color="0.85", label=f"{rest} more")
    axes.set_ylim(0, 1)
    axes.set_ylabel(f"share by {data['category']}")
    # Upside down, as the bars are stacked.
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, reverse=True)


def _draw_lengths(axes: Any, clients: list[dict[str, Any]], data: Any) -> None:
    known = [(i, c["tokens"]) for i, c in enumerate(clients) if c["tokens"]]
    places = [place for place, _ in known]
    low, median, high = zip(*(tokens for _, tokens in known), strict=True)
    axes.vlines(places, low, high, color=GREY)
    axes.plot(places, median, "o", markersize=4, color=COLOURS[0])
    axes.set_ylim(0, 1.1 * max(high))
    axes.set_ylabel("tokens an example\n(10th, 50th, 90th percentile)")


def _stack(axes: Any, bottom: np.ndarray, top: np.ndarray, **style: Any) -> None:
    """Bars from `bottom` to `top`, as one shape: there may be thousands."""
    edges = np.arange(len(top) + 1) - 0.5
    axes.stairs(top, edges, baseline=bottom, fill=True, **style)
    if len(top) <= 100:  # white lines between them
        axes.vlines(
            edges, bottom.min(), top.max(), color="w", linewidth=40 / len(edges)
        )
