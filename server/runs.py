"""A run's folder: whose it is, and what stands in its files.

`history.json` is a `History`, rewritten after every round; at the end come `summary.json`, a
`Summary`, and as far as test questions were asked `answers.json`, a list of `Answer`, and
`test_scores.json`, a `TestScores`. `read` is their one reader, whoever wrote them.
"""

import fcntl
import itertools
import os
import socket
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NotRequired, TextIO

from omegaconf import OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from utils import (
    CONFIG,
    FEW,
    UserError,
    command,
    read_config,
    read_json,
    read_yaml,
    say,
    writing,
)

# --- what stands in its files ---------------------------------------------------------------

typed = with_config(ConfigDict(strict=True, allow_inf_nan=False))
scored = with_config(ConfigDict(strict=True))  # where an adapter may have scored NaN

# `{per}`: what the task takes its means over (`tasks.base.Task.per`).
NATS, TOKENS = "nats per {per}", "share of {per}s found likeliest"
MARGIN = "reward of better answers above worse ones', mean"

# Every score there is, and its unit. `eval_`: on records that clients hold back, the others
# on the test questions.
UNITS = {
    "test_loss": NATS,
    "test_perplexity": "exp(loss)",
    "test_accuracy": TOKENS,
    "test_macro_f1": "0 to 1, mean over labels of F1",
    "test_mcc": "-1 to 1, Matthews' correlation of given and wanted labels",
    "test_entity_f1": "0 to 1, F1 of entities that are found whole",
    "test_margin": MARGIN,
    "exact_match": "share of answers that are the wanted one to the letter",
    "f1": "0 to 1, words in common with the wanted answer",
    "rouge_l": "0 to 1, longest common subsequence of words",
    "choice_accuracy": "share of questions whose right choice is the likeliest",
    "eval_loss": NATS,
    "eval_perplexity": "exp(loss)",
    "eval_accuracy": TOKENS,
    "eval_macro_f1": "0 to 1, mean over a client's labels of F1, and over clients",
    "eval_mcc": "-1 to 1, Matthews' correlation, mean over clients",
    "eval_entity_f1": "0 to 1, F1 of entities that are found whole, mean over clients",
    "eval_margin": MARGIN,
    "eval_loss_worst": f"{NATS}, of the client with the highest",
    "eval_loss_spread": f"{NATS}, standard deviation over clients",
}

Scores = TypedDict("Scores", dict.fromkeys(UNITS, float), total=False)

# What a client scores with the adapter that all share, with its own, and with what it chooses
# between them.
PERSONAL_LOSSES = ("eval_loss_global", "eval_loss_own", "eval_loss_personal")

BEST = ("test_loss", "eval_loss")  # by which the best round is found, if it is

# In the summary, by clients.
OWN = (
    *("eval_loss", "eval_perplexity", "eval_accuracy", "eval_margin"),
    *("eval_macro_f1", "eval_mcc", "eval_entity_f1"),
)

_Examples = TypedDict("_Examples", {"num-examples": float})


@typed
class Reply(_Examples):
    """A client's own word, in a round's entry. What an older run did not tell is not there.

    `num-examples` it trained or was measured on, repeated ones counted again; of its records
    `truncated` were cut at `train.seq_length` and `dropped` left out. `bytes_*`: the adapter
    as it travelled.
    """

    partition: int
    bytes_down: NotRequired[float]
    bytes_up: NotRequired[float]
    truncated: NotRequired[int]
    dropped: NotRequired[int]


_LAPS = ("", "_load", "_tokenise", "_set", "_train", "_read")
_Laps = TypedDict("_Laps", {f"seconds{lap}": float for lap in _LAPS}, total=False)


@typed
class Client(Reply, _Laps):
    """A client that trained: its mean loss in nats (see `History.per`), and what that took.

    `records`: how many it has to train on; `tokens`: trained on, without padding;
    `peak_memory` in bytes; `micro_batch`: examples at a time, at last; `rank` of its adapter,
    where clients may have different ones; `epsilon`: of each of its records in the run so far,
    with privacy=record, where it tells; `seconds`, and what of them went into each `seconds_*`.
    """

    train_loss: float
    records: NotRequired[float]
    tokens: NotRequired[int]
    micro_batch: NotRequired[int]
    rank: NotRequired[int]
    peak_memory: NotRequired[float]
    epsilon: NotRequired[float]


@typed
class Evaluated(Reply):
    """A client that measured an adapter on the records that it holds back."""

    eval_loss: float
    eval_accuracy: NotRequired[float]
    eval_macro_f1: NotRequired[float]
    eval_mcc: NotRequired[float]
    eval_entity_f1: NotRequired[float]
    eval_margin: NotRequired[float]
    eval_loss_own: NotRequired[float]


_Personal = TypedDict("_Personal", dict.fromkeys(PERSONAL_LOSSES, float))


@typed
class Personal(_Personal, Reply):
    """What a client chose at the end on the records that it holds back (`num-examples`).

    `personal_weight`: of its own adapter, in [0, 1]. `eval_loss_personal` is of each
    record with the weight that is best on all others.
    """

    personal_weight: float


@typed
class Failure(TypedDict):
    """A client whose reply was not used, and why."""

    partition: int
    cause: str


@typed
class Measured(Scores):
    """What was measured of one adapter, and by whom."""

    eval_clients: NotRequired[list[Evaluated]]
    evaluate_failures: NotRequired[list[Failure]]


@typed
class Before(Measured):
    """What the base scores without training."""

    round: Literal[0]


@typed
class Release(TypedDict):
    """An update of the adapter, made with noise: what `privacy.json` lists before it is made.

    `clients`: whose updates are in it; not told where that is secret. `noise_multiplier`: the
    noise's standard deviation over `clip_norm`.
    """

    round: int
    clients: NotRequired[list[int]]
    noise_multiplier: float
    clip_norm: float


@typed
class Round(Measured):
    """A round, counted from 1. `train_loss`: mean over its clients, weighted as their updates.

    `asked`: the partitions that were, in all attempts. In the last one `sampled` were asked
    and `replied` were of use; `retries` asked anew. `bytes_*`: adapters as they travel, over
    all clients; `peak_memory_*`: bytes, the most of any (0: nobody tells); `epsilon` at
    `delta`: likewise, so far, in the sense of `adjacency`; `seconds_aggregate` of its
    `seconds`. `aggregation_error`: how far the new adapter is from the exact mean of what the
    clients' adapters do, over how far that mean went (`methods.lora.Exactness`); null where
    that is not known. `best`: it had the lowest loss so far, where that was measured.
    `eval_loss_own`: the mean of the losses of clients' own adapters.

    `epsilon` at `delta`: what all rounds so far tell of the most exposed client at most, in the
    sense of `adjacency`. What
    clients say of their training is then not there, and `clients` is empty; where it is secret
    who took part, `sampled`, `replied` and `bytes_*` are what was expected. `clip_norm`: of the
    next round, where it adapts.
    """

    round: int
    train_loss: NotRequired[float]
    asked: NotRequired[list[int]]
    sampled: int
    replied: NotRequired[int]
    retries: NotRequired[int]
    learning_rate: NotRequired[float]
    tokens: NotRequired[int]
    tokens_per_second: NotRequired[float]
    truncated: NotRequired[int]
    dropped: NotRequired[int]
    failures: list[Failure]
    bytes_down: float
    bytes_up: float
    peak_memory_client: NotRequired[float]
    peak_memory_server: float
    clients: list[Client]
    seconds_aggregate: NotRequired[float]
    seconds: NotRequired[float]
    aggregation_error: NotRequired[float | None]
    best: NotRequired[bool]
    eval_loss_own: NotRequired[float]
    epsilon: NotRequired[float]
    delta: NotRequired[float]
    adjacency: NotRequired[str]
    clip_norm: NotRequired[float]


@typed
class History(TypedDict):
    """`history.json`: `before`, if anything was measured then, and the rounds in their order.

    `per`: what losses and accuracies are means over, where it is not a token of an answer.
    """

    per: NotRequired[str]
    before: NotRequired[Before]
    rounds: list[Round]


@typed
class Label(TypedDict):
    """What the last adapter makes of one label, on the test questions; `support` have it.

    `precision` of those that were given it, `recall` of those that have it, `f1` of both.
    """

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@scored
class Own(Scores):
    """With `mode=local`: what a client's own adapter scores on the test questions."""

    partition: int


_Means = TypedDict("_Means", dict.fromkeys(PERSONAL_LOSSES, float), total=False)

_Told = TypedDict(
    "_Told",
    {f"{name}_{when}": float for name in UNITS for when in ("before", "after")},
    total=False,
)


@scored
class Summary(_Told, _Means):
    """`summary.json`: sums over the rounds, the most memory (bytes), and each score of the
    base (`_before`) and of the last adapter (`_after`).

    `test_questions` were asked, `test_left_out` could not be; `seconds` of the whole run,
    those before it was stopped with them. Of `personal_clients` the `PERSONAL_LOSSES` are the
    means, weighted by records.

    `epsilon` at `delta`: what the run tells of its most exposed client at most, in the sense of
    `adjacency`; `epsilon_clients`: of each by its number, or with privacy=record what each
    tells of its records. The `train_loss_*` and `peak_memory_client` may then not be there.
    """

    rounds: int
    train_loss_first: NotRequired[float]
    train_loss_last: NotRequired[float]
    bytes_down: float
    bytes_up: float
    failures: int
    peak_memory_client: NotRequired[float]
    peak_memory_server: float
    seconds: float
    best_round: NotRequired[int]
    test_questions: NotRequired[int]
    test_left_out: NotRequired[int]
    test_labels: NotRequired[list[Label]]
    clients: NotRequired[list[Own]]
    personal_clients: NotRequired[list[Personal]]
    epsilon: NotRequired[float]
    delta: NotRequired[float]
    adjacency: NotRequired[str]
    epsilon_clients: NotRequired[dict[str, float]]


@typed
class Answer(TypedDict):
    """A test question, its wanted answer (`output`), and what base and adapter say.

    `messages`: of a conversation, all that is said before `output`; `rejected`: a worse answer;
    `desirable`: whether `output` is a good one.
    """

    instruction: str
    input: str
    output: str
    messages: NotRequired[list[Any]]
    rejected: NotRequired[str]
    desirable: NotRequired[str]
    base: str
    tuned: str


# A value for each test question. `nats`, `right` and `tokens` are sums over the tokens of its
# answer, without the questions that are too long; the others are its scores.
Questions = scored(
    TypedDict(
        "Questions",
        dict.fromkeys(("nats", "right", "tokens", *UNITS), list[float]),
        total=False,
    )
)


@typed
class TestScores(TypedDict):
    """`test_scores.json`: what the scores of base and last adapter are means of."""

    base: Questions
    tuned: Questions


def _some(title: str, **fields: type) -> type:
    """A section of a configuration, as far as others read it."""
    return typed(TypedDict(title, fields))


Steps = _some(
    "Steps",
    max_steps=int,
    per_device_train_batch_size=int,
    gradient_accumulation_steps=int,
)
Train = _some("Train", seq_length=int, training_arguments=Steps)
Model = _some("Model", name=str)
Target = _some("Target", _target_=str)
Comm = _some("Comm", dtype=str)


@typed
class Config(TypedDict):
    """What others read of `.hydra/config.yaml`; the whole of it is `settings/schema.py`."""

    mode: Literal["federated", "local", "centralized"]
    seed: int
    num_clients: int
    num_rounds: int
    model: Model
    dataset: dict
    partitioner: Target
    strategy: Target
    comm: Comm
    train: Train
    evaluate: dict


OVERRIDES = ".hydra/overrides.yaml"

FILES = {
    "history.json": History,
    "summary.json": Summary,
    "answers.json": list[Answer],
    "test_scores.json": TestScores,
    CONFIG: Config,
    OVERRIDES: list[str],
}


def read(run: Path, name: str, missing: Any = None) -> Any:
    """One of a run's `FILES`, or `missing`, if that is given, where there is none.

    Raises `UserError` with the file and the key that is not of its type. A configuration is
    that of `read_config`.
    """
    path = run / name
    if missing is not None and not path.exists():
        return missing
    if name == CONFIG:
        content = OmegaConf.to_container(read_config(run))
    else:
        content = read_yaml(path, list) if name == OVERRIDES else read_json(path)
    return fit(content, FILES[name], path)


def fit(value: Any, kind: Any, path: Path) -> Any:
    """`value`, which was read from `path`, as it is, if it is of this type.

    Raises `UserError` in one line. Other keys than those of the type may be there.
    """
    try:
        _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        parts = (f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"])
        at = "".join(parts).lstrip(".") or "it"
        raise UserError(f"{path} is broken: {at}: {first['msg']}.") from None
    return value


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def per(history: History) -> str:
    """What losses and accuracies of a run are means over."""
    return history.get("per", "answer token")


def read_history(folder: Path, done: int) -> History:
    """The history of a run whose first `done` rounds are done, without what came later.

    Raises `UserError` where it does not tell of them all.
    """
    try:
        history = read(folder, "history.json")
        history["rounds"] = rounds = history["rounds"][:done]
        if [entry["round"] for entry in rounds] != list(range(1, done + 1)):
            told = f"{done} rounds are done, and it tells of {len(rounds)}"
            raise UserError(f"{told}.")
        for entry in rounds:
            if entry.get("best") and not entry.keys() & set(BEST):
                raise UserError(f"round {entry['round']} is the best by no measure.")
    except UserError as error:
        raise UserError(
            f"{folder}/history.json does not fit the run: {error} Put a copy of it into "
            "its place, or begin the run anew."
        ) from error
    return history


# --- a run's folder ------------------------------------------------------------------------

PERSONAL = "personal"  # the folder of clients' own adapters, client_<partition>/

# What a run leaves in its folder, and no other run may find there.
LEFT = (
    *("history.json", "summary.json", "checkpoints", "peft_*", "residuals"),
    "privacy.json",
    PERSONAL,
)

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


def read_overrides(run: Path) -> dict[str, str]:
    """The overrides of a run by their keys. Raises `UserError`."""
    return by_key(read(run, OVERRIDES))


def by_key(overrides: Iterable[str]) -> dict[str, str]:
    """Hydra overrides by their keys, without a `+` or `~`; `resume` is not told."""
    pairs = (text.lstrip("+~").partition("=")[::2] for text in overrides)
    return {key: value for key, value in pairs if key != "resume"}


def varied(runs: list[dict[str, str]]) -> list[str]:
    """The keys whose values differ between runs, given the overrides of each."""
    keys = dict.fromkeys(key for run in runs for key in run)
    return [key for key in keys if len({run.get(key) for run in runs}) > 1]


def telling(clients: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The clients whose own figures rest on enough records (`FEW`) to be compared by them."""
    return [client for client in clients if client["num-examples"] >= FEW]


def trained_records(cfg: Mapping[str, Any], rounds: list[dict[str, Any]]) -> str:
    """How many records the clients of these rounds train from, in words; "" if not known.

    `cfg`: the run's, {} where that is not known.
    """
    clients = [client for entry in rounds for client in entry.get("clients", [])]
    held = {c["partition"]: c["records"] for c in clients if "records" in c}
    if not held:
        return ""
    if (cfg.get("baseline") or {}).get("records") == "all":
        return f"{int(max(held.values()))}, everybody's"  # each of them has the same
    return f"{int(sum(held.values()))} of {len(held)} clients that took part"
