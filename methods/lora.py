"""What a LoRA adapter does to its base: s B A a layer, in the arithmetic of its factors.

B is d x r, A is r x k, s is alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).
Everything here is r x r work on factors, in float64: no d x k matrix is ever formed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from methods.base import Contribution, State

# The columns s B (d x n) and the rows A (n x k) of a sum of n products, in float64.
Factors = tuple[torch.Tensor, torch.Tensor]

A_HALF = re.compile(
    r"\.lora_(embedding_)?A\."
)  # an embedding's are parameters themselves

# Replies of a round, and bytes of their tensors, that `Exactness` keeps. Strategies that take
# the running mean hold no reply by themselves; 2**30 are 16 of a 7B base's (q, v, rank 32).
MOST_REPLIES, MOST_BYTES = 64, 2**30


@dataclass(frozen=True)
class Layer:
    """A layer's two halves, by name, and the scale of their product."""

    a: str
    b: str
    alpha: float
    power: float  # 1, or 1/2 with rsLoRA

    def scale(self, rank: int) -> float:
        """s, of an adapter of this rank and the run's alpha."""
        return self.alpha / rank**self.power


def layers(frame: torch.nn.Module) -> tuple[Layer, ...]:
    """The layers of a PEFT model, which may be on the meta device; none for what is no LoRA.

    Scales are PEFT's own, so that patterns of ranks and of alphas count.
    """
    return () if fault(frame) else tuple(map(_layer, *zip(*_found(frame), strict=True)))


def fault(frame: torch.nn.Module) -> str | None:
    """Why a PEFT model's adapter is no sum of s B A a layer, or None."""
    found = [module for _, module in _found(frame)]
    if frame.peft_config["default"].peft_type != "LORA" or not found:
        return "it is no LoRA"
    if any(module.lora_variant for module in found):  # DoRA's magnitudes, say
        return "it is a variant of LoRA (as DoRA is), which does more than add s B A"
    for module in found:
        halves = module.lora_A or module.lora_embedding_A
        half = getattr(halves["default"], "weight", halves["default"])
        if half.ndim != 2 or getattr(module, "num_experts", 1) > 1:
            return "some of its layers are convolutions, or stacks of experts"
    return None


def _found(frame: torch.nn.Module) -> list[tuple[str, Any]]:
    """The modules that hold factors, by name."""
    return [
        (name, module)
        for name, module in frame.named_modules()
        if getattr(module, "lora_A", None) or getattr(module, "lora_embedding_A", None)
    ]


def _layer(name: str, module: Any) -> Layer:
    a = f"{name}.lora_A.default.weight"
    if module.lora_embedding_A:
        a = f"{name}.lora_embedding_A.default"
    power = 0.5 if module.use_rslora["default"] else 1.0
    alpha = module.scaling["default"] * module.r["default"] ** power
    return Layer(a, other_half(a), alpha, power)


def is_a(name: str) -> bool:
    return A_HALF.search(name) is not None


def other_half(a: str) -> str:
    """The name of B, by that of A."""
    return A_HALF.sub(r".lora_\1B.", a)


def rank(state: State) -> int | None:
    """The highest rank of a layer, or None where there is no LoRA."""
    return max((len(t) for name, t in state.items() if is_a(name)), default=None)


def power(peft_cfg: dict[str, Any]) -> float:
    """A `Layer`'s, by the settings of PEFT."""
    return 0.5 if peft_cfg.get("use_rslora") else 1.0


def cut(state: State, most: int, power: float) -> State:
    """The adapter of rank `most` at most, whose scale is that of its rank.

    Of an adapter as `best` leaves it, with the strongest directions first, this is the best of
    that rank.
    """
    made = dict(state)
    for a in filter(is_a, state):
        b, held = other_half(a), len(state[a])
        if held > most:
            made[a] = state[a][:most].clone()
            made[b] = state[b][:, :most] * (most / held) ** power
    return made


# --- sums of products -----------------------------------------------------------------------


def factors(layer: Layer, a: torch.Tensor, b: torch.Tensor) -> Factors:
    """Of A and B, as they stand in an adapter."""
    return layer.scale(len(a)) * b.double(), a.double()


def stack(each: Sequence[Factors]) -> Factors:
    """The sum of these sums."""
    return torch.cat([b for b, _ in each], 1), torch.cat([a for _, a in each])


def inner(one: Factors, other: Factors) -> float:
    """<B_i A_i, B_j A_j>, which is tr((B_j^T B_i)(A_i A_j^T))."""
    return ((other[0].T @ one[0]) * (other[1] @ one[1].T)).sum().item()


def gram(each: Sequence[Factors]) -> torch.Tensor:
    """The inner products of n functions with each other, n x n."""
    b, a = stack(each)
    owner = torch.arange(len(each)).repeat_interleave(
        torch.tensor([len(a) for _, a in each])
    )
    mine = torch.nn.functional.one_hot(owner, len(each)).double()
    return mine.T @ ((b.T @ b) * (a @ a.T)) @ mine


def best(function: Factors, most: int) -> Factors:
    """The nearest function of rank `most` (Eckart and Young 1936), as U S and V^T.

    By the SVD of the core that the R of both factors' QR make, whose size is the number of
    products; neither Q is formed, which would be half of the work. The largest entry of each
    column of U is positive, so that equal input gives equal bits. A singular value of 0 has a
    row of V^T as well: training finds a gradient there.
    """
    b, a = function
    r, t = (torch.linalg.qr(half, mode="r").R for half in (b, a.T))
    u, s, _ = torch.linalg.svd(r @ t.T)
    kept = min(most, len(s))
    # u^T r a are the rows of S V^T: made orthonormal they are V^T, and b a V is U S.
    right = torch.linalg.qr((u[:, :kept].T @ r @ a).T).Q.T
    left = b @ (a @ right.T)
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).double()
    left, right = left * signs, right * signs.T
    more = most - len(right)  # a layer with fewer rows or columns than that
    pad = torch.nn.functional.pad
    return pad(left.contiguous(), (0, more)), pad(right, (0, 0, 0, more))


# --- a round's replies ----------------------------------------------------------------------


def change(layer: Layer, state: State, replies: Sequence[Contribution]) -> Factors:
    """What the replies change of the layer's function in the exact mean of products,

        sum p_i (s_i B_i A_i - s B A) = sum p_i s_i dB_i A_i + s B sum p_i dA_i,

    of which the last stands first. A client of a lower rank was sent the first rows of A and
    columns of B, and changes nothing about the others: who has not seen them does not undo
    them. In changes, because the difference of whole functions would lose small ones.
    """
    b, a = factors(layer, state[layer.a], state[layer.b])
    total = sum(one.weight for one in replies)
    moved, parts = torch.zeros_like(a), []
    for one in replies:
        share = one.weight / total
        if (da := one.update.get(layer.a)) is not None:
            moved[: len(da)] += share * da.double()
        if (db := one.update.get(layer.b)) is not None:
            parts.append(factors(layer, one.value(layer.a), share * db.double()))
    return stack([(b, moved), *parts])


def mean(layer: Layer, state: State, replies: Sequence[Contribution]) -> Factors:
    """M, the exact mean of products; with clients of one rank, sum p_i s_i B_i A_i."""
    b, a = change(layer, state, replies)
    a[: len(state[layer.a])] += state[layer.a].double()
    return b, a


def places(
    found: Sequence[Layer], state: State, replies: Sequence[Contribution]
) -> torch.Tensor:
    """A vector for each reply, as far from each other as what the replies do is, n x m.

    Layers count by what their products do, other tensors by their values; so does the one
    half of a layer of whose other half, which stays with the client, nothing is known here (it
    is 0 in `state`).
    """
    known = [
        layer
        for layer in found
        if {layer.a, layer.b} <= state.keys()
        and all(n in replies[0].update or state[n].any() for n in (layer.a, layer.b))
    ]
    products = torch.zeros(len(replies), len(replies), dtype=torch.float64)
    for layer in known:
        products += gram([change(layer, state, [one]) for one in replies])
    lengths, axes = torch.linalg.eigh(products)
    halves = {name for layer in known for name in (layer.a, layer.b)}
    rest = [
        torch.cat([one.update[k].double().flatten() for one in replies]).view(
            len(replies), -1
        )
        for k in replies[0].update
        if k not in halves
    ]
    return torch.cat([axes * lengths.clamp(min=0).sqrt(), *rest], 1)


def share_within(found: Sequence[Layer], one: Contribution, longest: float) -> float:
    """The factor of an update, at most 1, with which it changes the weights by `longest`.

    c dA and c dB change a layer by c P + c^2 Q, P = s (dB A + B dA) and Q = s dB dA, so the
    squared length is a polynomial in c of three inner products. It is 0 at 0 and continuous:
    where it ends above `longest`, halving finds a c at which it is that, and not above.
    """
    linear = between = square = 0.0
    for layer in found:
        sent = one.before | one.rest
        a, b = sent[layer.a], sent[layer.b]
        da, db = (one.update.get(n, 0 * sent[n]) for n in (layer.a, layer.b))
        first = stack([factors(layer, a, db), factors(layer, da, b)])
        (p, q), (_, r) = gram([first, factors(layer, da, db)]).tolist()
        linear, between, square = linear + p, between + q, square + r
    halves = {name for layer in found for name in (layer.a, layer.b)}
    # In order: a set of names has another in each process, and the sum other bits.
    for name, tensor in one.update.items():
        if name not in halves:
            linear += tensor.double().square().sum().item()

    def fits(c: float) -> bool:
        return c**2 * (linear + c * (2 * between + c * square)) <= longest**2

    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Exactness:
    """How far a round's adapter is from the exact mean of products of its replies."""

    def __init__(self, found: Sequence[Layer]) -> None:
        self.layers = found
        self.replies: list[Contribution] = []
        self.bytes = 0

    def add(self, one: Contribution) -> None:
        """Take note of a reply, unless they are too many or too large to be kept."""
        if not self.layers:
            return
        self.bytes += sum(tensor.nbytes for tensor in one.update.values())
        self.replies.append(one)
        if len(self.replies) > MOST_REPLIES or self.bytes > MOST_BYTES:
            self.layers, self.replies = (), []

    def error(self, before: State, after: State) -> float | None:
        """||after - M||_F / ||M - before||_F over all layers, M the exact `mean`.

        0, but for rounding, where aggregation is exact: one half of LoRA trained, one client,
        or all alike. Of a strategy that means to go elsewhere than to the mean (a momentum,
        Krum) it tells how far that is. None where it is not known: what is no LoRA, halves
        that stay with a client, more replies than `MOST_REPLIES` or `MOST_BYTES`, or nobody
        moved.
        """
        halves = {name for layer in self.layers for name in (layer.a, layer.b)}
        if not self.replies or not halves <= before.keys():
            return None  # or each client has an adapter of its own
        replies = sorted(self.replies, key=lambda one: one.partition)
        update = {k: after[k].double() - before[k].double() for k in halves}
        made = Contribution(0, before, update, weight=1, loss=0.0)
        off = moved = 0.0
        for layer in self.layers:
            new = change(layer, before, [made])
            exact = change(layer, before, replies)
            (one, between), (_, other) = gram([new, exact]).tolist()
            off += one - 2 * between + other
            moved += other
        return (max(off, 0.0) / moved) ** 0.5 if moved > 0 else None
