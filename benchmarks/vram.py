"""Memory and speed of a training step of the published models, without downloads.

    python benchmarks/vram.py                                        # on a GPU
    python benchmarks/vram.py --models small --batch 2 --seq-length 64 --device cpu

Builds each model with random weights from its configuration (neither memory nor time
depends on their values), quantises it layer by layer, puts LoRA of rank 32 on q_proj and
v_proj, and trains on full-length batches with gradient checkpointing: one step to warm up,
then the measured ones. Prints a Markdown table; GB are 10^9 bytes.
"""

import argparse
import csv
import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from assets.testbed.llama import PROMPT
from assets.testbed.vram import COLUMNS, SHAPES, measure


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
            row = measure(
                name,
                bits,
                torch.device(options.device),
                options.batch,
                options.micro_batch,
                options.seq_length,
                options.steps,
            )
            rows.append(row)
            print(f"| {' | '.join(rows[-1].values())} |", flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
