"""What a run says and leaves behind: its figures, adapters and plot, its last word."""

import json
import shutil
from pathlib import Path
from typing import Any

import model
from utils import plot_losses, say, write_json

SHOWN = 3  # sample questions printed after a run


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
        history = json.loads((self.folder / "history.json").read_text())
        self.rounds = history["rounds"][:done]
        for adapter in self.folder.glob("peft_*"):
            if int(adapter.name.removeprefix("peft_")) > done:
                shutil.rmtree(adapter)
        for unfinished in self.folder.rglob(".*.tmp"):
            shutil.rmtree(unfinished)

    def write_round(self, entry: dict[str, Any], state: model.State) -> None:
        """Append to `history.json`, and save the adapter when it is due."""
        self.rounds.append(entry)
        write_json(self.folder / "history.json", {"rounds": self.rounds})
        done = entry["round"]
        if (
            done % self.cfg["train"]["save_every_round"] == 0
            or done == self.cfg["num_rounds"]
        ):
            self.save_last(state)

    def save_last(self, state: model.State) -> None:
        """Save `state` as the adapter of the last finished round, if it is not there."""
        done = len(self.rounds)
        folder = self.folder / f"peft_{done}"
        if not done or folder.exists():
            return
        settings = dict(self.cfg["model"])
        settings["name"] = model.portable_name(settings["name"])
        about = {
            "round": done,
            "template": self.cfg["dataset"]["template"],
            "model": settings,
        }
        model.save_adapter(self.frame, state, self.tokenizer, about, folder)

    def write_summary(self, more: dict[str, Any]) -> None:
        """Write `summary.json` and draw `train_loss.png`."""
        losses = [entry["train_loss"] for entry in self.rounds]
        plot_losses({"": losses}, self.folder / "train_loss.png", smoothed=False)
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
        write_json(self.folder / "summary.json", summary | more)


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
        f"{cfg['model']['name']} ({f'{bits}-bit' if bits else 'not quantised'}), "
        f"{cfg['peft']['_target_'].rpartition('.')[2].removesuffix('Config')}, "
        f"{strategy}: {cfg['num_clients']} clients, "
        f"{cfg['strategy']['fraction_fit']:.0%} of them a round, {cfg['num_rounds']} rounds"
    )


def report(folder: Path) -> None:
    """Print a finished run's last word: losses, scores, sample answers, what to do next."""
    summary = json.loads((folder / "summary.json").read_text())
    say(
        f"\nTraining loss {summary['train_loss_first']:.3f} -> "
        f"{summary['train_loss_last']:.3f} in {summary['rounds']} rounds, "
        f"{summary['seconds']:.0f} s."
    )
    adapter = folder / f"peft_{summary['rounds']}"
    question = "What is the ideal 1-day plan in London?"
    if "exact_match_after" in summary:
        answers = json.loads((folder / "answers.json").read_text())
        for record in answers[:: max(1, len(answers) // SHOWN)][:SHOWN]:
            say(f"\n  {record['instruction']} {record['input']}".rstrip())
            for name in ("base", "tuned"):
                say(f"    {name + ':':6} {' '.join(record[name].split())}")
        say(
            f"\nExact match on {len(answers)} held-out questions: "
            f"{summary['exact_match_before']:.1%} -> {summary['exact_match_after']:.1%}"
        )
        question = answers[0]["instruction"]
    say(f'\nAsk it: python test.py --peft-path={adapter} --question="{question}"')
