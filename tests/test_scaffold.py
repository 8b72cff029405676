"""pytest tests/test_scaffold.py: SCAFFOLD, against its paper's algorithm done by hand."""

import json

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message
from safetensors.torch import load_file

import client
import dataset
import model
import tasks
from assets.testbed.adapters import same
from assets.testbed.loopback import killed_in
from compute.loss import answer_loss
from methods import aggregate, scaffold
from methods.base import Contribution
from methods.store import Kept
from server import rounds
from server.rounds import Server
from settings import plan
from utils import Refusal, UserError, mix_seed

pytestmark = pytest.mark.usefixtures("in_float32")

SCAFFOLD = (
    "strategy=scaffold",
    "num_clients=2",
    "strategy.fraction_fit=1",
    "comm.dtype=float32",
    "train.learning_rate_max=0.5",
    "train.learning_rate_min=0.5",
    "+train.training_arguments.optim=sgd",
    "+train.training_arguments.max_grad_norm=0",
    "model.quantization=null",
)


def batches(cfg: dict, partition: int, number: int) -> list:
    """What a client trains on in a round, a batch a step."""
    tokenizer = client._tokenizer(cfg)
    seed = mix_seed(cfg.seed, "train", partition, number)
    steps, size = (
        cfg.train.training_arguments[name]
        for name in ("max_steps", "per_device_train_batch_size")
    )
    examples, _ = dataset.draw(
        dataset.training_rows(cfg, partition),
        lambda row: client._encode(cfg, tasks.build(cfg), tokenizer, row),
        seed,
        examples=steps * size,
    )
    examples = dataset.group_by_length(examples, size, seed)
    collate = tasks.build(cfg).collator(tokenizer, cfg.train.padding_side)
    return [collate(examples[i : i + size]) for i in range(0, len(examples), size)]


def by_hand(cfg: dict, x: dict, count: int) -> tuple[dict, dict]:
    """x and c after `count` rounds of algorithm 1 of the paper, option II, everybody in."""
    net = client._load(cfg, x).train()
    rate = cfg.train.learning_rate_max
    c = {k: torch.zeros_like(v) for k, v in x.items()}
    own = [dict(c) for _ in range(cfg.num_clients)]
    for number in range(1, count + 1):
        moved, changed = [], []
        for i in range(cfg.num_clients):
            model.set_adapter_state(net, x)
            steps = batches(cfg, i, number)
            trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
            for batch in steps:
                net.zero_grad()
                answer_loss(net, batch).backward()
                with torch.no_grad():
                    for name, p in trained.items():
                        p -= rate * (p.grad - own[i][name] + c[name])
            y = model.adapter_state(net)
            new = {k: own[i][k] - c[k] + (x[k] - y[k]) / (len(steps) * rate) for k in x}
            moved.append({k: y[k] - x[k] for k in x})
            changed.append({k: new[k] - own[i][k] for k in x})
            own[i] = new
        x = {k: x[k] + sum(one[k] for one in moved) / len(moved) for k in x}
        c = {k: c[k] + sum(one[k] for one in changed) / cfg.num_clients for k in x}
    return x, c


@pytest.mark.slow
def test_two_rounds_are_those_of_the_paper(configure, loopback):
    cfg = configure(*SCAFFOLD, "train.training_arguments.max_steps=3")
    server = Server(cfg, loopback(cfg))
    start = server.initial_adapter()
    state = start
    for number in (1, 2):
        state, _ = server.train_round(number, state)
    wanted, control = by_hand(cfg, start, 2)
    for name in start:
        torch.testing.assert_close(state[name], wanted[name], rtol=1e-6, atol=1e-6)
        found = server.aggregation.control[name]
        torch.testing.assert_close(found, control[name], rtol=1e-6, atol=1e-6)
    size = max(tensor.abs().max() for tensor in control.values())
    assert size > 1e-3  # or nothing would be told
    # What the correction does is seen: without it the second round ends elsewhere.
    plain = configure(*SCAFFOLD[1:], "train.training_arguments.max_steps=3")
    other = Server(plain, loopback(plain))
    once, _ = other.train_round(1, start)
    twice, _ = other.train_round(2, once)
    assert max((twice[k] - state[k]).abs().max() for k in state) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_c_is_the_mean_of_what_clients_keep(dtype, configure, loopback, tmp_path):
    """Whoever takes part, and whatever is lost to the wire."""
    cfg = configure(
        "strategy=scaffold", f"comm.dtype={dtype}", "strategy.sampling=random"
    )
    server = Server(cfg, loopback(cfg, folder=tmp_path))
    state = server.initial_adapter()
    for number in (1, 2, 3):
        state, _ = server.train_round(number, state)
    kept = [Kept(tmp_path / "residuals", i, 4).load("control") for i in range(4)]
    assert any(kept)
    for name, found in server.aggregation.control.items():
        told = [one[name].double() for one in kept if one]
        mean = sum(told) / cfg.num_clients
        torch.testing.assert_close(found.double(), mean, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_the_first_round_is_fedavgs(configure, loopback):
    ends = []
    for name in ("scaffold", "fedavg"):
        cfg = configure(f"strategy={name}")
        server = Server(cfg, loopback(cfg))
        ends.append(server.train_round(1, server.initial_adapter())[0])
    assert same(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ffa", "rolora", "fedsa"])
def test_only_what_is_sent_of_the_adapter_has_a_control_variate(
    name, configure, loopback
):
    cfg = configure("strategy=scaffold", f"sharing={name}")
    grid = loopback(cfg)
    server = Server(cfg, grid)
    state = server.initial_adapter()
    for number in (1, 2):
        state, entry = server.train_round(number, state)
        assert entry["failures"] == []
        sent = {*server.sharing.goes(state.keys(), number)}
        told = {*grid.sent[-1].content["control"]}
        assert told == sent < state.keys()
    moved = {k for k, v in server.aggregation.control.items() if v.any()}
    assert moved
    assert moved <= {k for n in (1, 2) for k in server.sharing.goes(state.keys(), n)}


@pytest.mark.slow
def test_every_byte_of_c_is_counted(configure, loopback):
    cfg = configure("strategy=scaffold")
    grid = loopback(cfg)
    server = Server(cfg, grid)
    start = server.initial_adapter()
    before = len(grid.sent)
    _, entry = server.train_round(1, start)
    sent = [
        array
        for message in grid.sent[before:]
        for arrays in message.content.array_records.values()
        for array in arrays.values()
    ]
    assert entry["bytes_down"] == sum(len(array.data) for array in sent)
    assert entry["bytes_down"] == sum(c["bytes_down"] for c in entry["clients"])
    values = sum(tensor.numel() for tensor in start.values())
    for way in ("bytes_down", "bytes_up"):  # float16, adapter and control, two clients
        assert 8 * values < entry[way] < 1.1 * 8 * values
    told = dict(plan.plan(cfg))["bytes a round"]
    assert told.startswith(plan._bytes(8 * values))


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_bits(configure, loopback, tmp_path):
    cfg = configure("strategy=scaffold", "num_rounds=3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    rounds.run(cfg, loopback(cfg, folder=whole), whole)
    killed_in(cfg, parts, replies=6)  # both of the third round have trained
    again = cfg | {"resume": str(parts)}
    rounds.run(again, loopback(again, folder=parts), parts)
    one, other = (
        load_file(folder / "peft_3/adapter_model.safetensors")
        for folder in (whole, parts)
    )
    assert same(one, other)
    kept = [
        load_file(folder / "checkpoints/000003/strategy.safetensors")
        for folder in (whole, parts)
    ]
    assert kept[0]
    assert same(*kept)
    losses = [
        [
            e["train_loss"]
            for e in json.loads((f / "history.json").read_text())["rounds"]
        ]
        for f in (whole, parts)
    ]
    assert losses[0] == losses[1]


# --- what comes from the other side ---------------------------------------------------------


def lose(record: ArrayRecord) -> None:
    del record[next(iter(record))]


def add(record: ArrayRecord) -> None:
    record["more"] = Array(torch.ones(2).numpy())


def turn(record: ArrayRecord) -> None:
    name = next(iter(record))
    record[name] = Array(record[name].numpy().T)


def poison(record: ArrayRecord) -> None:
    name = next(iter(record))
    record[name] = Array(record[name].numpy() * float("nan"))


def grow(record: ArrayRecord) -> None:
    name = next(iter(record))
    record[name] = Array(record[name].numpy() * 0 + 6e4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("break_", "cause"),
    [
        (None, "it holds no control"),
        (lose, "missing or unknown"),
        (add, "1 unknown tensors"),
        (turn, "has shape other than"),
        (poison, "not finite"),
    ],
)
def test_a_broken_control_variate_is_left_out(break_, cause, configure, loopback):
    cfg = configure("strategy=scaffold", "num_clients=2", "strategy.fraction_fit=1")

    def tamper(partition: int, reply: Message) -> Message:
        if partition == 1 and "control" in reply.content:
            if break_ is None:
                del reply.content["control"]
            else:
                break_(reply.content["control"])
        return reply

    server = Server(cfg, loopback(cfg, tamper))
    _, entry = server.train_round(1, server.initial_adapter())
    assert entry["replied"] == 1
    [failure] = entry["failures"]
    assert cause in failure["cause"]


@pytest.mark.slow
def test_a_control_variate_that_could_not_be_sent_on_is_left_out(configure, loopback):
    cfg = configure("strategy=scaffold", "num_clients=2", "strategy.fraction_fit=1")

    def tamper(partition: int, reply: Message) -> Message:
        if partition == 1 and "control" in reply.content:
            grow(reply.content["control"])
        return reply

    server = Server(cfg, loopback(cfg, tamper))
    state = server.initial_adapter()
    replied = []
    for number in (1, 2, 3, 4):
        state, entry = server.train_round(number, state)
        replied.append(entry["replied"])
    # 0 and 60000, then 30000 and 90000, which is beyond float16's 65504.
    assert replied == [2, 1, 1, 1]
    assert "beyond comm.dtype=float16" in entry["failures"][0]["cause"]


def test_a_client_takes_no_broken_control_variate(tmp_path):
    kept = Kept(tmp_path, 0, 1)
    adapter = {"w": torch.ones(2, 3)}
    for wrong in ({"v": torch.ones(2, 3)}, {"w": torch.ones(3, 2)}):
        with pytest.raises(Refusal, match="do not fit the adapter"):
            scaffold.correction(wrong, adapter, kept)
    with pytest.raises(UserError, match="not finite"):
        scaffold.correction({"w": torch.full((2, 3), torch.inf)}, adapter, kept)
    assert scaffold.correction({}, adapter, kept) == {}


@pytest.mark.parametrize("clip", ["clip_norm", "clip_weights"])
def test_clipping_beside_it_is_refused(clip, configure):
    with pytest.raises(UserError, match=rf"{clip}=1.*Set strategy.{clip}=null"):
        configure("strategy=scaffold", f"strategy.{clip}=1")


def test_the_order_of_arrival_leaves_no_trace():
    state = {"w": torch.randn(5, 7, generator=torch.Generator().manual_seed(0))}
    replies = [
        Contribution(
            i,
            state,
            {"w": torch.randn(5, 7)},
            i + 1,
            1.0,
            beside={"w": torch.randn(5, 7)},
        )
        for i in range(5)
    ]
    ends = []
    for order in (replies, replies[::-1]):
        made = aggregate.Scaffold(clients=8)
        made.begin(state, 1)
        for one in order:
            made.add(one)
        ends.append((made.apply(made.gathered())["w"], made.control["w"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    total = sum(one.beside["w"].double() for one in replies)
    torch.testing.assert_close(ends[0][1].double(), total / 8, rtol=1e-6, atol=1e-7)
