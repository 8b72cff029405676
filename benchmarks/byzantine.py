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
import random
import sys
import tempfile
from collections.abc import Callable
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

import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

import app
import utils
from main import simulate
from methods import wire
from server import exchange
from server.rounds import Stopped
from settings.compose import compose
from settings.preflight import check

# Beside the figures of every client the server writes this one down.
exchange.FIGURES["train"]["update_norm"] = exchange.Figure(float, high=1e9)
NUM_MALICIOUS = 4
SETTINGS = "experiment=quickstart seed=0 strategy.fraction_fit=1"
# A mean of twenty bears larger steps on smaller batches than the quickstart's mean of two,
# and needs fewer rounds.
LARGE = (
    "train.learning_rate_max=1e-2 "
    "train.training_arguments.per_device_train_batch_size=4"
)
STRATEGIES = {
    "fedavg": f"num_rounds=10 {LARGE}",
    # About what an honest update measures halfway through the run.
    "fedavg, clip_norm": f"strategy.clip_norm=10 num_rounds=10 {LARGE}",
    "fedmedian": f"strategy=fedmedian num_rounds=10 {LARGE}",
    # What it trims on the side of the honest slows it down under an attack.
    "fedtrimmedavg": f"strategy=fedtrimmedavg strategy.beta=0.2 num_rounds=15 {LARGE}",
    # It takes one client's adapter and no mean, so it needs the quickstart's own steps.
    "krum": f"strategy=krum strategy.num_malicious_nodes={NUM_MALICIOUS}",
    "bulyan": f"strategy=bulyan strategy.num_malicious_nodes={NUM_MALICIOUS} "
    f"num_rounds=10 {LARGE}",
}
# What is sent for a tensor of an honest update.
Attack = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "scaled": lambda honest, generator: 50 * honest,
    "sign-flipped": lambda honest, generator: -10 * honest,
    "random": lambda honest, generator: torch.randn(honest.shape, generator=generator),
}


def malicious(cfg: dict[str, Any]) -> set[int]:
    """The partitions of the clients that attack."""
    everyone = range(cfg["num_clients"])
    return set(random.Random(cfg["seed"]).sample(everyone, NUM_MALICIOUS))


def byzantine(
    honest: ClientApp, cfg: dict[str, Any], attack: Attack | None
) -> ClientApp:
    """The app `honest`, but its malicious clients forge the updates that they send.

    Every client tells the norm of the update that it has made, forged or not.
    """
    forgers = malicious(cfg) if attack else set()
    client_app = ClientApp()
    client_app.query()(honest)
    client_app.evaluate()(honest)

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        if reply.has_error():
            return reply
        config = message.content["config"]
        update = wire.unpack(reply.content["arrays"].to_torch_state_dict())
        squares = sum(tensor.square().sum() for tensor in update.values())
        reply.content["metrics"]["update_norm"] = squares.sqrt().item()
        if config["partition"] in forgers:
            parts = cfg["seed"], config["partition"], config["server-round"]
            generator = torch.Generator().manual_seed(utils.mix_seed(*parts))
            forged = {k: attack(v, generator) for k, v in update.items()}
            packed, _ = wire.pack(forged, cfg["comm"]["dtype"])
            reply.content["arrays"] = ArrayRecord(packed)
        return reply

    return client_app


def run(overrides: str, attack: Attack | None) -> dict[str, Any]:
    """One run of the app: its exact match, and the updates' median norm in each round."""
    cfg = check(compose(overrides))
    make_client_app = app.make_client_app

    def make(cfg: dict[str, Any], folder: Path) -> ClientApp:
        return byzantine(make_client_app(cfg, folder), cfg, attack)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with mock.patch.object(app, "make_client_app", make):
            simulate(cfg, folder)
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
                try:
                    done[key] = run(overrides, ATTACKS[attack])
                except Stopped:
                    sys.exit(utils.INTERRUPTED)
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
