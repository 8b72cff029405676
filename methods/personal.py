"""An adapter of a client's own, beside the one that all share: made here, kept, never sent."""

from collections.abc import Callable
from typing import Any

import torch

from methods.base import State
from methods.sharing import Adapter, Names
from methods.store import Kept
from utils import UserError, construct

# Trains the first adapter for a round, with mu / 2 times its squared distance from the second
# in the loss, and returns what became of it.
Fit = Callable[[State, State, float], State]

# Trains an adapter for a round of this number, 1 to `rounds`, alone.
Alone = Callable[[State, int], State]


def build(node: dict[str, Any]) -> "Personal":
    """What `conf/personal` names. Raises `UserError` for what is no such class."""
    return construct(node, __name__, Personal)


class Personal:
    """A client's own is what `sharing` leaves with it, if that is anything (FedSA, say)."""

    makes = False  # whether it makes one beside that which all share
    trainings = 1  # of a client in a round, each of as many steps
    rounds = 0  # in which a client trains alone, after the last that is shared

    def __init__(self, interpolate: list[float]) -> None:
        self.weights = interpolate

    def any(self, part: Adapter, names: Names) -> bool:
        """Whether clients have an adapter of their own, of tensors with these names."""
        return bool(part.own(names))

    def train(self, fit: Fit, joined: State, kept: Kept) -> None:
        """Train it for a round, beside the `joined` adapter that all share, and keep it."""

    def pair(self, shared: State, joined: State, kept: Kept) -> tuple[State, State]:
        """The adapter that all share, and the client's own.

        `shared` is what came, with what stays as everybody's first is; `joined` is that with
        what has stayed here.
        """
        return shared, joined

    def finish(
        self, alone: Alone, shared: State, joined: State, kept: Kept
    ) -> tuple[State, State]:
        """`pair`, after the last round, when the client chooses between both."""
        return self.pair(shared, joined, kept)


class Ditto(Personal):
    """Its own adapter v beside the shared w: v <- v - eta (grad F(v) + mu (v - w)).

    Li et al. 2021, arXiv 2012.04221, algorithm 1, with mu for lambda. v begins as the first w
    that came; w is what came in the round. Steps, records and optimiser are those with which
    the client trains w in the same round.
    """

    makes = True
    trainings = 2

    def __init__(self, mu: float, interpolate: list[float]) -> None:
        super().__init__(interpolate)
        self.mu = mu

    def any(self, part: Adapter, names: Names) -> bool:
        return True

    def train(self, fit: Fit, joined: State, kept: Kept) -> None:
        start = kept.load("personal") or joined
        kept.save("personal", fit(start, joined, self.mu))

    def pair(self, shared: State, joined: State, kept: Kept) -> tuple[State, State]:
        return joined, kept.load("personal") or joined


class Finetune(Personal):
    """Its own adapter is the finished shared one, trained on alone for `rounds` more.

    Fine-tuning after FedAvg (Jiang et al. 2019, arXiv 1909.12488; Cheng et al. 2021, arXiv
    2108.07313). The learning rate goes through the run's whole schedule again, in `rounds`.
    """

    makes = True

    def __init__(self, rounds: int, interpolate: list[float]) -> None:
        super().__init__(interpolate)
        if rounds is None:
            raise UserError(
                "personal.rounds=null: how many rounds? Give a whole number."
            )
        self.rounds = rounds

    def any(self, part: Adapter, names: Names) -> bool:
        return True

    def pair(self, shared: State, joined: State, kept: Kept) -> tuple[State, State]:
        return joined, joined

    def finish(
        self, alone: Alone, shared: State, joined: State, kept: Kept
    ) -> tuple[State, State]:
        own = joined
        for number in range(1, self.rounds + 1):
            made = alone(own, number)
            if not all(tensor.isfinite().all() for tensor in made.values()):
                break  # the rate is too high for this client
            own = made
        return joined, own


def between(shared: State, own: State, weight: float) -> State:
    """The mean with `weight` (0 to 1) on `own`, tensor by tensor; at 0 and 1 to the bit."""
    if weight in (0, 1):
        return dict(own if weight else shared)
    return {k: torch.lerp(tensor, own[k], weight) for k, tensor in shared.items()}


def choose(scores: dict[float, torch.Tensor]) -> tuple[float, float]:
    """The weight of the least loss, and what choosing so comes to on other records.

    `scores`: by weight, one row a record: nats and tokens of its answer, (records, 2). The
    least loss would flatter itself, being the least of several on the records that it was
    chosen on. So in the loss told each record counts with the weight that is best on all the
    others (leave-one-out cross-validation); a single one with its own best. A weight with
    which a loss is not finite is none to choose, where there are others.
    """
    finite = {w: each for w, each in scores.items() if each[:, 0].isfinite().all()}
    scores = finite or scores
    weights = [*scores]
    nats = torch.stack([each[:, 0] for each in scores.values()])  # (weights, records)
    sums = nats.sum(1, keepdim=True)
    count = nats.shape[1]
    best = (sums - nats if count > 1 else sums).argmin(0)
    told = nats[best, torch.arange(count)].sum() / scores[weights[0]][:, 1].sum()
    return weights[sums.argmin()], told.item()
