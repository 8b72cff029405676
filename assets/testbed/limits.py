"""What a training step of LoRA on a frozen base has to compute and to move, and how fast a
device does either. FLOPs: a multiplication and an addition are two.
"""

import time
from typing import Any

import torch

from assets.testbed.vram import wait_for
from compute.vram import FLOAT32, estimate_vram

# Dense bfloat16, FLOP/s, by NVIDIA's data sheets: what utilisation is told of.
DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


def step_flops(skeleton: Any, batch: int, seq_length: int) -> dict[str, int]:
    """FLOPs of a step on `batch` examples of `seq_length` tokens, all of them answers.

    `skeleton`: a PEFT model on the meta device. A frozen weight takes two products, forward
    and back to its input; a trained one a third, its gradient. "recomputed": what gradient
    checkpointing adds, once more forward without the head; it is no part of the model's own
    FLOPs, by which utilisation is told (PaLM, arXiv 2204.02311, appendix B). Attention is
    causal: half of all pairs.
    """
    base = skeleton.get_base_model()
    config = base.config.get_text_config()
    head = base.get_output_embeddings()
    tokens = batch * seq_length
    modules = [m for m in skeleton.modules() if isinstance(m, torch.nn.Linear)]
    frozen = sum(
        m.weight.numel()
        for m in modules
        if not m.weight.requires_grad and m is not head
    )
    trained = sum(m.weight.numel() for m in modules if m.weight.requires_grad)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    # Two products forward, scores and their mean of the values, and four backward.
    pairs = config.num_hidden_layers * 2 * (2 * batch * seq_length**2 * width) // 2
    forward = 2 * tokens * (frozen + trained) + pairs
    return {
        "layers": 2 * tokens * (2 * frozen + 3 * trained),
        "attention": 3 * pairs,
        "head": 2 * 2 * tokens * head.weight.numel(),
        "recomputed": forward,
    }


def step_bytes(skeleton: Any, bits: int | None, batch: int, seq_length: int) -> int:
    """The fewest bytes that a step with gradient checkpointing moves through memory.

    Each weight is read forward, once more, and backward; what a layer keeps is written and
    read; gradients and AdamW's states are read and written.
    """
    terms = estimate_vram(skeleton, bits, batch, seq_length, checkpointing=True)
    weights = sum(size for name, size in terms.items() if name.endswith("weights"))
    values = terms["adapter"] // FLOAT32
    return 3 * weights + 2 * terms["activations"] + 2 * 4 * FLOAT32 * values


def product_rate(
    device: torch.device, dtype: torch.dtype, size: int, times: int = 10
) -> float:
    """FLOP/s of a product of two matrices of `size` rows and columns."""
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = _seconds(lambda: torch.matmul(one, other), device, times)
    return 2 * size**3 / seconds


def copy_rate(device: torch.device, size: int, times: int = 10) -> float:
    """Bytes a second that a copy of `size` bytes within the device's memory reads and writes."""
    one = torch.ones(size, device=device, dtype=torch.uint8)
    other = torch.empty_like(one)
    return 2 * size / _seconds(lambda: other.copy_(one), device, times)


def _seconds(work: Any, device: torch.device, times: int) -> float:
    for _ in range(2):
        work()
    wait_for(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait_for(device)
    return (time.perf_counter() - began) / times
