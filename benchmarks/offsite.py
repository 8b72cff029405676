"""Offsite-tuning: does an adapter that was trained on an emulator serve the base?

    python benchmarks/offsite.py --out offsite/                # 3 seeds
    python benchmarks/offsite.py --out offsite/ --seeds 0 --rounds 4

The base: eight layers, 4M parameters, made of tiny_llama (`assets/make_tiny.py`). Its emulators
keep two layers at either end and two of the four between, as they are and distilled on
statements such as the base has read. On each, two of the quickstart's clients a round train with
`peft=outer` in this process, and their mean is the next adapter. Plugged into the base by its
map, it is asked the same test questions as the base and as the emulator. Prints a Markdown
table. What is in the folder already is not made again.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import client
import model
from assets import make_tiny
from evaluation import examine
from settings import preflight
from settings.compose import compose
from utils import PROJECT, Settings, quiet, read_json, table, write_json

WAYS = ["drop", "distilled"]  # to an emulator

DISTIL = "--steps=100 --learning-rate=2e-4 --batch-size=8 --seq-length=64"


def call(*words: str) -> None:
    """Run a command of the project's, silently; end where it fails."""
    done = subprocess.run(
        [sys.executable, *words], cwd=PROJECT, stdout=subprocess.DEVNULL
    )
    if done.returncode:
        sys.exit(f"{shlex.join(words)}: exit code {done.returncode}")


def emulator(out: Path, name: str, base: Path) -> Path:
    """The base's emulator of that name."""
    data, folder = out / "public.jsonl", out / name
    if not data.exists():
        facts = make_tiny.load_facts(make_tiny.HERE / "facts.yaml")
        said = make_tiny.documents(facts, random.Random(1))
        lines = [json.dumps({"text": next(said)}) + "\n" for _ in range(6000)]
        data.write_text("".join(lines))
    if not folder.exists():
        more = [f"--distil={data}", *DISTIL.split()] if name == "distilled" else []
        command = ("-m", "methods.emulator", f"--base={base}", "--keep=2")
        call(*command, "--drop=0.5", *more, str(folder))
    return folder


def trained(cfg: Settings, folder: Path) -> Path:
    """The folder of an adapter after the rounds of `cfg`."""
    if not folder.exists():
        order = random.Random(cfg.seed).sample(range(cfg.num_clients), cfg.num_clients)
        state = client.initial_adapter(cfg)
        for number in range(1, cfg.num_rounds + 1):
            chosen = [order[(2 * number + i) % cfg.num_clients] for i in (0, 1)]
            new = [client.train(cfg, state, one, number)[0] for one in chosen]
            state = {k: torch.stack([each[k] for each in new]).mean(0) for k in state}
        client.save(cfg, state, folder, cfg.num_rounds)
    return folder


def losses(cfg: Settings, folder: str) -> list[float]:
    """On the test questions, of the base that the adapter's folder names, and with it."""
    opened = model.open_adapter(folder, model.read_about(folder), torch.device("cpu"))
    asked = examine.Examination(cfg, opened)
    return [scores["test_loss"] for scores, _ in (asked.base(), asked.tuned())]


def measured(out: Path, name: str, seed: int, rounds: int) -> list[float]:
    """Losses of the base, of the emulator before and after, and of the base plugged in."""
    base, noted = out / "tiny_deep", out / f"losses-{name}-{seed}-{rounds}.json"
    if not noted.exists():
        given = (
            f"experiment=quickstart peft=outer model.name={emulator(out, name, base)} "
            f"model.quantization=null evaluate.exact_match=false num_rounds={rounds} "
            f"seed={seed}"
        )
        cfg = preflight.check(compose(given))
        folder = trained(cfg, out / f"adapter-{name}-{seed}-{rounds}")
        before, after = losses(cfg, str(folder))
        with model.plugged(str(folder), str(base)) as made:
            untuned, plugged = losses(cfg, made)
        write_json(noted, [untuned, before, after, plugged])
    return read_json(noted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="what is made, is kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--emulators", nargs="+", default=WAYS, choices=WAYS)
    options = parser.parse_args()
    quiet()
    model.use_cpus(1)
    out = options.out.resolve()
    if not (out / "tiny_deep").exists():
        call("assets/make_tiny.py", "--model", "tiny_deep", "--out", str(out))
    body: list[list[Any]] = [
        [
            name,
            seed,
            *(f"{loss:.3f}" for loss in measured(out, name, seed, options.rounds)),
        ]
        for name in options.emulators
        for seed in options.seeds
    ]
    print(f"Loss on the test questions, nats per answer token; {options.rounds} rounds")
    head = ["emulator", "seed", "base, untuned", "emulator, untuned", "emulator, tuned"]
    print(table([*head, "plugged in"], body))


if __name__ == "__main__":
    main()
