"""The slot: what a record's examples are, the loss on a batch of them, and how good answers are."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from records.batches import Collator
from records.templates import Example, Record
from utils import Settings

Batch = dict[str, torch.Tensor]
Collate = Callable[[list[Example]], Batch]

# Of an answer that was given, and of the wanted one: how well it fits, in [0, 1].
Metric = Callable[[str, str], float]


class Task:
    """What a run learns of its records: one class here, one file in `conf/task`.

    `model`: PEFT's task type (CAUSAL_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS, SEQ_2_SEQ_LM), by
    which the model's class is chosen. A record's `instruction`, `input` and `output` mean what
    the task's file in `conf/task` says.
    """

    # By which answers in words are judged, by name.
    judged_by: ClassVar[dict[str, Metric]] = {}
    # Whether exp(loss) means something.
    perplexity = False
    # Whether examples are compared with what a reference makes of them.
    refers = False
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

    def check_record(self, record: Record) -> None:
        """Raise `UserError` for one that lacks what records of this task have."""

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

    def judge(self, given: list[str], wanted: list[str]) -> dict[str, list[float]]:
        """By each of `judged_by`, a value for every answer."""
        pairs = list(zip(given, wanted, strict=True))
        return {
            name: [one(*pair) for pair in pairs] for name, one in self.judged_by.items()
        }

    def overall(self, given: list[str], wanted: list[str]) -> dict[str, float]:
        """What can only be said of all answers together (macro-F1, say), by name."""
        return {}
