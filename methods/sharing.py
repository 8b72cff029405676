"""The client's half of a method: what of the adapter comes, is trained, goes, and stays."""

from collections.abc import Collection
from typing import Any

from methods.base import State
from methods.store import Kept
from utils import construct

Names = Collection[str]


def build(node: dict[str, Any]) -> "Adapter":
    """What `conf/sharing` names. Raises `UserError` for what is no such class of this module."""
    return construct(node, __name__, Adapter)


class Adapter:
    """All of the adapter comes, is trained, and goes, in every round.

    Another method says less of `names`, the adapter's tensors: what it does not train stays
    as it is, what does not come is the client's own from round to round, and of what does
    not go the server knows the first values only.
    """

    def comes(self, names: Names, server_round: int) -> Names:
        """Those that a client takes from the server."""
        return names

    def trains(self, names: Names, server_round: int) -> Names:
        return names

    def goes(self, names: Names, server_round: int) -> Names:
        """Those that a client answers with, and the server aggregates."""
        return names

    def join(self, received: State, kept: Kept) -> State:
        """The adapter to train: what comes of `received`, and what has stayed here."""
        own = kept.load("own") or {}
        comes = self.comes(received.keys(), kept.number)
        return {k: v if k in comes else own.get(k, v) for k, v in received.items()}

    def leave(self, before: State, after: State, kept: Kept) -> State:
        """The update that goes; what does not come again is kept."""
        comes = self.comes(after.keys(), kept.number)
        if own := {k: v for k, v in after.items() if k not in comes}:
            kept.save("own", own)
        goes = self.goes(after.keys(), kept.number)
        return self.outgoing({k: before[k] for k in goes}, {k: after[k] for k in goes})

    def outgoing(self, before: State, after: State) -> State:
        """What is sent for what training made of `before`: the change."""
        return {name: after[name] - before[name] for name in after}
