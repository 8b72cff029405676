"""A run's settings put together out of `conf/`, and those of a run to go on with."""

import itertools
import os
import re
import shlex
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from settings.schema import NO_NAME, may_change
from utils import (
    PROJECT,
    Settings,
    UserError,
    flat,
    literal,
    one_line,
    override,
    read_yaml,
    spelt,
    writing,
)


def resumed(folder: str, overrides: list[str]) -> tuple[DictConfig, list[str]]:
    """The configuration of the run in `folder` as `overrides` change it, and what makes it.

    Raises `UserError` where there is no run, or where more is changed than a run can go on
    with and still be the one that it was.
    """
    if not isinstance(folder, str):
        raise UserError(f"resume={spelt(folder)}: the folder of a run is needed.")
    saved = Path(folder) / ".hydra"
    try:
        before = resolve(OmegaConf.create(read_yaml(saved / "config.yaml", dict)))
        begun_with = read_yaml(saved / "overrides.yaml", list)
        if odd := [text for text in begun_with if not isinstance(text, str)]:
            raise UserError(f"{saved}/overrides.yaml is broken: {odd[0]} is no text.")
        words = [*begun_with, *overrides]
        keys = [parse(word).key_or_group for word in words]
    except Exception as error:  # whatever the libraries make of what is broken
        raise UserError(
            f"resume={folder}: no run to go on with is here ({error}). Give the folder "
            "that the run named as its results, outputs/<date>/<time>."
        ) from error
    if any(Path(folder, "residuals").glob("*.safetensors")):
        raise UserError(
            f"resume={folder}: an earlier version of this program began it, which kept what "
            "clients keep elsewhere. It goes on with that version alone."
        )
    ours = re.compile(r"resume|hydra[./].*")
    own = [not ours.fullmatch(key) for key in keys]
    chosen = list(itertools.compress(words, own))
    try:
        today = compose(shlex.join(itertools.compress(begun_with, own)))
    except HydraException as error:
        raise UserError(
            f"resume={folder}: it was begun with other settings than conf/ has now. "
            f"{one_line(error)}"
        ) from error
    config = compose(shlex.join(chosen))
    config.resume = literal(folder)
    # What conf/ has got since the run was begun counts as the run itself would set it now.
    old, new = flat(resolve(today)) | flat(before), flat(resolve(config))
    free = tuple(may_change())
    changed = [
        f"{key} was {spelt(old.get(key))} and would be {spelt(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if _name(key, old.get(key)) != _name(key, new.get(key))
        and not key.startswith(free)
    ]
    if changed:
        raise UserError(
            f"resume={folder}: a run goes on as it was begun. {'; '.join(changed)}. What "
            f"may change: {', '.join(free)}."
        )
    return config, chosen


def _name(key: str, value: Any) -> Any:
    """A class by its name alone, because its module may have been moved."""
    return str(value).rpartition(".")[2] if key.endswith("_target_") else value


def check_choices(words: list[str]) -> None:
    """Raise `UserError` for what Hydra answers with a traceback, or with its grammar: a choice
    that is no name, a value that takes quotes."""
    for word in words:
        group, _, choice = word.partition("=")
        folder = PROJECT / "conf" / group
        if word.startswith("="):
            raise UserError(f"{word}: the name of a setting is missing.")
        if folder.is_dir() and NO_NAME.fullmatch(choice):
            names = ", ".join(sorted(path.stem for path in folder.glob("[!_]*.yaml")))
            raise UserError(f"{word}: {group} is one of {names}.")
        if "=" in word and not word.startswith("-"):
            parse(word)


def resolve(config: DictConfig) -> Settings:
    """The configuration's values. Raises `UserError` where it has gaps."""
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        return Settings.of(values)
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key} must be given: {error.full_key}=..."
        ) from None
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {error.msg}") from None


def decided(cfg: Settings) -> Settings:
    """`cfg` with true or false in the place of `model.gradient_checkpointing=auto`."""
    if cfg.model.gradient_checkpointing != "auto":
        return cfg
    needed = {"gradient_checkpointing": needs_checkpointing(cfg)}
    return cfg | {"model": cfg.model | needed}


def needs_checkpointing(cfg: Settings) -> bool:
    """Whether a client's step would not fit its share of the GPU (or memory) without.

    True as well where that is not known. False where base or adapter do not allow it.
    """
    import torch

    import model
    from compute.vram import occupied

    share = cfg.client_resources.num_gpus
    if share and torch.cuda.device_count():
        room = torch.cuda.get_device_properties(0).total_memory * min(share, 1)
    elif share:
        room = 0  # planning elsewhere for a GPU that is not here to be asked
    else:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        room = pages * cfg.client_resources.num_cpus / (os.cpu_count() or 1)
    settings = cfg.model | {"gradient_checkpointing": False}
    if not share:
        settings["quantization"] = None  # a CPU computes on the unpacked base
    frame = model.skeleton(settings, cfg.peft)
    terms = estimate(cfg | {"model": settings}, frame)
    if not isinstance(terms, str) and occupied(terms) <= 0.9 * room:
        return False
    try:
        model.skeleton(settings | {"gradient_checkpointing": True}, cfg.peft)
    except UserError:
        return False
    return True


def estimate(cfg: Settings, frame: Any) -> dict[str, int] | str:
    """`estimate_vram` of a client, or that it does not know this base or this adapter."""
    import tasks
    from compute.vram import estimate_vram

    batch = cfg.train.training_arguments.per_device_train_batch_size
    virtual = getattr(frame.peft_config["default"], "num_virtual_tokens", 0) or 0
    try:
        return estimate_vram(
            frame,
            cfg.model.quantization,
            batch * tasks.build(cfg).rows,
            # Prompt methods put tokens of their own before the text.
            cfg.train.seq_length + virtual,
            cfg.model.gradient_checkpointing,
        )
    except Exception:  # of whatever type: a part that it asks for is not there
        kind = frame.config.model_type
        return (
            f"{kind} with this adapter has other parts than the estimate reckons with"
        )


def compose(overrides: str = "") -> DictConfig:
    """Compose `conf/` with a string of Hydra overrides, outside `@hydra.main`.

    Raises `hydra.errors.HydraException` for an override that does not fit `conf/`.
    """
    return compose_run(overrides)[0]


def compose_run(overrides: str) -> tuple[DictConfig, Path, bool]:
    """Likewise, and the run's folder for `begin`: `hydra.run.dir`, and whether it is named."""
    GlobalHydra.instance().clear()  # `@hydra.main` may have left one
    try:
        words = shlex.split(overrides)
        for word in words:
            parse(word)
        with hydra.initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
            cfg = hydra.compose("config", overrides=words, return_hydra_config=True)
        folder, named = Path(cfg.hydra.run.dir), is_named(cfg.hydra)
        with open_dict(cfg):
            del cfg.hydra
        OmegaConf.resolve(cfg)
    except (ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{overrides}: {error}") from error
    return cfg, folder, named


def is_named(ours: DictConfig, key: str = "hydra.run.dir") -> bool:
    """Whether the overrides in Hydra's own configuration name a run's folder."""
    return any(parse(text).key_or_group == key for text in ours.overrides.hydra)


def parse(word: str) -> Override:
    """An override as Hydra reads it. Raises `UserError` with how to quote it where it cannot."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        key, equals, value = word.partition("=")
        hint = f"Quote it twice: {shlex.quote(override(key, value))}"
        told = hint if equals else str(error).splitlines()[0]
        raise UserError(f"{word}: this cannot be read as an override. {told}") from None


def record(cfg: DictConfig, overrides: list[str], folder: Path) -> None:
    """Write the configuration into a run's folder, as `@hydra.main` would.

    Raises `Unwritable`.
    """
    with writing(folder / ".hydra"):
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, folder / ".hydra/config.yaml")
        OmegaConf.save(overrides, folder / ".hydra/overrides.yaml")
