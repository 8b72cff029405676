"""What a message costs a node of a federation, and what the base kept on disk saves.

    python benchmarks/message.py                 about fifteen minutes on two cores

Flower starts a process for every message. The first table times rounds of a real federation
with one node: as the app is, with a trainer that stays, where each message's process imports
the libraries and loads the base (`keep-alive=0`), by TLS with a node that authenticates itself,
and a Flower app that answers at once (the floor). The second loads bases of random weights, quantised for the
first time and as kept on disk, each in a fresh process, with a forward over eight tokens so
that the weights are really there.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from assets.testbed.federation import Federation  # noqa: E402

SIZES = {  # hidden, intermediate, layers, vocabulary
    "134M": (768, 2048, 12, 32000),
    "1.3B": (2048, 5632, 22, 32000),
}
LOAD = """
import sys, time, torch
sys.path.insert(0, {project!r})
import model
torch.set_num_threads(1)
device = model.default_device()
began = time.monotonic()
base = model.load_base({base!r}, {bits}, device, {cache!r})
with torch.no_grad():
    base(torch.arange(8, device=device)[None])
print(time.monotonic() - began)
"""
FLOOR = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
import time

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    for number in range(int(context.run_config["overrides"])):
        began = time.monotonic()
        ids = set(grid.push_messages([Message(RecordDict(), nodes[0], "train")]))
        while not list(grid.pull_messages(ids)):
            time.sleep(0.02)
        print(f"round took {time.monotonic() - began}", flush=True)


@client.train()
def train(message, context):
    return Message(RecordDict(), reply_to=message)
"""


def make_base(folder: Path, size: str) -> str:
    """A LLaMA of random weights with the tiny base's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, intermediate, layers, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=vocabulary,
    )
    net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    net.save_pretrained(folder / size)
    for file in (PROJECT / "assets/tiny_llama").glob("token*"):
        shutil.copy(file, folder / size)
    return str(folder / size)


def certificates_in(folder: Path) -> Path:
    """A SuperLink's certificate, and the key of one node, as deploy/certs/make.sh has them."""
    folder.mkdir()
    shutil.copy(PROJECT / "deploy/certs/make.sh", folder)
    for what in (["server"], ["node", "node"]):
        subprocess.run(["sh", "make.sh", *what], cwd=folder, check=True)
    return folder


def rounds_of(
    app: Path, overrides: str, node_config: str, certificates: Path | None = None
) -> tuple[list[float], float]:
    """Seconds of each round but the first, and the median of what the client worked.

    With `certificates` by TLS, and the node authenticates itself.
    """
    options = ["--enable-supernode-auth"] if certificates else []
    with (
        tempfile.TemporaryDirectory(prefix="federation-") as folder,
        Federation(Path(folder), *options, certificates=certificates) as federation,
    ):
        key = []
        if certificates:
            own = certificates / "node.key"
            federation.ask("supernode", "register", f"{own}.pub")
            key = [f"--auth-supernode-private-key={own}"]
        federation.supernode("node", node_config, *key)
        status, output = federation.run(app, overrides)
        assert status == "finished:completed", output
        history = list(federation.superlink.folder.glob("outputs/*/*/history.json"))
        if not history:
            lines = [line.split() for line in output.splitlines()]
            times = [
                float(words[2]) for words in lines if words[:2] == ["round", "took"]
            ]
            return times[1:], 0.0
        entries = json.loads(history[0].read_text())["rounds"][1:]
        own = [entry["clients"][0]["seconds"] for entry in entries]
        return [entry["seconds"] for entry in entries], statistics.median(own)


def floor_in(folder: Path) -> Path:
    """The bundle with an app that does nothing in the place of ours."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "outputs", "multirun", "__pycache__"
    )
    shutil.copytree(PROJECT, folder, ignore=ignored)
    (folder / "app.py").write_text(FLOOR)
    about = (folder / "pyproject.toml").read_text()
    about = about.replace("node.resident:client", "app:client")
    (folder / "pyproject.toml").write_text(about)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="message-"))
    floor = floor_in(work / "floor")
    certificates = certificates_in(work / "certificates")
    bases = {size: make_base(work, size) for size in arguments.sizes}

    print("| base | app | round, s | of it the client's work, s |")
    print("|---|---|---|---|")
    times, _ = rounds_of(floor, str(arguments.rounds), "cpus=1")
    print(
        f"| - | a Flower app that does nothing | {statistics.median(times):.1f} | - |"
    )
    for name, base in {"2.2M": "assets/tiny_llama", **bases}.items():
        if name == "1.3B":
            continue  # a step of its training alone takes minutes here
        for label, stays, secured in (
            ("a process for each message", "keep-alive=0", None),
            ("as it is", "", None),
            ("as it is, TLS and authentication", "", certificates),
        ):
            overrides = (
                f"experiment=quickstart model.name={base} num_clients=1 "
                f"num_rounds={arguments.rounds} evaluate.exact_match=false "
                "train.training_arguments.max_steps=1 "
                "train.training_arguments.per_device_train_batch_size=2"
            )
            path = PROJECT / base if name == "2.2M" else base
            node_config = (
                f'data-path="{PROJECT}/assets/tiny_qa/train.jsonl" cpus=1 model-path="{path}" '
                f'cache-path="{work / "cache"}" {stays}'
            )
            times, own = rounds_of(PROJECT, overrides, node_config, secured)
            print(f"| {name} | {label} | {statistics.median(times):.1f} | {own:.1f} |")

    print("\n| base | bits | first load, s | kept on disk, s | ratio |")
    print("|---|---|---|---|---|")
    for name, base in {"2.2M": str(PROJECT / "assets/tiny_llama"), **bases}.items():
        for bits in (4, 8):
            cache = str(work / f"kept-{name}-{bits}")
            script = LOAD.format(
                project=str(PROJECT), base=base, bits=bits, cache=cache
            )
            first, second = (
                float(
                    subprocess.run(
                        [sys.executable, "-c", script],
                        capture_output=True,
                        text=True,
                        check=True,
                    ).stdout.split()[-1]
                )
                for _ in range(2)
            )
            print(
                f"| {name} | {bits} | {first:.2f} | {second:.2f} | {first / second:.0f} |"
            )
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
