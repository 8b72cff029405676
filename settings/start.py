"""From a composed configuration to a run and its last word, for `main.py` and `app.py`."""

import math
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from omegaconf import DictConfig

import utils
from server import runs
from settings import compose
from settings.compose import resolve, resumed
from settings.preflight import check
from settings.schema import is_number, validated
from utils import Settings

# Trains what the settings say in the run's folder, given the overrides that make them.
Train = Callable[[Settings, Path, list[str]], None]


def start(
    config: DictConfig,
    overrides: list[str],
    folder: Path,
    train: Train,
    deployed: bool = False,
) -> float:
    """Check a configuration, train as it says, and say what came of it.

    `folder` is the run's, and this process owns it; another's, that `resume` names, is made
    its own. `deployed`: this is the server of a federation. Returns `optimized_metric`, NaN
    for a plan, and for what `privacy` keeps back. Raises `UserError`.
    """
    validated(resolve(config))  # every key that is used below is there
    with ExitStack() as held:
        if config.resume:
            folder = Path(config.resume)
            config, overrides = resumed(config.resume, overrides)
            if deployed:
                from node import permit

                permit.parse(shlex.join(overrides))  # as every node does
            held.enter_context(runs.own(folder, without=()))
        cfg = checked(config, deployed)
        if cfg.dry_run:
            from settings import plan

            utils.say(plan.show(cfg, None if deployed else folder))
            return math.nan
        # Imported here, so that a mistake is answered without waiting for it.
        from server import journal

        utils.say(f"{journal.describe(cfg)}\nResults: {folder}")
        if not deployed and (note := journal.quantised_on_cpu(cfg)):
            utils.say(f"Note: {note}.")
        if deployed or cfg.resume:  # which Hydra has not written
            compose.record(config, overrides, folder)
        train(cfg, folder, overrides)
        journal.report(cfg, folder)
        return metric(cfg.optimized_metric, folder)


def checked(config: DictConfig, deployed: bool = False) -> Settings:
    """`preflight.check`, after the libraries were told to be quiet and what they can reach."""
    if not config.verbose:
        utils.quiet()
    here = deployed or config.dataset.get("path")
    if not (utils.local_path(str(config.model.name)) and here):
        utils.offline_if_unreachable()
    return check(config, deployed)


def metric(name: str, folder: Path) -> float:
    """A number of a finished run's summary. Raises `UserError` where it has none of that name."""
    summary = runs.read(folder, "summary.json")
    if name.startswith("train_loss") and "epsilon" in summary:
        return math.nan  # which is told to nobody, a sweeper neither
    numbers = {key: value for key, value in summary.items() if is_number(value)}
    if name not in numbers:
        raise utils.UserError(
            f"optimized_metric={name}: {folder}/summary.json has no such number. Take "
            f"{', '.join(numbers)}."
        )
    return numbers[name]
