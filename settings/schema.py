"""What each setting of `conf/` may be: its type, its range, whether it may be null or changed."""

import inspect
import math
import re
from typing import Any

from utils import UserError

# Likewise, what ray.init takes.
OURS_OF_RAY = {
    "log_to_driver": "verbose",
    "logging_level": "verbose",
    "runtime_env": "main.py",
}

ANY = float("inf")

# What Hydra reads as nothing, a truth value or a number.
NO_NAME = re.compile(r"null|true|false|[\d.+-]+", re.IGNORECASE)

# What a run that goes on may have otherwise than when it was begun.
MAY_CHANGE = (
    "num_rounds",
    "resume",
    "verbose",
    "dry_run",
    "client_resources",
    "simulation",
    "tracking",
    "evaluate.choices",
    "evaluate.every_round",
    "evaluate.exact_match",
    "evaluate.max_new_tokens",
    "train.save_every_round",
    "train.round_timeout",
)

# What holds settings, and is none itself.
SECTIONS = (
    "client_resources",
    "comm",
    "dataset",
    "dataset.columns",
    "evaluate",
    "launch",
    "model",
    "model.lora",
    "partitioner",
    "peft",
    "simulation",
    "simulation.init_args",
    "strategy",
    "tracking",
    "train",
    "train.training_arguments",
)

TEXTS = (
    "model.name",
    "dataset.name",
    "dataset.path",
    "dataset.test_path",
    "dataset.label",
    "dataset.template",
    "dataset.columns.instruction",
    "dataset.columns.input",
    "dataset.columns.output",
    "evaluate.choices",
    "partitioner._target_",
    "partitioner.partition_by",
    "peft._target_",
    "strategy._target_",
    "tracking._target_",
    "resume",
)

MAY_BE_NULL = (
    "dataset.name",
    "dataset.path",
    "dataset.test_path",
    "dataset.label",
    "dataset.columns.input",
    "evaluate.choices",
    "partitioner.num_clusters",
    "partitioner.num_partitions",
    "partitioner.partition_by",
    "resume",
    "strategy.clip_norm",
    "strategy.max_weight",
    "train.round_timeout",
    "train.training_arguments.learning_rate",
    "train.training_arguments.neftune_noise_alpha",
    "train.training_arguments.max_grad_norm",
    "train.training_arguments.weight_decay",
)


def check_values(cfg: dict[str, Any]) -> None:
    """Each setting by itself: its type and its range."""
    for key in SECTIONS:
        if not isinstance(value := _at(cfg, key), dict):
            raise UserError(f"{key}={value}: it holds settings, and is none itself.")
    for key in TEXTS:
        value = _at(cfg, key)
        if value is None and key in MAY_BE_NULL:
            continue
        if not isinstance(value, str) or not value:
            number = not isinstance(value, str) and is_number(value)
            hint = f" A number takes quotes: {key}='\"{value}\"'" if number else ""
            raise UserError(f"{key}={value}: text is needed.{hint}")
    whole = int
    for key, kind, low, high in (
        ("num_clients", whole, 1, 1_000_000),
        ("num_rounds", whole, 1, ANY),
        ("seed", whole, 0, 2**32 - 1),
        ("client_resources.num_cpus", float, 1, ANY),
        ("client_resources.num_gpus", float, 0, ANY),
        ("launch.processes", whole, 1, ANY),
        ("model.lora.peft_lora_r", whole, 1, ANY),
        ("model.lora.peft_lora_alpha", float, 1e-9, ANY),
        ("model.lora.peft_lora_dropout", float, 0, 0.99),
        ("partitioner.num_clusters", whole, 1, 1000),
        ("partitioner.num_partitions", whole, 1, 1_000_000),  # as num_clients
        ("strategy.fraction_fit", float, 1e-9, 1),
        ("strategy.fraction_evaluate", float, 0, 1),
        ("strategy.min_fit_replies", whole, 1, ANY),
        ("strategy.max_round_retries", whole, 0, ANY),
        ("strategy.clip_norm", float, 1e-9, ANY),
        ("strategy.max_weight", whole, 1, ANY),
        ("train.save_every_round", whole, 1, ANY),
        ("train.round_timeout", float, 1, ANY),
        ("train.min_records", whole, 1, ANY),
        ("train.seq_length", whole, 2, ANY),
        ("train.learning_rate_max", float, 0, ANY),
        ("train.learning_rate_min", float, 0, ANY),
        ("evaluate.every_round", whole, 0, ANY),
        ("evaluate.max_new_tokens", whole, 1, ANY),
        ("evaluate.holdout", float, 0.01, 0.9),
        ("train.training_arguments.per_device_train_batch_size", whole, 1, ANY),
        ("train.training_arguments.gradient_accumulation_steps", whole, 1, ANY),
        ("train.training_arguments.max_steps", whole, -1, ANY),
        ("train.training_arguments.num_train_epochs", float, 1e-9, ANY),
        ("train.training_arguments.learning_rate", float, 1e-12, ANY),
        ("train.training_arguments.neftune_noise_alpha", float, 1e-9, ANY),
        ("train.training_arguments.max_grad_norm", float, 0, ANY),
        ("train.training_arguments.weight_decay", float, 0, ANY),
    ):
        value = _at(cfg, key)
        if value is None and key in MAY_BE_NULL:
            continue
        if not is_number(value) or (kind is whole and not isinstance(value, int)):
            raise UserError(
                f"{key}={value}: a {'whole ' if kind is whole else ''}number is needed."
            )
        if not low <= value <= high:
            bounds = (
                f"above 0 and up to {high}" if low == 1e-9 else f"{low:g} to {high}"
            )
            bounds = f"{low:g} or more" if high == ANY and low != 1e-9 else bounds
            raise UserError(f"{key}={value}: it must be {bounds}.")
    for key, allowed in (
        ("mode", ("federated", "centralized", "local")),
        ("model.quantization", (4, 8, None)),
        ("model.use_fast_tokenizer", (True, False)),
        ("model.gradient_checkpointing", (True, False, "auto")),
        ("train.padding_side", ("left", "right")),
        ("comm.dtype", ("float32", "float16", "int8")),
        ("strategy.weighted_by", ("examples", "records")),
        ("verbose", (True, False)),
        ("dry_run", (True, False)),
        ("launch.sharded", (True, False)),
        ("evaluate.exact_match", (True, False)),
    ):
        value = _at(cfg, key)
        # By type as well: 1 equals True, and 4.0 equals 4.
        if not any(value == one and type(value) is type(one) for one in allowed):
            names = ["null" if one is None else str(one).lower() for one in allowed]
            raise UserError(
                f"{key}={value}: take {', '.join(names[:-1])} or {names[-1]}."
            )
    for name, value in cfg["simulation"]["init_args"].items():
        key = f"simulation.init_args.{name}"
        if name in OURS_OF_RAY:
            raise UserError(f"{key} is set by {OURS_OF_RAY[name]} here.")
        if name == "address" and not isinstance(value, str):
            raise UserError(f"{key}={value}: take local, auto or host:port.")
    low, high = (cfg["train"][f"learning_rate_{name}"] for name in ("min", "max"))
    if low > high:
        raise UserError(
            f"train.learning_rate_min={low} is above train.learning_rate_max={high}."
        )


def _at(cfg: dict[str, Any], key: str) -> Any:
    """The value at a dotted key, or None where there is none."""
    value: Any = cfg
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def is_number(value: Any) -> bool:
    kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    return kind and math.isfinite(value)


def check_kinds(path: str, settings: dict[str, Any], made: type) -> None:
    """That a number, or true or false, stands where the constructor of `made` defaults to one
    and takes no word in its place."""
    for name, parameter in inspect.signature(made).parameters.items():
        value = settings.get(name)
        if value is None or re.search(r"\bstr\b|Literal", str(parameter.annotation)):
            continue
        if isinstance(parameter.default, bool) and not isinstance(value, bool):
            raise UserError(f"{path}.{name}={value}: take true or false.")
        if is_number(parameter.default) and not is_number(value):
            raise UserError(f"{path}.{name}={value}: a number is needed.")
