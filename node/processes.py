"""A client on several processes, one a GPU: what `client` does, done by a team of them.

The team starts with the first call and stays, and with it the base that it has loaded. It
ends with the process that started it, however that ends.
"""

import gc
import json
import os
import pickle
import queue
import socket
import sys
import threading
import traceback
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from multiprocessing import Pipe, connection
from subprocess import Popen
from typing import Any

import torch
from torch.distributed import TCPStore, init_process_group

import client
import model
from client import Metrics, State
from utils import PROJECT, Settings, UserError

COMMAND = [sys.executable, "-m", "node.processes"]  # starts a member

HOST = "127.0.0.1"

TIMEOUT = timedelta(hours=1)  # for loading a large base from a slow disk


def initial_adapter(cfg: Settings) -> State:
    """`client.initial_adapter`, by `launch.processes` of them."""
    return _ask(cfg, "initial_adapter")


def first_adapter(cfg: Settings) -> State:
    """What everybody began with, as the server has it: made from the seed without the base,
    whose type would round it, and only where its weights decide as it is made here."""
    try:
        made = _seeded(json.dumps([cfg.model, cfg.peft, cfg.seed], sort_keys=True))
    except UserError:
        return initial_adapter(cfg)
    known = {k: v for k, v in made.items() if torch.isfinite(v).all()}
    return made if len(known) == len(made) else initial_adapter(cfg) | known


@lru_cache(maxsize=1)
def _seeded(key: str) -> State:
    return model.seeded(*json.loads(key))


def train(cfg: Settings, *arguments: Any) -> tuple[State, Metrics]:
    """`client.train`, by `launch.processes` of them; `peak_memory` is the first's.

    A step takes `per_device_train_batch_size` examples for each process, and gives what
    one process would make of them all. Where a process fails none is left over: raises
    its `UserError`, or else `RuntimeError` with the cause.
    """
    return _ask(cfg, "train", *arguments)


def evaluate(cfg: Settings, *arguments: Any) -> Metrics:
    """`client.evaluate`, by `launch.processes` of them; each goes over all records."""
    return _ask(cfg, "evaluate", *arguments)


def personalise(cfg: Settings, *arguments: Any) -> Metrics:
    """`client.personalise`, likewise."""
    return _ask(cfg, "personalise", *arguments)


def _ask(cfg: Settings, name: str, *arguments: Any) -> Any:
    processes = cfg.launch.processes
    if processes == 1:
        return getattr(client, name)(cfg, *arguments)
    resources = cfg.client_resources
    resources = resources | {"num_cpus": resources["num_cpus"] / processes}
    shards = processes if cfg.launch.sharded else 1
    base = cfg.model | {"shards": shards}
    cfg = cfg | {"client_resources": resources, "model": base}
    team = _team(processes, max(1, int(resources["num_cpus"])))
    try:
        return team.ask(name, cfg, *arguments)
    except BaseException:
        _team.cache_clear()
        team.end()
        raise


class Team:
    """Processes that do the same at the same time, each with its rank."""

    def __init__(self, processes: int, threads: int) -> None:
        # Where they find each other, as long as they live, and nobody from outside.
        door = socket.create_server((HOST, 0))
        port = door.getsockname()[1]
        self.store = TCPStore(
            HOST,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=door.detach(),
        )
        self.members: dict[connection.Connection, Popen[bytes]] = {}
        for rank in range(processes):
            here, there = Pipe()
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": processes,
                "LOCAL_WORLD_SIZE": processes,
                "OMP_NUM_THREADS": threads,  # or accelerate would choose it
                "PYTHONPATH": os.pathsep.join([str(PROJECT), *sys.path]),
            }
            self.members[here] = Popen(
                [*COMMAND, str(port), str(there.fileno())],
                env=os.environ | {name: str(x) for name, x in environment.items()},
                pass_fds=[there.fileno()],
            )
            there.close()

    def ask(self, *job: Any) -> Any:
        """Have all do `job`; what the first of them makes of it."""
        for line in self.members:
            with suppress(ConnectionError):  # whoever is gone is missed below
                line.send_bytes(pickle.dumps(job))
        results = {}
        while len(results) < len(self.members):
            ready = connection.wait(self.members.keys() - results.keys())
            # The dead first: what the others have to say is about them.
            for line in sorted(ready, key=lambda x: self.members[x].poll() is None):
                results[line] = self._answer(line)
        return next(results[line] for line in self.members)

    def _answer(self, line: connection.Connection) -> Any:
        try:
            fault, result = pickle.loads(line.recv_bytes())
        except (EOFError, ConnectionError):
            code = self.members[line].wait()
            who = f"process {[*self.members].index(line)} of {len(self.members)}"
            fault = RuntimeError(f"{who} ended with exit code {code}")
        if fault:
            raise fault
        return result

    def end(self) -> None:
        for member in self.members.values():
            member.kill()
        for line, member in self.members.items():
            member.wait()
            line.close()


_team = lru_cache(maxsize=1)(Team)

# --- in a member ------------------------------------------------------------------------


def serve(port: int, descriptor: int) -> None:
    """Do jobs as they come, until whoever sends them is gone."""
    line = connection.Connection(descriptor)
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        # Beside the work, which may be waiting for another process that is gone as well.
        try:
            while True:
                jobs.put(line.recv_bytes())
        except (EOFError, ConnectionError):
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = model.default_device()
    gpu = device if device.type == "cuda" else None
    if gpu:
        torch.cuda.set_device(gpu)
    init_process_group(
        "nccl" if gpu else "gloo",
        store=TCPStore(HOST, port),
        rank=rank,
        world_size=size,
        device_id=gpu,
        timeout=TIMEOUT,
    )
    while True:
        name, *arguments = pickle.loads(jobs.get())
        fault = result = None
        try:
            result = getattr(client, name)(*arguments)
        except UserError as error:
            fault = error
        except Exception as error:
            traceback.print_exc()
            cause = f"{type(error).__name__}: {error}"
            fault = RuntimeError(f"process {rank} of {size}: {cause}")
        line.send_bytes(pickle.dumps((fault, result if rank == 0 else None)))
        # A sharded base that is done with hangs in cycles, and `model` would freeze them.
        gc.collect()


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
