"""Exact match over the bytes that travel, by the way in which the adapter does.

    python benchmarks/bytes.py --seeds 0 1 2 --out bytes/
    python benchmarks/bytes.py --ways int8 "int8, zlib" --seeds 0 --out bytes/

The quickstart in batches of 4, with 4 clients, 2 of them in each of 10 rounds: each is asked five
times, so what was left out of an update has its turn. Prints a Markdown table: the exact match of the last
adapter on the 335 test questions, and the bytes of all arrays in all rounds, as `summary.json`
counts them (the first adapter, which is the same for all, comes on top). With `--out`, runs that
are done are not run again, and `bytes.png` in there shows one over the other.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from assets.testbed.runs import run
from reporting.figures import figure

SETTINGS = (
    "experiment=quickstart num_clients=4 strategy.fraction_fit=0.5 num_rounds=10 "
    "train.training_arguments.per_device_train_batch_size=4"
)

# Linear adapters with the learning rates that conf/peft gives them.
WAYS = {
    "float32": "comm.dtype=float32",
    "float16": "comm.dtype=float16",
    "int8": "comm.dtype=int8",
    "float16, zlib": "comm.compress=zlib",
    "int8, zlib": "comm.dtype=int8 comm.compress=zlib",
    "top-k 10 %": "comm.top_k=0.1 comm.delta_down=true comm.compress=zlib",
    "top-k 1 %": "comm.top_k=0.01 comm.delta_down=true comm.compress=zlib",
    "top-k 10 % up": "comm.top_k=0.1 comm.dtype=int8 comm.compress=zlib",
    "ffa": "sharing=ffa",
    "fourierft": "peft=fourierft train.learning_rate_max=3e-2",
    "c3a": "peft=c3a train.learning_rate_max=1e-1",
    "miss": "peft=miss train.learning_rate_max=1e-3",
}

HEAD = (
    "way",
    "settings",
    "seeds",
    "exact match, %",
    "MB up",
    "MB down",
    "of float16's",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--out", type=Path, help="where the runs are kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = (options.out or Path(temporary)).resolve()
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in options.seeds:
            for number, way in enumerate(WAYS):
                if way not in options.ways:
                    continue
                words = f"{SETTINGS} {WAYS[way]} seed={seed}".split()
                summary = run(out / f"{number}-{seed}", *words)
                found.setdefault(way, []).append(summary)
        show(found)
        if options.out:
            draw(found, out / "bytes.png")


def megabytes(runs: list[dict[str, Any]], *ways: str) -> float:
    """The mean over the runs, in MB (10^6 bytes)."""
    return mean(sum(one[f"bytes_{way}"] for way in ways) for one in runs) / 1e6


def score(runs: list[dict[str, Any]]) -> float:
    return 100 * mean(one["exact_match_after"] for one in runs)


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
    whole = megabytes(found["float16"], "up", "down") if "float16" in found else None
    for way, runs in found.items():
        both = megabytes(runs, "up", "down")
        row = [
            *(way, f"`{WAYS[way]}`", f"{len(runs)}", f"{score(runs):.1f}"),
            *(f"{megabytes(runs, each):.2f}" for each in ("up", "down")),
            f"{both / whole:.2f}" if whole else "",
        ]
        print(f"| {' | '.join(row)} |", flush=True)


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The mean over the seeds, and the least and the most of them."""
    with figure(path) as [axes]:
        for way, runs in found.items():
            middle, each = score(runs), [score([one]) for one in runs]
            spread = [[middle - min(each)], [max(each) - middle]]
            x = [megabytes(runs, "up", "down")]
            axes.errorbar(x, [middle], yerr=spread, label=way, ls="")
        axes.set_xscale("log")
        axes.set_xlabel("MB both ways, all rounds")
        axes.set_ylabel("exact match, %")
        axes.figure.legend(loc="outside upper center", ncols=4)


if __name__ == "__main__":
    main()
