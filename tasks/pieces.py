"""Texts in a model's tokens with their places in the text, and batches of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from compute.loss import base_of
from records.batches import Batch, Collate, padded
from records.templates import Example
from utils import Settings, UserError


def check(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` for a tokenizer that does not tell where in a text a token stands."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} does not tell where in a text its tokens stand. Set "
            "model.use_fast_tokenizer=true, or take another base."
        )


def check_settings(cfg: Settings) -> None:
    """Raise `UserError` for what means nothing where an answer is no text that is written."""
    refused = {
        "evaluate.choices": (cfg.evaluate.choices, "null", "an answer is not chosen"),
        "audit.canaries": (cfg.audit.canaries, "0", "made-up records have no answer"),
    }
    for key, (value, off, why) in refused.items():
        if value:
            raise UserError(
                f"{key}={value} with task._target_={cfg.task._target_}: {why} there. Set "
                f"{key}={off}."
            )


def owners(
    words: list[str], tokenizer: PreTrainedTokenizerBase, most: int
) -> tuple[list[int], list[int]]:
    """The words, a space between two, in up to `most` tokens; and of each token its word.

    -1: no word's. A token over two words is the first one's. A word may have none: those at the
    end that there is no room for, and those that the tokenizer leaves out.
    """
    made = tokenizer(
        " ".join(words),
        truncation=True,
        max_length=most,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    owner = [i for i, word in enumerate(words) for _ in f"{word} "]
    blank = [letter.isspace() for word in words for letter in f"{word} "]

    def of(start: int, end: int) -> int:
        # A token may begin with the space before its word.
        return next((owner[i] for i in range(start, end) if not blank[i]), -1)

    found = zip(made["offset_mapping"], made["special_tokens_mask"], strict=True)
    return made["input_ids"], [
        -1 if special else of(*place) for place, special in found
    ]


def collator(tokenizer: PreTrainedTokenizerBase, **fill: int) -> Collate:
    """Pads on the right up to a multiple of `MULTIPLE` tokens, whatever train.padding_side.

    Encoders count positions from the first token, padding among them. `fill`: what stands in
    the other columns of an example where there is nothing; `attention_mask` is made.
    """

    def collate(examples: list[Example]) -> Batch:
        filled = {"input_ids": tokenizer.pad_token_id} | fill
        made = {
            name: padded([one[name] for one in examples], value)
            for name, value in filled.items()
        }
        mask = [[1] * len(one["input_ids"]) for one in examples]
        return made | {"attention_mask": padded(mask, 0)}

    return collate


def labelled(pad: Collate) -> Collate:
    """The same with a row of labels for each example, all equally long."""

    def collate(examples: list[Example]) -> Batch:
        return pad(examples) | {"labels": torch.tensor([x["labels"] for x in examples])}

    return collate


def inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def at_tokens(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The logits of a batch's own tokens; prompt tuning puts others before them. In float32."""
    return logits[:, -batch["input_ids"].shape[1] :].float()


@contextmanager
def segments(net: Any, types: torch.Tensor) -> Iterator[None]:
    """Tell a base that knows segments which of two texts a token is of: `types`, (rows, length).

    By a hook, because PEFT's PeftModelForQuestionAnswering takes token_type_ids and loses
    them (0.21.2). Bases without segments, or with one (RoBERTa's), are not told.
    """
    base = base_of(net)
    if (getattr(base.config, "type_vocab_size", None) or 0) < 2:
        yield
        return

    def tell(_: Any, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        vectors = named.get("inputs_embeds")
        # Prompt tuning has put vectors of its own before those of the tokens.
        more = 0 if vectors is None else vectors.shape[1] - types.shape[1]
        told = torch.nn.functional.pad(types, (more, 0))
        return given, named | {"token_type_ids": told}

    handle = base.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
