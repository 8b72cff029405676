"""What a federated method is made of: a client's half, the server's half, and steps between.

    state -> Aggregation.down -> [wire] -> Sharing.comes -> train -> goes -> Step.leave -> [wire]
          -> Step.arrive (reversed) -> Aggregation.add ... gathered -> Step.total -> apply -> state

None of it knows models, data or messages: tensors by name, in float32 on the CPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# Tensors by the names of the adapter's parameters, float32 on the CPU. The server's may
# hold some for one client alone, as `<partition>/<name>`.
State = dict[str, torch.Tensor]


class Unusable(ValueError):
    """A reply that cannot be used. The text is ours, and quotes nothing of the reply."""


class OutOfRange(Unusable):
    """An adapter that is finite here, and would not be where it is sent."""


@dataclass
class Contribution:
    """What one client adds to a round, or several of which the sum alone is known."""

    partition: int
    before: State  # what it was sent of the tensors that it answers with
    update: Any  # its change of them: a State, or on arrival what the wire carried
    weight: int  # in the mean, 1 or more
    loss: float  # mean of the round, nats a token
    rest: State = field(default_factory=dict)  # what else of the adapter it was sent
    beside: State = field(default_factory=dict)  # what came beside the update
    members: tuple[
        int, ...
    ] = ()  # the partitions whose mean `update` is, if of several

    @property
    def clients(self) -> tuple[int, ...]:
        """The partitions that it is of."""
        return self.members or (self.partition,)

    def value(self, name: str) -> torch.Tensor:
        """A tensor of the adapter that the client has trained, in float64."""
        if name not in self.update:
            return self.rest[name].double()
        return self.before[name].double() + self.update[name].double()


class Step:
    """Something done to every update on its way. By itself it does nothing."""

    def leave(self, update: State, kept: Any) -> State:
        """On the client, before the update is sent; `kept` is its `store.Kept`."""
        return update

    def arrive(self, one: Contribution) -> Contribution:
        """On the server, as it comes in. Raises `Unusable` for one that is no use."""
        return one

    def total(self, mean: State, count: int) -> State:
        """On the server, done to what `count` updates were gathered to."""
        return mean


class Steps(Step):
    """Several, which are undone in reverse: what is done last arrives first."""

    def __init__(self, *steps: Step) -> None:
        self.steps = steps

    def leave(self, update: State, kept: Any) -> State:
        for step in self.steps:
            update = step.leave(update, kept)
        return update

    def arrive(self, one: Contribution) -> Contribution:
        for step in reversed(self.steps):
            one = step.arrive(one)
        return one

    def total(self, mean: State, count: int) -> State:
        for step in reversed(self.steps):
            mean = step.total(mean, count)
        return mean


class Aggregation:
    """The server's half: what each client is sent, and how updates become the next state.

    A round is `begin`, `add` for each update, `gathered`, `apply`. It may fail and be begun
    again, after `recall` of what `memory` gave once it was begun.
    """

    corrects = False  # whether clients that train get, and answer, more than an adapter
    linear = False  # whether `gathered` is the weighted mean of the updates
    products = False  # whether it needs a sum of products, all of it shared
    layers: Sequence[Any] = ()  # the adapter's `lora.Layer`s, which the server knows
    keeps: tuple[str, ...] = ()  # the names of what `memory` may hold

    def start(self, adapter: State, clients: int) -> State:
        """The first state, of the first adapter and `num_clients`."""
        return adapter

    def down(self, state: State, partition: int) -> State:
        """The adapter that a client is sent: what all share, and what is its own."""
        if not any("/" in name for name in state):
            return state
        own = f"{partition}/"
        named = ((name.removeprefix(own), tensor) for name, tensor in state.items())
        return {name: tensor for name, tensor in named if "/" not in name}

    def hear(self, client: dict[str, Any]) -> None:
        """What a client has told of itself, now or before the run was stopped."""

    def beside(self, state: State) -> State:
        """What clients that train are sent beside it, by the adapter's names; and answer."""
        return {}

    def told(self, server_round: int) -> dict[str, Any]:
        """What clients are told beside it."""
        return {"server-round": server_round}

    def begin(self, state: State, server_round: int) -> None:
        """Forget the updates of an earlier round."""
        self.state, self.number = state, server_round

    def add(self, one: Contribution) -> None:
        raise NotImplementedError

    def gathered(self) -> State:
        """What the updates make together: a change of the state, in float64."""
        raise NotImplementedError

    def apply(self, mean: State) -> State:
        """The next state. Raises `Unusable` where it makes none."""
        return self.state | {
            name: (self.state[name] + change).to(torch.float32)
            for name, change in mean.items()
        }

    def memory(self) -> dict[str, State]:
        """What it keeps for the next round (momenta), by name and by the adapter's names."""
        return {}

    def recall(self, memory: dict[str, State]) -> None:
        """Go on as if `memory` was what it keeps."""


def norm(update: State) -> float:
    """The L2 norm over all tensors."""
    squares = sum(tensor.double().square().sum().item() for tensor in update.values())
    return math.sqrt(squares)


def clipped(update: State, longest: float) -> State:
    """The update scaled down to an L2 norm of `longest` over all tensors, if it is longer."""
    scale = min(1.0, longest / max(norm(update), 1e-12))
    return {name: tensor * scale for name, tensor in update.items()}


def adapters(state: State) -> dict[str, State]:
    """The adapters that a state holds, by the folder that each gets below `peft_*/`.

    One, in that folder itself, or where nobody shares any, each client's own in
    `client_<partition>`.
    """
    found: dict[str, State] = {}
    for path, tensor in state.items():
        partition, own, name = path.rpartition("/")
        found.setdefault(f"client_{partition}" if own else "", {})[name] = tensor
    return found or {"": {}}
