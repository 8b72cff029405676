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
from functools import lru_cache
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compute.loss import answer_loss
from compute.patches import release_inputs
from compute.vram import allocated, estimate_vram
from utils import IGNORED

# hidden size, layers, attention heads, intermediate size, vocabulary
SHAPES = {
    "7b": (4096, 32, 32, 11008, 32000),
    "3b": (3200, 26, 32, 8640, 32000),
    "small": (256, 4, 4, 704, 1024),
}
# VRAM of one client in GB, by the published example; the target is half of it.
PUBLISHED = {("7b", 8): 22.0, ("7b", 4): 16.5, ("3b", 8): 13.5, ("3b", 4): 10.6}
PROMPT = 16  # tokens of each example that the loss leaves out
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


def build(shape: tuple[int, ...], bits: int, device: torch.device) -> peft.PeftModel:
    """A LLaMA of random weights, quantised, with LoRA on it, ready to train."""
    base = _on_meta(shape)
    for name, module in list(base.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        # One weight at a time: the unquantised model never exists as a whole.
        base.set_submodule(name, _quantised(module, bits, device))
    _materialise(base, device)
    release_inputs(base)
    # What peft asks for its layers on quantised weights.
    setattr(base, f"is_loaded_in_{bits}bit", True)
    return _adapted(base)


def skeleton(shape: tuple[int, ...]) -> peft.PeftModel:
    """The same model without weights, for the estimate."""
    return _adapted(_on_meta(shape))


def _on_meta(shape: tuple[int, ...]) -> torch.nn.Module:
    hidden, layers, heads, intermediate, vocabulary = shape
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return base.requires_grad_(False)


def _adapted(base: torch.nn.Module) -> peft.PeftModel:
    base.gradient_checkpointing_enable({"use_reentrant": False})
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=32,
        lora_alpha=64,
        lora_dropout=0.075,
        target_modules=["q_proj", "v_proj"],
    )
    return peft.get_peft_model(base, settings).train()


def _quantised(
    linear: torch.nn.Linear, bits: int, device: torch.device
) -> torch.nn.Module:
    """A quantised layer of `linear`'s shape; moving its weight to `device` quantises it."""
    sizes = (linear.in_features, linear.out_features)
    weight = _random_weight(*sizes[::-1])
    if bits == 4:
        layer = bnb.nn.Linear4bit(
            *sizes,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        layer.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=layer,
        ).to(device)
    else:
        # The threshold of transformers' BitsAndBytesConfig.
        layer = bnb.nn.Linear8bitLt(
            *sizes, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
        )
        layer.weight = bnb.nn.Int8Params(
            weight, requires_grad=False, has_fp16_weights=False
        ).to(device)
    return layer.requires_grad_(False)


@lru_cache(maxsize=4)
def _random_weight(rows: int, columns: int) -> torch.Tensor:
    """Shared by all layers of a shape: drawing billions of values would take minutes."""
    return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=0.02)


def _materialise(base: torch.nn.Module, device: torch.device) -> None:
    """Give random values to what is not quantised: embeddings, norms and head."""
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                values = torch.empty_like(parameter, device=device)
                values = (
                    values.fill_(1) if values.ndim == 1 else values.normal_(std=0.02)
                )
                setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    # Buffers (the rotary frequencies) are computed, so they are computed again.
    rotary = base.model.rotary_emb
    base.model.rotary_emb = type(rotary)(config=base.config).to(device)


def random_batch(
    size: int, seq_length: int, vocabulary: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Examples of full length, all answer but a short prompt; int64 (size, length)."""
    ids = torch.randint(vocabulary, (size, seq_length), device=device)
    labels = ids.clone()
    labels[:, :PROMPT] = IGNORED
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
    }


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


def train_step(
    net: peft.PeftModel, batch: dict[str, torch.Tensor], micro_batch: int
) -> float:
    """Forward and backward, `micro_batch` examples at a time; the mean loss in nats."""
    answers = (batch["labels"][:, 1:] != IGNORED).sum()
    total = torch.zeros((), device=answers.device)
    for start in range(0, len(batch["labels"]), micro_batch):
        part = {name: ids[start : start + micro_batch] for name, ids in batch.items()}
        with torch.autocast(answers.device.type, torch.bfloat16):
            loss = answer_loss(net, part, answers)
        loss.backward()
        total += loss.detach()
    return total.item()


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
