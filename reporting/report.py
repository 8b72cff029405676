"""What federation was worth: a report on a sweep over `mode`, for a manager and a reviewer;
or on one that compares methods, what each costs and gives.

    python main.py experiment=compare            writes it when the sweep has ended
    python main.py experiment=methods            likewise
    python -m reporting.report multirun/<date>/<time>      writes it again, of what is there

Reads what the runs left in their folders and nothing else: no model, no data. The text is
written once, as Markdown; the HTML is the same, rendered, with the figures inside.
"""

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from reporting import page, runs
from server.runs import fit
from utils import PROJECT, UserError, git_commit, read_json, say, write_json


class Report(Callback):
    """Hydra callback: a multirun leaves a report."""

    folder: Path | None = None  # of the sweep
    failed = False

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if not config.dry_run:
            self.folder = Path(config.hydra.sweep.dir)
            command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
            about = {"command": command, **machine()}
            write_json(self.folder / "environment.json", about)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        # A job that failed keeps Hydra from announcing the end of the sweep.
        self.failed |= job_return.status == JobStatus.FAILED
        if self.failed:
            self.on_multirun_end(config)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if self.folder:
            try:
                say(f"Report: {write(self.folder)}/report.html, report.md")
            except UserError as error:  # which Hydra would hide in the log
                say(f"No report: {error}")


def write(folder: Path) -> Path:
    """Write `report/` into a sweep's folder, and return its path.

    Raises `UserError` where no run has finished.
    """
    found, absent = runs.read(folder)
    file = folder / "environment.json"
    about = fit(read_json(file), dict, file) if file.exists() else machine()
    target = folder / "report"
    target.mkdir(exist_ok=True)
    told = page.write_methods if runs.by_method(found) else page.write
    told(found, absent, about, target)
    return target


def machine() -> dict[str, str]:
    """The commit, machine and versions of what runs now."""

    def ask(*command: str) -> str:
        if not shutil.which(command[0]):
            return ""
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        return done.stdout.strip()

    commit = git_commit() or "not a git checkout"
    changed = ", with local changes" if ask("git", "status", "--porcelain") else ""
    cpu = platform.machine()
    if (information := Path("/proc/cpuinfo")).exists():
        cpu = (re.findall(r"model name\s*: (.*)", information.read_text()) or [cpu])[0]
    gpus = ask("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    libraries = [re.match(r"[\w-]+", text)[0] for text in project["dependencies"]]
    return {
        "commit": commit + changed,
        "processor": f"{os.cpu_count()} cores of {cpu}",
        "GPU": ", ".join(gpus.splitlines()) or "none",
        "Python": platform.python_version(),
        **{name: version(name) for name in libraries},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the report of a multirun.")
    parser.add_argument("folder", type=Path, help="multirun/<date>/<time>")
    try:
        print(write(parser.parse_args().folder) / "report.html")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
