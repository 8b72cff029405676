"""pytest tests/test_gpu.py: the arithmetic of the GPU's limits, and the benchmarks' CPU modes."""

import datetime
import json
import re
import runpy
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from assets.testbed import limits, llama, runs, steps, vram
from utils import PROJECT, UserError

SHAPE = (64, 2, 4, 176, 512)
HIDDEN, _, _, _, VOCABULARY = SHAPE
BATCH, LENGTH, RANK = 2, 32, 32


class Flops(TorchDispatchMode):
    """Counts by torch's own formulas. (Its `FlopCounterMode` fails in `autograd.grad`.)"""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=made)
        return made


def test_flops_are_those_that_torch_counts():
    net = llama.build(SHAPE, 4, torch.device("cpu"))
    net.gradient_checkpointing_disable()
    net.get_base_model().config._attn_implementation = "eager"
    batch = llama.random_batch(BATCH, LENGTH, VOCABULARY, torch.device("cpu"))
    llama.train_step(net, batch, BATCH)  # in which the head is tried
    with Flops() as counter:
        llama.train_step(net, batch, BATCH)
    told = limits.step_flops(llama.skeleton(SHAPE), BATCH, LENGTH)
    tokens, answers = BATCH * LENGTH, BATCH * (LENGTH - llama.PROMPT)
    # Forward the frozen weights have an operator of bitsandbytes', which torch knows no formula
    # of; and "eager" attends to all pairs.
    forward = 2 * tokens * 2 * (4 * HIDDEN**2 + 3 * HIDDEN * 176)
    assert counter.total + forward == (
        told["layers"] + 2 * told["attention"] + told["head"] * answers // tokens
    )
    assert told["recomputed"] == pytest.approx(told["layers"] / 2, rel=0.2)


def test_flops_of_the_published_model_by_hand():
    told = limits.step_flops(llama.skeleton(vram.SHAPES["7b"]), 16, 512)
    frozen = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert told["layers"] == 8192 * (4 * frozen + 6 * 16_777_216)
    assert told["attention"] == 32 * 3 * 2 * 16 * 512**2 * 4096
    assert told["head"] == 4 * 8192 * 4096 * 32000


def test_bytes_by_hand():
    # Half a byte a value, a byte for 64 of them, 4 for 256 of those: q, k, v, o; gate, up, down.
    quantised = 2 * (4 * (2048 + 64 + 4) + 3 * (5632 + 176 + 4))
    rest = 2 * (2 * 512 * 64 + 5 * 64)
    activations = 2 * BATCH * LENGTH * 2 * HIDDEN
    adapter = 2 * 2 * 2 * RANK * HIDDEN
    wanted = 3 * (quantised + rest) + 2 * activations + 32 * adapter
    assert limits.step_bytes(llama.skeleton(SHAPE), 4, BATCH, LENGTH) == wanted


def test_a_trace_is_divided_by_kind_and_idle_time():
    def event(cat, tid, name, ts, dur, **args):
        told = {"cat": cat, "tid": tid, "name": name, "ts": ts, "dur": dur}
        return told | {"ph": "X", "args": args}

    trace = {
        "traceEvents": [
            event("kernel", 7, "void pytorch_flash::flash_bwd_kernel<...>", 0, 4),
            event("kernel", 7, "nvjet_tst_128x256_64x4_2x1_v_bz_TNT", 4, 3),
            event("gpu_memcpy", 8, "Memcpy HtoD (Pinned -> Device)", 5, 4, bytes=9),
            event("kernel", 7, "kDequantizeBlockwise<__nv_bfloat16, 512>", 12, 1),
            event("cuda_runtime", 1, "cudaLaunchKernel", 0, 50),
            {"ph": "M", "name": "process_name"},
        ]
    }
    events = steps.read_trace(trace, cuda=True)
    assert steps.by_kind(events) == {
        "attention": 4,
        "copies to and from the host": 4,
        "matrix products": 3,
        "dequantising": 1,
    }
    assert steps.busy(events) == 10  # up to 9, and 1 more
    assert [more for *_, more in events if more] == [{"bytes": 9}]


def test_time_of_operators_inside_of_others_counts_once():
    nested = [
        ("a", "aten::linear", 0.0, 10.0, {}),
        ("a", "aten::mm", 2.0, 6.0, {}),
        ("a", "aten::copy_", 3.0, 1.0, {}),
        ("b", "aten::mm", 0.0, 4.0, {}),
    ]
    assert steps.by_kind(nested) == {"matrix products": 13, "copies, casts": 1}
    assert steps.busy(nested) == 10


def test_whole_steps_are_watched():
    seen = []

    class Context:
        def __enter__(self):
            seen.append("open")

        def __exit__(self, *_):
            seen.append("close")

    class Trainer:
        def training_step(self, number):
            seen.append(number)

    class Ours(Trainer):
        pass

    span = steps.Span(1, 3, Context)
    with steps.before_steps(Ours, span.step):
        for number in range(5):
            Ours().training_step(number)
    assert seen == [0, "open", 1, 2, "close", 3, 4]
    assert Ours.training_step is Trainer.training_step


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_section_runs_on_a_cpu():
    said = run("benchmarks/gpu.py", "--device", "cpu")
    titles = re.findall(r"^## (\d)", said, flags=re.MULTILINE)
    assert titles == list("12345678")
    passed, checks = map(int, re.search(r"(\d+) of (\d+) checks ok", said).groups())
    assert passed == checks >= 7


def test_a_section_that_is_none_is_refused(monkeypatch, capsys):
    for name in ("HF_HUB_OFFLINE", "TQDM_DISABLE", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "1")  # as it was, afterwards
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device=cpu", "--sections", "9"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(PROJECT / "benchmarks/gpu.py"), run_name="__main__")
    assert "--sections: invalid choice: 9" in capsys.readouterr().err


@pytest.fixture(scope="module")
def apart():
    """Records in two files, as `benchmarks/real_model.py` divides them."""
    return runpy.run_path(str(PROJECT / "benchmarks/real_model.py"))["apart"]


def test_too_few_records_to_hold_some_out_are_refused(apart, tmp_path):
    data = tmp_path / "data.jsonl"
    line = json.dumps({"instruction": "a", "output": "b"}) + "\n"
    data.write_text(9 * line)
    with pytest.raises(UserError, match="a tenth of 9 records is none to test on"):
        apart(data, tmp_path)
    assert [*tmp_path.iterdir()] == [data]
    data.write_text(10 * line)
    train, test = apart(data, tmp_path)
    assert [len(json.loads(path.read_text())) for path in (train, test)] == [9, 1]


def test_runs_on_other_records_are_not_taken_for_ones_on_these(apart, tmp_path):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    for path in (one, other):
        rows = [{"instruction": f"{path.stem} {i}", "output": "b"} for i in range(20)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    apart(one, tmp_path)
    apart(one, tmp_path)
    with pytest.raises(UserError, match="is of other records"):
        apart(other, tmp_path)


def test_a_column_that_nobody_asks_for_may_hold_dates(apart, tmp_path):
    rows = {
        "instruction": [f"{i}" for i in range(10)],
        "at": 10 * [datetime.date(2026, 1, 2)],
        "messages": 10 * [[{"role": "user", "content": "a"}]],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "data.parquet")
    _, test = apart(tmp_path / "data.parquet", tmp_path)
    [row] = json.loads(test.read_text())
    assert row["at"] == "2026-01-02"
    assert row["messages"] == [{"role": "user", "content": "a"}]


def test_a_benchmarks_run_of_other_settings_is_not_taken_for_its_own(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/overrides.yaml").write_text("- seed=0\n- mode=local\n")
    (tmp_path / "summary.json").write_text('{"rounds": 1}')
    given = ["hydra.mode=RUN", "seed=0", "mode=local"]
    assert runs.run(tmp_path, *given) == {"rounds": 1}
    with pytest.raises(SystemExit, match="holds another run: seed=0 mode=local"):
        runs.run(tmp_path, "seed=1", "mode=local")


@pytest.mark.slow
def test_a_model_of_ones_own_is_compared():
    said = run(
        "benchmarks/real_model.py",
        *("--model", "assets/tiny_llama", "--data", "assets/tiny_qa/train.jsonl"),
        *("num_clients=2", "num_rounds=1", "train.training_arguments.max_steps=4"),
        *("train.learning_rate_max=3e-3", "evaluate.max_new_tokens=2"),
    )
    assert "100 held-out records" in said
    rows = [line.split("|")[1:-1] for line in said.splitlines() if "|" in line][2:]
    assert [row[0].strip() for row in rows] == ["base", "alone", "federated", "pooled"]
    losses = [float(row[1]) for row in rows]
    assert max(losses[1:]) < losses[0]
