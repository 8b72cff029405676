"""A round of the app against two bare loops that do the same work.

    python benchmarks/round.py                      3.7M parameters, steps of half a second
    python benchmarks/round.py --size quickstart    the quickstart's model, data and settings

- The *same-arithmetic loop* computes as the public FlowerTune example does: 4-bit base,
  gradient checkpointing, norms, embeddings and head in float32, each batch padded to its
  longest example, logits over all positions. (The example itself takes 1.09 times as long.)
- The *fastest loop* is the fastest that we know to write for that work: everything loaded
  and tokenised beforehand, the base unpacked to bfloat16 once, batches of similar length,
  padded on the right so that they need no mask, causal attention in blocks, LoRA by hand,
  head and loss on answer positions alone. No Flower, no Trainer, no PEFT.

Both take the very records that the app's clients draw, in two processes side by side with
one thread each, as the app runs its two clients; the slower one counts. The app's seconds
are those of `history.json`. First rounds warm up and do not count, anywhere.

Targets: 0.37 or less of the same-arithmetic loop; of the fastest loop 1.10 or less where a
step takes 0.2 s or more, 1.5 or less at the quickstart's size.
"""

import argparse
import csv
import json
import math
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all three on the CPU
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import dataset
import model
import utils
from assets.testbed import loops
from compute import patches
from records import templates
from records.batches import Collator
from settings.compose import compose, resolve

Batch = dict[str, torch.Tensor]

VOCAB_SIZE = 1024
PARAMETERS = 3_737_856
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PATIENCE = 300  # seconds that a loop's process waits for the other one
# Of a client's time, as `client.Clock` books it.
PARTS = ("load", "tokenise", "set", "train", "read")


# --- what is trained on what ---------------------------------------------------------------


def synthesise(path: Path) -> None:
    """Write records of invented words, as long as those of Alpaca-GPT4 are.

    999 of them, 41 % with an input, answers of 115 words in the mean, log-normal.
    """
    rng = random.Random(0)
    parts = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "in", "o", "ur")]
    words = ["".join(rng.choices(parts, k=rng.randint(1, 4))) for _ in range(4000)]
    frequency = [1 / rank for rank in range(1, len(words) + 1)]

    def text(mean: float, sigma: float, longest: int) -> str:
        count = round(min(rng.lognormvariate(mean, sigma), longest))
        return " ".join(rng.choices(words, frequency, k=max(1, count)))

    records = [
        {
            "instruction": text(2.2, 0.4, 70),
            "input": text(1.9, 0.9, 120) if rng.random() < 0.41 else "",
            "output": text(4.3, 1.1, 430),
        }
        for _ in range(999)
    ]
    utils.write_json(path, records)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE of `VOCAB_SIZE` tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL + BYTES,
        limit_alphabet=96,
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    # The trainer knows the bytes as special tokens only; they have to be plain ones.
    bpe = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    tokenizer = Tokenizer(
        models.BPE(bpe["vocab"], merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A $B:1",
        special_tokens=[("<s>", bpe["vocab"]["<s>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def make_base(data: Path, folder: Path) -> None:
    """Write a random LLaMA of 3.74M parameters and a tokenizer made for `data`."""
    records = json.loads(data.read_text())
    tokenizer = make_tokenizer([" ".join(map(str, r.values())) for r in records])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    net = LlamaForCausalLM(config)
    assert net.num_parameters() == PARAMETERS
    net.to(torch.bfloat16).save_pretrained(folder)


def settings(options: argparse.Namespace, folder: Path) -> list[str]:
    """The overrides that the app runs with."""
    common = [
        f"num_rounds={options.rounds + 1}",
        f"train.training_arguments.max_steps={options.steps}",
        "model.quantization=4",
        "client_resources.num_cpus=1",
        "client_resources.num_gpus=0",
        "num_clients=20",
        "strategy.fraction_fit=0.1",
        "evaluate.exact_match=false",
    ]
    if options.size == "quickstart":
        return ["experiment=quickstart", *common]
    data = options.data.resolve() if options.data else folder / "records.json"
    if not options.data:
        synthesise(data)
    make_base(data, folder / "base")
    return [
        "model=tiny",
        f"model.name={folder / 'base'}",
        "model.lora.peft_lora_r=32",
        "model.lora.peft_lora_alpha=64",
        "model.lora.peft_lora_dropout=0.075",
        "model.lora.target_modules=null",
        "dataset=local",
        f"dataset.path={data}",
        "train.seq_length=512",
        *common,
    ]


def draw(cfg: dict[str, Any], partition: int, server_round: int) -> list[Any]:
    """The examples that a client of the app trains on, in the order in which it draws."""
    tokenizer = model.load_tokenizer(cfg["model"]["name"])
    arguments = cfg["train"]["training_arguments"]

    def encode(row: dict[str, Any]) -> Any:
        record = dataset.to_record(row, cfg["dataset"]["columns"])
        template, seq_length = cfg["dataset"]["template"], cfg["train"]["seq_length"]
        return templates.encode(record, template, tokenizer, seq_length)

    examples, _ = dataset.draw(
        dataset.load_partition(cfg, partition),
        encode,
        utils.mix_seed(cfg["seed"], "train", partition, server_round),
        examples=arguments["max_steps"] * arguments["per_device_train_batch_size"],
    )
    return examples


def batches(cfg: dict[str, Any], examples: list[Any], side: str) -> list[Batch]:
    """Consecutive examples, padded on one side to each batch's longest."""
    pad = model.load_tokenizer(cfg["model"]["name"]).pad_token_id
    size = cfg["train"]["training_arguments"]["per_device_train_batch_size"]
    collate = Collator(pad, side)
    return [
        collate(examples[start : start + size])
        for start in range(0, len(examples), size)
    ]


def padding(found: list[Batch]) -> float:
    """The share of padding among all tokens."""
    tokens = sum(int(batch["attention_mask"].sum()) for batch in found)
    return 1 - tokens / sum(batch["input_ids"].numel() for batch in found)


# --- the same-arithmetic loop ----------------------------------------------------------------


def load_4bit(cfg: dict[str, Any], dtype: torch.dtype) -> Any:
    name = utils.local_path(cfg["model"]["name"])
    return loops.load(name, 4, dtype, torch.device("cpu"))


def same_arithmetic_model(cfg: dict[str, Any]) -> torch.nn.Module:
    AttentionInterface.register("sdpa", sdpa_attention_forward)  # transformers' own
    base = load_4bit(cfg, torch.bfloat16)
    return loops.adapted(base, utils.construct(cfg["peft"], "peft"))


def same_arithmetic_loss(net: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return net(**batch).loss


# --- the fastest loop --------------------------------------------------------------------------


class HandLora(torch.nn.Module):
    """A frozen linear layer with a LoRA of rank `r` beside it, its weights in float32."""

    def __init__(
        self, linear: torch.nn.Linear, r: int, alpha: float, dropout: float
    ) -> None:
        super().__init__()
        self.linear = linear
        self.a = torch.nn.Parameter(torch.empty(r, linear.in_features))
        self.b = torch.nn.Parameter(torch.zeros(linear.out_features, r))
        torch.nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.scale = alpha / r / (1 - dropout)
        # 16 random bits an element decide, four elements a draw: half the time of
        # torch's own dropout, and the rate is met to 1e-5.
        self.dropped_below = round(dropout * 2**16) - 2**15
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x
        if self.dropout:
            draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64)
            bits = draws.random_(-(2**63), None).view(torch.int16)[: x.numel()]
            kept = x.masked_fill(bits.view_as(x) < self.dropped_below, 0)
        low = functional.linear(kept, (self.a * self.scale).to(x.dtype))
        return self.linear(x) + functional.linear(low, self.b.to(x.dtype))


def fastest_model(cfg: dict[str, Any]) -> torch.nn.Module:
    dtype = model.compute_dtype(torch.device("cpu"))
    net = load_4bit(cfg, dtype).dequantize()
    net.requires_grad_(False)
    lora = cfg["model"]["lora"]
    every = lora["target_modules"] == "all-linear"
    for name, module in list(net.named_modules()):
        wanted = every or name.endswith(("q_proj", "v_proj"))
        if wanted and isinstance(module, torch.nn.Linear) and name != "lm_head":
            beside = HandLora(
                module,
                lora["peft_lora_r"],
                lora["peft_lora_alpha"],
                lora["peft_lora_dropout"],
            )
            net.set_submodule(name, beside)
    return net


def fastest_loss(net: torch.nn.Module, batch: Batch) -> torch.Tensor:
    # Padded on the right, what counts never looks at padding: no mask is needed.
    hidden = net.model(input_ids=batch["input_ids"], use_cache=False)[0][:, :-1]
    labels = batch["labels"][:, 1:]
    kept = labels != utils.IGNORED
    return functional.cross_entropy(net.lm_head(hidden[kept]).float(), labels[kept])


# --- both loops, timed ---------------------------------------------------------------------------


def train(net: torch.nn.Module, loss_of: Any, found: list[Batch], rate: float) -> float:
    """One round of AdamW over the batches; the mean loss in nats."""
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    total = 0.0
    for batch in found:
        loss = loss_of(net, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    return total / len(found)


def work(
    name: str, cfg: dict[str, Any], partitions: list[int], start: Any, results: Any
) -> None:
    """One process of a loop: train on the i-th partition in round i + 1.

    Puts (round, seconds, mean loss, share of padding) into `results` after each.
    """
    utils.quiet()
    torch.set_num_threads(1)
    torch.manual_seed(cfg["seed"])
    fastest = name == "fastest loop"
    net = fastest_model(cfg) if fastest else same_arithmetic_model(cfg)
    loss_of = fastest_loss if fastest else same_arithmetic_loss
    net.train()
    before = [p.detach().clone() for p in net.parameters() if p.requires_grad]
    rounds = []
    for server_round, partition in enumerate(partitions, start=1):
        examples = draw(cfg, partition, server_round)
        if fastest:
            examples.sort(key=lambda example: len(example["input_ids"]))
        side = "right" if fastest else cfg["train"]["padding_side"]
        rounds.append(batches(cfg, examples, side))
    for server_round, found in enumerate(rounds, start=1):
        start.wait()
        began = time.monotonic()
        loss = train(net, loss_of, found, cfg["train"]["learning_rate_max"])
        seconds = time.monotonic() - began
        results.put((server_round, seconds, loss, padding(found)))
    after = [p for p in net.parameters() if p.requires_grad]
    # A kernel without autograd would leave the adapter as it was, without a word.
    if all(map(torch.equal, before, after)):
        raise RuntimeError(f"{name}: nothing was trained")


def measure_loop(
    name: str, cfg: dict[str, Any], cohorts: list[list[int]]
) -> list[dict[str, Any]]:
    """Run a loop on the app's clients; an entry for each round but the first."""
    context = torch.multiprocessing.get_context("spawn")
    size = len(cohorts[0])
    start, results = context.Barrier(size, timeout=PATIENCE), context.Queue()
    clients = [list(partitions) for partitions in zip(*cohorts, strict=True)]
    workers = [
        context.Process(target=work, args=(name, cfg, partitions, start, results))
        for partitions in clients
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit(f"{name}: a process ended with an error")
    entries = [results.get() for _ in range(size * len(cohorts))]
    return [
        {
            "name": name,
            "round": wanted,
            "seconds": max(e[1] for e in entries if e[0] == wanted),
            "loss": statistics.mean(e[2] for e in entries if e[0] == wanted),
            "padding": statistics.mean(e[3] for e in entries if e[0] == wanted),
        }
        for wanted in range(2, len(cohorts) + 1)
    ]


# --- the app -------------------------------------------------------------------------------------


def run_app(overrides: list[str], folder: Path) -> list[dict[str, Any]]:
    """Run `main.py`; its entries of `history.json`, the first round's as well."""
    command = [sys.executable, "main.py", *overrides, f"hydra.run.dir={folder}"]
    done = subprocess.run(command, cwd=utils.PROJECT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"main.py: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads((folder / "history.json").read_text())["rounds"]


def app_entry(cfg: dict[str, Any], history: dict[str, Any]) -> dict[str, Any]:
    """A round of the app, with the parts of its slowest client's time."""
    slowest = max(history["clients"], key=lambda client: client["seconds"])
    aggregate = history.get("seconds_aggregate", 0.0)
    size = cfg["train"]["training_arguments"]["per_device_train_batch_size"]
    shares = []
    for partition in (client["partition"] for client in history["clients"]):
        examples = draw(cfg, partition, history["round"])
        seed = utils.mix_seed(cfg["seed"], "train", partition, history["round"])
        examples = dataset.group_by_length(examples, size, seed)
        shares.append(padding(batches(cfg, examples, cfg["train"]["padding_side"])))
    return {
        "name": "app",
        "round": history["round"],
        "seconds": history["seconds"],
        "loss": history["train_loss"],
        "padding": statistics.mean(shares),
        **{part: slowest.get(f"seconds_{part}", 0.0) for part in PARTS},
        "transport": history["seconds"] - slowest["seconds"] - aggregate,
        "aggregate": aggregate,
    }


# --- the report ------------------------------------------------------------------------------------


def machine() -> str:
    """The processor, the cores that this process may use, and its bfloat16."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0))
    native = "with" if patches.cpu_has_bfloat16() else "without"
    return f"{name}, {cores} cores, {native} AVX512-BF16"


def report(entries: dict[str, list[dict[str, Any]]], steps: int) -> str:
    """The tables in Markdown, and the two ratios."""
    lines = [
        f"{machine()}; {steps} steps a round, median of {len(entries['app'])} rounds",
        "",
        "| | seconds a round | min | max | padding | loss, nats |",
        "|---|---|---|---|---|---|",
    ]
    medians = {}
    for name, rounds in entries.items():
        seconds = [entry["seconds"] for entry in rounds]
        medians[name] = statistics.median(seconds)
        share, loss = (
            statistics.mean(e[k] for e in rounds) for k in ("padding", "loss")
        )
        lines.append(
            f"| {name} | {medians[name]:.2f} | {min(seconds):.2f} | "
            f"{max(seconds):.2f} | {share:.1%} | {loss:.3f} |"
        )
    lines += ["", "| part of the app's round | seconds |", "|---|---|"]
    for part in (*PARTS, "transport", "aggregate"):
        median = statistics.median(entry[part] for entry in entries["app"])
        lines.append(f"| {part} | {median:.3f} |")
    lines.append("")
    for name in ("same-arithmetic loop", "fastest loop"):
        lines.append(f"round / {name}: {medians['app'] / medians[name]:.2f}")
    return "\n".join(lines)


def positive(text: str) -> int:
    """An option that counts something."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["public", "quickstart"], default="public")
    parser.add_argument(
        "--data", type=Path, help="Alpaca-style json, for --size public"
    )
    parser.add_argument(
        "--rounds", type=positive, default=3, help="that count; default 3"
    )
    parser.add_argument(
        "--steps", type=positive, default=10, help="a round; default 10"
    )
    parser.add_argument("--out", type=Path, help="folder for round.csv and round.md")
    options = parser.parse_args()
    utils.quiet()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = settings(options, folder)
        cfg = resolve(compose(shlex.join(overrides)))
        history = run_app(overrides, folder / "run")
        cohorts = [[c["partition"] for c in entry["clients"]] for entry in history]
        entries = {"app": [app_entry(cfg, entry) for entry in history[1:]]}
        for loop in ("same-arithmetic loop", "fastest loop"):
            entries[loop] = measure_loop(loop, cfg, cohorts)
    text = report(entries, options.steps)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "round.md").write_text(text + "\n")
        with (options.out / "round.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, entries["app"][0])
            writer.writeheader()
            for rounds in entries.values():
                writer.writerows(rounds)
    print(text)


if __name__ == "__main__":
    main()
