"""What may be concluded from scores: intervals, and lower bounds of epsilon.

Plain numbers in and out; nothing here knows a model. A score is higher for what looks more
like a record that was trained on.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05  # of error, in all intervals and bounds: 95 % sure

# Shares of the canaries that are guessed, those with the highest and the lowest scores.
GUESSED = (1 / 8, 1 / 4, 1 / 2, 1)


class Interval(NamedTuple):
    """An estimate, and between what it is with 95 % (or as asked)."""

    value: float
    low: float
    high: float


# --- who was there? ---------------------------------------------------------------------------


def auc(members: np.ndarray, others: np.ndarray, level: float = LEVEL) -> Interval:
    """How often a member has the higher score of the two, ties halved: 0.5 is a guess.

    The interval is of the areas whose standard error (Hanley and McNeil 1982) explains the
    distance (Newcombe 2006, method 5): it has a length at 0 and 1 as well.
    """
    ranks = stats.rankdata(np.concatenate([members, others]))[: len(members)]
    ours, theirs = len(members), len(others)
    area = (ranks.sum() - ours * (ours + 1) / 2) / (ours * theirs)
    z = stats.norm.isf(level / 2)

    def beyond(true: float, side: int) -> float:
        both, one = true / (2 - true), 2 * true**2 / (1 + true)
        variance = true * (1 - true)
        variance += (ours - 1) * (both - true**2) + (theirs - 1) * (one - true**2)
        return side * (true - area) - z * math.sqrt(max(variance, 0) / (ours * theirs))

    # At 0 and 1 the distance is 0, and so is the error: the other end is the next such place.
    start = min(max(area, 1e-9), 1 - 1e-9)
    ends = [
        optimize.brentq(beyond, start, end, args=(side,)) if area != end else float(end)
        for end, side in ((0, -1), (1, 1))
    ]
    return Interval(float(area), *ends)


def found(members: np.ndarray, others: np.ndarray, alarms: float = 0.01) -> Interval:
    """Share of the members above all but a share `alarms` of the others: TPR at that FPR.

    With the Clopper-Pearson interval for the threshold as it is.
    """
    threshold = np.sort(others)[::-1][math.floor(alarms * len(others))]
    return share(int((members > threshold).sum()), len(members))


def share(hits: int, of: int, level: float = LEVEL) -> Interval:
    """`hits` of so many, with the interval of Clopper and Pearson (1934)."""
    low = stats.beta.ppf(level / 2, hits, of - hits + 1) if hits else 0.0
    high = stats.beta.isf(level / 2, hits + 1, of - hits) if hits < of else 1.0
    return Interval(hits / of, float(low), float(high))


def exposure(own: float, others: np.ndarray) -> float:
    """Bits by which a code is found sooner than by a blind search (arXiv 1802.08232).

    `own`: its score, `others`: those of other codes, which count as found before it where
    they are equal. From 0 to log2(len(others) + 1); 1.44 on the mean for a code not seen.
    """
    rank = 1 + int((others >= own).sum())
    return math.log2(len(others) + 1) - math.log2(rank)


# --- a lower bound of epsilon -----------------------------------------------------------------


def one_run(
    scores: np.ndarray, planted: np.ndarray, delta: float, level: float = LEVEL
) -> dict[str, float]:
    """What one run proves, each canary of which was in it by a fair coin (arXiv 2305.08846).

    Guesses that the highest scores were in and as many of the lowest out, for each of
    `GUESSED`, at a share of `level` each; returns the best: `canaries`, `guesses`, `right` and
    `epsilon`, below which no (epsilon, `delta`)-private mechanism is, with 1 - `level`.
    """
    order = np.argsort(-scores, kind="stable")
    best: dict[str, float] = {}
    for part in GUESSED:
        if not (half := int(len(scores) * part / 2)):
            continue
        right = planted[order[:half]].sum() + (~planted[order[-half:]]).sum()
        told = {"canaries": len(scores), "guesses": 2 * half, "right": int(right)}
        bound = proven(*told.values(), delta, level / len(GUESSED))
        if not best or bound > best["epsilon"]:
            best = told | {"epsilon": bound}
    return best


def proven(
    canaries: int, guesses: int, right: int, delta: float, level: float = LEVEL
) -> float:
    """The largest epsilon that so many right guesses refute, 0 where they refute none."""
    if p_value(canaries, guesses, right, 0.0, delta) >= level:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(canaries, guesses, right, high, delta) < level:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        if p_value(canaries, guesses, right, middle, delta) < level:
            low = middle
        else:
            high = middle
    return low


def p_value(
    canaries: int, guesses: int, right: int, epsilon: float, delta: float
) -> float:
    """How likely so many right guesses are at most, if the mechanism is as private as told.

    Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846), appendix D.
    """
    chance = 1 / (1 + math.exp(-epsilon))
    tail = stats.binom.sf(right - 1, guesses, chance)
    below = np.arange(1, right + 1)
    # P[right > X >= right - i] / i, of which delta may add 2 x canaries times the largest.
    sums = np.cumsum(stats.binom.pmf(right - below, guesses, chance)) / below
    return min(1.0, tail + 2 * canaries * delta * max(sums, default=0.0))


def one_shot(
    cosines: np.ndarray, size: int, delta: float, level: float = LEVEL
) -> float:
    """What a release proves of its epsilon by canary clients (arXiv 2302.03098).

    `cosines`: between the release, a vector of `size` numbers, and each of the updates that
    the canaries sent, drawn from a sphere. Without a canary its cosine is N(0, 1/size), and no
    wider on the far side; with it, above a threshold as often as here, less what the
    inequality of Dvoretzky, Kiefer and Wolfowitz takes for all thresholds at once. The cosines
    count as independent, as they are in the limit of large `size`.
    """
    heights = np.sort(cosines)
    count = len(heights)
    slack = math.sqrt(math.log(1 / level) / (2 * count))
    # Just below each of them, that one and all above it are above the threshold.
    there = 1 - np.arange(count) / count - slack - delta
    alarms = stats.norm.logsf(heights * math.sqrt(size))
    proofs = np.log(np.maximum(there, 1e-300)) - alarms
    return max(0.0, float(proofs[there > 0].max(initial=0.0)))
