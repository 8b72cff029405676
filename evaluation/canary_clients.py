"""What a mechanism at the level of clients proves of itself, in seconds and without training.

Andrew et al. 2023 (arXiv 2302.03098): some of the clients are canaries, which send directions
drawn at random instead of what they have learnt. How near they lie to what is released tells
how well one who knows a client's update can see whether it was there.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from evaluation import bounds

# What is released of a round's updates, each a vector, and the examples behind each. Called
# again it is another release of the same round: by who has seen the settings, or as after a
# stop.
Release = Callable[[Sequence[np.ndarray], Sequence[int]], np.ndarray]

CANARIES, OTHERS = 400, 3600  # clients: a tenth has something to say

EXAMPLES = 1000  # that a canary claims to have, and the others 1: no word may weigh


def prove(
    release: Release,
    size: int,
    clip_norm: float,
    delta: float,
    seed: int = 0,
    canaries: int = CANARIES,
    others: int = OTHERS,
) -> float:
    """The epsilon that a release of one round is sure to have at least, with 95 %.

    Two attacks, at half of the error each: on the release; and on its difference from one of
    the same round without the canaries, in which noise that can be known, or is used twice, is
    gone. `size`: numbers in an update; the canaries' have the length `clip_norm`.
    """
    rng = np.random.default_rng(seed)
    ways = rng.standard_normal((canaries, size), dtype=np.float32)
    ways *= clip_norm / np.linalg.norm(ways, axis=1, keepdims=True)
    nothing = np.zeros(size, np.float32)
    silent = [nothing] * others
    examples = [EXAMPLES] * canaries + [1] * others
    seen = release([*ways, *silent], examples)
    without = release([nothing] * canaries + silent, examples)
    return max(
        bounds.one_shot(cosines(ways, seen), size, delta, bounds.LEVEL / 2),
        bounds.one_shot(cosines(ways, seen - without), size, delta, bounds.LEVEL / 2),
    )


def cosines(ways: np.ndarray, release: np.ndarray) -> np.ndarray:
    """Between each row of `ways` and the release; 0 for a release of nothing."""
    lengths = np.linalg.norm(ways, axis=1) * (np.linalg.norm(release) or math.inf)
    return ways @ release.astype(ways.dtype) / lengths
