"""What an SVD round and its aggregation error take of the server, at a 7B base's sizes.

    python benchmarks/svd.py                  one thread, and all
    python benchmarks/svd.py --layers 4       less of it, scaled up

32 layers, q and v of 4096 x 4096, rank 32, 10 clients, random factors. Memory: two adapters
for each client and the state, 67 MB each in float32.
"""

import argparse
import logging
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from methods import aggregate, lora
from methods.base import Contribution, State
from utils import table

SVD = {"_target_": "methods.aggregate.Svd"}
MEAN = {"_target_": "flwr.serverapp.strategy.FedAvg"}


def drawn(layers: list[lora.Layer], width: int, rank: int, size: float) -> State:
    return {
        name: size * torch.randn(shape)
        for layer in layers
        for name, shape in ((layer.a, (rank, width)), (layer.b, (width, rank)))
    }


def measure(
    node: dict, layers: list[lora.Layer], state: State, replies: list[Contribution]
) -> tuple[float, float, float | None]:
    """Seconds of the aggregation and of its error, and the error."""
    made = aggregate.build(node, layers)
    began = time.monotonic()
    made.begin(state, 1)
    for one in replies:
        made.add(one)
    new = made.apply(made.gathered())
    aggregated = time.monotonic()
    exact = lora.Exactness(layers)
    for one in replies:
        exact.add(one)
    error = exact.error(state, new)
    return aggregated - began, time.monotonic() - aggregated, error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=64, help="that are measured")
    parser.add_argument("--of", type=int, default=64, help="that there are")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count()])
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.manual_seed(0)
    layers = [
        lora.Layer(f"{i}.lora_A.w", f"{i}.lora_B.w", 64.0, 1.0)
        for i in range(given.layers)
    ]
    state = drawn(layers, given.width, given.rank, 0.02)
    replies = [
        Contribution(i, state, drawn(layers, given.width, given.rank, 0.002), 1, 1.0)
        for i in range(given.clients)
    ]
    body = []
    for threads in dict.fromkeys(given.threads):
        torch.set_num_threads(threads)
        for name, node in (("svd", SVD), ("fedavg", MEAN)):
            found = [measure(node, layers, state, replies) for _ in range(given.repeat)]
            cells = []
            for part in (0, 1):
                values = [one[part] * given.of / given.layers for one in found]
                low, high = min(values), max(values)
                cells.append(
                    f"{statistics.median(values):.1f} ({low:.1f} to {high:.1f})"
                )
            body.append([str(threads), name, *cells, f"{found[0][2]:.1%}"])
    print(
        f"{given.of} layers of {given.width} x {given.width} ({given.layers} measured), rank "
        f"{given.rank}, {given.clients} clients; median (least to most) of n = "
        f"{given.repeat}, seconds"
    )
    print(table(["threads", "strategy", "aggregation", "its error", "error"], body))


if __name__ == "__main__":
    main()
