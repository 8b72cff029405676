"""A text is rewritten into another: summaries, translations, on encoder and decoder."""

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from compute.loss import answer_loss, answer_scores, answer_sums, decoding
from records.batches import Batch, Collate, padded
from records.templates import Example, Record
from tasks import words
from tasks.base import Task
from tasks.generation import generate
from utils import IGNORED, Settings, UserError, spelt


class Seq2Seq(Task):
    """Cross entropy of the target's tokens, given the source (T5, BART and their like).

    The encoder reads the instruction, with the input below it, behind `prefix`; the decoder
    writes the output. No template: both are put into tokens as the base's tokenizer does it.
    """

    judged_by = words.METRICS
    perplexity = True

    def __init__(self, cfg: Settings, model: str, prefix: str = "") -> None:
        super().__init__(cfg, model)
        if not isinstance(prefix, str):
            raise UserError(f"task.prefix={spelt(prefix)}: text in quotes is needed.")
        self.prefix = prefix

    def check(self, cfg: Settings) -> None:
        if cfg.audit.canaries:
            raise UserError(
                f"audit.canaries={cfg.audit.canaries} with task._target_="
                f"{cfg.task._target_}: canaries are looked for in models that go from left "
                "to right. Set audit.canaries=0."
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        ids = tokenizer(text_target="a")["input_ids"]
        if tokenizer.eos_token_id not in ids:
            raise UserError(
                f"model.name={tokenizer.name_or_path}: its tokenizer ends no text with "
                f"{tokenizer.eos_token}, so a base with it would never learn to end. Take "
                "an encoder-decoder's own, T5's or BART's."
            )

    def encode(
        self, record: Record, tokenizer: PreTrainedTokenizerBase, training: bool = False
    ) -> Example | None:
        """The source's token ids, and the target's as `labels`, each up to `seq_length`.

        What is too long loses its end, and keeps the tokens that close it; `lost` then says
        how many tokens are not there. None where there is no target.
        """
        if not record["output"].strip():
            return None
        source = self._tokens(tokenizer, text=self._source(record))
        target = self._tokens(tokenizer, text_target=record["output"].strip())
        example = {"input_ids": source[0], "labels": target[0]}
        lost = source[1] + target[1]
        return example | {"lost": [lost]} if lost else example

    def is_cut(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> bool:
        return "lost" in example

    def length(self, example: Example) -> int:
        return len(example["input_ids"]) + len(example["labels"])

    def blank(self) -> Example:
        return {"input_ids": [0], "labels": [IGNORED]}

    def collator(self, tokenizer: PreTrainedTokenizerBase, side: str) -> Collate:
        """Padded on the right whatever the `side`: BART counts positions from the first
        token, of padding as well."""
        return partial(_batch, tokenizer.pad_token_id)

    def loss(self, net: Any, batch: Batch, count: Any = None) -> torch.Tensor:
        """In nats per token of a target."""
        return answer_loss(net, decoding(net, batch), count)

    def nats(self, net: Any, batch: Batch) -> torch.Tensor:
        return -answer_sums(net, decoding(net, batch))

    def score(self, net: Any, batch: Batch) -> torch.Tensor:
        return answer_scores(net, decoding(net, batch))

    def answers(
        self,
        net: Any,
        tokenizer: PreTrainedTokenizerBase,
        records: list[Record],
        limit: int,
    ) -> list[str]:
        """By the base's own search (bart-large-cnn's has four beams), and nothing drawn."""
        sources = [
            self._tokens(tokenizer, text=self._source(one))[0] for one in records
        ]
        own = net.generation_config.eos_token_id
        ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
        ends = [token for token in dict.fromkeys(ends) if token is not None]
        return generate(net, tokenizer, sources, limit, ends)

    def _source(self, record: Record) -> str:
        """What the encoder reads. Of a conversation all that was said, a turn a line."""
        parts = [record["instruction"], record.get("input", "")]
        if said := record.get("messages"):
            parts = [turn["content"] for turn in said]
        return self.prefix + "\n".join(filter(None, parts))

    def _tokens(
        self, tokenizer: PreTrainedTokenizerBase, **text: str
    ) -> tuple[list[int], int]:
        """Token ids of a `text` or a `text_target`, and how many were cut off.

        A text that spells a special token (`</s>`, an HTML tag) has it as plain letters.
        """
        whole = tokenizer(**text, split_special_tokens=True)["input_ids"]
        if len(whole) <= self.seq_length:
            return whole, 0
        cut = tokenizer(
            **text,
            split_special_tokens=True,
            truncation=True,
            max_length=self.seq_length,
        )["input_ids"]
        return cut, len(whole) - len(cut)


def _batch(pad_token_id: int, examples: list[Example]) -> Batch:
    """Source ids and mask, (batch, source), and labels, (batch, 1 + target), of int64.

    Both lengths are a multiple of `MULTIPLE`. Before the target stands one label that is
    ignored, so that position i of the decoder is to foretell label i + 1.
    """

    sources = [example["input_ids"] for example in examples]
    return {
        "input_ids": padded(sources, pad_token_id),
        "attention_mask": padded([[1] * len(row) for row in sources], 0),
        "labels": padded([[IGNORED, *one["labels"]] for one in examples], IGNORED),
    }
