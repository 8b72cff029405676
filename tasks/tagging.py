"""A model names each word of a text: the entities of a sentence, say, by IOB2 tags.

Token classification: a word's tag is what the model makes of the first of its pieces.
"""

import json
import re
from itertools import accumulate
from typing import Any

import torch
from seqeval.metrics.sequence_labeling import get_entities
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from records.batches import Batch, Collate, at_once, batches
from records.templates import Example, Record
from tasks import pieces as tokens
from tasks.base import Task, Unsuited
from utils import IGNORED, Settings, UserError, spelt

TAG = re.compile(r"O|[BI]-.+")


class Tagging(Task):
    """Cross entropy of words' tags; judged by the entities that are found whole.

    A record: `instruction` is a list of words, `output` as many tags (names, or places in
    `dataset.labels`), each as JSON; `input` is not read. `pieces`: whether the first piece
    of a word is trained on alone, or all, those behind the first with the tag inside of an
    entity.
    """

    lists = ("instruction", "output")

    def __init__(self, cfg: Settings, model: str, pieces: str) -> None:
        super().__init__(cfg, model)
        self.labels = list(cfg.dataset.get("labels") or ())
        self.numbers = {label: number for number, label in enumerate(self.labels)}
        self.pieces = pieces

    def check(self, cfg: Settings) -> None:
        key = f"dataset.labels={spelt(cfg.dataset.labels)}"
        tokens.check_settings(cfg)
        if self.pieces not in ("first", "all"):
            raise UserError(f"task.pieces={spelt(self.pieces)}: take first or all.")
        if not self.labels:
            raise UserError(
                f"{key}: task=tagging needs all tags, in one order for all clients: "
                "dataset.labels=[O,B-PER,I-PER]"
            )
        if len(self.numbers) < len(self.labels):
            raise UserError(f"{key}: a tag stands there twice.")
        if "O" not in self.numbers:
            raise UserError(f"{key}: O is missing, outside of all entities.")
        if cfg.model.labels != cfg.dataset.labels:
            raise UserError(
                f"model.labels={spelt(cfg.model.labels)}: they are dataset.labels. Set those alone."
            )
        for label in self.labels:
            begins = label.replace("I-", "B-", 1) if label[:2] == "I-" else label
            if not TAG.fullmatch(label) or begins not in self.numbers:
                raise UserError(
                    f"{key}: {label} is no tag of IOB2, where O is outside of all entities, "
                    "B-X begins an X and I-X goes on with it."
                )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokens.check(tokenizer)

    def fault(self, record: Record) -> str | None:
        try:
            self._read(record)
        except ValueError as error:
            return str(error)
        return None

    def _read(self, record: Record) -> tuple[list[str], list[str]]:
        """Words and the names of their tags, none where nobody has tagged them.

        Raises `ValueError` with what is wrong.
        """
        asked, told = record["instruction"], record["output"]
        if (words := texts(asked)) is None:
            raise ValueError(f"a list of words is needed, and {asked[:80]} is none")
        if not told.strip():
            return words, []
        if (tags := self._tags(told)) is None:
            raise ValueError(f"a list of tags is needed, and {told[:80]} is none")
        if odd := [tag for tag in tags if tag not in self.numbers]:
            raise ValueError(
                f"its tag {odd[0]} is not in dataset.labels={spelt(self.labels)}"
            )
        if len(words) != len(tags):
            raise ValueError(f"it has {len(words)} words and {len(tags)} tags")
        return words, tags

    def _tags(self, text: str) -> list[str] | None:
        """Tags by name of JSON that has them by name or by number; None for anything else."""
        tags = values(text) or []
        if tags and all(
            type(tag) is int and 0 <= tag < len(self.labels) for tag in tags
        ):
            return [self.labels[tag] for tag in tags]
        return texts(text)

    def encode(
        self, record: Record, tokenizer: PreTrainedTokenizerBase, training: bool = False
    ) -> Example | None:
        """With `starts`, 1 at a word's first piece, and `lost`, how many words have none."""
        try:
            words, tags = self._read(record)
        except ValueError as error:
            raise Unsuited(f"{error}.") from error
        if not tags:
            return None
        ids, owners = tokens.owners(words, tokenizer, self.seq_length)
        starts = firsts(owners)
        if not (found := sum(starts)):
            return None
        labels = [IGNORED] * len(ids)
        for place, word in enumerate(owners):
            if word >= 0 and (starts[place] or self.pieces == "all"):
                labels[place] = self._number(tags[word], starts[place])
        made = {"input_ids": ids, "labels": labels, "starts": starts}
        return made | ({"lost": [lost]} if (lost := len(words) - found) else {})

    def _number(self, tag: str, start: int) -> int:
        """Of a piece with this tag; behind the first, what begins an entity goes on with it."""
        inside = tag.replace("B-", "I-", 1)
        return self.numbers[tag if start or inside not in self.numbers else inside]

    def is_cut(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> bool:
        return "lost" in example

    def blank(self) -> Example:
        return {"input_ids": [0], "labels": [IGNORED], "starts": [0]}

    def collator(self, tokenizer: PreTrainedTokenizerBase, side: str) -> Collate:
        return tokens.collator(tokenizer, labels=IGNORED, starts=0)

    def nats(self, net: Any, batch: Batch) -> torch.Tensor:
        """Of labelled pieces."""
        logits = self._logits(net, batch).transpose(1, 2)
        return cross_entropy(logits, batch["labels"], reduction="none").sum(1)

    def _logits(self, net: Any, batch: Batch) -> torch.Tensor:
        """Of each token: (batch, length, labels)."""
        return tokens.at_tokens(net(**tokens.inputs(batch)).logits, batch)

    @torch.no_grad()
    def score(self, net: Any, batch: Batch) -> torch.Tensor:
        """With three columns more: entities found, entities named, entities that are there."""
        labels = batch["labels"]
        logits = self._logits(net, batch)
        nats = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        best, kept = logits.argmax(-1), labels != IGNORED
        sums = [nats.double().sum(1), ((best == labels) & kept).sum(1), kept.sum(1)]
        entities = []
        for given, wanted, start in zip(best, labels, batch["starts"] > 0, strict=True):
            named, there = (
                {*get_entities([self.labels[i] for i in tags[start].tolist()])}
                for tags in (given, wanted)
            )
            entities.append([len(named & there), len(named), len(there)])
        counts = torch.tensor(entities, dtype=torch.float64, device=labels.device)
        return torch.cat([torch.stack(sums, dim=1).double(), counts], dim=1)

    def metrics(self, scores: torch.Tensor) -> dict[str, float]:
        """With `entity_f1`: micro F1 of entities, as seqeval has it, of the words that are read."""
        found, named, there = scores[:, 3:].sum(0).tolist()
        f1 = 2 * found / (named + there) if found else 0.0
        return super().metrics(scores) | {"entity_f1": f1}

    def answers(
        self,
        net: Any,
        tokenizer: PreTrainedTokenizerBase,
        records: list[Record],
        limit: int,
    ) -> list[str]:
        """The tags of each record's words, as JSON; O for a word that there is no room for."""
        each = [words_of(record) for record in records]
        tags = [["O"] * len(words) for words in each]
        placed = [tokens.owners(words, tokenizer, self.seq_length) for words in each]
        collate = tokens.collator(tokenizer)
        examples = [{"input_ids": ids} for ids, _ in placed]
        for chosen, batch in batches(
            examples, collate, at_once(net.device), net.device
        ):
            best = self._logits(net, batch).argmax(-1).tolist()
            for i, found in zip(chosen, best, strict=True):
                owners = placed[i][1]
                for place, start in enumerate(firsts(owners)):
                    if start:
                        tags[i][owners[place]] = self.labels[found[place]]
        return [json.dumps(one, ensure_ascii=False) for one in tags]

    def told(
        self,
        net: Any,
        tokenizer: PreTrainedTokenizerBase,
        records: list[Record],
        limit: int,
    ) -> list[str]:
        """Each word with its tag: Ada/B-PER lived/O."""
        tags = map(json.loads, self.answers(net, tokenizer, records, limit))
        pairs = [
            zip(words_of(r), t, strict=True) for r, t in zip(records, tags, strict=True)
        ]
        return [" ".join(map("/".join, one)) for one in pairs]


def words_of(record: Record) -> list[str]:
    """A record's words; of a text that is no list, as a question of `test.py`, by spaces."""
    asked = record["instruction"]
    return asked.split() if (words := texts(asked)) is None else words


def firsts(owners: list[int]) -> list[int]:
    """1 where a token is the first of its word's, 0 elsewhere."""
    before = accumulate([-1, *owners[:-1]], max)
    return [int(word > last) for word, last in zip(owners, before, strict=True)]


def values(text: str) -> list[Any] | None:
    """The list that a text of JSON is; None for anything else."""
    try:
        made = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return made if isinstance(made, list) else None


def texts(text: str) -> list[str] | None:
    """Likewise, of texts alone."""
    made = values(text)
    fits = made is not None and all(isinstance(one, str) for one in made)
    return made if fits else None
