"""How start-up, rounds and server memory grow with clients, and memory with replies.

    python benchmarks/scale.py --out results/

First table: 10 to 10,000 virtual clients, 10 of them a round, each with one step on one
record, beside a Flower app with as many clients that load the same libraries and answer.
Start-up runs from the command to the first round; overhead is a round less the time that
its clients worked.

Second table: the server's memory while one round's replies come in, by strategy. It takes
the real server loop on ready-made replies.

Third table: what a client's message costs for what it keeps between rounds, one small tensor,
with as many clients that have kept theirs. Ends within ten minutes on two cores.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
COHORT = 10
ROUNDS = 4
ADAPTER = 500_000  # values: 2 MB in float32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--clients", type=int, nargs="*", default=[10, 100, 1000, 10000]
    )
    parser.add_argument("--replies", type=int, nargs="*", default=[10, 100, 500])
    parser.add_argument("--out", type=Path, help="a folder for scale_*.csv and .md")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        parts = {"flower": run_flower, "replies": run_replies, "kept": run_kept}
        parts[options.part[0]](options.part[1])
        return
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    table = [
        [
            "clients",
            "start-up, s",
            "Flower alone, s",
            "round overhead, s",
            "Flower alone, s",
            "server memory, MiB",
        ]
    ]
    for clients in options.clients:
        ours, flower = measure_app(clients), part("flower", str(clients))
        table.append(
            [
                clients,
                f"{ours['start']:.1f}",
                f"{flower['start']:.1f}",
                f"{ours['overhead']:.2f}",
                f"{flower['overhead']:.2f}",
                f"{ours['memory'] / 2**20:.0f}",
            ]
        )
    write(table, options.out, "clients")
    table = [["strategy", *(f"{count} replies, MiB" for count in options.replies)]]
    for strategy in ("fedavg", "fedadam", "fedmedian"):
        row = [
            part("replies", f"{strategy}:{count}")["memory"]
            for count in options.replies
        ]
        table.append([strategy, *(f"{value / 2**20:.0f}" for value in row)])
    write(table, options.out, "replies")
    kept = [
        [n, f"{part('kept', str(n))['seconds'] * 1e3:.1f}"] for n in options.clients
    ]
    write([["clients", "load and save, ms"], *kept], options.out, "kept")


def measure_app(clients: int) -> dict[str, float]:
    """Run `main.py` with so many clients; start-up and overhead in s, memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "records.jsonl"
        record = {
            "instruction": "Name it.",
            "input": "",
            "output": "It",
            "category": "",
        }
        lines = (json.dumps({**record, "input": str(i)}) for i in range(10_000))
        data.write_text("\n".join(lines))
        command = [
            sys.executable,
            "main.py",
            "experiment=quickstart",
            f"dataset.path={data}",
            "evaluate.exact_match=false",
            f"num_clients={clients}",
            f"strategy.fraction_fit={min(1.0, COHORT / clients)}",
            f"num_rounds={ROUNDS}",
            "train.training_arguments.max_steps=1",
            "train.training_arguments.per_device_train_batch_size=1",
            f"hydra.run.dir={folder}/run",
        ]
        began = time.monotonic()
        first = None
        process = subprocess.Popen(
            command, cwd=PROJECT, stdout=subprocess.PIPE, text=True
        )
        for line in process.stdout:
            if line.startswith("round 1/"):
                first = time.monotonic() - began
        if process.wait():
            sys.exit(f"{clients} clients: exit code {process.returncode}")
        rounds = json.loads((Path(folder) / "run/history.json").read_text())["rounds"]
    overheads = [
        entry["seconds"] - max(client["seconds"] for client in entry["clients"])
        for entry in rounds[1:]
    ]
    # Ten clients share two workers here; what they wait for each other is no overhead.
    busy = [
        sum(client["seconds"] for client in entry["clients"])
        - max(client["seconds"] for client in entry["clients"])
        for entry in rounds[1:]
    ]
    workers = 2
    least = [a - b / workers for a, b in zip(overheads, busy, strict=True)]
    return {
        "start": first - rounds[0]["seconds"],
        "overhead": sorted(least)[len(least) // 2],
        "memory": max(entry["peak_memory_server"] for entry in rounds),
    }


def part(name: str, argument: str) -> dict[str, float]:
    """Run a part of this script in a process of its own, so that memory is its own."""
    began = time.monotonic()
    command = [sys.executable, __file__, "--part", name, argument]
    done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name} {argument}: exit code {done.returncode}")
    result = json.loads(done.stdout.splitlines()[-1])
    if "started" in result:
        result["start"] = result["started"] - began
    return result


def run_flower(clients: str) -> None:
    """A Flower simulation whose clients load our libraries and answer; prints its times.

    While a message waits for its answer, Flower's engine looks through all nodes over and
    over, so a client that takes as long to come up is part of a fair comparison.
    """
    import utils

    utils.quiet()
    from flwr.app import Message, MessageType, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    server, client = ServerApp(), ClientApp()
    result: dict[str, float] = {}

    @client.query()
    def query(message, context):
        import client  # noqa: F401

        return Message(RecordDict(), reply_to=message)

    @server.main()
    def serve(grid, context):
        while len(nodes := list(grid.get_node_ids())) < int(clients):
            time.sleep(0.1)
        times = []
        for _ in range(ROUNDS):
            messages = [
                Message(RecordDict(), node, MessageType.QUERY)
                for node in nodes[:COHORT]
            ]
            began = time.monotonic()
            grid.send_and_receive(messages)
            times.append(time.monotonic() - began)
            # The first answer comes when the workers stand.
            result.setdefault("started", time.monotonic())
        result["overhead"] = sorted(times[1:])[len(times[1:]) // 2]

    run_simulation(
        server,
        client,
        int(clients),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0},
            "init_args": {"log_to_driver": False},
        },
    )
    print(json.dumps(result))


def run_replies(argument: str) -> None:
    """One round of the real server loop on ready-made replies; prints its memory."""
    name, count = argument.split(":")
    import utils
    from settings.compose import compose, resolve

    utils.quiet()
    import torch
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from server.rounds import Server

    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    cfg = resolve(
        compose(
            f"experiment=quickstart strategy={name} num_clients={count} "
            "strategy.fraction_fit=1 comm.dtype=float16"
        )
    )

    class ReadyMade:
        """A grid whose replies come in one by one, each made when it is pulled."""

        def get_node_ids(self):
            return list(range(int(count)))

        def push_messages(self, messages):
            self.waiting = list(messages)
            for number, message in enumerate(self.waiting):
                message.metadata.__dict__["_message_id"] = str(number)
            return [message.metadata.message_id for message in self.waiting]

        def pull_messages(self, message_ids):
            message = self.waiting.pop()
            update = {"w": torch.randn(ADAPTER // 1000, 1000, dtype=torch.float16)}
            metrics = {"num-examples": 160, "train_loss": 1.0, "peak_memory": 0}
            content = RecordDict(
                {"arrays": ArrayRecord(update), "metrics": MetricRecord(metrics)}
            )
            return [Message(content, reply_to=message)]

    server = Server(cfg, ReadyMade())
    state = {"w": torch.zeros(ADAPTER // 1000, 1000)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    server.train_round(1, state)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"memory": (after - before) * 1024}))


def run_kept(clients: str) -> None:
    """Five rounds of ten of so many clients, who all have kept something; prints the processor
    seconds of one client's load and save."""
    import torch

    from methods.store import Kept

    state = {"w": torch.zeros(4)}
    count = int(clients)
    with tempfile.TemporaryDirectory() as folder:
        for partition in range(count):
            Kept(Path(folder), partition, 1).save("residual", state)
        began = time.process_time()
        asked = range(0, count, max(1, count // COHORT))
        for number in range(2, 7):
            for partition in asked:
                kept = Kept(Path(folder), partition, number)
                kept.load("residual")
                kept.save("residual", state)
        seconds = (time.process_time() - began) / (5 * len(asked))
    print(json.dumps({"seconds": seconds}))


def write(table: list[list], folder: Path | None, name: str) -> None:
    """Print a table as Markdown; write it as CSV and Markdown where a folder is given."""
    header, *rows = table
    lines = [header, ["---"] * len(header), *rows]
    text = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    print(text, flush=True)
    if folder:
        (folder / f"scale_{name}.md").write_text(text)
        with (folder / f"scale_{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(table)


if __name__ == "__main__":
    main()
