"""ZeRO: optimizer state, gradients and weights in parts, one in each process, by DeepSpeed.

Stage 2 divides the first two, stage 3 (arXiv 1910.02054) the base's and the adapter's weights
as well. `settings` is DeepSpeed's own configuration, `launch.deepspeed`. DeepSpeed is an extra
requirement, imported where it is used. Checked against deepspeed 0.19.8.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    unset_hf_deepspeed_config,
)

from compute import patches

Config = Mapping[str, Any]


def divides_weights(settings: Config | None) -> bool:
    """Whether each process holds a part of every weight."""
    return bool(settings) and settings["zero_optimization"]["stage"] == 3


def in_parts(module: torch.nn.Module) -> bool:
    """Whether a module's weights are divided among the processes."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def training(settings: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Those of `TrainingArguments` that train by DeepSpeed; "auto" is what the others say.

    Parameters keep their own types: the adapter is float32 beside a base in bfloat16, in
    which autocast computes, and gradients are averaged in float32.
    """
    _library()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    patches.tell_accelerate_of_processes()
    told = {
        **settings,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2**31,
        # With offload_optimizer as well, the optimizer of train.training_arguments.
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": dtype != torch.float32,
            "dtype": str(dtype).removeprefix("torch."),
            "lower_precision_safe_modules": [],
        },
    }
    configured = {"use_configured_state": True}
    return {"deepspeed": told, "accelerator_config": configured, "use_cpu": False}


def _library() -> Any:
    # Here, because it brings in Hydra, which the loss alone does not need.
    from utils import DEEPSPEED, require

    require(DEEPSPEED, "launch.deepspeed")
    import deepspeed

    if deepspeed.get_accelerator().device_name() == "cpu":
        patches.build_no_kernels(deepspeed)
    return deepspeed


@contextmanager
def loading(settings: Config | None, dtype: torch.dtype) -> Iterator[None]:
    """What transformers loads in here is divided as it comes, where the stage is 3."""
    if not divides_weights(settings):
        yield
        return
    _library()
    told = {**settings, "train_micro_batch_size_per_gpu": 1}
    told["bf16"] = {"enabled": dtype == torch.bfloat16}
    # Transformers keeps a weak reference: it is in force as long as this name.
    held = HfDeepSpeedConfig(told)
    try:
        yield
    finally:
        del held
        unset_hf_deepspeed_config()


@contextmanager
def whole(
    parameters: Iterable[torch.nn.Parameter], changed: bool = False
) -> Iterator[None]:
    """Each parameter with all its values in all processes; `changed`: they get others here."""
    divided = [one for one in parameters if hasattr(one, "ds_id")]
    if not divided:
        yield
        return
    rank = 0 if changed else None
    with _library().zero.GatheredParameters(divided, modifier_rank=rank):
        yield


@contextmanager
def awake(net: torch.nn.Module, settings: Config | None) -> Iterator[None]:
    """A model whose weights are fetched where a forward pass needs them, outside of training."""
    if not divides_weights(settings):
        yield
        return
    told = {**settings, "train_micro_batch_size_per_gpu": 1}
    told["zero_optimization"] = {
        name: value
        for name, value in settings["zero_optimization"].items()
        if name != "offload_optimizer"
    }
    engine, *_ = _library().initialize(model=net, config=told)
    try:
        yield
    finally:
        engine.destroy()


def end(trainer: Any) -> None:
    """Take the engine of a `transformers.Trainer` off its model, for the next one's.

    Two of them on one model would each fetch and divide, and average its gradients. Nor is
    any model that transformers makes later divided because this one was.
    """
    trainer.accelerator.free_memory()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # which `Accelerator` leaves
