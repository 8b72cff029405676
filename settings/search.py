"""A search for settings: Hydra's sweeper on Optuna's ask and tell, and its callback.

    python main.py experiment=search

A trial is one run in a folder `<sweep>/<trial>/`, trained in parts (rungs): after each but
the last a pruner may end it, and what is ahead goes on by `resume`. All that the search knows
is in `<sweep>/search.db`, from which it goes on after any stop.
"""

import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, read_write
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import URL

from reporting.search import Tried, summarise_search
from server.runs import LEFT_BY_SWEEPS, OVERRIDES, begin, own
from settings import outputs
from settings.compose import resolve
from settings.preflight import check_search
from settings.schema import may_change, validated
from settings.start import checked
from utils import (
    PROJECT,
    UserError,
    flat,
    literal,
    mix_seed,
    one_line,
    override,
    say,
)

STUDY = "search.db"

LEAST = {"trials": 1, "max_batch_size": 1, "rungs": 1, "reduction_factor": 2}

# What a search that goes on may have otherwise: how much of it there is, and at a time.
FREE = ("params", "trials", "max_batch_size")
PLUGINS = str(PROJECT / "settings/plugins")


class Search(Sweeper):
    """Tries `trials` settings of a space; what fails counts as one, and is tried no more.

    `params`: sweeps by their keys, in Hydra's syntax; those on the command line are put over
    them. `max_batch_size` trials are given to the launcher at a time. A trial trains
    `num_rounds / reduction_factor**k` rounds, k from `rungs - 1` down to 0, with the learning
    rates of the whole. `sampler` takes a seed and makes one of `optuna.samplers`, anew for each
    proposal, so that a search which goes on proposes what it would have. `pruner` is one of
    `optuna.pruners`; its steps are `reduction_factor**rung`.
    """

    def __init__(
        self,
        params: dict[str, str] | None,
        trials: int,
        max_batch_size: int,
        rungs: int,
        reduction_factor: int,
        sampler: Callable[..., optuna.samplers.BaseSampler],
        pruner: optuna.pruners.BasePruner,
    ) -> None:
        self.params = params or {}
        self.trials = trials
        self.max_batch_size = max_batch_size
        self.shape = rungs, reduction_factor
        self.sampler = sampler
        self.pruner = pruner
        self.launched = 0

    def setup(
        self,
        *,
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
    ) -> None:
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Try what is left to be tried, and say which was best. Raises `UserError`."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        for name, least in LEAST.items():
            value = self.config.hydra.sweeper[name]
            if type(value) is not int or value < least:
                raise UserError(
                    f"hydra.sweeper.{name}={value}: a whole number is needed, {least} or more."
                )
        count, factor = self.shape
        self.steps = [factor**rung for rung in range(count)]
        words = [f"{key}={value}" for key, value in self.params.items()]
        parser = OverridesParser.create(self.hydra_context.config_loader)
        given = parser.parse_overrides([*words, *arguments])
        by_key = {each.get_key_element(): each for each in given}  # the last of each
        swept = {k: each for k, each in by_key.items() if each.is_sweep_override()}
        self.space = {key: distribution(each) for key, each in swept.items()}
        self.fixed = {
            key: each.input_line for key, each in by_key.items() if key not in swept
        }
        base = self._composed()
        check_search(validated(resolve(base)), swept)
        self.cfg = checked(base)
        self._check_space()
        whole = self.cfg.num_rounds
        # By the number of rounds; of two rungs with the same number there is one.
        self.rungs = {
            math.ceil(whole * step / self.steps[-1]): step for step in self.steps
        }
        self.folder = Path(self.config.hydra.sweep.dir)
        self.study = self._study({k: each.input_line for k, each in swept.items()})
        # Here, because what stops a run may leave no time for a word.
        say(
            f"Search: {self.trials} trials over {', '.join(swept)}; {self.folder}\n"
            "Stopped, it goes on by the same command."
        )
        try:
            while batch := self._next():
                self._try(batch)
        finally:
            self._summarise()
        self._conclude()

    def _check_space(self) -> None:
        """That each choice and each end of a range makes a configuration.

        Raises `HydraException` otherwise, which a trial would end all of the search with.
        """
        first = {key: ends(space)[0] for key, space in self.space.items()}
        for key, space in self.space.items():
            for value in ends(space):
                self._composed(first | {key: value})

    def _composed(self, params: Mapping[str, Any] = MappingProxyType({})) -> DictConfig:
        """The configuration of a run with these settings of those that are searched."""
        loader = self.hydra_context.config_loader
        words = self._words(params).values()
        config = loader.load_sweep_config(self.config, [*words])
        return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])

    def _study(self, space: dict[str, str]) -> optuna.Study:
        """The search that the folder holds, or a new one. Raises `UserError` for another's."""
        file = str((self.folder / STUDY).absolute())
        worse = {"loss", "perplexity"} & {*self.cfg.optimized_metric.split("_")}
        try:
            study = optuna.create_study(
                storage=URL.create("sqlite", database=file).render_as_string(),
                study_name="search",
                direction="minimize" if worse else "maximize",
                pruner=self.pruner,
                load_if_exists=True,
            )
        except Exception as error:  # of SQLAlchemy's or SQLite's, by what is wrong
            raise UserError(
                f"{file}: no search can go on from this ({one_line(error)}). Name another "
                "folder: hydra.sweep.dir=/path/to/folder"
            ) from error
        free = {*may_change()} - {"num_rounds", "optimized_metric"}
        settings = {
            key: value
            for key, value in flat(resolve(self._composed())).items()
            if not key.startswith(tuple(free))
        }
        ours = OmegaConf.to_container(self.config.hydra.sweeper, resolve=True)
        ours = {key: value for key, value in ours.items() if key not in FREE}
        settings |= flat(ours, "hydra.sweeper")
        about = json.loads(json.dumps({"searched": space, **settings}))
        before = study.user_attrs.get("about", about)
        for key in sorted(before.keys() | about.keys()):
            if before.get(key) != about.get(key):
                raise UserError(
                    f"{self.folder} holds another search: {key} was {before.get(key)} and "
                    f"would be {about.get(key)}. Name another folder: "
                    "hydra.sweep.dir=/path/to/folder"
                )
        study.set_user_attr("about", about)
        return study

    def _next(self) -> list[Trial]:
        """The trials to go on with: those that were stopped, or new ones; none at the end."""
        known = self.study.get_trials(deepcopy=False)
        stopped = [each for each in known if each.state == TrialState.RUNNING]
        if stopped:
            return [Trial(self.study, each._trial_id) for each in stopped]
        batch = []
        for number in range(len(known), self.trials)[: self.max_batch_size]:
            self.study.sampler = self.sampler(seed=mix_seed(self.cfg.seed, number))
            batch.append(self.study.ask(fixed_distributions=self.space))
        return batch

    def _try(self, batch: list[Trial]) -> None:
        """Train these trials from rung to rung, as far as each of them gets."""
        for rounds, step in self.rungs.items():
            todo = [trial for trial in batch if step not in self._values(trial)]
            jobs = [self._job(trial, rounds) for trial in todo]
            results: Sequence[JobReturn] = []
            if jobs:
                results = self.launcher.launch(jobs, initial_job_idx=self.launched)
            self.launched += len(jobs)
            for trial, result in zip(todo, results, strict=True):
                value = result._return_value
                if result.status == JobStatus.COMPLETED and math.isfinite(value):
                    trial.report(value, step)
                else:
                    self.study.tell(trial, state=TrialState.FAIL)
                    batch = [each for each in batch if each is not trial]
            if rounds < self.cfg.num_rounds:
                pruned = [trial for trial in batch if trial.should_prune()]
                for trial in pruned:
                    self.study.tell(trial, state=TrialState.PRUNED)
                batch = [trial for trial in batch if trial not in pruned]
        for trial in batch:
            self.study.tell(trial, self._values(trial)[self.steps[-1]])

    def _values(self, trial: Trial) -> dict[int, float]:
        """The metric of a trial by step, as far as it has come."""
        known = self.study.get_trials(deepcopy=False)
        return known[trial.number].intermediate_values

    def _job(self, trial: Trial, rounds: int) -> list[str]:
        """The overrides of a run that brings a trial to so many rounds."""
        schedule = self.cfg.train.schedule_rounds or self.cfg.num_rounds
        words = self._words(trial.params) | {
            "num_rounds": f"num_rounds={rounds}",
            "train.schedule_rounds": f"train.schedule_rounds={schedule}",
        }
        job = [*words.values(), f"hydra.sweep.subdir={trial.number}"]
        if (begun := self.folder / str(trial.number) / OVERRIDES).exists():
            # What it was begun with is told there until it is known to go on.
            folder = begun.parent.parent
            job += [override("resume", str(folder)), "hydra.output_subdir=null"]
        return job

    def _words(self, params: Mapping[str, Any]) -> dict[str, str]:
        """By its key, each override of a run with these settings."""
        return self.fixed | {key: f"{key}={value}" for key, value in params.items()}

    def _summarise(self) -> None:
        rounds = {step: rounds for rounds, step in self.rungs.items()}
        trials = [
            Tried(
                trial.number,
                {key: trial.params[key] for key in self.space},
                trial.state.name.lower(),
                rounds.get(trial.last_step, 0),
                trial.intermediate_values.get(trial.last_step),
            )
            for trial in self.study.get_trials(deepcopy=False)
        ]
        log = {key: getattr(each, "log", False) for key, each in self.space.items()}
        best = self._best()
        number = best.number if best else None
        summarise_search(trials, number, self.cfg.optimized_metric, log, self.folder)

    def _best(self) -> FrozenTrial | None:
        states = [TrialState.COMPLETE]
        finished = self.study.get_trials(deepcopy=False, states=states)
        return self.study.best_trial if finished else None

    def _conclude(self) -> None:
        """Say which trial was best and how to train with its settings. Raises `UserError`."""
        states = Counter(trial.state.name for trial in self.study.get_trials())
        if (best := self._best()) is None:
            raise UserError(
                f"{self.folder}: of {self.trials} trials none has come to its end. Mend what "
                "they told, and begin in another folder: hydra.sweep.dir=/path/to/folder"
            )
        counts = f"{states['PRUNED']} pruned, {states['FAIL']} failed"
        metric = f"{self.cfg.optimized_metric} {best.value:.4g}"
        words = [*self._words(best.params).values(), "hydra.mode=RUN"]
        say(
            f"All trials ({counts}): {self.folder}/search.png, search.csv, search.md; their "
            f"training: losses.png\nBest: {metric} of trial {best.number}, "
            f"{self.folder}/{best.number}\n{shlex.join(['python', 'main.py', *words])}"
        )


def distribution(swept: Override) -> BaseDistribution:
    """A sweep of Hydra's as Optuna draws from it: `interval(1e-5,1e-1)`, in whole numbers
    `int(interval(1,64))`, evenly in the logarithm `tag(log,interval(...))`, and each of a
    list for itself. Raises `UserError`."""
    value = swept.value()
    if not swept.is_interval_sweep():
        return CategoricalDistribution([*swept.sweep_string_iterator()])
    whole = isinstance(value.start, int)
    kind = IntDistribution if whole else FloatDistribution
    try:
        return kind(value.start, value.end, log="log" in value.tags)
    except ValueError as error:
        raise UserError(f"{swept.input_line}: {error}") from error


def ends(space: BaseDistribution) -> Sequence[Any]:
    """Its choices, or where its range begins and ends."""
    if isinstance(space, CategoricalDistribution):
        return space.choices
    return space.low, space.high


class Outputs(outputs.Outputs):
    """Hydra callback: a search's folder, which may hold its first part, and its runs'."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if PLUGINS not in sys.path:
            sys.path.append(PLUGINS)
        from hydra_plugins.search import Search

        Plugins.instance().register(Search)
        with outputs.or_exit(), read_write(config.hydra):
            self.sweep = begin(Path(config.hydra.sweep.dir), named=True)
            config.hydra.sweep.dir = literal(str(self.sweep))
            begun = (self.sweep / STUDY).exists()
            self.lock = own(self.sweep, () if begun else LEFT_BY_SWEEPS)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if not config.resume:  # then the run owns it, as any that goes on
            super().on_job_start(config)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """The sweeper has said it."""
