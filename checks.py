"""Everything that can be known to be wrong before anything slow starts.

The quickest checks come first, and a library is imported only where it is needed: the
commonest mistakes are answered in a second or two.
"""

import dataclasses
import difflib
import os
import shlex
import socket
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from utils import UserError, compose, local_path

# What TrainingArguments takes, but this app sets itself, and where it is set instead.
OURS = {
    "output_dir": "hydra.run.dir",
    "seed": "seed",
    "data_seed": "seed",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "train_sampling_strategy": "seed",
    "remove_unused_columns": "dataset.columns",
    "disable_tqdm": "verbose",
    "use_cpu": "client_resources.num_gpus",
    "fsdp": "launch=fsdp",
    "fsdp_config": "launch=fsdp",
    "deepspeed": "launch=fsdp",
}
# Likewise, what ray.init takes.
OURS_OF_RAY = {
    "log_to_driver": "verbose",
    "logging_level": "verbose",
    "runtime_env": "main.py",
}
ANY = float("inf")
# What a run that goes on may have otherwise than when it was begun.
MAY_CHANGE = (
    "num_rounds",
    "resume",
    "verbose",
    "dry_run",
    "client_resources",
    "simulation",
    "evaluate.exact_match",
    "evaluate.max_new_tokens",
    "train.save_every_round",
    "train.round_timeout",
)
MAY_BE_NULL = (
    "strategy.clip_norm",
    "train.round_timeout",
    "train.training_arguments.learning_rate",
)


def check(config: DictConfig, deployed: bool = False) -> dict[str, Any]:
    """Resolve the configuration and hold it against this machine and its data.

    `deployed`: this is the server of a federation, where data, devices and the base's
    weights are the nodes' own affair. Returns the configuration as a plain dict. Raises
    `UserError` with what is wrong and what to do.
    """
    cfg = resolve(config)
    check_values(cfg)
    if not (cfg["dry_run"] or deployed):
        address = cfg["simulation"]["init_args"]["address"]
        if address == "local":
            check_machine(cfg["client_resources"])
        else:
            check_cluster(address)
    check_launch(cfg)
    check_strategy(cfg)
    check_training_arguments(cfg)
    by_epochs = cfg["train"]["training_arguments"]["max_steps"] < 1
    if not deployed and (by_epochs or not cfg["dry_run"]):  # a plan by steps needs none
        import dataset

        dataset.check(cfg)
    check_model(cfg, weights=not (cfg["dry_run"] or deployed))
    return cfg


def resumed(folder: str, overrides: list[str]) -> tuple[DictConfig, list[str]]:
    """The configuration of the run in `folder` as `overrides` change it, and what makes it.

    Raises `UserError` where there is no run, or where more is changed than a run can go on
    with and still be the one that it was.
    """
    saved = Path(folder) / ".hydra"
    try:
        before = OmegaConf.load(saved / "config.yaml")
        begun_with = list(OmegaConf.load(saved / "overrides.yaml"))
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(
            f"resume={folder}: no run to go on with is here ({error}). Give the folder "
            "that the run named as its results, outputs/<date>/<time>."
        ) from error
    ours = ("resume=", "hydra.")
    chosen = [o for o in [*begun_with, *overrides] if not o.startswith(ours)]
    config = compose(shlex.join([*chosen, f"resume={folder}"]))
    OmegaConf.resolve(before)
    old, new = _flat(before), _flat(config)
    changed = [
        f"{key} was {old.get(key)} and would be {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"resume={folder}: a run goes on as it was begun. {'; '.join(changed)}. What "
            f"may change: {', '.join(MAY_CHANGE)}."
        )
    return config, chosen


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their dotted keys."""
    if not isinstance(node, DictConfig):
        return {path: node}
    parts = (_flat(value, f"{path}.{key}".lstrip(".")) for key, value in node.items())
    return {key: value for part in parts for key, value in part.items()}


def resolve(config: DictConfig) -> dict[str, Any]:
    """The configuration as a plain dict. Raises `UserError` where it has gaps."""
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key} must be given: {error.full_key}=..."
        ) from None
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {error.msg}") from None


def check_values(cfg: dict[str, Any]) -> None:
    """Each setting by itself: its type and its range."""
    whole = int
    for key, kind, low, high in (
        ("num_clients", whole, 1, ANY),
        ("num_rounds", whole, 1, ANY),
        ("seed", whole, 0, ANY),
        ("client_resources.num_cpus", float, 1, ANY),
        ("client_resources.num_gpus", float, 0, ANY),
        ("launch.processes", whole, 1, ANY),
        ("model.lora.peft_lora_r", whole, 1, ANY),
        ("model.lora.peft_lora_alpha", float, 1e-9, ANY),
        ("model.lora.peft_lora_dropout", float, 0, 0.99),
        ("strategy.fraction_fit", float, 1e-9, 1),
        ("strategy.fraction_evaluate", float, 0, 1),
        ("strategy.min_fit_replies", whole, 1, ANY),
        ("strategy.max_round_retries", whole, 0, ANY),
        ("strategy.clip_norm", float, 1e-9, ANY),
        ("train.save_every_round", whole, 1, ANY),
        ("train.round_timeout", float, 1, ANY),
        ("train.min_records", whole, 1, ANY),
        ("train.seq_length", whole, 2, ANY),
        ("train.learning_rate_max", float, 0, ANY),
        ("train.learning_rate_min", float, 0, ANY),
        ("evaluate.max_new_tokens", whole, 1, ANY),
        ("evaluate.holdout", float, 0.01, 0.9),
        ("train.training_arguments.per_device_train_batch_size", whole, 1, ANY),
        ("train.training_arguments.gradient_accumulation_steps", whole, 1, ANY),
        ("train.training_arguments.max_steps", whole, -1, ANY),
        ("train.training_arguments.num_train_epochs", float, 1e-9, ANY),
        ("train.training_arguments.learning_rate", float, 1e-12, ANY),
    ):
        value: Any = cfg
        for part in key.split("."):
            value = value.get(part)
        if value is None and key in MAY_BE_NULL:
            continue
        kinds = (int,) if kind is whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise UserError(
                f"{key}={value}: a {'whole ' if kind is whole else ''}number is needed."
            )
        if not low <= value <= high:
            bounds = (
                f"above 0 and up to {high:g}" if low == 1e-9 else f"{low:g} to {high:g}"
            )
            bounds = f"{low:g} or more" if high == ANY and low != 1e-9 else bounds
            raise UserError(f"{key}={value}: it must be {bounds}.")
    for key, value, allowed in (
        ("model.quantization", cfg["model"]["quantization"], (4, 8, None)),
        ("train.padding_side", cfg["train"]["padding_side"], ("left", "right")),
        ("comm.dtype", cfg["comm"]["dtype"], ("float32", "float16", "int8")),
        ("verbose", cfg["verbose"], (True, False)),
        ("dry_run", cfg["dry_run"], (True, False)),
        ("launch.sharded", cfg["launch"]["sharded"], (True, False)),
        ("evaluate.exact_match", cfg["evaluate"]["exact_match"], (True, False)),
        (
            "model.gradient_checkpointing",
            cfg["model"]["gradient_checkpointing"],
            (True, False, "auto"),
        ),
    ):
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


def check_machine(resources: dict[str, float]) -> None:
    """That at least one client fits this machine."""
    import torch

    gpus, cpus = resources["num_gpus"], resources["num_cpus"]
    if gpus > 0 and not torch.cuda.is_available():
        raise UserError(
            f"client_resources.num_gpus={gpus:g}, but there is no CUDA device here. To try "
            "the app without one: python main.py experiment=quickstart. To train on the "
            "CPU: client_resources.num_gpus=0"
        )
    if gpus > torch.cuda.device_count():
        raise UserError(
            f"client_resources.num_gpus={gpus:g}, but there are only "
            f"{torch.cuda.device_count()} CUDA devices here."
        )
    if cpus > (here := os.cpu_count() or 1):
        raise UserError(
            f"client_resources.num_cpus={cpus:g}, but this machine has {here} CPUs: no "
            f"client would ever start. Set client_resources.num_cpus={here} or less."
        )


def check_cluster(address: str) -> None:
    """That something answers where a Ray cluster is to be joined.

    Ray by itself would look for more than a minute.
    """
    from ray._private.services import canonicalize_bootstrap_address

    try:
        host, _, port = canonicalize_bootstrap_address(address).rpartition(":")
        socket.create_connection((host, int(port)), timeout=3).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"simulation.init_args.address={address}: no Ray cluster answers there. Start "
            "one with `ray start --head`, and give host:port of its head, or auto for the "
            "one that RAY_ADDRESS names or this machine belongs to. local needs none."
        ) from error


def check_nodes(resources: dict[str, float], nodes: list[dict[str, Any]]) -> None:
    """That one of Ray's nodes, as `ray.nodes()` tells them, has room for a client."""
    cpus, gpus = resources["num_cpus"], resources["num_gpus"]
    rooms = [
        (node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        for node in nodes
        if node["Alive"]
    ]
    if not any(room[0] >= cpus and room[1] >= gpus for room in rooms):
        have = ", ".join(f"{room[0]:g} and {room[1]:g}" for room in rooms)
        raise UserError(
            f"client_resources: {cpus:g} CPUs and {gpus:g} GPUs fit no node of Ray's; they "
            f"have {have}. No client would ever start: ask for less, or add a node."
        )


def check_launch(cfg: dict[str, Any]) -> None:
    """That each process of a client has its own GPU, or none, and what it needs of the base."""
    processes = cfg["launch"]["processes"]
    gpus = cfg["client_resources"]["num_gpus"]
    if gpus not in (0, processes) and max(gpus, processes) > 1:
        raise UserError(
            f"client_resources.num_gpus={gpus:g}, but launch.processes={processes}: each "
            "process takes one GPU. Set both to the same number (above 1 with launch=ddp or "
            "launch=fsdp), or client_resources.num_gpus=0."
        )
    if processes == 1 or not cfg["launch"]["sharded"]:
        return
    if bits := cfg["model"]["quantization"]:
        raise UserError(
            f"launch=fsdp with model.quantization={bits}: a quantised base cannot be "
            "sharded. Set model.quantization=null, or launch=ddp, which holds it whole on "
            "every GPU."
        )
    kind = cfg["peft"]["_target_"].removeprefix("peft.")
    whole = "DoRA" if cfg["peft"].get("use_dora") else kind
    if whole in ("DoRA", "PromptTuningConfig", "PromptEncoderConfig"):
        raise UserError(
            f"launch=fsdp: {whole} reads weights of the base that no process has whole. "
            "Take peft=lora, rslora, ia3 or prefix, or launch=ddp."
        )


def check_strategy(cfg: dict[str, Any]) -> None:
    """That the strategy takes its settings and gets as many replies as it needs."""
    import strategy

    strategy.build(cfg["strategy"])
    node = cfg["strategy"]
    cohort = strategy.cohort_size(cfg["num_clients"], node["fraction_fit"])
    if cohort < node["min_fit_replies"]:
        raise UserError(
            f"strategy.min_fit_replies={node['min_fit_replies']}, but strategy.fraction_fit="
            f"{node['fraction_fit']} of num_clients={cfg['num_clients']} are {cohort} "
            "clients a round."
        )
    if not node["_target_"].endswith(".Bulyan"):
        return
    needed = 4 * node["num_malicious_nodes"] + 3
    if cohort < needed:
        raise UserError(
            f"strategy.fraction_fit={node['fraction_fit']} of num_clients="
            f"{cfg['num_clients']} are {cohort} clients a round; Bulyan with "
            f"num_malicious_nodes={node['num_malicious_nodes']} needs {needed}."
        )


def check_training_arguments(cfg: dict[str, Any]) -> None:
    """That `TrainingArguments` takes each of `train.training_arguments`."""
    from transformers import TrainingArguments

    import client

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in cfg["train"]["training_arguments"]:
        key = f"train.training_arguments.{name}"
        if name in OURS:
            raise UserError(f"{key} is set by {OURS[name]} here.")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(
                f"{key}: transformers.TrainingArguments has no such field.{hint}"
            )
    try:
        client.training_arguments(cfg, 1, 0)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"train.training_arguments: {error}") from error


def check_model(cfg: dict[str, Any], weights: bool) -> None:
    """That the base can be found and takes this adapter; needs its `config.json` only.

    `weights`: they and the tokenizer are needed here. Settles
    `model.gradient_checkpointing=auto` on the way.
    """
    from huggingface_hub import try_to_load_from_cache

    import dataset
    import model

    name = cfg["model"]["name"]
    path = local_path(name)
    if path and weights and not list(path.glob("*.safetensors")):
        raise UserError(
            f"model.name={name}: the folder {path} holds no .safetensors file. "
            "Save the model with save_pretrained(folder, safe_serialization=True)."
        )
    try:
        settle_checkpointing(cfg)
        model.skeleton(cfg["model"], cfg["peft"])
        if cfg["dry_run"]:
            return
        tokenizer = model.load_tokenizer(name, cfg["model"]["use_fast_tokenizer"])
    except (OSError, ValueError) as error:
        if path or isinstance(try_to_load_from_cache(name, "config.json"), str):
            raise UserError(f"model.name={name}: {error}") from error
        raise UserError(
            f"model.name={name} is neither a local folder nor reachable on the hub. Check "
            "the name, the network and, for a gated model, `hf auth login`."
        ) from error
    question = {"instruction": "", "input": ""}
    dataset.prompt(cfg["dataset"]["template"], [question], tokenizer)


def settle_checkpointing(cfg: dict[str, Any]) -> None:
    """Put true or false in the place of `model.gradient_checkpointing=auto`."""
    if cfg["model"]["gradient_checkpointing"] == "auto":
        import plan

        cfg["model"]["gradient_checkpointing"] = plan.needs_checkpointing(cfg)
