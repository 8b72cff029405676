"""pytest tests/test_cuda.py: on a machine with a GPU, a run on it is the run of its CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.llama import modeling_llama

import client
import model
from assets.testbed import llama, runs
from assets.testbed.loopback import LoopbackGrid, killed_in
from methods import lora
from server import checkpoint, rounds
from settings import preflight
from settings.compose import compose
from utils import PROJECT, Settings, read_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHORT = (
    "num_clients=4 num_rounds=2 strategy.fraction_fit=0.5 evaluate.exact_match=false "
    "evaluate.every_round=1 train.training_arguments.max_steps=3 "
    "train.training_arguments.per_device_train_batch_size=4"
)
PEFT = ("rslora", "ia3", "dora", "prompt", "prefix", "ptuning")
PEFT += ("miss", "fourierft", "c3a", "shira")
# One of each kind of computation that a client or the server has: bases in bits, PEFT methods,
# tasks, ways of training.
RUNS = {
    **{
        f"{bits} bits": f"experiment=quickstart model.quantization={bits}"
        for bits in ("null", "4", "8")
    },
    **{
        f"peft={name}": f"experiment=quickstart model.quantization=null peft={name}"
        for name in PEFT
    },
    **{
        task: f"experiment={task} model.quantization=null"
        for task in ("classification", "span", "tagging", "seq2seq", "dpo")
    },
    **{
        f"task={task}": f"experiment=dpo task={task} model.quantization=null"
        for task in ("orpo", "kto")
    },
    "checkpointing": "experiment=quickstart model.gradient_checkpointing=true",
    "accumulation": "experiment=quickstart "
    "train.training_arguments.gradient_accumulation_steps=2",
    "ffa": "experiment=quickstart sharing=ffa",
    "svd": "experiment=quickstart strategy=svd",
    "fedprox": "experiment=quickstart strategy=fedprox",
    "scaffold": "experiment=quickstart strategy=scaffold",
    "ditto": "experiment=quickstart personal=ditto strategy.fraction_evaluate=0.25",
    "held out": "experiment=quickstart strategy.fraction_evaluate=1",
}


def settings(*overrides: str) -> Settings:
    return preflight.check(compose(" ".join(overrides)))


def final(folder: Path) -> model.State:
    """The server's state after a run."""
    return checkpoint.read(checkpoint.newest(folder))[0]


def played(
    cfg: Settings, folder: Path, device: str, monkeypatch, exact: bool = True
) -> dict[str, object]:
    """A federation in this process on `device`, in float32 or its own type: its losses and its
    last adapter."""
    with monkeypatch.context() as patch:
        patch.setattr(model, "default_device", lambda: torch.device(device))
        if exact:
            patch.setattr(model, "compute_dtype", lambda device: torch.float32)
        model.forget()
        folder.mkdir()
        rounds.run(cfg, LoopbackGrid(cfg, folder=folder), folder)
        model.forget()
    return {
        "losses": [
            value
            for entry in read_json(folder / "history.json")["rounds"]
            for name, value in sorted(entry.items())
            if name in ("train_loss", "test_loss", "eval_loss") and value is not None
        ],
        "adapter": final(folder),
    }


def same(cfg: Settings, cpu: dict[str, object], gpu: dict[str, object]) -> bool:
    """Whether both are one run, but for the order in which a device adds up."""
    assert len(cpu["losses"]) >= 4
    assert gpu["losses"] == pytest.approx(cpu["losses"], rel=2e-3)
    first = client.initial_adapter(cfg)

    def moved(made: model.State) -> torch.Tensor:
        if cfg.strategy._target_ == "methods.aggregate.Svd":
            # Its factors are one pair of many with this product, which is 0 at first.
            parts = (made[lora.other_half(a)] @ made[a] for a in made if lora.is_a(a))
        else:
            parts = (made[key] - first[key] for key in first)
        return torch.cat([part.float().flatten() for part in parts])

    one, other = moved(cpu["adapter"]), moved(gpu["adapter"])
    # AdamW's first steps go by the signs of gradients, of which those near zero are noise.
    return torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.98


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_a_cpu(name, tmp_path, monkeypatch):
    cfg = settings(RUNS[name], SHORT)
    cpu = played(cfg, tmp_path / "cpu", "cpu", monkeypatch)
    assert same(cfg, cpu, played(cfg, tmp_path / "gpu", "cuda", monkeypatch))
    # In bfloat16, whose attention takes other kernels.
    rough = played(cfg, tmp_path / "rough", "cuda", monkeypatch, exact=False)
    assert rough["losses"] == pytest.approx(cpu["losses"], rel=0.05)


def test_a_run_with_fused_kernels_is_the_one_without(tmp_path, monkeypatch):
    pytest.importorskip("liger_kernel")
    cfg = settings("experiment=quickstart model.quantization=null", SHORT)
    cpu = played(cfg, tmp_path / "cpu", "cpu", monkeypatch)
    # Liger replaces them for all models of the process.
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    fused = settings(
        "experiment=quickstart model.quantization=null client_resources.num_gpus=1",
        "+train.training_arguments.use_liger_kernel=true",
        SHORT,
    )
    assert same(cfg, cpu, played(fused, tmp_path / "gpu", "cuda", monkeypatch))
    assert modeling_llama.LlamaMLP.__name__ == "LigerSwiGLUMLP"


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    cfg = settings(RUNS["4 bits"], SHORT)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
    rounds.run(cfg, LoopbackGrid(cfg, folder=whole), whole)
    killed_in(cfg, halves, replies=3)
    model.forget()
    again = cfg | {"resume": str(halves)}
    rounds.run(again, LoopbackGrid(again, folder=halves), halves)
    one, other = final(whole), final(halves)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_full_gpu_halves_the_batch_and_keeps_the_step(tmp_path, monkeypatch):
    llama.write((512, 4, 8, 1408, 2048), tmp_path / "base", torch.device("cuda"))
    # In bfloat16 the two would differ by its rounding.
    monkeypatch.setattr(model, "compute_dtype", lambda device: torch.float32)
    model.forget()
    cfg = settings(
        f"experiment=quickstart model.name={tmp_path}/base model.quantization=null",
        "train.training_arguments.per_device_train_batch_size=32",
        "train.training_arguments.max_steps=2",
        "+train.training_arguments.optim=sgd",
        "+train.training_arguments.learning_rate=0.5",
    )
    state = client.initial_adapter(cfg)

    def trained(cfg: Settings) -> tuple[torch.Tensor, int, int]:
        """How far it moves the adapter, the micro-batch, and bytes at the most."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        made, told = client.train(cfg, state, 0, 1)
        moved = [(made[name] - state[name]).flatten() for name in state]
        return torch.cat(moved), told["micro_batch"], torch.cuda.max_memory_reserved()

    trained(cfg)  # what the libraries take once
    _, _, least = trained(client.smaller(cfg))
    whole, size, most = trained(cfg)
    assert size == 32
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((least + most) / 2 / total)
    try:
        halved, size, _ = trained(cfg)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        model.forget()
    assert size == 16
    assert (whole - halved).abs().max() < 1e-3 * whole.abs().max()


def test_two_clients_of_rays_share_the_gpu_and_answer(tmp_path):
    folder = tmp_path / "run"
    summary = runs.run(
        folder,
        *("experiment=quickstart", "client_resources.num_gpus=0.5", "num_rounds=2"),
        *("evaluate.exact_match=false", "evaluate.every_round=2"),
    )
    assert summary["test_loss_after"] < summary["test_loss_before"]
    entries = read_json(folder / "history.json")["rounds"]
    # Memory of a GPU's client is what torch took there: a process of a CPU takes 500 MB.
    peaks = [one["peak_memory"] for entry in entries for one in entry["clients"]]
    assert max(peaks) < 2e8
    asked = ["test.py", f"--peft-path={folder}/peft_2", "--question=What is 1 + 1?"]
    answer = subprocess.run(
        [sys.executable, *asked], cwd=PROJECT, stdout=subprocess.PIPE, check=True
    )
    assert answer.stdout.strip()
