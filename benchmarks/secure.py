"""What secure aggregation costs each client and the server, in seconds and bytes.

    python benchmarks/secure.py                       a minute on one core
    python benchmarks/secure.py --values 10000000     an adapter of 10 million values

For each number of clients a whole sum is made in this process, once with everybody and once
with a quarter gone after they have shared their keys. A client's seconds are the median of
three clients', the server's are of the one sum; of what a run without secure aggregation
takes, they are those for packing an update as float16, and for adding up all of them. Bytes
are of what travels beside the adapter that a client gets: what comes down for the sum, and
what goes up. Training is in neither.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from methods import secure, wire  # noqa: E402

MEASURED = 3  # clients
MOST = 160  # the largest weight: the defaults' examples of a round
FIGURES = {"train_loss": 2.0, "tokens": 20_000, "peak_memory": 2.0**30}
COLUMNS = (
    *("clients", "keys, shares", "masks", "reveal", "bytes down", "bytes up"),
    *("server", "server, 1/4 gone"),
)


class Clock:
    """Seconds by name, and by client where it is one's."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[int, float]] = {}

    def time(self, name: str, number: int, do: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        made = do()
        each = self.seconds.setdefault(name, {})
        each[number] = each.get(number, 0.0) + time.perf_counter() - began
        return made

    def median(self, name: str) -> float:
        return statistics.median([*self.seconds[name].values()][-MEASURED:])

    def whole(self, name: str) -> float:
        return sum(self.seconds[name].values())


def summed(count: int, update: dict[str, torch.Tensor], gone: int) -> dict[str, Any]:
    """A sum of `count` clients' equal updates, of which the first `gone` drop out."""
    clock, numbers = Clock(), [*range(count)]
    members = [secure.Member({}) for _ in numbers]
    keys = {i: clock.time("share", i, members[i].keys) for i in numbers}
    total = clock.time("server", 0, lambda: secure.Total(keys))
    for i in numbers:
        sealed = clock.time(
            "share", i, lambda i=i: members[i].shares(total.keys, total.numbers)
        )
        total.read_sealed(i, sealed)
    down = count * 3 * secure.KEY + (count - 1) * secure.SEALED
    up = 3 * secure.KEY + (count - 1) * secure.SEALED
    for i in numbers[gone:]:
        asked = {"members": total.members, "sealed": total.sealed_for(i), "most": MOST}
        part = secure.Part(members[i], asked)
        vector = clock.time(
            "mask", i, lambda part=part: part.masked(update, FIGURES, MOST)
        )
        clock.time("server", 0, lambda i=i, vector=vector: total.add(i, vector))
    up += vector.nbytes
    for i in numbers[gone:]:
        opened = clock.time(
            "reveal",
            i,
            lambda i=i: members[i].reveal(total.added, lambda numbers: None),
        )
        clock.time("server", 0, lambda i=i, opened=opened: total.read_opened(i, opened))
    up += count * secure.SHARE
    found = clock.time("server", 0, total.unmasked)
    shapes = {name: tuple(tensor.shape) for name, tensor in update.items()}
    mean, _ = secure.decode(found, shapes, count - gone, count, MOST)
    error = max((mean[k] - update[k].double()).abs().max().item() for k in update)
    return {
        "share": clock.median("share"),
        "mask": clock.median("mask"),
        "reveal": clock.median("reveal"),
        "server": clock.whole("server"),
        "down": down,
        "up": up,
        "error": error,
    }


def plain(count: int, update: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Likewise without secrecy: an update packed as float16, and all of them added up."""
    clock = Clock()
    for i in range(MEASURED):
        packed = clock.time("pack", i, lambda: wire.pack(update, "float16")[0])
    total = {
        name: torch.zeros_like(t, dtype=torch.float64) for name, t in update.items()
    }

    def add() -> None:
        for name, tensor in wire.unpack(packed).items():
            total[name].add_(tensor, alpha=MOST)

    for i in range(count):
        clock.time("server", i, add)
    up = sum(tensor.nbytes for tensor in packed.values())
    return {"mask": clock.median("pack"), "server": clock.whole("server"), "up": up}


def row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--values", type=int, default=1_000_000, help="of an adapter")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    update = {"update": torch.randn(options.values, generator=generator) * 1e-3}
    print(f"An adapter of {options.values:,} values; seconds of one core, bytes.\n")
    print(row(*COLUMNS))
    print(row(*["---"] * len(COLUMNS)))
    errors = []
    for count in options.clients:
        none = plain(count, update)
        cells = ("-", f"{none['mask']:.3f}", "-", "-", f"{none['up']:,}")
        print(row(f"{count}, none", *cells, f"{none['server']:.2f}", "-"))
        all_, some = (summed(count, update, gone) for gone in (0, count // 4))
        errors += [all_["error"], some["error"]]
        cells = (f"{all_[name]:.3f}" for name in ("share", "mask", "reveal"))
        bytes_ = (f"{all_[name]:,}" for name in ("down", "up"))
        server = (f"{one['server']:.2f}" for one in (all_, some))
        print(row(count, *cells, *bytes_, *server), flush=True)
    print(f"\nThe mean is off by {max(errors):.1e} at most.")


if __name__ == "__main__":
    main()
