"""What a node of a federation allows, whatever a run says: its data, its base, its device.

The code of a run comes in the bundle that `flwr run` sends, and has to be trusted. Its
settings need not be: they may choose among what the bundle's `conf/` lists and no more, and
what belongs to the node is read from the node's own `--node-config` alone.
"""

import copy
import logging
import os
import re
import shlex
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from flwr.app import Message, RecordDict
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import utils
from settings import schema
from settings.compose import decided, resolve
from utils import (
    HUB_NAME,
    PROJECT,
    REFERENCE,
    Refusal,
    Settings,
    UserError,
    flat,
    mix_seed,
)

# Every key that `--node-config` may hold, and its type.
SETTINGS: dict[str, type] = {
    "data-path": str,  # a json, jsonl, csv or parquet file, or a folder of them
    "column-instruction": str,
    "column-input": str,  # "" where the records have none
    "column-output": str,
    "column-messages": str,  # of conversations, in the place of the three
    "column-rejected": str,  # of answers that are worse than the output
    "column-desirable": str,  # whether the output is a good answer
    "model-name": str,  # the only base, by the name that runs give it, to take part with
    "model-path": str,  # the folder where this node keeps the base
    "device": str,  # cpu, cuda, or cuda:1
    "cpus": int,  # threads for one client; all that there are unless given
    "processes": int,  # that train one client together, a GPU each (conf/launch)
    "rendezvous": str,  # host:port, where those of its other machines come (docs/launch.md)
    "keep-alive": int,  # seconds that its trainer waits for a message; 0: one for each
    "rank": int,  # the highest of its adapter, where a run takes others than its own
    "cache-path": str,  # where the quantised base is kept between messages
    "personal-path": str,  # the folder for the adapter of this node's own at a run's end
    "least-sum": int,  # clients whose updates it lets be added, with nobody's known alone
    "partition-id": int,  # without data of its own: its share of the run's dataset
    "num-partitions": int,
    "epsilon": float,  # the most that all runs together may tell of each of its records
    "delta": float,  # at which that is, 1e-5 unless given
    "tell-epsilon": bool,  # tell the server what its records have spent in the run
}

CONF = PROJECT / "conf"

CACHE = "~/.cache/llm-flowertune"

# What a run may ask of a node at most, where the node's settings say nothing else.
CEILINGS = {
    "max-tokens": 100_000_000,  # a round: examples x train.seq_length
    "max-batch-tokens": 2**18,  # at a time: examples x train.seq_length
    "max-rank": 1024,  # of an adapter; also its virtual tokens and hidden sizes
}

# Of `peft`'s numbers those that take no room, however large: factors and seeds.
NO_SIZE = ("lora_alpha", "scaling", "random_seed", "random_loc_seed")

SETTINGS |= dict.fromkeys(CEILINGS, int)

KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text in quotes",
}

# What a run's overrides may hold, and what one value may be.
LONGEST = 20_000  # characters of all overrides

LARGEST = 2**32  # of a number, up or down; seeds end here

MORE = (
    "does more than give a plain value to a setting of conf/: put it into a file of conf/ "
    "and choose that, experiment=mine"
)

RUN_NAME = re.compile(r"[^\w-]")  # what a name may not hold that becomes a folder's

# PEFT matches names of modules by regular expressions, which can take for ever.
MODULE_NAME = re.compile(r"[\w.-]*", re.ASCII)

Plain = str | int | float | bool | None


class Overrides(NamedTuple):
    """What a run's overrides say, parsed: nothing reads their text again."""

    choices: dict[str, str]  # a file's name for each group of conf/
    values: dict[str, Plain | list[Plain]]  # by dotted key


def settle(
    told: dict[str, Any], node_config: dict[str, Any], simulated: bool = False
) -> tuple[dict[str, Any], int]:
    """The configuration that this node trains with, and its partition.

    `told`: the run's `overrides`, and its name, `run`, as the server sends them with every
    message. `simulated`: the node is one of a simulation, where there is no operator but
    the user. Of a real node's, this moves its working directory into the bundle. Raises
    `Refusal` where the run asks for what the node does not allow, or the node has less than
    the run needs.
    """
    overrides = Overrides({}, {})
    try:
        own = check_settings(node_config)
        choose_device(own.get("device"))
        from methods import aggregate, privacy

        overrides = parse(str(told["overrides"]))
        cfg = schema.validated(resolve(compose(overrides)))
        # Pooled, the data would be read num_clients times.
        if cfg.baseline:
            raise Refusal("mode is a baseline's, which is for simulations")
        if cfg.audit.canaries:
            raise Refusal("audit.canaries would plant records among its own")
        if "least-sum" in own:
            if not cfg.privacy.secure_aggregation:
                raise Refusal("it takes part in sums only: its least-sum")
            cfg["least_sum"] = own["least-sum"]
        partition = choose_partition(cfg, own)
        if not simulated:
            # A relative name means something of the bundle, and nothing of the node's.
            os.chdir(PROJECT)
            cfg.model["name"] = choose_base(cfg.model.name, own)
            cfg.model["adapter"] = (
                None  # a folder of the server's, which sends what it holds
            )
            cfg["dataset"] = choose_data(cfg.dataset, own)
        cache = Path(own["cache-path"])
        cfg.model["cache"] = str(cache)
        # Two nodes of one machine may share the folder, but not their data.
        share = mix_seed(str(cfg.dataset.path), partition)
        run = RUN_NAME.sub("_", str(told["run"]))[:100]
        run = f"{run}-{share:08x}"
        cfg["residuals"] = str(cache / "runs" / run)
        settle_privacy(cfg, own, partition, simulated)
        # Without, its own adapter stays in parts among what it keeps between rounds.
        place = own.get("personal-path")
        cfg["personal_path"] = place and str(Path(place) / run)
        if not cfg.verbose:
            utils.quiet()
        if not utils.local_path(cfg.model.name):
            utils.offline_if_unreachable()
        settle_resources(cfg, own, simulated)
        if not simulated:
            settle_rank(cfg, own)
            check_demands(cfg, own)
        # As on the server: nothing else of the run undoes what its level is to do here.
        cfg = privacy.checked(cfg, aggregate.build(cfg.strategy))
        schema.check_training_arguments(cfg)
        schema.check_kernels(cfg)
        cfg = decided(cfg)
        cfg["records"] = check_data(cfg, partition)
        if not simulated:
            check_demands(cfg, own, cfg.records)
    except Refusal:
        raise
    except UserError as error:
        # The text may name values, files and columns, which are nobody else's concern; the
        # node's own log has it as the cause.
        named = [key for key in overrides.values if f"{key}=" in str(error)]
        which = f" ({', '.join(named)})" if named else ""
        raise Refusal(
            f"its settings or data are at fault{which}: see its log"
        ) from error
    return cfg, partition


# --- the run's settings ---------------------------------------------------------------------


def parse(overrides: str) -> Overrides:
    """A run's overrides as values, without Hydra's own (`hydra.*`), the server's affair.

    Raises `Refusal` for one that does more than choose a file of `conf/` or give a plain
    value to a setting: what is added, built or computed belongs into the bundle, where it
    can be read. What is checked are the values as Hydra's parser leaves them, after quotes
    and escapes: `$\\{oc.env:HOME\\}` is an interpolation then, and would be resolved here.
    """
    if len(overrides) > LONGEST:
        raise Refusal(f"the run's overrides have more than {LONGEST} characters")
    try:
        words = shlex.split(overrides)
    except ValueError as error:
        raise Refusal("the run's overrides cannot be read: a quote is open") from error
    parser = OverridesParser.create()
    found = Overrides({}, {})
    for word in words:
        try:
            override = parser.parse_override(word)
            key, value = override.key_or_group, override.value()
        except (HydraException, ValueError, RecursionError) as error:
            key = word.partition("=")[0]
            raise Refusal(f"the override of {key} cannot be read") from error
        if key.startswith(("hydra.", "hydra/")):
            continue
        if key in groups():
            into, fault = found.choices, None if value in groups()[key] else MORE
        else:
            parts = value if isinstance(value, list) else [value]
            faults = (misuse(key, part) for part in parts)
            into, fault = found.values, next(filter(None, faults), None)
        changes = override.type == OverrideType.CHANGE and override.package is None
        if not changes or key.endswith("_target_"):
            fault = MORE
        if fault:
            raise Refusal(f"the override of {key} {fault}")
        into[key] = value
    return found


def groups() -> dict[str, list[str]]:
    """The groups of `conf/`, and the files that each lets one choose among."""
    folders = [path for path in CONF.iterdir() if path.is_dir()]
    return {
        path.name: [file.stem for file in path.glob("[!_]*.yaml")] for path in folders
    }


def misuse(key: str, value: Any) -> str | None:
    """What keeps a value, once parsed, from being set in as it is, or None."""
    if isinstance(value, (int, float)):
        return None if abs(value) <= LARGEST else "is out of all bounds"  # NaN as well
    if isinstance(value, str) and "${" not in value:
        module = key.startswith(("peft.", "model.lora."))
        pattern = module and not MODULE_NAME.fullmatch(value)
        return "is a pattern: a node takes names of modules" if pattern else None
    return None if value is None else MORE


def compose(overrides: Overrides) -> DictConfig:
    """The bundle's `conf/` with a run's choices, and its values set in as they are.

    Raises `Refusal` where there is no such setting, and `UserError` for an interpolation
    that is more than a reference to another setting (`${seed}`): nothing of a machine's
    environment is read, whoever wrote it.
    """
    config = copy.deepcopy(_chosen(tuple(overrides.choices.items())))
    leaves = flat(OmegaConf.to_container(config, resolve=False))
    for key, value in leaves.items():
        if "${" in str(value) and not REFERENCE.fullmatch(str(value)):
            raise UserError(f"{key}: {value} is more than a reference to a setting.")
    for key, value in overrides.values.items():
        if key not in leaves:
            raise Refusal(f"the override of {key}: conf/ has no such setting")
        OmegaConf.update(config, key, value)
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise UserError(str(error)) from error
    return config


@lru_cache(maxsize=4)
def _chosen(choices: tuple[tuple[str, str], ...]) -> DictConfig:
    GlobalHydra.instance().clear()  # `@hydra.main` may have left one
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=["=".join(one) for one in choices])


# --- the node's settings --------------------------------------------------------------------


def check_settings(node_config: dict[str, Any]) -> dict[str, Any]:
    """The node's own settings, with defaults and absolute paths.

    Raises `UserError` for an unknown key or a wrong type.
    """
    for key, value in node_config.items():
        kind = SETTINGS.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if kind is None:
            raise UserError(
                f"--node-config: {key} is unknown. Known: {', '.join(SETTINGS)}."
            )
        if type(value) is not kind:
            raise UserError(f"--node-config: {key}={value} must be {KINDS[kind]}.")
        if value == "" and key != "column-input":
            raise UserError(f"--node-config: {key} is empty.")
    for key in ("cpus", "processes", "rank", "least-sum", *CEILINGS):
        if node_config.get(key, 1) < 1:
            raise UserError(f"--node-config: {key} must be 1 or more.")
    if node_config.get("keep-alive", 0) < 0:
        raise UserError("--node-config: keep-alive must be 0 or more.")
    own = {"cache-path": CACHE, "delta": 1e-5, **CEILINGS, **node_config}
    if not (own.get("epsilon", 1) > 0 and 0 < own["delta"] < 1):
        raise UserError("--node-config: epsilon is above 0, and delta between 0 and 1.")
    for key in ("data-path", "model-path", "cache-path", "personal-path"):
        if key in own:
            own[key] = str(Path(own[key]).expanduser().resolve())
    for key in ("data-path", "model-path"):
        if key in own and not Path(own[key]).exists():
            raise UserError(f"--node-config: {key}={own[key]} does not exist.")
    if place := own.get("personal-path"):  # known before anything is trained
        with utils.writing(Path(place)):
            Path(place).mkdir(parents=True, exist_ok=True)
    return own


def choose_device(device: str | None) -> None:
    """Show this process no other device than `device`. To be called before torch is."""
    if device is None or device == "cuda":
        return
    if device != "cpu" and not re.fullmatch(r"cuda:\d+(,\d+)*", device):
        raise UserError(f"--node-config: device={device}: take cpu, cuda or cuda:0.")
    visible = device.removeprefix("cpu").removeprefix("cuda:")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible


def choose_partition(cfg: Settings, own: dict[str, Any]) -> int:
    """Which partition this node is; a node with data of its own is a whole one."""
    if "data-path" in own:
        cfg["partitioner"] = None
        return 0
    if "partition-id" not in own:
        raise Refusal("it has neither data-path nor partition-id in its --node-config")
    clients, partition = cfg.num_clients, own["partition-id"]
    if own.get("num-partitions", clients) != clients or not 0 <= partition < clients:
        raise Refusal(
            "its partition-id and num-partitions do not fit the run's num_clients"
        )
    return partition


def choose_base(name: str, own: dict[str, Any]) -> str:
    """The base to train on: the node's own folder, the bundle's, or one from the hub."""
    if name != own.get("model-name", name):
        raise Refusal("it takes part with another model.name only: its model-name")
    if "model-path" in own:
        return own["model-path"]
    if bundled := in_bundle(name):
        if not list(bundled.glob("*.safetensors")):
            raise Refusal(
                "the bundle holds no weights of model.name: it needs model-path in its "
                "--node-config"
            )
        return str(bundled)
    if not HUB_NAME.fullmatch(name):
        raise Refusal("model.name is no owner/name of the hub: paths are the node's")
    return name


def choose_data(wanted: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The `dataset` settings: the node's own data, or a dataset of the bundle or the hub."""
    if "data-path" in own:
        columns = {
            name: own.get(f"column-{name}", name) or None
            for name in ("instruction", "input", "output")
        } | {
            name: own.get(f"column-{name}")
            for name in ("messages", "rejected", "desirable")
        }
        path = {"name": None, "path": own["data-path"]}
        mine = {**path, "test_path": None, "label": None}
        return wanted | mine | {"columns": Settings(columns)}
    chosen = wanted | {"test_path": None}
    if wanted["path"]:
        bundled = in_bundle(str(wanted["path"]))
        if bundled is None:
            raise Refusal("dataset.path is not in the bundle")
        return chosen | {"path": str(bundled)}
    if not HUB_NAME.fullmatch(str(wanted["name"])) or in_bundle(wanted["name"]):
        raise Refusal("dataset.name is no owner/name of the hub: paths are the node's")
    return chosen


def in_bundle(path: str) -> Path | None:
    """The existing file or folder of the bundle that a relative path names, or None.

    No link leads out of it, by itself or from within the folder. A path that leads out by
    its spelling is not looked at: the answer would tell what the node has there.
    """
    if Path(path).is_absolute() or ".." in Path(path).parts:
        return None
    with suppress(OSError):  # too long for a path
        named = (PROJECT / path).resolve()
        leads_to = [named, *(file.resolve() for file in named.glob("*"))]
        inside = all(place.is_relative_to(PROJECT) for place in leads_to)
        return named if inside and named.exists() else None
    return None


def settle_privacy(
    cfg: Settings, own: dict[str, Any], partition: int, simulated: bool
) -> None:
    """Count what all runs together tell of the node's records, and stop at its own limit.

    The ledger is one for a data set, by its path, and a share of it. Raises `Refusal` for a
    run that has no such count, where there is a limit.
    """
    from methods import privacy

    cfg["tell_epsilon"] = own.get("tell-epsilon", simulated)
    data = mix_seed(str(cfg.dataset.path or cfg.dataset.name), partition)
    cfg["ledger"] = str(Path(own["cache-path"]) / "privacy" / f"{data:08x}")
    if "epsilon" not in own:
        return
    if not privacy.build(cfg.privacy).records:
        raise Refusal("it has an epsilon of its own, and takes privacy=record only")
    cfg["ceiling"] = Settings(epsilon=float(own["epsilon"]), delta=own["delta"])


def settle_resources(cfg: Settings, own: dict[str, Any], simulated: bool) -> None:
    """Train with what the node has, and leave nothing elsewhere.

    A simulated node is one of several on its machine, and has what the run gives it.
    """
    import model

    if not simulated:
        gpu = model.default_device().type == "cuda"
        if own.get("device", "cpu") != "cpu" and not gpu:
            raise UserError(f"--node-config: device={own['device']} is not here.")
        cpus = own.get("cpus", os.cpu_count() or 1)
        processes = cfg.launch["processes"] = own.get("processes", 1)
        cfg.launch["rendezvous"] = own.get("rendezvous")  # never the run's
        gpus = processes if gpu else 0
        cfg["client_resources"] = Settings(num_cpus=cpus, num_gpus=gpus)


def settle_rank(cfg: Settings, own: dict[str, Any]) -> None:
    """Train an adapter of the node's own rank, where that is below the run's."""
    import model

    run = model.highest_rank(cfg.peft)
    if run is None or own.get("rank", run) >= run:
        return
    if "ranks" not in cfg.strategy:
        raise Refusal("its rank is below the run's, and takes strategy=svd")
    cfg["rank"] = own["rank"]


def check_demands(cfg: Settings, own: dict[str, Any], rows: int = 0) -> None:
    """That a round, and its adapter, take no more than the node gives.

    `rows`: the node's records, of which a run by epochs asks for a multiple.
    """
    import dataset
    from methods import personal

    train, arguments = cfg.train, cfg.train.training_arguments
    each = dataset.rows_each(cfg)
    batch = each * arguments.per_device_train_batch_size
    step = batch * arguments.gradient_accumulation_steps * cfg.launch.processes
    by_steps, passes = arguments.max_steps > 0, arguments.num_train_epochs
    examples = arguments.max_steps * step if by_steps else passes * rows * each
    method = personal.build(cfg.personal)
    examples *= max(method.trainings, method.rounds)  # by one message
    if cfg.strategy.fraction_evaluate > 0:
        examples = max(examples, cfg.evaluate.holdout * rows * each)
    sizes = [
        value
        for key, value in flat(cfg.peft).items()
        if isinstance(value, (int, float)) and key not in NO_SIZE
    ]
    for key, asked, by in (
        ("max-tokens", examples * train["seq_length"], "train"),
        ("max-batch-tokens", batch * train["seq_length"], "train"),
        ("max-rank", max(sizes, default=0), "peft and model.lora"),
    ):
        if asked > own[key]:
            raise Refusal(f"the run's settings of {by} ask for more than its {key}")


def check_data(cfg: Settings, partition: int) -> int:
    """How many records the node has: as many as the run asks of everyone, or more.

    All fit the task, or, where their content is to decide over no answer, are left out.
    """
    import dataset
    from methods import privacy
    from tasks.base import Unsuited

    rows = len(dataset.load_partition(cfg, partition))
    if rows < cfg.train.min_records:
        raise Refusal("it has fewer records than train.min_records")
    try:
        dataset.check_records(cfg)
    except Unsuited as error:
        # What they are held against, labels say, the server chose: an answer tells of records.
        if not (error.by_records and privacy.build(cfg.privacy).discreet):
            raise Refusal(error.told) from error
        logging.warning("%s Nothing is learnt of such records.", error)
    return rows


def account(message: Message, cfg: Settings, content: RecordDict) -> str:
    """What a message has read of the node's data and takes away, for the node's log."""
    config = message.content["config"]
    kind = f"{message.metadata.message_type}, run {config.get('run')}"
    kind += f", round {config.get('server-round', 0)}"
    data = cfg.dataset
    columns = ", ".join(column for column in data["columns"].values() if column)
    arrays = [
        one for record in content.array_records.values() for one in record.values()
    ]
    types = " and ".join(sorted({array.dtype for array in arrays}))
    sent = f"{len(arrays)} arrays of {types}, " if arrays else ""
    sent += f"{sum(len(array.data) for array in arrays)} bytes in all"
    for record in content.metric_records.values():
        sent += "".join(f", {name} {value:g}" for name, value in record.items())
    return (
        f"{kind}: read {data['path'] or data['name']} ({columns}), {cfg.records} records; "
        f"sent {sent}"
    )
