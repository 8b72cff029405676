"""pytest tests/test_zero.py: clients in DeepSpeed's parts, and on two machines."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import AuthenticationError, connection
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import client
import model
import utils
from assets.testbed.adapters import adapter, assert_close, same
from compute import patches, zero
from node import permit, processes
from settings import preflight
from settings.compose import compose
from utils import PROJECT, UserError

# A member on the CPU, in float32 (in bfloat16 rounding would hide what is compared), that
# counts what it holds of the base.
MEMBER = """
import os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch
import utils
utils.quiet()
import client, model
from node import processes
from transformers.integrations import is_deepspeed_zero3_enabled

def train(cfg, state, *rest):
    result = trained(cfg, state, *rest)
    base = [p for p in client._load(cfg, state).parameters() if not p.requires_grad]
    part = [getattr(p, "ds_tensor", p).numel() for p in base]
    whole = [getattr(p, "ds_numel", p.numel()) for p in base]
    three = cfg["launch"]["sharded"]
    assert sum(part) <= (sum(whole) / 2 + len(part) if three else sum(whole))
    assert 2 * sum(part) >= sum(whole) > 0
    assert not is_deepspeed_zero3_enabled()  # of what transformers makes next
    return result

model.compute_dtype = lambda device: torch.float32
if os.environ.get("COUNTS"):
    trained, client.train = client.train, train
processes.serve(*map(int, sys.argv[1:]))
"""
PLAIN = (
    "model.quantization=null +train.training_arguments.optim=sgd "
    "+train.training_arguments.learning_rate=0.1 client_resources.num_gpus=0 "
)


@pytest.fixture(scope="module")
def float32() -> Iterator[None]:
    """One team for all, in float32, as is this process."""
    model.forget()
    processes._team.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COUNTS", "1")
        patch.setattr(processes, "COMMAND", [sys.executable, "-c", MEMBER])
        patch.setattr(model, "compute_dtype", lambda device: torch.float32)
        patch.setattr(model, "default_device", lambda: torch.device("cpu"))
        yield
        if processes._team.cache_info().currsize:
            processes._team(2, 1).end()
    processes._team.cache_clear()
    model.forget()


def alone(cfg: dict[str, Any]) -> dict[str, Any]:
    """The same step of 8 examples as one process takes it."""
    train, launch = cfg["train"], cfg["launch"]
    settings = train.training_arguments | {"per_device_train_batch_size": 8}
    single = {"processes": 1, "sharded": False, "deepspeed": None}
    return cfg | {
        "train": train | {"training_arguments": settings},
        "launch": launch | single,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        "launch=zero2 train.training_arguments.gradient_accumulation_steps=2",
        "launch=zero3 train.training_arguments.gradient_accumulation_steps=2",
        # 35 records are four steps of 8 and one of 3, for which one process has none.
        "launch=zero3 train.training_arguments.max_steps=-1 num_clients=100 "
        "launch.deepspeed.zero_optimization.offload_param.device=cpu "
        "launch.deepspeed.zero_optimization.offload_optimizer.device=cpu",
    ],
    ids=["zero2", "zero3", "offloaded"],
)
def test_what_is_divided_trains_and_evaluates_as_one_process(
    overrides, configure, float32
):
    two = configure(f"{PLAIN} strategy.fraction_evaluate=0.5 {overrides}")
    one = alone(two)
    start = adapter(one)
    expected, figures = processes.train(one, start, 0, 1)
    together, theirs = processes.train(two, start, 0, 1)
    assert_close(expected, together, start)
    assert theirs["train_loss"] == pytest.approx(figures["train_loss"], rel=1e-5)
    assert theirs["num-examples"] == figures["num-examples"]
    known, found = processes.evaluate(one, start, 1), processes.evaluate(two, start, 1)
    assert found["eval_loss"] == pytest.approx(known["eval_loss"], rel=1e-5)
    # Once more: the base has not moved, and no engine of the first round is left on it.
    again, _ = processes.train(two, start, 0, 1)
    assert same(again, together)


@pytest.mark.slow
def test_two_machines_train_as_one(configure, monkeypatch, float32):
    monkeypatch.setenv(processes.HOSTS, "2")
    monkeypatch.setenv(processes.KEY, "a secret of the two machines")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    two = configure(f"{PLAIN} launch=ddp launch.rendezvous={address}")
    one = alone(two)
    start = adapter(one)
    expected, figures = processes.train(one, start, 0, 1)
    part = f"""
import sys
from node import processes
processes.COMMAND = [sys.executable, "-c", {MEMBER!r}]
processes.main("{address} --host 1 --processes 2 --cpus 1".split())
"""
    with subprocess.Popen([sys.executable, "-c", part], cwd=PROJECT) as other:
        try:
            together, theirs = processes.train(two, start, 0, 1)
            there = psutil.Process(other.pid).children()
            assert len(there) == 1
        finally:
            other.kill()
            processes._team(1, 1, address, 2).end()
            processes._team.cache_clear()
    assert_close(expected, together, start)
    assert theirs["train_loss"] == pytest.approx(figures["train_loss"], rel=1e-5)
    deadline = time.monotonic() + 20
    while any(p.is_running() and p.status() != "zombie" for p in there):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_copies_overlap_where_there_is_a_gpu(device, configure, monkeypatch):
    cfg = configure("launch=zero2 client_resources.num_gpus=0")
    monkeypatch.setattr(model, "default_device", lambda: torch.device(device))
    monkeypatch.setattr(model, "compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(patches, "tell_accelerate_of_processes", lambda: None)
    monkeypatch.setattr(client, "TrainingArguments", partial(SimpleNamespace, n_gpu=1))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")  # as it was, afterwards
    member = cfg | {"model": cfg.model | {"deepspeed": cfg.launch.deepspeed}}
    made = client.training_arguments(member, 1, 0)
    assert made.deepspeed["zero_optimization"]["stage"] == 2
    assert made.accelerator_config == {
        "non_blocking": device == "cuda",
        "use_configured_state": True,
    }


# --- said before anything slow ---------------------------------------------------------------


def checked(overrides: str) -> None:
    told = f"experiment=quickstart client_resources.num_gpus=0 {overrides}"
    preflight.check_launch(preflight.validated(preflight.resolve(compose(told))))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("launch=zero3 model.quantization=4", "launch=zero3 with model.quantization=4"),
        (
            "launch=fsdp model.quantization=8",
            "launch=fsdp with model.quantization=8.*=null or 4, or launch=ddp",
        ),
        ("launch=zero3 peft=dora", "launch=zero3: DoRA reads weights of the base"),
        ("launch=zero3 strategy=fedprox", "strategy.proximal_mu=0.1.*launch=zero2"),
        ("launch=zero3 personal=ditto", "personal.mu=0.1.*Take launch=zero2"),
        ("launch=zero3 strategy=svd strategy.ranks=[4,8]", "strategy.ranks"),
        ("launch=zero2 strategy=scaffold", "corrects its gradients.*Take launch=ddp"),
        ("launch=zero3 launch.sharded=false", "stage 3 of launch.deepspeed divides"),
        ("launch=zero2 launch.sharded=true", "and stage 2 does not"),
        (
            "launch=zero3 launch.deepspeed.zero_optimization.offload_param.device=nvme",
            "launch.deepspeed.zero_optimization.offload_param.device=nvme",
        ),
        (
            "launch=zero2 +launch.deepspeed.optimizer.type=Adam",
            "launch.deepspeed.optimizer",
        ),
        ("launch=zero2 launch.deepspeed.zero_optimization.stage=1", "stage=1"),
        ("launch=zero2 launch.processes=1", "launch=zero2 with launch.processes=1"),
        ("launch=zero3 launch.processes=1", "Set launch.processes=2 or more"),
        ("launch=fsdp launch.processes=1", "launch=fsdp with launch.processes=1"),
        (
            "launch=zero3 +launch.deepspeed.zero_optimization.overlap_com=true",
            r"zero_optimization\.overlap_com",
        ),
        (
            "launch=zero3 +launch.deepspeed.zero_optimization.overlap_comm=perhaps",
            r"zero_optimization\.overlap_comm=perhaps",
        ),
        (
            "launch=zero2 +launch.deepspeed.zero_optimization.offload_param.device=cpu",
            "stage 2 leaves the base where it is",
        ),
        ("launch=ddp launch.rendezvous=here", "it must be host:port"),
        ("launch=ddp launch.rendezvous=127.0.0.1:1", "must be the number of machines"),
    ],
)
def test_what_cannot_be_divided_is_refused(overrides, told):
    with pytest.raises(UserError, match=told) as refusal:
        checked(overrides)
    assert "\n" not in str(refusal.value)


def test_what_can_be_is_not():
    for overrides in (
        "launch=zero2 model.quantization=4",
        "launch=fsdp model.quantization=4",
        "launch=zero2 strategy=fedprox personal=ditto",
        "launch=zero3 sharing=ffa",
        "launch=ddp launch.processes=1",
        "launch=zero3 +launch.deepspeed.zero_optimization.overlap_comm=true",
    ):
        checked(overrides)


def test_without_deepspeed_the_answer_is_what_to_install(monkeypatch):
    monkeypatch.setattr(utils, "find_spec", lambda name: None)
    told = f"launch=zero2 needs deepspeed.*: pip install {utils.DEEPSPEED}$"
    with pytest.raises(UserError, match=told):
        checked("launch=zero2")
    checked("launch=ddp")
    with pytest.raises(UserError, match=r"launch\.deepspeed needs deepspeed"):
        zero._library()
    for file in ("requirements.txt", "pyproject.toml"):
        assert utils.DEEPSPEED in (PROJECT / file).read_text()


def test_a_machine_without_the_secret_is_told_how_to_make_one(monkeypatch):
    monkeypatch.setenv(processes.HOSTS, "2")
    monkeypatch.delenv(processes.KEY, raising=False)
    with pytest.raises(UserError, match="must be a secret of 16 characters"):
        checked("launch=ddp launch.rendezvous=127.0.0.1:1")
    monkeypatch.setenv(processes.KEY, "x" * 16)
    checked("launch=ddp launch.rendezvous=127.0.0.1:1")
    with pytest.raises(UserError, match=r"launch\.processes=2, 1 of them"):
        checked("launch=ddp launch.rendezvous=127.0.0.1:1 client_resources.num_gpus=2")


@pytest.mark.parametrize("count", [0, -2, 3])
def test_a_machine_that_would_have_no_part_is_told(count, monkeypatch):
    monkeypatch.setenv(processes.HOSTS, "2")
    monkeypatch.setenv(processes.KEY, "x" * 16)
    words = ["127.0.0.1:1", "--host=1", f"--processes={count}"]
    with pytest.raises(SystemExit, match=f"same part of launch.processes={count}"):
        processes.main(words)


def test_a_stranger_is_sent_away_and_missed(monkeypatch):
    """Who knocks with another secret gets no place in a team, which goes on waiting."""
    monkeypatch.setenv(processes.HOSTS, "2")
    monkeypatch.setenv(processes.KEY, "the secret of the two machines")
    monkeypatch.setattr(processes, "GATHERING", 1.0)
    monkeypatch.setattr(processes, "COMMAND", ["sleep", "60"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    refused = []

    def knock() -> None:
        until = time.monotonic() + 5
        while time.monotonic() < until:
            try:
                connection.Client(processes.place(address), authkey=b"another secret")
            except AuthenticationError as error:
                return refused.append(error)
            except OSError:
                time.sleep(0.01)

    stranger = threading.Thread(target=knock)
    stranger.start()
    with pytest.raises(UserError, match="0 of 1 processes of the other machines came"):
        processes.Team(1, 1, address, 2)
    stranger.join()
    assert len(refused) == 1


def test_where_other_machines_come_is_the_nodes_own(configure):
    cfg = configure()
    cfg.launch["rendezvous"] = "192.0.2.1:29400"  # as a run might ask
    permit.settle_resources(cfg, {"device": "cpu"}, simulated=False)
    assert cfg.launch.rendezvous is None
    permit.settle_resources(cfg, {"rendezvous": "h:1", "processes": 4}, simulated=False)
    assert (cfg.launch.rendezvous, cfg.launch.processes) == ("h:1", 4)
