"""What a SuperLink and the server loop cost with hundreds of nodes.

    python benchmarks/nodes.py                  500 nodes, 100 of them a round

A real SuperLink and the real ServerApp on this machine's loopback; the nodes are light ones
(`assets/testbed/nodes.py`), which speak as SuperNodes do and answer at once, so that what is
timed is what messages, replies and the server cost. Where two cores are all there is, nodes
that poll every 3 seconds as SuperNodes do leave none for the rest: `--poll 12`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from assets.testbed.federation import Federation, Process  # noqa: E402


def light(federation: Federation, count: int, poll: float, overrides: str) -> Process:
    """Start so many light nodes, in one process."""
    script = str(PROJECT / "assets/testbed/nodes.py")
    arguments = [federation.address, str(count), str(poll), overrides]
    process = Process(federation.folder / "nodes", sys.executable, script, *arguments)
    federation.processes.append(process)
    return process


def serverapp(superlink: psutil.Process) -> int:
    """Bytes in memory of the run's ServerApp, which the SuperLink's own child starts."""
    for process in superlink.children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if any("flwr-serverapp" in word for word in process.cmdline()):
                return process.memory_info().rss
    return 0


def rounds_in(folder: Path) -> list[dict[str, Any]]:
    """The rounds that the run of the SuperLink in `folder` has finished."""
    for file in folder.glob("outputs/*/*/history.json"):
        return json.loads(file.read_text())["rounds"]
    return []


def measure(nodes: int, cohort: int, rounds: int, poll: float) -> dict[str, float]:
    """Of the rounds but the first: seconds of one and replies (medians), the most of memory
    (bytes) and connections, and the SuperLink's processor seconds for one and for a second."""
    overrides = (
        f"experiment=quickstart num_clients={nodes} num_rounds={rounds} "
        f"strategy.fraction_fit={cohort / nodes} strategy.fraction_evaluate=0 "
        "evaluate.exact_match=false"
    )
    most = {"superlink": 0, "serverapp": 0, "connections": 0}
    with (
        tempfile.TemporaryDirectory(prefix="nodes-") as folder,
        Federation(Path(folder)) as federation,
    ):
        superlink = psutil.Process(federation.superlink.popen.pid)
        run = federation.submit(PROJECT, overrides)
        run.wait_for("Client|Waiting for")  # its ServerApp does
        light(federation, nodes, poll, overrides)
        busy: list[
            tuple[float, float]
        ] = []  # by round: when it ended, and used until then
        while True:
            # Asked first: the history is then whole.
            ended = run.popen.poll() is not None
            if len(entries := rounds_in(federation.superlink.folder)) >= rounds:
                break
            if ended:
                sys.exit(f"the run has ended after {len(entries)} rounds: {run.tail()}")
            if len(entries) > len(busy):
                busy.append((time.monotonic(), sum(superlink.cpu_times()[:2])))
            count = len(superlink.net_connections("tcp"))
            most["connections"] = max(most["connections"], count)
            most["superlink"] = max(most["superlink"], superlink.memory_info().rss)
            most["serverapp"] = max(most["serverapp"], serverapp(superlink))
            time.sleep(0.5)
        passed = time.monotonic() - busy[0][0]
        used = sum(superlink.cpu_times()[:2]) - busy[0][1]
    later = entries[1:]
    return {
        "seconds": statistics.median(entry["seconds"] for entry in later),
        "replied": statistics.median(entry["replied"] for entry in later),
        "aggregate": statistics.median(entry["seconds_aggregate"] for entry in later),
        "processor": used / len(later),
        "cores": used / passed,
        **most,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="*", default=[500])
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--poll", type=float, default=3.0, help="seconds")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be 2 or more: the first one is not counted")
    print(
        "| nodes | replies of a round | seconds | of it aggregation | SuperLink's "
        "processor seconds | of a core | SuperLink, MiB | ServerApp, MiB | connections |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for nodes in options.nodes:
        cohort = min(nodes, options.cohort)
        found = measure(nodes, cohort, options.rounds, options.poll)
        print(
            f"| {nodes} | {found['replied']:.0f} of {cohort} | {found['seconds']:.1f} "
            f"| {found['aggregate']:.1f} | {found['processor']:.1f} "
            f"| {found['cores']:.0%} | {found['superlink'] / 2**20:.0f} "
            f"| {found['serverapp'] / 2**20:.0f} | {found['connections']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
