"""The data: load, deal out to clients, put into a prompt template, tokenise, mask, batch.

The templates live here alone. Training, evaluation and `test.py` all ask `prompt` for the
text before an answer, so that a model is asked in the words that it was trained with.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from flwr_datasets import FederatedDataset
from transformers import PreTrainedTokenizerBase

from utils import UserError, construct, local_path

IGNORED = -100  # the label that torch's cross entropy leaves out
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

Record = dict[str, str]  # instruction, input (may be empty), output
Example = dict[str, list[int]]  # input_ids and labels, equally long


# --- templates ------------------------------------------------------------------------------


def _alpaca(turns: list[Record], tokenizer: PreTrainedTokenizerBase) -> str:
    """Stanford Alpaca's prompt, with and without input; earlier turns come before it."""
    text = ""
    for turn in turns:
        text += "Below is an instruction that describes a task"
        if turn["input"]:
            text += ", paired with an input that provides further context"
        text += ". Write a response that appropriately completes the request.\n\n"
        text += f"### Instruction:\n{turn['instruction']}\n\n"
        if turn["input"]:
            text += f"### Input:\n{turn['input']}\n\n"
        text += "### Response:\n"
        if "output" in turn:
            text += f"{turn['output']}{tokenizer.eos_token}\n\n"
    return text


def _vicuna(turns: list[Record], tokenizer: PreTrainedTokenizerBase) -> str:
    """Vicuna v1.1's conversation."""
    text = (
        "A chat between a curious user and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    for turn in turns:
        text += f"USER: {_question(turn)} ASSISTANT:"
        if "output" in turn:
            text += f" {turn['output']}{tokenizer.eos_token}"
    return text


def _chat(turns: list[Record], tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template that came with the tokenizer."""
    if tokenizer.chat_template is None:
        raise UserError(
            "dataset.template=chat: this model's tokenizer has no chat template. "
            "Take dataset.template=alpaca or vicuna, or an instruction-tuned model."
        )
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": _question(turn)})
        if "output" in turn:
            messages.append({"role": "assistant", "content": turn["output"]})
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def _question(turn: Record) -> str:
    return "\n".join(filter(None, (turn["instruction"], turn["input"])))


TEMPLATES: dict[str, Callable[[list[Record], PreTrainedTokenizerBase], str]] = {
    "alpaca": _alpaca,
    "vicuna": _vicuna,
    "chat": _chat,
}
# What stands between the prompt and the answer, where the template wants a space there.
_BEFORE_ANSWER = {"vicuna": " "}


def prompt(
    template: str, turns: list[Record], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Token ids of a conversation up to where the model is to answer.

    Every turn but the last carries its `output`. Begins with the tokenizer's
    beginning-of-sequence token, where it has one.
    """
    text = TEMPLATES[template](turns, tokenizer)
    # A chat template writes its own beginning of sequence.
    return tokenizer(text, add_special_tokens=template != "chat")["input_ids"]


def encode(
    record: Record, template: str, tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> Example | None:
    """Tokenise one record; labels are the answer and the end-of-sequence token only.

    Longer than `seq_length` tokens, the answer loses its end (and with it the end of
    sequence). None where the prompt leaves no room for an answer, or there is no answer.
    """
    question = {"instruction": record["instruction"], "input": record["input"]}
    before = prompt(template, [question], tokenizer)
    text = TEMPLATES[template]([question], tokenizer)
    answer = _BEFORE_ANSWER.get(template, "") + record["output"]
    whole = tokenizer(text + answer, add_special_tokens=template != "chat")["input_ids"]
    # The prompt must have the same tokens as when the model is asked; where the answer's
    # first letters would merge into them, the answer is tokenised by itself.
    if whole[: len(before)] == before:
        after = whole[len(before) :]
    else:
        after = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not record["output"].strip() or len(before) >= seq_length:
        return None
    ids = (before + after + [tokenizer.eos_token_id])[:seq_length]
    return {
        "input_ids": ids,
        "labels": [IGNORED] * len(before) + ids[len(before) :],
    }


class Collator:
    """Pad a batch to its longest example, on the side that `padding_side` names."""

    def __init__(self, pad_token_id: int, padding_side: str) -> None:
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Input ids, attention mask and labels, each (batch, longest) of int64."""
        longest = max(len(example["input_ids"]) for example in examples)
        rows: dict[str, list[list[int]]] = {
            "input_ids": [],
            "attention_mask": [],
            "labels": [],
        }
        for example in examples:
            length = len(example["input_ids"])
            self._add(
                rows["input_ids"], example["input_ids"], self.pad_token_id, longest
            )
            self._add(rows["attention_mask"], [1] * length, 0, longest)
            self._add(rows["labels"], example["labels"], IGNORED, longest)
        return {name: torch.tensor(row) for name, row in rows.items()}

    def _add(self, rows: list[list[int]], row: list[int], value: int, to: int) -> None:
        padding = [value] * (to - len(row))
        rows.append(padding + row if self.padding_side == "left" else row + padding)


# --- loading and dealing out ------------------------------------------------------------------


def load_partition(cfg: Any, partition: int) -> Dataset:
    """One client's records, in the dataset's own columns.

    The dataset is loaded and divided once per process; only this partition is taken.
    """
    return _federated(cfg).load_partition(partition)


def num_partitions(cfg: Any) -> int:
    """How many clients the partitioner divides the data among."""
    partitioner = _federated(cfg).partitioners["train"]
    return partitioner.num_partitions


def load_test(cfg: Any) -> list[Record]:
    """All records of the dataset's test split.

    Raises `UserError` where the dataset has none.
    """
    dataset = cfg["dataset"]
    if dataset["path"] and not dataset["test_path"]:
        raise UserError(
            "evaluate.exact_match=true needs test questions: name them with "
            "dataset.test_path=/path/to/test.jsonl, or set evaluate.exact_match=false."
        )
    source = _source(dataset["name"], dataset["test_path"])
    try:
        rows = _load(source, "test" if dataset["name"] else "train")
    except ValueError as error:
        raise UserError(f"dataset.name={dataset['name']} has no test split.") from error
    _check_columns(rows, dataset["columns"], dataset["test_path"] or dataset["name"])
    return [to_record(row, dataset["columns"]) for row in rows]


def to_record(row: dict[str, Any], columns: dict[str, str | None]) -> Record:
    """A dataset's row under the names instruction, input and output, as text."""
    record = {}
    for name, column in columns.items():
        value = row[column] if column else None
        record[name] = "" if value is None else str(value)
    return record


def _federated(cfg: Any) -> FederatedDataset:
    parts = [
        cfg["dataset"]["name"],
        cfg["dataset"]["path"],
        cfg["partitioner"],
        cfg["seed"],
    ]
    return _federated_once(json.dumps(parts, sort_keys=True))


@lru_cache(maxsize=1)
def _federated_once(key: str) -> FederatedDataset:
    name, path, partitioner, seed = json.loads(key)
    source = _source(name, path)
    return FederatedDataset(
        dataset=source.pop("path"),
        partitioners={"train": construct(partitioner, "flwr_datasets.partitioner")},
        seed=seed,
        **source,
    )


def _source(name: str | None, path: str | None) -> dict[str, Any]:
    """Arguments for `datasets.load_dataset`: a hub dataset, or local files."""
    if not path:
        return {"path": str(local_path(name) or name)}
    files = _data_files(path)
    return {
        "path": FORMATS[files[0].suffix.lower()],
        "data_files": {"train": [str(file) for file in files]},
    }


def _data_files(path: str) -> list[Path]:
    """The data files that `path`, a file or a folder, stands for.

    Raises `UserError` unless there are some, of one known format.
    """
    found = local_path(path)
    if found is None:
        raise UserError(f"dataset.path={path}: there is no such file or folder.")
    files = [found]
    if found.is_dir():
        files = sorted(f for f in found.iterdir() if f.suffix.lower() in FORMATS)
    known = ", ".join(FORMATS)
    if not files or files[0].suffix.lower() not in FORMATS:
        raise UserError(f"dataset.path={path}: no data file here; known are {known}.")
    if len({FORMATS[file.suffix.lower()] for file in files}) > 1:
        raise UserError(
            f"dataset.path={path}: files of several formats; keep one kind."
        )
    return files


def _load(source: dict[str, Any], split: str) -> Dataset:
    return load_dataset(**source, split=split)


# --- what a client trains on ---------------------------------------------------------------------


def hold_out(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split a partition into records to train on and records to evaluate on."""
    order = np.random.default_rng(seed).permutation(len(rows))
    kept = max(1, math.floor(share * len(rows)))
    return rows.select(order[kept:]), rows.select(order[:kept])


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

    Raises `ValueError` where no row of a whole pass can be trained on.
    """
    drawn: list[Example] = []
    dropped = 0
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
        raise ValueError(
            f"none of the {len(rows)} records here can be trained on: they have no answer, "
            "or the prompt alone fills train.seq_length"
        )
    return drawn, dropped


def _shuffled(rows: Dataset, seed: int) -> Iterator[dict[str, Any]]:
    for turn in range(10**9):
        for index in np.random.default_rng([seed, turn]).permutation(len(rows)):
            yield rows[int(index)]


# --- checks before anything slow -------------------------------------------------------------------


def check(cfg: Any) -> None:
    """Raise `UserError` for data that is missing, broken or cannot be divided like this."""
    dataset, clients = cfg["dataset"], cfg["num_clients"]
    where = dataset["path"] or dataset["name"]
    if dataset["template"] not in TEMPLATES:
        raise UserError(
            f"dataset.template={dataset['template']} is unknown: take "
            f"{', '.join(TEMPLATES)}."
        )
    if dataset["path"]:
        for file in _data_files(dataset["path"]):
            if file.stat().st_size == 0:
                raise UserError(f"{file} is empty.")
    try:
        rows = _load(_source(dataset["name"], dataset["path"]), "train")
    except DatasetNotFoundError as error:
        raise UserError(_unreachable(where)) from error
    except ConnectionError as error:
        raise UserError(_unreachable(where)) from error
    except (DatasetGenerationError, ValueError) as error:
        raise UserError(_broken_file(dataset["path"]) or f"{where}: {error}") from error
    _check_columns(rows, dataset["columns"], where)
    partitioner = cfg["partitioner"]
    if "partition_by" in partitioner:
        column = partitioner["partition_by"]
        if column not in rows.column_names:
            raise UserError(
                f"{partitioner['_target_']} deals by the column dataset.label={column}, "
                f"which {where} has not. It has: {', '.join(rows.column_names)}."
            )
    if len(rows) < clients:
        raise UserError(
            f"num_clients={clients} is more than the {len(rows)} records of {where}. "
            f"Set num_clients to {len(rows)} or less."
        )
    try:
        smallest = len(load_partition(cfg, 0))
        partitions = num_partitions(cfg)
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{partitioner['_target_']} cannot divide {where} among {clients} clients: {error}"
        ) from error
    if partitions != clients:
        raise UserError(
            f"{partitioner['_target_']} makes {partitions} partitions of {where}: "
            f"set num_clients={partitions}."
        )
    if smallest == 0:
        raise UserError(
            f"{partitioner['_target_']} leaves a client without records. "
            "Take fewer clients or another partitioner."
        )
    if cfg["evaluate"]["exact_match"]:
        load_test(cfg)


def _check_columns(rows: Dataset, columns: dict[str, str | None], where: str) -> None:
    for name, column in columns.items():
        if column is None and name == "input":
            continue
        if column not in rows.column_names:
            raise UserError(
                f"{where} has no column {column!r} (dataset.columns.{name}). "
                f"It has: {', '.join(rows.column_names)}."
            )


def _unreachable(where: str) -> str:
    return (
        f"The dataset {where} is neither a local folder nor reachable on the hub. Check "
        "the name and the network, or use files of yours: dataset=local dataset.path=..."
    )


def _broken_file(path: str | None) -> str | None:
    """The first line that is not JSON, in words, or None where another cause is at work."""
    for file in _data_files(path) if path else []:
        if FORMATS[file.suffix.lower()] != "json":
            continue
        text = file.read_text(errors="replace")
        try:
            json.loads(text)
            continue
        except json.JSONDecodeError as error:
            whole = error
        if text.lstrip().startswith("["):
            return f"{file}, line {whole.lineno}: broken JSON ({whole.msg})."
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                json.loads(line or "null")
            except json.JSONDecodeError as error:
                return f"{file}, line {number}: broken JSON ({error.msg})."
    return None
