"""Is a client's own adapter better than training alone, on the client's own records?

    python benchmarks/personal.py --seeds 0 1 2 --out personal/
    python benchmarks/personal.py --seeds 0 --mu 0.01 0.1 1 --out personal/   # choose mu

The natural partitions of `experiment=compare`: 16 clients of one kind of question each, 14
rounds of 10 steps. Each client trains alone (mode=local), and with `personal=ditto`, once with a
quarter of the clients in a round and once with all of them, where a client's own adapter has
as many steps as when it is alone. All losses are of the same records, which the client holds
back in either mode; that of `personal` is cross-validated over two halves of them. Prints
Markdown tables: over all clients the mean loss and in how many cases it is below that of the client alone, and the exact match of
the adapter that all share, which is the same without `personal=ditto`. With `--out`, runs that
are done are not run again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent

SETTINGS = ["experiment=compare", "hydra.mode=RUN", "partitioner=natural"]

LOSSES = ("global", "own", "personal")

ROW = "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |"


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """A run's summary and the last entry of its history."""
    if not (folder / "summary.json").exists():
        command = [sys.executable, "main.py", *SETTINGS, *overrides]
        done = subprocess.run(
            [*command, f"hydra.run.dir={folder}"],
            cwd=PROJECT,
            stdout=subprocess.DEVNULL,
        )
        if done.returncode:
            sys.exit(f"{' '.join(overrides)}: exit code {done.returncode}")
    history = json.loads((folder / "history.json").read_text())
    return json.loads((folder / "summary.json").read_text()) | history["rounds"][-1]


def compare(out: Path, seed: int, mu: float, fraction: float) -> list[Any]:
    """A row of the table, as far as it is of numbers."""
    alone = run(out / f"local-{seed}", "mode=local", f"seed={seed}")
    ditto = run(
        out / f"ditto-{mu}-{fraction}-{seed}",
        *("personal=ditto", f"personal.mu={mu}", f"seed={seed}"),
        f"strategy.fraction_fit={fraction}",
    )
    losses = {one["partition"]: one for one in alone["eval_clients"]}
    each = ditto["personal_clients"]
    for one in each:  # the same records
        assert one["num-examples"] == losses[one["partition"]]["num-examples"]
    below = [
        sum(
            one[f"eval_loss_{name}"] < losses[one["partition"]]["eval_loss"]
            for one in each
        )
        for name in LOSSES
    ]
    means = [alone["eval_loss"], *(ditto[f"eval_loss_{name}"] for name in LOSSES)]
    return [len(each), *means, *below, ditto["exact_match_after"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mu", type=float, nargs="+", default=[0.1])
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.25, 1.0])
    parser.add_argument("--out", type=Path, help="where the runs are kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = (options.out or Path(temporary)).resolve()
        head = "mu, clients a round, seed, alone, global, own, personal"
        below = [f"{name} below alone" for name in LOSSES]
        print(ROW.format(*head.split(", "), *below), "exact match |")
        print("|---" * 11 + "|")
        for mu in options.mu:
            for fraction in options.fractions:
                for seed in options.seeds:
                    count, *means, _, _, _, match = row = compare(
                        out, seed, mu, fraction
                    )
                    cells = [f"{loss:.3f}" for loss in means]
                    cells += [f"{cases} of {count}" for cases in row[5:8]]
                    print(
                        ROW.format(mu, f"{fraction:.0%}", seed, *cells),
                        f"{match:.1%} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
