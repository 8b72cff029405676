"""Every change that is made to an object of a library's, and every private name of torch's.

Each function names the version that it was checked against; `tests/test_patches.py` fails
when what it reaches for is gone. Private names that are read, and whose libraries one room
alone may import, stay there, and are listed and tested with these: `lm_eval` in
`evaluation/harness.py`, `ray._private` in `settings/preflight.py`, the folders of `datasets`'
cache in `settings/heterogeneity.py`, `hydra._internal` in `reporting/` and a job's
`_return_value` in `settings/outputs.py`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import other
from peft.tuners.shira import config as shira
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AttentionInterface,
    DistributedConfig,
    PreTrainedModel,
    TrainingArguments,
)

from compute import cpu


def attend_in_blocks() -> None:
    """Put `cpu.blocked_attention` in the place of transformers' "sdpa" (5.23.0).

    It reaches the models that call that one, by transformers' own choice, and no other.
    """
    AttentionInterface.register("sdpa", cpu.blocked_attention)


def attend_without_cudnn() -> None:
    """Keep torch's attention from cuDNN's kernels, its first choice on an H100 (torch 2.13.0).

    Their backward pass makes NaN of scores far below zero (pytorch's issue 196678), the extreme
    of which is a query that sees no key, as padding on the left has: on an H200 (torch 2.11.0)
    clients of experiment=quickstart ended so, and without these kernels train. FlashAttention
    takes their place, and with a mask the memory-efficient kernel.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def import_deepspeed_for_itself_only() -> None:
    """Keep accelerate from importing DeepSpeed where nothing has yet (accelerate 1.15.0).

    It does so to ask whether a model is DeepSpeed's: 5 s of every process, and a warning.
    """
    other.is_deepspeed_available = lambda: "deepspeed" in sys.modules


def tell_accelerate_of_processes() -> None:
    """Let accelerate take over torch's process group as it is (accelerate 1.15.0).

    Left to itself, it takes a process without a GPU in DeepSpeed for the only one.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(backend=torch.distributed.get_backend())


def build_no_kernels(deepspeed: Any) -> None:
    """Keep DeepSpeed on a CPU from compiling its collectives, a minute or more (0.19.8).

    gloo's are there already.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def quicken_dropout(model: torch.nn.Module) -> None:
    """Put `cpu.Dropout` in the place of every LoRA layer's own (peft 0.21.2)."""
    for module in model.modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if type(dropout) is torch.nn.Dropout:
                module.lora_dropout[name] = cpu.Dropout(dropout.p)


def forget_between_passes(base: torch.nn.Module) -> None:
    """Let no forward pass of `base` go by what came in an earlier one (transformers 5.23.0).

    Dynamic rotary embeddings keep the longest text that came, BigBird that one was short, and
    NLLB's experts how much was evaluated: one record would change another one's gradient, and
    one client what the next one in the same process trains. Each pass is the first now.
    """
    covered = None
    for name, module in base.named_modules():
        if "dynamic" in str(getattr(module, "rope_type", "")):
            module.register_forward_pre_hook(_forget_lengths)
        if hasattr(module, "moe_eval_capacity_token_fraction"):
            module.register_forward_pre_hook(
                partial(_forget_capacity, module.expert_capacity)
            )
        if covered is not None and f"{name}.".startswith(covered):
            continue
        if getattr(module, "attention_type", None) == "block_sparse":
            covered = f"{name}." if name else ""  # the modules below go by it
            module.register_forward_pre_hook(_attend_by_length, with_kwargs=True)


def _forget_lengths(module: torch.nn.Module, inputs: Any) -> None:
    for name in [*vars(module)]:  # one for all layers, or one for each kind of them
        if name.endswith("max_seq_len_cached"):
            setattr(module, name, module.original_max_seq_len)
    for name, buffer in [*module.named_buffers()]:
        if name.endswith("original_inv_freq"):
            setattr(module, name.replace("original_", ""), buffer.clone())


def _forget_capacity(given: int | None, module: torch.nn.Module, inputs: Any) -> None:
    module.expert_capacity = given


def _attend_by_length(module: torch.nn.Module, inputs: Any, named: Any) -> None:
    given = inputs[0] if inputs else named.get("input_ids")
    length = (named["inputs_embeds"] if given is None else given).shape[1]
    config = module.config
    sparse = length > (5 + 2 * config.num_random_blocks) * config.block_size
    # New layers, whose first values are drawn and not used: dropout is to draw as without.
    with torch.random.fork_rng(devices=[]):
        module.set_attention_type("block_sparse" if sparse else "original_full")


@contextmanager
def equal_masks_drawn_once() -> Iterator[None]:
    """Let SHiRA draw the mask of layers of one shape once, not for each (peft 0.21.2).

    Its seed is the same for all of them, and so is the mask. For 64 layers of 4096 x 4096
    it would shuffle 16.8M numbers 64 times: 80 s of a core, which are 9 so.
    """
    draw, drawn = shira.random_mask, {}

    def mask(
        layer: torch.nn.Module, r: int, random_seed: int | None = None, **_: Any
    ) -> torch.Tensor:
        shape = layer.in_features, layer.out_features, layer.weight.device
        if (key := (*shape, r, random_seed)) not in drawn:
            drawn[key] = draw(layer, r, random_seed)
        return drawn[key]

    shira.random_mask = mask
    try:
        yield
    finally:
        shira.random_mask = draw
        drawn.clear()


@contextmanager
def inputs_as_they_come(model: torch.nn.Module) -> Iterator[None]:
    """Keep adapters from casting their inputs to their own type (peft 0.21.2).

    PEFT's `disable_input_dtype_casting` asks every adapter for its switch, and IA3, C3A,
    FourierFT and SHiRA have none.
    """
    layers = [x for x in model.modules() if hasattr(x, "cast_input_dtype_enabled")]
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


@contextmanager
def adapters_as_made() -> Iterator[None]:
    """Have PEFT move a fresh adapter to its base's device and leave it else (peft 0.21.2).

    It gives it the type of the base too, and float32 again: of one seed, a base in bfloat16
    had rounded values, which no other machine had. And what a method holds fixed in a
    `ParameterDict` (AdaLoRA's `ranknum`) is trained as soon as it was moved.
    """
    base_of, move = (
        BaseTunerLayer._get_base_layer_device_and_dtype,
        BaseTunerLayer._move_adapter_to_device_of_base_layer,
    )

    def untyped(layer: Any, base: Any) -> tuple[torch.device | None, None]:
        return base_of(layer, base)[0], None

    def moved(layer: Any, name: str, device: torch.device | None = None) -> None:
        parts = [getattr(layer, part, None) for part in layer.other_param_names]
        held = [part for part in parts if isinstance(part, torch.nn.ParameterDict)]
        fixed = [p for p in held if name in p and not p[name].requires_grad]
        move(layer, name, device)
        for part in fixed:
            part[name].requires_grad_(False)

    BaseTunerLayer._get_base_layer_device_and_dtype = untyped
    BaseTunerLayer._move_adapter_to_device_of_base_layer = moved
    try:
        yield
    finally:
        BaseTunerLayer._get_base_layer_device_and_dtype = base_of
        BaseTunerLayer._move_adapter_to_device_of_base_layer = move


def release_inputs(base: torch.nn.Module) -> None:
    """Keep 8-bit layers from holding their inputs until backward (bitsandbytes 0.50.2).

    Their autograd functions store the input as an attribute, where gradient checkpointing
    cannot drop it, though with frozen weights the backward pass never reads it.
    """
    for module in base.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.register_forward_hook(_release)


def _release(_: torch.nn.Module, __: Any, output: torch.Tensor) -> None:
    if hasattr(output.grad_fn, "tensors"):  # on a GPU
        output.grad_fn.tensors = (None, None, None)
    if hasattr(output.grad_fn, "A"):  # on a CPU
        output.grad_fn.A = None


def divide_packed(base: PreTrainedModel, shards: int) -> PreTrainedModel:
    """Leave each of `shards` processes its part of a base in 4 bits (FSDP2), which all have whole.

    Transformers (5.23.0) divides weights as it loads them: bitsandbytes (0.50.2) would quantise
    each part for itself, and its scales be lost. The packed weights stay bytes: FSDP2 (torch
    2.13.0) gathers those of a layer as such, whatever their types, where FSDP1 needed them in
    the type of the others (`bnb_4bit_quant_storage`). The scales of each 64 weights, which are
    3 % of a layer, stay whole in the layer's `quant_state`.
    """
    layers = [x for x in base.modules() if type(x).__name__ == "Linear4bit"]
    # Not the weights themselves, which would all stay in memory whole.
    told = [(x.weight.compress_statistics, x.weight.quant_type) for x in layers]
    for target, source in base.all_tied_weights_keys.items():
        # FSDP2 refuses a weight in two of its groups.
        module, _, name = target.rpartition(".")
        weight = torch.nn.Parameter(base.get_parameter(source).detach(), False)
        setattr(base.get_submodule(module), name, weight)
    config, _, mesh = base.prepare_distribute_model(DistributedConfig(fsdp_size=shards))
    base = base.maybe_distribute_model(base, config, mesh)
    base.tie_weights()  # one part of both in memory
    for layer, (nested, kind) in zip(layers, told, strict=True):
        # PEFT (0.21.2) asks the weight, which is one of FSDP2's now.
        layer.weight.compress_statistics, layer.weight.quant_type = nested, kind
        # On CPUs with AVX512-BF16 a forward in eval() would pack the gathered weight in another
        # way, and its `quant_state` for good.
        layer.support_avx512bf16_for_cpu = False
    return base


def forget_quantization(base: PreTrainedModel) -> None:
    """After `dequantize` a base still says that it is quantised (transformers 5.23.0)."""
    base.is_loaded_in_4bit = base.is_loaded_in_8bit = False


def fill_buffers(base: PreTrainedModel) -> None:
    """Compute buffers (rotary frequencies, masks), and leave the weights (transformers 5.23.0)."""
    for module in base.modules():
        module._is_hf_initialized = False
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True
    base.initialize_weights()


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Keep the Trainer from dividing each batch among all GPUs in sight (transformers 5.23.0).

    It would multiply the batch by their number for all bases that are not quantised.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16, AVX512-BF16 (torch 2.13.0, not public)."""
    return torch.cpu._is_avx512_bf16_supported()
