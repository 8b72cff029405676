"""What has no better room: errors, config composition, paths, seeds, progress, plots.

Knows nothing of Flower, of models or of data, and imports none of our modules.
"""

import csv
import hashlib
import importlib
import json
import logging
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

PROJECT = Path(__file__).resolve().parent
INTERRUPTED = 130  # the exit code after Ctrl-C, as shells have it

# Read by the libraries when they are imported, in the worker processes as well.
for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",  # the libraries' bars; `Progress` shows its own all the same
}.items():
    os.environ.setdefault(_name, _value)


class UserError(CompactHydraException):
    """Something that the user can mend. Hydra prints its text without a traceback."""


class Refusal(UserError):
    """A client that cannot take part in a run. The text may be told to the server."""

    code = 100  # of the error by which the server knows that there is no use in asking again


# --- configuration ---------------------------------------------------------------------


def compose(overrides: str = "") -> DictConfig:
    """Compose `conf/` with a string of Hydra overrides, outside `@hydra.main`.

    Raises `hydra.errors.HydraException` for an override that does not fit `conf/`.
    """
    return compose_run(overrides)[0]


def compose_run(overrides: str) -> tuple[DictConfig, Path]:
    """Likewise, and the folder that `hydra.run.dir` gives to the run."""
    GlobalHydra.instance().clear()  # `@hydra.main` may have left one
    try:
        with hydra.initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
            cfg = hydra.compose(
                "config", overrides=shlex.split(overrides), return_hydra_config=True
            )
        folder = Path(cfg.hydra.run.dir)
        with open_dict(cfg):
            del cfg.hydra
        OmegaConf.resolve(cfg)
    except (ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{overrides}: {error}") from error
    return cfg, folder


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their dotted keys."""
    if not isinstance(node, dict):
        return {path: node}
    parts = (flat(value, f"{path}.{key}".lstrip(".")) for key, value in node.items())
    return {key: value for part in parts for key, value in part.items()}


def record(cfg: DictConfig, overrides: list[str], folder: Path) -> None:
    """Write the configuration into a run's folder, as `@hydra.main` would.

    Raises `UserError` where the folder cannot be written.
    """
    try:
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, folder / ".hydra/config.yaml")
        OmegaConf.save(overrides, folder / ".hydra/overrides.yaml")
    except OSError as error:
        raise UserError(
            f"The output folder {folder} cannot be written ({error.strerror}). "
            "Name another one: hydra.run.dir=/path/to/folder"
        ) from error


def construct(node: Any, package: str, **more: Any) -> Any:
    """Build the class that `node._target_` names, if it lives directly in `package`.

    Hydra's own `instantiate` calls anything that can be imported. This runs on clients,
    with values that may have come over the network, so only `package.Class` is allowed.

    Raises `UserError` for another target or for arguments the class does not take.
    """
    arguments = OmegaConf.to_container(OmegaConf.create(node), resolve=True) | more
    target = arguments.pop("_target_")
    module, _, name = target.rpartition(".")
    made = getattr(importlib.import_module(package), name, None)
    if module != package or not isinstance(made, type):
        raise UserError(f"_target_={target} is not a class of {package}.")
    try:
        return made(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{target} refuses its settings: {error}") from error


def local_path(name: str) -> Path | None:
    """The existing file or folder that `name` means here, or None (a hub name, say).

    A relative path is looked up in the working directory, then in the project's folder.
    """
    for path in (Path(str(name)).expanduser(), PROJECT / str(name)):
        with suppress(OSError):  # too long for a path, or not to be looked at
            if path.exists():
                return path.resolve()
    return None


def mix_seed(*parts: int | str) -> int:
    """One seed in [0, 2**31) out of several: equal parts give equal seeds, anywhere."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def cosine(step: int, steps: int, maximum: float, minimum: float) -> float:
    """Cosine annealing from `maximum` at step 1 to `minimum` one step after the last.

    Loshchilov and Hutter, SGDR (arXiv 1608.03983), without restarts. The minimum itself is
    never used: at it, the last of a few rounds would train on nearly nothing.
    """
    progress = (step - 1) / steps
    return minimum + (maximum - minimum) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(cfg: dict[str, Any], server_round: int) -> float:
    """What clients train with in a round, by the resolved configuration.

    `train.training_arguments.learning_rate`, or the cosine over `num_rounds`.
    """
    train = cfg["train"]
    constant = train["training_arguments"].get("learning_rate")
    if constant is not None:
        return constant
    low, high = train["learning_rate_min"], train["learning_rate_max"]
    return cosine(server_round, cfg["num_rounds"], high, low)


def git_commit() -> str | None:
    """The commit of this project, in a git checkout."""
    command = ["git", "-C", str(PROJECT), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# --- what a run shows and leaves behind ---------------------------------------------------


def quiet() -> None:
    """Keep library chatter off the console; the run's log file still gets it.

    To be called before the libraries are imported; worker processes inherit it.
    """
    os.environ["FLWR_LOG_LEVEL"] = "CRITICAL"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.captureWarnings(True)


def offline_if_unreachable() -> None:
    """Where the hub cannot be reached, use its local cache at once, without retries.

    To be called before the libraries are imported; worker processes inherit it.
    """
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy")):
        return
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    try:
        socket.create_connection((endpoint.hostname, port), timeout=3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader finds the old content or the new, never a part."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    _flush(temporary)
    os.replace(temporary, path)


@contextmanager
def commit(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which then becomes `folder`, whole or not at all.

    After a crash at any moment there is `folder` with all its content on the disk, or there
    is none. One that exists already stays as it is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(exist_ok=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        _flush(temporary)
        if not folder.exists():
            temporary.rename(folder)
            _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk, not only on its way."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Progress:
    """A bar over the rounds on a terminal, one line a round elsewhere."""

    def __init__(self, num_rounds: int, done: int = 0) -> None:
        from tqdm import tqdm

        self.num_rounds = num_rounds
        self.first = done
        self.started = time.monotonic()
        self.bar = tqdm(
            total=num_rounds,
            initial=done,
            unit="round",
            disable=not sys.stderr.isatty(),
            bar_format="{desc}: {n}/{total} |{bar}| {elapsed}, {remaining} left{postfix}",
            desc="round",
        )

    def begin(self, before: dict[str, Any]) -> None:
        """The rounds begin, and the time until they are done. `before`: the base's scores."""
        self.started = time.monotonic()
        if losses := self._losses(before):
            say(f"base without training  {losses}")

    def advance(self, entry: dict[str, Any]) -> None:
        """Show a finished round, given its entry of `history.json`."""
        losses = self._losses(entry)
        if not self.bar.disable:
            self.bar.set_postfix_str(losses, refresh=False)
            self.bar.update()
            return
        done = entry["round"]
        speed = ""
        if "tokens_per_second" in entry:
            speed = f"{entry['tokens_per_second']:,.0f} tokens/s  "
        pace = (time.monotonic() - self.started) / (done - self.first)
        left = pace * (self.num_rounds - done)
        print(
            f"round {done}/{self.num_rounds}  {losses}  {speed}{entry['seconds']:.1f} s  "
            f"{entry['replied']} of {entry['sampled']} clients  "
            f"{self.bar.format_interval(left)} left",
            flush=True,
        )

    @staticmethod
    def _losses(entry: dict[str, Any]) -> str:
        """Those of training, on the test questions, and on clients' own records."""
        names = {"train_loss": "loss", "test_loss": "test", "eval_loss": "own records"}
        return "  ".join(
            f"{label} {entry[name]:.4f}"
            for name, label in names.items()
            if name in entry
        )

    def close(self) -> None:
        self.bar.close()


def say(text: str = "") -> None:
    """Print a line to the console without tearing a progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def smooth(values: list[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average whose early values are not drawn to zero.

    The same formula as TensorBoard's smoothing slider.
    """
    smoothed, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


def plot_losses(curves: dict[str, list[float]], path: Path, smoothed: bool) -> None:
    """Draw training loss over rounds into a PNG, one line for each named curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, losses in curves.items():
        rounds = range(1, len(losses) + 1)
        if smoothed:
            (line,) = axes.plot(rounds, smooth(losses), label=name)
            axes.plot(rounds, losses, color=line.get_color(), alpha=0.2)
        else:
            axes.plot(rounds, losses, marker="." if len(losses) < 50 else None)
    axes.set_xlabel("round")
    axes.set_ylabel("training loss" + (" (smoothed)" if smoothed else ""))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if smoothed:
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def on_interrupt(stop: Callable[[], None]) -> None:
    """Let Ctrl-C (or a scheduler's SIGTERM) stop the run once, and at once the second time."""

    def handle(number: int, frame: Any) -> None:
        if asked:
            import psutil

            # Ray's processes would outlive this one, each in a session of its own.
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            os._exit(INTERRUPTED)
        asked.append(number)
        say("Stopping. Once more to stop at once.")
        stop()

    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


class Outputs(Callback):
    """Hydra callback: the output folder is writable, and a multirun leaves a summary."""

    sweep: Path | None = None

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        _check_writable(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.sweep = Path(config.hydra.sweep.dir)
        _check_writable(self.sweep)

    def on_job_end(self, config: DictConfig, **_: Any) -> None:
        # After each one, because a job that failed keeps Hydra from announcing the end.
        if self.sweep:
            summarise_sweep(self.sweep)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        say(f"Losses of all runs: {self.sweep}/losses.png, losses.csv, losses.md")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (probe := folder / ".writable").touch()
        probe.unlink()
    except OSError as error:
        # Hydra turns a callback's exceptions into warnings; only an exit stops it.
        raise SystemExit(
            f"The output folder {folder} cannot be written ({error.strerror}). "
            "Name another one: hydra.run.dir=/path/to/folder (hydra.sweep.dir for --multirun)."
        ) from error


def summarise_sweep(folder: Path) -> None:
    """Write `losses.png`, `losses.csv` and `losses.md` over all runs of a multirun.

    A run that left no history stands in the tables with an empty loss.
    """
    curves: dict[str, list[float]] = {}
    table = []
    jobs = [job for job in folder.iterdir() if (job / ".hydra/overrides.yaml").exists()]
    for job in sorted(jobs, key=lambda job: (len(job.name), job.name)):
        overrides = OmegaConf.load(job / ".hydra/overrides.yaml")
        history = job / "history.json"
        rounds = json.loads(history.read_text())["rounds"] if history.exists() else []
        losses = [entry["train_loss"] for entry in rounds]
        last = f"{smooth(losses)[-1]:.4f}" if losses else ""
        table.append([job.name, *overrides, len(losses), last])
        if losses:
            varied = [text for text in overrides if not text.startswith("experiment=")]
            curves[", ".join(varied) or job.name] = losses
    if not table:
        return
    # A setting that all runs share tells them apart no better than none.
    names = [text.split("=", 1)[0] for text in overrides]
    header = ["run", *names, "rounds", "last smoothed loss"]
    rows = [
        [text.split("=", 1)[-1] if isinstance(text, str) else text for text in row]
        for row in table
    ]
    with (folder / "losses.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    lines = [header, ["---"] * len(header), *rows]
    (folder / "losses.md").write_text(
        "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    )
    if curves:
        plot_losses(curves, folder / "losses.png", smoothed=True)
