"""pytest tests/test_strategy.py: rounds, aggregation and checks, with a grid in-process."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Error, Message
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file

import client
import dataset
import model
from evaluation import examine
from methods import aggregate
from methods.base import Contribution
from methods.steps import Clip
from methods.wire import pack, unpack
from records import templates
from server import cohort
from server import rounds as server_rounds
from server.rounds import RunFailed, Server, forget_peak_memory, peak_memory, run
from utils import PROJECT, Refusal

STRATEGIES = sorted(path.stem for path in (PROJECT / "conf/strategy").glob("*.yaml"))
QUESTION = {"instruction": "What is the capital of France?", "input": ""}
METHODS = sorted(path.stem for path in (PROJECT / "conf/peft").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy_completes_two_rounds(name, configure, loopback, tmp_path):
    cfg = configure(f"strategy={name}", "num_clients=7", "strategy.fraction_fit=1")
    run(cfg, loopback(cfg), tmp_path)
    rounds = json.loads((tmp_path / "history.json").read_text())["rounds"]
    assert [entry["replied"] for entry in rounds] == [7, 7]
    assert all(entry["failures"] == [] for entry in rounds)
    assert (tmp_path / "peft_2/adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_each_peft_method_trains_saves_loads_and_answers(
    name, configure, loopback, tmp_path
):
    cfg = configure(f"peft={name}", "train.save_every_round=1")
    run(cfg, loopback(cfg), tmp_path)
    folder = tmp_path / "peft_2"
    about = model.read_about(str(folder))
    net, tokenizer = model.open_adapter(str(folder), about, torch.device("cpu"))
    [first, second] = [
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("peft_1", "peft_2")
    ]
    assert any(not torch.equal(first[name], second[name]) for name in first)
    prompt = templates.prompt(about["template"], [QUESTION], tokenizer)
    ends = templates.ends(about["template"], tokenizer, net.generation_config)
    [answer] = examine.answer(net, tokenizer, [prompt], 3, ends)
    assert isinstance(answer, str)
    ids = torch.tensor([prompt])
    with torch.no_grad(), model.autocast(net):
        tuned = net(input_ids=ids).logits
        with net.disable_adapter():
            base = net(input_ids=ids).logits
    assert not torch.equal(tuned[:, -1], base[:, -1])


# --- aggregation, against arithmetic done by hand ------------------------------------------------


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


# --- clients that come, go, are late or want no part ------------------------------------------


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
def test_a_client_that_is_late_is_left_out_of_its_round_only(configure, loopback):
    cfg = configure("num_clients=3", "strategy.fraction_fit=1", "train.round_timeout=3")
    grid = loopback(cfg)
    server = Server(cfg, grid)
    state = server.initial_adapter()
    late = sorted(grid.nodes)[1]
    grid.silent = {late}
    state, first = server.train_round(1, state)
    assert first["replied"] == 2
    [failure] = first["failures"]
    assert failure == {
        "partition": 1,
        "cause": "no reply within train.round_timeout=3 s",
    }
    grid.silent = set()
    # This one may take as long as the machine is busy.
    cfg["train"]["round_timeout"] = None
    _, second = server.train_round(2, state)
    assert second["replied"] == 3


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


def test_bytes_are_counted_exactly(configure, loopback):
    cfg = configure()
    grid = loopback(cfg)
    server = Server(cfg, grid)
    start = server.initial_adapter()
    _, entry = server.train_round(1, start)
    sent = [m.content["arrays"] for m in grid.sent if "arrays" in m.content]
    wire = sum(len(array.data) for arrays in sent for array in arrays.values())
    assert entry["bytes_down"] == wire
    weights = sum(value.numel() for value in start.values())
    assert 2 * 2 * weights < entry["bytes_up"] < 1.1 * 2 * 2 * weights  # float16, twice
    assert entry["bytes_up"] == sum(c["bytes_up"] for c in entry["clients"])


def test_fedprox_reaches_the_clients(configure, loopback):
    cfg = configure("strategy=fedprox", "strategy.proximal_mu=0.25")
    grid = loopback(cfg)
    server = Server(cfg, grid)
    server.train_round(1, server.initial_adapter())
    assert [m.content["config"].get("proximal-mu") for m in grid.sent[-2:]] == [
        0.25
    ] * 2


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


def test_every_reply_with_a_first_adapter_is_fetched(configure, loopback):
    cfg = configure("num_clients=3", "strategy.fraction_fit=1")
    grid = loopback(cfg)
    state = Server(cfg, grid).initial_adapter()
    assert len(grid.sent) == 3
    assert grid.waiting == []
    own = client.initial_adapter(cfg)
    assert all(torch.equal(state[name], own[name]) for name in own)


# --- who is asked -------------------------------------------------------------------------------------


def test_sampling_repeats_by_seed_and_counts_down():
    nodes = list(range(20))
    assert cohort.sample(nodes, 2, 5) == cohort.sample(nodes, 2, 5)
    draws = {tuple(cohort.sample(nodes, 2, seed)) for seed in range(50)}
    assert len(draws) > 25
    assert {p for draw in draws for p in draw} == set(range(20))
    sizes = [(20, 0.1), (20, 0.14), (100, 0.29), (3, 0.1), (7, 1.0)]
    assert [cohort.cohort_size(*size) for size in sizes] == [2, 2, 29, 1, 7]


@pytest.mark.slow
def test_a_run_repeats_by_seed_whatever_the_order_of_arrival(
    configure, loopback, tmp_path
):
    cfg = configure("num_clients=3", "strategy.fraction_fit=1")

    class InOrder(loopback):
        def push_messages(self, messages):
            return super().push_messages(messages[::-1])

    weights = []
    for grid in (loopback(cfg), InOrder(cfg)):
        folder = tmp_path / type(grid).__name__
        folder.mkdir()
        run(cfg, grid, folder)
        weights.append((folder / "peft_2/adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


# --- what must not be aggregated -----------------------------------------------------------------------


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


# --- the wire ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 4), ("float16", 2), ("int8", 1)]
)
def test_each_wire_format_trains(dtype, size, configure, loopback):
    cfg = configure(f"comm.dtype={dtype}", "num_clients=2", "strategy.fraction_fit=1")
    grid = loopback(cfg)
    server = Server(cfg, grid)
    start = server.initial_adapter()
    state, entry = server.train_round(1, start)
    assert entry["replied"] == 2
    weights = sum(value.numel() for value in start.values())
    # Scales for rows of 16 values, and a header for each array.
    assert size * weights < entry["bytes_up"] / 2 < 1.25 * size * weights
    received = unpack(pack(start, dtype)[0])
    trained = [client.train(cfg, received, p, 1)[0] for p in (0, 1)]
    for name in start:
        mean = (trained[0][name] + trained[1][name]) / 2 - received[name]
        error = (state[name] - start[name] - mean).abs().max()
        assert error < 0.01 * mean.abs().max()
    kept = list((grid.folder / "residuals").glob("*.safetensors"))
    assert len(kept) == (2 if dtype == "int8" else 0)


# --- evaluation and files -----------------------------------------------------------------------------


@pytest.mark.slow
def test_clients_evaluate_the_new_adapter(configure, loopback, tmp_path):
    cfg = configure("strategy.fraction_evaluate=1", "evaluate.holdout=0.02")
    run(cfg, loopback(cfg), tmp_path)
    rounds = json.loads((tmp_path / "history.json").read_text())["rounds"]
    assert len(rounds) == 2
    for entry in rounds:
        clients = entry["eval_clients"]
        assert [each["partition"] for each in clients] == [0, 1, 2, 3]
        losses = np.array([each["eval_loss"] for each in clients])
        weights = np.array([each["num-examples"] for each in clients])
        mean = (losses * weights).sum() / weights.sum()
        assert entry["eval_loss"] == pytest.approx(mean)
        assert entry["eval_perplexity"] == pytest.approx(math.exp(mean))
        assert entry["eval_loss_worst"] == losses.max()
        assert entry["eval_loss_spread"] == pytest.approx(losses.std())
        assert 0 < entry["eval_accuracy"] < 1
        assert entry["evaluate_failures"] == []


@pytest.mark.slow
def test_a_client_with_few_records_is_neither_worst_nor_spread(
    configure, loopback, tmp_path
):
    cfg = configure("strategy.fraction_evaluate=1", "evaluate.holdout=0.02")

    def shrink(partition: int, reply: Message) -> Message:
        """Client 0's loss is of three records, and the worst."""
        metrics = reply.content.metric_records.get("metrics", {})
        if partition == 0 and "eval_loss" in metrics:
            metrics.update({"num-examples": 3, "eval_loss": 50.0})
        return reply

    run(cfg, loopback(cfg, shrink), tmp_path)
    for entry in json.loads((tmp_path / "history.json").read_text())["rounds"]:
        losses = [c["eval_loss"] for c in entry["eval_clients"][1:]]
        assert entry["eval_clients"][0]["eval_loss"] == 50
        assert entry["eval_loss_worst"] == max(losses)
        assert entry["eval_loss_spread"] == pytest.approx(np.std(losses))
        assert entry["eval_loss"] > max(losses)  # in the mean it has its weight


@pytest.mark.slow
def test_the_best_round_is_marked_and_its_adapter_kept(
    configure, loopback, tmp_path, monkeypatch
):
    losses = iter([5.0, 3.0, 4.0, 2.5, 9.0, 8.0])
    monkeypatch.setattr(
        server_rounds.Examination,
        "measure",
        lambda *_: examine.Scores(
            {"test_loss": next(losses)}, questions={"nats": [0.0]}
        ),
    )
    cfg = configure(
        "num_rounds=6", "evaluate.every_round=1", "train.save_every_round=3"
    )
    run(cfg, loopback(cfg), tmp_path)
    rounds = json.loads((tmp_path / "history.json").read_text())["rounds"]
    assert [e["best"] for e in rounds] == [True, True, False, True, False, False]
    assert json.loads((tmp_path / "summary.json").read_text())["best_round"] == 4
    saved = {path.name for path in tmp_path.glob("peft_*")}
    assert saved == {"peft_3", "peft_4", "peft_6"}


@pytest.fixture
def few(tmp_path) -> str:
    """An override: eight of the quickstart's test questions."""
    lines = (PROJECT / "assets/tiny_qa/test.jsonl").read_text().splitlines()
    (path := tmp_path / "few.jsonl").write_text("\n".join(lines[:8]))
    return f"dataset.test_path={path}"


@pytest.mark.slow
def test_evaluation_comes_every_so_many_rounds_and_at_the_end(
    few, configure, loopback, tmp_path
):
    cfg = configure(
        few,
        "num_rounds=3",
        "evaluate.every_round=2",
        "strategy.fraction_evaluate=0.5",
        "train.training_arguments.max_steps=1",
    )
    run(cfg, loopback(cfg), tmp_path)
    rounds = json.loads((tmp_path / "history.json").read_text())["rounds"]
    assert ["test_loss" in entry for entry in rounds] == [False, True, True]
    assert ["eval_loss" in entry for entry in rounds] == [False, True, True]
    last = rounds[-1]
    assert last["test_perplexity"] == pytest.approx(math.exp(last["test_loss"]))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test_loss_after"] == last["test_loss"] < summary["test_loss_before"]
    assert not (tmp_path / "answers.json").exists()  # nobody asked for them


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc/self/clear_refs")
def test_a_run_does_not_inherit_the_peak_memory_of_the_one_before_it():
    torch.zeros(2**26)  # 256 MiB, of a run that is over
    before = peak_memory()
    forget_peak_memory()
    assert peak_memory() < before - 2**27
    torch.ones(2**26)
    assert peak_memory() > before - 2**27


# --- what a federation is compared with -----------------------------------------------------------------


@pytest.mark.slow
def test_alone_each_client_trains_an_adapter_that_nobody_else_gets(
    few, configure, loopback, tmp_path
):
    overrides = ("mode=local", "strategy=fedadam", "strategy.fraction_evaluate=1")
    cfg = configure(few, *overrides, "evaluate.exact_match=true", "comm.dtype=float32")
    cfg["evaluate"]["max_new_tokens"] = 1
    run(cfg, loopback(cfg), tmp_path)
    start = client.initial_adapter(cfg)
    for partition in range(4):
        state = start
        for number in (1, 2):
            trained, _ = client.train(cfg, state, partition, number)
            # By way of the update, as it travels.
            state = {k: state[k] + (trained[k] - state[k]) for k in state}
        file = f"peft_2/client_{partition}/adapter_model.safetensors"
        saved = load_file(tmp_path / file)
        assert len(saved) == len(state)
        assert all(
            torch.equal(saved[name.replace(".default", "")], state[name])
            for name in state
        )
    summary = json.loads((tmp_path / "summary.json").read_text())
    each = [entry["test_loss"] for entry in summary["clients"]]
    assert len(set(each)) == 4
    assert summary["test_loss_after"] == pytest.approx(np.mean(each))
    # The scores of each question are the clients' means as well.
    told = json.loads((tmp_path / "test_scores.json").read_text())
    for whose, when in (("base", "before"), ("tuned", "after")):
        ratio = sum(told[whose]["nats"]) / sum(told[whose]["tokens"])
        assert summary[f"test_loss_{when}"] == pytest.approx(ratio)
        share = np.mean(told[whose]["f1"])
        assert summary[f"f1_{when}"] == pytest.approx(share)
    [_, last] = json.loads((tmp_path / "history.json").read_text())["rounds"]
    own = client.evaluate(cfg, state, partition=3)
    assert last["eval_clients"][3]["eval_loss"] == own["eval_loss"]


@pytest.mark.slow
def test_centralized_one_takes_the_cohorts_steps_on_everybodys_data(
    configure, loopback, tmp_path
):
    cfg = configure("mode=centralized", "strategy=krum", "strategy.fraction_fit=1")
    assert cfg["train"]["training_arguments"]["max_steps"] == 4 * 2
    rows = dataset.training_rows(cfg, partition=2)
    parts = [dataset.load_partition(cfg, partition) for partition in range(4)]
    assert [*rows] == [row for part in parts for row in part]
    run(cfg, loopback(cfg), tmp_path)
    rounds = json.loads((tmp_path / "history.json").read_text())["rounds"]
    for entry in rounds:
        assert entry["replied"] == 1
        assert entry["clients"][0]["num-examples"] == 4 * 2 * 4


def test_centralized_by_epochs_as_many_passes_as_the_cohort_makes(configure):
    epochs = "train.training_arguments.max_steps=-1"
    cfg = configure("mode=centralized", "strategy.fraction_fit=0.5", epochs)
    arguments = cfg["train"]["training_arguments"]
    assert (arguments["max_steps"], arguments["num_train_epochs"]) == (-1, 0.5)


def test_nothing_that_is_held_back_is_pooled(configure):
    cfg = configure("mode=centralized", "strategy.fraction_evaluate=1")
    trained = [str(row) for row in dataset.training_rows(cfg, partition=0)]
    for partition in range(4):
        rows = dataset.load_partition(cfg, partition)
        _, held = dataset.hold_out(rows, cfg["evaluate"]["holdout"], cfg["seed"])
        assert not {str(row) for row in held} & set(trained)


def test_adapters_are_saved_when_due_and_at_the_end(configure, loopback, tmp_path):
    cfg = configure("num_rounds=5", "train.save_every_round=2")
    run(cfg, loopback(cfg), tmp_path)
    saved = sorted(path.name for path in tmp_path.glob("peft_*"))
    assert saved == ["peft_2", "peft_4", "peft_5"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rounds"] == 5
    assert summary["bytes_up"] > 0
    assert (tmp_path / "train_loss.png").read_bytes().startswith(b"\x89PNG")
