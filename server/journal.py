"""What a run says and leaves behind: its figures, adapters and plot, its last word."""

import math
import shutil
import textwrap
from pathlib import Path
from typing import Any

import dataset
import model
import tasks
from evaluation import examine
from methods.base import adapters
from reporting.figures import plot_run
from server.runs import (
    BEST,
    OWN,
    PERSONAL,
    PERSONAL_LOSSES,
    Before,
    History,
    Round,
    per,
    read,
    read_history,
)
from server.tracking import Tracking
from utils import Settings, command, public, say, write_json, writing

SHOWN = 3  # sample questions printed after a run


class Journal:
    """Writes a run down, round by round, into its folder."""

    def __init__(self, cfg: Settings, frame: model.PeftModel, folder: Path) -> None:
        self.cfg = cfg
        self.frame = frame
        self.folder = folder
        self.before: Before | dict[str, Any] = {}
        self.rounds: list[Round] = []
        self.tokenizer = model.load_tokenizer(
            cfg.model.name, cfg.model.use_fast_tokenizer
        )

    def go_on(self, done: int) -> None:
        """Take up the record of a run whose last checkpoint is of round `done`.

        What was written of later rounds goes: they will be done again.
        """
        history = read_history(self.folder, done)
        self.rounds, self.before = history["rounds"], history.get("before", {})
        for adapter in self.folder.glob("peft_*"):
            number = adapter.name.removeprefix("peft_")
            if number.isdigit() and int(number) > done:
                _remove(adapter)
        for unfinished in self.folder.rglob(".*.tmp"):
            _remove(unfinished)

    def track(self) -> None:
        """Let the run be followed by what `conf/tracking` names; `close` is the end of it."""
        known = [self.before, *self.rounds] if self.before else self.rounds
        self.tracking = Tracking(self.cfg, self.folder, known)

    def close(self) -> None:
        self.tracking.close()

    def write_before(self, scores: dict[str, Any]) -> None:
        """Take down what the base scores without training, if anything was measured.

        It is on disk with round 1; a run that stops before that begins anew.
        """
        if scores:
            self.before = {"round": 0, **scores}
            self.tracking.log(self.before)

    def write_round(self, entry: dict[str, Any], state: model.State) -> None:
        """Append to `history.json`; save the adapter when it is due or the best so far.

        The best is that of the lowest loss on the test questions, or else on what the
        clients hold back, where either is measured.
        """
        name = BEST[0] if self.cfg.evaluate.every_round else BEST[1]
        best = self.best()
        if name in entry:
            # Before the run was gone on with it may have been measured otherwise.
            least = best.get(name, math.inf) if best else math.inf
            entry["best"] = entry[name] < least
        report_lost(entry, self.rounds, self.cfg.train.seq_length)
        self.rounds.append(entry)
        write_json(self.folder / "history.json", self.history())
        if self._due(entry["round"]) or entry.get("best"):
            self.save_last(state)
        if entry.get("best") and best and not self._due(best["round"]):
            shutil.rmtree(self.folder / f"peft_{best['round']}", ignore_errors=True)
        self.tracking.log(entry)

    def history(self) -> History:
        before = {"before": self.before} if self.before else {}
        task = tasks.build(self.cfg)
        means = {"per": task.per} if task.per != tasks.Task.per else {}
        return {**means, **before, "rounds": self.rounds}

    def best(self) -> Round | None:
        """The entry of the best round so far, if any was measured."""
        return next((e for e in reversed(self.rounds) if e.get("best")), None)

    def _due(self, done: int) -> bool:
        every = self.cfg.train.save_every_round
        return done % every == 0 or done == self.cfg.num_rounds

    def save_last(self, state: model.State) -> None:
        """Save `state` as the adapter of the last finished round, if it is not there."""
        done = len(self.rounds)
        folder = self.folder / f"peft_{done}"
        if not done:
            return
        about = model.about(self.cfg, done)
        for name, adapter in adapters(state).items():
            if not (folder / name).exists():  # the run has saved this one already
                model.save_adapter(
                    self.frame, adapter, self.tokenizer, about, folder / name
                )

    def write_summary(self, more: dict[str, Any]) -> None:
        """Write `summary.json` and draw `train_loss.png`."""
        losses = [e["train_loss"] for e in self.rounds if "train_loss" in e]
        held = [
            e["peak_memory_client"] for e in self.rounds if "peak_memory_client" in e
        ]
        history = self.history()
        if "test_loss_after" in more:  # measured now, if not in every round
            last = self.rounds[-1] | {"test_loss": more["test_loss_after"]}
            history = history | {"rounds": [*self.rounds[:-1], last]}
        title = public(describe(self.cfg))
        plot_run(history, title, per(history), self.folder / "train_loss.png")
        summary = {"rounds": len(self.rounds)}
        if losses:
            summary |= {"train_loss_first": losses[0], "train_loss_last": losses[-1]}
        summary |= {
            "bytes_down": sum(entry["bytes_down"] for entry in self.rounds),
            "bytes_up": sum(entry["bytes_up"] for entry in self.rounds),
            "failures": sum(len(entry["failures"]) for entry in self.rounds),
            **({"peak_memory_client": max(held)} if held else {}),
            "peak_memory_server": max(e["peak_memory_server"] for e in self.rounds),
        }
        if best := self.best():
            summary["best_round"] = best["round"]
        for name in OWN:
            for when, entry in (("before", self.before), ("after", self.rounds[-1])):
                if name in entry:
                    summary[f"{name}_{when}"] = entry[name]
        summary |= self._spent() | more
        write_json(self.folder / "summary.json", summary)
        self.tracking.finish(summary)

    def _spent(self) -> dict[str, Any]:
        """What clients have told last of their records' epsilon, where any has."""
        told = {
            str(client["partition"]): client["epsilon"]
            for entry in self.rounds
            for client in entry["clients"]
            if "epsilon" in client
        }
        if not told:
            return {}
        last = next(entry for entry in reversed(self.rounds) if "epsilon" in entry)
        of = {name: last[name] for name in ("delta", "adjacency")}
        return {"epsilon": max(told.values()), **of, "epsilon_clients": told}


def _remove(path: Path) -> None:
    with writing(path.parent):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


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


def report_lost(
    entry: dict[str, Any], earlier: list[dict[str, Any]], seq_length: int
) -> None:
    """Say once, when it first happens, what of the clients' records is not trained on."""
    for name, what in (
        (
            "truncated",
            f"were cut at train.seq_length={seq_length}: they lose their end, conversations "
            "their beginning",
        ),
        ("dropped", "were left out: no answer, or none left by train.seq_length"),
    ):
        if entry.get(name) and not any(other.get(name) for other in earlier):
            drawn = sum(client["num-examples"] for client in entry["clients"])
            if name == "dropped":
                drawn += entry[name]
            say(f"round {entry['round']}: {entry[name]:,} of {drawn:g} records {what}")


def describe(cfg: dict) -> str:
    """One line on what is about to run."""
    strategy = cfg.strategy._target_.rpartition(".")[2]
    bits = cfg.model.quantization
    return (
        f"{cfg.mode + ': ' if cfg.baseline else ''}"
        f"{cfg.model.name} ({f'{bits}-bit' if bits else 'not quantised'}), "
        f"{cfg.peft._target_.rpartition('.')[2].removesuffix('Config')}, "
        f"{strategy}: {cfg.num_clients} clients, "
        f"{cfg.strategy.fraction_fit:.0%} of them a round, {cfg.num_rounds} rounds"
    )


def quantised_on_cpu(cfg: Settings) -> str | None:
    """What 4 or 8 bits cost where no GPU computes on them, in a line; None elsewhere."""
    bits = cfg.model.quantization
    if cfg.client_resources.num_gpus or not bits or cfg.launch.sharded:
        return None
    return (
        f"on a CPU {bits} bits save neither memory nor time, and cost accuracy: "
        "model.quantization=null is better"
    )


def report(cfg: Settings, folder: Path) -> None:
    """Print a finished run's last word: losses, scores, sample answers, what to do next."""
    summary = read(folder, "summary.json")
    last = read_history(folder, summary["rounds"])["rounds"][-1]
    took = f"{summary['rounds']} rounds, {summary['seconds']:.0f} s."
    if "train_loss_first" in summary:
        first, final = summary["train_loss_first"], summary["train_loss_last"]
        took = f"Training loss {first:.3f} -> {final:.3f} in {took}"
    say(f"\n{took}")
    if "epsilon_clients" in summary:
        say(
            f"Epsilon {summary['epsilon']:.2f} at delta {summary['delta']:g}, the largest of "
            f"{len(summary['epsilon_clients'])} clients ({summary['adjacency']})."
        )
    asked: list[dict[str, str]] = []
    if dataset.test_wanted(cfg):
        asked = dataset.load_test(cfg)[0]
    if (folder / "answers.json").exists():
        answers = read(folder, "answers.json")
        for record in answers[:: max(1, len(answers) // SHOWN)][:SHOWN]:
            say(f"\n  {_line(record['instruction'] + ' ' + record['input'])}")
            for name in ("base", "tuned"):
                say(f"    {name + ':':6} {_line(record[name])}")
    before_after = {
        when: {
            name.removesuffix(ending): value
            for name, value in summary.items()
            if name.endswith(ending)
        }
        for when, ending in (("before", "_before"), ("after", "_after"))
    }
    basis = tasks.build(cfg).per
    if asked:
        title = f"On {summary.get('test_questions', len(asked))} test questions"
        say("\n" + examine.table(title, _of(before_after, own=False), basis))
    if clients := last.get("eval_clients"):
        records = sum(client["num-examples"] for client in clients)
        title = f"On {records:g} records of {len(clients)} clients"
        say("\n" + examine.table(title, _of(before_after, own=True), basis))
    if chosen := summary.get("personal_clients"):
        loss = "  ".join(
            f"{name.removeprefix('eval_loss_')} {summary[name]:.4f}"
            for name in PERSONAL_LOSSES
        )
        say(f"\nThe adapters of {len(chosen)} clients' own, by loss on those: {loss}")
        # In a federation they are the nodes'.
        if own := sorted((folder / PERSONAL).glob("client_*")):
            say(f"Ask one: {command('test.py', f'--peft-path={own[0]}')}")
    if not asked and not clients and "epsilon" in summary:
        say(
            "\nNothing was measured. evaluate.exact_match=true lets the server measure on test "
            "questions (dataset.test_path)."
        )
    elif not asked and not clients:
        say(
            "\nNothing but the training loss was measured. strategy.fraction_evaluate=1 lets "
            "clients measure on records that they hold back, evaluate.exact_match=true the "
            "server on test questions (dataset.test_path)."
        )
    if summary.get("best_round", summary["rounds"]) != summary["rounds"]:
        best = folder / f"peft_{summary['best_round']}"
        say(f"\nRound {summary['best_round']} had the lowest loss; its adapter: {best}")
    # Alone, each client has one of its own.
    [adapter, *_] = sorted(
        (folder / f"peft_{summary['rounds']}").rglob("adapter_config.json")
    )
    words = [f"--peft-path={adapter.parent}"]
    if asked := [record for record in asked if "messages" not in record]:
        # The first that fits a line or two; clients' own records are not for showing.
        record = min(asked, key=lambda r: max(200, len(r["instruction"] + r["input"])))
        words += [f"--question={record['instruction']}"]
        words += [f"--input={record['input']}"] * bool(record["input"])
    say(f"\nAsk it: {command('test.py', *words)}")
    if "epsilon" in summary:
        say(
            f"\nPrivacy: epsilon {summary['epsilon']:.2f} or less for every client, at delta "
            f"{summary['delta']:g} ({summary['adjacency']}); {folder}/privacy.json"
        )


def _line(text: str) -> str:
    """A text as a line or two that a terminal can take."""
    return "".join(filter(str.isprintable, textwrap.shorten(text, 200)))


def _of(scores: dict[str, dict[str, Any]], own: bool) -> dict[str, dict[str, Any]]:
    """Those that clients measured on records of their own, or the others."""
    return {
        when: {k: v for k, v in each.items() if k.startswith("eval_") == own}
        for when, each in scores.items()
    }
