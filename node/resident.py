"""A node's messages, answered by one process that stays, with the base in its memory.

Flower starts a process for every message. That one imports nothing of ours but this file: it
hands the message to the node's trainer, which it starts where there is none, and hands back
the answer. The trainer ends with the SuperNode, after `keep-alive` seconds without a message,
when whoever asked is gone (a run that is stopped, say), and when a message is of another
bundle, other settings or another node's configuration than it was started for.
"""

import fcntl
import hashlib
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

import psutil
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

PROJECT = Path(__file__).resolve().parents[1]

# Seconds, unless --node-config keep-alive says otherwise; 0: no trainer.
KEEP_ALIVE = 600

LOOK = 1.0  # seconds between two looks for the SuperNode


class Door(ClientApp):
    """The app's client, by way of the node's trainer."""

    def __call__(self, message: Message, context: Context) -> Message:
        stays = context.node_config.get("keep-alive", KEEP_ALIVE)
        ray = sys.modules.get("ray")  # whose workers stay by themselves
        if type(stays) is int and stays > 0 and not (ray and ray.is_initialized()):
            try:
                return ask(message, context, stays)
            except BlockingIOError:  # the trainer is at work for another message
                pass
            except OSError as error:
                print(f"No trainer is used: {error}", file=sys.stderr)
        return here(message, context)


def here(message: Message, context: Context) -> Message:
    """Answer in this process."""
    import app

    return app.client(message, context)


# --- in a message's process -----------------------------------------------------------------


def ask(message: Message, context: Context, stays: int) -> Message:
    """The trainer's answer.

    Raises `BlockingIOError` where it has another message, and `OSError` where none can be
    reached or started.
    """
    parent = psutil.Process(os.getppid())
    name = f"{parent.pid}-{int(parent.create_time())}"
    with turn(home() / f"{name}.lock"):
        place = home() / f"{name}.sock"
        key = purpose(message, context)
        line = reach(place, key) or start(place, key, stays, parent)
        try:
            line.send_bytes(pickle.dumps((message, context)))
            answer, context.state = pickle.loads(line.recv_bytes())
        except (EOFError, ConnectionError):
            reason = "the process that trains has ended: the node's own log says more"
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
            return Message(error, reply_to=message)
        finally:
            line.close()
    return answer


def home() -> Path:
    """Where this user's trainers are reached: a folder that is closed to all others."""
    folder = Path(tempfile.gettempdir()) / f"llm-flowertune-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
        raise PermissionError(f"{folder} is not this user's alone")
    return folder


def turn(file: Path) -> TextIO:
    """Held by one message's process at a time, for as long as it lives."""
    held = file.open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise
    return held


@contextmanager
def address(place: Path) -> Iterator[str]:
    """The socket's name in few bytes: there is room for 107, and for 103 on macOS.

    A temporary folder may be deeper than that; Linux names an open one by its number.
    """
    folder = os.open(place.parent, os.O_RDONLY)
    try:
        numbered = Path(f"/proc/self/fd/{folder}")
        yield str((numbered if numbered.exists() else place.parent) / place.name)
    finally:
        os.close(folder)


def purpose(message: Message, context: Context) -> bytes:
    """What a trainer is started for: the bundle, the run's settings, the node's own, its base."""
    config, own = message.content.config_records.get("config", {}), context.node_config
    told = [str(PROJECT), config.get("overrides"), sorted(own.items())]
    if "model-path" in own:  # whose files may be others under the same name
        files = Path(str(own["model-path"])).expanduser().glob("*")
        stats = [(file.name, file.stat()) for file in files]
        told += sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    return hashlib.sha256(json.dumps(told, default=str).encode()).digest()


def reach(place: Path, key: bytes) -> Connection | None:
    """A line to the trainer that is there for `key`; one that is there for another ends."""
    door = socket.socket(socket.AF_UNIX)
    try:
        with address(place) as short:
            door.connect(short)
    except OSError:
        door.close()
        return None
    line = Connection(door.detach())
    with suppress(EOFError, ConnectionError):
        line.send_bytes(key)
        if line.recv_bytes() == key:
            return line
    line.close()
    return None


def start(place: Path, key: bytes, stays: int, parent: psutil.Process) -> Connection:
    """Start a trainer, and a line to it."""
    for left in place.parent.glob("[0-9]*-*"):  # of SuperNodes that a power cut ended
        if not psutil.pid_exists(int(left.name.partition("-")[0])):
            left.unlink(missing_ok=True)
    place.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as door:
        with address(place) as short:
            door.bind(short)
        door.listen()
        told = [door.fileno(), stays, parent.pid, place]
        subprocess.Popen(
            [sys.executable, "-m", "node.resident", *map(str, told), key.hex()],
            cwd=PROJECT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(PROJECT), *sys.path])},
            pass_fds=[door.fileno()],
            start_new_session=True,  # what ends a message's process leaves it alone
        )
    # The socket is the trainer's alone now: where that ends early, the line does.
    line = reach(place, key)
    if line is None:
        raise ChildProcessError("the process that trains did not start")
    return line


# --- in the trainer ---------------------------------------------------------------------------


def stay(
    door: socket.socket, stays: float, parent: psutil.Process, place: Path, key: bytes
) -> None:
    """Answer messages as they come, until nobody needs that any more."""
    threading.Thread(target=outlive, args=(parent, place), daemon=True).start()
    door.settimeout(stays)
    while True:
        try:
            line = Connection(door.accept()[0].detach())
        except TimeoutError:
            # A message that is about to knock has the lock already.
            with suppress(BlockingIOError), turn(place.with_suffix(".lock")):
                place.unlink(missing_ok=True)
                return
            continue
        with line, suppress(EOFError, ConnectionError):
            fits = line.recv_bytes() == key
            line.send_bytes(key if fits else b"another")
            if not fits:
                return
            answer(line)


def answer(line: Connection) -> None:
    """Answer the message on the line; end where the other side is gone before that."""
    message, context = pickle.loads(line.recv_bytes())
    told = threading.Event()

    def listen() -> None:
        with suppress(EOFError, OSError):
            line.recv_bytes()  # nothing comes: it ends
        if not told.is_set():
            os._exit(1)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    made: tuple[Any, Any] = here(message, context), context.state
    sent = pickle.dumps(made)
    told.set()
    line.send_bytes(sent)
    listener.join()


def outlive(parent: psutil.Process, place: Path) -> None:
    """End when the SuperNode has, however that was."""
    # Not by the time that it was started at, which moves when the clock is set.
    with suppress(psutil.NoSuchProcess):
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            time.sleep(LOOK)
    for file in (place, place.with_suffix(".lock")):
        file.unlink(missing_ok=True)
    os._exit(0)


client = Door()

if __name__ == "__main__":
    descriptor, keep, number, path, key_in_hex = sys.argv[1:]
    stay(
        socket.socket(fileno=int(descriptor)),
        float(keep),
        psutil.Process(int(number)),
        Path(path),
        bytes.fromhex(key_in_hex),
    )
