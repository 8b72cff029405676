"""The client's half of a method: what of the adapter comes, is trained, goes, and stays."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from methods import lora
from methods.base import State
from methods.store import Kept
from utils import UserError, construct

Names = Collection[str]

INSTEAD = "Take peft=lora or rslora, or sharing=all."


def build(node: dict[str, Any]) -> "Adapter":
    """What `conf/sharing` names. Raises `UserError` for what is no such class of this module."""
    return construct(node, __name__, Adapter)


class Adapter:
    """All of the adapter comes, is trained, and goes, in every round.

    But for what has one of `stays` in its name, as whole parts between dots (`lora_B`,
    `layers.3`): that is each client's own from round to round (FedSA, arXiv 2410.01463;
    FedPer, arXiv 1912.00818). It begins as everybody's first and is in no message; the
    server knows its first values only.

    Another method says less of `names`, the adapter's tensors: what it does not train stays
    as it is and does not go.
    """

    exact = False  # whether what `lasts` comes in float32, whatever comm.dtype is

    def __init__(self, stays: Sequence[str] = ()) -> None:
        self.stays = [f".{part}." for part in stays]

    def own(self, names: Names) -> list[str]:
        """Those that stay with a client."""
        return [n for n in names if any(part in f".{n}." for part in self.stays)]

    def comes(self, names: Names) -> list[str]:
        """Those that a client has from the server."""
        own = {*self.own(names)}
        return [name for name in names if name not in own]

    def lasts(self, names: Names) -> list[str]:
        """Those of them that do not come again as long as they are the same."""
        return []

    def types(self, names: Names, dtype: str) -> dict[str, str]:
        """The type in which each of those comes that do, where `dtype` is the wire's."""
        exact = {*self.lasts(names)} if self.exact else {}
        return {n: "float32" if n in exact else dtype for n in self.comes(names)}

    def trains(self, names: Names, server_round: int) -> Names:
        return names

    def goes(self, names: Names, server_round: int) -> list[str]:
        """Those that a client answers with, and the server aggregates."""
        return self.comes(self.trains(names, server_round))

    def changes(self, names: Names, server_round: int) -> list[str]:
        """Those that are others for the server after the round."""
        return self.goes(names, server_round)

    def finish(self, state: State, server_round: int) -> State:
        """On the server, what the round has made in the form in which it goes on."""
        return state

    def fault(self, shapes: dict[str, tuple[int, ...]]) -> str | None:
        """Why it is nothing for an adapter of these tensors, and what to do; or None."""
        for part in self.stays:
            if not any(part in f".{name}." for name in shapes):
                return (
                    f"sharing.stays: no tensor of the adapter has {part[1:-1]} in its name, "
                    f"as whole parts between dots. One is {next(iter(shapes))}."
                )
        for number in (1, 2):
            if not self.goes(shapes, number):
                return (
                    f"sharing.stays leaves nothing for clients to send in round {number}. "
                    "Name fewer; mode=local trains each client alone."
                )
        return None

    def join(
        self,
        received: State,
        unsent: str | None,
        kept: Kept,
        first: Callable[[], State],
    ) -> State:
        """The adapter to train: what has come, what came before and lasts, what has stayed.

        `unsent`: the `fingerprint` of what the server takes to be here; None where it has
        sent all. `first` makes what everybody began with. Raises `UserError` where what is
        here is not what the server means.
        """
        if unsent is None and not self.stays:
            return received
        here = first() | (kept.load("held") or {})
        own = {*self.own(here)}
        stayed = kept.load("own") or {}
        adapter = here | {k: v for k, v in received.items() if k not in own}
        adapter |= {k: v for k, v in stayed.items() if k in own}
        missing = {
            name: digest(adapter[name])
            for name in here
            if name not in own and name not in received
        }
        if missing and fingerprint(missing) != unsent:
            raise UserError(
                f"{len(missing)} tensors that were not sent are not here as the server has "
                f"them, {min(missing)} among them. It sends them when it asks again."
            )
        return adapter

    def hold(self, received: State, adapter: State, kept: Kept) -> None:
        """Keep what lasts, if it is new."""
        lasts = self.lasts(adapter.keys())
        if any(name in received for name in lasts):
            kept.save("held", {name: adapter[name] for name in lasts})

    def leave(self, before: State, after: State, kept: Kept) -> State:
        """The update that goes; what stays is kept."""
        if own := {name: after[name] for name in self.own(after.keys())}:
            kept.save("own", own)
        goes = self.goes(after.keys(), kept.number)
        return self.outgoing({k: before[k] for k in goes}, {k: after[k] for k in goes})

    def outgoing(self, before: State, after: State) -> State:
        """What is sent for what training made of `before`: the change."""
        return {name: after[name] - before[name] for name in after}


class Halves(Adapter):
    """A method that tells LoRA's halves apart: an update is B A, and B begins as 0."""

    def fault(self, shapes: dict[str, tuple[int, ...]]) -> str | None:
        name = type(self).__name__.lower()
        parts = {p for n in shapes for p in n.split(".") if p.startswith("lora_")}
        if odd := parts - {"lora_A", "lora_B"}:  # DoRA's, AdaLoRA's, an embedding's
            return f"sharing={name}: {min(odd)} is no half of LoRA's. {INSTEAD}"
        if len(parts) < 2:
            return f"sharing={name}: this adapter has no lora_A and lora_B. {INSTEAD}"
        return super().fault(shapes)


class FFA(Halves):
    """FFA-LoRA (arXiv 2403.12313): B is trained and travels, A is the same random for all.

    So the mean of the B is exactly that of the updates B A. A is made from the run's seed by
    each client and does not come, unless it has another than the server. With
    `refactor_every` the server puts (U S, V^T), the singular value decomposition of B A, in
    the place of (B, A) after so many rounds (FedSVD, arXiv 2505.12805): the function is the
    same, A follows the data, and comes once to each client that is asked.
    """

    exact = True  # one A for all, and the one that is saved

    def __init__(
        self, stays: Sequence[str] = (), refactor_every: int | None = None
    ) -> None:
        super().__init__(stays)
        self.every = refactor_every

    def lasts(self, names: Names) -> list[str]:
        return [name for name in self.comes(names) if lora.is_a(name)]

    def trains(self, names: Names, server_round: int) -> Names:
        return [name for name in names if not lora.is_a(name)]

    def changes(self, names: Names, server_round: int) -> list[str]:
        if self._due(server_round):
            return self.comes(names)
        return super().changes(names, server_round)

    def finish(self, state: State, server_round: int) -> State:
        if not self._due(server_round):
            return state
        own = {*self.own(state)}
        pairs = [(lora.other_half(name), name) for name in state if lora.is_a(name)]
        made = {
            name: tensor
            for b, a in pairs
            if not own & {b, a}
            for name, tensor in zip((b, a), refactored(state[b], state[a]), strict=True)
        }
        return state | made

    def fault(self, shapes: dict[str, tuple[int, ...]]) -> str | None:
        if fault := super().fault(shapes):
            return fault
        for name in filter(lora.is_a, shapes if self.every else ()):
            a, b = shapes[name], shapes[lora.other_half(name)]
            if len(a) != 2 or a[0] > min(a[1], b[0]):
                return (
                    f"sharing.refactor_every={self.every}: {name} of shape {a} has a higher "
                    "rank than its layer. Take a lower model.lora.peft_lora_r, or null."
                )
        return None

    def _due(self, server_round: int) -> bool:
        return bool(self.every) and server_round % self.every == 0


class RoLoRA(Halves):
    """RoLoRA (arXiv 2502.01755): B is trained in the first and every second round, else A.

    The other half stands still, so each round's mean is exactly that of the updates B A. B
    comes first: while it is 0, A has no gradient. What a client has had does not come again.
    A head is trained in all rounds.
    """

    def lasts(self, names: Names) -> list[str]:
        return self.comes(names)

    def trains(self, names: Names, server_round: int) -> Names:
        still = "B" if server_round % 2 == 0 else "A"
        return [name for name in names if f".lora_{still}." not in name]


def refactored(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(U S, V^T) with the same product as `b` (d, r) and `a` (r, k), both float32."""
    left, right = lora.best((b.double(), a.double()), len(a))
    return left.float(), right.float().contiguous()


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a float32 tensor's shape and values."""
    values = tensor.contiguous().numpy().tobytes()
    return hashlib.sha256(repr(tuple(tensor.shape)).encode() + values).hexdigest()


def fingerprint(digests: dict[str, str]) -> str:
    """SHA-256 of several, by name."""
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()
