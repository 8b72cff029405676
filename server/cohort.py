"""Who takes part: the nodes that are connected, their numbers, and whom a round asks."""

import random
import time
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from flwr.serverapp import Grid
from pydantic import Field

from server.runs import fit
from utils import (
    STOP,
    Settings,
    UserError,
    cohort_size,
    look_for_stop,
    mix_seed,
    read_json,
    say,
    write_json,
)

NODES_TIMEOUT = 600.0  # seconds that clients have to connect

Digits = Annotated[str, Field(pattern=r"^\d+$")]


class RunFailed(UserError):
    """A round could not be completed. What came before it is on disk."""


class Clients:
    """The nodes of a grid, which come and go, each with a number that it keeps.

    In a simulation the number is its partition. `named`: each is announced as it comes.
    """

    def __init__(self, cfg: Settings, grid: Grid, named: bool) -> None:
        self.cfg, self.grid, self.named = cfg, grid, named
        self.partitions: dict[int, int] = {}  # by node
        self.refused: dict[int, str] = {}  # by node: why it takes no part
        self.turns: dict[int, int] = {}  # by number: the last pass it was asked in
        self.current = 1  # the newest pass through all clients that has begun
        self.file: Path | None = None  # where numbers are kept

    def keep(self, file: Path) -> None:
        """Number nodes as `file` has it, if it is there, and write there who else comes.

        For a federation, whose nodes have the same ids when a run goes on: by their order
        alone, one that came late would take the numbers of others. Raises `UserError`.
        """
        self.file = file
        if file.exists():
            known = fit(read_json(file), dict[Digits, int], file)
            if sorted(known.values()) != [*range(len(known))]:
                raise UserError(f"{file} is broken: two nodes have one number.")
            self.partitions = {int(node): number for node, number in known.items()}

    def available(self) -> list[int]:
        """Nodes that are connected and take part, in the order in which they were seen."""
        # Node ids are random in every run; sorted, the numbering is stable within one.
        connected = sorted(self.grid.get_node_ids())
        new = [node for node in connected if node not in self.partitions]
        for node in new:
            self.partitions[node] = len(self.partitions)
            if self.named:
                say(f"Client {self.partitions[node]} is node {node}.")
        if new and self.file:
            write_json(self.file, self.partitions)
        willing = set(connected) - self.refused.keys()
        return sorted(willing, key=self.partitions.__getitem__)

    def wait_for(self, wanted: int) -> None:
        """Until so many are connected. Raises `RunFailed` after `NODES_TIMEOUT`."""
        # They connect while this already runs, and get their numbers all at once.
        started = time.monotonic()
        told = False
        while (here := len({*self.grid.get_node_ids()} - self.refused.keys())) < wanted:
            look_for_stop()
            waited = time.monotonic() - started
            if waited > NODES_TIMEOUT:
                raise RunFailed(
                    f"Only {here} of {wanted} clients connected within "
                    f"{NODES_TIMEOUT:.0f} s (num_clients={self.cfg.num_clients})."
                )
            if waited > 5 and not told:
                say(f"Waiting for {wanted} clients; {here} are connected.")
                told = True
            STOP.wait(0.1)

    def sample(
        self,
        fraction: str,
        server_round: int,
        attempt: int = 0,
        tried: Collection[int] = (),
        out: Collection[int] = (),
        least: int = 1,
    ) -> list[int]:
        """The nodes that take part, in order of their numbers; waits until there is one.

        With `strategy.sampling=epoch` who trains is dealt out in passes: everybody is asked
        once, in an order drawn for the pass, before anybody is asked twice. Those that were
        `tried` in this round already come in only if the others are too few, and those in
        `out` not at all. `least` of them, where there are as many. Raises `RunFailed` when
        all that ever came refuse.
        """
        if not (nodes := self.available()):
            if self.refused and self.refused.keys() >= self.partitions.keys():
                [*_, cause] = self.refused.values()
                raise RunFailed(f"All {len(self.refused)} clients refused: {cause}.")
            self.wait_for(1)
            nodes = self.available()
        size = max(least, cohort_size(len(nodes), self.cfg.strategy[fraction]))
        nodes = [node for node in nodes if node not in out] or nodes
        size = min(size, len(nodes))
        others = [node for node in nodes if node not in tried]
        parts, more = [self.cfg.seed, fraction], [attempt] if attempt else []
        # Who measures is drawn: round 0 and the last one then ask the same.
        if fraction != "fraction_fit" or self.cfg.strategy.sampling == "random":
            seed = mix_seed(*parts, server_round, *more)
            return sample(others if len(others) >= size else nodes, size, seed)

        def order(node: int) -> tuple[bool, int, int, int]:
            number = self.partitions[node]
            turn = self.turn(number)
            place = mix_seed(*parts, turn, number, *more)
            return node in tried, turn, place, number

        return sorted(sorted(nodes, key=order)[:size], key=self.partitions.__getitem__)

    def turn(self, number: int) -> int:
        """The pass in which a client is asked next: the current one, or the one after it.

        Who comes, or comes back, owes nothing for the passes that it was not there for: it
        would be asked in every round until it had caught up.
        """
        return max(self.turns.get(number, 0) + 1, self.current)

    def note(self, asked: Collection[int]) -> None:
        """Take down who was asked in a round that is over, by their numbers.

        Turns follow from these alone, so that a run goes on by its `history.json`.
        """
        self.turns |= {number: self.turn(number) for number in asked}
        self.current = max(self.turns.values(), default=1)


def sample(nodes: list[int], size: int, seed: int) -> list[int]:
    """The nodes that take part, in the order in which they stand; `seed` alone decides."""
    places = sorted(random.Random(seed).sample(range(len(nodes)), size))
    return [nodes[place] for place in places]
