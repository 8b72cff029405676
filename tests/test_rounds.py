"""pytest tests/test_rounds.py: whole runs with a grid in this process, and what they leave."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

import client
import model
from evaluation import examine
from methods.wire import pack, unpack
from records import templates
from server import rounds as server_rounds
from server.rounds import Server, forget_peak_memory, peak_memory, run
from tasks import generation
from utils import PROJECT

STRATEGIES = sorted(path.stem for path in (PROJECT / "conf/strategy").glob("*.yaml"))


QUESTION = {"instruction": "What is the capital of France?", "input": ""}


METHODS = sorted(
    {path.stem for path in (PROJECT / "conf/peft").glob("*.yaml")} - {"outer"}
)  # which needs an emulator as its base (tests/test_emulator.py)


# How many clients a strategy needs where one of them may be hostile; two are a mean.
NEEDED = {"bulyan": 7, "krum": 5, "multikrum": 5, "fedtrimmedavg": 5}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy_completes_two_rounds(name, configure, loopback, tmp_path):
    count = NEEDED.get(name, 2)
    cfg = configure(
        f"strategy={name}", f"num_clients={count}", "strategy.fraction_fit=1"
    )
    run(cfg, loopback(cfg), tmp_path)
    rounds = json.loads((tmp_path / "history.json").read_text())["rounds"]
    assert [entry["replied"] for entry in rounds] == [count, count]
    assert all(entry["failures"] == [] for entry in rounds)
    assert (tmp_path / "peft_2/adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_each_peft_method_trains_saves_loads_and_answers(
    name, configure, loopback, tmp_path
):
    cfg = configure(
        f"peft={name}", "train.save_every_round=1", "strategy.fraction_fit=0.25"
    )
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
    [answer] = generation.generate(net, tokenizer, [prompt], 3, ends)
    assert isinstance(answer, str)
    ids = torch.tensor([prompt])
    with torch.no_grad(), model.autocast(net):
        tuned = net(input_ids=ids).logits
        with net.disable_adapter():
            base = net(input_ids=ids).logits
    assert not torch.equal(tuned[:, -1], base[:, -1])


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    kept = list((grid.folder / "residuals").glob("*/*.safetensors"))
    assert len(kept) == (2 if dtype == "int8" else 0)


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
    few, configure, loopback, tmp_path, monkeypatch
):
    losses = iter([5.0, 3.0, 4.0, 2.5, 9.0, 8.0])
    monkeypatch.setattr(
        server_rounds.Examination,
        "measure",
        lambda *_: examine.Scores(
            {"test_loss": next(losses)}, questions={"nats": [0.0]}, labels=[]
        ),
    )
    cfg = configure(
        *(few, "num_rounds=6", "evaluate.every_round=1", "train.save_every_round=3"),
        *("strategy.fraction_fit=0.25", "train.training_arguments.max_steps=1"),
    )
    run(cfg, loopback(cfg), tmp_path)
    rounds = json.loads((tmp_path / "history.json").read_text())["rounds"]
    assert [e["best"] for e in rounds] == [True, True, False, True, False, False]
    assert json.loads((tmp_path / "summary.json").read_text())["best_round"] == 4
    saved = {path.name for path in tmp_path.glob("peft_*")}
    assert saved == {"peft_3", "peft_4", "peft_6"}


@pytest.mark.slow
def test_evaluation_comes_every_so_many_rounds_and_at_the_end(
    few, configure, loopback, tmp_path
):
    cfg = configure(
        few,
        "num_rounds=3",
        "evaluate.every_round=2",
        "evaluate.holdout=0.02",
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


@pytest.mark.slow
def test_adapters_are_saved_when_due_and_at_the_end(configure, loopback, tmp_path):
    cfg = configure(
        *("num_rounds=5", "train.save_every_round=2"),
        *("strategy.fraction_fit=0.25", "train.training_arguments.max_steps=1"),
    )
    run(cfg, loopback(cfg), tmp_path)
    saved = sorted(path.name for path in tmp_path.glob("peft_*"))
    assert saved == ["peft_2", "peft_4", "peft_5"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rounds"] == 5
    assert summary["bytes_up"] > 0
    assert (tmp_path / "train_loss.png").read_bytes().startswith(b"\x89PNG")
