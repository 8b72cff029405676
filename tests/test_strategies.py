"""pytest tests/test_strategies.py: strategies of Flower's, against their papers by hand."""

import numpy as np
import torch

from methods import aggregate
from methods.base import Contribution, State
from settings.compose import compose, resolve


def round_of(
    name: str, start: State, updates: list[State], losses: list[float]
) -> State:
    """The state that one round makes of these updates, with the settings of conf/."""
    cfg = resolve(compose(f"experiment=quickstart strategy={name}"))
    made = aggregate.build(cfg.strategy)
    made.begin(start, 1)
    for i, (update, loss) in enumerate(zip(updates, losses, strict=True)):
        made.add(Contribution(i, start, update, weight=i + 1, loss=loss))
    return made.apply(made.gathered())


def three_updates() -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 4), "b": (5,)}
    start, *updates = (
        {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
        for _ in range(4)
    )
    return start, updates


def test_qfedavg_steps_as_in_the_paper():
    """arXiv 1905.10497, algorithm 2, with F_k the loss that a client tells."""
    start, updates = three_updates()
    losses, q, lipschitz = [0.5, 1.0, 2.0], 0.7, 1 / 4.0
    name = "qfedavg strategy.q=0.7 strategy.client_learning_rate=4.0"
    found = round_of(name, start, updates, losses)
    top, bottom = {k: np.zeros(v.shape) for k, v in start.items()}, 0.0
    for update, loss in zip(updates, losses, strict=True):
        # L (w - w_k), and the squared length of all of it
        step = {k: -lipschitz * v.double().numpy() for k, v in update.items()}
        squared = sum((v**2).sum() for v in step.values())
        top = {k: top[k] + loss**q * step[k] for k in step}
        bottom += q * loss ** (q - 1) * squared + lipschitz * loss**q
    for key, tensor in start.items():
        wanted = torch.from_numpy(tensor.double().numpy() - top[key] / bottom)
        torch.testing.assert_close(found[key].double(), wanted, rtol=1e-6, atol=1e-6)


def test_qfedavg_of_q_0_is_the_plain_mean():
    start, updates = three_updates()
    found = round_of("qfedavg strategy.q=0", start, updates, [0.5, 1.0, 2.0])
    for key, tensor in start.items():
        mean = tensor + sum(update[key] for update in updates) / 3
        torch.testing.assert_close(found[key], mean, rtol=1e-5, atol=1e-6)


def test_multikrum_is_the_mean_of_those_with_the_nearest_neighbours():
    """arXiv 1703.02757: of 7 with 1 malicious, a score is over the 4 nearest others."""
    start = {"w": torch.zeros(2)}
    places = [0.0, 0.1, 0.2, 0.35, 0.6, 9.0, 100.0]
    updates = [{"w": torch.full((2,), place)} for place in places]
    found = round_of(
        "multikrum strategy.num_nodes_to_select=3", start, updates, [1.0] * 7
    )
    scores = [
        sum(sorted(2 * (place - other) ** 2 for other in places)[1:5])
        for place in places
    ]
    chosen = sorted(range(7), key=scores.__getitem__)[:3]
    assert set(chosen) == {1, 2, 3}
    # Weighted by examples, 2 to 4 of them here.
    mean = sum(places[i] * (i + 1) for i in chosen) / sum(i + 1 for i in chosen)
    torch.testing.assert_close(found["w"], torch.full((2,), mean), rtol=1e-5, atol=1e-6)
