"""What malicious clients cost the quickstart, by attack and strategy.

    python benchmarks/byzantine.py --out byzantine.json
    python benchmarks/byzantine.py --attacks none random --strategies fedavg krum

Four of the twenty clients train as the others do, and then forge the update that they send:

- scaled: 50 times their own (model replacement, Bagdasaryan et al. 2020, arXiv 1807.00459)
- sign-flipped: -10 times their own (Li et al. 2019, arXiv 1811.03761, with another factor)
- random: Gaussian noise of standard deviation 1 (Blanchard et al. 2017, arXiv 1703.02757)

All of it is finite and of the right shape, so it passes the server's checks. Everybody takes
part in every round: a robust strategy has to outnumber the malicious in each. Prints a Markdown
table of the exact match on the held-out questions, and the L2 norms of the honest updates, by
which `strategy.clip_norm` is chosen. With `--out`, cells that are done are not run again.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Read when the libraries are imported.
os.environ["FLWR_LOG_LEVEL"] = "CRITICAL"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from flwr.clientapp import ClientApp

import app
import utils
from assets.testbed.attacks import ATTACKS, SETTINGS, STRATEGIES, Attack, byzantine
from main import simulate
from settings.compose import compose
from settings.preflight import check


def run(overrides: str, attack: Attack | None) -> dict[str, Any]:
    """One run of the app: its exact match, and the updates' median norm in each round."""
    cfg = check(compose(overrides))
    make_client_app = app.make_client_app

    def make(cfg: dict[str, Any], folder: Path) -> ClientApp:
        return byzantine(make_client_app(cfg, folder), cfg, attack)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with mock.patch.object(app, "make_client_app", make):
            simulate(cfg, folder, [])
        rounds = json.loads((folder / "history.json").read_text())["rounds"]
        summary = json.loads((folder / "summary.json").read_text())
    if failures := rounds[0]["failures"]:
        sys.exit(f"The server refused what it should have taken: {failures}")
    norms = [[client["update_norm"] for client in entry["clients"]] for entry in rounds]
    return {
        "exact_match": summary["exact_match_after"],
        "update_norms": [median(values) for values in norms],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=[*ATTACKS])
    parser.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=[*STRATEGIES]
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("overrides", nargs="*", help="more overrides for the app")
    options = parser.parse_args()
    utils.quiet()
    done = {}
    if options.out and options.out.exists():
        done = json.loads(options.out.read_text())
    settings = {
        name: " ".join([SETTINGS, STRATEGIES[name], *options.overrides])
        for name in options.strategies
    }
    cells = {}
    for attack in options.attacks:
        for name, overrides in settings.items():
            key = f"{attack}: {overrides}"
            if key not in done:
                print(f"\n{name}, {attack}", flush=True)
                done[key] = run(overrides, ATTACKS[attack])
                if options.out:
                    utils.write_json(options.out, done)
            cells[name, attack] = done[key]
    show(cells, settings)


def show(
    cells: dict[tuple[str, str], dict[str, Any]], settings: dict[str, str]
) -> None:
    """Print the table, with what a strategy loses at most to FedAvg without attack."""
    attacks = [*dict.fromkeys(attack for _, attack in cells)]
    header = ["strategy", *attacks, "cost at most, points"]
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    best = cells.get(("fedavg", "none"))
    for name in settings:
        scores = [cells[name, attack]["exact_match"] for attack in attacks]
        cost = f"{100 * (best['exact_match'] - min(scores)):.1f}" if best else ""
        print(f"| {name} | {' | '.join(f'{s:.1%}' for s in scores)} | {cost} |")
    print("\nSettings:")
    for name, overrides in settings.items():
        print(f"- {name}: {overrides}")
    if best:
        norms = " ".join(f"{norm:.2g}" for norm in best["update_norms"])
        print(f"\nMedian L2 norm of FedAvg's updates without attack, by round: {norms}")


if __name__ == "__main__":
    main()
