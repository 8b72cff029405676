"""What a run says and leaves behind: its figures, adapters and plot, its last word."""

import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import model
from tracking import Tracking
from utils import UserError, plot_run, public, read_json, say, write_json

SHOWN = 3  # sample questions printed after a run
# What every round's entry in `history.json` tells, of which the summary is made.
NUMBERS = (
    "round",
    "train_loss",
    "bytes_down",
    "bytes_up",
    "peak_memory_client",
    "peak_memory_server",
)
SCORES = ("test_loss", "eval_loss")  # by which the best round is found, if it is


class Journal:
    """Writes a run down, round by round, into its folder."""

    def __init__(
        self, cfg: dict[str, Any], frame: model.PeftModel, folder: Path
    ) -> None:
        self.cfg = cfg
        self.frame = frame
        self.folder = folder
        self.rounds: list[dict[str, Any]] = []
        self.tokenizer = model.load_tokenizer(
            cfg["model"]["name"], cfg["model"]["use_fast_tokenizer"]
        )

    def go_on(self, done: int) -> None:
        """Take up the record of a run whose last checkpoint is of round `done`.

        What was written of later rounds goes: they will be done again.
        """
        self.rounds = read_rounds(self.folder, done)
        for adapter in self.folder.glob("peft_*"):
            number = adapter.name.removeprefix("peft_")
            if number.isdigit() and int(number) > done:
                _remove(adapter)
        for unfinished in self.folder.rglob(".*.tmp"):
            _remove(unfinished)

    def track(self) -> None:
        """Let the run be followed by what `conf/tracking` names; `close` is the end of it."""
        self.tracking = Tracking(self.cfg, self.folder, self.rounds)

    def close(self) -> None:
        self.tracking.close()

    def write_round(self, entry: dict[str, Any], state: model.State) -> None:
        """Append to `history.json`; save the adapter when it is due or the best so far.

        The best is that of the lowest loss on the test questions, or else on what the
        clients hold back, where either is measured.
        """
        name = SCORES[0] if self.cfg["evaluate"]["every_round"] else SCORES[1]
        before = self.best()
        if name in entry:
            # Before the run was gone on with it may have been measured otherwise.
            least = before.get(name, math.inf) if before else math.inf
            entry["best"] = entry[name] < least
        self.rounds.append(entry)
        write_json(self.folder / "history.json", {"rounds": self.rounds})
        if self._due(entry["round"]) or entry.get("best"):
            self.save_last(state)
        if entry.get("best") and before and not self._due(before["round"]):
            shutil.rmtree(self.folder / f"peft_{before['round']}", ignore_errors=True)
        self.tracking.log(entry)

    def best(self) -> dict[str, Any] | None:
        """The entry of the best round so far, if any was measured."""
        return next((e for e in reversed(self.rounds) if e.get("best")), None)

    def _due(self, done: int) -> bool:
        every = self.cfg["train"]["save_every_round"]
        return done % every == 0 or done == self.cfg["num_rounds"]

    def save_last(self, state: model.State) -> None:
        """Save `state` as the adapter of the last finished round, if it is not there."""
        done = len(self.rounds)
        folder = self.folder / f"peft_{done}"
        if not done:
            return
        settings = dict(self.cfg["model"])
        settings["name"] = model.portable_name(settings["name"])
        about = {
            "round": done,
            "template": self.cfg["dataset"]["template"],
            "model": settings,
        }
        for name, adapter in adapters(self.cfg, state).items():
            if not (folder / name).exists():  # the run has saved this one already
                model.save_adapter(
                    self.frame, adapter, self.tokenizer, about, folder / name
                )

    def write_summary(self, more: dict[str, Any]) -> None:
        """Write `summary.json` and draw `train_loss.png`."""
        losses = [entry["train_loss"] for entry in self.rounds]
        history = read_json(self.folder / "history.json")
        plot_run(history, public(describe(self.cfg)), self.folder / "train_loss.png")
        summary = {
            "rounds": len(self.rounds),
            "train_loss_first": losses[0],
            "train_loss_last": losses[-1],
            "bytes_down": sum(entry["bytes_down"] for entry in self.rounds),
            "bytes_up": sum(entry["bytes_up"] for entry in self.rounds),
            "failures": sum(len(entry["failures"]) for entry in self.rounds),
            "peak_memory_client": max(e["peak_memory_client"] for e in self.rounds),
            "peak_memory_server": max(e["peak_memory_server"] for e in self.rounds),
        }
        if best := self.best():
            summary["best_round"] = best["round"]
        summary |= more
        write_json(self.folder / "summary.json", summary)
        self.tracking.finish(summary)


def _remove(path: Path) -> None:
    with writing(path.parent):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def adapters(cfg: dict[str, Any], state: model.State) -> dict[str, model.State]:
    """The adapters that a run's state holds, by the folder that each gets below `peft_*/`.

    One, in that folder itself, or with `mode=local` each client's, in `client_<partition>`.
    """
    if cfg["mode"] != "local" or not state:
        return {"": state}
    own: dict[str, model.State] = {}
    for path, tensor in state.items():
        partition, name = path.split("/", 1)
        own.setdefault(f"client_{partition}", {})[name] = tensor
    return own


def read_rounds(folder: Path, done: int) -> list[dict[str, Any]]:
    """The first `done` rounds in a run's `history.json`.

    Raises `UserError` where it does not tell of them all that a summary is made of.
    """
    try:
        rounds = read_json(folder / "history.json")["rounds"][:done]
        if [entry["round"] for entry in rounds] != list(range(1, done + 1)):
            raise ValueError(f"{done} rounds are done, and it tells of {len(rounds)}")
        for entry in rounds:
            _check_entry(entry)
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/history.json does not fit the run: {error}. Put a copy of it into "
            "its place, or begin the run anew."
        ) from error
    return rounds


def _check_entry(entry: dict[str, Any]) -> None:
    """Raise `ValueError` unless a round's entry tells what it has to, in the right kinds."""
    for name in (*NUMBERS, *(name for name in SCORES if name in entry)):
        value = entry.get(name)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"its entry of round {entry['round']} lacks a {name}")
    if not isinstance(entry.get("failures"), list):
        raise ValueError(f"its entry of round {entry['round']} lacks its failures")
    if entry.get("best") and not any(name in entry for name in SCORES):
        raise ValueError(f"round {entry['round']} is the best by no measure")


def report_failures(server_round: int, failures: list[dict[str, Any]]) -> None:
    """Name each cause once, with the clients that it cost."""
    causes: dict[str, list[int]] = {}
    for failure in failures:
        causes.setdefault(failure["cause"], []).append(failure["partition"])
    for cause, partitions in causes.items():
        say(f"round {server_round}: left out client {str(partitions)[1:-1]}: {cause}")


def report_memory(server_round: int, clients: list[dict[str, Any]], size: int) -> None:
    """Name the clients whose micro-batch had to be smaller than `size`."""
    for client in clients:
        if client.get("micro_batch", size) < size:
            say(
                f"round {server_round}: client {client['partition']} ran out of GPU memory "
                f"and went on with {client['micro_batch']:g} examples at a time"
            )


def describe(cfg: dict) -> str:
    """One line on what is about to run."""
    strategy = cfg["strategy"]["_target_"].rpartition(".")[2]
    bits = cfg["model"]["quantization"]
    return (
        f"{'' if cfg['mode'] == 'federated' else cfg['mode'] + ': '}"
        f"{cfg['model']['name']} ({f'{bits}-bit' if bits else 'not quantised'}), "
        f"{cfg['peft']['_target_'].rpartition('.')[2].removesuffix('Config')}, "
        f"{strategy}: {cfg['num_clients']} clients, "
        f"{cfg['strategy']['fraction_fit']:.0%} of them a round, {cfg['num_rounds']} rounds"
    )


def report(folder: Path) -> None:
    """Print a finished run's last word: losses, scores, sample answers, what to do next."""
    summary = read_json(folder / "summary.json")
    say(
        f"\nTraining loss {summary['train_loss_first']:.3f} -> "
        f"{summary['train_loss_last']:.3f} in {summary['rounds']} rounds, "
        f"{summary['seconds']:.0f} s."
    )
    # Alone, each client has one of its own.
    [adapter, *_] = sorted(
        (folder / f"peft_{summary['rounds']}").rglob("adapter_config.json")
    )
    question = "What is the ideal 1-day plan in London?"
    if "exact_match_after" in summary:
        answers = read_json(folder / "answers.json")
        for record in answers[:: max(1, len(answers) // SHOWN)][:SHOWN]:
            say(f"\n  {record['instruction']} {record['input']}".rstrip())
            for name in ("base", "tuned"):
                say(f"    {name + ':':6} {' '.join(record[name].split())}")
        say(
            f"\nExact match on {len(answers)} held-out questions: "
            f"{summary['exact_match_before']:.1%} -> {summary['exact_match_after']:.1%}"
        )
        question = answers[0]["instruction"]
    say(
        f"\nAsk it: python test.py --peft-path={shlex.quote(str(adapter.parent))} "
        f"--question={shlex.quote(question)}"
    )
