"""The model: a quantised base with a PEFT adapter on it, and the adapter in and out.

The adapter that travels is the model's trainable parameters by name, in float32: one rule
for every PEFT method, the networks of P-tuning included, which PEFT's own file leaves out.
"""

import contextlib
import copy
import gc
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    DistributedConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from compute import heads, patches, zero
from compute.loss import decoding, hidden_states
from methods import emulator
from methods.base import State
from methods.wire import mismatch, misshapen
from records import templates
from utils import (
    PROJECT,
    Refusal,
    Settings,
    Unwritable,
    UserError,
    commit,
    construct,
    local_path,
    mix_seed,
    one_line,
    spelt,
    write_json,
)

patches.attend_in_blocks()
patches.attend_without_cudnn()
patches.import_deepspeed_for_itself_only()


class Misfit(Refusal, ValueError):
    """A state that is not an adapter of this model."""


# What torch begins with: every core that the process may use, or OMP_NUM_THREADS.
CORES = torch.get_num_threads()

ABOUT = "flowertune.json"  # what `test.py` needs beside PEFT's own files

# Bytes of a settings file; a list of all of a base's layers is 100 kB.
LARGEST_JSON = 2**20

# The class of a base, by PEFT's name for what is made of it.
CLASSES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
}

# Those with a head that is made from the seed, trained whole, and part of the adapter.
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

# How an adapter is examined, where its folder does not say (it is older than that).
EXAMINED = {
    "columns": {"instruction": "instruction", "input": "input", "output": "output"},
    "seq_length": 512,
    "batch_size": 16,
    "max_new_tokens": 32,
    "task": {"_target_": "tasks.generation.Generation", "model": "CAUSAL_LM"},
}


# PEFT's settings that are about training, or about where an adapter comes from.
NO_FUNCTION = re.compile(
    "dropout|base_model_name|^revision|^inference_mode|_version$|^task_type|^auto_mapping"
)


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
        native = patches.cpu_has_bfloat16()
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
    # Padding is masked by length, never by token id, so any token serves that the base has.
    rows = math.inf
    # Where there is no config.json, that is said elsewhere.
    with contextlib.suppress(OSError, ValueError):
        rows = _config({"name": name}).get_text_config().vocab_size
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        others = tokenizer.unk_token_id, tokenizer.eos_token_id, 0
        token = next(i for i in others if i is not None and i < rows)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token)
    return tokenizer


def load_base(
    name: str,
    quantization: int | None,
    device: torch.device,
    cache: str | None = None,
    shards: int = 1,
    kind: str = "CAUSAL_LM",
    labels: Sequence[str] | None = None,
    deepspeed: Settings | None = None,
) -> torch.nn.Module:
    """Load a base of this `kind` with frozen weights, quantised, from safetensors only.

    `labels`: what its head tells apart, if it is of a kind that does; a head's values are of
    no account (`heads.begin` makes them), and are never quantised. `shards`: this is one of
    as many processes, and each holds its part of every weight (FSDP2), which it loads alone, or
    of a base in 4 bits takes from the whole on the CPU; more than 1 goes with no 8 bits.
    `deepspeed`: its settings, where it divides the weights instead (ZeRO-3). `cache`: a folder
    that keeps it as quantised, for the next process. Raises `UserError` where neither a local
    folder nor the hub has such weights, or not all of them.
    """
    source = _source(name)
    config = quantization_config(quantization, compute_dtype(device))
    if config and kind in HEADED:
        with torch.device("meta"):
            blank = CLASSES[kind].from_config(_config({"name": name, "labels": labels}))
        config.llm_int8_skip_modules = heads.parts(blank)
    kept = None
    packed = config is not None and shards > 1
    if cache and config:
        made = kind, *(labels or ()), *(["packed"] if packed else [])
        kept = Path(cache) / _fingerprint(source, quantization, device, made)
    stored = kept is not None and kept.exists()
    sharding = None if packed or shards == 1 else DistributedConfig(fsdp_size=shards)
    place = torch.device("cpu") if packed else device  # what is divided may fit no GPU
    divided = zero.divides_weights(deepspeed)
    try:
        with zero.loading(deepspeed, compute_dtype(device)):
            base, told = CLASSES[kind].from_pretrained(
                kept if stored else source,
                config=None if stored else _config({"name": name, "labels": labels}),
                # A folder of ours says itself how it is quantised, and None would deny it.
                **({} if stored or not config else {"quantization_config": config}),
                dtype=compute_dtype(device),
                device_map=None if divided else {"": place},  # DeepSpeed's affair
                distributed_config=sharding,
                use_safetensors=True,
                trust_remote_code=False,  # None would ask whoever is at the terminal
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        # Transformers would put random values in the place of weights that are not there.
        odd = told["missing_keys"] | {key for key, *_ in told["mismatched_keys"]}
        if kind in HEADED:
            odd -= {key for key, _ in heads.parameters(base)}
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
    if quantization == 4 and device.type == "cpu" and not stored and not packed:
        # The same values, computed on at twice the speed. (Also, on CPUs with AVX512-BF16
        # a forward of a 4-bit layer in eval() repacks it for a kernel without autograd,
        # and what is trained on the same object afterwards has no gradients.)
        base = _dequantized(base)
    if kept and not stored:
        _keep(base, kept)
    if packed:
        base = patches.divide_packed(base, shards)
    if quantization == 8:
        patches.release_inputs(base)
    patches.forget_between_passes(base)
    return base.requires_grad_(False)


def _fingerprint(
    source: str, quantization: int, device: torch.device, kind: Sequence[str]
) -> str:
    """A name for the quantised base that changes with all that it is made of."""
    folder = Path(cached_file(source, "config.json")).parent
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    made_with = [transformers.__version__, version("bitsandbytes")]
    computes = device.type, compute_dtype(device)
    parts = [folder, stats, quantization, *computes, made_with, kind]
    return f"{folder.name}-{mix_seed(*map(str, parts)):08x}"


def _keep(base: torch.nn.Module, folder: Path) -> None:
    """Save a quantised base; its folder appears under its name only when it is complete."""
    try:
        with commit(folder) as temporary:
            base.save_pretrained(temporary)
    except Unwritable as error:  # a full disk, say; the base is in memory all the same
        if not folder.exists():  # nor did another process keep the same
            logging.warning("The quantised base was not kept: %s", error)


def build(model_cfg: Any, peft_cfg: Any, seed: int, device: torch.device) -> PeftModel:
    """The base with a fresh adapter that depends on nothing but the base and `seed`."""
    base = load_base(
        model_cfg["name"],
        model_cfg["quantization"],
        device,
        model_cfg.get("cache"),
        model_cfg.get("shards", 1),
        kind_of(peft_cfg),
        model_cfg.get("labels"),
        model_cfg.get("deepspeed"),
    )
    return _with_adapter(base, model_cfg, peft_cfg, seed)


@lru_cache(maxsize=1)
def _build_once(key: str, device: torch.device) -> tuple[PeftModel, State]:
    model = build(*json.loads(key), device)
    # Each new Trainer collects garbage, 0.3 s of looking at what lives for good anyway.
    gc.freeze()
    return model, adapter_state(model)


def build_once(
    model_cfg: Any, peft_cfg: Any, seed: int, device: torch.device
) -> PeftModel:
    """`build`, kept for the life of the process: a client's next round finds it loaded.

    Whoever takes it must set the adapter's state before use.
    """
    key = json.dumps([model_cfg, peft_cfg, seed], sort_keys=True)
    return _build_once(key, device)[0]


def capped(peft_cfg: Any, most: int) -> Settings:
    """The settings of the same LoRA with no rank above `most`. Alpha stays: the scale
    alpha / r is that of the rank."""
    made = construct(peft_cfg, "peft")
    pattern = {name: min(rank, most) for name, rank in made.rank_pattern.items()}
    return Settings(peft_cfg) | {"r": min(made.r, most), "rank_pattern": pattern}


def highest_rank(peft_cfg: Any) -> int | None:
    """Of any layer, where the method is LoRA."""
    made = construct(peft_cfg, "peft")
    if made.peft_type != "LORA":
        return None
    return max(made.r, *made.rank_pattern.values(), 1)


def set_rank(model: PeftModel, peft_cfg: Any, most: int) -> None:
    """Put a LoRA of this rank at most in the place of a model's own, on the same base.

    Whoever does that must set the adapter's state before use.
    """
    base = model.get_base_model()
    settings = _peft_settings(capped(peft_cfg, most), base)
    for part in heads.parts(base) if settings.task_type in HEADED else ():
        base.set_submodule(part, base.get_submodule(part).original_module)
    model.delete_adapter("default")
    model.add_adapter("default", settings)
    model.set_adapter("default")
    if model.device.type == "cpu":
        patches.quicken_dropout(model)


def forget() -> None:
    """Let go of the model that `build_once` keeps."""
    _build_once.cache_clear()


def first_state(
    model_cfg: Any, peft_cfg: Any, seed: int, device: torch.device
) -> State:
    """The adapter that `build_once` made, as it was before any training."""
    key = json.dumps([model_cfg, peft_cfg, seed], sort_keys=True)
    return dict(_build_once(key, device)[1])


def skeleton(model_cfg: Any, peft_cfg: Any) -> PeftModel:
    """The same model without its weights: names, shapes, settings.

    Needs the base's `config.json` only. The server keeps one to check replies against and
    to write adapter folders; it never holds the base. On the meta device, unless the method
    reads values when it begins, or saves some beside the trained ones (SHiRA's indices,
    VeRA's projections): then on the CPU, on a `stand_in`, whose weights take next to no
    memory.
    """
    return _frame(_config(model_cfg), model_cfg, peft_cfg)


def _config(model_cfg: Any) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(
        _source(model_cfg["name"]), trust_remote_code=False
    )
    if labels := model_cfg.get("labels"):
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
        text = config.get_text_config()
        if (
            text.pad_token_id is None
        ):  # by which transformers wants to find a text's end
            text.pad_token_id = 0
    return config


def kind_of(peft_cfg: Any) -> str:
    """Of which of `CLASSES` the base is."""
    return peft_cfg.get("task_type") or "CAUSAL_LM"


def _frame(config: PreTrainedConfig, model_cfg: Any, peft_cfg: Any) -> PeftModel:
    """`skeleton` of a configuration."""
    with torch.device("meta"):
        made = CLASSES[kind_of(peft_cfg)].from_config(config)
        base = made.requires_grad_(False)
    with contextlib.suppress(Exception):  # what is wrong comes up again below
        frame = _with_adapter(base, model_cfg, peft_cfg, seed=0, frame=True)
        trained = {n: p for n, p in frame.named_parameters() if p.requires_grad}
        blank = {n: torch.zeros(()).expand(p.shape) for n, p in trained.items()}
        frame.load_state_dict(blank, strict=False, assign=True)
        saved = peft.get_peft_model_state_dict(frame, save_embedding_layers=False)
        frame.load_state_dict(trained, strict=False, assign=True)
        if not any(tensor.is_meta for tensor in saved.values()):
            return frame
    base = stand_in(config, seed=1, kind=kind_of(peft_cfg))
    return _with_adapter(base, model_cfg, peft_cfg, seed=0, frame=True)


def seeded(model_cfg: Any, peft_cfg: Any, seed: int) -> State:
    """The first adapter as far as it is decided without the base, in float32 by name.

    That is `model.adapter`, or else a fresh one as far as `seed` alone decides it. What PEFT reads from the base's weights (DoRA's magnitudes) is NaN: each weight of the
    base is one NaN here that has the weight's shape and takes no room. Needs the base's
    `config.json` only. Raises `UserError` where PEFT makes no adapter on such a base.
    """
    if model_cfg.get("adapter"):
        return saved(model_cfg, peft_cfg)
    with torch.device("meta"):
        base = CLASSES[kind_of(peft_cfg)].from_config(_config(model_cfg))
    _refill(base, lambda weight: torch.full((), math.nan).expand(weight.shape))
    return adapter_state(_with_adapter(base, model_cfg, peft_cfg, seed))


def saved(model_cfg: Any, peft_cfg: Any) -> State:
    """The adapter in the folder `model.adapter`, by the names of the run's own, in float32.

    Any folder of PEFT's. Raises `UserError` where it is broken, or is another kind of adapter
    than the run trains: of another method, rank, scale, for other layers, or one that began
    by changing the base.
    """
    folder = str(local_path(model_cfg["adapter"]) or model_cfg["adapter"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(folder) / name).is_file():  # PEFT would look for it on the hub
            raise UserError(
                f"model.adapter={model_cfg['adapter']}: no {name} is there."
            )
    frame = skeleton(model_cfg, peft_cfg)
    try:
        theirs, ours = _settings(folder), frame.peft_config["default"]
        if theirs.peft_type != ours.peft_type:
            raise ValueError(
                f"it is {theirs.peft_type.value}, not {ours.peft_type.value}"
            )
        for name, value in sorted(ours.to_dict().items()):
            other = getattr(theirs, name, None)
            if name.startswith("init_"):  # of those that leave the base as it is
                differs = not {value, other} <= {True, False, None, "gaussian"}
            else:
                differs = not NO_FUNCTION.search(name) and (other or None) != (
                    value or None
                )
            if differs:
                raise ValueError(
                    f"{name} is {spelt(other)} in it, and {spelt(value)} in this run"
                )
        held = load_file(Path(folder) / "adapter_model.safetensors")
        # Each tensor that PEFT would save of the run's own, by its one value, the number of
        # the parameter that it is.
        trained = {n: p for n, p in frame.named_parameters() if p.requires_grad}
        numbered = {
            name: torch.full((), float(i)).expand(trained[name].shape)
            for i, name in enumerate(trained)
        }
        frame.load_state_dict(numbered, strict=False, assign=True)
        known = peft.get_peft_model_state_dict(frame, save_embedding_layers=False)
        if fault := mismatch(held, known):
            raise ValueError(fault)
        names = [*trained]
        if len(held) != len(names):
            raise ValueError("what it holds is not what this run trains")
        state = {names[int(known[k].flatten()[0])]: v.float() for k, v in held.items()}
        return {name: state[name] for name in trained}
    except Exception as error:  # whatever PEFT makes of a broken folder
        raise UserError(
            f"model.adapter={folder} cannot be gone on with ({one_line(str(error))})."
        ) from error


def _peft_settings(peft_cfg: Any, base: torch.nn.Module) -> peft.PeftConfig:
    """PEFT's settings, with the base's whole head among what is trained and saved."""
    settings = construct(peft_cfg, "peft")
    settings.task_type = settings.task_type or "CAUSAL_LM"
    if getattr(settings, "exclude_modules", None) == emulator.OUTER:
        settings.exclude_modules = emulator.excluded(base.config)
    if settings.task_type in HEADED:
        more = settings.modules_to_save or []
        settings.modules_to_save = [*dict.fromkeys([*more, *heads.parts(base)])]
    return settings


@patches.equal_masks_drawn_once()
def _with_adapter(
    base: torch.nn.Module,
    model_cfg: Any,
    peft_cfg: Any,
    seed: int,
    frame: bool = False,
) -> PeftModel:
    """`base` with a fresh adapter; its values are of no account where it is a `frame`."""
    if model_cfg["gradient_checkpointing"]:
        if not base.supports_gradient_checkpointing:
            raise UserError(
                f"model.gradient_checkpointing=true: {type(base).__name__} does not "
                "support it. Set model.gradient_checkpointing=false."
            )
        base.gradient_checkpointing_enable({"use_reentrant": False})
    settings = _peft_settings(peft_cfg, base)
    if settings.task_type in HEADED:
        heads.begin(base, seed)
    start = getattr(settings, "init_lora_weights", None)
    if frame and isinstance(start, str):  # PiSSA, say, would decompose the weights
        settings.init_lora_weights = True
    torch.manual_seed(seed)
    try:
        with patches.adapters_as_made():
            model = peft.get_peft_model(base, settings)
    except Exception as error:  # of any type: PEFT checks few settings by itself
        hint = ""
        if "target_modules" in str(error) and not getattr(
            settings, "target_modules", 1
        ):
            hint = " Set model.lora.target_modules=all-linear, or a list of names."
        raise UserError(
            f"{peft_cfg['_target_']} on {model_cfg['name']}: {str(error).rstrip('.')}.{hint}"
        ) from error
    if start is not None:
        model.peft_config["default"].init_lora_weights = start
    if base.device.type == "cpu":
        patches.quicken_dropout(model)
    return model


# --- the base, tried without its weights ---------------------------------------------------


def stand_in(
    config: PreTrainedConfig,
    seed: int = 0,
    whole: bool = False,
    kind: str = "CAUSAL_LM",
) -> transformers.PreTrainedModel:
    """The base of a configuration on the CPU, in its real shapes, with made-up weights.

    It computes as the real one does and takes next to no memory: a weight is a window on a
    vector of random numbers, one further on from row to row (a Hankel matrix), as long as
    rows and columns together. Not to be changed, unless it is `whole`: with a place in
    memory for each value.
    """
    with torch.device("meta"):
        base = CLASSES[kind].from_config(
            copy.deepcopy(config), dtype=torch.float32, experts_implementation="eager"
        )
    generator = torch.Generator().manual_seed(seed)

    def values(weight: torch.Tensor) -> torch.Tensor:
        window = _window(weight.shape, generator)
        return window.contiguous() if whole else window

    _refill(base, values)
    for module in base.modules():
        own = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, buffer in list(own):
            setattr(module, name, torch.zeros_like(buffer, device="cpu"))
    patches.fill_buffers(base)
    return base


def _refill(
    base: torch.nn.Module, values: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Put frozen weights with other values in the place of all; tied ones stay one."""
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in base.modules():
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        for name, old in list(own):
            if old not in made:
                made[old] = torch.nn.Parameter(values(old), requires_grad=False)
            setattr(module, name, made[old])


def _window(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) < 2:  # the weight of a norm, a bias
        return torch.rand(shape, generator=generator) + 0.5
    vector = torch.randn(sum(shape), generator=generator) * shape[-1] ** -0.5
    return vector.as_strided(shape, [1] * len(shape))


def _stored(weight: torch.Tensor) -> torch.Tensor:
    """All that is in the memory of a weight, as a vector."""
    return torch.empty(0, dtype=weight.dtype).set_(weight.untyped_storage())


def _shortened(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same with two layers."""
    layers = config.get_text_config(decoder=True).num_hidden_layers
    config = emulator.shortened(config, range(min(2, layers)))
    # Of T5 and BART, whose configuration for text above is a copy.
    for name in LAYERS if config.is_encoder_decoder else ():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(2, getattr(config, name)))
    return config


LAYERS = ("num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def rehearse(model_cfg: Any, peft_cfg: Any, seed: int, seq_length: int) -> None:
    """Try on a `stand_in` what a run does with its base, before it is done with the weights.

    That it reads text and nothing else, from left to right, `seq_length` tokens of it, and
    that an adapter that is saved and opened again gives what it gave. Two layers are tried,
    or all where the adapter is for later ones. Raises `UserError` with what fails.
    """
    name, tried = model_cfg["name"], _config(model_cfg)
    kind = kind_of(peft_cfg)
    try:
        base = stand_in(_shortened(tried), kind=kind)
        before = [(p, _stored(p).clone()) for p in base.parameters()]
        net = _with_adapter(base, model_cfg, peft_cfg, seed)
        tried = _shortened(tried)
    except Exception:  # of what a configuration of that kind makes of fewer layers
        try:
            base = stand_in(tried, kind=kind)
        except Exception:  # which says nothing of the real one
            return
        before = [(p, _stored(p).clone()) for p in base.parameters()]
        net = _with_adapter(base, model_cfg, peft_cfg, seed)
    changed = not all(torch.equal(_stored(p), values) for p, values in before)
    if changed and model_cfg["quantization"]:
        raise UserError(
            f"{peft_cfg['_target_']} changes the base's weights when it begins (as "
            "init_lora_weights=pissa does), and quantised ones cannot be. Set "
            "model.quantization=null."
        )
    if changed:  # which needs a place for each
        base = stand_in(tried, whole=True, kind=kind)
        net = _with_adapter(base, model_cfg, peft_cfg, seed)
    variants = net.active_peft_config
    if getattr(variants, "monteclora_config", None):
        raise UserError(
            "peft.monteclora_config: it needs a term of the loss that no task here has, and "
            "takes one draw after another, whoever trains. Leave it out."
        )
    velora = getattr(variants, "velora_config", None)
    if getattr(velora, "init_type", None) == "batch_average_once":
        raise UserError(
            "peft.velora_config.init_type=batch_average_once: what is trained goes by the first "
            "batch that a process has, whichever client's. Take batch_average or random."
        )
    generator = torch.Generator().manual_seed(0)
    state = {
        key: value + 0.02 * torch.randn(value.shape, generator=generator)
        for key, value in adapter_state(net).items()
    }
    set_adapter_state(net, state)
    ids = torch.arange(16).view(2, 8) % 8 + 4
    ids[1, -1] = 3
    try:
        _read(kind, net.train(), ids)
        states = _read(kind, net.eval(), ids)
    except Exception as error:
        raise UserError(
            f"model.name={name} with {peft_cfg['_target_']}: {type(net.get_base_model()).__name__} "
            f"does not run on text alone, or not with this adapter "
            f"({type(error).__name__}: {error})."
        ) from error
    if kind == "CAUSAL_LM" and not close(*states):
        raise UserError(
            f"model.name={name}: {type(net.get_base_model()).__name__} with this config.json "
            "lets a token see what comes after it, so it cannot be trained to foretell "
            "text. (BERT and its like need is_decoder: true in there.)"
        )
    if kind == "SEQ_CLS" and not _unmoved(net, ids):
        raise UserError(
            f"model.name={name}: {type(net.get_base_model()).__name__} makes something else of a "
            "text in a batch, beside longer ones, than of the text alone. Take another base."
        )
    most = getattr(tried.get_text_config(decoder=True), "max_position_embeddings", None)
    virtual = getattr(net.active_peft_config, "num_virtual_tokens", 0) or 0
    if most is None or seq_length + virtual + 8 > most:  # some skip a few positions
        try:
            _read(kind, net, torch.full((1, seq_length), 4))
        except Exception as error:
            has = f"it has {most} positions" if most else f"{error}"
            own = f" and peft.num_virtual_tokens={virtual}" if virtual else ""
            raise UserError(
                f"train.seq_length={seq_length}{own}: too long for model.name={name}: {has}. "
                "Take fewer tokens."
            ) from error
    try:
        frame = _frame(tried, model_cfg, peft_cfg)
        with tempfile.TemporaryDirectory() as folder:
            _write(frame, state, name, Path(folder))
            base = stand_in(tried, whole=changed, kind=kind)
            opened = _open(base, _settings(folder), folder)
        found = _read(kind, opened.eval(), ids)
    except Exception as error:
        raise UserError(
            f"{peft_cfg['_target_']}: what it trains could not be saved and opened again "
            f"({type(error).__name__}: {error})."
        ) from error
    if not close(found, states):
        raise UserError(
            f"{peft_cfg['_target_']}: with these settings an adapter that is saved and opened "
            "again answers otherwise than the trained one did: it keeps fixed values that are "
            "made of the base's weights, which the server does not hold, or drawn at random. "
            "For the latter set a seed, +peft.random_seed=0, if it has one."
        )


@torch.no_grad()
def _read(kind: str, net: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """What a model makes of token ids, (rows, length), before its loss."""
    if kind == "CAUSAL_LM":
        return hidden_states(net, ids)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "SEQ_2_SEQ_LM":
        inputs = decoding(net, inputs | {"labels": ids})
        del inputs["labels"]
    made = net(**inputs)
    return torch.cat([made[name] for name in made if name.endswith("logits")], dim=-1)


@torch.no_grad()
def _unmoved(net: PeftModel, ids: torch.Tensor) -> bool:
    """Whether a text's logits stay the same with padding behind it. `ids`: (rows, length)."""
    filler = net.config.get_text_config().pad_token_id
    longer = torch.nn.functional.pad(ids, (0, 5), value=filler)
    made = [
        heads.logits(net, {"input_ids": rows, "attention_mask": mask.long()})
        for rows, mask in (
            (ids, torch.ones_like(ids)),
            (longer, torch.arange(longer.shape[1]).expand_as(longer) < ids.shape[1]),
        )
    ]
    return close(*made)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    return bool((one - other).abs().max() <= 1e-3 * other.abs().max())


# Methods whose change of a weight is linear in what they train.
LINEAR = ("C3A", "FOURIERFT", "IA3", "MISS", "SHIRA", "TINYLORA", "WAVEFT")


def averages_exactly(settings: peft.PeftConfig, trained: Collection[str]) -> bool:
    """Whether a mean of such adapters does to each weight what they do to it in the mean.

    So where that is linear in the tensors that are `trained`, by name. The product B A of
    LoRA is linear in either alone; DoRA divides by the norm of a sum.
    """
    if settings.peft_type == "LORA":
        halves = {half for half in "AB" for name in trained if f"_{half}." in name}
        return len(halves) < 2 and not settings.use_dora
    bat = getattr(settings, "init_weights", None) == "bat"  # MiSS's, times the weight
    return settings.peft_type in LINEAR and not bat


@contextlib.contextmanager
def autocast(model: torch.nn.Module) -> Iterator[None]:
    """Run the float32 adapter in the base's compute type; weights keep their type."""
    device = next(model.parameters()).device
    dtype = compute_dtype(device)
    if dtype == torch.float32:
        yield
        return
    # PEFT's LoRA layers would cast inputs to float32, and autocast cast them back.
    with patches.inputs_as_they_come(model), torch.autocast(device.type, dtype):
        yield


# --- the adapter, in memory --------------------------------------------------------------


def adapter_state(model: PeftModel) -> State:
    """A copy of the trainable parameters on the CPU, in float32, by name."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with zero.whole(parameters.values()):
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True)
            for name, parameter in parameters.items()
        }


def set_adapter_state(model: PeftModel, state: State) -> None:
    """Overwrite every trainable parameter.

    Raises `Misfit` unless names and shapes fit exactly, and `UserError` for values that are
    not finite: another adapter may be fine, so that is no reason to take no more part.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with zero.whole(parameters.values(), changed=True), torch.no_grad():
        if fault := misshapen(state, parameters):
            raise Misfit(f"the adapter does not fit the base that is here: {fault}")
        if fault := mismatch(state, parameters):
            raise UserError(f"the adapter that came in is broken: {fault}")
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


@contextlib.contextmanager
def reference(model: PeftModel, cfg: Any) -> Iterator[None]:
    """The model as all training of `cfg` began: its base alone, or with `model.adapter`."""
    if not cfg.get("model", {}).get("adapter"):
        with model.disable_adapter():
            yield
        return
    held = adapter_state(model)
    set_adapter_state(
        model, _saved_once(json.dumps([cfg.model, cfg.peft], sort_keys=True))
    )
    try:
        yield
    finally:
        set_adapter_state(model, held)


@lru_cache(maxsize=1)
def _saved_once(key: str) -> State:
    return saved(*json.loads(key))


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
    template). Its tokenizer carries that template, so that a server's chat asks in the words
    of training. The folder appears under its name only when it is complete.
    """
    asking = copy.copy(tokenizer)
    kind = frame.peft_config["default"].task_type
    if kind == "CAUSAL_LM":  # others have no prompt
        asking.chat_template = templates.chat_template(about["template"], tokenizer)
    with commit(folder) as temporary:
        _write(frame, state, about["model"]["name"], temporary)
        asking.save_pretrained(temporary)
        (temporary / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def about(cfg: Any, done: int) -> dict[str, Any]:
    """What `save_adapter` notes beside an adapter of round `done`: how to ask and examine it."""
    here = ("cache", "adapter")  # folders of this machine
    settings = {name: value for name, value in cfg.model.items() if name not in here}
    settings["name"] = portable_name(settings["name"])
    train = cfg.train
    # Of a base that stands for another one, by which an adapter is plugged into that.
    told = getattr(_config(cfg.model), "emulator", None)
    return ({"emulator": told} if told else {}) | {
        "round": done,
        "seed": cfg.seed,
        "template": cfg.dataset.template,
        "model": settings,
        # As it is examined, for `test.py --file`.
        "columns": cfg.dataset.columns,
        "seq_length": train.seq_length,
        "batch_size": train.training_arguments.per_device_train_batch_size,
        "max_new_tokens": cfg.evaluate.max_new_tokens,
        "task": cfg.task,
    }


def _write(frame: PeftModel, state: State, base: str, folder: Path) -> None:
    """PEFT's own two files of an adapter: settings and weights."""
    # The skeleton's own parameters have no storage to copy into.
    frame.load_state_dict(state, strict=False, assign=True)
    frame.peft_config["default"].base_model_name_or_path = base
    frame.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    # PEFT's own card says where on this machine the base is; `reporting.export` writes one.
    (folder / "README.md").unlink(missing_ok=True)


def read_about(folder: str) -> dict[str, Any]:
    """What `save_adapter` noted beside the adapter.

    Raises `UserError` where `folder` is not a complete adapter folder of this project.
    """
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
        for name in ("adapter_config.json", ABOUT):
            if (path / name).stat().st_size > LARGEST_JSON:
                raise ValueError(f"{name} is larger than {LARGEST_JSON} bytes")
        about = json.loads((path / ABOUT).read_text())
        template, base = about["template"], about["model"]["name"]
        for name, number in ("round", about["round"]), ("seed", about.get("seed", 0)):
            if not isinstance(number, int):
                raise ValueError(f"its {name} is {number!r}")
        if template not in templates.TEMPLATES:
            raise ValueError(f"the template {template!r} is unknown")
        if about["model"]["quantization"] not in (4, 8, None):
            raise ValueError("the base is quantised to neither 4 nor 8 bits")
        for name in EXAMINED.keys() & about.keys():
            value = about[name]
            if name == "columns":
                named = {"instruction", "input", "output"}
                fits = isinstance(value, dict) and named <= value.keys()
                fits = fits and all(isinstance(c, str | None) for c in value.values())
            elif name == "task":
                fits = isinstance(value, dict) and {"_target_", "model"} <= value.keys()
            else:
                fits = type(value) is int and 1 <= value <= 2**20
            if not fits:
                raise ValueError(f"its {name} is {value!r}")
        if ".." in Path(base).parts:
            raise ValueError(f"the base {base} leads out of the project")
        emulator.read(about.get("emulator"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"--peft-path={folder}: {ABOUT} is broken ({type(error).__name__}: {error})."
        ) from error
    return about


@contextlib.contextmanager
def plugged(folder: str, full: str | None) -> Iterator[str]:
    """An adapter's folder; with `full`, one for as long as this lasts that is for that base.

    `full`: the base, a folder or a name of the hub, whose emulator the adapter in `folder` was
    trained on. Raises `UserError` where it was not, as `read_about` does.
    """
    if full is None:
        yield folder
        return
    about = read_about(folder)
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / Path(folder).resolve().name
        try:
            weights = emulator.found(full)
            others = shutil.ignore_patterns("adapter_*", ABOUT)
            shutil.copytree(folder, out, ignore=others)
            emulator.plug(Path(folder), about.pop("emulator", None), weights, out)
            about["model"]["name"] = portable_name(full)
            write_json(out / ABOUT, about)
        except Exception as error:  # whatever the libraries make of a broken folder
            raise UserError(
                f"--peft-path={folder} --full={full}: {one_line(error)}"
            ) from error
        yield str(out)


def open_adapter(
    folder: str, about: dict[str, Any], device: torch.device, unpacked: bool = False
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a saved adapter on its base, for answering, with its own tokenizer.

    `unpacked`: the base as `unpack` leaves it, once `device` has quantised it. Raises
    `UserError` where anything in `folder` is broken, does not fit the base, or names code to
    import. What can be read without the base is read before it.
    """
    try:
        part = "adapter_config.json"
        settings = _settings(folder)
        if settings.task_type != about.get("task", EXAMINED["task"])["model"]:
            raise ValueError("it is for a model of another kind than its task")
        part = "adapter_model.safetensors"
        if (told := about.get("emulator")) != _emulated(about):
            raise UserError(
                f"{about['model']['name']} is not the emulator that the adapter was trained on"
                f"{', but its base, say: plug it in with --full=...' * bool(told)}"
            )
        _compare(settings, about, folder)
        part = "the tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if settings.task_type == "CAUSAL_LM":
            templates.check_template(about["template"], tokenizer)
        part = "the base"
        base = load_base(
            about["model"]["name"],
            about["model"]["quantization"],
            device,
            kind=settings.task_type,
            labels=about["model"].get("labels"),
        )
        if settings.task_type in HEADED:  # which the base alone answers with
            heads.begin(base, about.get("seed", 0))
        if unpacked:
            base = unpack(base)
            _untie(base)
        part = "the adapter on this base"
        model = _open(base, settings, folder)
    except UserError as error:
        raise UserError(f"--peft-path={folder}: {error}") from error
    except Exception as error:  # whatever the libraries make of a broken file
        raise UserError(
            f"--peft-path={folder}: {part} cannot be used ({type(error).__name__}: {error})"
        ) from error
    return model.eval(), tokenizer


def _emulated(about: dict[str, Any]) -> Any:
    """The map of an adapter's base, if that is an emulator."""
    try:
        return getattr(_config(about["model"]), "emulator", None)
    except Exception:  # what is wrong with the base is told when it is loaded
        return about.get("emulator")


def _settings(folder: str) -> peft.PeftConfig:
    settings = peft.PeftConfig.from_pretrained(folder)
    if settings.auto_mapping or settings.task_type not in CLASSES:
        raise ValueError("it is for a model of another kind, or names code to import")
    return settings


def _compare(settings: peft.PeftConfig, about: dict[str, Any], folder: str) -> None:
    """That an adapter's settings foretell the shapes that are in its file.

    On the meta device, where a rank of 10**9 takes no memory. Methods that cannot be made
    there are compared once they are made. Raises `ValueError`.
    """
    try:
        with torch.device("meta"):
            base = CLASSES[settings.task_type].from_config(_config(about["model"]))
            settings = copy.deepcopy(settings)
            settings.base_model_name_or_path = None  # it would warn of another one
            net = peft.get_peft_model(base, settings)
            foretold = peft.get_peft_model_state_dict(net, save_embedding_layers=False)
    except Exception:  # what is wrong with the base, say, is told when it is loaded
        return
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            shape = file.get_slice(name).get_shape()
            if name in foretold and list(foretold[name].shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(shape)}, "
                    f"not {tuple(foretold[name].shape)} as its settings say"
                )


@patches.equal_masks_drawn_once()
def _open(base: torch.nn.Module, settings: peft.PeftConfig, folder: str) -> PeftModel:
    """A saved adapter on its base. Raises `ValueError` unless all of it is in use."""
    state = load_file(Path(folder) / "adapter_model.safetensors")
    # Left to itself, PEFT keeps the first values of whatever the file lacks.
    model = PeftModel.from_pretrained(base, folder, ignore_mismatched_sizes=True)
    opened = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    if fault := mismatch(state, opened):
        raise ValueError(fault)
    # And of what it renames on its way in, as a checkpoint of some architectures' own.
    same = {k: torch.equal(t.cpu(), state[k].to(t.dtype)) for k, t in opened.items()}
    if lost := [name for name in same if not same[name]]:
        raise ValueError(
            f"PEFT did not take over {len(lost)} tensors, {lost[0]} among them"
        )
    return model


def unpack(base: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same values, quantised or not, in float32 on the CPU."""
    base = base.to("cpu")
    if getattr(base, "is_quantized", False):
        base = _dequantized(base, torch.float32)
    patches.forget_quantization(base)
    return base.float()


def _dequantized(
    base: transformers.PreTrainedModel, dtype: torch.dtype | None = None
) -> transformers.PreTrainedModel:
    """`base` with plain layers in the place of quantised ones.

    GPT-2's Conv1D are quantised as linear layers, by the transposed weight, and dequantised
    they would stay such, under names that stand for the other shape in a file.
    """
    turned = [
        name
        for name, module in base.named_modules()
        if getattr(module, "source_cls", None) is Conv1D
    ]
    base = base.dequantize(dtype) if dtype else base.dequantize()
    for name in turned:
        linear = base.get_submodule(name)
        plain = Conv1D(linear.out_features, linear.in_features)
        plain.weight = torch.nn.Parameter(linear.weight.data.T.contiguous())
        plain.bias = torch.nn.Parameter(linear.bias.data)
        base.set_submodule(name, plain)
    return base


def mergeable(method: str) -> bool:
    """Whether a PEFT method (`peft_type`) is a change of the base's own weights."""
    return hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(method), "merge_and_unload")


def merge(folder: str, about: dict[str, Any], device: torch.device, out: Path) -> None:
    """Write the base with a saved adapter in its weights into `out`: a plain model.

    Into the values of the quantised base, because the adapter was trained on those; not into
    packed weights, where PEFT would quantise the sum once more. In float32, because bfloat16
    would round small changes away and turn answers where two tokens are next to equal. What
    was written is read back, and has to give what the adapter gave. Raises `UserError` where
    it does not, as `open_adapter` does, and, before anything is loaded, for a method that is
    not `mergeable`.
    """
    settings = peft.PeftConfig.from_pretrained(folder)
    method, kind = settings.peft_type, settings.task_type
    if not mergeable(method):
        raise UserError(
            f"--merge: {method.value} puts vectors of its own before the prompt's, which no "
            "weight of the base can take up. Share the adapter as it is, without --merge."
        )
    net, tokenizer = open_adapter(folder, about, device, unpacked=True)
    if kind in HEADED:  # as transformers will find the end of a text
        net.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    ids = torch.arange(4, 20).view(2, 8)
    wanted = _read(kind, net, ids)
    try:
        merged = net.merge_and_unload()
        _tie(merged)
        merged.save_pretrained(out)
        del net, merged  # of a large base there is room for one
        written = CLASSES[kind].from_pretrained(out, use_safetensors=True)
        fits = close(_read(kind, written.eval(), ids), wanted)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the libraries make of an unusual model
        raise UserError(
            f"--merge: {method.value} on this base cannot be merged ({type(error).__name__}: "
            f"{error}). Share the adapter as it is, without --merge."
        ) from error
    if not fits:
        raise UserError(
            f"--merge: {method.value} on this base gives another model when it is merged. "
            "Share the adapter as it is, without --merge."
        )


def _untie(base: transformers.PreTrainedModel) -> None:
    """Give the head weights of its own, so that an adapter can change it or the embedding."""
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        for config in (base.config, base.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False


def _tie(merged: transformers.PreTrainedModel) -> None:
    """Undo `_untie` where head and embedding are equal still."""
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if head is not None and torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
        for config in (merged.config, merged.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = True


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
