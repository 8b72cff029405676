"""A LLaMA of any size with random weights, quantised, with LoRA on it, and a step of it.

Needs neither Flower nor Hydra nor datasets.
"""

from functools import lru_cache
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from compute.loss import IGNORED, answer_loss
from compute.patches import attend_without_cudnn, release_inputs

PROMPT = 16  # tokens of each example that the loss leaves out


def build(shape: tuple[int, ...], bits: int, device: torch.device) -> peft.PeftModel:
    """A LLaMA of random weights, quantised, with LoRA on it, ready to train."""
    attend_without_cudnn()  # as a client
    base = _on_meta(shape)
    for name, module in list(base.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        # One weight at a time: the unquantised model never exists as a whole.
        base.set_submodule(name, _quantised(module, bits, device))
    _materialise(base, device)
    release_inputs(base)
    # What peft asks for its layers on quantised weights.
    setattr(base, f"is_loaded_in_{bits}bit", True)
    return _adapted(base)


def write(shape: tuple[int, ...], folder: Path, device: torch.device) -> None:
    """A LLaMA of random weights as a folder, in bfloat16, with the tiny base's tokenizer.

    They are drawn on `device`, where that takes seconds for billions of them.
    """
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "tiny_llama")
    base = _on_meta(shape)
    _materialise(base, device)
    base.config.bos_token_id = tokenizer.bos_token_id
    base.config.eos_token_id = tokenizer.eos_token_id
    base.config.pad_token_id = tokenizer.pad_token_id
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def skeleton(shape: tuple[int, ...]) -> peft.PeftModel:
    """The same model without weights, for the estimate."""
    return _adapted(_on_meta(shape))


def _on_meta(shape: tuple[int, ...]) -> torch.nn.Module:
    hidden, layers, heads, intermediate, vocabulary = shape
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return base.requires_grad_(False)


def _adapted(base: torch.nn.Module) -> peft.PeftModel:
    base.gradient_checkpointing_enable({"use_reentrant": False})
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=32,
        lora_alpha=64,
        lora_dropout=0.075,
        target_modules=["q_proj", "v_proj"],
    )
    return peft.get_peft_model(base, settings).train()


def _quantised(
    linear: torch.nn.Linear, bits: int, device: torch.device
) -> torch.nn.Module:
    """A quantised layer of `linear`'s shape; moving its weight to `device` quantises it."""
    sizes = (linear.in_features, linear.out_features)
    weight = _random_weight(*sizes[::-1])
    if bits == 4:
        layer = bnb.nn.Linear4bit(
            *sizes,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        layer.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=layer,
        ).to(device)
    else:
        # The threshold of transformers' BitsAndBytesConfig.
        layer = bnb.nn.Linear8bitLt(
            *sizes, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
        )
        layer.weight = bnb.nn.Int8Params(
            weight, requires_grad=False, has_fp16_weights=False
        ).to(device)
    return layer.requires_grad_(False)


@lru_cache(maxsize=4)
def _random_weight(rows: int, columns: int) -> torch.Tensor:
    """Shared by all layers of a shape: drawing billions of values would take minutes."""
    return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=0.02)


def _materialise(base: torch.nn.Module, device: torch.device) -> None:
    """Give random values to what is not quantised: embeddings, norms and head."""
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                values = torch.empty_like(parameter, device=device)
                values = (
                    values.fill_(1) if values.ndim == 1 else values.normal_(std=0.02)
                )
                setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    # Buffers (the rotary frequencies) are computed, so they are computed again.
    rotary = base.model.rotary_emb
    base.model.rotary_emb = type(rotary)(config=base.config).to(device)


def random_batch(
    size: int, seq_length: int, vocabulary: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Examples of full length, all answer but a short prompt; int64 (size, length)."""
    ids = torch.randint(vocabulary, (size, seq_length), device=device)
    labels = ids.clone()
    labels[:, :PROMPT] = IGNORED
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
    }


def train_step(
    net: peft.PeftModel, batch: dict[str, torch.Tensor], micro_batch: int
) -> float:
    """Forward and backward, `micro_batch` examples at a time; the mean loss in nats."""
    answers = (batch["labels"][:, 1:] != IGNORED).sum()
    total = torch.zeros((), device=answers.device)
    for start in range(0, len(batch["labels"]), micro_batch):
        part = {name: ids[start : start + micro_batch] for name, ids in batch.items()}
        with torch.autocast(answers.device.type, torch.bfloat16):
            loss = answer_loss(net, part, answers)
        loss.backward()
        total += loss.detach()
    return total.item()
