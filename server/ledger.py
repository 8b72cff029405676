"""What a run has released of its clients, and what that comes to."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from methods.privacy import Privacy
from server.cohort import RunFailed
from server.runs import Release, fit
from utils import UserError, read_json, write_json


class Spent(RunFailed):
    """The next release would pass `privacy.epsilon`."""


class Ledger:
    """Every release, on the disk before it is made; so a round that is done again after a
    stop counts twice, with its noise drawn anew.

    `clients` of them are known from the start. `rate`: the chance with which each is in a
    round where nobody learns who is; the ledger does not tell it either.
    """

    def __init__(self, level: Privacy, clients: int, rate: float | None) -> None:
        self.level, self.clients, self.rate = level, clients, rate
        self.releases: list[Release] = []
        self.file: Path | None = None

    def keep(self, file: Path, done: int) -> None:
        """Go on with what `file` has, if it is there, and write there from now on.

        Raises `UserError` where it lacks one of the rounds that are `done`.
        """
        self.file = file
        if not self.level.released:
            return
        if file.exists():
            self.releases = fit(read_json(file), list[Release], file)
        known = {release["round"] for release in self.releases}
        if missing := {*range(1, done + 1)} - known:
            raise UserError(
                f"{file} lacks round {min(missing)}, which is done: what was released of the "
                "clients is not known. Put a copy of it into its place, or begin the run anew."
            )

    def enter(self, when: str, server_round: int, partitions: Iterable[int]) -> None:
        """Write down that what these clients send is about to be released, if that is `when`
        the level releases it. Raises `Spent` where that would pass the budget."""
        if when != self.level.released:
            return
        release = {"round": server_round, **self.level.release()}
        if self.rate is None:
            release["clients"] = sorted(partitions)
        after = [*self.releases, release]
        most, budget = max(self.by_client(after).values()), self.level.epsilon
        if budget is not None and most > budget * (1 + 1e-6):
            raise Spent(
                f"Round {server_round} would take the most exposed client to epsilon "
                f"{most:.3f}, beyond privacy.epsilon={budget:g}: nothing of it is released."
            )
        if self.file:
            write_json(self.file, after)
        self.releases = after

    def by_client(self, releases: list[Release] | None = None) -> dict[int, float]:
        """The epsilon of each client, by its number, after these releases, or all so far."""
        releases = self.releases if releases is None else releases
        noises: dict[int, list[float]] = {i: [] for i in range(self.clients)}
        for release in releases:
            everybody = noises if self.rate is not None else release["clients"]
            for client in everybody:
                noises.setdefault(client, []).append(release["noise_multiplier"])
        known: dict[tuple[float, ...], float] = {}
        for z in map(tuple, map(sorted, noises.values())):
            if z not in known:
                known[z] = self.level.spent([*z], self.rate)
        return {client: known[tuple(sorted(z))] for client, z in noises.items()}

    def told(self) -> dict[str, Any]:
        """Of the client that is most exposed, for a round's entry."""
        if not self.level.released:
            return {}
        return {
            "epsilon": max(self.by_client().values()),
            "delta": self.level.delta,
            "adjacency": self.level.adjacency,
        }

    def summary(self) -> dict[str, Any]:
        """Likewise for the summary, with every client's."""
        if not self.level.released:
            return {}
        return {
            **self.told(),
            "epsilon_clients": {str(i): e for i, e in self.by_client().items()},
        }
