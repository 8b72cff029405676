"""pytest tests/test_methods.py: the parts that a federated method is made of."""

import pytest
import torch
from safetensors.torch import load_file

import client
from methods import aggregate, sharing
from methods.base import Contribution, Step, Steps, adapters
from methods.store import Kept
from methods.wire import Wire
from server.rounds import Server


class Half(sharing.Adapter):
    """Trains and sends the B half alone (FFA, arXiv 2403.12313); A is everybody's first."""

    def trains(self, names, server_round):
        return [name for name in names if "lora_B" in name]


class Personal(sharing.Adapter):
    """Shares the A half (FedSA, arXiv 2410.01463); each client keeps a B of its own."""

    def __init__(self):
        super().__init__(stays=["lora_B"])


@pytest.fixture
def configured(configure, monkeypatch):
    """Makes a configuration of two clients with a method of this file."""

    def make(kind: type) -> dict:
        monkeypatch.setattr(sharing, kind.__name__, kind, raising=False)
        cfg = configure(
            "num_clients=2", "strategy.fraction_fit=1", "comm.dtype=float32"
        )
        cfg["sharing"] = {"_target_": f"methods.sharing.{kind.__name__}"}
        return cfg

    return make


def changed(state: dict, start: dict) -> set[str]:
    return {name for name in start if not torch.equal(state[name], start[name])}


@pytest.mark.slow
def test_what_is_not_trained_stays_and_what_is_not_sent_costs_nothing_up(
    configured, loopback
):
    cfg = configured(Half)
    server = Server(cfg, loopback(cfg))
    start = server.initial_adapter()
    state, entry = server.train_round(1, start)
    assert entry["failures"] == []
    halves = {name for name in start if "lora_B" in name}
    assert changed(state, start) == halves
    assert list(state) == list(start)  # all that the adapter holds
    trained, _ = client.train(cfg, start, 0, 1)
    assert changed(trained, start) == halves
    sizes = [start[name].nbytes for name in halves]
    assert sum(sizes) < entry["bytes_up"] / 2 < sum(sizes) + 200 * len(sizes)


@pytest.mark.slow
def test_what_stays_with_a_client_is_its_own_from_round_to_round(configured, loopback):
    cfg = configured(Personal)
    grid = loopback(cfg)
    server = Server(cfg, grid)
    start = server.initial_adapter()
    first, _ = server.train_round(1, start)
    second, entry = server.train_round(2, first)
    assert entry["failures"] == []
    shared = {name for name in start if "lora_A" in name}
    assert changed(second, start) <= shared
    for partition in (0, 1):
        own, _ = client.train(cfg, start, partition, 1)
        whole = {k: first[k] if k in shared else own[k] for k in start}
        after, _ = client.train(cfg, whole, partition, 2)
        [kept] = (grid.folder / "residuals").glob(f"{partition}/own-000002.*")
        stayed = load_file(kept)
        assert stayed.keys() == start.keys() - shared
        assert all(torch.equal(stayed[name], after[name]) for name in stayed)


def test_alone_each_has_its_own_adapter():
    start = {"w": torch.zeros(2)}
    alone = aggregate.build({"_target_": "methods.aggregate.Alone"})
    state = alone.start(start, 2)
    alone.begin(state, 1)
    alone.add(Contribution(1, start, {"w": torch.ones(2)}, weight=3, loss=1.0))
    state = alone.apply(alone.gathered())
    assert alone.down(state, 0)["w"].tolist() == [0, 0]
    assert alone.down(state, 1)["w"].tolist() == [1, 1]
    assert adapters(state).keys() == {"client_0", "client_1"}
    assert adapters(start) == {"": start}
    assert not alone.linear


def test_steps_are_undone_in_reverse(tmp_path):
    class Times(Step):
        def leave(self, update, kept):
            return {"w": update["w"] * 2}

        def total(self, mean, count):
            return {"w": mean["w"] / 2}

    class Plus(Step):
        def leave(self, update, kept):
            return {"w": update["w"] + 1}

        def total(self, mean, count):
            return {"w": mean["w"] - 1}

    steps = Steps(Times(), Plus())
    sent = steps.leave({"w": torch.tensor([3.0])}, None)
    assert sent["w"].item() == 7
    assert steps.total(sent, 1)["w"].item() == 3


def test_the_wire_keeps_what_int8_leaves_out(tmp_path):
    update = {"w": torch.tensor([[1.0, 0.004]])}
    packed = Wire("int8").leave(update, Kept(tmp_path, 0, 1))
    left = Kept(tmp_path, 0, 2).load("residual")
    assert left["w"][0, 1].item() == pytest.approx(
        0.004 - packed["w:scale"].item(), 1e-4
    )
    Wire("float16").leave(update, Kept(tmp_path, 1, 1))
    assert Kept(tmp_path, 1, 2).load("residual") is None


def test_a_momentum_is_declared_and_recalled():
    node = {
        "_target_": "flwr.serverapp.strategy.FedAvgM",
        "server_momentum": 0.5,
    }
    start = {"b": torch.zeros(2), "a": torch.ones(3)}
    update = {name: torch.full_like(tensor, 0.25) for name, tensor in start.items()}

    def play(made, state):
        made.begin(state, 1)
        made.add(Contribution(0, state, update, weight=1, loss=1.0))
        return made.apply(made.gathered())

    one, other = aggregate.build(node), aggregate.build(node)
    state = play(one, start)
    memory = one.memory()
    assert memory.keys() == {"momentum_vector"}
    assert list(memory["momentum_vector"]) == ["b", "a"]
    other.recall(memory)
    whole, again = play(one, state), play(other, state)
    assert all(torch.equal(whole[name], again[name]) for name in start)
    # 0.25, and then 0.25 with half of the first.
    assert whole["b"].tolist() == [0.625, 0.625]
    other.recall({})
    assert other.memory() == {}
