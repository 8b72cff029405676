"""GPU memory of a training step: an estimate from shapes alone.

Needs torch alone, and no weights: every figure comes from a model on the meta device.
"""

from typing import Any

import torch

from compute.loss import CHUNK

WORKSPACE = 2**29  # bytes of the CUDA context and cuBLAS, outside torch's allocator

BF16, INT32, FLOAT32 = 2, 4, 4  # bytes a value


def estimate_vram(
    skeleton: Any, bits: int | None, batch: int, seq_length: int, checkpointing: bool
) -> dict[str, int]:
    """Bytes that one client's training step holds on a GPU, by what they are for.

    `skeleton` is a PEFT model on the meta device, `bits` 4, 8 or None (bfloat16), `batch`
    in examples of `seq_length` tokens, all of them answers. Of an adapter's own
    activations it knows those of LoRA, MiSS, FourierFT, C3A and SHiRA; DoRA's products of
    whole weights, say, come on top. Add
    the terms up with `allocated` or `occupied`.
    """
    base = skeleton.get_base_model()
    config = base.config.get_text_config()
    if config.is_encoder_decoder:
        raise ValueError("an encoder and a decoder are not reckoned with")
    head = base.get_output_embeddings()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    tokens = batch * seq_length

    linears = [
        module
        for module in base.modules()
        if isinstance(module, torch.nn.Linear)
        and not module.weight.requires_grad
        and module is not head
    ]
    quantised = sum(_linear_bytes(linear, bits) for linear in linears)
    # Embeddings, head, norms and biases stay in bfloat16; tied weights are listed once.
    frozen = sum(p.numel() for p in skeleton.parameters() if not p.requires_grad)
    rest = BF16 * (frozen - sum(linear.weight.numel() for linear in linears))
    trained = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)

    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    # 2 for a gated MLP (SwiGLU), else 1; a fused gate counts as the two that it is.
    opened = sum(x.out_features for x in linears if x.out_features % inner == 0)
    gated = opened / layers / inner > 1.5
    token, fixed = _adapter_bytes(skeleton)
    saved = fixed // layers + tokens * (
        2 * FLOAT32 * hidden  # both norms keep their input in float32
        + BF16 * 4 * width  # attention: q, k, v (repeated to all heads) and its output
        + FLOAT32 * heads  # attention's log-sum-exp
        + BF16 * inner * (3 if gated else 1)  # gate, activated gate and up; or one
        + token // layers
    )
    widest = max((linear.weight.numel() for linear in linears), default=0)
    state = tokens * BF16 * hidden  # one hidden state of the whole batch
    backward = (
        state  # the gradient of the layer's output
        + max(
            tokens * BF16 * inner * (3 if gated else 2),  # gradients inside the MLP, or
            tokens * BF16 * inner
            + (BF16 * widest if bits else 0),  # dequantised weight
            # LLM.int8 has the gradient of the MLP's product before it recomputes the layer, and
            # a product in int32 and float16 before it is in bfloat16.
            tokens * inner * (BF16 + INT32 + BF16) if bits == 8 else 0,
        )
        + BF16 * batch * seq_length**2  # the padding mask, as attention's bias
    )
    return {
        "quantised weights" if bits else "linear weights": quantised,
        "other weights": rest,
        "adapter": FLOAT32 * trained,
        "adapter in bfloat16": BF16 * trained,  # autocast keeps a copy during a step
        "gradients": FLOAT32 * trained,
        "AdamW states": 2 * FLOAT32 * trained,
        # A checkpointed layer keeps its input and is recomputed from that.
        "activations": layers * (state if checkpointing else saved),
        "layer in work": backward + (saved if checkpointing else 0),
        # Of a chunk: log-softmax, its gradient and the logits' gradient in float32. Of all
        # positions: the last norm's float32 input and output, the answers' and a gradient.
        "logits": min(tokens, CHUNK) * config.vocab_size * 3 * FLOAT32 + 5 * state,
        "CUDA context": WORKSPACE,
    }


def at_peak(terms: dict[str, int]) -> dict[str, int]:
    """The terms that add up: the logits are gone when the layers need room."""
    lesser = min("layer in work", "logits", key=lambda name: terms[name])
    return {name: size for name, size in terms.items() if name != lesser}


def allocated(terms: dict[str, int]) -> int:
    """Peak bytes of torch's allocator."""
    return occupied(terms) - terms["CUDA context"]


def occupied(terms: dict[str, int]) -> int:
    """Bytes that a client's process takes of a GPU at its peak."""
    return sum(at_peak(terms).values())


def _linear_bytes(linear: torch.nn.Linear, bits: int | None) -> int:
    """Bytes of a frozen weight with its scales, as bitsandbytes stores it."""
    values = linear.weight.numel()
    if bits == 4:
        # A one-byte scale for each 64 values, a float32 scale for each 256 of those.
        blocks = -(-values // 64)
        return -(-values // 2) + blocks + FLOAT32 * -(-blocks // 256)
    if bits == 8:
        return values + FLOAT32 * linear.out_features
    return BF16 * values


def _adapter_bytes(skeleton: Any) -> tuple[int, int]:
    """Bytes that all layers of an adapter together keep for their backward.

    A token's, and those that are there however many tokens come: FourierFT and SHiRA make
    a whole matrix of what is trained.
    """
    token = fixed = 0
    for module in skeleton.modules():
        for name, lora_a in getattr(module, "lora_A", {}).items():
            if not isinstance(lora_a, torch.nn.Linear):  # AdaLoRA's, an embedding's
                continue
            dropout = isinstance(module.lora_dropout[name], torch.nn.Dropout)
            # The (dropped-out) input, dropout's one-byte mask, and what A makes of it.
            token += lora_a.in_features * (BF16 + dropout) + BF16 * lora_a.out_features
        for name, block in getattr(module, "miss_block", {}).items():
            dropout = isinstance(module.miss_dropout[name], torch.nn.Dropout)
            # Dropout's mask, and the sums of the input's parts.
            token += module.in_features * dropout + BF16 * len(block)
        if hasattr(module, "c3a_kernel"):  # whose convolution is in float32
            token += FLOAT32 * module.in_features
        if hasattr(module, "fourierft_spectrum") or hasattr(module, "shira_weight"):
            token += BF16 * module.in_features
            fixed += BF16 * module.in_features * module.out_features
    return token, fixed
