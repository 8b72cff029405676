"""The way down: what a client makes of what it is sent of the adapter.

All of it, in one array for each tensor or compressed; or, with `comm.delta_down`, those
values that have changed since it was last sent any. `server.exchange.Downlink` sends them.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from methods import deflate, sparse, wire
from methods.base import State
from methods.sharing import Adapter, digest, fingerprint
from methods.store import Kept
from utils import Settings, UserError

CHANGED = "changed"  # the name of the array with them


def opened(
    arrays: Any,
    told: Any,
    comm: Settings,
    part: Adapter,
    kept: Kept,
    first: Callable[[], State],
) -> State:
    """The float32 tensors that came in a message's `ArrayRecord`.

    `told`: what came beside it; `first` makes an adapter shaped like the run's. Raises
    `UserError` where changes came to what is not here, and `Unusable` for what is none.
    """
    if since := told.get("since"):
        return caught_up(kept.load("view") or {}, since, arrays, comm)
    if not comm.compress:
        return wire.unpack(arrays.to_torch_state_dict())
    here = first()
    types = part.types([*here], comm.dtype)
    layout: wire.Layout = {}
    for name in told.get("sent", [*types]):
        layout |= wire.layout({name: here[name]}, types[name])
    return wire.unpack(deflate.inflate(arrays, layout)) if layout else {}


def caught_up(view: State, since: str, arrays: Any, comm: Settings) -> State:
    """The adapter `view`, which has to be the one with the fingerprint `since`, changed."""
    if printed(view) != since:
        raise UserError(
            "the adapter to which changes were sent is not here as the server has it. It "
            "sends all of it when it asks again."
        )
    size = sparse.size_of(view)
    if comm.compress:
        data = deflate.unzipped(arrays, sparse.length(size, size, comm.dtype))
    else:
        shape = (math.prod(arrays[CHANGED].shape),)
        data = wire.read(arrays, {CHANGED: ("uint8", shape)})[CHANGED].numpy()
    places, values = sparse.decode(data, size, comm.dtype)
    whole = sparse.flat(view)
    whole[places] = values
    return sparse.parted(whole, view)


def printed(view: State) -> str:
    """The fingerprint of all of an adapter."""
    return fingerprint({name: digest(tensor) for name, tensor in view.items()})


class View:
    """The adapter as clients have it that are up to date, and what has changed in it when.

    It is behind the server's own by what has not been sent: each `move` takes the `share` of
    its values that are furthest from the server's to what those are in `dtype`, and the rest
    waits (the server's error feedback). New values are told, not differences: so whoever has
    a version of it has the same, bit for bit, whichever of the earlier ones it has missed.
    """

    def __init__(self, state: State, dtype: str, share: float) -> None:
        packed, _ = wire.pack(state, dtype)
        self.dtype, self.share = dtype, share
        self.state = wire.unpack(packed)
        self.changed = torch.zeros(sparse.size_of(state), dtype=torch.int32)
        self.prints: list[str] = []  # by number
        self._print()

    def _print(self) -> None:
        self.prints.append(printed(self.state))
        self.number = len(self.prints)  # from 1

    def move(self, state: State) -> None:
        here, there = sparse.flat(self.state), sparse.flat(state)
        number = sparse.count(self.share, len(here))
        places = sparse.largest(there - here, number)
        packed, _ = wire.pack({CHANGED: there[places]}, self.dtype)
        new = wire.unpack(packed)[CHANGED]
        places, new = (each[new != here[places]] for each in (places, new))
        here[places] = new
        self.state = sparse.parted(here, self.state)
        self._print()
        self.changed[places] = self.number

    def since(self, number: int) -> tuple[str, State]:
        """The fingerprint of an earlier version, and what has changed, packed."""
        places = (self.changed > number).nonzero()[:, 0]
        values = sparse.flat(self.state)[places]
        data = sparse.encode(values, places, len(self.changed), self.dtype)
        return self.prints[number - 1], {CHANGED: torch.from_numpy(data)}
