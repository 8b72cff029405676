"""The data: load, deal out to clients, put into a prompt template, tokenise, mask, batch.

The templates live here alone. Training, evaluation and `test.py` all ask `prompt` for the
text before an answer, so that a model is asked in the words that it was trained with.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import GenerationConfig, PreTrainedTokenizerBase

import files
from loss import IGNORED
from utils import HUB_NAME, Refusal, UserError, construct, local_path

if TYPE_CHECKING:  # half a second, which a node with data of its own need not spend
    from flwr_datasets.partitioner import Partitioner

# Of tokens in a batch. On a CPU each new length leaves a kernel in a cache that grows for
# hundreds of rounds; a GPU's tensor cores like it.
MULTIPLE = 8
Record = dict[str, str]  # instruction, input (may be empty), output
# A record by which it is found out what a chat template does with one.
# Of more lines than one and with what HTML and JSON write otherwise, as templates may.
PROBE = {
    "instruction": 'What is 2 + 3?\nIs it < 6 & "odd"?',
    "input": "In words.\nIn two.",
    "output": 'It\'s five.\nIt is < 6 & "odd".',
}
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
    return _render(turns, tokenizer, asking=True)


def _render(
    turns: list[Record], tokenizer: PreTrainedTokenizerBase, asking: bool
) -> str:
    """What the tokenizer's chat template makes of turns; `asking`: up to the next answer.

    The template is a program of somebody else's: whatever it raises becomes `UserError`.
    """
    if tokenizer.chat_template is None:
        raise UserError("this model's tokenizer has no chat template.")
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": _question(turn)})
        if "output" in turn:
            messages.append({"role": "assistant", "content": turn["output"]})
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asking
        )
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"this model's chat template fails ({cause}).") from error


def spaced(
    template: str, question: Record, answer: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The answer with the space that the template puts before it, trimmed as it does."""
    before = TEMPLATES[template]([question], tokenizer)
    if template == "chat":
        whole = _render([question | {"output": answer}], tokenizer, asking=False)
        if answer not in whole[len(before) :]:  # some templates trim a message
            answer = answer.strip()
        start = whole.find(answer, len(before))
        space = whole[len(before) : start] if whole.startswith(before) else ""
        return space + answer if start > 0 and not space.strip() else answer
    return " " + answer if template == "vicuna" else answer


def end(template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """What the template ends an answer with: a text, mostly empty, and then a token.

    The tokenizer's end of sequence, or with `chat` the first token of its own (an added
    one: `<|im_end|>`, `<end_of_turn>`) that the chat template writes after an answer.
    """
    return _chat_end(tokenizer) if template == "chat" else ("", tokenizer.eos_token_id)


@lru_cache(maxsize=4)
def _chat_end(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    after = _render([PROBE], tokenizer, asking=False).rpartition(PROBE["output"])[2]
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    # Some tokenizers have tokens of line breaks among them.
    names = sorted(filter(str.strip, added), key=len, reverse=True)
    found = re.search("|".join(map(re.escape, names)), after) if names else None
    if not found:
        return "", tokenizer.eos_token_id
    return after[: found.start()], tokenizer.convert_tokens_to_ids(found[0])


def ends(
    template: str, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig
) -> list[int]:
    """The tokens at which an answer is over: the template's, the tokenizer's, the base's."""
    own = generation.eos_token_id
    ids = [end(template, tokenizer)[1], tokenizer.eos_token_id]
    ids += own if isinstance(own, list) else [own]
    return [i for i in dict.fromkeys(ids) if i is not None]


def check_template(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` for a template that fails, or loses what is asked or answered."""
    whole = TEMPLATES[template]([question(PROBE)], tokenizer)
    if template == "chat":
        asked, whole = whole, _render([PROBE], tokenizer, asking=False)
        said = list(PROBE.values())
        if not (_holds(asked, said[:2]) and _holds(whole, said)):
            raise UserError(
                "this model's chat template loses the question or the answer; it may want "
                "messages of another form than text."
            )
    encode(PROBE, template, tokenizer, sys.maxsize)


def _holds(text: str, parts: list[str]) -> bool:
    """Whether the parts stand in the text, one after the other."""
    return re.search(".*".join(map(re.escape, parts)), text, re.DOTALL) is not None


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
    """Tokenise one record; labels are the answer and the token that ends it only.

    Longer than `seq_length` tokens, the answer loses its end (and with it that token).
    None where the prompt leaves no room for an answer, or there is no answer.
    """
    closing, last = end(template, tokenizer)
    before, after = answered(record, template, tokenizer, closing)
    if not record["output"].strip() or not after or len(before) >= seq_length:
        return None
    ids = (before + after + [last])[:seq_length]
    return {
        "input_ids": ids,
        "labels": [IGNORED] * len(before) + ids[len(before) :],
    }


def is_cut(example: Example, template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `encode` had to leave out the answer's end."""
    return example["labels"][-1] != end(template, tokenizer)[1]


def answered(
    record: Record,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    closing: str = "",
) -> tuple[list[int], list[int]]:
    """Token ids of a record's prompt, and of its answer with the text `closing` behind it."""
    before = prompt(template, [question(record)], tokenizer)
    spelt = _spell(record, tokenizer)
    answer = spelt.pop("output")
    text = TEMPLATES[template]([spelt], tokenizer)
    answer = spaced(template, spelt, answer, tokenizer) + closing
    whole = _tokenise(text + answer, tokenizer, begin=template != "chat")
    # The prompt must have the same tokens as when the model is asked; where the answer's
    # first letters would merge into them, the answer is tokenised by itself.
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    return before, _tokenise(answer, tokenizer, begin=False)


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

    `begin`: with whatever the tokenizer puts before a text. What it puts behind one, an
    end of sequence for the most part, is `encode`'s to add.
    """
    special = "|".join(map(re.escape, _special_tokens(tokenizer)))
    pieces = re.split(f"({special})", text) if special else [text]
    ids = list(_beginning(tokenizer)) if begin else []
    if len(pieces) > 1 and MARK not in text:
        return ids + tokenizer(text, add_special_tokens=False)["input_ids"]
    for place, piece in enumerate(pieces):
        if place % 2:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        elif piece:
            plain = re.sub(f"{MARK}({MARK}?)", r"\1", piece)
            ids += tokenizer(
                plain, add_special_tokens=False, split_special_tokens=True
            )["input_ids"]
    return ids


@lru_cache(maxsize=4)
def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    places = range(len(whole) - len(plain) + 1)
    return next((whole[:i] for i in places if whole[i : i + len(plain)] == plain), [])


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
        return _load(cfg["dataset"], cfg["dataset"]["path"], "data-path")
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
        rows = _load(dataset, path, "dataset.test_path", lists=column)
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
        _check_columns(rows, [*dataset["columns"].values()], dataset["name"])
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


def question(record: Record) -> Record:
    """What is asked: the record without its output."""
    return {"instruction": record["instruction"], "input": record["input"]}


def to_record(row: dict[str, Any], columns: dict[str, str | None]) -> Record:
    """A dataset's row under the names instruction, input and output, as text."""
    return {
        name: files.text(row[column] if column else None)
        for name, column in columns.items()
    }


def scorable(
    cfg: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[tuple[Record, list[str], Example]], int]:
    """The test records that can be scored, with their choices and tokens, and how many fall out.

    Those that have no answer, whose prompt fills `train.seq_length`, or one of whose choices
    would be cut there. Raises `UserError` where none is left.
    """
    template, seq_length = cfg["dataset"]["template"], cfg["train"]["seq_length"]

    def fits(record: Record, choice: str) -> bool:
        made = encode(record | {"output": choice}, template, tokenizer, seq_length)
        return made is not None and not is_cut(made, template, tokenizer)

    records, choices = load_test(cfg)
    kept = []
    for place, record in enumerate(records):
        offered = choices[place] if choices else []
        example = encode(record, template, tokenizer, seq_length)
        if example and all(fits(record, c) for c in offered if c.strip()):
            kept.append((record, offered, example))
    if not kept:
        raise UserError(
            f"None of the {len(records)} test questions can be scored: they have no answer, "
            f"or are longer than train.seq_length={seq_length} tokens. Raise it, or name "
            "other questions with dataset.test_path=..."
        )
    return kept, len(records) - len(kept)


def _load(
    dataset: dict[str, Any],
    path: str,
    key: str,
    label: bool = False,
    lists: str | None = None,
) -> Dataset:
    """The records of local files, in the columns that are asked for."""
    columns = dataset["columns"]
    names = [*columns.values(), dataset["label"] if label else None, lists]
    wanted = list(dict.fromkeys(str(name) for name in names if name is not None))
    return files.load(path, key, wanted, columns["input"], lists)


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
        rows = _load(dataset, str(dataset["path"]), "dataset.path", label=True)
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
            rows, _ = split(cfg, rows)
        parts.append(rows)
    return concatenate_datasets(parts) if pooled else parts[0]


def split(cfg: dict[str, Any], rows: Dataset) -> tuple[Dataset, Dataset]:
    """A partition's records to train on, and those to evaluate on, as `cfg` divides them."""
    columns = cfg["dataset"]["columns"]
    asked = [columns[name] for name in ("instruction", "input") if columns[name]]
    return hold_out(rows, cfg["evaluate"]["holdout"], cfg["seed"], asked)


def hold_out(
    rows: Dataset, share: float, seed: int, columns: Sequence[str] = ()
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
    back = set(held)
    return rows.select([i for i in order if i not in back]), rows.select(held)


def _questions(rows: Dataset, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """What each record asks in `columns`, to be compared."""
    texts = ([files.plain(files.text(value)) for value in rows[c]] for c in columns)
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
    name = dataset["name"]
    if dataset["path"] or local_path(name) or HUB_NAME.fullmatch(str(name)):
        return
    raise UserError(
        f"dataset.name={name}: a dataset of the hub has a name like owner/name. For files "
        "of yours: dataset=local dataset.path=/path/to/files"
    )


def check(cfg: dict[str, Any]) -> list[str]:
    """Raise `UserError` for data that is missing, broken or cannot be divided like this.

    Returns what the user should know of it, in sentences. Looks at every client: two
    milliseconds each.
    """
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
    if dataset["path"] and dataset["test_path"] and test_wanted(cfg):
        _check_apart(str(dataset["path"]), str(dataset["test_path"]))
    try:
        partitioner = _partitioner(cfg)
        rows = partitioner.dataset
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        raise UserError(_unloadable(where, error)) from error
    _check_columns(
        rows, [*dataset["columns"].values(), settings.get("partition_by")], where
    )
    answers = dataset["columns"]["output"]
    whole = [bool(files.text(answer).strip()) for answer in rows[answers]]
    if not any(whole):
        raise UserError(f"{where}: no record has an answer in {answers!r}.")
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
            f"{kind} of {where}: client {str(unfit[:10])[1:-1]}{more} {fault}. Take fewer "
            "clients, or another partitioner."
        )
    notes = _check_questions(cfg, rows) if test_wanted(cfg) else []
    label = settings.get("partition_by")
    if bare := sum(not files.text(v).strip() for v in rows[label]) if label else 0:
        notes.append(
            f"{bare} of {len(rows)} records have nothing in {label!r}: they count as a label "
            "of their own."
        )
    return notes


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
                "numbers are needed. Conversations are not supported yet."
            )
        numbers = rows[name] if "float" in str(kind.dtype) else []
        if np.isinf(np.array(list(numbers), dtype=float)).any():
            raise UserError(f"{where}: {name!r} holds numbers that are infinite.")


def _unfit(cfg: dict[str, Any], rows: Dataset, answered: bool) -> str | None:
    """What keeps a client with these records from taking part, or None.

    `answered`: all records are known to have an answer.
    """
    held_back = cfg["strategy"]["fraction_evaluate"] > 0
    if len(rows) < (needed := 2 if held_back else 1):
        one = " (one to hold back, with strategy.fraction_evaluate)" * held_back
        return f"would have {len(rows)} records, and {needed} are needed{one}"
    if answered or cfg["mode"] == "centralized":
        return None
    column = cfg["dataset"]["columns"]["output"]
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


def _check_questions(cfg: dict[str, Any], rows: Dataset) -> list[str]:
    """That the test questions are not those of the training data, in case and spaces either."""
    columns = cfg["dataset"]["columns"]
    names = [columns[name] for name in ("instruction", "input") if columns[name]]
    known = set(_questions(rows, names))
    records, _ = load_test(cfg)
    asked = ("instruction", "input") if columns["input"] else ("instruction",)
    shared = sum(
        tuple(files.plain(record[name]) for name in asked) in known
        for record in records
    )
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
