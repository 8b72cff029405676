"""A client on several processes, one a GPU: what `client` does, done by a team of them.

The team starts with the first call and stays, and with it the base that it has loaded. It
ends with the process that started it, however that ends. It may take in other machines, each
of which runs `python -m node.processes` for its part.
"""

import argparse
import gc
import json
import os
import pickle
import queue
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from multiprocessing import AuthenticationError, Pipe, connection
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

GATHERING = 600.0  # seconds for the other machines to come

# What each machine is told by its own environment, never by a run: how many they are, and the
# secret by which they know each other before anything of theirs is unpickled.
HOSTS, KEY = "LLM_FLOWERTUNE_HOSTS", "LLM_FLOWERTUNE_KEY"

RENDEZVOUS = "LLM_FLOWERTUNE_RENDEZVOUS"  # of a member that knocks at another machine


def initial_adapter(cfg: Settings) -> State:
    """`client.initial_adapter`, by `launch.processes` of them."""
    return _ask(cfg, "initial_adapter")


def first_adapter(cfg: Settings) -> State:
    """What everybody began with, as the server has it: made from the seed without the base,
    in whose type some methods make theirs, and as it is made here where its weights decide."""
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
    address, here, others = cfg.launch.rendezvous, processes, ()
    if address:
        others = address, hosts_here(processes)
        here //= others[1]
    resources = resources | {"num_cpus": resources["num_cpus"] / here}
    zeros = cfg.launch.deepspeed
    shards = processes if cfg.launch.sharded and not zeros else 1
    base = cfg.model | {"shards": shards, "deepspeed": zeros}
    cfg = cfg | {"client_resources": resources, "model": base}
    team = _team(here, max(1, int(resources["num_cpus"])), *others)
    try:
        return team.ask(name, cfg, *arguments)
    except BaseException:
        _team.cache_clear()
        team.end()
        raise


def hosts_here(processes: int) -> int:
    """How many machines a client is on. Raises `UserError` where that is not told, or not
    the same number of its processes would be on each."""
    told = os.environ.get(HOSTS, "")
    if not told.isdecimal() or int(told) < 2 or processes < 1 or processes % int(told):
        raise UserError(
            f"launch.rendezvous: {HOSTS}={told} in the environment must be the number of "
            f"machines, 2 or more, each with the same part of launch.processes={processes}."
        )
    _key()
    return int(told)


def _key() -> bytes:
    if len(key := os.environ.get(KEY, "")) < 16:
        raise UserError(
            f"launch.rendezvous: {KEY} in the environment must be a secret of 16 characters "
            "or more, the same on all machines: export "
            f"{KEY}=$(python -c 'import secrets; print(secrets.token_hex())')"
        )
    return key.encode()


def wait(knocks: socket.socket, seconds: int) -> None:
    """How long a read of the socket waits; 0: for ever."""
    limit = struct.pack("ll", seconds, 0)
    knocks.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def place(address: str) -> tuple[str, int]:
    """The host and the port of host:port. Raises `UserError` where it is none."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"launch.rendezvous={address}: it must be host:port of the machine whose client "
            "this is, 192.0.2.1:29400 say."
        )
    return host, int(port)


class Team:
    """Processes that do the same at the same time, each with its rank: `here` of them on each
    of `hosts` machines, of which this one has the first ranks and is reached at `address`."""

    def __init__(
        self, here: int, threads: int, address: str | None = None, hosts: int = 1
    ) -> None:
        # Where they find each other, as long as they live; nobody from outside without others.
        host = place(address)[0] if address else HOST
        door = socket.create_server((host, 0))
        port = door.getsockname()[1]
        self.store = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=door.detach(),
        )
        self.members: dict[connection.Connection, Popen[bytes] | None] = {}
        for rank in range(here):
            mine, theirs = Pipe()
            told = {"MASTER_ADDR": host}
            size = here, here * hosts
            self.members[mine] = start(theirs, rank, *size, threads, port, told)
        if address:
            try:
                self._gather(address, port, here, hosts)
            except BaseException:
                self.end()
                raise

    def _gather(self, address: str, store: int, here: int, hosts: int) -> None:
        """Take in the other machines' processes, in the order of their ranks."""
        wanted, key = range(here, here * hosts), _key()
        came: dict[int, connection.Connection] = {}
        until = time.monotonic() + GATHERING
        try:
            door = socket.create_server(place(address))
        except OSError as error:
            raise UserError(f"launch.rendezvous={address}: {error}") from error
        with door:
            while len(came) < len(wanted):
                door.settimeout(max(until - time.monotonic(), 0.001))
                try:
                    knocks = door.accept()[0]
                except TimeoutError:
                    raise UserError(
                        f"launch.rendezvous={address}: {len(came)} of {len(wanted)} "
                        f"processes of the other machines came in {GATHERING:g} s. Is "
                        "`python -m node.processes` running there?"
                    ) from None
                knocks.setblocking(True)
                line = connection.Connection(os.dup(knocks.fileno()))
                try:
                    wait(knocks, 10)  # seconds, for a stranger may say nothing
                    connection.deliver_challenge(line, key)
                    connection.answer_challenge(line, key)
                    # ValueError where it is none of them.
                    rank = wanted[wanted.index(int(line.recv_bytes(8)))]
                    line.send_bytes(str(store).encode())
                    wait(knocks, 0)
                    came[rank] = line
                except (AuthenticationError, EOFError, OSError, ValueError):
                    line.close()  # a stranger, or one that is gone again
                knocks.close()
        self.members |= {came[rank]: None for rank in wanted}

    def ask(self, *job: Any) -> Any:
        """Have all do `job`; what the first of them makes of it."""
        for line in self.members:
            with suppress(ConnectionError):  # whoever is gone is missed below
                line.send_bytes(pickle.dumps(job))
        results = {}
        while len(results) < len(self.members):
            ready = connection.wait(self.members.keys() - results.keys())
            # The dead first: what the others have to say is about them.
            for line in sorted(ready, key=self._lives):
                results[line] = self._answer(line)
        return next(results[line] for line in self.members)

    def _answer(self, line: connection.Connection) -> Any:
        try:
            fault, result = pickle.loads(line.recv_bytes())
        except (EOFError, ConnectionError):
            member = self.members[line]
            how = f"with exit code {member.wait()}" if member else "on its machine"
            who = f"process {[*self.members].index(line)} of {len(self.members)}"
            fault = RuntimeError(f"{who} ended {how}")
        if fault:
            raise fault
        return result

    def _lives(self, line: connection.Connection) -> bool:
        member = self.members[line]
        return member is None or member.poll() is None

    def end(self) -> None:
        for member in filter(None, self.members.values()):
            member.kill()
        for line, member in self.members.items():
            if member:
                member.wait()
            line.close()  # at which a process of another machine ends itself


_team = lru_cache(maxsize=1)(Team)


def start(
    line: connection.Connection,
    rank: int,
    here: int,
    size: int,
    threads: int,
    port: int,
    more: Mapping[str, Any],
) -> Popen[bytes]:
    """A member of `size`, of which `here` are on this machine; it takes over its `line`."""
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank % here,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": here,
        "OMP_NUM_THREADS": threads,  # or accelerate would choose it
        "PYTHONPATH": os.pathsep.join([str(PROJECT), *sys.path]),
        **more,
    }
    with line:
        return Popen(
            [*COMMAND, str(port), str(line.fileno())],
            env=os.environ | {name: str(x) for name, x in environment.items()},
            pass_fds=[line.fileno()],
        )


# --- on the other machines ----------------------------------------------------------------


def join(address: str, host: int, hosts: int, here: int, threads: int) -> None:
    """Run this machine's part of the teams at `address`, one after the other, until killed."""
    _key()
    told = {"MASTER_ADDR": place(address)[0], RENDEZVOUS: address}
    while True:
        pipes = [Pipe() for _ in range(here)]  # which break when this ends
        ranks = range(host * here, (host + 1) * here)
        members = [
            start(theirs, rank, here, here * hosts, threads, 0, told)
            for rank, (_, theirs) in zip(ranks, pipes, strict=True)
        ]
        for member, (mine, _) in zip(members, pipes, strict=True):
            member.wait()
            mine.close()
        time.sleep(1)


def reach(address: str) -> tuple[int, connection.Connection]:
    """Knock until a team is there: its store's port, and the line to it."""
    while True:
        with suppress(AuthenticationError, EOFError, OSError):
            line = connection.Client(place(address), authkey=_key())
            line.send_bytes(os.environ["RANK"].encode())
            return int(line.recv_bytes(8)), line
        time.sleep(1)


# --- in a member ------------------------------------------------------------------------


def serve(port: int, descriptor: int) -> None:
    """Do jobs as they come, until whoever sends them is gone."""
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen(line: connection.Connection) -> None:
        # Beside the work, which may be waiting for another process that is gone as well.
        try:
            while True:
                jobs.put(line.recv_bytes())
        except (EOFError, ConnectionError):
            os._exit(1)

    line = connection.Connection(descriptor)
    if address := os.environ.get(RENDEZVOUS):
        # That line says nothing, but when `join` ends.
        threading.Thread(target=listen, args=(line,), daemon=True).start()
        port, line = reach(address)
    threading.Thread(target=listen, args=(line,), daemon=True).start()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = model.default_device()
    gpu = device if device.type == "cuda" else None
    if gpu:
        torch.cuda.set_device(gpu)
    else:
        os.environ["DS_ACCELERATOR"] = (
            "cpu"  # for DeepSpeed, which would look for itself
        )
    init_process_group(
        "nccl" if gpu else "gloo",
        store=TCPStore(os.environ["MASTER_ADDR"], port),
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


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m node.processes")
    parser.add_argument("address", help="launch.rendezvous, on the client's machine")
    parser.add_argument("--host", type=int, required=True, help="which this is, from 1")
    parser.add_argument("--processes", type=int, required=True, help="of all machines")
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="of this one")
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    """Another machine's part: python -m node.processes 192.0.2.1:29400 --host 1 --processes 8"""
    told = parse(words)
    try:
        hosts = hosts_here(told.processes)
        if not 0 < told.host < hosts:
            raise UserError(f"--host={told.host}: it must be from 1 to {hosts - 1}.")
        here = told.processes // hosts
        join(told.address, told.host, hosts, here, max(1, told.cpus // here))
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].isdecimal():
        serve(*map(int, sys.argv[1:]))
    else:
        main(sys.argv[1:])
