"""What a CPU needs to train fast: attention in blocks of queries, and a quicker dropout.

Importing this registers the attention with transformers as "blocked".
"""

import math
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK = 128  # queries


def blocked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of queries (batch, heads, length, size) to keys and values before them.

    Each block goes against the keys up to its end: half of the products that a full matrix
    would take, in the matrix library's own kernels, in a third of torch's time on a CPU.
    `attention_mask` is boolean (batch, 1, length, length), true where a query may look, or
    None where that is everywhere before it. Returns (batch, length, heads, size).
    Outside training, and for whatever else is special, torch's own takes over.
    """
    batch, heads, length, size = query.shape
    if not torch.is_grad_enabled() or key.shape[2] != length or dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **more
        )
    groups = heads // key.shape[1]
    key, value = (repeat_kv(x, groups).flatten(0, 1) for x in (key, value))
    query = query.flatten(0, 1) * (scaling or size**-0.5)
    key = key.transpose(1, 2)
    block = math.ceil(length / math.ceil(length / BLOCK))
    least = torch.finfo(query.dtype).min
    future = query.new_full((block, block), least).triu(1)
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = torch.bmm(query[:, start:end], key[:, :, :end])
        if attention_mask is None:
            scores[:, :, start:] += future[: end - start, : end - start]
        else:
            # A query of padding may look nowhere: the least value, unlike minus infinity,
            # makes that an average that nobody reads, and not a NaN.
            hidden = ~attention_mask[:, :, start:end, :end]
            scores = scores.view(batch, heads, end - start, end)
            scores = scores.masked_fill(hidden, least).flatten(0, 1)
        parts.append(torch.bmm(scores.softmax(-1), value[:, :end]))
    output = torch.cat(parts, dim=1).view(batch, heads, length, size)
    return output.transpose(1, 2).contiguous(), None


class Dropout(torch.nn.Dropout):
    """Dropout from 16 random bits an element, four elements a draw: half of torch's time.

    The rate is met to 2**-17, and the scale is that of the rate that is met.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = round(self.p * 2**16)
        if not self.training or steps == 0:
            return x
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64)
        bits = draws.random_(-(2**63), None).view(torch.int16)[: x.numel()].view_as(x)
        kept = x.masked_fill(bits < steps - 2**15, 0)
        return kept.mul_(2**16 / (2**16 - steps))


def quicken_dropout(model: torch.nn.Module) -> None:
    """Put `Dropout` in the place of every LoRA layer's own."""
    for module in model.modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if type(dropout) is torch.nn.Dropout:
                module.lora_dropout[name] = Dropout(dropout.p)


AttentionInterface.register("blocked", blocked_attention)
AttentionMaskInterface.register("blocked", sdpa_mask)
