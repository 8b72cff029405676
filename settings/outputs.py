"""Hydra's callback that gives each run a folder of its own."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write

from reporting.sweep import summarise_sweep
from server.runs import LEFT_BY_SWEEPS, begin, own
from settings.compose import is_named
from utils import Unwritable, literal, override, say


class Outputs(Callback):
    """Hydra callback: each run has a folder of its own, and a multirun leaves a summary.

    Hydra turns a callback's exceptions into warnings; only an exit stops it.
    """

    sweep: Path | None = None
    lock: TextIO | None = None  # of the run's folder, or the multirun's
    job: TextIO | None = None  # of the folder of one of its runs

    def __getstate__(self) -> dict[str, Any]:
        """What a launcher's other processes are told: a lock stays with who holds it."""
        return {"sweep": self.sweep}

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with or_exit(), read_write(config.hydra):
            saved = Path(str(config.get("resume") or ""), ".hydra/config.yaml")
            if config.get("resume") and saved.is_file() and "${" not in str(saved):
                # Its log goes on; what it is made of is written when it is known to fit.
                config.hydra.run.dir = literal(str(config.resume))
                config.hydra.output_subdir = None
                return
            folder = begin(Path(config.hydra.run.dir), is_named(config.hydra))
            config.hydra.run.dir = literal(str(folder))
            self.lock = own(folder)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with or_exit(), read_write(config.hydra):
            key = "hydra.sweep.dir"
            named = is_named(config.hydra, key)
            self.sweep = begin(Path(config.hydra.sweep.dir), named)
            config.hydra.sweep.dir = literal(str(self.sweep))
            # From which each run's configuration is composed again.
            config.hydra.overrides.hydra.append(override(key, str(self.sweep)))
            self.lock = own(self.sweep, LEFT_BY_SWEEPS)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if self.sweep:
            with or_exit():
                self.job = own(Path(config.hydra.runtime.output_dir))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if not self.sweep:
            return
        if self.job:
            self.job.close()
        if job_return.status == JobStatus.FAILED:
            # Hydra itself tells the first failed run's only, and at the very end.
            error = str(job_return._return_value).splitlines() or ["?"]
            run = Path(config.hydra.runtime.output_dir).name
            print(f"Run {run} failed: {error[0]}", file=sys.stderr)
        # After each one, because a job that failed keeps Hydra from announcing the end.
        summarise_sweep(self.sweep)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        say(f"Losses of all runs: {self.sweep}/losses.png, losses.csv, losses.md")


@contextmanager
def or_exit() -> Iterator[None]:
    """Exit with its text where something is raised: Hydra would warn of it, and go on."""
    try:
        yield
    except Unwritable as error:
        raise SystemExit(
            f"{error} Name another folder: hydra.run.dir=/path/to/folder "
            "(hydra.sweep.dir for a multirun)."
        ) from error
    except Exception as error:
        raise SystemExit(str(error)) from error
