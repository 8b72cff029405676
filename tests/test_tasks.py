"""pytest tests/test_tasks.py: what each task goes with beside the rest, and what is refused."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import client
import model
from evaluation.examine import Examination
from methods.base import adapters
from node import permit
from server import checkpoint, journal, rounds
from settings import preflight
from settings.compose import compose
from utils import PROJECT, Settings, UserError

CPU = torch.device("cpu")
LABELS = ["short", "two", "number"]

# The shipped experiment of each task, and its records' folder.
TASKS = {
    "multilabel": (
        "experiment=classification task=multilabel partitioner=iid "
        f"dataset=local dataset.labels=[{','.join(LABELS)}]",
        "tiny_qa",
    ),
    "tagging": ("experiment=tagging", "tiny_tags"),
    "span": ("experiment=span", "tiny_spans"),
    "seq2seq": ("experiment=seq2seq", "tiny_seq2seq"),
    "dpo": ("experiment=dpo", "tiny_preferences"),
    "orpo": ("experiment=dpo task=orpo", "tiny_preferences"),
    "kto": ("experiment=dpo task=kto", "tiny_preferences"),
}
SHORT = (
    "model.quantization=null num_clients=4 num_rounds=1 strategy.fraction_fit=1 "
    "strategy.fraction_evaluate=0 evaluate.exact_match=false evaluate.every_round=0 "
    "train.training_arguments.max_steps=2 "  # LoRA's A has no gradient in the first
    "train.training_arguments.per_device_train_batch_size=4"
)


def labelled(row: dict[str, str]) -> dict[str, object]:
    """A question of `tiny_qa` with what can be said of it in `LABELS`."""
    said = len(row["instruction"]) < 30, row["input"], row["category"] == "sum"
    names = [label for label, there in zip(LABELS, said, strict=True) if there]
    return row | {"output": names}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[..., Settings]:
    """A task's experiment on 96 of its records and 8 of its questions, made short."""
    root = tmp_path_factory.mktemp("records")

    def few(task: str, side: str, count: int) -> Path:
        if not (path := root / f"{task}_{side}.jsonl").exists():
            source = PROJECT / "assets" / TASKS[task][1] / f"{side}.jsonl"
            lines = source.read_text().splitlines()[:count]
            if task == "multilabel":
                lines = [json.dumps(labelled(json.loads(line))) for line in lines]
            path.write_text("\n".join(lines))
        return path

    def build(task: str, *overrides: str) -> Settings:
        data = f"dataset.path={few(task, 'train', 96)} "
        data += f"dataset.test_path={few(task, 'test', 8)}"
        return preflight.check(
            compose(" ".join([TASKS[task][0], data, SHORT, *overrides]))
        )

    return build


def moved(one: model.State, first: model.State) -> bool:
    """Whether a whole adapter has become another, every tensor of it.

    But for what a head of spans adds to all places alike, which has no gradient.
    """
    finite = all(torch.isfinite(tensor).all() for tensor in one.values())
    of_all = re.compile(r"\.qa_outputs\..*bias$")
    names = (name for name in first if not of_all.search(name))
    same = [name for name in names if torch.equal(one[name], first[name])]
    return finite and one.keys() == first.keys() and not same


HEADED = "multilabel tagging span"
EVERY = "tagging span seq2seq kto"
CELLS = {
    "privacy=client privacy.secure_aggregation=true": EVERY,
    "privacy=local": "multilabel dpo",
    "privacy=record": HEADED,
    "privacy.secure_aggregation=true": "span orpo",
    "strategy=scaffold personal=ditto strategy.fraction_evaluate=1": "span seq2seq kto",
    "strategy=svd strategy.ranks=[2,8]": "tagging kto",
    "comm.top_k=0.1 comm.delta_down=true comm.compress=zlib num_rounds=2": EVERY,
    "strategy=krum": "tagging",
    "strategy=bulyan num_clients=7": "span",
    "strategy=fedadam comm.dtype=int8": "multilabel",
    "sharing=ffa sharing.refactor_every=1": "tagging",
    "model.quantization=4": "span",
}


def pairs() -> Iterator[tuple[str, str]]:
    for overrides, names in CELLS.items():
        yield from ((task, overrides) for task in names.split())


@pytest.mark.slow
@pytest.mark.parametrize(("task", "overrides"), pairs())
def test_each_task_goes_with_it(task, overrides, made, loopback, tmp_path):
    cfg = made(task, overrides)
    first = client.initial_adapter(cfg)
    rounds.run(cfg, loopback(cfg, folder=tmp_path / "clients"), tmp_path)
    history = json.loads((tmp_path / "history.json").read_text())["rounds"]
    for entry in history:
        assert entry["failures"] == []
        assert entry["replied"] == entry["sampled"] == cfg.num_clients
        assert math.isfinite(entry.get("train_loss", 0))  # some levels do not tell
    state, *_ = checkpoint.read(checkpoint.newest(tmp_path))
    if cfg.sharing._target_.endswith("FFA"):
        first = {name: first[name] for name in first if ".lora_A." not in name}
        state = {name: state[name] for name in first}
    if cfg.comm.top_k:  # what travels are the largest changes of all: those of LoRA's B
        state = {k: v for k, v in state.items() if not v.equal(first[k])}
        assert {name for name in first if ".lora_B." in name} <= state.keys()
        first = {name: first[name] for name in state}
    assert moved(state, first)


METHODS = sorted(
    {path.stem for path in (PROJECT / "conf/peft").glob("*.yaml")} - {"lora", "outer"}
)  # of which the one is everywhere else, and the other needs an emulator
PROMPTS = ("prefix", "prompt", "ptuning")  # PEFT has a class of its own for each kind


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "method"),
    [
        *(("span", method) for method in METHODS),
        *((task, m) for task in ("multilabel", "tagging") for m in ("ia3", *PROMPTS)),
        *(("kto", method) for method in PROMPTS),
    ],
)
def test_each_peft_method_is_trained_and_saved_with_what_a_task_has(
    task, method, made, tmp_path
):
    cfg = made(task, f"peft={method}", "train.training_arguments.max_steps=4")
    first = client.initial_adapter(cfg)
    state, _ = client.train(cfg, first, 0, server_round=1)
    assert moved(state, first)
    client.save(cfg, state, tmp_path / "peft_1", 1)
    about = model.read_about(str(tmp_path / "peft_1"))
    opened = model.open_adapter(str(tmp_path / "peft_1"), about, CPU)
    here, there = Examination(cfg), Examination(cfg, opened)
    before, after = here.measure(first)["test_loss"], here.measure(state)["test_loss"]
    assert there.tuned()[0]["test_loss"] == pytest.approx(after, rel=1e-3)
    assert task == "kto" or after < before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "mode"),
    [
        *(("tagging", mode) for mode in ("federated", "centralized", "local")),
        *((task, "local") for task in ("multilabel", "span", "kto")),
    ],
)
def test_test_questions_are_answered_in_each_mode(
    task, mode, made, loopback, tmp_path, capsys
):
    every = "evaluate.exact_match=true evaluate.every_round=1 evaluate.max_new_tokens=2"
    cfg = made(task, f"mode={mode} num_clients=3 {every}")
    rounds.run(cfg, loopback(cfg, folder=tmp_path / "clients"), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert len(answers) == summary["test_questions"] == 8
    assert all(isinstance(one["tuned"], str) for one in answers)
    state, *_ = checkpoint.read(checkpoint.newest(tmp_path))
    each = [Examination(cfg).measure(one) for one in adapters(state).values()]
    assert len(each) == (3 if mode == "local" else 1)
    mean = sum(one["test_loss"] for one in each) / len(each)
    assert summary["test_loss_after"] == pytest.approx(mean, rel=1e-3)
    journal.report(cfg, tmp_path)
    assert "On 8 test questions" in capsys.readouterr().out


@pytest.mark.slow
def test_a_resumed_run_of_a_task_with_a_head_ends_with_the_same_adapter(
    made, loopback, tmp_path
):
    cfg = made(
        "tagging",
        "strategy=scaffold personal=ditto strategy.fraction_evaluate=1 num_rounds=2",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    rounds.run(cfg, loopback(cfg, folder=whole), whole)
    first = cfg | {"num_rounds": 1}
    rounds.run(first, loopback(first, folder=parts), parts)
    again = cfg | {"resume": str(parts)}
    rounds.run(again, loopback(again, folder=parts), parts)
    for name in ("peft_2", "personal/client_0"):
        files = [path / name / "adapter_model.safetensors" for path in (whole, parts)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_node_finds_answers_in_texts_of_its_own(tmp_path):
    rows = [{"q": "Who?", "c": f"It was {name}.", "a": name} for name in "ABCDEFGHIJKL"]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    node = {"data-path": str(tmp_path / "own.jsonl"), "cpus": 1}
    node |= {"column-instruction": "q", "column-input": "c", "column-output": "a"}
    node |= {"cache-path": str(tmp_path / "cache")}
    steps = "train.training_arguments.max_steps=1"
    told = {"overrides": f"experiment=span {steps}", "run": "first"}
    cfg, partition = permit.settle(told, node)
    _, metrics = client.train(cfg, client.initial_adapter(cfg), partition, 1)
    assert metrics["records"] == 12


# --- refused ----------------------------------------------------------------------------------

REFUSED = {
    "audit.canaries=4": "multilabel tagging span orpo",
    "evaluate.choices=options": "multilabel tagging span orpo",
    "launch=zero3 client_resources.num_gpus=0": HEADED,
}


@pytest.mark.parametrize(
    ("task", "overrides"),
    [(task, given) for given, names in REFUSED.items() for task in names.split()],
)
def test_each_task_is_refused_with_it_in_one_line(task, overrides, made):
    key = overrides.partition("=")[0]
    with pytest.raises(UserError, match=rf"^{key}=\S+[: ]") as caught:
        made(task, overrides)
    assert "\n" not in str(caught.value)


def test_to_give_a_bad_answer_is_no_match(made, tmp_path):
    rows = [
        {"prompt": f"Is {i} odd?", "completion": "No.", "label": int(i) % 2}
        for i in "12"
    ]
    (tmp_path / "thumbs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = f"dataset.test_path={tmp_path}/thumbs.jsonl evaluate.exact_match=true"
    with pytest.raises(UserError, match="1 of its answers are told to be bad"):
        made("kto", asked)
