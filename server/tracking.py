"""Trackers that follow a run beside its own folder: TensorBoard, MLflow, Weights & Biases.

Each is a few calls of its library, which is imported when a run begins. They run where the
journal is kept, on the server; a node of a federation starts none.
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import OmegaConf

from utils import Settings, UserError, construct, flat, git_commit, say, spelt


class Tracking:
    """A run's tracker. One that fails is named, left alone and costs the run nothing else."""

    def __init__(
        self, cfg: Settings, folder: Path, rounds: list[dict[str, Any]]
    ) -> None:
        self.folder = folder
        self.finished = False
        self.tracker: Tracker | None = make(cfg.tracking)
        cfg = {**cfg, "git_commit": git_commit()}  # among the settings
        last = rounds[-1]["round"] if rounds else -1
        known = self._tell("start", cfg, folder, last)
        self.known = -1 if known is None else known
        for entry in rounds:
            self.log(entry)

    def log(self, entry: dict[str, Any]) -> None:
        """Tell a round's figures, if the tracker has none from before the run was stopped.

        Round 0 is the base without training.
        """
        if entry["round"] > self.known:
            told = {k: v for k, v in figures(entry).items() if k != "round"}
            self._tell("log", entry["round"], told)

    def finish(self, summary: dict[str, Any]) -> None:
        """Tell the last word, and hand over what is in the run's folder."""
        told = {f"summary/{name}": value for name, value in figures(summary).items()}
        self._tell("finish", self.folder, summary["rounds"], told)
        self.finished = True

    def close(self) -> None:
        """End the tracker's run, as a failed one where there was no last word."""
        self._tell("close", self.finished)

    def _tell(self, what: str, *arguments: Any) -> Any:
        if self.tracker is None:
            return None
        try:
            return getattr(self.tracker, what)(*arguments)
        except Exception as error:
            name, self.tracker = type(self.tracker).__name__, None
            cause = str(error) or repr(error)
            say(f"{name} failed, and the run goes on without it: {cause}")


@dataclass
class Tracker:
    """What follows a run. This one does not."""

    library: ClassVar[str] = ""  # the module that it needs, if any
    package: ClassVar[str] = ""  # which pip installs

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name}={spelt(value)}: text is needed")

    def start(self, cfg: Settings, folder: Path, last: int) -> int:
        """Begin, or go on with, the run of `folder`.

        `last` is the last round that is written down, -1 where none is. Returns the last
        that the tracker has already, or -1.
        """
        return last

    def log(self, step: int, told: dict[str, float]) -> None:
        """The figures of round `step`."""

    def finish(self, folder: Path, rounds: int, told: dict[str, float]) -> None:
        """The figures of all `rounds`; plots, answers and the last adapter in `folder`."""

    def close(self, finished: bool) -> None:
        """Nothing more will come."""


@dataclass
class TensorBoard(Tracker):
    """Event files in the run's own folder, where adapters and answers are anyhow."""

    library = "tensorboard"
    package = "tensorboard"

    def start(self, cfg: Settings, folder: Path, last: int) -> int:
        from torch.utils.tensorboard import SummaryWriter

        going_on = any(folder.glob("events.out.tfevents.*"))
        purge = last + 1 if going_on else None
        self.settings = {name: str(value) for name, value in flat(cfg).items()}
        self.writer = SummaryWriter(str(folder), purge_step=purge)
        text = OmegaConf.to_yaml(json.loads(json.dumps(cfg)))
        self.writer.add_text("configuration", f"```yaml\n{text}```")
        return last if going_on else -1

    def log(self, step: int, told: dict[str, float]) -> None:
        for name, value in told.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # the next moment may be the process's last

    def finish(self, folder: Path, rounds: int, told: dict[str, float]) -> None:
        from matplotlib.image import imread

        self.writer.add_hparams(self.settings, told, run_name=".", global_step=rounds)
        for plot in folder.glob("*.png"):
            self.writer.add_image(plot.stem, imread(plot), rounds, dataformats="HWC")

    def close(self, finished: bool) -> None:
        self.writer.close()


@dataclass
class MLflow(Tracker):
    """A run in a local database or on a server; those of a multirun are children of one."""

    library = "mlflow"
    package = "mlflow-skinny"
    experiment: str
    tracking_uri: str | None

    def start(self, cfg: Settings, folder: Path, last: int) -> int:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # Its default is to try for minutes, during which a round would wait.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.client = MlflowClient(self.tracking_uri)
        self.parent = self._run(above) if (above := group(folder)) else None
        self.run = self._run(folder, self.parent)
        self.client.update_run(self.run, status="RUNNING")
        there = self.client.get_run(self.run).data.params  # which cannot be changed
        settings = {k: str(v) for k, v in flat(cfg).items() if k not in there}
        params = [Param(name, value) for name, value in settings.items()]
        self.client.log_batch(self.run, params=params)
        names = ("train_loss", "test_loss", "eval_loss", "epsilon")  # not all in all
        told = [self.client.get_metric_history(self.run, name) for name in names]
        return max((metric.step for each in told for metric in each), default=-1)

    def _run(self, folder: Path, parent: str | None = None) -> str:
        """The id of the run of `folder`, begun if there is none yet."""

        def begin() -> str:
            found = self.client.get_experiment_by_name(self.experiment)
            experiment = (
                found.experiment_id
                if found
                else self.client.create_experiment(self.experiment)
            )
            tags = {"mlflow.parentRunId": parent} if parent else {}
            run = self.client.create_run(experiment, tags=tags, run_name=title(folder))
            return run.info.run_id

        return remembered(folder / "mlflow_run_id", begin)

    def log(self, step: int, told: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in told.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def finish(self, folder: Path, rounds: int, told: dict[str, float]) -> None:
        self.log(rounds, told)
        for file in [*folder.glob("*.png"), *records(folder)]:
            self.client.log_artifact(self.run, str(file))
        adapter = f"peft_{rounds}"
        self.client.log_artifacts(self.run, str(folder / adapter), adapter)

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.run, "FINISHED" if finished else "FAILED")
        if self.parent:
            self.client.set_terminated(self.parent)


@dataclass
class Wandb(Tracker):
    """A run on Weights & Biases, or offline in the run's folder until `wandb sync`."""

    library = "wandb"
    package = "wandb"
    project: str
    mode: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("online", "offline"):
            raise ValueError(f"mode={self.mode}: take online or offline")

    def start(self, cfg: Settings, folder: Path, last: int) -> int:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", str(not cfg.verbose).lower())
        import wandb

        above = group(folder)
        self.run = wandb.init(
            project=self.project,
            mode=self.mode,
            dir=folder,
            name=title(folder),
            group=title(above) if above else None,
            id=remembered(folder / "wandb_run_id", lambda: uuid.uuid4().hex),
            resume="allow" if self.mode == "online" else None,
            reinit="create_new",
            config=cfg,
            settings=wandb.Settings(console="off"),
        )
        return -1  # it drops those steps by itself

    def log(self, step: int, told: dict[str, float]) -> None:
        self.run.log(told, step=step)

    def finish(self, folder: Path, rounds: int, told: dict[str, float]) -> None:
        import wandb

        self.run.summary.update(told)
        plots = {f"plots/{p.stem}": wandb.Image(p) for p in folder.glob("*.png")}
        self.run.log(plots, step=rounds)
        for file in records(folder):
            self.run.save(file, base_path=folder, policy="now")
        artifact = wandb.Artifact(f"adapter-{self.run.id}", type="model")
        artifact.add_dir(str(folder / f"peft_{rounds}"), policy="immutable")
        self.run.log_artifact(artifact)

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


def make(node: dict[str, Any]) -> Tracker:
    """The tracker that `conf/tracking` names, not yet begun.

    Raises `UserError` where its settings or its library are at fault.
    """
    tracker = construct(node, __name__, Tracker)
    if tracker.library and find_spec(tracker.library) is None:
        raise UserError(
            f"{node['_target_']} needs {tracker.library}, which is not installed: "
            f"pip install {tracker.package}"
        )
    return tracker


def figures(entry: dict[str, Any]) -> dict[str, float]:
    """What is a number in an entry of the history, or in the summary."""
    return {k: v for k, v in entry.items() if type(v) in (int, float)}


def group(folder: Path) -> Path | None:
    """The folder of the multirun that a run's folder belongs to, as Hydra marks it."""
    above = folder.resolve().parent
    return above if (above / "multirun.yaml").is_file() else None


def title(folder: Path) -> str:
    """What a run is called: outputs/<date>/<time> is <date>/<time>."""
    return "/".join(folder.resolve().parts[-2:])


def records(folder: Path) -> list[Path]:
    """What a finished run has written down."""
    names = (".hydra/config.yaml", "history.json", "summary.json", "answers.json")
    return [file for name in names if (file := folder / name).is_file()]


def remembered(file: Path, begin: Callable[[], str]) -> str:
    """The id that `file` holds, so that a run goes on as itself, or the one that `begin` gives."""
    if not file.exists():
        file.write_text(begin())
    return file.read_text()
