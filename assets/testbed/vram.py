"""Memory and speed of a training step of a LLaMA of random weights: a row of a table.

Needs neither Flower nor Hydra nor datasets. GB are 10^9 bytes.
"""

import contextlib
import gc
import resource
import time
from pathlib import Path

import torch

from assets.testbed.llama import build, random_batch, skeleton, train_step
from compute.vram import allocated, estimate_vram

# hidden size, layers, attention heads, intermediate size, vocabulary
SHAPES = {
    "7b": (4096, 32, 32, 11008, 32000),
    "3b": (3200, 26, 32, 8640, 32000),
    "1b": (2048, 22, 32, 5632, 32000),
    "small": (256, 4, 4, 704, 1024),
    "mini": (64, 2, 4, 176, 2048),
}
# VRAM of one client in GB, by the published example; the target is half of it.
PUBLISHED = {("7b", 8): 22.0, ("7b", 4): 16.5, ("3b", 8): 13.5, ("3b", 4): 10.6}
GB = 1e9
COLUMNS = [
    "model",
    "bits",
    "published, GB",
    "target, GB",
    "peak, GB",
    "estimate, GB",
    "step, s",
    "tokens/s",
    "loss",
]


class Memory:
    """The most bytes in use since it was made: on the GPU, or of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = 0
        else:
            # Linux: 5 sets the high-water mark back to what is held now.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            self.before = self._peak_rss()

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self._peak_rss() - self.before

    @staticmethod
    def _peak_rss() -> int:
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(
    name: str,
    bits: int,
    device: torch.device,
    batch: int,
    micro_batch: int,
    seq_length: int,
    steps: int,
) -> dict[str, str]:
    """Build and train one model, a step to warm up and `steps`; a row of the table."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    terms = estimate_vram(
        skeleton(shape),
        bits,
        micro_batch,
        seq_length,
        checkpointing=True,
    )
    memory = Memory(device)
    net = build(shape, bits, device)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5)
    seconds = []
    for _ in range(1 + steps):
        examples = random_batch(batch, seq_length, shape[-1], device)
        wait_for(device)
        started = time.perf_counter()
        loss = train_step(net, examples, micro_batch)
        optimizer.step()
        optimizer.zero_grad()
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    step = sum(seconds[1:]) / steps
    published = PUBLISHED.get((name, bits))
    return dict(
        zip(
            COLUMNS,
            [
                name,
                str(bits),
                f"{published:.1f}" if published else "-",
                f"{published / 2:.2f}" if published else "-",
                f"{memory.peak() / GB:.2f}",
                f"{allocated(terms) / GB:.2f}",
                f"{step:.3f}",
                f"{batch * seq_length / step:.0f}",
                f"{loss:.3f}",
            ],
            strict=True,
        )
    )


def wait_for(device: torch.device) -> None:
    """Until all that was given to a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
