"""What has no better room: errors, config composition, paths, seeds, progress, plots.

Knows nothing of Flower, of models or of data, and imports none of our modules.
"""

import csv
import fcntl
import hashlib
import importlib
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO
from urllib.parse import urlsplit

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException, HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import AliasToken, YAMLError, scan

PROJECT = Path(__file__).resolve().parent
# owner/name. Libraries take names of one word for something else that they know.
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
INTERRUPTED = 130  # the exit code after Ctrl-C, as shells have it
FEW = 10  # records: what fewer say of a client is left out of "worst" and "spread"

# A reference to another key of a configuration, which calls nothing.
REFERENCE = re.compile(r"\$\{[\w.]+\}")
# An absolute path, or one that leads upwards, in a text: up to a blank, quote or bracket; or
# in quotes; or in a URL without a host (sqlite:////home/...).
PATH = re.compile(
    r"""(?<=['"])(?:~\w*|\.\.)?/[^'"\n]+(?=['"])"""
    r"""|(?<=:)/{3,}[^\s'"]+"""
    r"""|(?<![\w.~/:-])(?:~\w*|\.\.)?/[^\s'",;=(){}\[\]]+"""
)
# Told apart by the colour-blind (Okabe and Ito 2008); their black is for axes.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442")
GREY = "#7f7f7f"
LOSS = "loss, nats per answer token"
LEGEND = 24  # runs that a sweep's legend names
# What a terminal or a page would act on: control characters, and those that turn text around.
CONTROLS = r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"

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


class Unwritable(UserError):
    """A file or folder that the disk does not take."""


class Refusal(UserError):
    """A client that cannot take part in a run.

    The text is told to the server: it names keys, and never their values.
    """

    code = 100  # of the error by which the server knows that there is no use in asking again


class Stopped(UserError):
    """Somebody asked the run to end. What came before is on disk."""


STOP = threading.Event()  # ends the run at the next `look_for_stop`


def look_for_stop() -> None:
    """To be called in every loop that may take long. Raises `Stopped` after `STOP.set()`."""
    if STOP.is_set():
        raise Stopped("Stopped.")


def printable(text: str) -> str:
    """Foreign text that cannot steer a terminal: what is no character becomes `?`."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def one_line(text: Any, limit: int = 200) -> str:
    """A foreign text as one line of at most `limit` printable characters."""
    start = str(text)[: 4 * limit]  # what is cut off need not be looked at
    line = "".join(c if c.isprintable() else " " for c in start)
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


# --- configuration ---------------------------------------------------------------------


def compose(overrides: str = "") -> DictConfig:
    """Compose `conf/` with a string of Hydra overrides, outside `@hydra.main`.

    Raises `hydra.errors.HydraException` for an override that does not fit `conf/`.
    """
    return compose_run(overrides)[0]


def compose_run(overrides: str) -> tuple[DictConfig, Path, bool]:
    """Likewise, and the run's folder for `begin`: `hydra.run.dir`, and whether it is named."""
    GlobalHydra.instance().clear()  # `@hydra.main` may have left one
    try:
        words = shlex.split(overrides)
        for word in words:
            parse(word)
        with hydra.initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
            cfg = hydra.compose("config", overrides=words, return_hydra_config=True)
        folder, named = Path(cfg.hydra.run.dir), is_named(cfg.hydra)
        with open_dict(cfg):
            del cfg.hydra
        OmegaConf.resolve(cfg)
    except (ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{overrides}: {error}") from error
    return cfg, folder, named


def is_named(ours: DictConfig, key: str = "hydra.run.dir") -> bool:
    """Whether the overrides in Hydra's own configuration name a run's folder."""
    return any(parse(text).key_or_group == key for text in ours.overrides.hydra)


def parse(word: str) -> Override:
    """An override as Hydra reads it. Raises `UserError` with how to quote it where it cannot."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        key, equals, value = word.partition("=")
        hint = f"Quote it twice: {shlex.quote(override(key, value))}"
        told = hint if equals else str(error).splitlines()[0]
        raise UserError(f"{word}: this cannot be read as an override. {told}") from None


def override(key: str, value: str) -> str:
    """`key=value`, with the quotes without which Hydra would read another value, or none."""
    with suppress(HydraException):
        plain = OverridesParser.create().parse_override(f"{key}={value}").value()
        if plain == value == literal(value):
            return f"{key}={value}"
    return f"{key}={QuotedString(literal(value), Quote.double).with_quotes()}"


def literal(text: str) -> str:
    """`text` as a value that OmegaConf takes as it stands: `${` in it refers to nothing."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their dotted keys."""
    if not isinstance(node, dict):
        return {path: node}
    parts = (flat(value, f"{path}.{key}".lstrip(".")) for key, value in node.items())
    return {key: value for part in parts for key, value in part.items()}


def record(cfg: DictConfig, overrides: list[str], folder: Path) -> None:
    """Write the configuration into a run's folder, as `@hydra.main` would.

    Raises `Unwritable`.
    """
    with writing(folder / ".hydra"):
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, folder / ".hydra/config.yaml")
        OmegaConf.save(overrides, folder / ".hydra/overrides.yaml")


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
    except Exception as error:  # of any type: each class has its own
        raise UserError(f"{target} refuses its settings: {error}") from error


def local_path(name: str) -> Path | None:
    """The existing file or folder that `name` means here, or None (a hub name, say).

    A relative path is looked up in the working directory, then in the project's folder.
    """
    for folder in (Path(), PROJECT):
        # Too long for a path, not to be looked at, or of an unknown user's home.
        with suppress(OSError, RuntimeError):
            path = folder / Path(str(name)).expanduser()
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


# --- a run's folder ------------------------------------------------------------------------

# What a run leaves in its folder, and no other run may find there.
LEFT = ("history.json", "summary.json", "checkpoints", "peft_*", "residuals")
LEFT_BY_SWEEPS = ("multirun.yaml", *(f"*/{name}" for name in LEFT))


def begin(folder: Path, named: bool) -> Path:
    """Make the folder of a new run: `folder`, or unless the user `named` it the first of
    `folder`, `folder-2`, `folder-3` ... that was not there. Raises `UserError`.
    """
    if "${" in str(folder):
        raise UserError(
            f"{folder}: Hydra takes ${{ for a reference. Name another folder."
        )
    first = folder
    with writing(folder):
        for number in itertools.count(2):
            try:
                folder.mkdir(parents=True, exist_ok=named)
                break
            except FileExistsError:
                if not folder.is_dir():
                    raise
                folder = first.with_name(f"{first.name}-{number}")
    return folder


def own(folder: Path, without: Iterable[str] = LEFT) -> TextIO:
    """Make this process the only one that writes into a run's folder, until the result is
    closed or the process ends, however it does: the kernel keeps the lock.

    Raises `UserError` where another process has it, or something `without` which the folder
    should be is in it; `Unwritable` where the disk does not take what a run begins with.
    """
    with writing(folder):
        lock = (folder / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        with lock:
            raise UserError(
                f"{folder}: another run writes into it, process {lock.read(300)}. Wait for "
                "its end, or end it with kill and that number."
            ) from None
    except OSError as error:
        say(f"{folder} cannot be locked ({error.strerror}): keep other runs out of it.")
    if found := next((path for name in without for path in folder.glob(name)), None):
        lock.close()
        place = found.parent
        raise UserError(
            f"{place} holds a multirun already. Name another folder: "
            "hydra.sweep.dir=/path/to/folder"
            if found.name == "multirun.yaml"
            else f"{place} holds a run already ({found.name}). Go on with it: "
            f"{command('main.py', resume=place)}. Or begin in another folder: "
            "hydra.run.dir=/path/to/folder (hydra.sweep.dir for a multirun)."
        )
    with writing(folder):
        (probe := folder / ".writable").write_bytes(bytes(2**16))  # as much as .hydra/
        probe.unlink()
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}")
        lock.flush()
    return lock


def command(script: str, *words: str, **settings: Any) -> str:
    """A command line for `script` with Hydra's settings, quoted for the shell and for Hydra."""
    told = [override(key, str(value)) for key, value in settings.items()]
    return shlex.join(["python", script, *words, *told])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What is done in here writes `path`, or into it. Raises `Unwritable` where it cannot be.

    What Rust writes for us (safetensors, tokenizers) has exceptions of its own, which end
    with "(os error 28)".
    """
    try:
        yield
    except (ConnectionError, TimeoutError):  # OSErrors too, but of a hub or a pipe
        raise
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        name, whole = getattr(error, "filename", None), path.absolute()
        file = Path(name).absolute() if isinstance(name, str) else whole
        near = file.is_relative_to(whole.parent) or whole.is_relative_to(file)
        if number is None or not near:
            raise
        raise Unwritable(
            f"{path} cannot be written ({os.strerror(number)})."
        ) from error


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
    logging.raiseExceptions = (
        False  # a log that cannot be written would say so each time
    )


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


def read_json(path: Path) -> Any:
    """The content of a JSON file that a run, or whoever sent it, has left.

    Raises `UserError` where it is missing, is no file of at most 1 GiB, or is broken.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is broken ({type(error).__name__}: {error})."
        ) from None


def read_yaml(path: Path, kind: type) -> Any:
    """A `dict` or `list` out of a small YAML file, as plain values, nothing resolved.

    Raises `UserError` as `read_json` does, and for aliases: a kilobyte of those can stand for
    more than any memory holds.
    """
    text = read_text(path, most=2**20)
    try:
        if any(isinstance(token, AliasToken) for token in scan(text)):
            raise ValueError("it holds aliases")
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except (
        OSError,  # what is neither dict, list nor text, by OmegaConf
        ValueError,
        RecursionError,
        YAMLError,
        OmegaConfBaseException,
    ) as error:
        told = " ".join(str(error).split())  # where, in lines of its own
        raise UserError(f"{path} is broken ({type(error).__name__}: {told}).") from None
    if not isinstance(content, kind):
        raise UserError(f"{path} is broken (it holds something else).")
    return content


def read_text(path: Path, most: int = 2**30) -> str:
    """The text of a file of at most `most` bytes. Raises `UserError` as `read_json` does."""
    try:
        if not path.is_file():  # a pipe, say, would be waited for
            raise UserError(f"{path} is {'no file' if path.exists() else 'missing'}.")
        if (size := path.stat().st_size) > most:
            raise UserError(f"{path} is too large ({size} bytes, {most} at most).")
        return path.read_text("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is broken ({type(error).__name__}: {error})."
        ) from None


def read_config(run: Path) -> DictConfig:
    """A run's `.hydra/config.yaml`, of which only references inside of it are resolved.

    What asks for more (`${oc.env:...}`) is read as text: the folder may be a stranger's. Raises
    `UserError` where the file is missing or broken.
    """
    path = run / ".hydra/config.yaml"
    cfg = OmegaConf.create(_literal(read_yaml(path, dict)))
    try:
        OmegaConf.resolve(cfg)
    except (OmegaConfBaseException, RecursionError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path} is broken ({type(error).__name__}: {line}).") from None
    return cfg


def read_overrides(run: Path) -> dict[str, str]:
    """The overrides of a run by their keys, from `.hydra/overrides.yaml`. Raises `UserError`."""
    path = run / ".hydra/overrides.yaml"
    return by_key(fit(read_yaml(path, list), [str], path))


def by_key(overrides: Iterable[str]) -> dict[str, str]:
    """Hydra overrides by their keys, without a `+` or `~`; `resume` is not told."""
    pairs = (text.lstrip("+~").partition("=")[::2] for text in overrides)
    return {key: value for key, value in pairs if key != "resume"}


def varied(runs: list[dict[str, str]]) -> list[str]:
    """The keys whose values differ between runs, given the overrides of each."""
    keys = dict.fromkeys(key for run in runs for key in run)
    return [key for key in keys if len({run.get(key) for run in runs}) > 1]


def fit(value: Any, shape: Any, path: Path, at: str = "it") -> Any:
    """`value`, which was read from `path`, if it has the shape; else raises `UserError`.

    `shape`: a type; `[shape]`, a list of such; or a dict of shapes by key, where a key that
    ends with `?` may be missing. A number that is to be a float may be whole.
    """
    wanted = {dict: dict, list: list}.get(type(shape), shape)
    kinds = (int, float) if wanted is float else wanted
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"{path} is broken: {at} is no {wanted.__name__}.")
    if isinstance(shape, list):
        for place, item in enumerate(value):
            fit(item, shape[0], path, f"{at}[{place}]")
    if isinstance(shape, dict):
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name in value:
                fit(value[name], inner, path, name if at == "it" else f"{at}.{name}")
            elif name == key:
                raise UserError(f"{path} is broken: {at} has no {name}.")
    return value


def _literal(node: Any) -> Any:
    """A configuration in which a string holds a reference to another key, or no `${`."""
    if isinstance(node, dict):
        return {key: _literal(value) for key, value in node.items()}
    if isinstance(node, list):
        return list(map(_literal, node))
    if isinstance(node, str) and "${" in node and not REFERENCE.fullmatch(node):
        return node.replace("${", "$ {")  # not to be asked for
    return node


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader finds the old content or the new, never a part.

    Raises `Unwritable`.
    """
    temporary = path.with_suffix(".tmp")
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    with writing(path):
        # Half of a character pair, which UTF-8 has no bytes for, becomes JSON's \ud800.
        temporary.write_text(text, "utf-8", errors="backslashreplace")
        _flush(temporary)
        os.replace(temporary, path)


@contextmanager
def commit(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which then becomes `folder`, whole or not at all.

    After a crash at any moment there is `folder` with all its content on the disk, or there
    is none. Raises `Unwritable`, also where there is one already.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        with writing(folder):
            temporary.mkdir(parents=True, exist_ok=True)
            yield temporary
            for file in temporary.rglob("*"):
                _flush(file)
            _flush(temporary)
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
        say(
            f"round {done}/{self.num_rounds}  {losses}  {speed}{entry['seconds']:.1f} s  "
            f"{entry['replied']} of {entry['sampled']} clients  "
            f"{self.bar.format_interval(left)} left"
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
    """Print a line to the console without tearing a progress bar.

    Where nobody reads it any more, a closed pipe say, the process gets a SIGHUP, as it does
    when a terminal is closed.
    """
    from tqdm import tqdm

    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os.kill(os.getpid(), signal.SIGHUP)


def smooth(values: list[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average whose early values are not drawn to zero.

    The same formula as TensorBoard's smoothing slider.
    """
    smoothed, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


@contextmanager
def figure(
    path: Path, rows: int = 1, columns: int = 1, height: float = 4.2, **more: Any
) -> Iterator[list[Any]]:
    """The axes of a new figure, 8 inches wide, which is then saved as a PNG.

    Text is text, whatever it holds; letters are 12 pixels high where it is 800 wide.
    """
    import matplotlib

    matplotlib.use("Agg")
    from cycler import cycler
    from matplotlib import pyplot

    lines = cycler(linestyle=["-", "--", ":", "-."], marker=["o", "s", "^", "D"])
    lines *= cycler(color=COLOURS[:6])
    style = {"text.parse_math": False, "axes.grid": True, "axes.grid.axis": "y"}
    style |= {"grid.alpha": 0.3, "axes.axisbelow": True, "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    style |= {"axes.prop_cycle": lines, "font.size": 9.5, "lines.markersize": 5}
    with pyplot.rc_context(style):
        drawn, axes = pyplot.subplots(
            rows,
            columns,
            figsize=(8, height),
            layout="constrained",
            squeeze=False,
            **more,
        )
        yield list(axes.flat)
        with writing(path):
            drawn.savefig(path, dpi=120)
        pyplot.close(drawn)


def draw_over_rounds(axes: Any, curve: dict[int, float], **style: Any) -> Any:
    """Draw values by their rounds, as points too where they are few; returns the line."""
    few = {} if len(curve) <= 30 else {"marker": ""}
    (line,) = axes.plot(list(curve), list(curve.values()), **few | style)
    return line


def count_rounds(axes: Any) -> None:
    """Let the axes of what is drawn over rounds count whole ones."""
    axes.set_xlabel("round")
    axes.xaxis.get_major_locator().set_params(integer=True)
    first, last = axes.dataLim.intervalx
    if first == last:  # matplotlib would count in fractions
        axes.set_xticks([first])


def plot_run(history: dict[str, Any], title: str, path: Path) -> None:
    """Draw the losses of one run over its rounds, in nats per answer token, into a PNG.

    `history`: of `history.json`. Training, the test questions, and what clients hold back of
    their own; as far as they were measured, the last two of the base as well, as round 0.
    """
    rounds = history["rounds"]
    entries = [history["before"], *rounds] if history.get("before") else rounds
    own = [e["eval_clients"] for e in entries if e.get("eval_clients")]
    held = [client["num-examples"] for client in own[-1]] if own else []
    names = {
        "train_loss": "training, mean of the round's clients",
        "test_loss": "test questions",
        "eval_loss": f"held back by the clients: {sum(held):g} records",
    }
    with figure(path) as (axes,):
        each = [
            (e["round"], client["train_loss"])
            for e in rounds
            for client in e.get("clients", [])
        ]
        if len(each) > len(rounds):  # who was asked moves the mean as well
            style = {
                "color": COLOURS[0],
                "alpha": 0.3,
                "label": "training, each client",
            }
            axes.plot(*zip(*each, strict=True), ".", **style)
        for (name, label), colour in zip(names.items(), COLOURS, strict=False):
            curve = {e["round"]: e[name] for e in entries if name in e}
            if curve:
                draw_over_rounds(axes, curve, color=colour, label=label)
        count_rounds(axes)
        axes.set_ylabel(LOSS)
        axes.set_title(title, loc="left", fontsize="medium", wrap=True)
        axes.legend()


def plot_sweep(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Draw the smoothed training loss of several runs, by round, and the values in pale."""
    columns = 1 if max(map(len, curves)) > 40 else 2 if len(curves) < 9 else 3
    height = 4 + 0.2 * min(len(curves), LEGEND) / columns
    with figure(path, height=height) as (axes,):
        for place, (name, losses) in enumerate(curves.items()):
            smoothed = dict(zip(losses, smooth(list(losses.values())), strict=True))
            label = name if place < LEGEND else None
            line = draw_over_rounds(axes, smoothed, label=label)
            style = {"ls": "-", "alpha": 0.2, "marker": ""}
            draw_over_rounds(axes, losses, color=line.get_color(), **style)
        count_rounds(axes)
        axes.set_ylabel(LOSS)
        axes.set_title(
            "training, smoothed; in pale as it was", loc="left", fontsize="medium"
        )
        more = len(curves) - LEGEND
        axes.figure.legend(
            loc="outside lower center",
            ncols=columns,
            title=f"and {more} more, in losses.md" if more > 0 else None,
        )


def on_interrupt(stop: Callable[[], None] | None = None) -> None:
    """Let Ctrl-C, a scheduler's SIGTERM or a closed terminal (SIGHUP) end the process at once.

    With `stop` the first time only calls it, for the run to end by itself.
    """

    def handle(number: int, frame: Any) -> None:
        if (
            asked and number == signal.SIGHUP
        ):  # `say` tells again that a terminal is closed
            return
        if asked or stop is None:
            end_at_once("Stopped.", INTERRUPTED)
        asked.append(number)
        _tell("Stopping. Once more to stop at once.")
        stop()

    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Under nohup a terminal may be closed.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)


def end_at_once(text: str, code: int) -> NoReturn:
    """End this process and all that it started, with a last word and an exit code."""
    import psutil

    _tell(text)
    # Ray's processes would outlive this one, each in a session of its own.
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(code)


def _tell(text: str) -> None:
    """Write a line past Python's own files, which a signal may have come in the middle of."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


class Outputs(Callback):
    """Hydra callback: each run has a folder of its own, and a multirun leaves a summary.

    Hydra turns a callback's exceptions into warnings; only an exit stops it.
    """

    sweep: Path | None = None
    lock: TextIO | None = None  # of the run's folder, or the multirun's
    job: TextIO | None = None  # of the folder of one of its runs

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with _or_exit(), read_write(config.hydra):
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
        with _or_exit(), read_write(config.hydra):
            key = "hydra.sweep.dir"
            named = is_named(config.hydra, key)
            self.sweep = begin(Path(config.hydra.sweep.dir), named)
            config.hydra.sweep.dir = literal(str(self.sweep))
            # From which each run's configuration is composed again.
            config.hydra.overrides.hydra.append(override(key, str(self.sweep)))
            self.lock = own(self.sweep, LEFT_BY_SWEEPS)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if self.sweep:
            with _or_exit():
                self.job = own(Path(config.hydra.runtime.output_dir))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if not self.sweep:
            return
        if self.job:
            self.job.close()
        if job_return.status == JobStatus.FAILED:
            # Hydra itself tells the first failed run's only, and at the very end.
            error = str(job_return._return_value).splitlines() or ["?"]
            print(f"Run {config.hydra.job.num} failed: {error[0]}", file=sys.stderr)
        # After each one, because a job that failed keeps Hydra from announcing the end.
        summarise_sweep(self.sweep)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        say(f"Losses of all runs: {self.sweep}/losses.png, losses.csv, losses.md")


@contextmanager
def _or_exit() -> Iterator[None]:
    try:
        yield
    except Unwritable as error:
        raise SystemExit(
            f"{error} Name another folder: hydra.run.dir=/path/to/folder "
            "(hydra.sweep.dir for a multirun)."
        ) from error
    except Exception as error:
        raise SystemExit(str(error)) from error


def summarise_sweep(folder: Path) -> None:
    """Write `losses.png`, `losses.csv` and `losses.md` over all runs of a multirun.

    Runs are named by what differs between them. One that left no history stands in the tables
    with an empty loss.
    """
    jobs = [job for job in folder.iterdir() if (job / ".hydra/overrides.yaml").exists()]
    jobs.sort(key=lambda job: (len(job.name), job.name))
    if not jobs:
        return
    overrides = [read_overrides(job) for job in jobs]
    keys = varied(overrides)
    curves: dict[str, dict[int, float]] = {}
    rows = []
    for job, settings in zip(jobs, overrides, strict=True):
        losses = _train_losses(job / "history.json")
        last = f"{smooth(list(losses.values()))[-1]:.4f}" if losses else ""
        rows.append([job.name, *(settings.get(k, "") for k in keys), len(losses), last])
        if losses:
            curves[_label(job.name, {key: settings.get(key, "") for key in keys})] = (
                losses
            )
    header = ["run", *keys, "rounds", "last smoothed loss"]
    with (folder / "losses.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    short = [[_cut(public(str(cell)), 60) for cell in row] for row in rows]
    (folder / "losses.md").write_text(table(header, short) + "\n")
    if curves:
        plot_sweep(curves, folder / "losses.png")


def _train_losses(path: Path) -> dict[int, float]:
    if not path.exists():
        return {}
    shape = {"rounds": [{"round": int, "train_loss": float}]}
    rounds = fit(read_json(path), shape, path)["rounds"]
    return {entry["round"]: entry["train_loss"] for entry in rounds}


def _label(run: str, settings: dict[str, str]) -> str:
    """What tells a run of a sweep from the others, short enough for a legend."""
    last = [key.rpartition(".")[2] for key in settings]
    parts = [
        f"{name if last.count(name) == 1 else key}={_cut(public(value), 24)}"
        for name, (key, value) in zip(last, settings.items(), strict=True)
    ]
    return f"{run}: {_cut(', '.join(parts), 72)}" if parts else f"run {run}"


def _cut(text: str, most: int) -> str:
    """The end of a text that is too long: of paths and names, that is what differs."""
    return text if len(text) <= most else f"...{text[3 - most :]}"


# --- what others may read -----------------------------------------------------------------


def public(text: str) -> str:
    """A text in which a path outside of the project is the last part of that path.

    One inside of the project becomes relative to it. How the folders of a machine are called
    is nobody else's affair.
    """
    if text and (local_path(text) or text.startswith(("/", "~"))):
        return _last(text)
    return PATH.sub(lambda match: _last(match[0]), text)


def public_values(node: Any) -> Any:
    """The same of every text in nested settings."""
    if isinstance(node, dict):
        return {key: public_values(value) for key, value in node.items()}
    if isinstance(node, list):
        return list(map(public_values, node))
    return public(node) if isinstance(node, str) and node else node


def _last(name: str) -> str:
    path = local_path(name) or Path(name)
    if path.is_relative_to(PROJECT) and ".." not in path.parts:
        return str(path.relative_to(PROJECT))
    outside = path.is_absolute() or name.startswith(("~", ".."))
    return path.name if outside else str(path)


def escape(text: Any) -> str:
    """As Markdown that shows this text on one line, whatever it holds: no tag, link, image."""
    line = re.sub(" +", " ", re.sub(CONTROLS, " ", str(text))).strip()
    # GitHub makes links of bare addresses as well. Inside of a word _ means nothing.
    special = r"([\\`*\[\]|<>&~$!#@]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=[wW]{3})\.)"
    return re.sub(special, r"\\\1", line)


def table(header: list[str], rows: Iterable[list[Any]], numbers: bool = True) -> str:
    """In Markdown, the columns after the first to the right if they are of numbers."""
    rules = [" --- ", *[" ---: " if numbers else " --- "] * (len(header) - 1)]
    lines = [" " + " | ".join(map(escape, cells)) + " " for cells in (header, *rows)]
    return "\n".join(f"|{line}|" for line in (lines[0], "|".join(rules), *lines[1:]))


def code(language: str, *lines: str) -> str:
    """A block of code in Markdown, in a fence that nothing in it can end."""
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def telling(clients: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The clients whose own figures rest on enough records (`FEW`) to be compared by them."""
    return [client for client in clients if client["num-examples"] >= FEW]


def trained_records(rounds: list[dict[str, Any]]) -> str:
    """How many records the clients of these rounds train from, in words; "" if not known."""
    clients = [client for entry in rounds for client in entry.get("clients", [])]
    held = {c["partition"]: c["records"] for c in clients if "records" in c}
    return (
        f"{sum(held.values()):g} of {len(held)} clients that took part" if held else ""
    )
