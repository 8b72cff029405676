"""pytest tests/test_exchange.py: clients that come, go, are late, want no part, or answer what is no use."""

import json
import math
import time

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message

import client
import dataset
import model
from server.rounds import RunFailed, Server, run
from utils import Refusal


@pytest.mark.slow
def test_a_client_that_refuses_is_not_asked_again(configure, loopback, capsys):
    cfg = configure("num_clients=3", "num_rounds=3", "strategy.fraction_fit=1")

    def refuse(partition: int, reply: Message) -> Message:
        if partition != 1 or "metrics" not in reply.content:
            return reply
        reason = "it has 3 records, and train.min_records=10"
        return Message(Error(Refusal.code, reason), reply_to=asked[reply])

    grid = loopback(cfg, refuse)
    asked = Asked(grid)
    server = Server(cfg, grid)
    state = server.initial_adapter()
    entries = []
    for number in (1, 2, 3):
        state, entry = server.train_round(number, state)
        entries.append(entry)
    assert [entry["sampled"] for entry in entries] == [3, 2, 2]
    assert [len(entry["failures"]) for entry in entries] == [1, 0, 0]
    assert capsys.readouterr().out.count("it has 3 records") == 1
    assert [c["partition"] for c in entries[2]["clients"]] == [0, 2]


class Asked:
    """The message that a reply answers, by the reply."""

    def __init__(self, grid) -> None:
        self.grid = grid

    def __getitem__(self, reply: Message) -> Message:
        answered = reply.metadata.reply_to_message_id
        return next(m for m in self.grid.sent if m.metadata.message_id == answered)


def broken_in(grid, partitions: set[int]) -> None:
    """Let these clients of a grid send an error in the place of a trained adapter."""

    def fail(partition: int, reply: Message) -> Message:
        if partition not in partitions or "metrics" not in reply.content:
            return reply
        return Message(Error(2, "RuntimeError: broken"), reply_to=Asked(grid)[reply])

    grid.tamper = fail


@pytest.mark.slow
def test_a_round_with_too_few_replies_is_repeated_with_others(configure, loopback):
    cfg = configure(
        "num_clients=4", "strategy.fraction_fit=0.5", "strategy.min_fit_replies=2"
    )
    grid = loopback(cfg)
    server = Server(cfg, grid)
    state = server.initial_adapter()
    first = {
        server.clients.partitions[n] for n in server.clients.sample("fraction_fit", 1)
    }
    broken_in(grid, {min(first)})
    _, entry = server.train_round(1, state)
    assert {c["partition"] for c in entry["clients"]} == {0, 1, 2, 3} - first
    assert entry["retries"] == 1
    assert entry["failures"] == [
        {"partition": min(first), "cause": "RuntimeError: broken"}
    ]


@pytest.mark.slow
def test_a_round_that_fails_too_often_ends_the_run_with_all_before_saved(
    configure, loopback, tmp_path, capsys
):
    cfg = configure(
        "num_clients=3",
        "num_rounds=4",
        "strategy.fraction_fit=0.7",
        "strategy.min_fit_replies=2",
        "strategy.max_round_retries=1",
    )
    grid = loopback(cfg)
    trained = []

    def fail_later(partition: int, reply: Message) -> Message:
        trained.append("metrics" in reply.content)
        if sum(trained) == 2 * 2 + 1:  # two clients a round: the first reply of round 3
            broken_in(grid, {0, 1, 2})
            return grid.tamper(partition, reply)
        return reply

    grid.tamper = fail_later
    with pytest.raises(RunFailed) as failure:
        run(cfg, grid, tmp_path)
    told = str(failure.value)
    assert "Round 3 failed 2 times (strategy.max_round_retries=1)" in told
    assert "RuntimeError: broken" in told
    assert f"Go on after round 2 with: python main.py resume={tmp_path}" in told
    assert (tmp_path / "peft_2/adapter_model.safetensors").is_file()
    # With the fault mended, the run goes on and ends.
    again = cfg | {"resume": str(tmp_path)}
    run(again, loopback(again), tmp_path)
    history = json.loads((tmp_path / "history.json").read_text())["rounds"]
    assert [entry["replied"] for entry in history] == [2, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("break_", "cause"),
    [
        (lambda content: content["metrics"].pop("num-examples"), "num-examples"),
        (lambda content: content["metrics"].pop("train_loss"), "lack train_loss"),
        (
            lambda content: content["metrics"].update({"num-examples": -5}),
            "its num-examples is not within 1 and",
        ),
        (
            lambda content: content["metrics"].update({"train_loss": float("nan")}),
            "its train_loss is not within 0 and 10000",
        ),
    ],
)
def test_a_reply_with_broken_figures_is_left_out(break_, cause, configure, loopback):
    cfg = configure("num_clients=2", "strategy.fraction_fit=1")

    def tamper(partition: int, reply: Message) -> Message:
        if partition == 1 and "metrics" in reply.content:
            break_(reply.content)
        return reply

    server = Server(cfg, loopback(cfg, tamper))
    _, entry = server.train_round(1, server.initial_adapter())
    assert entry["replied"] == 1
    [failure] = entry["failures"]
    assert cause in failure["cause"]


@pytest.mark.slow
def test_a_client_that_is_late_is_left_out_of_its_round_only(configure, loopback):
    cfg = configure("num_clients=3", "strategy.fraction_fit=1")
    grid = loopback(cfg)
    server = Server(cfg, grid)
    state = server.initial_adapter()
    began = time.monotonic()
    state, _ = server.train_round(1, state)
    # As long as the other two are sure to need less, however busy the machine is.
    limit = 3 + math.ceil(3 * (time.monotonic() - began))
    cfg["train"]["round_timeout"] = limit
    grid.silent = {sorted(grid.nodes)[1]}
    state, late = server.train_round(2, state)
    assert late["replied"] == 2
    [failure] = late["failures"]
    assert failure == {
        "partition": 1,
        "cause": f"no reply within train.round_timeout={limit} s",
    }
    grid.silent = set()
    cfg["train"]["round_timeout"] = None
    _, after = server.train_round(3, state)
    assert after["replied"] == 3


@pytest.mark.slow
def test_nodes_may_leave_and_join_between_rounds(configure, loopback, capsys):
    cfg = configure("num_clients=4", "strategy.fraction_fit=1")
    grid = loopback(cfg)
    grid.nodes.pop()
    server = Server(cfg | {"num_clients": 3}, grid, {"run": "first"})
    state = server.initial_adapter()
    gone = sorted(grid.nodes)[0]
    grid.nodes = [node for node in grid.nodes if node != gone]
    state, entry = server.train_round(1, state)
    assert [c["partition"] for c in entry["clients"]] == [1, 2]
    # Back under another id, as a SuperNode without a key comes.
    grid.nodes = [7, *grid.nodes]
    _, entry = server.train_round(2, state)
    assert [c["partition"] for c in entry["clients"]] == [1, 2, 3]
    assert "Client 3 is node 7." in capsys.readouterr().out


@pytest.mark.slow
def test_a_node_that_leaves_before_it_is_asked_costs_its_reply_only(
    configure, loopback
):
    cfg = configure("num_clients=3", "strategy.fraction_fit=1")
    grid = loopback(cfg)
    server = Server(cfg, grid)
    state = server.initial_adapter()
    everybody = [*grid.nodes]
    grid.get_node_ids = lambda: everybody  # the list is a moment old
    grid.nodes = sorted(everybody)[1:]
    _, entry = server.train_round(1, state)
    assert entry["replied"] == 2
    assert entry["failures"] == [{"partition": 0, "cause": "it is no longer connected"}]


@pytest.mark.slow
def test_every_reply_with_a_first_adapter_is_fetched(configure, loopback):
    cfg = configure("num_clients=3", "strategy.fraction_fit=1")
    grid = loopback(cfg)
    state = Server(cfg, grid).initial_adapter()
    assert len(grid.sent) == 3
    assert grid.waiting == []
    own = client.initial_adapter(cfg)
    assert all(torch.equal(state[name], own[name]) for name in own)


def spoil(partition: int, how):
    """A `tamper` that changes what one partition sends back after training."""

    def tamper(sender: int, reply: Message) -> Message:
        if sender == partition and "metrics" in reply.content:
            state = reply.content["arrays"].to_torch_state_dict()
            reply.content["arrays"] = ArrayRecord(how(state))
        return reply

    return tamper


def poison(state: dict) -> dict:
    next(iter(state.values())).view(-1)[0] = float("nan")
    return state


def rename(state: dict) -> dict:
    return {f"{name}.evil": value for name, value in state.items()}


def reshape(state: dict) -> dict:
    return {name: value.T.contiguous() for name, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "cause"),
    [(poison, "not finite"), (rename, "unknown"), (reshape, "has shape")],
)
def test_an_unusable_reply_is_left_out_and_named(
    how, cause, configure, loopback, capsys
):
    cfg = configure("num_clients=3", "strategy.fraction_fit=1", "comm.dtype=float32")
    server = Server(cfg, loopback(cfg, spoil(1, how)))
    start = server.initial_adapter()
    state, entry = server.train_round(1, start)
    assert all(torch.isfinite(value).all() for value in state.values())
    assert (entry["sampled"], entry["replied"]) == (3, 2)
    [failure] = entry["failures"]
    assert failure["partition"] == 1
    assert cause in failure["cause"]
    printed = capsys.readouterr().out
    assert printed.count(cause) == 1
    assert "round 1: left out client 1" in printed
    # The aggregate is the mean of the other two, who trained on equally many.
    [first, third] = [client.train(cfg, start, partition, 1)[0] for partition in (0, 2)]
    name = next(iter(state))
    assert torch.allclose(state[name], (first[name] + third[name]) / 2, atol=1e-6)


@pytest.mark.slow
def test_a_run_without_usable_replies_fails_and_keeps_what_it_had(
    configure, loopback, tmp_path
):
    cfg = configure("num_rounds=3", "train.save_every_round=5")

    def tamper(partition: int, reply: Message) -> Message:
        late = grid.sent[-1].content["config"].get("server-round") == 2
        return spoil(partition, poison)(partition, reply) if late else reply

    grid = loopback(cfg, tamper)
    with pytest.raises(RunFailed, match=r"Round 2 failed 3 times .* not finite"):
        run(cfg, grid, tmp_path)
    rounds = json.loads((tmp_path / "history.json").read_text())["rounds"]
    assert [entry["round"] for entry in rounds] == [1]
    assert model.read_about(str(tmp_path / "peft_1"))["round"] == 1
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.slow
def test_an_exception_on_a_client_is_told_in_one_line(
    configure, loopback, capsys, monkeypatch
):
    cfg = configure("num_clients=3", "strategy.fraction_fit=1")
    server = Server(cfg, loopback(cfg))
    start = server.initial_adapter()
    load = dataset.load_partition

    def broken(cfg: dict, partition: int):
        if partition == 1:
            raise OSError("the disk is gone")
        return load(cfg, partition)

    monkeypatch.setattr(dataset, "load_partition", broken)
    _, entry = server.train_round(1, start)
    assert entry["replied"] == 2
    [told] = capsys.readouterr().out.splitlines()
    assert told == "round 1: left out client 1: OSError: the disk is gone"
