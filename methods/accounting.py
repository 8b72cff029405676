"""How much is told by sums of clipped updates with Gaussian noise on them.

Noise of standard deviation z on a sum that one party moves by 1 at most is Gaussian
differential privacy of mu = 1 / z, and several such sums are together exactly that of
sqrt(sum of mu^2) (Dong, Roth and Su 2019, arXiv 1905.02383). So nothing here is a bound of
a bound, but for secret cohorts, whose gain `opacus.accountants` reckons.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from scipy.special import log_ndtr

from utils import UserError

# (noise multiplier, rate, steps): what opacus calls an accountant's history.
History = tuple[tuple[float, float, int], ...]


def delta_of(epsilon: float, mu: float) -> float:
    """The smallest delta of Gaussian differential privacy `mu` at `epsilon`; `mu` above 0.

    Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu) (Balle and Wang 2018, arXiv 1805.06530),
    by logarithms: e^eps alone would overflow, and the difference lose all its digits.
    """
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return -math.exp(first) * math.expm1(min(second - first, 0.0))


def epsilon_of(mu: float, delta: float) -> float:
    """The epsilon of Gaussian differential privacy `mu` at `delta`; 0 where mu is 0."""
    if not mu or delta_of(0.0, mu) <= delta:
        return 0.0
    # That of its concentrated differential privacy, which is looser.
    most = mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    return _least(lambda epsilon: delta_of(epsilon, mu) <= delta, most)


def of_releases(noises: Iterable[float], delta: float) -> float:
    """The epsilon of whoever is in releases of these noise multipliers, exactly."""
    return epsilon_of(math.sqrt(sum(1 / z**2 for z in noises)), delta)


def amplified(noises: Iterable[float], rate: float, delta: float) -> float:
    """The epsilon of releases that each holds everybody with probability `rate`, by chance
    that nobody learns: Renyi differential privacy of the sampled Gaussian mechanism (Mironov
    et al. 2019, arXiv 1908.10530), as Opacus has it. At most that without the chance."""
    counts = Counter(noises)
    history = tuple((z, rate, count) for z, count in counts.items())
    sampled = by_rdp(history, delta) if counts else 0.0
    return min(sampled, of_releases(counts.elements(), delta))


def by_rdp(history: History, delta: float) -> float:
    """The epsilon of noisy sums that each holds a party by chance, in milliseconds: Opacus'
    accountant of Renyi differential privacy, up to a fifth above what is true."""
    from opacus.accountants import RDPAccountant

    rdp = RDPAccountant()
    rdp.history = [*history]
    with quiet():
        return float(rdp.get_epsilon(delta))


@contextmanager
def quiet() -> Iterator[None]:
    """Without opacus' warnings, of orders that might be tighter and logarithms of 0."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def noise_for(
    epsilon: float, delta: float, times: int, rate: float | None = None
) -> float:
    """The least noise multiplier with which `times` releases stay within `epsilon`.

    `rate`: as for `amplified`; None: the party is in all of them. Raises `UserError` for an
    epsilon that no noise below a million gives.
    """

    def within(noise: float) -> bool:
        return spent([noise] * times, delta, rate) <= epsilon

    high = 1.0
    while not within(high):
        if high > 1e6:
            raise UserError(
                f"privacy.epsilon={epsilon}: no noise is enough for {times} releases at "
                f"privacy.delta={delta}. Raise one of them, or train fewer rounds."
            )
        high *= 2
    # A secret cohort takes a tenth of a second for each guess.
    return _least(within, high, to=1e-9 if rate is None else 1e-4)


def spent(noises: Iterable[float], delta: float, rate: float | None = None) -> float:
    """The epsilon of releases of these noise multipliers; `rate` as for `noise_for`."""
    if rate is None:
        return of_releases(noises, delta)
    return amplified(noises, rate, delta)


def _least(fits: Callable[[float], bool], high: float, to: float = 1e-9) -> float:
    """The least value above 0 that `fits`, up to the share `to` above it; `high` does."""
    low = 0.0
    while high - low > to * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
