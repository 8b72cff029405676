"""All that a GPU run needs, checked and measured on one GPU in under ten minutes, no network.

    python benchmarks/gpu.py                 # on a GPU; on a machine without one, as below
    python benchmarks/gpu.py --device cpu    # the same code at tiny sizes, in a minute or two

Sections, each of which may fail without ending the others:
- what the card multiplies and copies a second, which the others are held against;
- the memory of a step of the published models with random weights, as `benchmarks/vram.py`;
- tokens a second of a client's round on a 7B base of random weights in 4 bits, beside QLoRA as
  it is written with transformers, peft and bitsandbytes, and beside what the card could do;
- where a step's time goes, and whether it takes the fast paths and waits for nothing;
- two clients on one GPU, a 1B base each;
- a federated run with the 1B base: the server's loop and the ClientApp in one process, so that
  it needs no Ray;
- a client's steps with Liger's kernels, if they are installed;
- steps of DP-SGD (`privacy=record`), whose records' gradients are computed together or alone.

Batches are full: 16 examples of 512 tokens. Exits with 1 where a section failed or a check did.
"""

import argparse
import functools
import gc
import json
import logging
import math
import os
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch

import utils
from assets.testbed import limits, llama, steps, vram

LIMIT = 540  # seconds after which no section is begun
PATIENCE = 240  # seconds that one client waits for the other one


@dataclass(frozen=True)
class Size:
    """What is measured: names of `vram.SHAPES`, and a client's batch and steps."""

    table: tuple[str, ...]
    large: str
    small: str
    batch: int
    seq_length: int
    steps: int
    product: int  # rows of a matrix
    copy: int  # bytes


GPU = Size(("7b", "3b"), "7b", "1b", 16, 512, 8, 8192, 2**32)
CPU = Size(("mini",), "mini", "mini", 2, 64, 5, 256, 2**22)
WARM = 2  # steps that are not measured

PASSED: dict[str, bool] = {}


def check(what: str, holds: bool | None, seen: str) -> None:
    """Print whether something that a GPU run needs is there; None: only a GPU can tell."""
    verdict = "-" if holds is None else "ok" if holds else "not"
    print(f"{verdict:>4}  {what}: {seen}", flush=True)
    if holds is not None:
        PASSED[what] = holds


def row(*cells: Any) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(*names: str) -> None:
    row(*names)
    print("|---" * len(names) + "|", flush=True)


def release() -> None:
    """Give back what the last section held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Bench:
    """The sections, and what one leaves for the next."""

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.cuda = device.type == "cuda"
        self.size = GPU if self.cuda else CPU
        self.products = self.copies = math.nan  # a second

    # --- the card -----------------------------------------------------------------------------

    def card(self) -> None:
        import model

        dtype = model.compute_dtype(self.device)
        self.products = limits.product_rate(self.device, dtype, self.size.product)
        self.copies = limits.copy_rate(self.device, self.size.copy)
        name = torch.cuda.get_device_name() if self.cuda else "CPU"
        print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
        print(f"{dtype} products: {self.products / 1e12:.4g} TFLOP/s measured", end="")
        sheet = [rate for card, rate in limits.DATASHEET.items() if card in name]
        print(f", {sheet[0] / 1e12:.4g} by its data sheet" if sheet else "")
        print(f"memory: {self.copies / 1e9:.4g} GB/s measured, read and written")
        native = dtype == torch.bfloat16
        check("computes in bfloat16", native if self.cuda else None, str(dtype))

    # --- memory -------------------------------------------------------------------------------

    def memory(self) -> None:
        head(*vram.COLUMNS)
        size = self.size
        for name in size.table:
            for bits in (8, 4):
                micro = size.batch
                told = vram.measure(
                    name, bits, self.device, size.batch, micro, size.seq_length, 2
                )
                row(*told.values())
                release()
                if not self.cuda:
                    continue
                peak, estimate = float(told["peak, GB"]), float(told["estimate, GB"])
                seen = f"{peak:.2f} GB of {estimate:.2f}"
                what = f"{name} {bits}-bit: "
                check(
                    what + "the estimate is met by 10 %", peak <= 1.1 * estimate, seen
                )
                published = vram.PUBLISHED[name, bits]
                check(
                    what + "half of the published memory, or 5 % more",
                    peak <= 1.05 * published / 2,
                    f"{peak:.2f} GB of {published / 2:.2f}",
                )

    # --- a client's round -----------------------------------------------------------------------

    def base(self, name: str) -> Path:
        """A base of random weights on disk."""
        folder = self.folder / name
        if not folder.exists():
            llama.write(vram.SHAPES[name], folder, self.device)
            release()
        return folder

    def overrides(self, name: str, *more: str) -> list[str]:
        """Of the published default, on a base of random weights and records as long as a batch."""
        size = self.size
        if not (records := self.folder / "records.json").exists():
            made_up(records, count=2 * size.batch * size.steps, words=size.seq_length)
        return [
            *(f"model.name={self.base(name)}", "model.quantization=4"),
            "model.gradient_checkpointing=true",
            *("dataset=local", f"dataset.path={records}", "num_clients=2"),
            *("strategy.fraction_fit=1", "num_rounds=3"),
            f"client_resources.num_cpus={min(8, os.cpu_count()) if self.cuda else 1}",
            f"client_resources.num_gpus={0.5 if self.cuda else 0}",
            f"train.seq_length={size.seq_length}",
            f"train.training_arguments.per_device_train_batch_size={size.batch}",
            f"train.training_arguments.max_steps={size.steps}",
            *more,
        ]

    def tokens(self, count: int) -> int:
        return count * self.size.batch * self.size.seq_length

    @functools.cached_property
    def cfg(self) -> Any:
        """Of a run on the large base."""
        return checked(self.overrides(self.size.large))

    def speed(self) -> None:
        import client

        size, cfg = self.size, self.cfg
        state = client.initial_adapter(cfg)
        seconds, metrics = self.watched(cfg, state)
        measured = size.steps - 1 - WARM
        rates = {
            "client, its steps": self.tokens(measured) / seconds,
            "client, its whole round": metrics["tokens"] / metrics["seconds"],
        }
        check(
            "batches are full",
            metrics["tokens"] == self.tokens(size.steps),
            f"{metrics['tokens']} tokens in {size.steps} steps",
        )
        model_forget()
        rates = {"plain loop": self.plain(cfg)} | rates
        skeleton = llama.skeleton(vram.SHAPES[size.large])
        flops = limits.step_flops(skeleton, size.batch, size.seq_length)
        moved = limits.step_bytes(skeleton, 4, size.batch, size.seq_length)
        once, again = sum(flops.values()) - flops["recomputed"], flops["recomputed"]
        step = self.tokens(1)
        rates |= {
            "limit: the model's products": step * self.products / once,
            "limit: those and the recomputed": step * self.products / (once + again),
            "limit: memory": step * self.copies / moved,
        }
        print(
            f"{size.large}, 4 bits, {size.batch} x {size.seq_length} tokens, checkpointing: "
            f"{once / 1e12:.4g} TFLOP a step and {again / 1e12:.4g} recomputed, at least "
            f"{moved / 1e9:.3g} GB; means of {measured} steps\n"
        )
        head("", "tokens/s", "step, s", "model's TFLOP/s", "of the measured rate")
        for name, rate in rates.items():
            useful = once * rate / step
            share = f"{useful / self.products:.1%}"
            cells = f"{rate:.0f}", f"{step / rate:.4f}", f"{useful / 1e12:.4g}", share
            row(name, *cells)
        faster = rates["client, its steps"] / rates["plain loop"]
        check(
            "a client is not slower than the plain loop",
            faster >= 1 if self.cuda else None,
            f"{faster:.2f}",
        )
        parts = [f"{n} {v:.2f}" for n, v in metrics.items() if n.startswith("seconds")]
        print(f"A client's round: {', '.join(parts)}")

    def watched(
        self, cfg: Any, state: Any, trainer: str = "LocalTrainer"
    ) -> tuple[float, dict[str, Any]]:
        """Seconds of the measured steps of a client's second round, and its metrics."""
        import client

        client.train(cfg, state, 0, 1)
        seconds: list[float] = []
        span = steps.Span(
            WARM,
            self.size.steps - 1,
            functools.partial(steps.timed, self.device, seconds),
        )
        with steps.before_steps(getattr(client, trainer), span.step):
            _, metrics = client.train(cfg, state, 0, 2)
        return seconds[0], metrics

    def plain(self, cfg: Any) -> float:
        """Tokens a second of QLoRA without Flower, Trainer and this app."""
        import model
        from assets.testbed import loops

        size = self.size
        dtype = model.compute_dtype(self.device)
        base = loops.load(cfg.model.name, 4, dtype, self.device)
        net = loops.adapted(base, utils.construct(cfg.peft, "peft")).train()
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.0, fused=True)
        batch = llama.random_batch(
            size.batch, size.seq_length, net.config.vocab_size, self.device
        )
        seconds: list[float] = []
        span = steps.Span(
            WARM, size.steps - 1, functools.partial(steps.timed, self.device, seconds)
        )
        for _ in range(size.steps):
            span.step()
            with model.autocast(net):
                loss = net(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return self.tokens(size.steps - 1 - WARM) / seconds[0]

    # --- a step -------------------------------------------------------------------------------

    def step(self) -> None:
        import client
        import model
        from compute import loss

        size, cfg = self.size, self.cfg
        state = client.initial_adapter(cfg)
        client.train(cfg, state, 0, 1)

        def watched(server_round: int, *opened: Any) -> None:
            span = steps.Span(WARM, size.steps - 1, *opened)
            with steps.before_steps(client.LocalTrainer, span.step):
                client.train(cfg, state, 0, server_round)

        count = size.steps - 1 - WARM
        events: list[steps.Event] = []
        seconds: list[float] = []
        watched(
            2,
            functools.partial(steps.profiled, self.device, events),
            functools.partial(steps.timed, self.device, seconds),
        )
        whole = 1e6 * seconds[0]
        head("kind", "ms a step", "share")
        for kind, length in steps.by_kind(events).items():
            row(kind, f"{length / count / 1e3:.2f}", f"{length / whole:.1%}")
        idle = max(0.0, 1 - steps.busy(events) / whole)
        row("idle", f"{idle * whole / count / 1e3:.2f}", f"{idle:.1%}")
        row("a step, profiled", f"{whole / count / 1e3:.2f}", "100.0%")
        largest: Counter[str] = Counter()
        for _, name, _, length, _ in events:
            largest[name.split("(")[0][:90]] += length
        print("\nLongest, ms a step:")
        for name, length in largest.most_common(8):
            print(f"  {length / count / 1e3:8.2f}  {name}")
        print()

        names = {name for _, name, *_ in events}
        attention = {n[:60] for n in names if re.search(steps.KINDS["attention"], n)}
        flash = any("flash" in name for name in attention)
        only_gpu = self.cuda or None  # "None and x" is None: a CPU has nothing to see
        check(
            "SDPA takes a flash kernel",
            only_gpu and flash,
            ", ".join(sorted(attention)) or "none",
        )
        net = model.build_once(cfg.model, cfg.peft, cfg.seed, self.device)
        way = loss._WAYS[net.get_base_model()].__name__
        check("the head sees answers alone, in chunks", way == "_hidden", way)
        check(
            "weights of the adapter are float32, on the device",
            all(
                p.dtype == torch.float32 and p.device.type == self.device.type
                for p in net.parameters()
                if p.requires_grad
            ),
            f"{sum(p.requires_grad for p in net.parameters())} tensors",
        )
        idle_most = 0.1
        check(
            "the GPU is idle for at most 10 %",
            only_gpu and idle <= idle_most,
            f"{idle:.1%}",
        )

        copies = [
            (name, int(more.get("bytes", 0)))
            for _, name, _, _, more in events
            if re.search("Memcpy (HtoD|DtoH)", name)
        ]
        pageable = [
            b for n, b in copies if "Pageable" in n and "HtoD" in n and b > 4096
        ]
        check(
            "batches come from pinned memory",
            only_gpu and not pageable,
            f"{len(pageable)} others of {len(copies)} copies",
        )
        adapter = sum(value.numel() * 4 for value in state.values())
        moved = sum(size_ for _, size_ in copies) / count
        check(
            "the adapter stays on the device between steps",
            only_gpu and moved < adapter / 10,
            f"{moved / 1e3:.1f} kB a step between host and device; it has {adapter / 1e6:.1f} MB",
        )
        found: Counter[str] = Counter()
        counting = functools.partial(steps.waits, found) if self.cuda else nullcontext
        watched(3, counting)
        total = sum(found.values()) / count
        where = ", ".join(f"{n / count:g} at {at}" for at, n in found.most_common(8))
        check(
            "the host waits for the GPU twice a step at most",
            only_gpu and total <= 2,
            f"{total:g} ({where})",
        )
        model_forget()

    # --- two clients -----------------------------------------------------------------------------

    def pair(self) -> None:
        overrides = self.overrides(self.size.small)
        alone = play(overrides, [0])
        both = play(overrides, [0, 1])
        head(
            "clients", "tokens/s together", "seconds of the slower", "memory of one, GB"
        )
        for name, told in ("one", alone), ("two", both):
            longest = max(seconds for _, seconds, _ in told)
            rate = sum(tokens for tokens, _, _ in told) / longest
            most = max(memory for _, _, memory in told) / vram.GB
            row(name, f"{rate:.0f}", f"{longest:.2f}", f"{most:.2f}")
        check("two clients run side by side", len(both) == 2, f"{len(both)} finished")

    # --- a run ---------------------------------------------------------------------------------

    def run(self) -> None:
        from assets.testbed.loopback import LoopbackGrid
        from server import rounds

        folder = self.folder / "run"
        folder.mkdir()
        test = self.folder / "test.json"
        made_up(test, count=8, words=16, seed=1)
        cfg = checked(
            self.overrides(
                self.size.small,
                *("evaluate.every_round=3", f"dataset.test_path={test}"),
                "model.lora.target_modules=all-linear",
                "train.learning_rate_max=1e-3",
            )
        )
        rounds.run(cfg, LoopbackGrid(cfg, folder=folder), folder)
        model_forget()
        summary = utils.read_json(folder / "summary.json")
        head("round", "loss", "tokens/s of its clients", "seconds")
        for told in utils.read_json(folder / "history.json")["rounds"]:
            rate = sum(c["tokens"] for c in told["clients"]) / told["seconds"]
            row(
                told["round"],
                f"{told['train_loss']:.3f}",
                f"{rate:.0f}",
                f"{told['seconds']:.2f}",
            )
        first, last = summary["train_loss_first"], summary["train_loss_last"]
        check("the federation learns", last < first, f"{first:.3f} -> {last:.3f}")
        before, after = summary["test_loss_before"], summary["test_loss_after"]
        check(
            "the server measures the adapter",
            math.isfinite(before) and after < before,
            f"{before:.3f} -> {after:.3f} on {summary['test_questions']} questions",
        )
        saved = folder / "peft_3/adapter_model.safetensors"
        check("the adapter is written", saved.exists(), saved.name)

    # --- Liger's kernels ----------------------------------------------------------------------

    def fused(self) -> None:
        """A client's steps with them and without, each in a process: they replace those of all
        models of one."""
        if not (self.cuda and find_spec("liger_kernel")):
            print(f"Left out: it takes a GPU, and pip install {utils.LIGER}.")
            return
        head("bits", "kernels", "tokens/s", "step, s", "memory of one, GB")
        liger = ["+train.training_arguments.use_liger_kernel=true"]
        for bits in (4, 8):
            rates = {}
            for name, more in {"transformers'": [], "Liger's": liger}.items():
                context = torch.multiprocessing.get_context("spawn")
                told = f"model.quantization={bits}"
                overrides = self.overrides(self.size.large, told, *more)
                with ProcessPoolExecutor(1, context) as pool:
                    made = pool.submit(steps_of, self.device, self.folder, overrides)
                    rates[name], memory = made.result()
                step = self.tokens(1) / rates[name]
                seen = f"{step:.4f}", f"{memory / vram.GB:.2f}"
                row(bits, name, f"{rates[name]:.0f}", *seen)
            faster = rates["Liger's"] / rates["transformers'"]
            what = f"Liger's kernels are faster, {bits} bits"
            check(what, faster > 1, f"{faster:.2f}")

    # --- gradients of each record ----------------------------------------------------------------

    def each(self) -> None:
        """Steps of a client all of whose records are in each, and one of an ordinary client."""
        import client

        size, few = self.size, self.folder / "few.json"
        made_up(few, count=2 * size.batch, words=size.seq_length)
        private = [
            f"dataset.path={few}",
            "privacy=record",
            *("privacy.epsilon=null", "privacy.noise_multiplier=1"),
        ]
        ways = {
            "without privacy": [],
            "together": private,
            "one by one": [
                *private,
                "train.training_arguments.per_device_train_batch_size=1",
                f"train.training_arguments.gradient_accumulation_steps={size.batch}",
            ],
        }
        head("records", "tokens/s", "step, s", "memory of one, GB")
        rates = {}
        for name, more in ways.items():
            cfg = checked(self.overrides(size.large, *more))
            cfg["residuals"] = str(self.folder / name)
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            trainer = "NoisyTrainer" if more else "LocalTrainer"
            seconds, _ = self.watched(cfg, client.initial_adapter(cfg), trainer)
            memory = client.peak_memory()
            rates[name] = self.tokens(size.steps - 1 - WARM) / seconds
            step = self.tokens(1) / rates[name]
            row(name, f"{rates[name]:.0f}", f"{step:.4f}", f"{memory / vram.GB:.2f}")
        model_forget()
        faster = rates["together"] / rates["one by one"]
        check(
            "records are faster together than one by one",
            faster > 1 if self.cuda else None,
            f"{faster:.2f}",
        )


def made_up(path: Path, count: int, words: int, seed: int = 0) -> None:
    """Records of random words, each longer than `words` tokens of a batch."""
    rng = random.Random(seed)
    parts = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    records = [
        {
            "instruction": f"Say {' '.join(rng.choices(parts, k=3))}.",
            "input": "",
            "output": " ".join(rng.choices(parts, k=words)),
        }
        for _ in range(count)
    ]
    path.write_text(json.dumps(records))


def checked(overrides: list[str]) -> Any:
    """A run's settings, held against this machine."""
    import shlex

    from settings import preflight
    from settings.compose import compose

    return preflight.check(compose(shlex.join(overrides)))


def model_forget() -> None:
    import model

    model.forget()
    release()


# --- clients side by side, each in a process ------------------------------------------------------

BARRIER: list[Any] = []


def begin(barrier: Any) -> None:
    BARRIER.append(barrier)


def one_client(overrides: list[str], partition: int) -> tuple[int, float, int]:
    """A round of a client, after one to warm up: tokens, seconds, bytes at the most."""
    import client

    utils.quiet()
    cfg = checked(overrides)
    state = client.initial_adapter(cfg)
    client.train(cfg, state, partition, 1)
    BARRIER[0].wait()
    _, metrics = client.train(cfg, state, partition, 2)
    return metrics["tokens"], metrics["seconds"], metrics["peak_memory"]


def steps_of(
    device: torch.device, folder: Path, overrides: list[str]
) -> tuple[float, int]:
    """Tokens a second of a client's steps, and bytes at the most."""
    import client

    utils.quiet()
    bench, cfg = Bench(device, folder), checked(overrides)
    seconds, metrics = bench.watched(cfg, client.initial_adapter(cfg))
    measured = bench.size.steps - 1 - WARM
    return bench.tokens(measured) / seconds, metrics["peak_memory"]


def play(overrides: list[str], partitions: list[int]) -> list[tuple[int, float, int]]:
    """Clients side by side; what `one_client` tells of each."""
    context = torch.multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(partitions), timeout=PATIENCE)
    with ProcessPoolExecutor(len(partitions), context, begin, (barrier,)) as pool:
        waiting = [pool.submit(one_client, overrides, each) for each in partitions]
        return [one.result(timeout=PATIENCE) for one in waiting]


# --- all of it ---------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "The card": Bench.card,
    "Memory of a step": Bench.memory,
    "Tokens a second": Bench.speed,
    "Where a step's time goes": Bench.step,
    "Two clients on one device": Bench.pair,
    "A federated run": Bench.run,
    "Liger's kernels": Bench.fused,
    "Gradients of each record": Bench.each,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], help="the GPU, if any")
    parser.add_argument(
        "--sections",
        type=int,
        nargs="+",
        choices=range(1, len(SECTIONS) + 1),
        help="of the eight, these (default: all)",
    )
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    device = (
        torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    )
    utils.quiet()
    # One line for each 8-bit layer and step, on a cast that is meant.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    began, failed = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        bench = Bench(device, Path(folder))
        for number, (title, work) in enumerate(SECTIONS.items(), start=1):
            if options.sections and number not in options.sections:
                continue
            print(f"\n## {number}. {title}\n", flush=True)
            if time.monotonic() - began > LIMIT:
                print(f"Left out: {LIMIT} s are over.")
                failed.append(title)
                continue
            at = time.monotonic()
            try:
                work(bench)
            except Exception:
                traceback.print_exc(limit=-4, file=sys.stdout)
                failed.append(title)
            release()
            print(f"\n({time.monotonic() - at:.0f} s)", flush=True)
    bad = [what for what, holds in PASSED.items() if not holds]
    print(f"\n{len(PASSED) - len(bad)} of {len(PASSED)} checks ok", end="")
    print(f", in {time.monotonic() - began:.0f} s")
    for name in bad:
        print(f"not: {name}")
    for name in failed:
        print(f"failed: {name}")
    sys.exit(bool(bad or failed))


if __name__ == "__main__":
    main()
