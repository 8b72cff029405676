"""pytest tests/test_aggregate.py: how updates are combined, against arithmetic done by hand."""

import logging

import pytest
import torch
from flwr.app import ArrayRecord, Message
from flwr.supercore.task_identity import TaskIdentity

from methods import aggregate
from methods.base import Contribution
from methods.steps import Clip
from server.rounds import Server


def fixed_replies(values: dict[int, float], examples: dict[int, int]):
    """A `tamper` by which partition p sends an update full of values[p]."""

    def tamper(partition: int, reply: Message) -> Message:
        if "metrics" in reply.content:
            state = reply.content["arrays"].to_torch_state_dict()
            filled = {
                k: torch.full_like(v, values[partition]) for k, v in state.items()
            }
            reply.content["arrays"] = ArrayRecord(filled)
            reply.content["metrics"]["num-examples"] = examples[partition]
            reply.content["metrics"]["train_loss"] = float(partition)
        return reply

    return tamper


@pytest.mark.slow
def test_fedavg_weighs_by_examples_trained_on(configure, loopback):
    cfg = configure("num_clients=3", "strategy.fraction_fit=1")
    tamper = fixed_replies({0: 1.0, 1: 2.0, 2: 6.0}, {0: 5, 1: 3, 2: 2})
    server = Server(cfg, loopback(cfg, tamper))
    start = server.initial_adapter()
    state, entry = server.train_round(1, start)
    # (5 * 1 + 3 * 2 + 2 * 6) / 10
    assert all(torch.allclose(state[name], start[name] + 2.3) for name in start)
    assert entry["train_loss"] == pytest.approx((3 * 1 + 2 * 2) / 10)
    assert [c["partition"] for c in entry["clients"]] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fedmedian", 2.0),  # the middle one of 1, 1, 2, 6, 100
        ("fedtrimmedavg", 3.0),  # (1 + 2 + 6) / 3, with one cut off at each end
        ("krum", 1.0),  # the two that are equal are closest to each other
    ],
)
def test_robust_strategies_shrug_off_an_outlier(name, expected, configure, loopback):
    cfg = configure(f"strategy={name}", "num_clients=5", "strategy.fraction_fit=1")
    values = {0: 1.0, 1: 6.0, 2: 100.0, 3: 2.0, 4: 1.0}
    grid = loopback(cfg, fixed_replies(values, dict.fromkeys(values, 1)))
    server = Server(cfg, grid)
    start = server.initial_adapter()
    state, _ = server.train_round(1, start)
    assert all(torch.allclose(state[name], start[name] + expected) for name in start)


@pytest.mark.slow
def test_clipping_bounds_what_one_client_can_do(configure, loopback):
    cfg = configure("num_clients=2", "strategy.fraction_fit=1", "strategy.clip_norm=3")
    tamper = fixed_replies({0: 0.0, 1: 1000.0}, {0: 1, 1: 1})
    server = Server(cfg, loopback(cfg, tamper))
    start = server.initial_adapter()
    state, _ = server.train_round(1, start)
    moved = {name: state[name] - start[name] for name in start}
    length = sum(tensor.square().sum() for tensor in moved.values()).sqrt()
    # Half of what is left of the long one, which is 3, and of the other, which is 0.
    assert length.item() == pytest.approx(1.5, rel=1e-4)
    short = Contribution(0, {}, {"w": torch.tensor([3.0, 4.0])}, weight=1, loss=0.0)
    assert Clip(5.0).arrive(short).update["w"].tolist() == [3.0, 4.0]
    assert Clip(2.5).arrive(short).update["w"].tolist() == [1.5, 2.0]
    assert Clip(None).arrive(short) is short


@pytest.mark.slow
def test_fedprox_reaches_the_clients(configure, loopback):
    cfg = configure("strategy=fedprox", "strategy.proximal_mu=0.25")
    grid = loopback(cfg)
    server = Server(cfg, grid)
    server.train_round(1, server.initial_adapter())
    assert [m.content["config"].get("proximal-mu") for m in grid.sent[-2:]] == [
        0.25
    ] * 2


@pytest.mark.slow
def test_server_optimisers_step_as_in_the_paper(configure, loopback):
    cfg = configure("strategy=fedadam", "num_clients=2", "strategy.fraction_fit=1")
    server = Server(cfg, loopback(cfg))
    start = server.initial_adapter()
    tamper = fixed_replies({0: 1.0, 1: 3.0}, {0: 1, 1: 1})
    server.grid = loopback(cfg, tamper)
    state, _ = server.train_round(1, start)
    delta = 2.0
    momentum, square = 0.1 * delta, 0.01 * delta**2
    # Flower corrects the bias for the round after this one.
    rate = 1e-3 * (1 - 0.99**2) ** 0.5 / (1 - 0.9**2)
    step = rate * momentum / (square**0.5 + 1e-3)
    assert all(torch.allclose(state[k], start[k] + step, atol=1e-7) for k in start)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "fedadam", "fedmedian"])
def test_flower_logs_nothing_of_its_stand_ins(name, configure, caplog):
    """It is given nobody to sample, and the mean as a single reply."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    made = aggregate.build(configure(f"strategy={name}").strategy)
    state = {"a": torch.zeros(3)}
    with caplog.at_level(logging.INFO, logger="flwr"):
        logging.getLogger("flwr").info("is heard")
        made.begin(state, 1)
        for i in range(3):
            made.add(Contribution(i, state, {"a": torch.ones(3)}, weight=1, loss=1.0))
        made.told(1)
        made.apply(made.gathered())
    assert caplog.messages == ["is heard"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"]
)
def test_the_running_mean_equals_the_batch(name, configure):
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    settings = configure(f"strategy={name}")["strategy"]
    generator = torch.Generator().manual_seed(0)

    def random() -> dict[str, torch.Tensor]:
        return {k: torch.randn(5, 7, generator=generator) for k in ("a", "b")}

    start, updates, examples = (
        random(),
        [random() for _ in range(6)],
        [1, 5, 160, 7, 9, 2],
    )
    results = []
    for gather in (aggregate.Mean, aggregate.Mean, aggregate.All):
        gathered = gather(aggregate.build(settings).strategy)
        gathered.begin(start, 1)
        # The second time in reversed order of arrival.
        for i in reversed(range(6)) if len(results) == 1 else range(6):
            gathered.add(Contribution(i, start, updates[i], examples[i], loss=1.0))
        results.append(gathered.apply(gathered.gathered()))
    running, backwards, batch = results
    assert all(torch.equal(running[k], backwards[k]) for k in start)
    assert all(torch.allclose(running[k], batch[k], atol=1e-6) for k in start)
