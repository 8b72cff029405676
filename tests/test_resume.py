"""pytest tests/test_resume.py: a run that is stopped at any moment ends as if it was not.

And a worker that dies in a run that goes on costs one reply.
"""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load

from assets.testbed.adapters import same
from assets.testbed.loopback import Killed, killed_in
from methods import store
from server import checkpoint, rounds
from settings.compose import compose, record, resumed
from settings.preflight import check
from utils import PROJECT, UserError, command, commit, override

OPTIMISERS = ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedmedian"]


def adapter(folder: Path, number: int) -> dict[str, torch.Tensor]:
    # From bytes, because a test below writes into the file.
    return load((folder / f"peft_{number}/adapter_model.safetensors").read_bytes())


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "history.json").read_text())
    return [entry["train_loss"] for entry in history["rounds"]]


def whole_and_killed(loopback, cfg: dict, folder: Path) -> tuple[Path, Path]:
    """The folders of a run that ended, and of the same one killed in its second round, whose
    two clients have both trained."""
    whole, parts = folder / "whole", folder / "parts"
    whole.mkdir()
    parts.mkdir()
    rounds.run(cfg, loopback(cfg, folder=whole), whole)
    killed_in(cfg, parts, replies=4)
    return whole, parts


# --- in this process: every strategy, every wire format ------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fedadam", "int8"),
        *(pytest.param(name, "float16", marks=pytest.mark.slow) for name in OPTIMISERS),
    ],
)
def test_a_run_that_goes_on_ends_bit_identical(
    name, dtype, configure, loopback, tmp_path
):
    cfg = configure(
        f"strategy={name}",
        f"comm.dtype={dtype}",
        "num_rounds=4",
        "num_clients=3",
        "strategy.fraction_fit=0.7",
        "train.training_arguments.max_steps=1",
    )
    whole, parts = whole_and_killed(loopback, cfg, tmp_path)
    again = cfg | {"resume": str(parts)}
    killed_in(again, parts, replies=4)  # its second round, the third of all
    rounds.run(again, loopback(again, folder=parts), parts)
    assert same(adapter(whole, 4), adapter(parts, 4))
    assert losses(whole) == losses(parts)
    summary = json.loads((parts / "summary.json").read_text())
    assert summary["rounds"] == 4
    kept = sorted(path.name for path in (parts / "checkpoints").iterdir())
    assert kept == ["000003", "000004"]


@pytest.mark.slow
def test_alone_every_client_goes_on_with_its_own_adapter(configure, loopback, tmp_path):
    cfg = configure("mode=local", "num_rounds=3", "num_clients=2")
    whole, parts = whole_and_killed(loopback, cfg, tmp_path)
    again = cfg | {"resume": str(parts)}
    rounds.run(again, loopback(again, folder=parts), parts)
    for own in ("client_0", "client_1"):
        file = f"peft_3/{own}/adapter_model.safetensors"
        assert (whole / file).read_bytes() == (parts / file).read_bytes()
    assert losses(whole) == losses(parts)


@pytest.mark.slow
def test_the_order_of_replies_leaves_no_trace(configure, loopback, tmp_path):
    cfg = configure("num_clients=4", "strategy.fraction_fit=1")
    (one := tmp_path / "one").mkdir()
    (other := tmp_path / "other").mkdir()
    rounds.run(cfg, loopback(cfg), one)
    forward = loopback(cfg)
    push = forward.push_messages

    def push_reversed(messages):
        ids = push(messages)
        forward.waiting.reverse()
        return ids

    forward.push_messages = push_reversed
    rounds.run(cfg, forward, other)
    assert same(adapter(one, 2), adapter(other, 2))


@pytest.mark.slow
def test_more_rounds_may_be_asked_for(configure, loopback, tmp_path):
    cfg = configure("num_rounds=2", "train.save_every_round=1")
    rounds.run(cfg, loopback(cfg, folder=tmp_path), tmp_path)
    first = adapter(tmp_path, 2)
    longer = cfg | {"num_rounds": 3, "resume": str(tmp_path)}
    rounds.run(longer, loopback(longer, folder=tmp_path), tmp_path)
    assert len(losses(tmp_path)) == 3
    assert same(first, adapter(tmp_path, 2))
    assert not same(first, adapter(tmp_path, 3))


@pytest.mark.slow
def test_a_run_that_stopped_before_its_first_checkpoint_begins(
    configure, loopback, tmp_path
):
    cfg = configure("num_rounds=1") | {"resume": str(tmp_path)}
    rounds.run(cfg, loopback(cfg, folder=tmp_path), tmp_path)
    assert len(losses(tmp_path)) == 1


# --- what is on the disk ------------------------------------------------------------------------


def test_half_a_checkpoint_is_none(tmp_path):
    checkpoint.save(tmp_path, 3, {"w": torch.zeros(1)}, {}, 1.0)
    whole = tmp_path / "checkpoints/000003"

    def write_half() -> None:
        with commit(tmp_path / "checkpoints/000004") as temporary:
            (temporary / "adapter.safetensors").write_text("half")
            raise Killed

    with pytest.raises(Killed):
        write_half()
    # As kill -9 leaves it: nothing cleans up.
    (tmp_path / "checkpoints/.000005.77.tmp").mkdir()
    assert checkpoint.newest(tmp_path) == whole


@pytest.mark.slow
def test_what_a_killed_run_left_of_later_rounds_is_done_again(
    configure, loopback, tmp_path
):
    cfg = configure("num_rounds=3", "train.save_every_round=1")
    rounds.run(cfg, loopback(cfg, folder=tmp_path), tmp_path)
    whole = adapter(tmp_path, 3)
    # Killed between the adapter of round 3 and its checkpoint, while writing another.
    shutil.rmtree(tmp_path / "checkpoints/000003")
    (tmp_path / "peft_3/adapter_model.safetensors").write_bytes(b"stale")
    (tmp_path / "checkpoints/.000003.77.tmp").mkdir()
    again = cfg | {"resume": str(tmp_path)}
    rounds.run(again, loopback(again, folder=tmp_path), tmp_path)
    assert same(whole, adapter(tmp_path, 3))
    assert not list(tmp_path.rglob("*.tmp"))


def test_error_feedback_of_a_round_that_is_done_again_is_not_used(tmp_path):
    kept = [store.Kept(tmp_path, 0, number) for number in range(5)]
    for number in (1, 2, 3):
        kept[number].save("residual", {"w": torch.tensor([float(number)])})
    store.Kept(tmp_path, 10, 2).save("residual", {"w": torch.tensor([9.0])})
    kept[2].save("own", {"w": torch.tensor([7.0])})
    assert kept[3].load("residual")["w"].item() == 2
    assert kept[4].load("residual")["w"].item() == 3
    assert kept[1].load("residual") is None
    assert kept[4].load("own")["w"].item() == 7
    kept[4].save("residual", {"w": torch.tensor([4.0])})
    # Of three rounds: one from the older of two checkpoints does two of them again.
    assert kept[3].load("residual")["w"].item() == 2
    assert len(list(tmp_path.glob("0/residual-*"))) == 3


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """A disk of the size that it is called with, or grows to when it is called again."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def of(size: str) -> Path:
        how = ["remount"] if folder.is_mount() else []
        options = ",".join([*how, f"size={size}"])
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
            capture_output=True,
        )
        if made.returncode:
            pytest.skip("may not mount a disk here")
        return folder

    yield of
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def roomy(configure_once, loopback_once, tmp_path_factory) -> tuple[dict, Path]:
    """A run with room enough: its configuration and its folder."""
    cfg = configure_once(
        "num_rounds=4",
        "num_clients=2",
        "train.save_every_round=1",
        "train.training_arguments.max_steps=1",
    )
    folder = tmp_path_factory.mktemp("roomy")
    rounds.run(cfg, loopback_once(cfg, folder=folder), folder)
    return cfg, folder


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "700k", "1500k", "2300k"])
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(size, disk, roomy, loopback):
    cfg, whole = roomy
    folder = disk(size)
    with pytest.raises(UserError, match=r"No space left on device") as told:
        rounds.run(cfg, loopback(cfg, folder=folder), folder)
    assert re.search("Go on after round|No round was finished", str(told.value))
    disk("100m")
    again = cfg | {"resume": str(folder)}
    rounds.run(again, loopback(again, folder=folder), folder)
    assert same(adapter(whole, 4), adapter(folder, 4))
    assert losses(whole) == losses(folder)
    assert not list(folder.rglob(".*.tmp"))


# --- a changed configuration ---------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path) -> Path:
    """The folder of a run that was begun with the command of a test below."""
    record(compose(SHORT), SHORT.split(), tmp_path)
    return tmp_path


SHORT = (
    "experiment=quickstart num_clients=4 strategy.fraction_fit=0.5 "
    "evaluate.exact_match=false train.training_arguments.max_steps=2 "
    "train.training_arguments.per_device_train_batch_size=4"
)
# With one worker: a second one loads the same libraries again, which takes longer than
# the rounds do.
LONE = f"{SHORT} +simulation.init_args.num_cpus=1"


def main(overrides: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "main.py", *shlex.split(overrides)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
        **more,
    )


@pytest.mark.slow
def test_what_may_change_and_what_may_not(begun):
    config, overrides = resumed(str(begun), ["num_rounds=9", "verbose=true"])
    assert config.num_rounds == 9
    assert config.num_clients == 4
    assert "num_rounds=9" in overrides
    for change, told in (
        ("model.quantization=8", "model.quantization was 4 and would be 8"),
        ("dataset.template=vicuna", "dataset.template was alpaca and would be vicuna"),
        ("peft=ia3", "peft._target_ was peft.LoraConfig and would be peft.IA3Config"),
        ("model.lora.peft_lora_r=4", "model.lora.peft_lora_r was 16 and would be 4"),
        ("num_clients=5", "num_clients was 4 and would be 5"),
        ("strategy=fedadam", "strategy._target_ was"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            resumed(str(begun), [change])
    refused = main(f"resume={begun} seed=1")  # the command itself
    assert refused.returncode == 1
    assert "seed was 0 and would be 1" in refused.stderr
    assert "Traceback" not in refused.stderr


# --- real processes, killed ------------------------------------------------------------------------


class Run:
    """The command as a user starts it, in a session of its own."""

    def __init__(self, overrides: str, stderr: int = subprocess.STDOUT) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "main.py", *shlex.split(overrides)],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
            # Under nohup the tests' own runs would not hear that a terminal is closed.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        self.said = ""

    def read_until(self, pattern: str) -> None:
        for line in self.process.stdout:
            self.said += line
            if re.search(pattern, line):
                return
        raise AssertionError(f"ended without {pattern}:\n{self.said}")

    def everything(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def end(self) -> int:
        rest, _ = self.process.communicate(timeout=300)
        self.said += rest
        return self.process.returncode


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=60)
    left = [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    for one in left:  # shown where it fails
        print(one.status(), " ".join(one.cmdline()).strip())
    return left == []


@pytest.mark.slow
def test_killed_three_times_it_ends_bit_identical(loopback, tmp_path):
    (whole := tmp_path / "whole").mkdir()
    parts = tmp_path / "parts"
    command = f"{LONE} strategy=fedadam num_rounds=6 train.save_every_round=6"
    # Never interrupted, and in one process instead of five.
    cfg = check(compose(command))
    rounds.run(cfg, loopback(cfg, folder=whole), whole)
    begin = f"{command} hydra.run.dir={parts}"
    # While the workers load the base, in the middle of round 2, in the middle of round 5.
    for start, when in (
        (begin, "Results:"),
        (f"resume={parts}", "round 1/6"),
        (f"resume={parts}", "round 4/6"),
    ):
        run = Run(start)
        run.read_until(when)
        everything = run.everything()
        for process in everything:
            process.kill()
        run.end()
        assert gone(everything)
    done = main(f"resume={parts}")
    assert done.returncode == 0, done.stderr
    assert "Going on after round" in done.stdout
    assert same(adapter(whole, 6), adapter(parts, 6))
    assert losses(whole) == losses(parts)


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_leaves_nobody_behind(tmp_path):
    run = Run(f"{LONE} num_rounds=500 hydra.run.dir={tmp_path}")
    run.read_until("round 2/500")
    everything = run.everything()
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    assert run.end() == 130, run.said
    assert gone(everything)
    [number] = re.findall(
        r"Go on after round (\d+) with: python main.py resume=", run.said
    )
    assert (tmp_path / f"peft_{number}/adapter_model.safetensors").is_file()
    assert len(losses(tmp_path)) == int(number)
    assert "Traceback" not in run.said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("imports", signal.SIGINT),
        ("imports", signal.SIGHUP),
        ("Ray's start", signal.SIGTERM),
    ],
)
def test_a_signal_before_there_is_anything_to_save_ends_it(moment, number, tmp_path):
    run = Run(f"{LONE} hydra.run.dir={tmp_path}/run")
    if moment == "imports":
        while not (tmp_path / "run/.hydra/overrides.yaml").exists():
            assert run.process.poll() is None
            time.sleep(0.01)  # the cores are the run's
    else:
        run.read_until("Results:")
    everything = run.everything()
    run.process.send_signal(number)
    assert run.end() == 130, run.said
    assert run.said.splitlines()[-1] == "Stopped."
    assert "Traceback" not in run.said
    assert gone(everything)


@pytest.mark.slow
def test_a_folder_has_one_run_and_each_end_of_it_says_how_to_go_on(tmp_path):
    folder = tmp_path / "it's (1), a=b"
    begin = (
        f"{LONE} num_rounds=500 {shlex.quote(override('hydra.run.dir', str(folder)))}"
    )
    resume = shlex.quote(override("resume", str(folder)))
    run = Run(begin, stderr=subprocess.PIPE)
    run.read_until("round 2/500")
    for other in (begin, resume):
        refused = main(other)
        assert refused.returncode == 1
        assert (
            f"another run writes into it, process {run.process.pid} on"
            in refused.stderr
        )
        assert "Traceback" not in refused.stderr
    # Nobody listens any more, which is told as a closed terminal is.
    everything = run.everything()
    run.process.stdout.close()
    said = run.process.stderr.read()
    assert run.process.wait() == 130, said
    assert gone(everything)
    assert "Traceback" not in said
    assert "cannot be written" not in said
    number, words = re.search(
        r"after round (\d+) with: python main.py (.*)", said
    ).groups()
    assert (folder / f"peft_{number}/adapter_model.safetensors").is_file()
    refused = main(begin)
    assert refused.returncode == 1
    assert f"Go on with it: {command('main.py', resume=folder)}. Or" in refused.stderr
    # As it was told to.
    again = Run(words)
    again.read_until(f"round {int(number) + 1}/500")
    everything = again.everything()
    # A raylet that is killed ends the driver as well, by Ray, with our word or without it.
    [server] = [process for process in everything if process.name() == "gcs_server"]
    server.kill()
    assert again.end() == 1, again.said
    assert gone(everything)
    assert re.search(
        r"Ray was killed.* Go on after round \d+ with: python main.py", again.said
    )
    assert (folder / "main.log").is_file()
    assert len(losses(folder)) > int(number)


@pytest.mark.slow
def test_ctrl_c_twice_stops_at_once(tmp_path):
    run = Run(f"{LONE} num_rounds=500 hydra.run.dir={tmp_path}")
    run.read_until("round 1/500")
    everything = run.everything()
    began = time.monotonic()
    os.kill(run.process.pid, signal.SIGINT)
    run.read_until("Stopping")  # two signals that wait would be one
    os.kill(run.process.pid, signal.SIGINT)
    assert run.end() == 130
    assert time.monotonic() - began < 60
    assert gone(everything)


@pytest.mark.slow
def test_ctrl_c_again_while_ray_ends_leaves_no_worker(tmp_path):
    run = Run(f"{LONE} num_rounds=500 hydra.run.dir={tmp_path}")
    run.read_until("round 1/500")
    everything = run.everything()
    raylet = next(one for one in everything if one.name() == "raylet")
    begun = [one for one in everything if "ClientAppActor" in one.name()]
    assert begun
    os.kill(run.process.pid, signal.SIGINT)
    psutil.wait_procs([raylet], timeout=60)
    # Its workers have no parent any more. They would end by themselves in a second or two, and
    # the run in less.
    for process in (everything[0], *begun):
        process.suspend()
    os.kill(run.process.pid, signal.SIGINT)
    everything[0].resume()
    assert run.end() == 130
    assert gone(everything)


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_last_checkpoint_is_whole(tmp_path):
    command = f"{LONE} train.save_every_round=100 num_rounds=100"
    run = Run(f"{command} hydra.run.dir={tmp_path}")
    run.read_until("round 2/100")
    # From now on no file of the server's may grow beyond 100 kB, and an adapter is 300.
    limit = (100_000, resource.RLIM_INFINITY)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, limit)
    assert run.end() == 1, run.said
    assert "cannot be written" in run.said
    [number] = re.findall(r"Go on after round (\d+) with: python main.py", run.said)
    assert "Traceback" not in run.said
    assert checkpoint.newest(tmp_path).name == f"{int(number):06d}"
    assert not list(tmp_path.rglob(".*.tmp"))


# --- a worker killed in a run that goes on --------------------------------------------------


def workers(run: Run) -> list[psutil.Process]:
    """The processes of a run that train a client at this moment."""
    return [
        process
        for process in run.everything()
        if process.cmdline()[:1] and "ClientAppActor.run" in process.cmdline()[0]
    ]


@pytest.mark.slow
def test_a_killed_worker_costs_its_reply_and_nothing_else(tmp_path):
    run = Run(
        f"{SHORT} num_rounds=5 train.training_arguments.max_steps=180 "
        f"hydra.run.dir={tmp_path}"
    )
    run.read_until("round 2/5")
    everything = run.everything()
    while not (busy := workers(run)):
        assert run.process.poll() is None
        time.sleep(0.01)
    busy[0].kill()
    assert run.end() == 0, run.said
    history = json.loads((tmp_path / "history.json").read_text())["rounds"]
    failures = [entry["failures"] for entry in history]
    [[failure]] = [each for each in failures if each]
    struck = failures.index([failure])
    assert [entry["replied"] for entry in history[:struck]] == [2] * struck
    assert history[struck]["replied"] == 1
    # A worker takes some seconds to come back, fewer than a round, which the other one ends.
    assert [entry["replied"] for entry in history[struck + 1 :]] == [2] * (4 - struck)
    assert len(failure["cause"].splitlines()) == 1
    assert run.said.count(failure["cause"]) == 1
    assert "Traceback" not in run.said
    assert gone(everything)
