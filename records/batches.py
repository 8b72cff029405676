"""Tokenised examples as the tensors of a batch."""

import torch

from records.templates import Example
from utils import IGNORED

# Of tokens in a batch. On a CPU each new length leaves a kernel in a cache that grows for
# hundreds of rounds; a GPU's tensor cores like it.
MULTIPLE = 8


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
