"""pytest tests/test_round.py: the benchmark of a round, made short (slow)."""

import csv
import math
import re
import subprocess
import sys

import pytest

from utils import PROJECT


@pytest.mark.slow
def test_benchmark_ends_in_two_ratios(tmp_path):
    options = ["--size", "quickstart", "--rounds", "1", "--steps", "2"]
    done = subprocess.run(
        [sys.executable, "benchmarks/round.py", *options, f"--out={tmp_path}"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-2:]
    for line, name in zip(last, ("same-arithmetic", "fastest"), strict=True):
        ratio = re.fullmatch(rf"round / {name} loop: (\d+\.\d\d)", line)
        assert ratio, line
        assert 0 < float(ratio[1]) < math.inf
    assert (tmp_path / "round.md").read_text() == done.stdout
    with (tmp_path / "round.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [row["name"] for row in rows]
    assert names == ["app", "same-arithmetic loop", "fastest loop"]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert all(math.isfinite(float(row["loss"])) for row in rows)
