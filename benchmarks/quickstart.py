"""Time, memory and score of the quickstart as a user sees them, over several seeds.

    python benchmarks/quickstart.py --seeds 0 1 2

Prints a Markdown table: seconds from start to exit, the most memory of all its processes
together (proportional set size, so that shared pages count once; Linux only), and the
exact match before and after.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def memory(root: int) -> int:
    """Bytes held by `root`, its descendants and Ray's detached processes, now."""
    parents, names = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(
                line.split(":\t", 1) for line in status.read_text().splitlines()
            )
            pid = int(status.parent.name)
            parents[pid] = int(lines["PPid"])
            names[pid] = (status.parent / "cmdline").read_text()
        except (OSError, ValueError, KeyError):
            continue  # it ended while we looked
    total = 0
    for pid, name in names.items():
        ancestor = pid
        while ancestor not in (root, 0, 1):
            ancestor = parents.get(ancestor, 0)
        if ancestor != root and "ray" not in name:
            continue
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue
    return total


def measure(seed: int, overrides: list[str]) -> str:
    """Run the quickstart once; a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "main.py", "experiment=quickstart", f"seed={seed}"]
        started, peak = time.monotonic(), 0
        process = subprocess.Popen(
            [*command, *overrides, f"hydra.run.dir={folder}"],
            cwd=PROJECT,
            stdout=subprocess.DEVNULL,
        )
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(1)
        seconds = time.monotonic() - started
        if process.returncode:
            sys.exit(f"seed {seed}: exit code {process.returncode}")
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return (
        f"| {seed} | {seconds:.1f} | {peak / 2**30:.2f} | "
        f"{summary['exact_match_before']:.1%} | {summary['exact_match_after']:.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="more overrides for main.py")
    options = parser.parse_args()
    print("| seed | seconds | memory, GiB | before | after |\n|---|---|---|---|---|")
    for seed in options.seeds:
        print(measure(seed, options.overrides), flush=True)


if __name__ == "__main__":
    main()
