"""pytest tests/test_utils.py: a run's folder has one owner, and what is printed can be typed."""

import json
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import app
import model
import utils
from reporting import figures
from server import checkpoint, runs
from server.runs import LEFT, begin, own
from settings import outputs, preflight
from settings.compose import check_choices, compose, record, resolve, resumed
from utils import PROJECT, Unwritable, UserError, commit

# --- what a user is told to type -----------------------------------------------------------

# Any file name, those that Hydra's grammar and the shell give a meaning to among them.
NAMES = st.one_of(
    st.text(
        st.sampled_from(" ()[]{},=:'\"$\\~#&;*é日\t") | st.characters(codec="utf-8")
    ),
    st.sampled_from(["null", "true", "5", "1e3", "${a}", "\\${a}", "a,b", "nan", "-x"]),
).filter(lambda name: name and "\0" not in name)


def read_back(word: str) -> str:
    """The value that Hydra's own parser and OmegaConf make of `key=value`."""
    value = OverridesParser.create().parse_override(word).value()
    return OmegaConf.create({"key": value}).key


@settings(max_examples=60, deadline=None)
@given(NAMES)
def test_a_printed_command_means_what_it_is_printed_for(name):
    *script, word = shlex.split(utils.command("main.py", resume=name))
    assert script == ["python", "main.py"]
    assert read_back(word) == name
    check_choices([word])


@given(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False)
    | st.lists(st.none() | st.booleans() | st.integers(0, 99) | st.text("ab ,:[1"))
)
def test_a_setting_in_a_message_is_what_would_be_typed(value):
    word = f"key={utils.spelt(value)}"
    read = OverridesParser.create().parse_override(word).value()
    assert type(read) is type(value)
    assert read == value


def test_a_plain_name_is_printed_plain():
    told = utils.command("main.py", resume=Path("outputs/2026-11-25/16-47-54"))
    assert told == "python main.py resume=outputs/2026-11-25/16-47-54"


@settings(max_examples=60, deadline=None)
@given(NAMES)
def test_a_value_that_hydra_cannot_read_is_shown_in_its_quotes(name):
    word = f"dataset.path={name}"
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        with pytest.raises(UserError, match="cannot be read as an override") as told:
            check_choices([word])
        assert "http" not in str(told.value).replace(name, "")
        [shown] = shlex.split(str(told.value).rpartition("Quote it twice: ")[2])
        assert read_back(shown) == name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data (1)", "it's", "${a} $b", "5"])
def test_a_run_goes_on_in_a_folder_of_any_name(name, tmp_path):
    folder = tmp_path / name
    path = utils.override("dataset.path", f"{PROJECT}/assets/tiny_qa/train.jsonl")
    chosen = ["experiment=quickstart", path]
    record(compose(shlex.join(chosen)), chosen, folder)
    config, overrides = resumed(str(folder), ["num_rounds=9"])
    assert resolve(config)["resume"] == str(folder)
    assert overrides == [*chosen, "num_rounds=9"]
    # And once more, when the folder's name stands in what it was composed of.
    record(config, overrides, folder)
    again, _ = resumed(str(folder), [])
    assert resolve(again) == resolve(config)


# --- whose a folder is ------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from server import runs
lock = runs.own(Path(sys.argv[1]), without=())
print("mine", flush=True)
sys.stdin.read()
"""


def test_a_folder_has_one_owner_until_its_process_is_gone(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=f"another run .* process {other.pid} on"):
            own(tmp_path)
        other.kill()
        other.wait()
        own(tmp_path).close()
        with own(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on"):
            own(tmp_path)
        own(tmp_path).close()


@pytest.mark.parametrize("name", LEFT)
def test_a_folder_that_holds_a_run_takes_no_other(name, tmp_path):
    folder = tmp_path / "a (1)"
    (folder / name.replace("*", "3")).mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run already") as told:
        own(folder)
    assert utils.command("main.py", resume=folder) in str(told.value)
    with pytest.raises(UserError, match="holds a run already") as told:
        own(tmp_path, runs.LEFT_BY_SWEEPS)
    assert utils.command("main.py", resume=folder) in str(told.value)
    own(folder, without=()).close()  # it goes on


def test_folders_that_are_named_alike_by_the_clock_are_as_many_as_runs(tmp_path):
    folder = tmp_path / "16-47-54"
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: begin(folder, named=False), range(16)))
    names = {"16-47-54", *(f"16-47-54-{number}" for number in range(2, 17))}
    assert {path.name for path in made} == names
    assert begin(folder, named=True) == folder
    with pytest.raises(UserError, match="Name another folder"):
        begin(tmp_path / "${a}", named=True)


def test_nodes_know_a_run_by_a_name_that_no_other_has(tmp_path):
    (first := tmp_path / "monday/12-00-00").mkdir(parents=True)
    (second := tmp_path / "tuesday/12-00-00").mkdir(parents=True)
    assert app.run_name(first) != app.run_name(second)
    assert app.run_name(first) == app.run_name(first)


def test_the_callback_gives_each_run_a_folder_of_its_own(tmp_path):
    def started(**hydra: object) -> Path:
        overrides = {"overrides": {"hydra": [], "task": []}}
        settings = {"run": {"dir": str(tmp_path / "now")}, **overrides, **hydra}
        config = OmegaConf.create({"resume": None, "hydra": settings})
        callback = outputs.Outputs()
        callback.on_run_start(config)
        held.append(callback)
        return Path(config.hydra.run.dir)

    held: list[outputs.Outputs] = []
    assert [started().name, started().name] == ["now", "now-2"]
    named = {"overrides": {"hydra": [f"hydra.run.dir={tmp_path}/now"], "task": []}}
    with pytest.raises(SystemExit, match="another run writes into it"):
        started(**named)


def test_what_is_written_twice_is_no_success(tmp_path):
    def write(text: str) -> None:
        with commit(tmp_path / "peft_1") as temporary:
            (temporary / "file").write_text(text)

    write("first")
    with pytest.raises(Unwritable, match="peft_1 cannot be written"):
        write("second")
    assert (tmp_path / "peft_1/file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["peft_1"]


# --- a disk that takes no more -----------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk, a file of this process grows to `size` bytes and no further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def small() -> tuple[dict, model.PeftModel, model.State]:
    """A configuration, its skeleton and an adapter smaller than a tokenizer's file."""
    short = "experiment=quickstart evaluate.exact_match=false model.lora.peft_lora_r=1"
    cfg = preflight.check(compose(short))
    frame = model.skeleton(cfg["model"], cfg["peft"])
    state = {
        n: torch.zeros(p.shape) for n, p in frame.named_parameters() if p.requires_grad
    }
    return cfg, frame, state


WRITERS = {
    "adapter": lambda cfg, frame, state, folder: model.save_adapter(
        frame,
        state,
        model.load_tokenizer(cfg["model"]["name"]),
        {"round": 1, "template": "alpaca", "model": cfg["model"]},
        folder / "peft_1",
    ),
    "checkpoint": lambda cfg, frame, state, folder: checkpoint.save(
        folder, 1, state, {}, 1.0
    ),
    "json": lambda cfg, frame, state, folder: utils.write_json(
        folder / "history.json", {"rounds": ["x" * 10**6]}
    ),
    "configuration": lambda cfg, frame, state, folder: record(
        OmegaConf.create(json.loads(json.dumps(cfg))), [], folder
    ),
    "picture": lambda cfg, frame, state, folder: figures.plot_sweep(
        {"one": {1: 3.0, 2: 2.0}}, folder / "losses.png"
    ),
    "owner": lambda cfg, frame, state, folder: own(folder).close(),
}


@pytest.mark.parametrize("name", WRITERS)
def test_whatever_cannot_be_written_is_one_error(name, small, tmp_path):
    """At every size at which another one of the files is the first that is too large."""
    write = WRITERS[name]
    (tmp_path / "whole").mkdir()
    write(*small, tmp_path / "whole")
    files = [path for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    # A lock is empty when it is let go, and the probe before it is gone.
    sizes = {path.stat().st_size - 1 for path in files if path.name != ".lock"} or {99}
    for size in sizes | {0}:
        (folder := tmp_path / f"at {size}").mkdir()
        with files_of_at_most(size), pytest.raises(Unwritable) as told:
            write(*small, folder)
        assert re.search(
            r"at \d+.* cannot be written \(File too large\)", str(told.value)
        )
        assert not list(folder.glob("peft_*")) + list(folder.glob("checkpoints/0*"))


def test_a_folder_below_what_is_none_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Unwritable, match=r"deep cannot be written \(Not a dir"):
        begin(tmp_path / "file/run/deep", named=True)


def test_errors_of_another_file_or_a_network_are_not_the_folders(tmp_path):
    for error in (BrokenPipeError(32, "x"), TimeoutError(110, "x"), ValueError("x")):
        with pytest.raises(type(error)), utils.writing(tmp_path / "out"):
            raise error
    with pytest.raises(FileNotFoundError), utils.writing(tmp_path / "out"):
        Path("/nowhere/base.safetensors").read_bytes()
