"""pytest tests/test_tracking.py: trackers tell what the run's folder does, and cost it nothing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from safetensors.torch import load_file

from assets.testbed.adapters import same
from assets.testbed.loopback import killed_in
from node import permit, processes
from server import rounds, tracking
from settings.compose import compose
from utils import PROJECT, UserError, git_commit

NAMES = sorted(path.stem for path in (PROJECT / "conf/tracking").glob("*.yaml"))


# One client measures on some records of its own, before and after.
ONE = "strategy.fraction_evaluate=0.25 evaluate.holdout=0.02"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """The working directory, where MLflow has its local store."""
    return tmp_path_factory.mktemp("workplace")


@pytest.fixture(autouse=True)
def elsewhere(workplace, monkeypatch) -> None:
    """Neither this folder nor the user's home gets anything."""
    monkeypatch.chdir(workplace)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(workplace / name))


def history(folder: Path) -> list[dict]:
    """All entries, with that of the base before round 1 if there is one."""
    read = json.loads((folder / "history.json").read_text())
    return [read["before"], *read["rounds"]] if "before" in read else read["rounds"]


def told(entries: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """What a tracker has to tell of them: of each figure, the steps and values."""
    figures: dict[str, list[tuple[int, float]]] = {}
    for entry in entries:
        for name, value in entry.items():
            if type(value) in (int, float) and name != "round":
                figures.setdefault(name, []).append((entry["round"], value))
    return figures


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    read = events(folder)
    return {
        tag: [(event.step, event.value) for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
        if not tag.startswith("summary/")
    }


def mlflow_run(folder: Path):
    """The one run of that folder."""
    from mlflow import MlflowClient

    title = "/".join(folder.parts[-2:])
    [run] = MlflowClient().search_runs(["1"], f"run_name = '{title}'")
    return run


def metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    run = mlflow_run(folder)
    return {
        name: [
            (metric.step, metric.value)
            for metric in MlflowClient().get_metric_history(run.info.run_id, name)
        ]
        for name in run.data.metrics
        if not name.startswith("summary/")
    }


READ = {"tensorboard": scalars, "mlflow": metrics}


# --- what they are told ------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_choice_is_a_tracker(name):
    if name == "wandb":
        pytest.importorskip("wandb")
    settings = compose(f"tracking={name}").tracking
    made = tracking.make(settings)
    assert settings["_target_"] == f"server.tracking.{type(made).__name__}"
    assert type(made).__name__.lower() == name.replace("none", "tracker")


def stopped_and_gone_on(cfg: dict, loopback, folder: Path) -> None:
    """Run until round 2 is under way, and then on from round 1 to the end."""
    killed_in(cfg, folder, replies=3)  # of two clients a round
    cfg["resume"] = str(folder)
    rounds.run(cfg, loopback(cfg, folder=folder), folder)


@pytest.mark.slow
def test_tensorboard_shows_the_history_the_plot_and_the_configuration(
    configure, loopback, tmp_path
):
    stopped_and_gone_on(configure("tracking=tensorboard", ONE), loopback, tmp_path)
    expected = told(history(tmp_path))
    assert {"train_loss", "seconds", "bytes_up", "replied"} <= expected.keys()
    assert "learning_rate" in expected
    assert [step for step, _ in expected["eval_loss"]] == [0, 1, 2]
    assert scalars(tmp_path) == {
        name: [(step, float(np.float32(value))) for step, value in values]
        for name, values in expected.items()
    }
    read = events(tmp_path)
    [image] = read.Images("train_loss")
    plot = imread(tmp_path / "train_loss.png")
    assert (image.height, image.width) == plot.shape[:2]
    [*_, text] = read.Tensors("configuration/text_summary")
    [yaml] = text.tensor_proto.string_val
    assert "peft_lora_r: 16" in yaml.decode()
    assert "summary/train_loss_last" in read.Tags()["scalars"]


@pytest.mark.slow
def test_mlflow_keeps_the_history_the_settings_the_plot_and_the_adapter(
    configure, loopback, tmp_path, workplace
):
    from mlflow.artifacts import download_artifacts

    stopped_and_gone_on(configure("tracking=mlflow", ONE), loopback, tmp_path)
    assert metrics(tmp_path) == told(history(tmp_path))
    assert (workplace / "mlflow.db").is_file()  # where `mlflow ui` looks for it
    run = mlflow_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.lora.peft_lora_r"] == "16"
    assert run.data.params["num_clients"] == "4"
    assert run.data.params["git_commit"] == str(git_commit())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert run.data.metrics["summary/seconds"] == summary["seconds"]
    kept = Path(download_artifacts(run_id=run.info.run_id))
    for name in ("train_loss.png", "history.json", "summary.json"):
        assert (kept / name).read_bytes() == (tmp_path / name).read_bytes()
    own, theirs = (
        load_file(folder / "peft_2/adapter_model.safetensors")
        for folder in (tmp_path, kept)
    )
    assert same(own, theirs)


def test_wandb_writes_the_history_into_the_runs_folder(configure, loopback, tmp_path):
    wandb = pytest.importorskip("wandb")  # large, and not in requirements.txt
    cfg = configure("tracking=wandb")
    rounds.run(cfg, loopback(cfg), tmp_path)
    wandb.teardown()  # waits for its process, which does the writing
    [written] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = written.read_bytes()
    for entry in history(tmp_path):
        assert str(entry["train_loss"]).encode() in content
    assert b"peft_lora_r" in content
    assert b"adapter_model.safetensors" in content
    [image] = written.parent.glob("files/media/images/plots/train_loss_*.png")
    assert np.array_equal(imread(image), imread(tmp_path / "train_loss.png"))


# --- runs that stop, and go on -------------------------------------------------------------

ROUNDS = [
    {"round": 0, "test_loss": 2.0},
    *({"round": i, "train_loss": 0.5**i, "test_loss": 0.25**i} for i in (1, 2, 3)),
]


@pytest.mark.slow
@pytest.mark.parametrize("done", [0, 1])
@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_round_that_is_done_again_is_told_once(name, done, configure, tmp_path):
    cfg = configure(f"tracking={name}")
    first = tracking.Tracking(cfg, tmp_path, [])
    for entry in ROUNDS[: done + 2]:
        first.log(entry)
    first.close()
    assert name == "tensorboard" or mlflow_run(tmp_path).info.status == "FAILED"
    # The last checkpoint is of round `done`; without one there is no history either.
    known = ROUNDS[: done + 1] if done else []
    second = tracking.Tracking(cfg, tmp_path, known)
    for entry in ROUNDS[len(known) :]:
        second.log(entry)
    second.close()
    assert READ[name](tmp_path) == told(ROUNDS)


@pytest.mark.slow
def test_a_tracker_that_is_chosen_later_gets_the_earlier_rounds(configure, tmp_path):
    tracking.Tracking(configure("tracking=tensorboard"), tmp_path, ROUNDS).close()
    assert scalars(tmp_path) == told(ROUNDS)


# --- what can go wrong -----------------------------------------------------------------------


def fail(*arguments) -> None:
    raise ConnectionError("the server is gone")


@pytest.mark.slow
def test_a_tracker_that_fails_in_mid_run_costs_the_run_nothing(
    configure, loopback, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tracking.TensorBoard, "log", fail)
    cfg = configure("tracking=tensorboard")
    rounds.run(cfg, loopback(cfg), tmp_path)
    assert len(history(tmp_path)) == 2
    assert (tmp_path / "summary.json").is_file()
    assert capsys.readouterr().out.count("the server is gone") == 1


@pytest.mark.parametrize("where", ["start", "log", "finish", "close"])
def test_a_failure_is_named_once(where, configure, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking.TensorBoard, where, fail)
    follower = tracking.Tracking(configure("tracking=tensorboard"), tmp_path, ROUNDS)
    follower.finish({"rounds": 3, "seconds": 1.0})
    follower.close()
    assert capsys.readouterr().out.count("the server is gone") == 1


@pytest.mark.slow
def test_a_server_that_is_not_there_is_named(configure, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    cfg = configure("tracking=mlflow", "tracking.tracking_uri=http://127.0.0.1:9")
    follower = tracking.Tracking(cfg, tmp_path, [])
    follower.log({"round": 1, "train_loss": 1.0})
    follower.close()
    assert "MLflow failed, and the run goes on without it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("tensorboard", "tensorboard"),
        ("mlflow", "mlflow-skinny"),
        ("wandb", "wandb"),
    ],
)
def test_a_missing_library_is_named_beforehand(name, package, configure, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(UserError, match=f"pip install {package}$"):
        configure(f"tracking={name}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("tracking=wandb tracking.mode=sideways", "take online or offline"),
        ("tracking=mlflow tracking.experiment=7", "text is needed"),
        ("tracking=mlflow +tracking.colour=red", "colour"),
        ("tracking._target_=server.tracking.Path", "is no tracker"),
        ("tracking._target_=os.system", "is not a class of server.tracking"),
    ],
)
def test_settings_that_it_does_not_take_are_named(overrides, message, configure):
    with pytest.raises(UserError, match=message):
        configure(overrides)


@pytest.mark.slow
def test_a_node_tracks_nothing_whatever_the_run_says(tmp_path, workplace):
    overrides = (
        "experiment=quickstart num_clients=4 train.training_arguments.max_steps=1 "
        "tracking=mlflow tracking.tracking_uri=sqlite:///here.db"
    )
    own = {"partition-id": 1, "num-partitions": 4, "cpus": 1}
    own["cache-path"] = str(tmp_path / "cache")
    cfg, partition = permit.settle({"overrides": overrides, "run": "first"}, own)
    state = processes.initial_adapter(cfg)
    processes.train(cfg, state, partition, 1, 0.0)
    assert cfg["tracking"]["tracking_uri"] == "sqlite:///here.db"
    assert not (workplace / "here.db").exists()


# --- multirun --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_multirun_is_one_group(tmp_path):
    from mlflow import MlflowClient

    done = subprocess.run(
        [
            sys.executable,
            PROJECT / "main.py",
            "--multirun",
            "experiment=quickstart",
            "tracking=mlflow",
            "seed=0,1",
            "num_rounds=1",
            "+simulation.init_args.num_cpus=1",  # one worker has libraries to load
            "train.training_arguments.max_steps=2",
            "evaluate.exact_match=false",
            f"hydra.sweep.dir={tmp_path}/sweep",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = {run.info.run_name: run for run in client.search_runs(["1"])}
    assert runs.keys() == {f"{tmp_path.name}/sweep", "sweep/0", "sweep/1"}
    parent = runs[f"{tmp_path.name}/sweep"]
    for seed in (0, 1):
        run = runs[f"sweep/{seed}"]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params["seed"] == str(seed)
        kept = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"config.yaml", "peft_1", "train_loss.png"} <= kept
