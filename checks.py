"""Everything that can be known to be wrong before anything slow starts.

The quickest checks come first, and a library is imported only where it is needed: the
commonest mistakes are answered in a second or two.
"""

import dataclasses
import difflib
import inspect
import math
import os
import re
import shlex
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from utils import PROJECT, UserError, compose, flat, local_path

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
    "resume",
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
    import tracking

    cfg = resolve(config)
    check_values(cfg)
    tracking.make(cfg["tracking"])  # whose library has to be here
    if not (cfg["dry_run"] or deployed):
        address = cfg["simulation"]["init_args"]["address"]
        if address == "local":
            check_machine(cfg["client_resources"])
        else:
            check_cluster(address)
    check_launch(cfg)
    check_strategy(cfg)
    check_training_arguments(cfg)
    if deployed and cfg["mode"] != "federated":
        raise UserError(
            f"mode={cfg['mode']} is a baseline for simulations: the data of a federation "
            "cannot be pooled, and its nodes need no server to train alone."
        )
    settle_mode(cfg)
    by_epochs = cfg["train"]["training_arguments"]["max_steps"] < 1
    if not deployed and (by_epochs or not cfg["dry_run"]):  # a plan by steps needs none
        import dataset

        dataset.check(cfg)
    check_model(cfg, weights=not (cfg["dry_run"] or deployed))
    if cfg["resume"]:
        check_progress(cfg, Path(cfg["resume"]))
    return cfg


def resumed(folder: str, overrides: list[str]) -> tuple[DictConfig, list[str]]:
    """The configuration of the run in `folder` as `overrides` change it, and what makes it.

    Raises `UserError` where there is no run, or where more is changed than a run can go on
    with and still be the one that it was.
    """
    if not isinstance(folder, str):
        raise UserError(f"resume={folder}: the folder of a run is needed.")
    saved = Path(folder) / ".hydra"
    try:
        before = OmegaConf.load(saved / "config.yaml")
        begun_with = OmegaConf.load(saved / "overrides.yaml")
        if not (isinstance(before, DictConfig) and isinstance(begun_with, ListConfig)):
            raise ValueError(f"{saved} holds something else")
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(
            f"resume={folder}: no run to go on with is here ({error}). Give the folder "
            "that the run named as its results, outputs/<date>/<time>."
        ) from error
    ours = ("resume=", "hydra.")
    chosen = [str(override) for override in [*begun_with, *overrides]]
    chosen = [override for override in chosen if not override.startswith(ours)]
    config = compose(shlex.join([*chosen, f"resume={folder}"]))
    old, new = flat(resolve(before)), flat(resolve(config))
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


def check_choices(words: list[str]) -> None:
    """Raise `UserError` for what Hydra answers with a traceback: a choice that is no name."""
    for word in words:
        group, _, choice = word.partition("=")
        folder = PROJECT / "conf" / group
        if word.startswith("="):
            raise UserError(f"{word}: the name of a setting is missing.")
        if folder.is_dir() and NO_NAME.fullmatch(choice):
            names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
            raise UserError(f"{word}: {group} is one of {names}.")


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
    for key in SECTIONS:
        if not isinstance(value := _at(cfg, key), dict):
            raise UserError(f"{key}={value}: it holds settings, and is none itself.")
    for key in TEXTS:
        value = _at(cfg, key)
        if value is None and key in MAY_BE_NULL:
            continue
        if not isinstance(value, str) or not value:
            number = not isinstance(value, str) and _is_number(value)
            hint = f" A number takes quotes: {key}='\"{value}\"'" if number else ""
            raise UserError(f"{key}={value}: text is needed.{hint}")
    whole = int
    for key, kind, low, high in (
        ("num_clients", whole, 1, ANY),
        ("num_rounds", whole, 1, ANY),
        ("seed", whole, 0, 2**32 - 1),
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
        ("evaluate.every_round", whole, 0, ANY),
        ("evaluate.max_new_tokens", whole, 1, ANY),
        ("evaluate.holdout", float, 0.01, 0.9),
        ("train.training_arguments.per_device_train_batch_size", whole, 1, ANY),
        ("train.training_arguments.gradient_accumulation_steps", whole, 1, ANY),
        ("train.training_arguments.max_steps", whole, -1, ANY),
        ("train.training_arguments.num_train_epochs", float, 1e-9, ANY),
        ("train.training_arguments.learning_rate", float, 1e-12, ANY),
    ):
        value = _at(cfg, key)
        if value is None and key in MAY_BE_NULL:
            continue
        if not _is_number(value) or (kind is whole and not isinstance(value, int)):
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


def _is_number(value: Any) -> bool:
    kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    return kind and math.isfinite(value)


def check_kinds(path: str, settings: dict[str, Any], made: type) -> None:
    """That a number, or true or false, stands where the constructor of `made` defaults to one."""
    for name, parameter in inspect.signature(made).parameters.items():
        value = settings.get(name)
        if value is None:
            continue
        if isinstance(parameter.default, bool) and not isinstance(value, bool):
            raise UserError(f"{path}.{name}={value}: take true or false.")
        if _is_number(parameter.default) and not _is_number(value):
            raise UserError(f"{path}.{name}={value}: a number is needed.")


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

    node = cfg["strategy"]
    check_kinds("strategy", node, type(strategy.build(node)))
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


def settle_mode(cfg: dict[str, Any]) -> None:
    """Put into the other settings what a baseline means: the same steps, differently spent.

    centralized: in a round one client takes all the steps of a cohort, on everybody's data.
    local: all clients take their steps in every round, and nobody sees another's.
    """
    import strategy

    if cfg["mode"] == "federated":
        return
    clients, node = cfg["num_clients"], cfg["strategy"]
    arguments = cfg["train"]["training_arguments"]
    cohort = strategy.cohort_size(clients, node["fraction_fit"])
    ours = {name: node[name] for name in strategy.OURS}
    ours |= {"fraction_fit": 1.0, "min_fit_replies": 1, "clip_norm": None}
    if cfg["mode"] == "centralized":
        ours["fraction_fit"] = 1 / clients
        arguments["num_train_epochs"] *= cohort / clients
        arguments["max_steps"] *= cohort if arguments["max_steps"] > 0 else 1
    # The mean of one is the one.
    cfg["strategy"] = {"_target_": "flwr.serverapp.strategy.FedAvg", **ours}


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
    check_kinds(
        "train.training_arguments",
        cfg["train"]["training_arguments"],
        TrainingArguments,
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
    from huggingface_hub.errors import HFValidationError
    from safetensors import SafetensorError, safe_open

    import dataset
    import model

    name = cfg["model"]["name"]
    path = local_path(name)
    if path and weights and not list(path.glob("*.safetensors")):
        raise UserError(
            f"model.name={name}: the folder {path} holds no .safetensors file. "
            "Save the model with save_pretrained(folder, safe_serialization=True)."
        )
    for file in path.glob("*.safetensors") if path and weights else ():
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"model.name={name}: {file} is broken ({error})."
            ) from error
    try:
        settle_checkpointing(cfg)
        frame = model.skeleton(cfg["model"], cfg["peft"])
        if cfg["dry_run"]:
            return
        tokenizer = model.load_tokenizer(name, cfg["model"]["use_fast_tokenizer"])
    except UserError:
        raise
    except Exception as error:  # whatever a library makes of a broken file
        found = path is not None
        with suppress(HFValidationError):
            found |= isinstance(try_to_load_from_cache(name, "config.json"), str)
        if found:
            raise UserError(f"model.name={name}: {error}") from error
        raise UserError(
            f"model.name={name} is neither a local folder nor reachable on the hub. Check "
            "the name, the network and, for a gated model, `hf auth login`."
        ) from error
    if not any(p.numel() for p in frame.parameters() if p.requires_grad):
        raise UserError(
            f"{cfg['peft']['_target_']} with these settings trains nothing."
        )
    question = {"instruction": "", "input": ""}
    dataset.prompt(cfg["dataset"]["template"], [question], tokenizer)


def check_progress(cfg: dict[str, Any], folder: Path) -> None:
    """That what a run has left in `folder` can be read, fits, and is not all of it."""
    import checkpoint
    import journal
    import model

    if (newest := checkpoint.newest(folder)) is None:
        return
    state, done = checkpoint.read(newest)[:2]
    journal.read_rounds(folder, done)
    journal.read_before(folder)
    frame = model.skeleton(cfg["model"], cfg["peft"])
    expected = {n: p for n, p in frame.named_parameters() if p.requires_grad}
    for adapter in journal.adapters(cfg, state).values():
        if fault := model.mismatch(adapter, expected):
            raise UserError(
                f"resume={folder}: {newest} does not fit the base: {fault}."
            )
    if cfg["num_rounds"] < done:
        raise UserError(
            f"resume={folder}: {done} rounds are done, and num_rounds="
            f"{cfg['num_rounds']}. Set num_rounds={done} or more."
        )


def settle_checkpointing(cfg: dict[str, Any]) -> None:
    """Put true or false in the place of `model.gradient_checkpointing=auto`."""
    if cfg["model"]["gradient_checkpointing"] == "auto":
        import plan

        cfg["model"]["gradient_checkpointing"] = plan.needs_checkpointing(cfg)
