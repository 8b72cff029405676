"""DP-SGD on a client (Abadi et al. 2016, arXiv 1607.00133): noise that hides any one record.

Every record is in a step's batch by itself with the chance `rate` (Poisson), its gradient is
clipped, and the sum gets noise; what is released is a function of those sums. How much that
tells of one record, added or removed, is accounted for by `opacus.accountants`, and kept in a
`Ledger`. Draws and noise come from the operating system, new at each attempt: what `seed`
decides anybody can take away again.
"""

import fcntl
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from methods.accounting import History, by_rdp, quiet
from methods.noise import noise, uniform
from utils import Refusal, UserError, read_json, write_json, writing

# A record's loss goes into the same noisy sum as one more coordinate: this share of the clip
# norm is its, and sqrt(1 - 0.2^2) = 98 % of it the gradient's.
LOSS_SHARE = 0.2
LARGEST_LOSS = 5.0  # nats a token; a record's that is higher counts as this


# --- a step -------------------------------------------------------------------------------


# Losses of some records, (records,), and of each parameter their gradients, (records, *shape), or
# None where there are none.
Found = tuple[torch.Tensor, Sequence[torch.Tensor | None]]


def clipped_sum(
    parameters: Sequence[torch.nn.Parameter],
    found: Iterable[Found],
    longest: float,
) -> tuple[list[torch.Tensor], float]:
    """The sum of records' gradients, each scaled down to an L2 norm of `longest` over all
    `parameters` if it is longer; and the sum of their losses, each at most `LARGEST_LOSS`.

    `found`: of all records, some after the other, so that the gradients of some are there at a
    time. A record whose gradient or loss is not finite counts as 0, in both sums: it would tell
    of itself.
    """
    total = [torch.zeros_like(parameter) for parameter in parameters]
    nats = 0.0
    for losses, gradients in found:
        pairs = zip(total, gradients, strict=True)
        there = [(sums, each) for sums, each in pairs if each is not None]
        flat = [each.reshape(len(each), -1) for _, each in there]
        norms = [torch.linalg.vector_norm(each, dim=1) for each in flat]
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        finite = norm.isfinite() & losses.isfinite()
        scale = (longest / (norm[finite] + 1e-6)).clamp(max=1)
        for sums, each in there:
            sums.add_(torch.tensordot(scale, each[finite], dims=1))
        nats += losses[finite].clamp(max=LARGEST_LOSS).sum().item()
    return total, nats


@dataclass(frozen=True)
class Mechanism:
    """A round of DP-SGD on a client's `records`: `steps` noisy sums of clipped gradients.

    `rate`: the chance of a record to be in a step; `expected`: records in one, on average, by
    which each sum is divided; `noise_multiplier`: standard deviation of the noise over
    `clip_norm`, the most that a record can change a sum. `told` goes into the reply.
    """

    records: int
    rate: float
    steps: int
    clip_norm: float
    noise_multiplier: float
    told: dict[str, float]

    @property
    def expected(self) -> float:
        return self.rate * self.records

    def draw(self) -> list[list[int]]:
        """The records of each step, by their places."""
        return [
            np.flatnonzero(uniform(self.records) < self.rate).tolist()
            for _ in range(self.steps)
        ]

    def step(
        self, parameters: Sequence[torch.nn.Parameter], found: Iterable[Found]
    ) -> float:
        """Put a step's noisy mean gradient into `parameters`; returns its noisy mean loss.

        `found` as of `clipped_sum`. Both are of one vector, of which a record changes no more
        than `clip_norm`: one noise covers them. There may be no records in it.
        """
        longest = self.clip_norm * math.sqrt(1 - LOSS_SHARE**2)
        total, nats = clipped_sum(parameters, found, longest)
        deviation = self.noise_multiplier * self.clip_norm
        for parameter, each in zip(parameters, total, strict=True):
            added = noise(each.shape, deviation).to(each)
            parameter.grad = (each + added) / self.expected
        # In nats, of which a loss takes LOSS_SHARE * clip_norm / LARGEST_LOSS each.
        nats += noise((), self.noise_multiplier * LARGEST_LOSS / LOSS_SHARE).item()
        return nats / self.expected

    def metrics(self, loss: float) -> dict[str, Any]:
        """What a client tells of a round: nothing of its data but the noisy `loss`."""
        return {"train_loss": min(max(loss, 0.0), LARGEST_LOSS), **self.told}


# --- accounting ---------------------------------------------------------------------------


@lru_cache(maxsize=256)
def epsilon(history: History, delta: float) -> float:
    """Of (epsilon, delta)-DP for one record added or removed, after `history`.

    By RDP (Mironov et al. 2019, arXiv 1908.10530), and where that is below 50 the smaller of
    it and PRV (Gopi et al. 2021, arXiv 2106.02848; its upper end, 0.01 above the estimate).
    PRV takes no rate of 1, and for more its tables would take gigabytes.
    """
    from opacus.accountants import PRVAccountant

    most = by_rdp(history, delta)
    if not 0 < most < 50:
        return most
    prv = PRVAccountant()
    prv.history = [*history]
    try:
        with quiet():
            tighter = float(prv.get_epsilon(delta))
    except (ArithmeticError, ValueError, RuntimeError):
        return most
    return min(most, tighter) if math.isfinite(tighter) else most


@lru_cache(maxsize=256)
def noise_for(target: float, delta: float, rate: float, steps: int) -> float:
    """The least noise multiplier, to 1 %, with which `steps` cost `target` or less.

    Raises `UserError` where none up to 1,000 does.
    """

    def least(
        cost: Callable[[History, float], float], low: float, high: float
    ) -> float:
        while high / low > 1.01:
            middle = math.sqrt(low * high)
            enough = cost(((middle, rate, steps),), delta) <= target
            low, high = (low, middle) if enough else (middle, high)
        return high

    if by_rdp(((1000.0, rate, steps),), delta) > target:
        raise UserError(
            f"privacy.epsilon={target} with privacy.delta={delta}: no noise is enough for "
            f"{steps} steps. Take more, or fewer steps."
        )
    rough = least(by_rdp, 0.25, 1000.0)
    return least(epsilon, 0.75 * rough, rough)


@dataclass(frozen=True)
class Use:
    """What a run has used a client's records for: so many steps at this noise and rate."""

    run: str
    noise_multiplier: float
    rate: float
    steps: int


class Ledger:
    """What a client's records have been used for, by all runs, in a file of its own.

    A round is in it, on the disk, before it is trained: one that is repeated, or ends with
    kill -9, has been counted. Raises `UserError` where it is broken or cannot be written, and
    then nothing is trained.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def uses(self) -> list[Use]:
        if not self.file.exists():
            return []
        try:
            return [Use(**entry) for entry in read_json(self.file)]
        except TypeError as error:
            raise UserError(f"{self.file} is broken ({error}).") from None

    def charge(self, use: Use, limits: Iterable["Limit"]) -> None:
        """Take `use` down. Raises `Refusal`, and does not, where it would pass a limit."""
        with self._alone():
            uses = self.uses()
            alike = [old for old in uses if replace(old, steps=use.steps) == use]
            total = use.steps + sum(old.steps for old in alike)
            uses = [old for old in uses if old not in alike]
            uses.append(replace(use, steps=total))
            for limit in limits:
                if limit.spent(uses) > limit.epsilon:
                    raise Refusal(f"another round would pass {limit.name}")
            write_json(self.file, [asdict(each) for each in uses])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two runs may ask one node at a time."""
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lock = self.file.with_suffix(".lock").open("a")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@dataclass(frozen=True)
class Limit:
    """The most that records' uses may cost: of one `run`, or of all."""

    name: str
    epsilon: float
    delta: float
    run: str | None = None

    def spent(self, uses: Iterable[Use]) -> float:
        return spent(uses, self.delta, self.run)


def spent(uses: Iterable[Use], delta: float, run: str | None = None) -> float:
    """`epsilon` of these uses of a client's records, or of those by one run."""
    history = (
        (use.noise_multiplier, use.rate, use.steps)
        for use in uses
        if run in (None, use.run)
    )
    return epsilon(tuple(history), delta)
