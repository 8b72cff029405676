"""Shared by all tests: small configurations, and a grid without processes."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")

import pytest
import torch
from filelock import FileLock
from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.supercore.task_identity import TaskIdentity

import app
import utils
from settings import preflight
from settings.compose import compose

# One core a client is what the app gives its workers, and results depend on it.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    utils.quiet()


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def short(*overrides: str) -> dict[str, Any]:
    """Compose and check the quickstart's configuration with overrides, made short."""
    given = (
        "experiment=quickstart num_clients=4 num_rounds=2 strategy.fraction_fit=0.5 "
        "evaluate.exact_match=false train.training_arguments.max_steps=2 "
        "train.training_arguments.per_device_train_batch_size=4"
    )
    return preflight.check(compose(" ".join([given, *overrides])))


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


class LoopbackGrid:
    """Delivers messages to a real ClientApp in this process, in reversed order.

    `tamper(partition, reply)` may change or replace a reply on its way back. `nodes` may
    change between rounds, and those in `silent` never answer. What clients keep from one
    round to another is in `folder`.
    """

    def __init__(
        self,
        cfg: dict[str, Any],
        tamper: Callable[[int, Message], Message] = lambda partition, reply: reply,
        folder: Path | None = None,
    ) -> None:
        self.own_folder = tempfile.TemporaryDirectory(prefix="clients-")
        self.folder = folder or Path(self.own_folder.name)
        # What Flower's runtime sets before an app may make Messages.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.client_app = app.make_client_app(cfg, self.folder)
        # Unordered, as Flower's node ids are.
        self.nodes = [1000 - 7 * (i % 3) + 31 * i for i in range(cfg["num_clients"])]
        self.silent: set[int] = set()
        self.tamper = tamper
        self.sent: list[Message] = []
        self.waiting: list[Message] = []
        self.contexts: dict[int, Context] = {}

    def get_node_ids(self) -> list[int]:
        return self.nodes

    def push_messages(self, messages: list[Message]) -> list[str]:
        for message in messages:
            self.sent.append(message)
            message.metadata.__dict__["_message_id"] = f"message {len(self.sent)}"
        here = [m for m in messages if m.metadata.dst_node_id in self.nodes]
        self.waiting = [m for m in here if m.metadata.dst_node_id not in self.silent]
        return [m.metadata.message_id if m in here else None for m in messages]

    def pull_messages(self, message_ids: set[str]) -> list[Message]:
        if not self.waiting:
            return []
        message = self.waiting.pop()
        node = message.metadata.dst_node_id
        context = self.contexts.setdefault(
            node, Context(1, node, UserConfig(), RecordDict(), UserConfig())
        )
        reply = self.client_app(message, context)
        return [self.tamper(message.content["config"]["partition"], reply)]


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
