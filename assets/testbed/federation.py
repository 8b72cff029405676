"""A real federation on this machine: SuperLink, SuperNodes and `flwr` as processes.

    with Federation(tmp_path) as federation:
        nodes = [federation.supernode(f"node-{i}", f"partition-id={i}") for i in (0, 1)]
        status, output = federation.run(PROJECT, "experiment=quickstart num_clients=2")

Each process has a folder of its own: it runs there, its log is there, and it is its
FLWR_HOME. So `federation.superlink.folder` is where the ServerApp leaves its results.
Every wait has a deadline, and tells what the logs say when it passes.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from utils import PROJECT

SECONDS = 300  # for one process to do one thing: many times what it takes
ONLINE = r"SuperNode ID: (\d+)"
COMMANDS = Path(sys.executable).parent


class Process:
    """A command of Flower's, and all that it starts in turn."""

    def __init__(self, folder: Path, *command: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.command, self.log = folder, command, folder / "log"
        self.start()

    def start(self) -> None:
        self.start_of_log = self.log.stat().st_size if self.log.exists() else 0
        environment = {
            "FLWR_HOME": str(self.folder),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_LOG_LEVEL": "INFO",  # the logs are what is waited for
            "PYTHONUNBUFFERED": "1",
            # Flower starts its own commands by name.
            "PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}",
        }
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [COMMANDS / self.command[0], *self.command[1:]],
                cwd=self.folder,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """As a power cut does: nobody is told, and no child stays."""
        kill_all(self.folder)
        self.popen.wait()

    @property
    def output(self) -> str:
        """What it and its children have said since its last start."""
        said = self.log.read_bytes()[self.start_of_log :].decode(errors="replace")
        return re.sub(r"\x1b\[[\d;]*m", "", said)

    def tail(self, lines: int = 40) -> str:
        last = "\n".join(self.output.splitlines()[-lines:])
        return f"{' '.join(self.command)}\n--- {self.log}\n{last}\n"

    def wait_for(self, pattern: str, seconds: float = SECONDS) -> re.Match:
        """Wait until the log has the pattern, and return the match."""

        def found() -> re.Match | None:
            ended = self.popen.poll() is not None  # asked first: the log is then whole
            match = re.search(pattern, self.output)
            assert match or not ended, f"ended without {pattern!r}: {self.tail()}"
            return match

        return wait_until(found, seconds, lambda: f"no {pattern!r}: {self.tail()}")

    def wait(self, seconds: float = SECONDS) -> int:
        """Wait for its end, and return its exit code."""
        wait_until(
            lambda: self.popen.poll() is not None,
            seconds,
            lambda: f"it still runs: {self.tail()}",
        )
        return self.popen.returncode


class Federation:
    """One SuperLink, insecure or with the certificates that `deploy/certs/make.sh` makes."""

    def __init__(
        self, folder: Path, *options: str, certificates: Path | None = None
    ) -> None:
        self.folder = folder.resolve()
        self.processes: list[Process] = []
        self.options = ["--disable-runtime-dependency-installation", *options]
        # What the three kinds of process say to reach each other: the SuperLink's
        # options, a SuperNode's options, the lines in the configuration of `flwr`.
        if certificates:
            ca = certificates / "ca.crt"
            self.options += [f"--ssl-ca-certfile={ca}"]
            self.options += [f"--ssl-certfile={certificates / 'server.crt'}"]
            self.options += [f"--ssl-keyfile={certificates / 'server.key'}"]
            self.node_options = [f"--root-certificates={ca}"]
            self.cli_options = f"root-certificates = '{ca}'"
        else:
            self.options += ["--insecure"]
            self.node_options = ["--insecure"]
            self.cli_options = "insecure = true"

    def __enter__(self) -> "Federation":
        try:
            self.superlink = self.serve(
                "superlink", "Uvicorn running on", "flower-superlink", *self.options
            )
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        kill_all(self.folder)
        for process in self.processes:
            process.popen.wait()
            if kind:  # pytest shows it with a test that fails
                print(process.tail())

    def supernode(
        self,
        name: str,
        node_config: str,
        *options: str,
        connect: list[str] | None = None,
        expect: str = ONLINE,
    ) -> Process:
        """Start a SuperNode and wait until it is online, or says what else to expect."""
        return self.serve(
            name,
            expect,
            "flower-supernode",
            *(self.node_options if connect is None else connect),
            f"--superlink={self.address}",
            f"--node-config={node_config}",
            *options,
        )

    def flwr(self, *arguments: str, connect: str | None = None) -> Process:
        """Start a command of the `flwr` command line that asks this federation."""
        folder = self.folder / f"flwr-{len(self.processes)}"
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n[superlink.here]\n'
            f'address = "{self.address}"\n{connect or self.cli_options}\n'
        )
        self.processes.append(Process(folder, "flwr", *arguments))
        return self.processes[-1]

    def ask(self, *arguments: str) -> dict[str, Any]:
        """What a command of the `flwr` command line answers in JSON."""
        command = self.flwr(*arguments, "--format=json")
        assert command.wait() == 0, command.tail()
        return json.loads(command.output[command.output.index("{") :])

    def nodes(self) -> dict[int, str]:
        """The status of each node by its id."""
        nodes = self.ask("supernode", "list")["nodes"]
        return {int(node["node-id"]): node["status"] for node in nodes}

    def submit(self, app: Path, overrides: str) -> Process:
        """Start a run; `wait_for` what it says and let `finish` wait for its end."""
        config = f"--run-config=overrides={json.dumps(overrides)}"
        return self.flwr("run", str(app), "--stream", config)

    def finish(self, run: Process, seconds: float = 5 * SECONDS) -> tuple[str, str]:
        """The run's status and what the ServerApp said: `flwr run` only returns 0."""
        run.wait(seconds)
        run_id = run.wait_for(r"started run (\d+)")[1]

        def finished() -> str | None:
            status = self.ask("ls", f"--run-id={run_id}")["runs"][0]["status"]
            return status if status.startswith("finished") else None

        return wait_until(finished, SECONDS, run.tail), run.output

    def run(self, app: Path, overrides: str) -> tuple[str, str]:
        return self.finish(self.submit(app, overrides))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.superlink.command[-1]}"

    def serve(self, name: str, expect: str, *command: str) -> Process:
        """Start a command that listens on a port, which may be gone when it comes."""
        taken = "address already in use"
        for _ in range(3):
            process = Process(self.folder / name, *command, "--port", str(free_port()))
            self.processes.append(process)
            if process.wait_for(f"{expect}|{taken}")[0] != taken:
                return process
            process.kill()
        raise AssertionError(f"three free ports were taken: {process.tail()}")


def make_certs(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run deploy/certs/make.sh for another folder than its own."""
    folder.mkdir(exist_ok=True)
    script = shutil.copy(PROJECT / "deploy/certs/make.sh", folder)
    return subprocess.run([script, *arguments], capture_output=True, text=True)


def key(certs: Path, name: str) -> str:
    """A SuperNode's option: the key of that name."""
    return f"--auth-supernode-private-key={certs / name}.key"


def wait_until(
    ready: Callable[[], Any], seconds: float, what: Callable[[], str]
) -> Any:
    """Ask `ready` until it answers, or fail with what `what` tells."""
    deadline = time.monotonic() + seconds
    while not (answer := ready()):
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: {what()}"
        time.sleep(0.1)
    return answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kill_all(folder: Path) -> None:
    """Kill every process whose FLWR_HOME is in `folder`, and see that none is left.

    Process groups would miss some: Flower puts SuperExec into a session of its own.
    """

    def left() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # gone, a zombie, or somebody else's
                home = Path(process.environ().get("FLWR_HOME", "/"))
                if home.is_relative_to(folder):
                    process.kill()
                    found.append(process)
        return found

    wait_until(lambda: not left(), SECONDS, lambda: f"cannot kill {left()}")
