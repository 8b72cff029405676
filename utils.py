"""Errors, paths, seeds, atomic files and console output, used by every module.

Knows nothing of Flower, of models or of data, and imports none of our modules.
"""

import argparse
import copy
import hashlib
import importlib
import io
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import CompactHydraException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import AliasToken, YAMLError, scan

if TYPE_CHECKING:  # not for each import of this
    from psutil import Process

IGNORED = -100  # the label of tokens that the loss leaves out

PROJECT = Path(__file__).resolve().parent

# owner/name. Libraries take names of one word for something else that they know.
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)

INTERRUPTED = 130  # the exit code after Ctrl-C, as shells have it

FEW = 10  # records: what fewer say of a client is left out of "worst" and "spread"

# A reference to another key of a configuration, which calls nothing.
REFERENCE = re.compile(r"\$\{[\w.]+\}", re.ASCII)

# An absolute path, or one with a leading `..`, in a text: up to a blank, quote or bracket; or
# in quotes; or in a URL without a host (sqlite:////home/...).
PATH = re.compile(
    r"""(?<=['"])(?:~\w*|\.\.)?/[^'"\n]+(?=['"])"""
    r"""|(?<=:)/{3,}[^\s'"]+"""
    r"""|(?<![\w.~/:-])(?:~\w*|\.\.)?/[^\s'",;=(){}\[\]]+"""
)

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
    # bitsandbytes has four functions compiled, for odd shapes and its optimizers on a CPU, and
    # imports a compiler for it, a fifth of all that a process imports. They run without it.
    "TORCHDYNAMO_DISABLE": "1",
    "TQDM_DISABLE": "1",  # the libraries' bars; `Progress` shows its own all the same
}.items():
    os.environ.setdefault(_name, _value)


class UserError(CompactHydraException):
    """A mistake that the user can fix. Hydra prints its text without a traceback."""


class Unwritable(UserError):
    """A file or folder that cannot be written (disk full, permissions, ...)."""


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
    """Untrusted text without control characters: each that is not printable becomes `?`."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def one_line(text: Any, limit: int = 200) -> str:
    """An untrusted text as one line of at most `limit` printable characters."""
    start = str(text)[: 4 * limit]  # so that a huge text costs no time
    line = "".join(c if c.isprintable() else " " for c in start)
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


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


def spelt(value: Any) -> str:
    """A setting's value as it is typed: null, true, ["a", "b"]."""
    other = value is None or isinstance(value, (bool, list))
    return json.dumps(value, ensure_ascii=False, default=str) if other else str(value)


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their dotted keys."""
    if not isinstance(node, dict):
        return {path: node}
    parts = (flat(value, f"{path}.{key}".lstrip(".")) for key, value in node.items())
    return {key: value for part in parts for key, value in part.items()}


class Settings(dict[str, Any]):
    """A dict whose keys are attributes as well: `cfg.train.seq_length`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __or__(self, more: dict[str, Any]) -> "Settings":
        return Settings.of({**self, **more})

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Settings":
        """The same values, sections as `Settings`."""
        return cls(
            (k, cls.of(v) if isinstance(v, dict) else v) for k, v in values.items()
        )


def construct(node: Any, package: str, kind: type = object, **more: Any) -> Any:
    """Build the class that `node._target_` names, if it is a `kind` and directly in `package`.

    Hydra's own `instantiate` calls anything that can be imported. This runs on clients,
    with values that may have come over the network, so only `package.Class` is allowed.

    Raises `UserError` for another target or for arguments the class does not take.
    """
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    arguments = copy.deepcopy({**node}) | more
    target = arguments.pop("_target_")
    module, _, name = target.rpartition(".")
    made = getattr(importlib.import_module(package), name, None)
    if module != package or not isinstance(made, type):
        raise UserError(f"_target_={target} is not a class of {package}.")
    if not issubclass(made, kind):  # what the module itself has imported, say
        raise UserError(f"_target_={target} is no {kind.__name__.lower()}.")
    try:
        return made(**arguments)
    except Exception as error:  # of any type: each class has its own
        raise UserError(f"{target} refuses its settings: {error}") from error


def local_path(name: str) -> Path | None:
    """The existing file or folder that `name` means here, or None (a hub name, say).

    A relative path is tried in the working directory, then in the project's folder.
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


def learning_rate(cfg: Settings, server_round: int) -> float:
    """What clients train with in a round, by the resolved configuration.

    `train.training_arguments.learning_rate`, or the cosine over `train.schedule_rounds`,
    which are `num_rounds` where it gives none.
    """
    train = cfg.train
    constant = train.training_arguments.get("learning_rate")
    if constant is not None:
        return constant
    low, high = train.learning_rate_min, train.learning_rate_max
    return cosine(server_round, train.schedule_rounds or cfg.num_rounds, high, low)


def cohort_size(num_clients: int, fraction: float) -> int:
    """How many clients a fraction means: rounded down, but at least one."""
    # 0.29 * 100 is a hair under 29 in floating point.
    return max(1, int(num_clients * fraction + 1e-9))


def git_commit() -> str | None:
    """The commit of this project, in a git checkout."""
    command = ["git", "-C", str(PROJECT), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def command(script: str, *words: str, **settings: Any) -> str:
    """A command line for `script` with Hydra's settings, quoted for the shell and for Hydra."""
    told = [override(key, str(value)) for key, value in settings.items()]
    return shlex.join(["python", script, *words, *told])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn OS errors of a block that writes `path`, or into it, into `Unwritable`.

    Rust libraries (safetensors, tokenizers) raise exceptions of their own, whose text ends
    with "(os error 28)".
    """
    try:
        yield
    except (ConnectionError, TimeoutError):  # OSErrors too, but of the hub or a pipe
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


DEEPSPEED = "deepspeed==0.19.8"  # the extra that launch=zero2 and zero3 need
# What train.training_arguments.use_liger_kernel needs.
LIGER = "liger-kernel==0.8.5"


def require(package: str, by: str) -> None:
    """Raise `UserError` with what to install where a `package` (name==version) is not here."""
    name = package.partition("==")[0]
    if find_spec(name.replace("-", "_")) is None:
        raise UserError(
            f"{by} needs {name}, which is not installed: pip install {package}"
        )


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


@contextmanager
def as_command(code: int = 1) -> Iterator[None]:
    """What a command has around its work on a model: libraries are quiet, and of a mistake the
    user is told in a line before the process ends with this exit code."""
    quiet()
    offline_if_unreachable()
    try:
        yield
    except (UserError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(code)


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more, a whole number")
    return int(text)


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run's folder, which may be a stranger's.

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


CONFIG = ".hydra/config.yaml"  # of a run's folder


def read_config(run: Path) -> DictConfig:
    """A run's `.hydra/config.yaml`, of which only references inside of it are resolved.

    What asks for more (`${oc.env:...}`) is read as text: the folder may be a stranger's. Raises
    `UserError` where the file is missing or broken.
    """
    path = run / CONFIG
    cfg = OmegaConf.create(_literal(read_yaml(path, dict)))
    try:
        OmegaConf.resolve(cfg)
    except (OmegaConfBaseException, RecursionError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path} is broken ({type(error).__name__}: {line}).") from None
    return cfg


def _literal(node: Any) -> Any:
    """A configuration in which a string holds a reference to another key, or no `${`."""
    if isinstance(node, dict):
        return {key: _literal(value) for key, value in node.items()}
    if isinstance(node, list):
        return list(map(_literal, node))
    if isinstance(node, str) and "${" in node and not REFERENCE.fullmatch(node):
        return node.replace("${", "$ {")  # not to be asked for
    return node


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


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: a reader finds the old content or the new, never a part.

    Raises `Unwritable`.
    """
    temporary = path.with_suffix(".tmp")
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    with writing(path):
        # Half of a character pair, which UTF-8 has no bytes for, becomes JSON's \ud800.
        temporary.write_text(text, "utf-8", errors="backslashreplace")
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)  # the name as well


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
    """fsync a file or folder."""
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
    """Print a line to the console without breaking a progress bar.

    Where stdout is closed, a pipe say, the process gets a SIGHUP, as it does when a terminal
    is closed.
    """
    from tqdm import tqdm

    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os.kill(os.getpid(), signal.SIGHUP)


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
            end_at_once("Stopped.", INTERRUPTED, known)
        asked.append(number)
        _tell("Stopping. Once more to stop at once.")
        # By the second time Ray may be ending, and its workers be nobody's children.
        known.extend(children())
        stop()

    asked: list[int] = []
    known: list[Process] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Under nohup a terminal may be closed.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)


def end_at_once(text: str, code: int, known: Sequence["Process"] = ()) -> NoReturn:
    """Print `text`, kill all child processes, and end this one with an exit code.

    And those of `known` that are still there.
    """
    from psutil import NoSuchProcess

    _tell(text)
    # Ray's processes would outlive this one, each in a session of its own.
    for child in {*known, *children()}:
        with suppress(NoSuchProcess):  # also where its number is another's now
            child.kill()
    os._exit(code)


def children() -> list["Process"]:
    """All processes that descend from this one."""
    import psutil

    return psutil.Process().children(recursive=True)


def _tell(text: str) -> None:
    """Write a line to file descriptor 2: Python's stderr may be locked in a signal handler."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


# --- text for others: without local paths, escaped for Markdown ------------------------------


def public(text: str) -> str:
    """A text for others: paths outside of the project are cut to their last part.

    Paths inside of the project become relative to it.
    """
    if text and (local_path(text) or text.startswith(("/", "~"))):
        return _last(text)
    return PATH.sub(lambda match: _last(match[0]), text)


def public_values(node: Any) -> Any:
    """`public` of every text in nested settings."""
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
    """The text escaped for Markdown, on one line: no tag, link or image of its own."""
    line = re.sub(" +", " ", re.sub(CONTROLS, " ", str(text))).strip()
    # GitHub makes links of bare addresses as well. Between two letters _ means nothing.
    special = r"([\\`*\[\]|<>&~$!#@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=[wW]{3})\.)"
    return re.sub(special, r"\\\1", line)


def table(header: list[str], rows: Iterable[list[Any]], numbers: bool = True) -> str:
    """In Markdown, the columns after the first to the right if they are of numbers."""
    rules = [" --- ", *[" ---: " if numbers else " --- "] * (len(header) - 1)]
    lines = [" " + " | ".join(map(escape, cells)) + " " for cells in (header, *rows)]
    return "\n".join(f"|{line}|" for line in (lines[0], "|".join(rules), *lines[1:]))


def code(language: str, *lines: str) -> str:
    """A Markdown code block, whose fence is longer than any run of backticks in it."""
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
