"""pytest tests/test_resident.py: the process of a node that stays, and what ends it (slow)."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import app
from assets.testbed.federation import wait_until
from node import resident
from utils import PROJECT

pytestmark = pytest.mark.slow

SECONDS = 120


@pytest.fixture
def tmp_path(tmp_path):
    """Deeper than a socket's name may be long (107 bytes)."""
    deep = tmp_path / Path("far from the root", "d" * 90)
    deep.mkdir(parents=True)
    return deep


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Trainers of this test alone, none of which outlives it."""
    monkeypatch.setattr(resident.tempfile, "gettempdir", lambda: str(tmp_path))
    yield
    for process in trainers(tmp_path):
        process.kill()


def trainers(folder: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "node.resident" in (process.info["cmdline"] or [])
        and any(str(folder) in word for word in process.info["cmdline"])
    ]


def gone(folder: Path) -> None:
    wait_until(lambda: not trainers(folder), SECONDS, lambda: "it is still there")


def message(overrides: str = "experiment=quickstart") -> Message:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    config = ConfigRecord({"overrides": overrides, "run": "r", "server-round": 1})
    return Message(RecordDict({"config": config}), 1, "train")


def context(**node_config: object) -> Context:
    settings = {name.replace("_", "-"): value for name, value in node_config.items()}
    return Context(1, 1, settings, RecordDict(), {})


def test_one_process_answers_what_the_app_would(tmp_path):
    given, told = message(), context(cpus=1)
    wanted = app.client(given, told).error
    assert "neither data-path nor partition-id" in wanted.reason
    first = resident.Door()(given, told).error
    [trainer] = trainers(tmp_path)
    again = resident.Door()(given, told).error
    assert trainers(tmp_path) == [trainer]
    assert (first.code, first.reason) == (again.code, again.reason)
    assert (first.code, first.reason) == (wanted.code, wanted.reason)
    # Of other settings, of the run's or the node's, nothing of it is used.
    resident.Door()(message("experiment=quickstart seed=1"), told)
    ended = lambda: trainer not in trainers(tmp_path)  # noqa: E731
    wait_until(ended, SECONDS, lambda: "it is still there")
    [other] = trainers(tmp_path)
    resident.Door()(message("experiment=quickstart seed=1"), context(cpus=2))
    assert trainers(tmp_path) != [other]


def test_another_base_under_the_same_name_is_another_purpose(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    told = context(model_path=str(tmp_path))
    before = resident.purpose(message(), told)
    assert resident.purpose(message(), told) == before
    (tmp_path / "model.safetensors").write_bytes(b"another")
    assert resident.purpose(message(), told) != before


def test_it_ends_when_idle_and_0_starts_none(tmp_path):
    given = message()
    assert resident.Door()(given, context(keep_alive=0)).has_error()
    assert not trainers(tmp_path)
    assert resident.Door()(given, context(keep_alive=1)).has_error()
    gone(tmp_path)
    assert not list(resident.home().glob("*.sock"))


def test_it_ends_with_who_asked_and_with_the_supernode(tmp_path):
    """The asker is a child of a process that stands for the SuperNode."""
    script = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])\n"
        "print('asked', flush=True)\n"
        "input()"
    )
    asker = (
        "import sys, tempfile\n"
        "tempfile.gettempdir = lambda: sys.argv[1]\n"
        "from flwr.app import ConfigRecord, Context, Message, RecordDict\n"
        "from flwr.supercore.task_identity import TaskIdentity as who\n"
        "from node import resident\n"
        "who.run_id, who.task_id, who.node_id = 1, 1, 1\n"
        "config = ConfigRecord({'overrides': 'experiment=quickstart', 'run': 'r'})\n"
        "message = Message(RecordDict({'config': config}), 1, 'train')\n"
        "told = Context(1, 1, {'cpus': 1}, RecordDict(), {})\n"
        "assert resident.client(message, told).has_error()\n"
        "assert not {'torch', 'transformers', 'hydra'} & sys.modules.keys()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, asker, str(tmp_path)],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as supernode:
        assert supernode.stdout.readline() == b"asked\n"
        [trainer] = trainers(tmp_path)
        assert trainer.is_running()
        supernode.kill()
    gone(tmp_path)
    assert not list((tmp_path / f"llm-flowertune-{os.getuid()}").iterdir())


def test_a_training_ends_with_the_message_that_asked_for_it(tmp_path):
    """The asker is stopped for good in mid-message, as Flower ends the runs that are stopped."""
    place = resident.home() / f"{os.getppid()}-0.sock"
    (left := resident.home() / f"{2**22 + 1}-0.sock").touch()  # above the highest pid
    parent = psutil.Process(os.getppid())
    line = resident.start(place, b"key", 60, parent)
    assert not left.exists()
    line.send_bytes(b"no message")  # which it begins to read, and fails
    with pytest.raises((EOFError, ConnectionError)):
        line.recv_bytes()
    gone(tmp_path)
    line = resident.start(place, b"key", 60, parent)
    assert len(trainers(tmp_path)) == 1
    line.close()  # before anything was asked: it waits for another
    time.sleep(2 * resident.LOOK)
    assert len(trainers(tmp_path)) == 1
    assert resident.reach(place, b"another purpose") is None
    gone(tmp_path)


def test_another_users_folder_is_not_used(tmp_path):
    folder = tmp_path / f"llm-flowertune-{os.getuid()}"
    folder.mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="not this user's alone"):
        resident.home()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(PermissionError):
        resident.home()
    # A stranger who was there first costs the trainer, and not the answer.
    assert "neither data-path" in resident.Door()(message(), context()).error.reason
    assert not trainers(tmp_path)


def test_a_trainer_that_cannot_start_costs_the_trainer_and_not_the_answer(
    tmp_path, monkeypatch, capsys
):
    """It ends before it has looked at its socket, for want of memory say."""
    monkeypatch.setattr(resident.sys, "executable", shutil.which("false"))
    assert "neither data-path" in resident.Door()(message(), context()).error.reason
    assert "the process that trains did not start" in capsys.readouterr().err
