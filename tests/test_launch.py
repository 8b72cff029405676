"""pytest tests/test_launch.py: a client of two processes does what a client of one does."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import client
import model
from assets.testbed.adapters import adapter, assert_close, same
from node import processes
from utils import PROJECT, UserError

pytestmark = pytest.mark.slow

# A member on the CPU, in float32 (in bfloat16 rounding would hide what is compared), with
# difficulties in rounds 13 to 15.
MEMBER = """
import math, os, signal, sys, time
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch
import utils
utils.quiet()
import client, model
from node import processes

def train(cfg, state, partition, server_round, *rest):
    if server_round == 15:
        os.write(1, b"at work\\n")
        time.sleep(60)
    if os.environ["RANK"] == "1":
        if server_round == 13:
            raise ValueError("no luck")
        if server_round == 14:
            os.kill(os.getpid(), signal.SIGKILL)
    result = trained(cfg, state, partition, server_round, *rest)
    base = [p for p in client._load(cfg, state).parameters() if not p.requires_grad]
    here = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in base)
    shards = cfg["model"]["shards"]
    assert here * shards == sum(p.numel() for p in base)
    layers = [m for m in client._load(cfg, state).modules() if hasattr(m, "quant_state")]
    assert bool(layers) == (cfg["model"]["quantization"] == 4 and shards > 1)
    for layer in layers:  # in bytes of two weights each
        part = layer.weight.to_local()
        assert part.dtype == torch.uint8 and part.untyped_storage().nbytes() == part.numel()
        assert part.numel() * 2 * shards == math.prod(layer.quant_state.shape)
    return result

model.compute_dtype = lambda device: torch.float32
trained, client.train = client.train, train
processes.serve(*map(int, sys.argv[1:]))
"""
PLAIN = (
    "model.quantization=null +train.training_arguments.optim=sgd "
    "+train.training_arguments.learning_rate=0.1 "
)


@pytest.fixture(scope="module", autouse=True)
def float32() -> Iterator[None]:
    """One team for all tests, in float32, as is this process."""
    model.forget()
    processes._team.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "COMMAND", [sys.executable, "-c", MEMBER])
        patch.setattr(model, "compute_dtype", lambda device: torch.float32)
        patch.setattr(model, "default_device", lambda: torch.device("cpu"))
        yield
    processes._team(2, 1).end()
    processes._team.cache_clear()
    model.forget()


def both(cfg: dict[str, Any], sharded: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same step of 8 examples as one process takes it, and as two of them."""
    train = cfg["train"]
    settings = train.training_arguments | {"per_device_train_batch_size": 8}
    alone = cfg.launch | {"processes": 1, "sharded": False}
    one = cfg | {"train": train | {"training_arguments": settings}, "launch": alone}
    return one, cfg | {"launch": cfg.launch | {"processes": 2, "sharded": sharded}}


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("overrides", "proximal_mu", "examples"),
    [
        ("train.training_arguments.max_steps=4", 0.0, 32),
        ("train.training_arguments.gradient_accumulation_steps=2", 0.5, 32),
        # 35 records are four steps of 8 and one of 3, for which one process has none.
        ("train.training_arguments.max_steps=-1 num_clients=100", 0.0, 35),
        ("model.gradient_checkpointing=true", 0.0, 16),
    ],
    ids=["steps", "accumulated", "uneven", "checkpointed"],
)
def test_two_processes_train_as_one(
    overrides, proximal_mu, examples, sharded, configure
):
    one, two = both(configure(PLAIN + overrides), sharded)
    start = adapter(one)
    alone, figures = processes.train(one, start, 0, 1, proximal_mu)
    together, theirs = processes.train(two, start, 0, 1, proximal_mu)
    assert_close(alone, together, start)
    assert theirs["train_loss"] == pytest.approx(figures["train_loss"], rel=1e-5)
    assert theirs["num-examples"] == figures["num-examples"] == examples
    # Once more: the base has not moved, and nothing is left of the first time.
    again, _ = processes.train(two, start, 0, 1, proximal_mu)
    assert same(again, together)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_begin_and_evaluate_as_one(sharded, configure):
    some = "strategy.fraction_evaluate=0.5 evaluate.holdout=0.02"
    one, two = both(configure(PLAIN + some), sharded)
    alone, together = client.initial_adapter(one), processes.initial_adapter(two)
    assert same(alone, together)
    start = adapter(one)
    expected, found = client.evaluate(one, start, 1), processes.evaluate(two, start, 1)
    assert found["num-examples"] == expected["num-examples"]
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


BERT = "model=tiny_bert train.seq_length=96"
SEQ2SEQ = "task=seq2seq model=tiny_t5 dataset=tiny_seq2seq"
PAIRS = "dataset=tiny_preferences"


@pytest.mark.parametrize(
    ("overrides", "sharded"),
    [
        (f"task=classification dataset=tiny_labels {BERT}", False),
        (f"task=tagging dataset=tiny_tags {BERT}", False),
        (f"task=span dataset=tiny_spans {BERT}", False),
        (SEQ2SEQ, False),
        (SEQ2SEQ, True),
        (f"task=dpo {PAIRS}", False),
        (f"task=dpo {PAIRS}", True),
        # Not KTO, in which each process has a z of its own (docs/tasks-preferences.md).
    ],
)
def test_two_processes_learn_each_task_as_one(overrides, sharded, configure):
    # So many clients that the last step is short of examples: one process then has none.
    few = "num_clients=60 train.training_arguments.max_steps=-1"
    one, two = both(configure(PLAIN + few, overrides), sharded)
    start = adapter(one)
    alone, figures = processes.train(one, start, 0, 1)
    together, theirs = processes.train(two, start, 0, 1)
    assert theirs["num-examples"] == figures["num-examples"]
    assert theirs["train_loss"] == pytest.approx(figures["train_loss"], rel=1e-5)
    # What is added to the logits of all places alike changes no probability.
    for name in (n for n in start if not re.search(r"\.qa_outputs\..*bias$", n)):
        moves = (alone[name] - start[name]).abs().max()
        assert moves > 0
        assert (together[name] - alone[name]).abs().max() < 1e-3 * moves, name


def test_a_sharded_head_that_is_not_the_embedding(configure, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(PROJECT / "assets/tiny_llama")
    base.config.tie_word_embeddings = False
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    base.save_pretrained(tmp_path)
    for file in (PROJECT / "assets/tiny_llama").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    one, two = both(configure(PLAIN + f"model.name={tmp_path}"), sharded=True)
    start = adapter(one)
    alone, _ = processes.train(one, start, 0, 1)
    together, _ = processes.train(two, start, 0, 1)
    assert_close(alone, together, start)


def test_a_base_in_four_bits_trains_in_two_processes(configure):
    cfg = configure(PLAIN + "model.quantization=4")
    one, two = both(cfg, sharded=False)
    start = adapter(one)
    alone, _ = processes.train(one, start, 0, 1)
    together, _ = processes.train(two, start, 0, 1)
    assert_close(alone, together, start)


@pytest.mark.parametrize(
    "overrides",
    [
        "train.training_arguments.gradient_accumulation_steps=2",
        "model.gradient_checkpointing=true peft=ia3",
    ],
    ids=["accumulated", "checkpointed"],
)
def test_a_base_in_four_bits_in_parts(overrides, configure):
    """Against one process, which computes on the same values unpacked."""
    cfg = configure(
        f"{PLAIN} model.quantization=4 strategy.fraction_evaluate=0.5 {overrides}"
    )
    one, two = both(cfg, sharded=True)
    first, theirs = client.initial_adapter(one), processes.initial_adapter(two)
    assert all(torch.equal(theirs[name], value) for name, value in first.items())
    start = adapter(one)
    alone, figures = processes.train(one, start, 0, 1)
    together, theirs = processes.train(two, start, 0, 1)
    assert_close(alone, together, start)
    assert theirs["train_loss"] == pytest.approx(figures["train_loss"], rel=1e-5)
    expected, found = client.evaluate(one, start, 1), processes.evaluate(two, start, 1)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    # Once more: what was gathered to evaluate has left the base as it was.
    again, _ = processes.train(two, start, 0, 1)
    assert all(torch.equal(again[name], value) for name, value in together.items())


def test_a_base_in_four_bits_in_parts_from_the_disk(configure, tmp_path):
    one, two = both(configure(PLAIN + "model.quantization=4"), sharded=True)
    start = adapter(one)
    fresh, _ = processes.train(two, start, 0, 1)
    kept = two | {"model": two.model | {"cache": str(tmp_path)}}
    written, _ = processes.train(kept, start, 0, 1)
    (folder,) = tmp_path.iterdir()  # by either process, whole
    weights = load_file(folder / "model.safetensors")
    assert any(weight.dtype == torch.uint8 for weight in weights.values())
    processes.train(two, start, 0, 1)  # which lets go of it
    read, _ = processes.train(kept, start, 0, 1)
    for name, value in fresh.items():
        assert torch.equal(written[name], value)
        assert torch.equal(read[name], value)


@pytest.mark.parametrize(
    ("server_round", "cause"),
    [
        (13, "process 1 of 2: ValueError: no luck"),
        (14, "process 1 of 2 ended with exit code -9"),
    ],
    ids=["raises", "killed"],
)
def test_one_process_that_fails_is_one_error(server_round, cause, configure):
    one, two = both(configure(PLAIN), sharded=False)
    start = adapter(one)
    members = processes._team(2, 1).members.values()
    with pytest.raises(RuntimeError) as failure:
        processes.train(two, start, 0, server_round)
    assert str(failure.value) == cause
    assert all(member.returncode is not None for member in members)
    state, _ = processes.train(two, start, 0, 1)  # by a new team
    assert state.keys() == start.keys()


def test_what_a_user_can_mend_is_said_as_by_one_process(configure):
    one, two = both(configure(PLAIN), sharded=False)
    start = adapter(one)
    two["model"] = two.model | {"name": "assets/none"}
    with pytest.raises(UserError, match=r"^model\.name=assets/none: no weights"):
        processes.train(two, start, 0, 1)


def test_no_process_outlives_its_client():
    starter = f"""
import sys
from node import processes
processes.COMMAND = [sys.executable, "-c", {MEMBER!r}]
team = processes.Team(2, 1)
print(*(member.pid for member in team.members.values()), flush=True)
team.ask("train", {{}}, {{}}, 0, 15)
"""
    with subprocess.Popen(
        [sys.executable, "-c", starter], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            pids = process.stdout.readline().split()
            members = [psutil.Process(int(pid)) for pid in pids]
            told = [process.stdout.readline() for _ in members]
        finally:
            process.kill()
    assert told == ["at work\n"] * 2
    deadline = time.monotonic() + 10
    while any(running(member) for member in members):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
