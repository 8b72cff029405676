"""The model: a quantised base with a PEFT adapter on it, and the adapter in and out.

The adapter that travels is the model's trainable parameters by name, in float32: one rule
for every PEFT method, the networks of P-tuning included, which PEFT's own file leaves out.
"""

import contextlib
import gc
import json
import logging
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DistributedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

import cpu
from memory import release_inputs
from utils import PROJECT, Refusal, UserError, commit, construct, local_path, mix_seed


class Misfit(Refusal, ValueError):
    """A state that is not an adapter of this model."""


# What torch begins with: every core that the process may use, or OMP_NUM_THREADS.
CORES = torch.get_num_threads()
ABOUT = "flowertune.json"  # what `test.py` needs beside PEFT's own files
# How an adapter is examined, where its folder does not say (it is older than that).
EXAMINED = {
    "columns": {"instruction": "instruction", "input": "input", "output": "output"},
    "seq_length": 512,
    "batch_size": 16,
    "max_new_tokens": 32,
}
State = dict[str, torch.Tensor]


def default_device() -> torch.device:
    """The GPU that this process may use, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def chosen_device(name: str | None) -> torch.device:
    """The device that a command's `--device` names (cpu, cuda, cuda:1), or the default one.

    Raises `UserError` where there is none of that name.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name or "cpu"):
        raise UserError(f"--device={name}: it must be cpu, cuda or cuda:1.")
    device = torch.device(name) if name else default_device()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device={name}: there is no CUDA device here.")
    return device


def use_cpus(cpus: float) -> None:
    """Keep torch in this process to its share of the cores.

    A thread more than there are free cores waits spinning for the others: two threads
    beside one busy process were seen to take fifty times as long as one.
    """
    torch.set_num_threads(max(1, int(cpus)))


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Let torch have every core, where nobody else of the run is at work."""
    before = torch.get_num_threads()
    use_cpus(CORES)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it natively, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def quantization_config(
    bits: int | None, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """4: nf4 with double quantisation (QLoRA, arXiv 2305.14314); 8: LLM.int8; None: off."""
    if bits is None:
        return None
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    raise ValueError(f"quantization to {bits} bits is not known")


@lru_cache(maxsize=2)
def load_tokenizer(name: str, use_fast: bool = True) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token if it came without one."""
    tokenizer = AutoTokenizer.from_pretrained(
        _source(name), use_fast=use_fast, trust_remote_code=False
    )
    if tokenizer.pad_token is None:
        # Padding is masked by length, never by token id, so any token serves.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_base(
    name: str,
    quantization: int | None,
    device: torch.device,
    cache: str | None = None,
    shards: int = 1,
) -> torch.nn.Module:
    """Load a causal LM with frozen weights, quantised, from safetensors only.

    `shards`: this is one of as many processes, and each loads and holds its part of every
    weight (FSDP2); more than 1 needs `quantization` None. `cache`: a folder that keeps it
    as quantised, for the next process. Raises `UserError` where neither a local folder nor
    the hub has such weights, or not all of them.
    """
    source = _source(name)
    config = quantization_config(quantization, compute_dtype(device))
    kept = None
    if cache and config:
        kept = Path(cache) / _fingerprint(source, quantization, device)
    stored = kept is not None and kept.exists()
    sharding = DistributedConfig(fsdp_size=shards) if shards > 1 else None
    try:
        base, told = AutoModelForCausalLM.from_pretrained(
            kept if stored else source,
            # A folder of ours says itself how it is quantised, and None would deny it.
            **({} if stored or not config else {"quantization_config": config}),
            dtype=compute_dtype(device),
            device_map={"": device},
            distributed_config=sharding,
            use_safetensors=True,
            trust_remote_code=False,  # None would ask whoever is at the terminal
            attn_implementation="blocked" if device.type == "cpu" else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        # Transformers would put random values in the place of weights that are not there.
        odd = told["missing_keys"] | {key for key, *_ in told["mismatched_keys"]}
        if odd:
            raise ValueError(
                f"{len(odd)} are missing or have another shape, {min(odd)} among them"
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the libraries make of a broken file
        raise UserError(
            f"model.name={name}: no weights could be loaded. {error}"
        ) from error
    if quantization == 4 and device.type == "cpu" and not stored:
        # The same values, computed on at twice the speed. (Also, on CPUs with AVX512-BF16
        # a forward of a 4-bit layer in eval() repacks it for a kernel without autograd,
        # and what is trained on the same object afterwards has no gradients.)
        base = base.dequantize()
    if kept and not stored:
        _keep(base, kept)
    if quantization == 8:
        release_inputs(base)
    return base.requires_grad_(False)


def _fingerprint(source: str, quantization: int, device: torch.device) -> str:
    """A name for the quantised base that changes with all that it is made of."""
    folder = Path(cached_file(source, "config.json")).parent
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    made_with = [transformers.__version__, version("bitsandbytes")]
    parts = [folder, stats, quantization, device.type, compute_dtype(device), made_with]
    return f"{folder.name}-{mix_seed(*map(str, parts)):08x}"


def _keep(base: torch.nn.Module, folder: Path) -> None:
    """Save a quantised base; its folder appears under its name only when it is complete."""
    try:
        with commit(folder) as temporary:
            base.save_pretrained(temporary)
    except OSError as error:  # a full disk, say; the base is in memory all the same
        logging.warning("The quantised base was not kept in %s: %s", folder, error)


def build(model_cfg: Any, peft_cfg: Any, seed: int, device: torch.device) -> PeftModel:
    """The base with a fresh adapter that depends on nothing but the base and `seed`."""
    base = load_base(
        model_cfg["name"],
        model_cfg["quantization"],
        device,
        model_cfg.get("cache"),
        model_cfg.get("shards", 1),
    )
    return _with_adapter(base, model_cfg, peft_cfg, seed)


@lru_cache(maxsize=1)
def _build_once(key: str, device: torch.device) -> PeftModel:
    model = build(*json.loads(key), device)
    # Each new Trainer collects garbage, 0.3 s of looking at what lives for good anyway.
    gc.freeze()
    return model


def build_once(
    model_cfg: Any, peft_cfg: Any, seed: int, device: torch.device
) -> PeftModel:
    """`build`, kept for the life of the process: a client's next round finds it loaded.

    Whoever takes it must set the adapter's state before use.
    """
    return _build_once(json.dumps([model_cfg, peft_cfg, seed], sort_keys=True), device)


def skeleton(model_cfg: Any, peft_cfg: Any) -> PeftModel:
    """The same model without its weights (on the meta device): names, shapes, settings.

    Needs the base's `config.json` only. The server keeps one to check replies against and
    to write adapter folders; it never holds the base.
    """
    config = AutoConfig.from_pretrained(
        _source(model_cfg["name"]), trust_remote_code=False
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    return _with_adapter(base, model_cfg, peft_cfg, seed=0)


def _with_adapter(
    base: torch.nn.Module, model_cfg: Any, peft_cfg: Any, seed: int
) -> PeftModel:
    if model_cfg["gradient_checkpointing"]:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    settings = construct(peft_cfg, "peft")
    torch.manual_seed(seed)
    try:
        model = peft.get_peft_model(base, settings)
    except Exception as error:  # of any type: PEFT checks few settings by itself
        raise UserError(
            f"{peft_cfg['_target_']} on {model_cfg['name']}: {error}"
        ) from error
    if base.device.type == "cpu":
        cpu.quicken_dropout(model)
    return model


@contextlib.contextmanager
def autocast(model: torch.nn.Module) -> Iterator[None]:
    """Run the float32 adapter in the base's compute type; weights keep their type."""
    device = next(model.parameters()).device
    dtype = compute_dtype(device)
    if dtype == torch.float32:
        yield
        return
    # PEFT's LoRA layers would cast inputs to float32, and autocast cast them back.
    casting = [m for m in model.modules() if hasattr(m, "cast_input_dtype_enabled")]
    for module in casting:
        module.cast_input_dtype_enabled = False
    try:
        with torch.autocast(device.type, dtype):
            yield
    finally:
        for module in casting:
            module.cast_input_dtype_enabled = True


# --- the adapter, in memory --------------------------------------------------------------


def adapter_state(model: PeftModel) -> State:
    """A copy of the trainable parameters on the CPU, in float32, by name."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def set_adapter_state(model: PeftModel, state: State) -> None:
    """Overwrite every trainable parameter. Raises `Misfit` unless all fit exactly."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if fault := mismatch(state, parameters):
        raise Misfit(f"the adapter does not fit the base that is here: {fault}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def mismatch(state: State, expected: dict[str, Any]) -> str | None:
    """What keeps `state` from standing for `expected`, both by name, or None.

    Names and shapes must be equal and all values finite.
    """
    if state.keys() != expected.keys():
        odd = sorted(state.keys() ^ expected.keys())
        return f"{len(odd)} adapter tensors missing or unknown, {odd[0]} among them"
    for name, tensor in state.items():
        if tuple(tensor.shape) != tuple(expected[name].shape):
            return (
                f"{name} has shape {tuple(tensor.shape)}, "
                f"not {tuple(expected[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            return f"{name} holds values that are not finite"
    return None


# --- the adapter, on disk ------------------------------------------------------------------


def save_adapter(
    frame: PeftModel,
    state: State,
    tokenizer: PreTrainedTokenizerBase,
    about: dict[str, Any],
    folder: Path,
) -> None:
    """Write a PEFT adapter folder that stands alone.

    `frame` is a `skeleton`; `about` says how to ask the adapter (base model, quantisation,
    template). The folder appears under its name only when it is complete.
    """
    # The skeleton's own parameters have no storage to copy into.
    frame.load_state_dict(state, strict=False, assign=True)
    settings = frame.peft_config["default"]
    settings.base_model_name_or_path = about["model"]["name"]
    with commit(folder) as temporary:
        frame.save_pretrained(
            temporary, safe_serialization=True, save_embedding_layers=False
        )
        # PEFT's own card says where on this machine the base is; `export.py` writes one.
        (temporary / "README.md").unlink(missing_ok=True)
        tokenizer.save_pretrained(temporary)
        (temporary / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def read_about(folder: str) -> dict[str, Any]:
    """What `save_adapter` noted beside the adapter.

    Raises `UserError` where `folder` is not a complete adapter folder of this project.
    """
    from dataset import TEMPLATES

    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"--peft-path={folder}: there is no such folder.")
    for name in ("adapter_config.json", "adapter_model.safetensors", ABOUT):
        if not (path / name).is_file():
            found = sorted(str(p) for p in path.glob("**/peft_*") if p.is_dir())
            hint = f" Did you mean {found[-1]}?" if found else ""
            raise UserError(
                f"--peft-path={folder}: not an adapter folder of this project, "
                f"{name} is missing.{hint}"
            )
    try:
        about = json.loads((path / ABOUT).read_text())
        template, base = about["template"], about["model"]["name"]
        if not isinstance(about["round"], int):
            raise ValueError(f"its round is {about['round']!r}")
        if template not in TEMPLATES:
            raise ValueError(f"the template {template!r} is unknown")
        if about["model"]["quantization"] not in (4, 8, None):
            raise ValueError("the base is quantised to neither 4 nor 8 bits")
        for name in EXAMINED.keys() & about.keys():
            value = about[name]
            if name == "columns":
                named = {"instruction", "input", "output"}
                fits = isinstance(value, dict) and named <= value.keys()
                fits = fits and all(isinstance(c, str | None) for c in value.values())
            else:
                fits = type(value) is int and 1 <= value <= 2**20
            if not fits:
                raise ValueError(f"its {name} is {value!r}")
        if ".." in Path(base).parts:
            raise ValueError(f"the base {base} leads out of the project")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--peft-path={folder}: {ABOUT} is broken ({type(error).__name__}: {error})."
        ) from error
    return about


def open_adapter(
    folder: str, about: dict[str, Any], device: torch.device, unpacked: bool = False
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a saved adapter on its base, for answering, with its own tokenizer.

    `unpacked`: the base as `unpack` leaves it, once `device` has quantised it. Raises
    `UserError` where anything in `folder` is broken, does not fit the base, or names code to
    import. What can be read without the base is read before it.
    """
    from dataset import prompt

    try:
        part = "adapter_config.json"
        settings = peft.PeftConfig.from_pretrained(folder)
        if settings.auto_mapping or settings.task_type != "CAUSAL_LM":
            raise ValueError(
                "it is for a model of another kind, or names code to import"
            )
        part = "adapter_model.safetensors"
        state = load_file(Path(folder) / part)
        part = "the tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        prompt(about["template"], [{"instruction": "", "input": ""}], tokenizer)
        part = "the base"
        base = load_base(about["model"]["name"], about["model"]["quantization"], device)
        base = unpack(base) if unpacked else base
        part = "the adapter on this base"
        # Left to itself, PEFT keeps the first values of whatever the file lacks.
        model = PeftModel.from_pretrained(base, folder, ignore_mismatched_sizes=True)
        expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        if fault := mismatch(state, expected):
            raise ValueError(fault)
    except UserError as error:
        raise UserError(f"--peft-path={folder}: {error}") from error
    except Exception as error:  # whatever the libraries make of a broken file
        raise UserError(
            f"--peft-path={folder}: {part} cannot be used ({type(error).__name__}: {error})"
        ) from error
    return model.eval(), tokenizer


def unpack(base: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same values, quantised or not, in float32 on the CPU."""
    base = base.to("cpu")
    if getattr(base, "is_quantized", False):
        base = base.dequantize(torch.float32)
    base.is_loaded_in_4bit = base.is_loaded_in_8bit = False  # no longer, but it says so
    return base.float()


def mergeable(method: str) -> bool:
    """Whether a PEFT method (`peft_type`) is a change of the base's own weights."""
    return hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(method), "merge_and_unload")


def merge(
    folder: str, about: dict[str, Any], device: torch.device
) -> transformers.PreTrainedModel:
    """The base with a saved adapter in its weights: a plain model on the CPU.

    Into the values of the quantised base, because the adapter was trained on those; not into
    packed weights, where PEFT would quantise the sum once more. In float32, because bfloat16
    would round small changes away and turn answers where two tokens are next to equal.
    Raises `UserError` as `open_adapter` does, and, before anything is loaded, for a method
    that is not `mergeable`.
    """
    method = peft.PeftConfig.from_pretrained(folder).peft_type
    if not mergeable(method):
        raise UserError(
            f"--merge: {method.value} puts vectors of its own before the prompt's, which no "
            "weight of the base can take up. Share the adapter as it is, without --merge."
        )
    net, _ = open_adapter(folder, about, device, unpacked=True)
    return net.merge_and_unload()


def _source(name: str) -> str:
    return str(local_path(name) or name)


def portable_name(name: str) -> str:
    """`name` as an adapter folder should record it, so that both can move together.

    A path inside the project stays relative to it; another path becomes absolute.
    """
    path = local_path(name)
    if path is None:
        return name
    return str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)
