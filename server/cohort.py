"""Whom a round asks."""

import random


def cohort_size(num_clients: int, fraction: float) -> int:
    """How many clients a fraction means: rounded down, but at least one."""
    # 0.29 * 100 is a hair under 29 in floating point.
    return max(1, int(num_clients * fraction + 1e-9))


def sample(nodes: list[int], size: int, seed: int) -> list[int]:
    """The nodes that take part, in the order in which they stand; `seed` alone decides."""
    places = sorted(random.Random(seed).sample(range(len(nodes)), size))
    return [nodes[place] for place in places]
