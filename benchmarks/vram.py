"""Memory and speed of a training step of the published models, without downloads.

    python benchmarks/vram.py                                        # on a GPU
    python benchmarks/vram.py --models small --batch 2 --seq-length 64 --device cpu

Builds each model with random weights from its configuration (neither memory nor time
depends on their values), quantises it layer by layer, puts LoRA of rank 32 on q_proj and
v_proj, and trains on full-length batches with gradient checkpointing: one step to warm up,
then the measured ones. Prints a Markdown table; GB are 10^9 bytes.
"""

import argparse
import contextlib
import csv
import gc
import logging
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from assets.testbed.llama import PROMPT, build, random_batch, skeleton, train_step
from compute.vram import allocated, estimate_vram

# hidden size, layers, attention heads, intermediate size, vocabulary
SHAPES = {
    "7b": (4096, 32, 32, 11008, 32000),
    "3b": (3200, 26, 32, 8640, 32000),
    "small": (256, 4, 4, 704, 1024),
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


def measure(name: str, bits: int, options: argparse.Namespace) -> dict[str, str]:
    """Build and train one model; a row of the table."""
    device, shape = torch.device(options.device), SHAPES[name]
    torch.manual_seed(0)
    terms = estimate_vram(
        skeleton(shape),
        bits,
        options.micro_batch,
        options.seq_length,
        checkpointing=True,
    )
    memory = Memory(device)
    net = build(shape, bits, device)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5)
    seconds = []
    for _ in range(1 + options.steps):
        batch = random_batch(options.batch, options.seq_length, shape[-1], device)
        _wait_for(device)
        started = time.perf_counter()
        loss = train_step(net, batch, options.micro_batch)
        optimizer.step()
        optimizer.zero_grad()
        _wait_for(device)
        seconds.append(time.perf_counter() - started)
    step = sum(seconds[1:]) / options.steps
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
                f"{options.batch * options.seq_length / step:.0f}",
                f"{loss:.3f}",
            ],
            strict=True,
        )
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--models", nargs="+", choices=SHAPES, default=["7b", "3b"])
    add("--bits", nargs="+", type=int, choices=[4, 8], default=[4, 8])
    add("--batch", type=int, default=16, help="examples a step")
    add("--micro-batch", type=int, help="examples at a time; the batch, if not given")
    add("--seq-length", type=int, default=512, help="tokens an example, above 16")
    add("--steps", type=int, default=3, help="measured steps, after one to warm up")
    add("--device", choices=["cuda", "cpu"], default=default)
    add("--csv", type=Path, metavar="PATH", help="write the table there as well")
    options = parser.parse_args()
    options.micro_batch = options.micro_batch or options.batch
    if options.seq_length <= PROMPT or options.batch < 1 or options.steps < 1:
        parser.error(
            f"--seq-length must be above {PROMPT}, --batch and --steps above 0"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    return options


def main() -> None:
    options = parse()
    # One line for each 8-bit layer and step, on a cast that is meant.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    cpu = options.device == "cpu"
    where = "CPU" if cpu else torch.cuda.get_device_name()
    what = "peak RSS minus that before loading" if cpu else "peak allocated by torch"
    print(
        f"{where}, torch {torch.__version__}, batch {options.batch} x "
        f"{options.seq_length} tokens, {options.micro_batch} examples at a time; "
        f"peak: {what}; estimate: of a GPU\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    rows = []
    for name in options.models:
        for bits in options.bits:
            rows.append(measure(name, bits, options))
            print(f"| {' | '.join(rows[-1].values())} |", flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
