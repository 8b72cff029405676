"""pytest tests/test_federation.py: the README's federation, as real processes (slow)."""

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from assets.testbed.federation import (
    ONLINE,
    SECONDS,
    Federation,
    Process,
    key,
    make_certs,
    wait_until,
)
from utils import PROJECT

pytestmark = pytest.mark.slow

SENT = "Sending: train message"  # what a SuperNode says of a reply

RUN = (
    "experiment=quickstart num_clients=2 strategy.fraction_fit=1 num_rounds=2 "
    "evaluate.exact_match=false train.training_arguments.max_steps=2"
)


def write_records(file: Path, count: int, **columns: str) -> None:
    """Questions in columns of any name: `frage="instruction"` renames one."""
    source = (PROJECT / "assets/tiny_qa/train.jsonl").read_text().splitlines()
    with file.open("w") as records:
        for line in source[:count]:
            row = json.loads(line)
            row = {name: row[column] for name, column in columns.items()}
            records.write(json.dumps(row) + "\n")


def node_config(folder: Path, **settings: str | int) -> str:
    """A `--node-config` with the base's folder; underscores stand for dashes."""
    settings |= {
        "model_path": str(PROJECT / "assets/tiny_llama"),
        "cache_path": str(folder / "cache"),
        "cpus": 1,
    }
    return " ".join(
        f"{key.replace('_', '-')}={json.dumps(value)}"
        for key, value in settings.items()
    )


def rounds(run_folder: Path) -> list[dict]:
    return json.loads((run_folder / "history.json").read_text())["rounds"]


def results(federation: Federation) -> Path:
    """The folder of the federation's newest run."""
    return max(federation.superlink.folder.glob("outputs/*/*"), key=os.path.getctime)


def test_nodes_with_data_of_their_own_train_together(tmp_path):
    """Sizes and columns differ; one offers too little; the run names a file of theirs."""
    write_records(tmp_path / "a.jsonl", 200, frage="instruction", antwort="output")
    write_records(tmp_path / "b.jsonl", 17, instruction="instruction", output="output")
    write_records(tmp_path / "c.jsonl", 3, instruction="instruction", output="output")
    with Federation(tmp_path / "federation") as federation:
        for name, columns in (
            ("a", {"column_instruction": "frage", "column_output": "antwort"}),
            ("b", {}),
            ("c", {}),
        ):
            data = str(tmp_path / f"{name}.jsonl")
            settings = node_config(tmp_path, data_path=data, column_input="", **columns)
            federation.supernode(name, settings)
        # By epochs, so that a node trains on as many examples as it has records.
        epochs = f"{RUN} num_clients=3 train.training_arguments.max_steps=-1 "
        status, output = federation.run(PROJECT, epochs)
        assert status == "finished:failed"
        assert "Say what to believe at most: strategy.max_weight=5000" in output
        status, output = federation.run(
            PROJECT,
            f"{epochs} strategy.max_weight=500 "
            "dataset=local dataset.path=/etc/passwd hydra.run.dir=results/first",
        )
        assert status == "finished:completed", output
        folder = federation.superlink.folder / "results/first"
        first, second = rounds(folder)
        assert sorted(c["num-examples"] for c in first["clients"]) == [17, 200]
        weighed = sum(c["num-examples"] * c["train_loss"] for c in first["clients"])
        assert first["train_loss"] == pytest.approx(weighed / 217)
        assert second["sampled"] == 2
        assert output.count("it has fewer records than train.min_records") == 1
        assert (folder / "peft_2/adapter_model.safetensors").is_file()
        assert (folder / "train_loss.png").is_file()
        assert (
            "dataset.path=/etc/passwd" in (folder / ".hydra/overrides.yaml").read_text()
        )
        assert f"Results: {folder}" in output
        assert "round 2/2  loss" in output
        assert "Traceback" not in output


def test_a_runs_mistake_is_answered_in_a_line(tmp_path):
    with Federation(tmp_path) as federation:
        status, output = federation.run(PROJECT, f"{RUN} num_rounds=none")
        assert status == "finished:failed"
        assert "num_rounds=none: a whole number is needed" in output
        status, output = federation.run(PROJECT, f"{RUN} +model.lora.alpha=3")
        assert status == "finished:failed"
        assert "the override of model.lora.alpha does more than give a plain" in output
        assert "Traceback" not in output


def test_the_same_app_in_a_local_simulation(tmp_path):
    with Federation(tmp_path, "--simulation") as federation:
        (federation.superlink.folder / "assets").symlink_to(PROJECT / "assets")
        run = federation.flwr(
            "run",
            str(PROJECT),
            "--stream",
            f"--run-config=overrides={json.dumps(RUN)}",
            "--federation-config=num-supernodes=2 client-resources-num-cpus=1",
        )
        status, output = federation.finish(run)
        assert status == "finished:completed", output
        assert [entry["replied"] for entry in rounds(results(federation))] == [2, 2]


def test_a_run_outlives_nodes_that_die_or_are_late(tmp_path):
    """Of three, one is killed and one's training stopped in round 2; both come back.

    Who misses the stopped one first differs with the machine's load: its SuperNode, which
    hears nothing of its process, or the run's timeout (tests/test_exchange.py has that).
    """
    with Federation(tmp_path) as federation:
        nodes = [
            federation.supernode(
                f"node-{i}",
                node_config(tmp_path, partition_id=i, num_partitions=3),
            )
            for i in range(3)
        ]
        run = federation.submit(
            PROJECT,
            f"{RUN} num_clients=3 num_rounds=6 train.round_timeout=100 "
            "train.save_every_round=1",
        )
        run.wait_for(r"round 1/6 .* 3 of 3 clients")
        nodes[1].wait_for(r"(?s)(Receiving: train message.*Start .flwr-clientapp.*){2}")
        # Of one that has not taken its message yet Flower 1.41 never tells that it is gone.
        wait_until(lambda: asks(nodes[1]), 60, nodes[1].tail)
        signal_training(nodes[1], signal.SIGSTOP)
        nodes[2].wait_for(r"(?s)(Receiving: train message.*){2}")
        killed = nodes[2].wait_for(ONLINE)[1]
        nodes[2].kill()
        run.wait_for(r"round 2/6 .* [12] of 3 clients")
        signal_training(nodes[1], signal.SIGCONT)
        nodes[2].start()
        status, output = federation.finish(run)
        assert status == "finished:completed", output
        history = rounds(results(federation))
        lost = str(history[1]["failures"])
        assert re.search("no reply within train.round_timeout=100 s|stopped resp", lost)
        # The stopped one is itself again; the killed one has come back under another id.
        [number] = re.findall(rf"Client (\d) is node {killed}\.", output)
        later = [{c["partition"] for c in entry["clients"]} for entry in history[2:]]
        assert {0, 1, 2, 3} - {int(number)} in later
        assert "Client 3 is node" in output


@pytest.fixture(scope="module")
def registered(tmp_path_factory) -> Iterator[tuple[Federation, list[Process]]]:
    """A federation of two nodes that have keys, and so are the same ones when they come back."""
    folder = tmp_path_factory.mktemp("registered")
    certs = folder / "certs"
    for arguments in (["server"], ["node", "0", "1"]):
        made = make_certs(certs, *arguments)
        assert made.returncode == 0, made.stderr
    auth = "--enable-supernode-auth"
    with Federation(folder / "federation", auth, certificates=certs) as federation:
        nodes = []
        for name in ("0", "1"):
            federation.ask("supernode", "register", str(certs / f"{name}.key.pub"))
            share = {"partition_id": int(name), "num_partitions": 2}
            settings = node_config(folder / name, **share)
            nodes.append(federation.supernode(name, settings, key(certs, name)))
        yield federation, nodes


@pytest.mark.parametrize(
    "words",
    [
        "strategy=scaffold",
        "sharing=rolora comm.dtype=int8 personal=ditto strategy.fraction_evaluate=1",
    ],
)
def test_a_node_that_was_killed_has_what_it_had(words, registered):
    """Between its reply of round 2 and round 3, where nobody else notices that it was gone."""
    federation, (first, second) = registered
    for name in ("whole", "parts"):
        place = f"hydra.run.dir=results/{words.split('=')[0]}/{name}"
        wanted = second.output.count(SENT) + 2
        run = federation.submit(PROJECT, f"{RUN} {words} num_rounds=4 {place}")
        if name == "parts":
            run.wait_for("round 1/4 ")
            # Round 2 does not end without it. Not its SuperNode, which tells that it is there.
            signal_training(first, signal.SIGSTOP)
            second.wait_for(rf"(?s)({SENT}.*?Sent successfully.*?){{{wanted}}}")
            second.kill()
            wait_until(lambda: comes_back(second), SECONDS, second.tail)
            signal_training(first, signal.SIGCONT)
        status, output = federation.finish(run)
        assert status == "finished:completed", output
    folder = federation.superlink.folder / f"results/{words.split('=')[0]}"
    whole, parts = (
        load_file(folder / f"{name}/peft_4/adapter_model.safetensors")
        for name in ("whole", "parts")
    )
    assert all(parts[name].equal(value) for name, value in whole.items())
    one, other = rounds(folder / "whole"), rounds(folder / "parts")
    for name in ("train_loss", "replied", "failures", "bytes_down", "eval_loss_own"):
        assert [e.get(name) for e in one] == [e.get(name) for e in other]


def comes_back(node: Process) -> bool:
    """Whether a node that was killed is let in: once its last heartbeat is a minute or two old."""
    node.start()
    return not node.wait_for(f"{ONLINE}|Failed to activate")[0].startswith("Failed")


def asks(process) -> bool:
    """Whether a message's process of this SuperNode has handed it to the node's trainer."""
    for each in psutil.Process(process.popen.pid).children(recursive=True):
        with suppress(psutil.Error):
            files = [Path(file.path) for file in each.open_files()]
            if any("llm-flowertune-" in f.parent.name for f in files):
                return True
    return False


def signal_training(process, signal_number: int) -> None:
    """Stop or go on with what a SuperNode has started to answer a message."""
    for each in psutil.Process(process.popen.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a child may end in this moment
            each.send_signal(signal_number)


def test_what_a_superlink_with_a_database_remembers(tmp_path):
    """Runs and nodes are back after a restart; a run that was going on has to be resumed."""
    database = tmp_path / "state.db"
    with Federation(tmp_path / "federation", f"--database={database}") as federation:
        settings = node_config(tmp_path, partition_id=0, num_partitions=1)
        federation.supernode("node", settings)
        alone = f"{RUN} num_clients=1 train.save_every_round=1"
        run = federation.submit(PROJECT, f"{alone} num_rounds=50")
        run.wait_for("round 2/50")
        run_id = run.wait_for(r"started run (\d+)")[1]
        folder = results(federation)
        federation.superlink.kill()
        federation.superlink.start()
        federation.superlink.wait_for("Uvicorn running on")
        assert [run["run-id"] for run in federation.ask("ls")["runs"]] == [run_id]
        # What the broken run had finished is on disk, whole, and another run goes on with
        # it. The SuperNode was never started again.
        done = len(rounds(folder))
        assert done >= 2
        assert (folder / "peft_2/adapter_model.safetensors").is_file()
        goes_on = f"resume={folder} num_rounds={done + 1}"
        status, output = federation.run(PROJECT, goes_on)
        assert status == "finished:completed", output
        assert re.search(r"Going on after round \d", output)
        assert len(rounds(folder)) == done + 1
        # It takes the SuperLink a minute to miss the ServerApp that died with it: until
        # then its run counts as running.
        statuses = {r["run-id"]: r["status"] for r in federation.ask("ls")["runs"]}
        assert statuses.pop(run_id) in ("running", "finished:failed")
        assert list(statuses.values()) == ["finished:completed"]
