"""Shared by all tests: small configurations, and a grid without processes."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")
# One core a client is what the app gives its workers, and results depend on it. Nor does any
# other process have two: beside a second file's tests their threads wait spinning.
os.environ["OMP_NUM_THREADS"] = "1"
# Ray's workers would wait for all other processes (nice 15): beside two busy ones a round of two
# clients, which are seconds alone, took seven minutes.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

import pytest
import torch
from filelock import FileLock

import model
import utils
from assets.testbed.loopback import LoopbackGrid
from server import exchange
from settings import preflight
from settings.compose import compose

# The grid in this process has answered whenever the server looks: it need not wait.
exchange.PULL_INTERVAL = 0


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    utils.quiet()


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


REHEARSED: set[str] = set()


@contextmanager
def rehearsing_once() -> Iterator[None]:
    """Most tests have the quickstart's base and adapter, which one try is enough for."""
    rehearse = model.rehearse

    def once(*given: Any) -> None:
        if (key := json.dumps(given, sort_keys=True)) not in REHEARSED:
            rehearse(*given)
            REHEARSED.add(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "rehearse", once)
        yield


def short(*overrides: str) -> dict[str, Any]:
    """Compose and check the quickstart's configuration with overrides, made short."""
    given = (
        "experiment=quickstart num_clients=4 num_rounds=2 strategy.fraction_fit=0.5 "
        "evaluate.exact_match=false train.training_arguments.max_steps=2 "
        "train.training_arguments.per_device_train_batch_size=4"
    )
    with rehearsing_once():
        return preflight.check(compose(" ".join([given, *overrides])))


@pytest.fixture(scope="module")
def in_float32() -> Iterator[None]:
    """For what is held against plain transformers: a CPU that has bfloat16 computes in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "compute_dtype", lambda device: torch.float32)
        model.forget()
        yield
        model.forget()


@pytest.fixture
def configure() -> Callable[..., dict[str, Any]]:
    return short


@pytest.fixture(scope="session")
def configure_once() -> Callable[..., dict[str, Any]]:
    """Likewise, for what is made once for several tests."""
    return short


@pytest.fixture(scope="session")
def mark(testrun_uid: str) -> dict[str, str]:
    """For the environment of what is started here: tells it from other sessions'."""
    return {"LLM_FLOWERTUNE_TEST": testrun_uid}


@pytest.fixture(scope="session")
def quickstart(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str, mark: dict[str, str]
) -> tuple[Path, str]:
    """The quickstart's folder and what it printed: one run, whoever looks at it."""
    root = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        root = root.parent  # common to the processes of xdist
    folder, said = root / "quickstart", root / "quickstart.txt"
    base = utils.PROJECT / "assets/tiny_llama/model.safetensors"
    command = [sys.executable, "main.py", "experiment=quickstart"]
    with FileLock(root / "quickstart.lock"):
        if not said.exists():
            before = base.read_bytes()
            done = subprocess.run(
                [*command, f"hydra.run.dir={folder}"],
                cwd=utils.PROJECT,
                env=os.environ | mark,
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""
            assert base.read_bytes() == before
            said.write_text(done.stdout)
    return folder, said.read_text()


@pytest.fixture
def loopback() -> type[LoopbackGrid]:
    return LoopbackGrid


@pytest.fixture(scope="session")
def loopback_once() -> type[LoopbackGrid]:
    return LoopbackGrid


@pytest.fixture
def few(tmp_path) -> str:
    """An override: eight of the quickstart's test questions."""
    lines = (utils.PROJECT / "assets/tiny_qa/test.jsonl").read_text().splitlines()
    (path := tmp_path / "few.jsonl").write_text("\n".join(lines[:8]))
    return f"dataset.test_path={path}"
