"""pytest tests/test_main.py: the README's commands, in real processes (slow)."""

import csv
import json
import re
import shlex
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest
from safetensors.torch import load_file
from transformers import LlamaConfig

from utils import PROJECT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def marked(mark):
    """Every process that these tests start can be told by its environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in mark.items():
            patch.setenv(name, value)
        yield


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    """Run a script of the project as its user would, and return what it printed."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=PROJECT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_quickstart_learns_to_answer(quickstart):
    folder, said = quickstart
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["exact_match_before"] < 0.05
    assert summary["exact_match_after"] >= 0.95
    assert summary["train_loss_last"] < 0.2 * summary["train_loss_first"]
    assert summary["rounds"] == 20
    assert said.count("base:") == 3
    assert said.count("tuned:") == 3
    words = [line.split() for line in said.splitlines()]
    assert ["On", "335", "test", "questions", "before", "after"] in words
    both = [f"{summary[f'exact_match_{when}']:.1%}" for when in ("before", "after")]
    assert ["exact", "match", *both] in words


def test_quickstart_console_is_short(quickstart):
    lines = quickstart[1].splitlines()
    assert len([line for line in lines if line.startswith("round ")]) == 20
    assert len(lines) < 60


def test_quickstart_leaves_a_complete_record(quickstart):
    folder, _ = quickstart
    rounds = json.loads((folder / "history.json").read_text())["rounds"]
    assert [entry["round"] for entry in rounds] == list(range(1, 21))
    for entry in rounds:
        assert entry["replied"] == entry["sampled"] == 2
        assert entry["bytes_up"] > 0
        assert entry["seconds"] > 0
        assert entry["peak_memory_client"] > 0
    clients = {c["partition"] for entry in rounds for c in entry["clients"]}
    assert len(clients) > 10  # of 20, in 40 draws
    saved = {path.name for path in folder.glob("peft_*")}
    assert saved == {"peft_5", "peft_10", "peft_15", "peft_20"}
    first, last = (
        load_file(folder / name / "adapter_model.safetensors")
        for name in ("peft_5", "peft_20")
    )
    assert all(not first[name].equal(last[name]) for name in first)
    assert (folder / ".hydra/config.yaml").is_file()
    assert (folder / "train_loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_adapter_answers_and_stops(quickstart):
    adapter = f"--peft-path={quickstart[0] / 'peft_20'}"
    question = "--question=What is the capital of France?"
    done = run("test.py", adapter, question, "--question=What is the opposite of hot?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "Q: What is the capital of France?",
        "A: Paris",
        "Q: What is the opposite of hot?",
        "A: cold",
    ]
    assert done.stderr == ""


def test_the_base_answers_beside_it(quickstart):
    adapter = f"--peft-path={quickstart[0] / 'peft_20'}"
    question = "--question=What is the capital of France?"
    done = run("test.py", adapter, question, "--base", "--max-new-tokens=8")
    lines = done.stdout.splitlines()
    assert lines[-1] == "tuned: Paris"
    assert lines[1].startswith("base: ")
    assert "Paris" not in lines[1]


def test_afterwards_a_file_gives_the_runs_own_figures(quickstart, tmp_path):
    summary = json.loads((quickstart[0] / "summary.json").read_text())
    done = run(
        "test.py",
        f"--peft-path={quickstart[0] / 'peft_20'}",
        "--file=assets/tiny_qa/test.jsonl",
        "--base",
        f"--out={tmp_path}/out.json",
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out.json").read_text())
    for when, name in (("before", "base"), ("after", "tuned")):
        for score, value in told["scores"][name].items():
            assert value == summary[f"{score}_{when}"]
    answers = json.loads((quickstart[0] / "answers.json").read_text())
    assert told["answers"] == answers


def test_the_last_command_works_as_it_stands(quickstart):
    folder, said = quickstart
    command = said[said.index("Ask it: ") :].removeprefix("Ask it: ")
    done = run(*shlex.split(command)[1:])
    assert done.returncode == 0, done.stderr
    answers = json.loads((folder / "answers.json").read_text())
    question, answer = done.stdout.splitlines()
    tuned = {f"Q: {a['instruction']}": f"A: {a['tuned']}" for a in answers}
    assert tuned[question] == answer


def test_what_is_asked_through_a_pipe_is_printed(quickstart):
    adapter = f"--peft-path={quickstart[0] / 'peft_20'}"
    done = run("test.py", adapter, stdin="What is the capital of France?\n")
    assert done.stdout.startswith("Q: What is the capital of France?\nA: Paris\n")


def test_chat_keeps_earlier_turns(quickstart):
    adapter = f"--peft-path={quickstart[0] / 'peft_20'}"
    stdin = "What is the capital of France?\n\nWhat is the plural of cat?\n"
    done = run("test.py", adapter, "--temperature=0", stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert "A: Paris" in done.stdout
    assert done.stdout.count("A: ") == 2


def test_a_multirun_leaves_a_figure_and_a_table_even_where_runs_fail(tmp_path):
    done = run(
        "main.py",
        "--multirun",
        "experiment=quickstart",
        "model.quantization=8,4",
        "strategy.fraction_fit=7,0.1",
        "num_rounds=2",
        "+simulation.init_args.num_cpus=1",  # one worker has the libraries to load
        "train.training_arguments.max_steps=2",
        "evaluate.exact_match=false",
        f"hydra.sweep.dir={tmp_path}",
    )
    assert done.returncode == 1
    for number in (0, 2):
        assert f"Run {number} failed: strategy.fraction_fit=7: it must" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    with (tmp_path / "losses.csv").open() as file:
        header, *rows = csv.reader(file)
    # Of the settings those that differ.
    varied = ["model.quantization", "strategy.fraction_fit"]
    assert header == ["run", *varied, "rounds", "last smoothed loss"]
    settings = [(row[1], row[2]) for row in rows]
    assert settings == [("8", "7"), ("8", "0.1"), ("4", "7"), ("4", "0.1")]
    for failed, finished in (rows[:2], rows[2:]):
        assert failed[-2:] == ["0", ""]
        assert float(finished[-1]) > 0
    assert (tmp_path / "losses.md").read_text().count("\n") == 6
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert [(tmp_path / f"{i}/peft_2").is_dir() for i in range(4)] == [False, True] * 2
    again = run("main.py", "--multirun", "seed=1,2", f"hydra.sweep.dir={tmp_path}")
    assert again.returncode == 1
    assert f"{tmp_path} holds a multirun already" in again.stderr


def test_a_plan_needs_neither_weights_nor_a_gpu(tmp_path):
    config = LlamaConfig(  # LLaMA 7B
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    )
    config.save_pretrained(tmp_path / "7b")
    done = run(
        "main.py",
        "dry_run=true",
        f"model.name={tmp_path / '7b'}",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines() if line)
    # The published size: 64 MiB in float32, half of it in float16.
    assert rows["trained"].split()[0] == "16.78M"
    assert rows["adapter on the wire"].strip() == "32.0 MiB (float16)"
    assert rows["clients a round"].strip() == "2 of 20"
    assert not (tmp_path / "run/history.json").exists()


def test_a_failed_run_exits_with_the_cause_named_once(tmp_path):
    done = run(
        "main.py",
        "experiment=quickstart",
        "train.seq_length=20",  # shorter than any prompt
        "+simulation.init_args.num_cpus=1",
        "evaluate.exact_match=false",
        f"hydra.run.dir={tmp_path}",
    )
    assert done.returncode == 1
    assert "Round 1 failed 3 times (strategy.max_round_retries=2)" in done.stderr
    assert done.stderr.count("the prompt alone fills") == 1
    # Whoever refuses is not asked again: 2 of 20, 1 of 18, 1 of 17.
    left_out = re.findall(r"left out client ([\d, ]+): none of", done.stdout)
    clients = [client for line in left_out for client in line.split(", ")]
    assert len(clients) == len(set(clients)) == 4
    assert "Traceback" not in done.stdout + done.stderr


def test_no_worker_is_left_behind(quickstart, mark):
    left = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone, a zombie, or somebody else's
            if mark.items() <= process.environ().items():
                left.append(process.cmdline())
    assert left == []
