"""What a CPU needs to train fast: attention in blocks of queries, and a quicker dropout.

`patches` puts both in the place of the libraries' own. What the attention does not compute
itself goes on to transformers' "sdpa", which it replaces.
"""

import inspect
import math
from typing import Any

import torch
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

BLOCK = 128  # queries

# Arguments that change what the original computes, or that it refuses; all others it ignores.
SPECIAL = {"softcap", *inspect.signature(sdpa_attention_forward).parameters} - {
    *("module", "query", "key", "value", "attention_mask", "dropout", "scaling"),
    *("is_causal", "kwargs"),
}


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
    `attention_mask` is boolean (batch, 1 or heads, length, length), true where a query may
    look, or None where that is everywhere before it. Returns (batch, length, heads, size of
    a value). Falls back to transformers' SDPA without grad, with a KV cache, with attention
    dropout, on other devices, and for masks that look ahead.
    """
    length = query.shape[2]
    block = math.ceil(length / math.ceil(length / BLOCK))
    if (
        query.device.type != "cpu"
        or not torch.is_grad_enabled()
        or dropout
        or key.shape[2] != length
        or any(more.get(name) is not None for name in SPECIAL)
        or not _looks_back(module, attention_mask, length, block, more.get("is_causal"))
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **more
        )
    batch, heads, _, size = query.shape
    groups = heads // key.shape[1]
    key, value = (repeat_kv(x, groups).flatten(0, 1) for x in (key, value))
    query = query.flatten(0, 1) * (size**-0.5 if scaling is None else scaling)
    key = key.transpose(1, 2)
    least = torch.finfo(query.dtype).min
    future = query.new_full((block, block), least).triu(1)
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = torch.bmm(query[:, start:end], key[:, :, :end])
        if attention_mask is None:
            scores[:, :, start:] += future[: end - start, : end - start]
        else:
            # A padding query may see no key: the dtype's least value, unlike minus infinity,
            # gives it a meaningless average instead of NaN.
            hidden = ~attention_mask[:, :, start:end, :end]
            scores = scores.view(batch, heads, end - start, end)
            scores = scores.masked_fill(hidden, least).flatten(0, 1)
        parts.append(torch.bmm(scores.softmax(-1), value[:, :end]))
    output = torch.cat(parts, dim=1).view(batch, heads, length, -1)
    return output.transpose(1, 2).contiguous(), None


def _looks_back(
    module: torch.nn.Module,
    mask: torch.Tensor | None,
    length: int,
    block: int,
    is_causal: bool | None,
) -> bool:
    """Whether the mask is causal up to blocks: no query sees keys past its block's end."""
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return bool(causal)
    if mask.dtype != torch.bool or mask.shape[2:] != (length, length):
        return False
    ends = range(block, length, block)
    return not any(mask[:, :, end - block : end, end:].any() for end in ends)


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
