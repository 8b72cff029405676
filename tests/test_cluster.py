"""pytest tests/test_cluster.py: past one machine, on a real Ray cluster of two nodes (slow)."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from main import start_ray
from settings import preflight
from settings.compose import compose
from utils import PROJECT, Settings, UserError

QUICK = ["experiment=quickstart", "evaluate.exact_match=false", "num_rounds=2"]
ADDRESS = "simulation.init_args.address"
CLIENT = "ray::ClientAppActor"  # how Ray names a client's process: .run while it works
SECONDS = 240  # for what takes ten on an idle machine


def check(*overrides: str) -> dict:
    return preflight.check(compose(" ".join([*QUICK, *overrides])))


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on: held together for a moment, so that no two are equal."""
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(happened) -> None:
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


# --- mistakes ---------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "nonsense", "ray://h:{port}"])
def test_cluster_that_does_not_answer(address):
    address = address.format(port=free_ports(1)[0])
    with pytest.raises(
        UserError, match=f"{ADDRESS}={address}: no .* `ray start --head`"
    ):
        check(f"{ADDRESS}={address}")


def test_auto_without_a_cluster(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    # Other runs on this machine are clusters to Ray as well.
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    with pytest.raises(UserError, match=f"{ADDRESS}=auto: no Ray cluster answers"):
        check(f"{ADDRESS}=auto")


@pytest.mark.slow
def test_auto_with_an_address_that_is_out_of_date(tmp_path):
    folder = f"hydra.run.dir={tmp_path}"
    done = subprocess.run(
        [sys.executable, "main.py", *QUICK, f"{ADDRESS}=auto", folder],
        cwd=PROJECT,
        env=os.environ | {"RAY_ADDRESS": f"127.0.0.1:{free_ports(1)[0]}"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 1
    assert f"{ADDRESS}=auto: no Ray cluster answers" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            f"{ADDRESS}=null",
            f"{ADDRESS}=null: text is needed .local, auto or host:port",
        ),
        ("+simulation.init_args.log_to_driver=true", "log_to_driver is set by verbose"),
        ("+simulation.init_args.logging_level=10", "logging_level is set by verbose"),
        ("+simulation.init_args.runtime_env.pip=[x]", "runtime_env is set by main.py"),
    ],
)
def test_argument_that_is_set_elsewhere(override, message):
    with pytest.raises(UserError, match=message):
        check(override)


@pytest.mark.slow
def test_argument_that_ray_does_not_know():
    cfg = check("+simulation.init_args.num_cpu=2")
    with (
        pytest.raises(UserError, match=r"simulation.init_args: .*num_cpu"),
        start_ray(cfg),
    ):
        pass


@pytest.mark.slow
def test_this_machine_does_not_limit_a_cluster():
    with socket.create_server(("", 0)) as head:
        address = f"{ADDRESS}=127.0.0.1:{head.getsockname()[1]}"
        check(
            address,
            "client_resources.num_cpus=1000",
            "launch=ddp",
            "launch.processes=8",
        )


def test_a_client_must_fit_one_node():
    def node(cpus, gpus, alive=True):
        return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}

    cpus_alone = {"Alive": True, "Resources": {"CPU": 8.0}}

    def fits(nodes, gpus=0.5, rendezvous=None):
        resources = Settings(num_cpus=4, num_gpus=gpus)
        launch = Settings(rendezvous=rendezvous)
        cfg = Settings(client_resources=resources, launch=launch)
        preflight.check_nodes(cfg, nodes)

    fits([cpus_alone, node(4, 1)])
    with pytest.raises(UserError, match=r"they have 8 and 0, 2 and 4\."):
        fits([cpus_alone, node(2, 4), node(9, 9, alive=False)])
    fits([cpus_alone, node(7, 9)], rendezvous="127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"for 3 clients at once.*one machine: .*num_cpus=8"
    ):
        fits([cpus_alone, node(7, 9)], gpus=0, rendezvous="127.0.0.1:9")


# --- a cluster --------------------------------------------------------------------------


class Node:
    """A node of a Ray cluster: `ray start`, and all processes of its session."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.log = folder.with_suffix(".log")
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("HF_HUB_OFFLINE", "RAY_ADDRESS")
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    Path(sys.executable).with_name("ray"),
                    *("start", "--block", "--num-cpus=1", f"--temp-dir={folder}"),
                    *("--object-store-memory=100000000", "--include-log-monitor=false"),
                    # Ray's fixed ports would be taken by the other node.
                    *("--min-worker-port=0", "--max-worker-port=0"),
                    *("--dashboard-agent-listen-port=0", *options),
                ],
                env=environment | {"RAY_USAGE_STATS_ENABLED": "0"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def started(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return "Ray runtime started" in self.log.read_text()

    def processes(self) -> dict[int, str]:
        """Command lines by process id."""
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "-s", str(self.process.pid)],
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        return {
            int(pid): args for pid, args in (line.split(None, 1) for line in listed)
        }

    def clients(self, state: str = "") -> list[int]:
        named = self.processes().items()
        return [pid for pid, args in named if args.startswith(CLIENT + state)]

    def stop(self) -> None:
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not self.processes())


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two nodes, of a CPU each, and the nodes."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # pytest's are too long for sockets
    port, client_server, dashboard = free_ports(3)
    address = f"127.0.0.1:{port}"
    nodes = []
    try:
        nodes.append(
            Node(
                folder / "head",
                *("--head", f"--port={port}", "--no-monitor"),
                *("--include-dashboard=false", f"--dashboard-port={dashboard}"),
                f"--ray-client-server-port={client_server}",
            )
        )
        nodes.append(Node(folder / "other", f"--address={address}"))
        wait_until(lambda: all(node.started() for node in nodes))
        yield address, nodes
    finally:
        for node in reversed(nodes):
            node.stop()
        shutil.rmtree(folder)


@pytest.fixture
def start(cluster):
    """Start main.py on the cluster; ended at the latest with the test."""
    started = []

    def start(*overrides: str) -> subprocess.Popen:
        started.append(
            subprocess.Popen(
                [sys.executable, "main.py", *QUICK, f"{ADDRESS}=auto", *overrides],
                cwd=PROJECT,
                env=os.environ | {"RAY_ADDRESS": cluster[0], "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_clients_run_on_both_nodes(cluster, start, tmp_path):
    _, nodes = cluster
    run = start(f"hydra.run.dir={tmp_path}")
    environments = {node: set() for node in nodes}

    def ended() -> bool:
        for node in nodes:
            for pid in node.clients(".run"):
                with suppress(OSError):  # gone since
                    environments[node] |= set(environment(pid))
        return run.poll() is not None

    wait_until(ended)
    out, err = run.communicate()
    assert run.returncode == 0, out + err
    assert err == ""
    assert out.count("2 of 2 clients") == 2
    # Both nodes were at work, under settings that only main.py's environment has.
    assert all("HF_HUB_OFFLINE=1" in seen for seen in environments.values())
    # The run leaves the cluster as it found it.
    wait_until(lambda: not any(node.clients() for node in nodes))
    assert all(node.started() for node in nodes)


def environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")


@pytest.mark.slow
def test_a_client_too_large_for_every_node_is_answered(start, tmp_path):
    run = start("client_resources.num_cpus=2", f"hydra.run.dir={tmp_path}")
    _, err = run.communicate(timeout=SECONDS)
    assert run.returncode == 1
    assert "2 CPUs and 0 GPUs fit no node of Ray's; they have 1 and 0, 1 and 0." in err
    assert "Traceback" not in err
