"""Tokenised examples as the tensors of a batch, and batches of examples of like length."""

from collections.abc import Callable, Iterator, Sequence

import torch

from records.templates import Example
from utils import IGNORED, look_for_stop

Batch = dict[str, torch.Tensor]
Collate = Callable[[list[Example]], Batch]

# Of tokens in a batch. On a CPU each new length leaves a kernel in a cache that grows for
# hundreds of rounds; a GPU's tensor cores like it.
MULTIPLE = 8

# Prompts that are answered side by side. With 64 on a CPU a base of 135M (1.1 GiB) took 0.3
# GiB more for its answers, with 16 0.1, for about the same time.
AT_ONCE, AT_ONCE_ON_CPU = 64, 16


def at_once(device: torch.device) -> int:
    """How many examples are answered side by side."""
    return AT_ONCE_ON_CPU if device.type == "cpu" else AT_ONCE


def padded(rows: Sequence[list[int]], value: int, side: str = "right") -> torch.Tensor:
    """Rows as (rows, length) of int64, with `value` up to a multiple of `MULTIPLE`."""
    longest = max(map(len, rows))
    longest += -longest % MULTIPLE
    fills = ([value] * (longest - len(row)) for row in rows)
    both = zip(rows, fills, strict=True)
    return torch.tensor([f + r if side == "left" else r + f for r, f in both])


class Collator:
    """Pad a batch to its longest example, on the side that `padding_side` names.

    Up to a multiple of `MULTIPLE` tokens.
    """

    def __init__(self, pad_token_id: int, padding_side: str) -> None:
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side

    def __call__(self, examples: list[Example]) -> Batch:
        """Input ids, attention mask and labels, each (batch, length) of int64."""
        rows = [example["input_ids"] for example in examples]
        labels = [example["labels"] for example in examples]
        filled = {
            "input_ids": (rows, self.pad_token_id),
            "attention_mask": ([[1] * len(row) for row in rows], 0),
            "labels": (labels, IGNORED),
        }
        side = self.padding_side
        return {name: padded(*column, side) for name, column in filled.items()}


def by_length(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """The places of up to `size` rows of like length; a run may be stopped between two."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(rows), size):
        look_for_stop()
        yield order[start : start + size]


def batches(
    examples: list[Example], collate: Collate, size: int, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """The places of up to `size` examples of like length, and their tensors on the device."""
    rows = [example["input_ids"] for example in examples]
    for chosen in by_length(rows, size):
        tensors = collate([examples[i] for i in chosen])
        yield chosen, {name: tensor.to(device) for name, tensor in tensors.items()}
