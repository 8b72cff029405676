"""The data: load, deal out to clients, draw, batch."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Value,
    concatenate_datasets,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

import tasks
from records import canaries, conversations, files
from records.conversations import JUDGED, TURNS
from utils import HUB_NAME, Refusal, Settings, UserError, construct, local_path

if TYPE_CHECKING:  # half a second, which a node with data of its own need not spend
    from flwr_datasets.partitioner import Partitioner
from records.templates import TEMPLATES, Example, Record

# Of `dataset.columns`, those that `records.conversations` makes a record of.
ELSEWHERE = {"messages", *JUDGED}

# --- loading and dealing out ------------------------------------------------------------------


def load_partition(cfg: Settings, partition: int) -> Dataset:
    """One client's records, in the dataset's own columns.

    The data is loaded and divided once per process; only this partition is taken. Without
    a partitioner it is one node's own, all of it.
    """
    if cfg.partitioner is None:
        return _load(cfg.dataset, cfg.dataset.path, "data-path", lists=_lists(cfg))
    return _partitioner(cfg).load_partition(partition)


def test_wanted(cfg: Settings) -> bool:
    """Whether a run asks the test questions at all."""
    settings = cfg.evaluate
    return any(settings[name] for name in ("exact_match", "every_round", "choices"))


def load_test(cfg: Settings) -> tuple[list[Record], list[list[str]]]:
    """All test records, and each one's choices if `evaluate.choices` names their column.

    Those of `dataset.test_path`, or of the hub dataset's test split. Raises `UserError`
    where there are none, or a record's choices are not a list that holds its output.
    """
    dataset, column = cfg.dataset, cfg.evaluate.choices
    if dataset.test_path:
        path = str(dataset.test_path)
        lists = [*_lists(cfg), *([column] if column else [])]
        rows = _load(dataset, path, "dataset.test_path", lists=lists)
    elif dataset.path:
        raise UserError(
            "evaluate.exact_match, every_round and choices need test questions: name them "
            "with dataset.test_path=/path/to/test.jsonl, or set evaluate.exact_match=false."
        )
    else:
        test = dataset.split.replace("train", "test")  # train_sft's is test_sft
        try:
            name = str(local_path(dataset.name) or dataset.name)
            rows = load_dataset(name, dataset.get("subset"), split=test)
        except ValueError as error:
            raise UserError(
                f"dataset.name={dataset.name} has no {test} split: name questions of "
                "yours with dataset.test_path, or set evaluate.exact_match=false."
            ) from error
        rows = as_records(rows, dataset, _lists(cfg))
        _check_columns(rows, _texts(dataset.columns), dataset.name)
    records = [to_record(row, dataset.columns) for row in rows]
    where = dataset.test_path or f"{dataset.name}, {test}"
    tasks.build(cfg).check_records(records, where)
    bad = sum(record.get("desirable") == "false" for record in records)
    if cfg.evaluate.exact_match and bad:
        raise UserError(
            f"evaluate.exact_match=true with {where}: {bad} of its answers are told to be bad "
            "ones, and to give them would count as right. Set evaluate.exact_match=false."
        )
    if not column:
        return records, []
    return records, [
        _choices(row, column, record) for row, record in zip(rows, records, strict=True)
    ]


def _choices(row: dict[str, Any], column: str, record: Record) -> list[str]:
    value = row.get(column)
    try:
        choices = json.loads(value) if isinstance(value, str) else value
        # The letters of a text or the keys of an object are no choices.
        choices = list(map(files.text, choices if isinstance(choices, list) else ()))
    except (ValueError, RecursionError):
        choices = []
    if record["output"] not in choices:
        raise UserError(
            f"evaluate.choices={column}: a list of answers is needed, with the right one "
            f"({record['output']!r}) among them, and {repr(value)[:200]} is none."
        )
    return choices


def to_record(row: dict[str, Any], columns: dict[str, str | None]) -> Record:
    """A dataset's row under the names instruction, input and output, as text.

    And `messages` where it is a conversation of more turns than one, and what somebody has
    judged (`conversations.JUDGED`).
    """
    record: Record = {
        name: files.text(row[column] if column else None)
        for name, column in columns.items()
        if name not in ELSEWHERE
    }
    record |= {name: row[own] for name, own in JUDGED.items() if own in row}
    if turns := row.get(TURNS):
        record["messages"] = json.loads(turns)
    return record


def as_records(
    rows: Dataset, dataset: dict[str, Any], lists: Sequence[str] = ()
) -> Dataset:
    """The rows of a dataset of the hub; of conversations, as `conversations.row` has them.

    What the columns `lists` hold that is no text becomes JSON, numbers of labels their names.

    Raises `UserError` with what is wrong in the first that is none.
    """
    columns, label = dataset.columns, dataset.get("label")
    sources = conversations.find(columns, rows.column_names)
    if missing := [name for name in sources if name not in rows.column_names]:
        raise UserError(f"{dataset.name}: {files.lacks(missing, rows.column_names)}")
    if not sources:
        kind = rows.features.get(columns.output)
        if isinstance(kind, ClassLabel):  # the name, in the place of its number
            rows = rows.map(
                _as_name,
                features=Features(rows.features | {columns.output: Value("string")}),
                fn_kwargs={"column": columns.output, "names": kind.names},
            )
        kinds = {n: kind for n, kind in rows.features.items() if n in lists}
        # Names of labels, where it holds a list of them.
        known = {
            name: getattr(getattr(kind, "feature", None), "names", None)
            for name, kind in kinds.items()
            if not isinstance(kind, (Value, ClassLabel))
        }
        if not known:
            return rows
        return rows.map(_as_json, remove_columns=[*known], fn_kwargs={"known": known})
    others = {*sources, *_texts(columns)} - {label}
    others = [name for name in rows.column_names if name in others]
    return rows.map(
        _as_record,
        remove_columns=others,
        fn_kwargs={
            "sources": sources,
            "columns": dict(columns),
            "name": dataset.name,
            "code": files.CODE,  # by which the outcome is found on disk
        },
    )


def _as_name(row: dict[str, Any], column: str, names: list[str]) -> dict[str, str]:
    number = row[column]
    return {column: "" if number is None or number < 0 else names[number]}


def _as_json(row: dict[str, Any], known: dict[str, list[str] | None]) -> dict[str, str]:
    values = {
        column: [names[number] for number in row[column]] if names else row[column]
        for column, names in known.items()
    }
    return {n: json.dumps(one, ensure_ascii=False) for n, one in values.items()}


def _as_record(
    row: dict[str, Any], sources: Any, columns: Any, name: str, code: str
) -> dict[str, str]:
    try:
        return conversations.row(row, sources, columns)
    except conversations.Unfit as error:
        raise UserError(f"{name}: {error}") from error


def _texts(columns: dict[str, str | None]) -> list[str]:
    """The columns of question and answer."""
    texts = (column for name, column in columns.items() if name not in ELSEWHERE)
    return [column for column in texts if column]


def _lists(cfg: Settings) -> list[str]:
    """The columns that may hold lists, for the task."""
    columns = cfg.dataset.columns
    names = tasks.build(cfg).lists
    return [columns[name] for name in names if columns[name]]


def check_records(cfg: Settings) -> None:
    """Raise `Unsuited` for records to train on that are none of the task's."""
    dataset = cfg.dataset

    def records() -> Iterator[Record]:
        if cfg.partitioner is not None and not dataset.path:
            rows = _partitioner(cfg).dataset
        else:  # in the order of the files
            label = cfg.partitioner is not None
            rows = _load(dataset, str(dataset.path), "dataset.path", label, _lists(cfg))
        yield from (to_record(row, dataset.columns) for row in rows)

    tasks.build(cfg).check_records(records(), dataset.path or dataset.name)


def _asked(columns: dict[str, str | None]) -> list[str | None]:
    """The columns that are the question: of conversations, all that is said before."""
    return [columns["instruction"], columns["input"], TURNS]


def scorable(
    cfg: Settings, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[tuple[Record, list[str], Example]], int]:
    """The test records that can be scored, with their choices and tokens, and how many fall out.

    Those that have no answer, whose prompt fills `train.seq_length`, or one of whose choices
    would be cut there. Raises `UserError` where none is left.
    """
    task = tasks.build(cfg)

    def fits(record: Record, choice: str) -> bool:
        made = task.encode(record | {"output": choice}, tokenizer)
        return made is not None and not task.is_cut(made, tokenizer)

    records, choices = load_test(cfg)
    kept = []
    for place, record in enumerate(records):
        offered = choices[place] if choices else []
        # Asked as it would be trained on: of a long conversation the last turns.
        record = task.fit(record, tokenizer)
        example = task.encode(record, tokenizer)
        if example and all(fits(record, c) for c in offered if c.strip()):
            kept.append((record, offered, example))
    if not kept:
        raise UserError(
            f"None of the {len(records)} test questions can be scored: they have no answer, "
            f"or are longer than train.seq_length={cfg.train.seq_length} tokens. Raise it, or name "
            "other questions with dataset.test_path=..."
        )
    return kept, len(records) - len(kept)


def _load(
    dataset: dict[str, Any],
    path: str,
    key: str,
    label: bool = False,
    lists: Sequence[str] = (),
) -> Dataset:
    """The records of local files, in the columns that are asked for."""
    columns = dataset.columns
    names = [*_texts(columns), dataset.label if label else None, *lists]
    wanted = list(dict.fromkeys(str(name) for name in names if name is not None))
    return files.load(path, key, wanted, columns["input"], lists, dict(columns))


def _partitioner(cfg: Settings) -> "Partitioner":
    return _partitioner_once(
        json.dumps(
            [cfg.dataset, cfg.partitioner, cfg.seed, _lists(cfg)], sort_keys=True
        )
    )


def forget() -> None:
    """Let go of the data that is kept as divided."""
    _partitioner_once.cache_clear()


@lru_cache(maxsize=1)
def _partitioner_once(key: str) -> "Partitioner":
    dataset, settings, seed, lists = json.loads(key, object_hook=Settings)
    # This one of ours, or any of Flower's; no other class may be built here.
    ours = settings["_target_"] == "records.clusters.ClusterPartitioner"
    partitioner = construct(
        settings, "records.clusters" if ours else "flwr_datasets.partitioner"
    )
    if dataset.path:
        rows = _load(dataset, str(dataset.path), "dataset.path", True, lists)
        partitioner.dataset = rows.shuffle(seed=seed)
        return partitioner
    from flwr_datasets import FederatedDataset

    train = dataset.split

    def prepared(parts: DatasetDict) -> DatasetDict:
        if train in parts:
            parts[train] = as_records(parts[train], dataset, lists)
        return parts

    federated = FederatedDataset(
        dataset=str(local_path(dataset.name) or dataset.name),
        subset=dataset.get("subset"),
        partitioners={train: partitioner},
        preprocessor=prepared,
        seed=seed,
    )
    return federated.partitioners[train]


# --- what a client trains on ---------------------------------------------------------------------


def is_pooled(cfg: Settings) -> bool:
    """Whether this is the baseline that has everybody's records in one place."""
    return bool(cfg.baseline) and cfg.baseline.records == "all"


def training_rows(cfg: Settings, partition: int) -> Dataset:
    """What a client trains on: its partition, or with `baseline.records=all` everybody's.

    Without what is held back for evaluation, each client's own part; with the canaries that
    `audit.canaries` plants there.
    """
    pooled = is_pooled(cfg)
    made = canaries.draw(cfg.audit.canaries, cfg.num_clients, cfg.seed)
    parts = []
    for part in range(cfg.num_clients) if pooled else [partition]:
        rows = load_partition(cfg, part)
        if cfg.strategy.fraction_evaluate > 0:
            rows, _ = split(cfg, rows)
        parts.append(canaries.plant(rows, made, part, cfg.dataset.columns))
    return concatenate_datasets(parts) if pooled else parts[0]


def split(cfg: Settings, rows: Dataset) -> tuple[Dataset, Dataset]:
    """A partition's records to train on, and those to evaluate on, as `cfg` divides them."""
    asked = _asked(cfg.dataset.columns)
    return hold_out(rows, cfg.evaluate.holdout, cfg.seed, asked)


def hold_out(
    rows: Dataset, share: float, seed: int, columns: Sequence[str | None] = ()
) -> tuple[Dataset, Dataset]:
    """Split a partition into records to train on and records to evaluate on.

    Records that are alike in all of `columns`, but for case and spaces, stay together,
    unless all of them are.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    kept = max(1, math.floor(share * len(rows)))  # `check` leaves no client with one
    alike: dict[Any, list[int]] = {}
    texts = _questions(rows, columns)
    for place in order:
        alike.setdefault(texts[place] if texts else place, []).append(place)
    held: list[int] = []
    for places in alike.values():
        if len(held) + len(places) <= kept:
            held += places
    if not held:  # each question stands there too often, or there is but one
        held = min(alike.values(), key=len) if len(alike) > 1 else list(order[:kept])
    # As arrays: `datasets` pickles what it selects, 0.2 s for a list of a thousand places.
    return rows.select(order[~np.isin(order, held)]), rows.select(np.array(held))


def _questions(rows: Dataset, columns: Sequence[str | None]) -> list[tuple[str, ...]]:
    """What each record asks in `columns`, to be compared; nothing in one that is not there."""
    texts = (
        [files.plain(files.text(value)) for value in rows[column][:]]
        if column in rows.column_names
        else [""] * len(rows)
        for column in columns
    )
    return list(zip(*texts, strict=True))


def draw(
    rows: Dataset,
    encode_row: Callable[[dict[str, Any]], Example | None],
    seed: int,
    examples: int | None = None,
    passes: float = 1.0,
) -> tuple[list[Example], int]:
    """Examples to train on in an order that `seed` alone decides, and how many rows fell out.

    Either `examples` many, going over the rows as often as that takes, or, with None,
    `passes` times over the rows. Only rows that are drawn are tokenised.

    Raises `Refusal` where no row of a whole pass can be trained on.
    """
    drawn: list[Example] = []
    dropped = 0
    if len(rows) == 0:
        raise Refusal("this client has no records to train on")
    limit = math.inf if examples is not None else math.ceil(passes * len(rows))
    for seen, row in enumerate(_shuffled(rows, seed)):
        if seen >= limit or len(drawn) == examples:
            break
        if seen == len(rows) and not drawn:
            break
        example = encode_row(row)
        if example is None:
            dropped += 1
        else:
            drawn.append(example)
    if not drawn:
        raise Refusal(
            "none of this client's records can be trained on: they have no answer, or "
            "the prompt alone fills train.seq_length"
        )
    return drawn, dropped


def group_by_length(examples: list[Example], batch: int, seed: int) -> list[Example]:
    """Reorder examples so that each batch holds similar lengths, the batches at random.

    Padding to a batch's longest example then costs little. `seed` decides the order.
    """
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    # A last batch that is not full must stay last, or it would shift all behind it.
    full = len(ordered) - len(ordered) % batch
    batches = [ordered[start : start + batch] for start in range(0, full, batch)]
    order = np.random.default_rng(seed).permutation(len(batches))
    return [example for i in order for example in batches[i]] + ordered[full:]


def _shuffled(rows: Dataset, seed: int) -> Iterator[dict[str, Any]]:
    for turn in range(10**9):
        for index in np.random.default_rng([seed, turn]).permutation(len(rows)):
            yield rows[int(index)]


# --- checks before anything slow -------------------------------------------------------------------


def check_name(dataset: dict[str, Any]) -> None:
    """Raise `UserError` for a name of one word, which is no dataset of the hub.

    `datasets` has readers of files by such names (text, csv, json, ...). Without being told
    which files they take all of the working directory, and `pandas` unpickles them.
    """
    name = dataset.name
    if dataset.path or local_path(name) or HUB_NAME.fullmatch(str(name)):
        return
    raise UserError(
        f"dataset.name={name}: a dataset of the hub has a name like owner/name. For files "
        "of yours: dataset=local dataset.path=/path/to/files"
    )


def check(cfg: Settings) -> list[str]:
    """Raise `UserError` for data that is missing, broken or cannot be divided like this.

    Returns what the user should know of it, in sentences. Looks at every client: two
    milliseconds each.
    """
    dataset, clients = cfg.dataset, cfg.num_clients
    where = dataset.path or dataset.name
    settings = cfg.partitioner
    kind = settings["_target_"]
    if dataset.template not in TEMPLATES:
        raise UserError(
            f"dataset.template={dataset.template} is unknown: take "
            f"{', '.join(TEMPLATES)}."
        )
    if settings.get("partition_by", "") is None:
        raise UserError(f"{kind} deals by a column: name it with dataset.label=...")
    if dataset.path and dataset.test_path and test_wanted(cfg):
        _check_apart(str(dataset.path), str(dataset.test_path))
    try:
        partitioner = _partitioner(cfg)
        rows = partitioner.dataset
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        raise UserError(_unloadable(where, error)) from error
    _check_columns(
        rows, [*_texts(dataset.columns), settings.get("partition_by")], where
    )
    check_records(cfg)
    answers = dataset.columns.output
    whole = [bool(files.text(answer).strip()) for answer in rows[answers][:]]
    if not any(whole):
        talk = TURNS in rows.column_names
        what = (
            "conversation has an answer"
            if talk
            else f"record has an answer in {answers!r}"
        )
        raise UserError(f"{where}: no {what}.")
    if len(rows) < clients:
        raise UserError(
            f"num_clients={clients} is more than the {len(rows)} records of {where}. "
            f"Set num_clients={len(rows)} or less."
        )
    try:
        partitioner.load_partition(0)  # by which it is divided
        partitions = partitioner.num_partitions
        if partitions != clients:
            raise UserError(
                f"{kind} makes {partitions} partitions of {where}: "
                f"set num_clients={partitions}."
            )
        faults = [
            _unfit(cfg, partitioner.load_partition(i), all(whole))
            for i in range(clients)
        ]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{kind} cannot divide {where} among {clients} clients: {error}"
        ) from error
    except OSError as error:
        raise UserError(_unloadable(where, error)) from error
    if fault := next(filter(None, faults), None):
        unfit = [i for i in range(clients) if faults[i] == fault]
        more = f" and {len(unfit) - 10} more" if len(unfit) > 10 else ""
        raise UserError(
            f"{kind} of {where}: client {str(unfit[:10])[1:-1]}{more} {fault}. Take "
            + (
                "fewer clients, or another partitioner."
                if clients > 1
                else "more records."
            )
        )
    notes = _check_questions(cfg, rows) if test_wanted(cfg) else []
    label = settings.get("partition_by")
    if bare := sum(not files.text(v).strip() for v in rows[label][:]) if label else 0:
        notes.append(
            f"{bare} of {len(rows)} records have nothing in {label!r}: they count as a label "
            "of their own."
        )
    return notes


def rows_each(cfg: Settings) -> int:
    """How many rows of a batch a record is, at most."""
    return tasks.build(cfg).rows


def _unloadable(where: str, error: Exception) -> str:
    """Why a dataset of the hub, or a folder in its place, cannot be loaded."""
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
    if files.is_local(cause):
        return f"{where}: {files.cache_fault(cause)}"
    told = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0][:200]}"
    if local_path(where):
        return f"The dataset {where} cannot be read ({told})."
    return (
        f"The dataset {where} is neither a local folder nor reachable on the hub. Check "
        "the name and the network, or use files of yours: dataset=local dataset.path=... "
        f"({told})"
    )


def _check_columns(rows: Dataset, columns: list[str | None], where: str) -> None:
    """That a dataset has these columns, and text or numbers in them."""
    names = list(dict.fromkeys(filter(None, columns)))
    if missing := [name for name in names if name not in rows.column_names]:
        raise UserError(f"{where}: {files.lacks(missing, rows.column_names)}")
    for name in names:
        if not isinstance(kind := rows.features[name], (Value, ClassLabel)):
            raise UserError(
                f"{where}: {name!r} holds values of type {type(kind).__name__}; text or "
                "numbers are needed. For conversations: dataset.columns.messages="
                f"{name}"
            )
        numbers = rows[name][:] if "float" in str(kind.dtype) else []
        if np.isinf(np.array(numbers, dtype=float)).any():
            raise UserError(f"{where}: {name!r} holds numbers that are infinite.")


def _unfit(cfg: Settings, rows: Dataset, answered: bool) -> str | None:
    """What keeps a client with these records from taking part, or None.

    `answered`: all records are known to have an answer.
    """
    held_back = cfg.strategy.fraction_evaluate > 0
    if len(rows) < (needed := 2 if held_back else 1):
        one = " (one to hold back, with strategy.fraction_evaluate)" * held_back
        return f"would have {len(rows)} records, and {needed} are needed{one}"
    if answered or is_pooled(cfg):
        return None
    column = cfg.dataset.columns.output
    for part in split(cfg, rows) if held_back else [rows]:
        if not any(files.text(answer).strip() for answer in part[column]):
            return "would train, or be evaluated, on records that have no answer"
    return None


def _check_apart(path: str, test_path: str) -> None:
    """That no file is both trained on and tested with, under whatever name."""
    train = files.find(path, "dataset.path")
    test = files.find(test_path, "dataset.test_path")
    if both := [str(t) for t in test if any(t.samefile(other) for other in train)]:
        raise UserError(
            f"dataset.test_path={test_path}: dataset.path={path} trains on {both[0]} as "
            "well. Name a file, or a folder, that does not hold the test questions."
        )


def _check_questions(cfg: Settings, rows: Dataset) -> list[str]:
    """That the test questions are not those of the training data, in case and spaces either."""
    columns = cfg.dataset.columns
    known = set(_questions(rows, _asked(columns)))
    records, _ = load_test(cfg)
    shared = 0
    for record in records:
        turns = record.get("messages", [])
        told = json.dumps(turns, ensure_ascii=False) if turns else ""
        asked = (record["instruction"], record["input"] * bool(columns["input"]), told)
        shared += tuple(map(files.plain, asked)) in known
    if shared == len(records):
        raise UserError(
            f"All {shared} test questions also stand in the training data, so they measure "
            "what was learnt by heart. Name others: dataset.test_path=..."
        )
    if not shared:
        return []
    return [
        f"{shared} of {len(records)} test questions also stand in the training data."
    ]
