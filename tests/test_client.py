"""pytest tests/test_client.py: one client's round, without Flower."""

import copy
import json

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

import client
import dataset
import model
import tasks
from assets.testbed.adapters import same
from records import batches, templates
from utils import IGNORED, Settings

CONSTANT_RATE = "+train.training_arguments.learning_rate=1e-3"


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [4, 8, "null"])
def test_training_moves_the_adapter_and_not_the_base(quantization, configure):
    cfg = configure(f"model.quantization={quantization}")
    start = client.initial_adapter(cfg)
    net = model.build_once(
        cfg["model"], cfg["peft"], cfg["seed"], model.default_device()
    )
    frozen = {n: p.clone() for n, p in net.named_parameters() if not p.requires_grad}
    state, metrics = client.train(cfg, start, partition=0, server_round=1)
    after = dict(net.named_parameters())
    assert all(torch.equal(before, after[name]) for name, before in frozen.items())
    assert state.keys() == start.keys()
    moved = [not torch.equal(state[name], start[name]) for name in state]
    # In its first step LoRA's A has no gradient, because B is zero; in two, all move.
    assert all(moved)
    assert metrics["num-examples"] == 8
    assert metrics["dropped"] == 0
    assert metrics["train_loss"] > 0


@pytest.mark.slow
def test_what_a_client_trained_from_is_counted(configure, tmp_path):
    short = {"instruction": "q", "input": "", "output": "a"}
    long = short | {"output": "word " * 200}
    records = [*[short] * 6, *[long] * 2, short | {"output": " "}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    cfg = configure(
        f"dataset=local dataset.path={tmp_path}/data.jsonl num_clients=1 "
        "partitioner=iid strategy.fraction_fit=1 train.training_arguments.max_steps=-1"
    )
    tokenizer = model.load_tokenizer("assets/tiny_llama")
    one = len(templates.encode(short, "alpaca", tokenizer, 128)["input_ids"])
    assert one < 128
    _, metrics = client.train(cfg, client.initial_adapter(cfg), 0, server_round=1)
    counted = ("records", "num-examples", "truncated", "dropped", "tokens")
    assert [metrics[name] for name in counted] == [9, 8, 2, 1, 6 * one + 2 * 128]
    cfg["evaluate"]["holdout"] = 0.9  # of one question, so as records come
    cfg["strategy"]["fraction_evaluate"] = 1.0
    metrics = client.evaluate(cfg, client.initial_adapter(cfg), 0)
    rows = dataset.split(cfg, dataset.load_partition(cfg, 0))[1]["output"]
    assert metrics["num-examples"] == sum(bool(text.strip()) for text in rows)
    assert metrics["dropped"] == rows[:].count(" ")
    assert metrics["truncated"] == rows[:].count(long["output"])


@pytest.mark.slow
def test_a_reused_model_carries_nothing_over(configure):
    cfg = configure("model.lora.peft_lora_dropout=0.1", "evaluate.holdout=0.02")
    start = client.initial_adapter(cfg)
    model.forget()
    fresh, _ = client.train(cfg, start, partition=1, server_round=2)
    for other in range(10):
        client.train(cfg, start, other % 4, server_round=3 + other)
    client.evaluate(cfg, start, partition=3)
    reused, _ = client.train(cfg, start, partition=1, server_round=2)
    assert same(fresh, reused)


@pytest.mark.slow
def test_a_model_that_was_evaluated_still_trains(configure):
    # bitsandbytes repacks 4-bit weights in an eval() forward on some processors, and
    # what is trained afterwards loses its gradients without a word.
    cfg = configure("evaluate.holdout=0.02")
    start = client.initial_adapter(cfg)
    model.forget()
    fresh, _ = client.train(cfg, start, partition=0, server_round=1)
    model.forget()
    client.evaluate(cfg, start, partition=0)
    evaluated, _ = client.train(cfg, start, partition=0, server_round=1)
    assert same(fresh, evaluated)
    assert not same(evaluated, start)


@pytest.mark.slow
def test_data_order_differs_by_client_and_round_and_repeats_by_seed(
    configure, monkeypatch
):
    seen = []
    collate = batches.Collator.__call__
    monkeypatch.setattr(
        batches.Collator,
        "__call__",
        lambda self, examples: seen.append(str(examples)) or collate(self, examples),
    )
    cfg = configure()
    start = client.initial_adapter(cfg)

    def order(partition: int, server_round: int, cfg: dict = cfg) -> str:
        seen.clear()
        client.train(cfg, start, partition, server_round)
        return "".join(seen)

    first = order(0, 1)
    assert order(0, 1) == first
    assert order(0, 2) != first
    assert order(1, 1) != first
    assert order(0, 1, cfg | {"seed": cfg.seed + 1}) != first


@pytest.mark.slow
def test_learning_rate_follows_a_cosine_over_the_rounds(configure):
    cfg = configure(
        "num_rounds=5", "train.learning_rate_max=1e-3", "train.learning_rate_min=1e-4"
    )
    rates = [client.training_arguments(cfg, r, 0).learning_rate for r in range(1, 6)]
    # cos(0), cos(36 degrees), cos(72), cos(108), cos(144): the sixth would be the minimum
    by_hand = [1e-3, 9.14058e-4, 6.89058e-4, 4.10942e-4, 1.85942e-4]
    assert rates == pytest.approx(by_hand, rel=1e-5)
    assert client.training_arguments(cfg, 1, 0).lr_scheduler_type == "constant"


@pytest.mark.slow
def test_the_last_round_of_a_short_run_still_learns(configure):
    cfg = configure("num_rounds=2", "train.learning_rate_max=1e-3")
    cfg["train"]["learning_rate_min"] = 0
    rates = [client.training_arguments(cfg, r, 0).learning_rate for r in (1, 2)]
    assert rates == pytest.approx([1e-3, 5e-4])
    cfg["num_rounds"] = 1
    assert client.training_arguments(cfg, 1, 0).learning_rate == 1e-3


@pytest.mark.slow
def test_a_learning_rate_of_ones_own_replaces_the_cosine(configure):
    cfg = configure(CONSTANT_RATE)
    assert [client.training_arguments(cfg, r, 0).learning_rate for r in (1, 2)] == [
        1e-3,
        1e-3,
    ]


@pytest.mark.slow
def test_one_process_uses_one_gpu_however_many_there_are(configure, monkeypatch):
    cfg = configure()
    monkeypatch.setattr(model, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = client.training_arguments(cfg, 1, 0)
    assert arguments.n_gpu == 1  # more is DataParallel
    assert arguments.train_batch_size == 4


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 19])
def test_processes_are_dealt_each_record_once(count, configure):
    batch, processes = 4, 2
    examples = [{"input_ids": [i], "labels": [i]} for i in range(1, count + 1)]
    filled = client.fill(examples, batch * processes, tasks.build(configure()).blank())
    sampler = BatchSampler(SequentialSampler(filled), batch, drop_last=False)
    dealt = [
        [*BatchSamplerShard(sampler, processes, rank)] for rank in range(processes)
    ]
    assert len({len(batches) for batches in dealt}) == 1  # they step together
    seen = [filled[i] for batches in dealt for indices in batches for i in indices]
    real = [one for one in seen if one["labels"] != [IGNORED]]
    assert sorted(real, key=str) == sorted(examples, key=str)
    assert len(seen) - len(real) < batch * processes


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_proximal_term_is_half_mu_times_the_squared_distance(accumulation, configure):
    cfg = configure(
        f"train.training_arguments.gradient_accumulation_steps={accumulation}"
    )
    start = client.initial_adapter(cfg)
    net = model.build(cfg["model"], cfg["peft"], cfg["seed"], torch.device("cpu"))
    model.set_adapter_state(net, start)
    ids = torch.tensor([[5, 6, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    arguments, task = client.training_arguments(cfg, 1, 0), tasks.build(cfg)
    plain = client.LocalTrainer(model=net, args=arguments, task=task)
    proximal = client.LocalTrainer(
        model=net, args=arguments, task=task, proximal_mu=0.5
    )
    with torch.no_grad():
        moved = {name: value + 0.01 for name, value in start.items()}
        model.set_adapter_state(net, moved)
        added = proximal.compute_loss(net, batch) - plain.compute_loss(net, batch)
    weights = sum(value.numel() for value in start.values())
    by_hand = 0.5 / 2 * weights * 0.01**2 / accumulation
    assert added.item() == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.slow
def test_a_large_mu_keeps_the_adapter_near_the_global_one(configure):
    cfg = configure("train.training_arguments.max_steps=5")
    start = client.initial_adapter(cfg)

    def distance(mu: float) -> float:
        state, _ = client.train(cfg, start, 0, 1, proximal_mu=mu)
        return sum((state[k] - start[k]).square().sum().item() for k in start)

    assert distance(100.0) < 0.5 * distance(0.0)


@pytest.mark.slow
def test_evaluation_is_the_mean_loss_over_answer_tokens(configure):
    cfg = configure("strategy.fraction_evaluate=0.5", "evaluate.holdout=0.05")
    start = client.initial_adapter(cfg)
    metrics = client.evaluate(cfg, start, partition=2)
    net = model.build(cfg["model"], cfg["peft"], cfg["seed"], torch.device("cpu"))
    tokenizer = model.load_tokenizer(cfg["model"]["name"])
    _, held = dataset.hold_out(dataset.load_partition(cfg, 2), 0.05, cfg["seed"])
    losses = []
    for row in held:
        record = dataset.to_record(row, cfg["dataset"]["columns"])
        example = templates.encode(record, "alpaca", tokenizer, 128)
        ids, labels = (torch.tensor(example[k]) for k in ("input_ids", "labels"))
        with torch.no_grad(), model.autocast(net.eval()):
            logits = net(input_ids=ids[None]).logits[0, :-1].float()
        kept = labels[1:] != IGNORED
        log_probabilities = logits.log_softmax(-1)[kept, labels[1:][kept]]
        losses += (-log_probabilities).tolist()
    assert metrics["num-examples"] == len(held)
    # Batches are padded here and not there: bfloat16 sums differ in their last bits.
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=2e-2)


@pytest.mark.slow
def test_records_held_back_are_not_trained_on(configure, monkeypatch):
    trained = []
    encode = templates.encode
    monkeypatch.setattr(
        templates,
        "encode",
        lambda record, *rest: trained.append(str(record)) or encode(record, *rest),
    )
    cfg = configure(
        "strategy.fraction_evaluate=1", "train.training_arguments.max_steps=-1"
    )
    trained.clear()  # of what the template was checked with
    cfg = copy.deepcopy(cfg) | {"num_clients": 100}
    cfg["partitioner"]["num_partitions"] = 100
    client.train(cfg, client.initial_adapter(cfg), partition=0, server_round=1)
    rows = dataset.load_partition(cfg, 0)
    kept, held = dataset.hold_out(rows, cfg["evaluate"]["holdout"], cfg["seed"])
    columns = cfg["dataset"]["columns"]
    assert len(held) == 3
    assert sorted(trained) == sorted(str(dataset.to_record(r, columns)) for r in kept)


def out_of_memory_above(net: torch.nn.Module, rows: int):
    """Let a forward of more than `rows` examples fail, as one on a full GPU does."""

    def refuse(module: torch.nn.Module, given: tuple, named: dict) -> None:
        if len(named["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return net.register_forward_pre_hook(refuse, with_kwargs=True)


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(
    configure, monkeypatch
):
    # In bfloat16 the two would differ by its rounding.
    monkeypatch.setattr(model, "compute_dtype", lambda device: torch.float32)
    model.forget()
    cfg = configure(
        "model.quantization=null",
        "+train.training_arguments.optim=sgd",
        "+train.training_arguments.learning_rate=0.5",
    )
    start = client.initial_adapter(cfg)
    plain, metrics = client.train(cfg, start, partition=0, server_round=1)
    assert metrics["micro_batch"] == 4
    net = model.build_once(
        cfg["model"], cfg["peft"], cfg["seed"], model.default_device()
    )
    full = out_of_memory_above(net, 2)
    try:
        halved, metrics = client.train(cfg, start, partition=0, server_round=1)
        # Once is enough: what does not fit in halves fails.
        full.remove()
        full = out_of_memory_above(net, 1)
        with pytest.raises(torch.OutOfMemoryError):
            client.train(cfg, start, partition=0, server_round=1)
    finally:
        full.remove()
    assert metrics["micro_batch"] == 2
    assert metrics["num-examples"] == 8
    moved = max((plain[name] - start[name]).abs().max() for name in plain)
    apart = max((plain[name] - halved[name]).abs().max() for name in plain)
    assert apart < 1e-5 * moved
    model.forget()


def test_an_odd_micro_batch_is_divided_by_its_smallest_factor():
    def smaller(size: int) -> tuple[int, int]:
        arguments = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": 2,
        }
        given = Settings.of({"train": {"training_arguments": arguments}})
        made = client.smaller(given)["train"]["training_arguments"]
        assert arguments["per_device_train_batch_size"] == size
        return (
            made["per_device_train_batch_size"],
            made["gradient_accumulation_steps"],
        )

    assert [smaller(size) for size in (16, 9, 7)] == [(8, 4), (3, 6), (1, 14)]
