"""The first adapter: as far as the seed decides it made here, the rest by clients."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

import model
from methods import wire
from methods.base import State
from server.cohort import RunFailed
from server.journal import report_failures
from utils import Settings, UserError

# Whom was asked, each usable reply's adapter and figures as it comes in, and, after the last,
# who failed.
Asked = tuple[list[int], Iterable[tuple[State, dict[str, Any]]], list[dict[str, Any]]]


def adapter(
    cfg: Settings,
    held: dict[str, Any],
    ask: Callable[[int, set[int], int], Asked],
) -> State:
    """The first adapter, of tensors shaped like those `held`.

    What PEFT reads from the base's weights (DoRA's magnitudes) only clients can make; it is
    what more than half of them have made alike, of three at least where there are as many.
    `ask(attempt, tried, least)` asks at least so many, and others than were tried: who
    fails is replaced, `strategy.max_round_retries` times. Raises `RunFailed`.
    """
    first = seeded(cfg, held)
    unknown = [name for name, v in first.items() if not torch.isfinite(v).all()]
    retries = cfg.strategy.max_round_retries
    tried: set[int] = set()
    for attempt in range(1 + retries):
        made: list[tuple[State, list[dict[str, Any]]]] = []  # by whom, alike
        nodes, replies, failures = ask(attempt, tried, 3 if unknown else 1)
        # To the last: a reply that nobody fetches stays in Flower's store, and its
        # engine would look at it again for every node until the run ends.
        for state, client in replies:
            own = {name: state[name] for name in unknown}
            group = next((who for one, who in made if alike(one, own)), None)
            if group is None:
                made.append((own, group := []))
            group.append(client)
        tried |= set(nodes)
        made.sort(key=lambda one: -len(one[1]))
        replied = sum(len(who) for _, who in made)
        enough = not unknown or replied >= min(3, len(nodes)) or attempt == retries
        if made and enough and len(made[0][1]) > replied / 2:
            break
    else:
        if not made:
            cause = failures[-1]["cause"]
            raise RunFailed(f"No client could load the model: {cause}.")
        raise RunFailed(
            f"The {replied} clients that were asked make {len(made)} different first "
            f"adapters, and none is made by more than half: {unknown[0]} differs. "
            "They have different bases."
        )
    for _, others in made[1:]:
        cause = "its first adapter is not the one that more than half have made"
        report_failures(0, [who | {"cause": cause} for who in others])
    first |= made[0][0]
    dtype = cfg.comm.dtype
    if name := wire.lost(first, dtype):
        raise RunFailed(
            f"The first adapter cannot be sent as comm.dtype={dtype}: {name} holds "
            "values that are not finite in it. Set comm.dtype=float32."
        )
    return first


def seeded(cfg: Settings, held: dict[str, Any]) -> State:
    """The first adapter, of tensors shaped like those `held`; NaN where weights decide it."""
    try:
        return model.seeded(cfg.model, cfg.peft, cfg.seed)
    except UserError:  # no adapter at all can be made without the weights
        return {k: torch.full(v.shape, math.nan) for k, v in held.items()}


def alike(one: State, other: State) -> bool:
    """Whether two fresh adapters are the same but for what bfloat16 rounds away (2**-8)."""
    return all(
        torch.allclose(one[name], other[name], rtol=2**-7, atol=1e-6) for name in one
    )
