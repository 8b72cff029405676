"""Is a client's own adapter better than training alone, on the client's own records?

    python benchmarks/personal.py --seeds 0 1 2 --out personal/
    python benchmarks/personal.py --seeds 0 --mu 0.01 0.1 1 --out personal/   # choose mu
    python benchmarks/personal.py --mu --rounds 14 28 --fractions 1 --out personal/   # personal=finetune

The natural partitions of `experiment=compare`: 16 clients of one kind of question each, 14
rounds of 10 steps. Each client trains alone (mode=local), and with `personal=ditto`, once with a
quarter of the clients in a round and once with all of them, where a client's own adapter has
as many steps as when it is alone; or with `personal=finetune`, for `--rounds` after the last. All
losses are of the same records, which the client holds back in either mode; that of `personal` is
cross-validated (leave-one-out). Prints a Markdown table: of each seed the mean losses over the
clients, how many clients' losses are below what they have alone, and the exact match of the
adapter that all share, which is the same to the bit without `personal`. With `--out`, runs that
are done are not run again.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from assets.testbed.runs import run
from utils import read_json

SETTINGS = ["experiment=compare", "hydra.mode=RUN", "partitioner=natural"]

LOSSES = ("global", "own", "personal")

HEAD = [
    *("personal", "clients a round", "seed", "alone", *LOSSES),
    *(f"{name} below alone" for name in LOSSES),
    "exact match, %",
]


def measured(folder: Path, *overrides: str) -> dict[str, Any]:
    """A run's summary and the last entry of its history."""
    summary = run(folder, *SETTINGS, *overrides)
    return summary | read_json(folder / "history.json")["rounds"][-1]


def compare(
    out: Path, seed: int, way: tuple[str, str, float], fraction: float
) -> list[str]:
    """A row of the table, of a way to an own adapter: its name, and its one setting."""
    name, key, value = way
    # Each of its 16 adapters would be asked all test questions, which nobody reads here.
    unasked = ("evaluate.exact_match=false", "evaluate.every_round=14")
    alone = measured(out / f"local-{seed}", "mode=local", f"seed={seed}", *unasked)
    both = measured(
        out / f"{name}-{value:g}-{fraction:g}-{seed}",
        *(f"personal={name}", f"personal.{key}={value}", f"seed={seed}"),
        f"strategy.fraction_fit={fraction}",
    )
    pairs = [*zip(alone["eval_clients"], both["personal_clients"], strict=True)]
    for one, other in pairs:  # the same records
        for what in ("partition", "num-examples"):
            assert one[what] == other[what]
    below = [
        sum(other[f"eval_loss_{loss}"] < one["eval_loss"] for one, other in pairs)
        for loss in LOSSES
    ]
    means = [alone["eval_loss"], *(both[f"eval_loss_{loss}"] for loss in LOSSES)]
    return [
        *(f"{name}, {key} {value:g}", f"{fraction:.0%}", f"{seed}"),
        *(f"{loss:.3f}" for loss in means),
        *(f"{cases} of {len(pairs)}" for cases in below),
        f"{100 * both['exact_match_after']:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mu", type=float, nargs="*", default=[0.1], help="of Ditto")
    parser.add_argument(
        "--rounds", type=int, nargs="*", default=[], help="of fine-tuning"
    )
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.25, 1.0])
    parser.add_argument("--out", type=Path, help="where the runs are kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = (options.out or Path(temporary)).resolve()
        print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
        ways = [
            *(("ditto", "mu", mu) for mu in options.mu),
            *(("finetune", "rounds", count) for count in options.rounds),
        ]
        for way, fraction, seed in itertools.product(
            ways, options.fractions, options.seeds
        ):
            row = compare(out, seed, way, fraction)
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
