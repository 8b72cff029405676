"""pytest tests/test_failures.py: a worker that dies in a real run costs one reply (slow)."""

import json

import psutil
import pytest
from test_resume import SHORT, Run, gone

pytestmark = pytest.mark.slow


def workers(run: Run) -> list[psutil.Process]:
    """The processes of a run that train a client at this moment."""
    return [
        process
        for process in run.everything()
        if process.cmdline()[:1] and "ClientAppActor.run" in process.cmdline()[0]
    ]


def test_a_killed_worker_costs_its_reply_and_nothing_else(tmp_path):
    run = Run(
        f"{SHORT} num_rounds=8 train.training_arguments.max_steps=60 "
        f"hydra.run.dir={tmp_path}"
    )
    run.read_until("round 2/8")
    everything = run.everything()
    while not (busy := workers(run)):
        assert run.process.poll() is None
    busy[0].kill()
    assert run.end() == 0, run.said
    history = json.loads((tmp_path / "history.json").read_text())["rounds"]
    failures = [entry["failures"] for entry in history]
    [[failure]] = [each for each in failures if each]
    struck = failures.index([failure])
    assert [entry["replied"] for entry in history[:struck]] == [2] * struck
    assert history[struck]["replied"] == 1
    # A worker takes some seconds to come back, in which the other one does its work.
    assert [entry["replied"] for entry in history[struck + 1 :]] == [2] * (7 - struck)
    assert len(failure["cause"].splitlines()) == 1
    assert run.said.count(failure["cause"]) == 1
    assert "Traceback" not in run.said
    assert gone(everything)
