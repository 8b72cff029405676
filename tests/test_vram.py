"""pytest tests/test_vram.py: the benchmark runs, and the estimate against a real step."""

import gc
import math
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import architectures
from assets.testbed import llama
from assets.testbed.vram import SHAPES
from compute.loss import answer_loss
from compute.vram import allocated, estimate_vram
from utils import PROJECT

CPU = torch.device("cpu")
SHAPE = (256, 4, 4, 704, 512)
BATCH, LENGTH = 4, 128


@pytest.fixture(scope="module", autouse=True)
def first_use() -> None:
    """The first use of bitsandbytes draws a number and allocates."""
    for bits in (4, 8):
        step(llama.build(SHAPE, bits, CPU), llama.random_batch(1, 8, SHAPE[-1], CPU))


class Live(TorchDispatchMode):
    """Counts the bytes of tensors made under it that are alive, now and at the most."""

    def __init__(self) -> None:
        super().__init__()
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
        self.known = {t.untyped_storage()._cdata for t in tensors if not t.is_meta}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def step(net, batch) -> tuple[int, int, torch.Tensor]:
    """Bytes alive after the forward pass, the most of them in a step, and the gradients."""
    net.zero_grad()
    torch.manual_seed(0)
    with Live() as live:
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer_loss(net, batch)
        held = live.now
        loss.backward()
    gradients = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
    return held, live.most, torch.cat(gradients)


@pytest.fixture(autouse=True)
def attention_of_a_gpu():
    """The estimate is of a GPU's step, whose attention holds no products."""
    with architectures.plain_attention():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_the_estimate_is_what_a_step_allocates(bits, monkeypatch):
    # Without arguments this asks about CUDA; what peft does there is to be measured.
    real = torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda *device: real(*device) if device else True
    )
    net = llama.build(SHAPE, bits, CPU)
    batch = llama.random_batch(BATCH, LENGTH, SHAPE[-1], CPU)
    _, most, _ = step(net, batch)
    terms = estimate_vram(llama.skeleton(SHAPE), bits, BATCH, LENGTH, True)
    during = ("activations", "layer in work", "adapter in bfloat16", "gradients")
    # Products in int32 are a GPU's: two bytes a value more than what else is there then.
    less = 2 * BATCH * LENGTH * SHAPE[3] if bits == 8 else 0
    assert sum(terms[name] for name in during) - less == pytest.approx(most, rel=0.1)


# GB that benchmarks/gpu.py measured on an H200 (docs/gpu.md): 16 x 512 tokens, checkpointing.
MEASURED = {("7b", 8): 11.75, ("7b", 4): 8.20, ("3b", 8): 6.96, ("3b", 4): 5.15}


@pytest.mark.parametrize(("size", "bits"), MEASURED)
def test_the_estimate_is_what_a_gpu_took(size, bits):
    terms = estimate_vram(llama.skeleton(SHAPES[size]), bits, 16, 512, True)
    assert allocated(terms) / 1e9 == pytest.approx(MEASURED[size, bits], rel=0.025)


@pytest.mark.slow
def test_checkpointing_frees_the_inputs_of_8_bit_layers(monkeypatch):
    batch = llama.random_batch(BATCH, LENGTH, SHAPE[-1], CPU)
    torch.manual_seed(0)
    freed = step(llama.build(SHAPE, 8, CPU), batch)
    monkeypatch.setattr(llama, "release_inputs", lambda base: None)
    torch.manual_seed(0)
    kept = step(llama.build(SHAPE, 8, CPU), batch)
    hidden, layers, _, intermediate, _ = SHAPE
    inputs = BATCH * LENGTH * layers * 2 * (3 * hidden + intermediate)
    assert kept[0] - freed[0] == pytest.approx(inputs, rel=0.05)
    assert torch.equal(freed[2], kept[2])


@pytest.mark.slow
def test_micro_batches_add_up_to_the_batch():
    net = llama.build(SHAPE, 4, CPU).eval()
    batch = llama.random_batch(BATCH, 32, SHAPE[-1], CPU)
    whole = llama.train_step(net, batch, BATCH)
    assert llama.train_step(net, batch, 1) == pytest.approx(whole, rel=1e-3)


@pytest.mark.slow
def test_the_benchmark_needs_neither_flower_nor_hydra_nor_datasets():
    absent = ["flwr", "flwr_datasets", "datasets", "hydra", "omegaconf"]
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({absent}));"
        "runpy.run_path('benchmarks/vram.py')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_benchmark_prints_a_table_of_finite_figures(tmp_path):
    command = [sys.executable, "benchmarks/vram.py", "--models", "small"]
    sizes = ["--batch", "2", "--seq-length", "64", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--bits", "4", "8", *sizes, "--csv", str(tmp_path / "vram.csv")],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("| small")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[:4] for row in rows] == [["small", bits, "-", "-"] for bits in "48"]
    for row in rows:
        assert all(math.isfinite(float(cell)) for cell in row[4:])
    assert "peak RSS" in done.stdout
    assert len((tmp_path / "vram.csv").read_text().splitlines()) == 3
