"""pytest tests/test_search.py: a search proposes, prunes, fails, stops and goes on.

Through Hydra's own multirun; what a run comes to is known by arithmetic, but for the last test.
"""

import gc
import json
import logging
import math
import re
import shlex
from statistics import median

import optuna
import pandas
import pytest
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from safetensors.torch import load_file

from server import rounds
from settings import start
from settings.compose import compose, resolve
from settings.schema import validated
from settings.search import distribution
from utils import PROJECT, UserError, learning_rate

RATE = "train.learning_rate_max"
BEST = 10**-2.5
EARLY = "+hydra.sweeper.pruner.n_startup_trials=1"


@pytest.fixture
def search(tmp_path):
    """Run `experiment=search` with a function of a run's configuration in a run's place."""
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def run(task, *overrides):
        # What has the folder's lock ends with its process, or here when it is collected;
        # `model.build` freezes what lives then.
        gc.unfreeze()
        gc.collect()
        GlobalHydra.instance().clear()
        version.setbase("1.3")
        path = create_config_search_path(str(PROJECT / "conf"))
        hydra = Hydra.create_main_hydra2("main", path)
        try:
            hydra.multirun(
                "config",
                task,
                ["experiment=search", f"hydra.sweep.dir={tmp_path}/s", *overrides],
                with_log_configuration=False,
            )
        finally:
            GlobalHydra.instance().clear()
        return trials(tmp_path / "s")

    yield run
    root.handlers[:], root.level = before


def trials(folder):
    storage = f"sqlite:///{folder}/search.db"
    return optuna.load_study(study_name="search", storage=storage).trials


def loss(config):
    """Least at `BEST`, and less after more rounds."""
    rate = config.train.learning_rate_max
    return abs(math.log10(rate / BEST)) + 1 / config.num_rounds


# --- the space -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("interval(0,2)", FloatDistribution(0, 2)),
        ("tag(log,interval(1e-5,1e-1))", FloatDistribution(1e-5, 1e-1, log=True)),
        ("int(interval(1,64))", IntDistribution(1, 64)),
        ("tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("8,4,null", CategoricalDistribution(["8", "4", "null"])),
        ("a,'b c'", CategoricalDistribution(["a", "'b c'"])),
        ("range(1,4)", CategoricalDistribution(["1", "2", "3"])),
    ],
)
def test_a_sweep_of_hydras_is_what_optuna_draws_from(text, expected):
    (swept,) = OverridesParser.create().parse_overrides([f"x={text}"])
    assert distribution(swept) == expected


def test_a_range_that_has_no_logarithm_is_refused():
    (swept,) = OverridesParser.create().parse_overrides(["x=tag(log,interval(0,1))"])
    with pytest.raises(
        UserError, match=r"x=tag\(log,interval\(0,1\)\): `low > 0` must hold"
    ):
        distribution(swept)


# --- what it does --------------------------------------------------------------------------


@pytest.mark.slow
def test_it_finds_the_least_and_prunes_what_a_median_is_ahead_of(
    search, tmp_path, capsys
):
    seen = []

    def task(config):
        folder = HydraConfig.get().runtime.output_dir
        train = config.train
        seen.append((folder, config.num_rounds, train.schedule_rounds, config.resume))
        return loss(config)

    found = search(task, "num_rounds=8", "hydra.sweeper.trials=9", EARLY)
    assert len(found) == 9
    best = min((t for t in found if t.value is not None), key=lambda t: t.value)
    assert best.state.name == "COMPLETE"
    assert abs(math.log10(best.params[RATE] / BEST)) < 0.4

    # Each run's rounds, its learning rates' whole, and what it goes on with.
    folder = tmp_path / "s"
    expected = []
    for trial in found:
        for rung in (2, 4, 8)[: len(trial.intermediate_values)]:
            own = str(folder / str(trial.number))
            expected.append((own, rung, 8, None if rung == 2 else own))
    assert seen == expected

    # The pruned ones are those that a median was ahead of, by our own count.
    complete = []
    for trial in found:
        reports = trial.intermediate_values
        rate = trial.params[RATE]
        assert reports == {
            step: abs(math.log10(rate / BEST)) + 1 / (2 * step) for step in reports
        }
        behind = [
            step
            for step in (1, 2)
            if len(complete) >= 1
            and step in reports
            and min(v for s, v in reports.items() if s <= step)
            > median(other.intermediate_values[step] for other in complete)
        ]
        assert (trial.state.name == "PRUNED") == bool(behind)
        assert not behind or max(reports) == behind[0]
        if not behind:
            complete.append(trial)
    assert 1 < len(complete) < 9

    table = pandas.read_csv(folder / "search.csv")
    assert table["trial"].tolist() == list(range(9))
    assert table[RATE].tolist() == [t.params[RATE] for t in found]
    states = [t.state.name.lower() for t in found]
    states[best.number] = "best"
    assert table["state"].tolist() == states
    assert table["rounds"].tolist() == [2 * max(t.intermediate_values) for t in found]
    assert (folder / "search.md").read_text().count("\n") == 11
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert f"{9 - len(complete)} pruned, 0 failed" in said
    assert f"of trial {best.number}, {folder}/{best.number}" in said


@pytest.mark.slow
def test_the_last_line_is_the_best_one_to_copy(search, tmp_path, capsys):
    seen = {}

    def task(config):
        seen[config.train.assistant_turns] = config
        return float(config.train.assistant_turns == "all") + 1

    path = (
        tmp_path / "it's (mine), 1.jsonl"
    )  # which both a shell and Hydra have to be told
    path.write_bytes((PROJECT / "assets/tiny_qa/test.jsonl").read_bytes())
    search(
        task,
        f'dataset.test_path="{path}"',
        f"{RATE}=0.002",
        "train.assistant_turns=choice(all,last)",
        "hydra.sweeper.trials=4",
        "hydra.sweeper.rungs=1",
    )
    last = capsys.readouterr().out.splitlines()[-1]
    python, main, *words = shlex.split(last)
    assert (python, main) == ("python", "main.py")
    assert "hydra.mode=RUN" in words
    config = compose(shlex.join(words))
    trained = seen["last"]
    trained.train.schedule_rounds = None  # as many as the rounds are
    assert resolve(config) == resolve(trained)


@pytest.mark.slow
def test_a_search_that_was_stopped_is_the_one_that_was_not(search, tmp_path):
    words = [
        "num_rounds=4",
        EARLY,
        "hydra.sweeper.trials=5",
        "hydra.sweeper.max_batch_size=2",
    ]
    whole = search(loss, *words)
    (tmp_path / "s").rename(tmp_path / "whole")
    resumed = []

    def task(config):
        resumed.append(config.num_rounds)
        if len(resumed) in (4, 7):  # in the middle of a rung, and of another
            raise SystemExit(130)
        return loss(config)

    for _ in range(2):
        with pytest.raises(SystemExit):
            search(task, *words)
    again = search(task, *words)
    assert [(t.params, t.intermediate_values, t.state) for t in again] == [
        (t.params, t.intermediate_values, t.state) for t in whole
    ]
    # More of them are asked for later.
    more = search(task, *words, "hydra.sweeper.trials=6")
    assert [t.params for t in more[:5]] == [t.params for t in whole]
    assert len(more) == 6


@pytest.mark.slow
def test_what_fails_counts_and_the_search_goes_on(search, capsys):
    def task(config):
        if config.train.learning_rate_max > 1e-3:
            raise UserError("it has diverged")
        return math.nan if config.train.learning_rate_max < 1e-4 else loss(config)

    found = search(task, "hydra.sweeper.trials=7")
    for trial in found:
        fits = 1e-4 <= trial.params[RATE] <= 1e-3
        assert (trial.state.name == "FAIL") == (not fits)
    failed = [t.number for t in found if t.params[RATE] > 1e-3]
    said = capsys.readouterr()
    told = re.findall(r"Run (\d+) failed: it has diverged", said.err)
    assert [*map(int, told)] == failed
    assert 0 < len(failed) < 7


def test_how_it_goes_on_is_said_before_anything_can_stop_it(search, capsys):
    """A second Ctrl-C, or one while Ray starts, ends the process where it is."""
    said = []

    def task(config):
        said.append(capsys.readouterr().out)
        return loss(config)

    search(task, "hydra.sweeper.trials=1", "hydra.sweeper.rungs=1")
    assert "Stopped, it goes on by the same command." in said[0]


def test_where_all_fail_it_says_so(search):
    def task(config):
        raise UserError("no")

    with pytest.raises(UserError, match="of 2 trials none has come to its end"):
        search(task, "hydra.sweeper.trials=2")


@pytest.mark.slow
def test_a_launcher_is_given_several_at_a_time(search, capsys):
    words = ["hydra.sweeper.trials=5", "hydra.sweeper.max_batch_size=3"]
    found = search(loss, *words, "hydra.sweeper.rungs=1")
    told = re.findall(r"Launching (\d) jobs", capsys.readouterr().out)
    assert told == ["3", "2"]
    assert len({t.params[RATE] for t in found}) == 5


@pytest.mark.slow
def test_successive_halving_lets_the_better_half_of_a_rung_go_on(search):
    found = search(loss, "hydra/sweeper=halving", "hydra.sweeper.trials=8")
    firsts = []
    for trial in found:
        first = trial.intermediate_values[1]
        firsts.append(first)
        # Of those that were there before it and itself, half are kept, one at least.
        kept = sorted(firsts)[: max(len(firsts) // 2, 1)]
        assert (len(trial.intermediate_values) > 1) == (first in kept)
    assert {t.state.name for t in found} == {"COMPLETE", "PRUNED"}


# --- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("optimized_metric=exact_match_after", "never by the test questions"),
        ("optimized_metric=test_loss_after", "never by the test questions"),
        ("optimized_metric=train_loss_last", "nor by what was trained on"),
        ("optimized_metric=eval_loss_before", "Take one of eval_loss_after"),
        ("strategy.fraction_evaluate=0", "no client would hold anything back"),
        (f"{RATE}=1e-3", "nothing is searched"),
        ("num_rounds=choice(2,4)", "num_rounds cannot be searched"),
        ("resume=outputs/x", "its trials begin anew"),
        ("dry_run=true", "hydra.mode=RUN"),
        ("privacy=local", "each trial would spend a budget of its own"),
        ("privacy=record", "each trial would spend a budget of its own"),
        ("strategy.fraction_fit=7", "strategy.fraction_fit=7: it must"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused_before_it_begins(search, word, told):
    def task(config):
        raise AssertionError("a run was begun")

    with pytest.raises(UserError, match=told):
        search(task, word)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("train.lerning_rate=interval(0,1)", "Could not override 'train.lerning_rate'"),
        ("peft=lora,nothing", "Could not find 'peft/nothing'"),
    ],
)
def test_a_setting_that_there_is_not_is_told_before_the_first_trial(
    search, word, told, tmp_path
):
    with pytest.raises(HydraException, match=told):
        search(loss, word)
    assert not (tmp_path / "s/search.db").exists()


@pytest.mark.parametrize(
    "word", ["trials=0", "max_batch_size=0", "rungs=0", "rungs=a", "reduction_factor=1"]
)
def test_a_sweeper_that_tries_nothing_is_refused(search, word):
    with pytest.raises(UserError, match=rf"^hydra\.sweeper\.{word}: a whole number is"):
        search(loss, f"hydra.sweeper.{word}")


def test_a_file_that_is_no_search_is_told(search, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/search.db").write_text("no database" * 100)
    with pytest.raises(UserError, match=r"search\.db: no search can go on from this"):
        search(loss)


@pytest.mark.slow
def test_another_search_is_not_taken_for_one_that_goes_on(search):
    words = ["hydra.sweeper.trials=1", "hydra.sweeper.rungs=1"]
    search(loss, *words)
    for word, told in (
        ("seed=1", "seed was 0 and would be 1. Name another folder: hydra.sweep.dir"),
        ("num_rounds=6", "num_rounds was 20 and would be 6"),
        (f"{RATE}=interval(0,1)", "searched was .*tag.* and would be .*0,1"),
        # By which a value of a part would be one of the whole.
        ("hydra.sweeper.rungs=2", r"hydra\.sweeper\.rungs was 1 and would be 2"),
        (
            "hydra/sweeper=halving",
            r"hydra\.sweeper\.pruner.* was .*Median.* and would be",
        ),
    ):
        with pytest.raises(UserError, match=told):
            search(loss, *words, word)
    assert len(search(loss, *words, "verbose=true")) == 1


def test_the_folder_of_another_multirun_is_refused(search, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/multirun.yaml").touch()
    with pytest.raises(SystemExit, match="holds a multirun already"):
        search(lambda config: 1.0)


# --- the learning rates of the whole -------------------------------------------------------


def test_a_part_of_a_schedule_has_the_rates_of_the_whole():
    whole = resolve(compose("experiment=quickstart num_rounds=20"))
    part = compose("experiment=quickstart num_rounds=5 train.schedule_rounds=20")
    part = validated(resolve(part))
    for number in range(1, 6):
        assert learning_rate(part, number) == learning_rate(whole, number)
    third = 1e-6 + (3e-3 - 1e-6) * (1 + math.cos(math.pi * 2 / 20)) / 2
    assert learning_rate(part, 3) == pytest.approx(third, rel=1e-12)


def test_a_schedule_shorter_than_the_run_is_refused():
    cfg = resolve(compose("experiment=quickstart train.schedule_rounds=19"))
    with pytest.raises(UserError, match=r"schedule_rounds=19 with num_rounds=20"):
        validated(cfg)


@pytest.mark.slow
def test_a_trial_in_parts_is_the_run_that_its_command_makes(
    search, loopback, tmp_path, capsys
):
    """Real runs, in this process: the last adapter is the same to the bit."""

    def train(cfg, folder, overrides):
        rounds.run(cfg, loopback(cfg, folder=folder), folder)

    def task(config):
        words = OmegaConf.to_container(HydraConfig.get().overrides.task)
        folder = tmp_path / "s" / HydraConfig.get().sweep.subdir
        return start.start(config, words, folder, train)

    (trial,) = search(
        task,
        *("num_clients=2", "num_rounds=2", "strategy.fraction_fit=1"),
        *("strategy.fraction_evaluate=0.5", "train.training_arguments.max_steps=1"),
        *(
            "evaluate.holdout=0.01",
            "train.training_arguments.per_device_train_batch_size=2",
        ),
        *("hydra.sweeper.trials=1", "hydra.sweeper.rungs=2"),
    )
    assert list(trial.intermediate_values) == [1, 2]
    command = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(command)[2:]
    (folder := tmp_path / "whole").mkdir()
    value = start.start(compose(shlex.join(words)), words, folder, train)
    assert value == trial.value
    summary = json.loads((folder / "summary.json").read_text())
    assert value == summary["eval_loss_after"]
    one, other = (
        load_file(run / "peft_2/adapter_model.safetensors")
        for run in (folder, tmp_path / "s/0")
    )
    assert all(one[name].equal(other[name]) for name in one)
