"""QLoRA as it is written with transformers, peft and bitsandbytes alone: no Flower, no Trainer."""

from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from model import quantization_config


def load(
    folder: str | Path, bits: int | None, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The base in a folder, quantised, on `device`."""
    config = quantization_config(bits, dtype)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        **({"quantization_config": config} if config else {}),
        dtype=dtype,
        device_map={"": device},
    )


def adapted(base: PreTrainedModel, settings: peft.PeftConfig) -> peft.PeftModel:
    """With an adapter, checkpointing, and all that is not quantised in float32."""
    base = peft.prepare_model_for_kbit_training(
        base,
        use_gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    base.config.use_cache = False
    return peft.get_peft_model(base, settings)
