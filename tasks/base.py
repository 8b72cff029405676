"""The slot: what a record's examples are, the loss on a batch of them, and how good answers are."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from records.batches import Batch, Collate, Collator
from records.templates import Example, Record
from utils import IGNORED, Settings, UserError

# Of an answer that was given, and of the wanted one: how well it fits, in [0, 1].
Metric = Callable[[str, str], float]


class Unsuited(UserError):
    """Records that are none of a task's. `told`: what others than their owner may know of it.

    `by_records`: whether that hangs on what is in them.
    """

    def __init__(
        self,
        text: str,
        told: str = "a record of its own does not fit the task",
        by_records: bool = True,
    ) -> None:
        super().__init__(text)
        self.told = told
        self.by_records = by_records


class Task:
    """What a run learns of its records: one class here, one file in `conf/task`.

    `model`: PEFT's task type (CAUSAL_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS, SEQ_2_SEQ_LM), by
    which the model's class is chosen. A record's `instruction`, `input` and `output` mean what
    the task's file in `conf/task` says.
    """

    # Of a record's texts those that may be lists (words, tags, answers), and then are JSON.
    lists: ClassVar[tuple[str, ...]] = ()
    # By which answers in words are judged, by name.
    judged_by: ClassVar[dict[str, Metric]] = {}
    # Whether exp(loss) means something.
    perplexity = False
    # What the loss is a mean over, and the accuracy a share of.
    per = "token"
    # Whether examples are compared with what a reference makes of them.
    refers = False
    # Whether a `fault` is of the data's columns, and so of all records or of none.
    by_columns = False
    # How many rows of a batch one example is, at most.
    rows = 1

    def __init__(self, cfg: Settings, model: str) -> None:
        self.model = model
        self.template = cfg.dataset.template
        self.seq_length = cfg.train.seq_length

    def check(self, cfg: Settings) -> None:
        """Raise `UserError` for settings that do not go with this task."""

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `UserError` where records cannot be put into this tokenizer's words."""

    def fault(self, record: Record) -> str | None:
        """Why a record is none of this task's, in words; None where it is one.

        One that has no answer is one all the same, and nothing is learnt from it.
        """
        return None

    def check_records(self, records: Iterable[Record], where: str) -> None:
        """Raise `Unsuited` where one of all `records`, those of `where`, has a `fault`."""
        if type(self).fault is Task.fault:  # for which any text is one
            return
        for number, record in enumerate(records, start=1):
            if fault := self.fault(record):
                told = f"{where}, record {number}: {fault}."
                raise Unsuited(told, by_records=not self.by_columns)

    def encode(
        self, record: Record, tokenizer: PreTrainedTokenizerBase, training: bool = False
    ) -> Example | None:
        """One record as tokens; None where nothing can be learnt from it.

        Always with `input_ids` and `labels`. `training`: as clients take their own records,
        to be trained on or held back; else as a test question is asked.
        """
        raise NotImplementedError

    def is_cut(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether `encode` had to leave out a part of the record, for its length."""
        raise NotImplementedError

    def length(self, example: Example) -> int:
        """Tokens of an example, of all that is read and written."""
        return len(example["input_ids"])

    def fit(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Record:
        """The record as it is asked: without what there is no room for."""
        return record

    def blank(self) -> Example:
        """An example that nothing is learnt from, to fill a batch with."""
        raise NotImplementedError

    def collator(self, tokenizer: PreTrainedTokenizerBase, side: str) -> Collate:
        """What makes a batch's tensors of examples, padded on the left or right `side`."""
        raise NotImplementedError

    def refer(
        self, net: Any, examples: Sequence[Example], pad: Collator, batch: int
    ) -> None:
        """Note in examples what `net`, now the reference, makes of them, `batch` at a time.

        Of a task that `refers`; before it trains on them, in this order, or scores them.
        """

    def loss(self, net: Any, batch: Batch, count: Any = None) -> torch.Tensor:
        """The loss of a batch, a scalar with gradient: a sum over `count`, or over its own.

        `count`: of the step's labels that are not ignored, as `transformers.Trainer` counts
        them, or of what its batches have as `shift_labels`.
        """
        kept = (batch["labels"] != IGNORED).sum()
        return self.nats(net, batch).sum() / (kept if count is None else count)

    def losses(self, net: Any, batch: Batch) -> torch.Tensor:
        """Of each of n examples what `loss` of it alone would be: (n,), with gradient.

        A batch's rows of example i are i, i + n and so on.
        """
        kept = (batch["labels"] != IGNORED).flatten(1).sum(1)
        return self.nats(net, batch) / kept

    def nats(self, net: Any, batch: Batch) -> torch.Tensor:
        """Of each example the loss of all its labels, summed: (examples,), with gradient."""
        raise NotImplementedError

    def score(self, net: Any, batch: Batch) -> torch.Tensor:
        """Per example: summed loss, how many were right, of how many; (batch, 3 or more).

        In float64, without gradient. A task may add columns for its own `metrics`.
        """
        raise NotImplementedError

    def metrics(self, scores: torch.Tensor) -> dict[str, float]:
        """`loss`, `accuracy` in [0, 1] and the task's own, of all examples of `score`.

        Names are those of `server.runs.UNITS` without `eval_`, and bounded in
        `server.exchange.FIGURES`.
        """
        loss, right, count = scores[:, :3].sum(0).tolist()
        return {"loss": loss / count, "accuracy": right / count}

    def answers(
        self,
        net: Any,
        tokenizer: PreTrainedTokenizerBase,
        records: list[Record],
        limit: int,
    ) -> list[str]:
        """What the model answers to each record, of at most `limit` tokens, as text."""
        raise NotImplementedError

    def told(
        self,
        net: Any,
        tokenizer: PreTrainedTokenizerBase,
        records: list[Record],
        limit: int,
    ) -> list[str]:
        """The answers as people are shown them, with how sure the model is, if it tells."""
        return self.answers(net, tokenizer, records, limit)

    def by_label(self, scores: torch.Tensor) -> list[dict[str, Any]]:
        """Of each label `server.runs.Label`'s figures, where a task tells labels apart."""
        return []

    def judge(self, given: list[str], wanted: list[str]) -> dict[str, list[float]]:
        """By each of `judged_by`, a value for every answer."""
        pairs = list(zip(given, wanted, strict=True))
        return {
            name: [one(*pair) for pair in pairs] for name, one in self.judged_by.items()
        }

    def overall(self, given: list[str], wanted: list[str]) -> dict[str, float]:
        """What can only be said of all answers together (macro-F1, say), by name."""
        return {}
