"""A model says which label a text has, or a pair of texts: one of several, or any number.

Sequence classification, as transformers' AutoModelForSequenceClassification has it.
"""

import json
import shlex
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import PreTrainedTokenizerBase

from compute import heads
from compute.loss import base_of
from records.batches import Batch, Collate, at_once, batches
from records.templates import Example, Record
from tasks import pieces, words
from tasks.base import Task, Unsuited
from utils import IGNORED, Settings, UserError, spelt

SHOWN = 100  # labels that a message names


class Classification(Task):
    """Cross entropy of a record's one label.

    A record: `instruction` is a text, `input` the second one of a pair, if there is one, and
    `output` the label's name. They are read as the base's tokenizer takes a text or a pair,
    with its special tokens, and no prompt. `class_weights`: what an example of each label
    counts for in training, in the order of `dataset.labels`; None: the same.
    """

    judged_by: ClassVar = {"exact_match": words.exact_match}
    per = "record"
    least = 2  # labels that there must be

    def __init__(
        self, cfg: Settings, model: str, class_weights: list[float] | None = None
    ) -> None:
        super().__init__(cfg, model)
        self.labels = list(cfg.dataset.get("labels") or ())
        self.numbers = {label: number for number, label in enumerate(self.labels)}
        self.weights = torch.tensor(class_weights) if class_weights else None

    # --- records ------------------------------------------------------------------------

    def check(self, cfg: Settings) -> None:
        key = f"dataset.labels={spelt(cfg.dataset.labels)}"
        if self.labels and len(self.labels) < self.least:
            raise UserError(f"{key}: {self.least} labels or more are needed.")
        if len(self.numbers) < len(self.labels):
            raise UserError(f"{key}: a label stands there twice.")
        if cfg.model.labels != cfg.dataset.labels:
            raise UserError(
                f"model.labels={spelt(cfg.model.labels)}: they are dataset.labels. Set those alone."
            )
        if self.weights is not None and len(self.weights) != len(self.labels):
            raise UserError(
                f"task.class_weights={spelt(cfg.task.class_weights)}: {len(self.labels)} weights "
                "are needed, one for each of dataset.labels."
            )
        if cfg.evaluate.choices:
            raise UserError(
                f"evaluate.choices={cfg.evaluate.choices}: the choices are dataset.labels. "
                "Set evaluate.choices=null."
            )
        if cfg.audit.canaries:
            raise UserError(
                f"audit.canaries={cfg.audit.canaries}: a canary has no label. Set "
                "audit.canaries=0."
            )

    def check_records(self, records: Iterable[Record], where: str) -> None:
        found: set[str] = set()
        for number, record in enumerate(records, start=1):
            if (labels := self.read(record["output"])) is None:
                told = (
                    f"a list of labels is needed, and {record['output'][:80]} is none"
                )
                raise Unsuited(f"{where}, record {number}: {told}.")
            found.update(labels)
        if not self.labels:
            line = json.dumps(sorted(found) or ["no", "yes"], ensure_ascii=False)
            line = shlex.quote(f"dataset.labels={line.replace(', ', ',')}")
            whose = f"those of {where}" if found else "such as"
            raise Unsuited(
                f"dataset.labels is missing, one list for all clients: {whose}, {line}",
                told="dataset.labels is missing",
                by_records=False,
            )
        if odd := sorted(found - self.numbers.keys()):
            more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
            raise Unsuited(
                f"{where}: not in dataset.labels are {', '.join(odd[:SHOWN])}{more}.",
                told=f"{len(odd)} of its labels are not in dataset.labels",
            )

    def read(self, output: str) -> list[str] | None:
        """The names of a record's labels, none where it has none; None where that is no list."""
        return [label] if (label := output.strip()) else []

    def encode(
        self, record: Record, tokenizer: PreTrainedTokenizerBase, training: bool = False
    ) -> Example | None:
        """With `token_type_ids`, 1 in the second of two texts, and `cut` where it is."""
        if (labels := self.target(record["output"])) is None:
            return None
        made = self._tokens(record, tokenizer)
        return made and made | {"labels": labels}

    def target(self, output: str) -> list[int] | None:
        """A row of the batch's labels, or None. Raises `Unsuited` for a label of none of ours."""
        names = self.read(output)
        return [self._number(name) for name in names] if names else None

    def _number(self, label: str) -> int:
        if label not in self.numbers:
            raise Unsuited(
                f"{label} is not in dataset.labels.",
                told="a label of its records is not in dataset.labels",
            )
        return self.numbers[label]

    def _tokens(
        self, record: Record, tokenizer: PreTrainedTokenizerBase
    ) -> Example | None:
        texts = [text for text in (record["instruction"], record["input"]) if text]
        if not "".join(texts).strip():
            return None
        made = tokenizer(*texts, return_token_type_ids=True, verbose=False)
        if cut := len(made["input_ids"]) > self.seq_length:
            made = tokenizer(
                *texts,
                return_token_type_ids=True,
                truncation=True,
                max_length=self.seq_length,
            )
        example = {name: made[name] for name in ("input_ids", "token_type_ids")}
        return example | ({"cut": [1]} if cut else {})

    def is_cut(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> bool:
        return "cut" in example

    def blank(self) -> Example:
        return {"input_ids": [0], "token_type_ids": [0], "labels": [IGNORED]}

    def collator(self, tokenizer: PreTrainedTokenizerBase, side: str) -> Collate:
        return pieces.labelled(pieces.collator(tokenizer, token_type_ids=0))

    # --- what a model makes of them -------------------------------------------------------

    def _logits(self, net: Any, batch: Batch) -> torch.Tensor:
        """(rows, labels), in float32."""
        inputs = {name: batch[name] for name in batch if name != "labels"}
        if (getattr(base_of(net).config, "type_vocab_size", None) or 0) < 2:
            del inputs["token_type_ids"]  # of a base that tells no segments apart
        return heads.logits(net, inputs).float()

    def each(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: Any = None
    ) -> torch.Tensor:
        """The loss of each of `labels`, of their shape; 0 for those that are ignored."""
        weights = weights if weights is None else weights.to(logits)
        each = cross_entropy(logits, labels[:, 0], weights, reduction="none")
        return each[:, None]

    def nats(self, net: Any, batch: Batch) -> torch.Tensor:
        """Weights change a record's part, and not how many there are."""
        return self.each(self._logits(net, batch), batch["labels"], self.weights).sum(1)

    @torch.no_grad()
    def score(self, net: Any, batch: Batch) -> torch.Tensor:
        """Without weights; then the wanted label's number, and the given one's."""
        logits, labels = self._logits(net, batch), batch["labels"]
        given = self.given(logits)
        columns = [
            self.each(logits, labels).sum(1, keepdim=True),
            (given == labels).sum(1, keepdim=True),
            torch.full((len(labels), 1), labels.shape[1], device=labels.device),
            *(labels, given),
        ]
        return torch.cat([column.double() for column in columns], dim=1)

    def given(self, logits: torch.Tensor) -> torch.Tensor:
        """What the model says, as `target` has what is wanted: (rows, 1)."""
        return logits.argmax(-1, keepdim=True)

    def sides(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each example and label, whether it is wanted, and given: (examples, labels)."""
        numbers = torch.arange(len(self.labels))
        wanted, given = (scores[:, column].long()[:, None] for column in (3, 4))
        return wanted == numbers, given == numbers

    def metrics(self, scores: torch.Tensor) -> dict[str, float]:
        """With `macro_f1`, over labels that are wanted or given, and `mcc` (R_K, Gorodkin 2004)."""
        wanted, given = (side.double() for side in self.sides(scores))
        there = (wanted + given).sum(0) > 0
        both, square = (wanted * given).sum(), float(len(scores)) ** 2
        w, g = wanted.sum(0), given.sum(0)
        above = both * len(scores) - (w * g).sum()
        below = (square - (w * w).sum()) * (square - (g * g).sum())
        return super().metrics(scores) | {
            "macro_f1": self._f1(scores)[there].mean().item(),
            "mcc": (above / below.sqrt()).item() if below else 0.0,
        }

    def _f1(self, scores: torch.Tensor) -> torch.Tensor:
        """Of each label, 0 where it is neither wanted nor given."""
        wanted, given = self.sides(scores)
        sizes = (wanted.double() + given).sum(0)
        return 2 * (wanted & given).sum(0) / sizes.clamp(min=1)

    def by_label(self, scores: torch.Tensor) -> list[dict[str, Any]]:
        wanted, given = self.sides(scores)
        right, f1 = (wanted & given).sum(0), self._f1(scores)
        columns = {
            "label": self.labels,
            "precision": (right / given.sum(0).clamp(min=1)).tolist(),
            "recall": (right / wanted.sum(0).clamp(min=1)).tolist(),
            "f1": f1.tolist(),
            "support": wanted.sum(0).tolist(),
        }
        rows = zip(*columns.values(), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    # --- answers --------------------------------------------------------------------------

    def _chances(
        self, net: Any, tokenizer: PreTrainedTokenizerBase, records: list[Record]
    ) -> torch.Tensor:
        """Of each record and label, its probability; equal ones for a record without text."""
        found = torch.zeros(len(records), len(self.labels))
        examples = [self._tokens(record, tokenizer) for record in records]
        places = [place for place, example in enumerate(examples) if example]
        collate = pieces.collator(tokenizer, token_type_ids=0)
        some = [examples[place] for place in places]
        for chosen, batch in batches(some, collate, at_once(net.device), net.device):
            found[[places[i] for i in chosen]] = self._logits(net, batch).cpu()
        return self.probabilities(found)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1)

    def named(self, chances: list[float]) -> str:
        """The answer in words."""
        return self.labels[max(range(len(chances)), key=chances.__getitem__)]

    def answers(
        self,
        net: Any,
        tokenizer: PreTrainedTokenizerBase,
        records: list[Record],
        limit: int,
    ) -> list[str]:
        """Names of labels."""
        return [
            self.named(row) for row in self._chances(net, tokenizer, records).tolist()
        ]

    def told(
        self,
        net: Any,
        tokenizer: PreTrainedTokenizerBase,
        records: list[Record],
        limit: int,
    ) -> list[str]:
        """The answer, and the probabilities of the five likeliest labels."""
        made = []
        for row in self._chances(net, tokenizer, records).tolist():
            likeliest = sorted(zip(row, self.labels, strict=True), key=lambda p: -p[0])
            told = ", ".join(f"{label} {chance:.2f}" for chance, label in likeliest[:5])
            made.append(f"{self.named(row)}   ({told})")
        return made


class Multilabel(Classification):
    """Binary cross entropy of each label; a record has any number of them, as a JSON list.

    Given are those with a probability of 1/2 or more. Accuracy is the share of all decisions,
    one for each record and label, that are right; macro-F1 is over all labels.
    """

    lists = ("output",)
    per = "decision"
    least = 1

    def read(self, output: str) -> list[str] | None:
        if not output.strip():
            return []
        try:
            made = json.loads(output)
        except (ValueError, RecursionError):
            return None
        fits = isinstance(made, list) and all(isinstance(one, str) for one in made)
        return made if fits else None

    def target(self, output: str) -> list[int] | None:
        if not output.strip() or (names := self.read(output)) is None:
            return None
        wanted = {self._number(name) for name in names}
        return [int(number in wanted) for number in range(len(self.labels))]

    def blank(self) -> Example:
        return super().blank() | {"labels": [IGNORED] * len(self.labels)}

    def each(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: Any = None
    ) -> torch.Tensor:
        kept = (labels != IGNORED).to(logits)
        weights = kept if weights is None else kept * weights.to(logits)
        return binary_cross_entropy_with_logits(
            logits, labels.to(logits), weights, reduction="none"
        )

    def given(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits >= 0).long()

    def sides(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wanted, given = scores[:, 3:].chunk(2, dim=1)
        return wanted > 0, given > 0

    def metrics(self, scores: torch.Tensor) -> dict[str, float]:
        told = Task.metrics(self, scores)
        return told | {"macro_f1": self._f1(scores).mean().item()}

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()

    def named(self, chances: list[float]) -> str:
        pairs = zip(self.labels, chances, strict=True)
        names = [label for label, chance in pairs if chance >= 0.5]
        return json.dumps(names, ensure_ascii=False)

    def judge(self, given: list[str], wanted: list[str]) -> dict[str, list[float]]:
        """Whether they are the same labels, in whatever order."""
        pairs = zip(given, wanted, strict=True)
        same = [{*self.read(one)} == {*(self.read(other))} for one, other in pairs]
        return {"exact_match": [float(one) for one in same]}
