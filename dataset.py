"""The data: load, deal out to clients, put into a prompt template, tokenise, mask, batch.

The templates live here alone. Training, evaluation and `test.py` all ask `prompt` for the
text before an answer, so that a model is asked in the words that it was trained with.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

import files
from loss import IGNORED
from utils import HUB_NAME, UserError, construct, local_path

if TYPE_CHECKING:  # half a second, which a node with data of its own need not spend
    from flwr_datasets.partitioner import Partitioner

# Of tokens in a batch. On a CPU each new length leaves a kernel in a cache that grows for
# hundreds of rounds; a GPU's tensor cores like it.
MULTIPLE = 8
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


def spaced(
    template: str, question: Record, answer: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The answer with the space that the template puts before it."""
    before = TEMPLATES[template]([question], tokenizer)
    if template == "chat":
        turn = [
            {"role": "user", "content": _question(question)},
            {"role": "assistant", "content": answer},
        ]
        whole = tokenizer.apply_chat_template(turn, tokenize=False)
        start = whole.find(answer, len(before))
        # Some templates trim a message, and then it is not found; nor is the space.
        space = whole[len(before) : start] if whole.startswith(before) else ""
        return space + answer if start > 0 and not space.strip() else answer
    return " " + answer if template == "vicuna" else answer


def _question(turn: Record) -> str:
    return "\n".join(filter(None, (turn["instruction"], turn["input"])))


TEMPLATES: dict[str, Callable[[list[Record], PreTrainedTokenizerBase], str]] = {
    "alpaca": _alpaca,
    "vicuna": _vicuna,
    "chat": _chat,
}


def prompt(
    template: str, turns: list[Record], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Token ids of a conversation up to where the model is to answer.

    Every turn but the last carries its `output`. Begins with the tokenizer's
    beginning-of-sequence token, where it has one.
    """
    spelt = [_spell(turn, tokenizer) for turn in turns]
    text = TEMPLATES[template](spelt, tokenizer)
    # A chat template writes its own beginning of sequence.
    return _tokenise(text, tokenizer, begin=template != "chat")


def encode(
    record: Record, template: str, tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> Example | None:
    """Tokenise one record; labels are the answer and the end-of-sequence token only.

    Longer than `seq_length` tokens, the answer loses its end (and with it the end of
    sequence). None where the prompt leaves no room for an answer, or there is no answer.
    """
    before = prompt(template, [question(record)], tokenizer)
    spelt = _spell(record, tokenizer)
    answer = spelt.pop("output")
    text = TEMPLATES[template]([spelt], tokenizer)
    answer = spaced(template, spelt, answer, tokenizer)
    whole = _tokenise(text + answer, tokenizer, begin=template != "chat")
    # The prompt must have the same tokens as when the model is asked; where the answer's
    # first letters would merge into them, the answer is tokenised by itself.
    if whole[: len(before)] == before:
        after = whole[len(before) :]
    else:
        after = _tokenise(answer, tokenizer, begin=False)
    if not record["output"].strip() or not after or len(before) >= seq_length:
        return None
    ids = (before + after + [tokenizer.eos_token_id])[:seq_length]
    return {
        "input_ids": ids,
        "labels": [IGNORED] * len(before) + ids[len(before) :],
    }


# A record may hold the text of a special token: `</s>` ends an HTML tag, and is no end of
# sequence there. This, which no character is (Unicode keeps it for such use), breaks it up
# until the template's own special tokens have been found.
MARK = "\ufdd0"


def _spell(record: Record, tokenizer: PreTrainedTokenizerBase) -> Record:
    """The record with a mark inside whatever spells a special token."""

    def spell(text: str) -> str:
        text = text.replace(MARK, 2 * MARK)
        for token in _special_tokens(tokenizer):
            text = text.replace(token, token[0] + MARK + token[1:])
        return text

    return {name: spell(text) for name, text in record.items()}


def _tokenise(text: str, tokenizer: PreTrainedTokenizerBase, begin: bool) -> list[int]:
    """Token ids of a template's text; only what the template wrote is a special token.

    `begin`: with whatever the tokenizer puts before a text.
    """
    special = "|".join(map(re.escape, _special_tokens(tokenizer)))
    pieces = re.split(f"({special})", text) if special else [text]
    if len(pieces) > 1 and MARK not in text:
        return tokenizer(text, add_special_tokens=begin)["input_ids"]
    ids: list[int] = []
    for place, piece in enumerate(pieces):
        if place % 2:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        elif piece or (begin and not place):
            plain = re.sub(f"{MARK}({MARK}?)", r"\1", piece)
            ids += tokenizer(
                plain,
                add_special_tokens=begin and not place,
                split_special_tokens=True,
            )["input_ids"]
    return ids


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    # The longest first, where one begins another.
    return sorted((token.content for token in added if token.special), key=len)[::-1]


class Collator:
    """Pad a batch to its longest example, on the side that `padding_side` names.

    Up to a multiple of `MULTIPLE` tokens.
    """

    def __init__(self, pad_token_id: int, padding_side: str) -> None:
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Input ids, attention mask and labels, each (batch, length) of int64."""
        longest = max(len(example["input_ids"]) for example in examples)
        longest += -longest % MULTIPLE
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


def load_partition(cfg: dict[str, Any], partition: int) -> Dataset:
    """One client's records, in the dataset's own columns.

    The data is loaded and divided once per process; only this partition is taken. Without
    a partitioner it is one node's own, all of it.
    """
    if cfg["partitioner"] is None:
        dataset = cfg["dataset"]
        return files.load(dataset["path"], "data-path", _columns(dataset, label=False))
    return _partitioner(cfg).load_partition(partition)


def test_wanted(cfg: dict[str, Any]) -> bool:
    """Whether a run asks the test questions at all."""
    settings = cfg["evaluate"]
    return any(settings[name] for name in ("exact_match", "every_round", "choices"))


def load_test(cfg: dict[str, Any]) -> tuple[list[Record], list[list[str]]]:
    """All test records, and each one's choices if `evaluate.choices` names their column.

    Those of `dataset.test_path`, or of the hub dataset's test split. Raises `UserError`
    where there are none, or a record's choices are not a list that holds its output.
    """
    dataset, column = cfg["dataset"], cfg["evaluate"]["choices"]
    if dataset["test_path"]:
        path = str(dataset["test_path"])
        columns = _columns(dataset, label=False) + ([column] if column else [])
        rows = files.load(path, "dataset.test_path", columns, lists=column)
    elif dataset["path"]:
        raise UserError(
            "evaluate.exact_match, every_round and choices need test questions: name them "
            "with dataset.test_path=/path/to/test.jsonl, or set evaluate.exact_match=false."
        )
    else:
        try:
            name = dataset["name"]
            rows = load_dataset(str(local_path(name) or name), split="test")
        except ValueError as error:
            raise UserError(
                f"dataset.name={dataset['name']} has no test split: name questions of "
                "yours with dataset.test_path, or set evaluate.exact_match=false."
            ) from error
    records = [to_record(row, dataset["columns"]) for row in rows]
    if not column:
        return records, []
    return records, [
        _choices(row, column, record) for row, record in zip(rows, records, strict=True)
    ]


def _choices(row: dict[str, Any], column: str, record: Record) -> list[str]:
    value = row.get(column)
    try:
        choices = json.loads(value) if isinstance(value, str) else value
        choices = [files.text(choice) for choice in choices]
    except (TypeError, ValueError):
        choices = []
    if record["output"] not in choices:
        raise UserError(
            f"evaluate.choices={column}: a list of answers is needed, with the right one "
            f"({record['output']!r}) among them, and {value!r} is none."
        )
    return choices


def question(record: Record) -> Record:
    """What is asked: the record without its output."""
    return {"instruction": record["instruction"], "input": record["input"]}


def to_record(row: dict[str, Any], columns: dict[str, str | None]) -> Record:
    """A dataset's row under the names instruction, input and output, as text."""
    return {
        name: files.text(row[column] if column else None)
        for name, column in columns.items()
    }


def _columns(dataset: dict[str, Any], label: bool) -> list[str]:
    """The columns that are read of a file."""
    names = [*dataset["columns"].values(), dataset["label"] if label else None]
    return list(dict.fromkeys(str(name) for name in names if name is not None))


def _partitioner(cfg: dict[str, Any]) -> "Partitioner":
    return _partitioner_once(
        json.dumps([cfg["dataset"], cfg["partitioner"], cfg["seed"]], sort_keys=True)
    )


@lru_cache(maxsize=1)
def _partitioner_once(key: str) -> "Partitioner":
    dataset, settings, seed = json.loads(key)
    # This one of ours, or any of Flower's; no other class may be built here.
    ours = settings["_target_"] == "clusters.ClusterPartitioner"
    partitioner = construct(
        settings, "clusters" if ours else "flwr_datasets.partitioner"
    )
    if dataset["path"]:
        rows = files.load(
            str(dataset["path"]), "dataset.path", _columns(dataset, label=True)
        )
        partitioner.dataset = rows.shuffle(seed=seed)
        return partitioner
    from flwr_datasets import FederatedDataset

    federated = FederatedDataset(
        dataset=str(local_path(dataset["name"]) or dataset["name"]),
        partitioners={"train": partitioner},
        seed=seed,
    )
    return federated.partitioners["train"]


# --- what a client trains on ---------------------------------------------------------------------


def training_rows(cfg: dict[str, Any], partition: int) -> Dataset:
    """What a client trains on: its partition, or in `mode=centralized` everybody's.

    Without what is held back for evaluation, each client's own part.
    """
    pooled = cfg["mode"] == "centralized"
    parts = []
    for part in range(cfg["num_clients"]) if pooled else [partition]:
        rows = load_partition(cfg, part)
        if cfg["strategy"]["fraction_evaluate"] > 0:
            rows, _ = hold_out(rows, cfg["evaluate"]["holdout"], cfg["seed"])
        parts.append(rows)
    return concatenate_datasets(parts) if pooled else parts[0]


def hold_out(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split a partition into records to train on and records to evaluate on."""
    order = np.random.default_rng(seed).permutation(len(rows))
    kept = max(1, math.floor(share * len(rows)))  # `check` leaves no client with one
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
    if len(rows) == 0:
        raise ValueError("this client has no records to train on")
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
    name = dataset["name"]
    if dataset["path"] or local_path(name) or HUB_NAME.fullmatch(str(name)):
        return
    raise UserError(
        f"dataset.name={name}: a dataset of the hub has a name like owner/name. For files "
        "of yours: dataset=local dataset.path=/path/to/files"
    )


def check(cfg: dict[str, Any]) -> None:
    """Raise `UserError` for data that is missing, broken or cannot be divided like this."""
    dataset, clients = cfg["dataset"], cfg["num_clients"]
    where = dataset["path"] or dataset["name"]
    settings = cfg["partitioner"]
    kind = settings["_target_"]
    if dataset["template"] not in TEMPLATES:
        raise UserError(
            f"dataset.template={dataset['template']} is unknown: take "
            f"{', '.join(TEMPLATES)}."
        )
    if settings.get("partition_by", "") is None:
        raise UserError(f"{kind} deals by a column: name it with dataset.label=...")
    try:
        partitioner = _partitioner(cfg)
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        raise UserError(
            f"The dataset {where} is neither a local folder nor reachable on the hub. "
            "Check the name and the network, or use files of yours: dataset=local "
            f"dataset.path=... ({type(error).__name__})"
        ) from error
    rows = partitioner.dataset
    for column in (*dataset["columns"].values(), settings.get("partition_by")):
        if column is not None and column not in rows.column_names:
            raise UserError(
                f"{where} has no column {column!r} (dataset.columns, dataset.label). "
                f"It has: {', '.join(rows.column_names)}."
            )
    answers = dataset["columns"]["output"]
    if not any(files.text(answer).strip() for answer in rows[answers]):
        raise UserError(f"{where}: no record has an answer in {answers!r}.")
    if len(rows) < clients:
        raise UserError(
            f"num_clients={clients} is more than the {len(rows)} records of {where}. "
            f"Set num_clients={len(rows)} or less."
        )
    try:
        smallest = len(partitioner.load_partition(0))
        partitions = partitioner.num_partitions
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{kind} cannot divide {where} among {clients} clients: {error}"
        ) from error
    if partitions != clients:
        raise UserError(
            f"{kind} makes {partitions} partitions of {where}: "
            f"set num_clients={partitions}."
        )
    if smallest < (needed := 2 if cfg["strategy"]["fraction_evaluate"] else 1):
        raise UserError(
            f"{kind} leaves a client {smallest} records of {where}, and {needed} are "
            "needed (one to hold back, with strategy.fraction_evaluate). Take fewer clients."
        )
    if test_wanted(cfg):
        load_test(cfg)
