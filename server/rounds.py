"""What the server does: sample clients, check replies, aggregate, write the run down.

The strategy is Flower's own, named in `conf/strategy`. The loop around it is ours, so that
a reply is checked before it counts and each round is on disk before the next one begins.
"""

import copy
import math
import resource
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    RecordDict,
)
from flwr.serverapp import Grid

import dataset
import model
from evaluation.examine import Examination, Scores
from methods import wire
from methods.aggregate import WEIGHTS, Cohort, aggregator_for, build, norm
from methods.wire import Unusable
from server import checkpoint
from server.cohort import cohort_size, sample
from server.exchange import Exchange, OutOfRange, alike, most_used
from server.journal import Journal, adapters, report_failures, report_memory
from server.runs import telling
from utils import (
    STOP,
    Progress,
    Stopped,
    Unwritable,
    UserError,
    command,
    learning_rate,
    look_for_stop,
    mix_seed,
    override,
    say,
    write_json,
)

NODES_TIMEOUT = 600.0  # seconds that clients have to connect


class RunFailed(UserError):
    """A round could not be completed. What came before it is on disk."""


# --- the run -------------------------------------------------------------------------------------


def run(
    cfg: dict[str, Any],
    grid: Grid,
    folder: Path,
    told: dict[str, str] | None = None,
) -> None:
    """Fine-tune for `cfg.num_rounds` rounds; write history, adapters and summary.

    The clients are whoever is connected: workers of a simulation, or the nodes of a
    federation, which come and go. `told` is what nodes are told with every message.

    With `cfg.resume` it goes on after the newest checkpoint in `folder`. Raises
    `RunFailed` when no client of a round gives a usable reply or the disk is full, and
    `Stopped` after `STOP.set()`; what the rounds before have left stays.
    """
    started = time.monotonic()
    forget_peak_memory()
    server = Server(cfg, grid, told)
    journal = Journal(cfg, server.frame, folder)
    examination = Examination(cfg) if dataset.test_wanted(cfg) else None
    base = examination.base() if examination else ({}, [])
    state: model.State = {}
    done = 0
    if cfg["resume"] and (newest := checkpoint.newest(folder)):
        state, done, seconds = checkpoint.load(newest, server.strategy)
        started -= seconds
        journal.go_on(done)
        say(f"Going on after round {done}.")
    progress = Progress(cfg["num_rounds"], done)
    journal.track()
    try:
        measured: list[Scores] = []
        if not done:
            state = server.initial_adapter()
            journal.write_before(base[0] | server.evaluate_round(0, state))
        progress.begin({} if done else journal.before)
        for server_round in range(done + 1, cfg["num_rounds"] + 1):
            new_state, entry = server.train_round(server_round, state)
            if due(cfg, server_round, default=1):
                entry |= server.evaluate_round(server_round, new_state)
            if examination and due(cfg, server_round, default=0):
                each = adapters(cfg, new_state).values()
                measured = [examination.measure(adapter) for adapter in each]
                entry |= mean(measured)
            journal.write_round(entry, new_state)
            seconds = time.monotonic() - started
            checkpoint.save(folder, server_round, new_state, server.strategy, seconds)
            state, done = new_state, server_round
            progress.advance(entry)
        scores = {}
        if examination:
            scores = conclude(cfg, examination, base, state, measured, folder)
        journal.write_summary(scores | {"seconds": time.monotonic() - started})
    except Unwritable as error:
        raise RunFailed(f"{error} {go_on(folder, done, bool(told))}") from error
    except (RunFailed, Stopped) as error:
        with suppress(Unwritable):  # the checkpoint has it
            journal.save_last(state)
        raise type(error)(f"{error} {go_on(folder, done, bool(told))}") from error
    finally:
        progress.close()
        journal.close()


def due(cfg: dict[str, Any], server_round: int, default: int) -> bool:
    """Whether the adapter of this round is evaluated: every so many rounds, and at the end.

    `default` stands for `evaluate.every_round=0`; 0 is never.
    """
    every = cfg["evaluate"]["every_round"] or default
    last = server_round == cfg["num_rounds"]
    return bool(every) and (server_round % every == 0 or last)


def conclude(
    cfg: dict[str, Any],
    examination: Examination,
    before: tuple[Scores, list[str]],
    state: model.State,
    measured: list[Scores],
    folder: Path,
) -> dict[str, Any]:
    """Examine the final adapter; write `answers.json` and `test_scores.json` (the scores of
    each question, of base and adapter) and return what the summary tells.

    `measured`: what the last round has found of it already, if anything. Where each client
    has an adapter of its own the scores are their means, and the answers those of the
    client in the middle.
    """
    final = [*adapters(cfg, state).values()]
    after = [
        examination.tuned(adapter, known)
        for adapter, known in zip(final, measured or [None] * len(final), strict=True)
    ]
    each = [scores for scores, _ in after]
    told = {f"{name}_before": score for name, score in before[0].items()}
    told |= {f"{name}_after": score for name, score in mean(each).items()}
    told |= {
        "test_questions": len(examination.records),
        "test_left_out": examination.left_out,
    }
    questions = {
        "base": before[0].questions,
        "tuned": mean([scores.questions for scores in each]),
    }
    write_json(folder / "test_scores.json", questions)
    if cfg["mode"] == "local":
        clients = [{"partition": i, **scores} for i, scores in enumerate(each)]
        told["clients"] = clients
    if cfg["evaluate"]["exact_match"]:
        after.sort(key=lambda examined: examined[0]["exact_match"])
        _, answers = after[len(after) // 2]
        write_json(
            folder / "answers.json", examination.side_by_side(before[1], answers)
        )
    return told


def mean(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each score, or of each place in a list of scores, the mean over all."""
    return {
        name: np.mean([each[name] for each in scores], axis=0).tolist()
        for name in scores[0]
    }


def go_on(folder: Path, done: int, federated: bool = False) -> str:
    """How to take up a run that has stopped."""
    if not done:
        return "No round was finished."
    how = command("main.py", resume=folder)
    if federated:
        how = f"flwr run with {override('resume', str(folder))} in its overrides"
    return f"Go on after round {done} with: {how}"


class Server:
    """Talks to the clients: what goes out, what comes back, what is fit to be used."""

    def __init__(
        self, cfg: dict[str, Any], grid: Grid, told: dict[str, str] | None = None
    ) -> None:
        self.cfg = cfg
        self.grid = grid
        self.told = told or {}
        self.strategy = build(cfg["strategy"])
        self.frame = model.skeleton(cfg["model"], cfg["peft"])
        self.expected = {
            name: parameter
            for name, parameter in self.frame.named_parameters()
            if parameter.requires_grad
        }
        # The number that a node goes by here, and in a simulation its partition.
        self.partitions: dict[int, int] = {}
        self.refused: dict[int, str] = {}  # by node: why it takes no part
        self.singly = False  # whether replies are fetched one by one
        self._wait_for_nodes(cfg["num_clients"])

    def _available(self) -> list[int]:
        """Nodes that are connected and take part, in the order in which they were seen."""
        # Their ids are random in every run; ascending, they are as good as any.
        connected = sorted(self.grid.get_node_ids())
        for node in connected:
            if node not in self.partitions:
                self.partitions[node] = len(self.partitions)
                if self.told:
                    say(f"Client {self.partitions[node]} is node {node}.")
        willing = set(connected) - self.refused.keys()
        return sorted(willing, key=self.partitions.__getitem__)

    def _wait_for_nodes(self, wanted: int) -> None:
        # They connect while this already runs, and get their numbers all at once.
        started = time.monotonic()
        told = False
        while (here := len({*self.grid.get_node_ids()} - self.refused.keys())) < wanted:
            look_for_stop()
            waited = time.monotonic() - started
            if waited > NODES_TIMEOUT:
                raise RunFailed(
                    f"Only {here} of {wanted} clients connected within "
                    f"{NODES_TIMEOUT:.0f} s (num_clients={self.cfg['num_clients']})."
                )
            if waited > 5 and not told:
                say(f"Waiting for {wanted} clients; {here} are connected.")
                told = True
            STOP.wait(0.1)

    def initial_adapter(self) -> model.State:
        """The first adapter: as far as the seed decides it made here, the rest by clients.

        What PEFT reads from the base's weights (DoRA's magnitudes) only clients can make;
        it is what more than half of them have made alike, of three at least where there are
        as many. The clients that train first are asked in any case: so their workers load
        the base side by side, and who cannot take part is known. Who fails is replaced by
        others, `strategy.max_round_retries` times.
        """
        try:
            first = model.seeded(self.cfg["model"], self.cfg["peft"], self.cfg["seed"])
        except UserError:  # no adapter at all can be made without the weights
            first = {k: torch.full(v.shape, math.nan) for k, v in self.expected.items()}
        unknown = [name for name, v in first.items() if not torch.isfinite(v).all()]
        retries = self.cfg["strategy"]["max_round_retries"]
        tried: set[int] = set()
        for attempt in range(1 + retries):
            made: list[tuple[model.State, list[dict[str, Any]]]] = []  # by whom, alike
            nodes = self._cohort(
                "fraction_fit", 1, attempt, tried, least=3 if unknown else 1
            ).nodes
            messages = [
                Message(RecordDict(), node, MessageType.QUERY) for node in nodes
            ]
            exchange = Exchange(self, messages)
            # To the last: a reply that nobody fetches stays in Flower's store, and its
            # engine would look at it again for every node until the run ends.
            for state, client in exchange.replies():
                own = {name: state[name] for name in unknown}
                group = next((who for one, who in made if alike(one, own)), None)
                if group is None:
                    made.append((own, group := []))
                group.append(client)
            report_failures(0, exchange.failures)
            tried |= set(nodes)
            made.sort(key=lambda one: -len(one[1]))
            replied = sum(len(who) for _, who in made)
            enough = not unknown or replied >= min(3, len(nodes)) or attempt == retries
            if made and enough and len(made[0][1]) > replied / 2:
                break
        else:
            if not made:
                cause = exchange.failures[-1]["cause"]
                raise RunFailed(f"No client could load the model: {cause}.")
            raise RunFailed(
                f"The {replied} clients that were asked make {len(made)} different first "
                f"adapters, and none is made by more than half: {unknown[0]} differs. "
                "They have different bases."
            )
        for _, others in made[1:]:
            cause = "its first adapter is not the one that more than half have made"
            report_failures(0, [who | {"cause": cause} for who in others])
        first |= made[0][0]
        if name := wire.lost(first, dtype := self.cfg["comm"]["dtype"]):
            raise RunFailed(
                f"The first adapter cannot be sent as comm.dtype={dtype}: {name} holds "
                "values that are not finite in it. Set comm.dtype=float32."
            )
        if self.cfg["mode"] == "local":
            return {
                f"{partition}/{name}": tensor
                for partition in range(self.cfg["num_clients"])
                for name, tensor in first.items()
            }
        return first

    def train_round(
        self, server_round: int, state: model.State
    ) -> tuple[model.State, dict[str, Any]]:
        """Send the adapter out, check what comes back and aggregate it.

        Returns the new adapter and the round's entry for `history.json`. Where the replies
        are too few, or make no adapter that could be sent out again, others are asked,
        `strategy.max_round_retries` times.
        """
        began = time.monotonic()
        settings = self.cfg["strategy"]
        failures: list[dict[str, Any]] = []
        tried: set[int] = set()
        out: set[int] = set()  # who is left out of the whole round
        for attempt in range(1 + settings["max_round_retries"]):
            cohort = self._cohort("fraction_fit", server_round, attempt, tried, out)
            before = copy.deepcopy(self.strategy)
            messages = self.strategy.configure_train(
                server_round, ArrayRecord(state), ConfigRecord(), cohort
            )
            exchange = Exchange(self, messages, state)
            aggregator = aggregator_for(self.cfg["mode"], self.strategy, state)
            seconds_aggregate = 0.0
            lengths: dict[int, float] = {}
            for update, client in exchange.replies():
                received = time.monotonic()
                lengths[client["partition"]] = norm(update)
                aggregator.add(update, client, self._weight(client))
                seconds_aggregate += time.monotonic() - received
            failures += exchange.failures
            report_failures(server_round, exchange.failures)
            tried |= set(cohort.nodes)
            received = time.monotonic()
            few = len(lengths) < settings["min_fit_replies"]
            try:
                if few:
                    raise Unusable(
                        f"{len(lengths)} usable replies where "
                        f"strategy.min_fit_replies={settings['min_fit_replies']}"
                    )
                new_state = aggregator.aggregate(server_round)
                self._check(new_state)
            except Unusable as error:
                say(f"round {server_round}: {error}.")
                self.strategy = before  # what it keeps may have taken up what is no use
                lost = few and exchange.failures
                cause = exchange.failures[-1]["cause"] if lost else str(error)
                if isinstance(error, OutOfRange):
                    longest = max(lengths, key=lengths.__getitem__)
                    numbers = self.partitions.items()
                    out |= {node for node, number in numbers if number == longest}
                    why = "its update is the longest of those that make no adapter"
                    failures.append({"partition": longest, "cause": why})
                    report_failures(server_round, failures[-1:])
            else:
                break
        else:
            raise RunFailed(
                f"Round {server_round} failed {attempt + 1} times "
                f"(strategy.max_round_retries={settings['max_round_retries']}). The last "
                f"cause: {cause}."
            )
        seconds_aggregate += time.monotonic() - received
        clients = sorted(exchange.clients, key=lambda client: client["partition"])
        arguments = self.cfg["train"]["training_arguments"]
        report_memory(server_round, clients, arguments["per_device_train_batch_size"])
        weights = [self._weight(client) for client in clients]
        losses = [client["train_loss"] for client in clients]
        seconds = time.monotonic() - began
        return new_state, {
            "round": server_round,
            "train_loss": float(np.average(losses, weights=weights)),
            "learning_rate": learning_rate(self.cfg, server_round),
            **totals(clients, seconds),
            "sampled": len(cohort.nodes),
            "replied": len(clients),
            "retries": attempt,
            "failures": failures,
            "bytes_down": len(cohort.nodes) * exchange.bytes_down,
            "bytes_up": sum(client["bytes_up"] for client in clients),
            "peak_memory_client": max(client["peak_memory"] for client in clients),
            "peak_memory_server": peak_memory(),
            "clients": clients,
            "seconds_aggregate": seconds_aggregate,
            "seconds": seconds,
        }

    def _check(self, state: model.State) -> None:
        """Raise `OutOfRange` for adapters that would not arrive as they are sent out."""
        dtype = self.cfg["comm"]["dtype"]
        for adapter in adapters(self.cfg, state).values():
            if fault := wire.misshapen(adapter, self.expected):
                raise Unusable(f"the aggregate is no adapter: {fault}")
            if name := wire.lost(adapter, dtype):
                raise OutOfRange(
                    f"the aggregate cannot be sent as comm.dtype={dtype}: {name} holds "
                    "values that are not finite in it"
                )

    def _weight(self, client: dict[str, Any]) -> int:
        """What a client counts for in the mean, in examples or records."""
        return client[WEIGHTS[self.cfg["strategy"]["weighted_by"]]]

    def bound(self, client: dict[str, Any], kind: str) -> None:
        """Hold a client's word for how much it used against what the server knows.

        In a simulation the server knows all of it, and more is a lie: raises `Unusable`.
        In a federation records, and processes that train side by side, are a node's own:
        more counts for what one process takes, or for `strategy.max_weight`.
        """
        federated, partition = bool(self.told), client["partition"]
        most = self.cfg["strategy"]["max_weight"] or math.inf
        for name in ("num-examples", "records"):
            if name not in client:
                continue
            known = most_used(self.cfg, kind, name, partition, federated)
            if client[name] > known and not federated:
                raise Unusable(f"its {name} is above {known}, which is all that it has")
            client[name] = min(client[name], known, most)

    def evaluate_round(self, server_round: int, state: model.State) -> dict[str, Any]:
        """Let a share of the clients measure the new adapter on records held back.

        In round 0 the base without any, by those who will be asked last: before and after
        are then of the same clients, as long as nobody comes or goes. The means are weighted
        by examples; worst and spread (the standard deviation) are over the clients with
        enough records for that (`utils.telling`), if there are any.
        """
        if not self.cfg["strategy"]["fraction_evaluate"]:
            return {}
        asked = server_round or self.cfg["num_rounds"]
        cohort = self._cohort("fraction_evaluate", asked)
        messages = self.strategy.configure_evaluate(
            server_round, ArrayRecord(state), ConfigRecord(), cohort
        )
        exchange = Exchange(self, messages, state)
        clients = [client for _, client in exchange.replies()]
        report_failures(server_round, exchange.failures)
        result: dict[str, Any] = {"evaluate_failures": exchange.failures}
        if clients:
            clients.sort(key=lambda client: client["partition"])
            weights = [client["num-examples"] for client in clients]
            if self.told:
                # A node's word is all there is; ten times the middle one is enough.
                middle = sorted(weights)[(len(weights) - 1) // 2]
                weights = [min(weight, 10 * middle) for weight in weights]
            for name in ("eval_loss", "eval_accuracy"):
                values = [client[name] for client in clients]
                result[name] = float(np.average(values, weights=weights))
            result["eval_perplexity"] = float(np.exp(min(result["eval_loss"], 700)))
            if losses := [client["eval_loss"] for client in telling(clients)]:
                result["eval_loss_worst"] = max(losses)
                result["eval_loss_spread"] = float(np.std(losses))
            result["eval_clients"] = clients
        return result

    def _cohort(
        self,
        fraction: str,
        server_round: int,
        attempt: int = 0,
        tried: set[int] | None = None,
        out: set[int] | None = None,
        least: int = 1,
    ) -> Cohort:
        """The nodes that take part, in order of their numbers; waits until there is one.

        Those that were `tried` in this round already come in only if the others are too few,
        and those in `out` not at all. `least` of them, where there are as many. Raises
        `RunFailed` when all that ever came refuse.
        """
        if not (nodes := self._available()):
            if self.refused and self.refused.keys() >= self.partitions.keys():
                [*_, cause] = self.refused.values()
                raise RunFailed(f"All {len(self.refused)} clients refused: {cause}.")
            self._wait_for_nodes(1)
            nodes = self._available()
        size = max(least, cohort_size(len(nodes), self.cfg["strategy"][fraction]))
        nodes = [node for node in nodes if node not in (out or ())] or nodes
        size = min(size, len(nodes))
        others = [node for node in nodes if node not in (tried or ())]
        parts = [self.cfg["seed"], fraction, server_round]
        seed = mix_seed(*parts, attempt) if attempt else mix_seed(*parts)
        return Cohort(sample(others if len(others) >= size else nodes, size, seed))


def totals(clients: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What clients count, over all of them; left out where one of them does not tell.

    `tokens` trained on, without padding, and how many a second of the round; records that
    `train.seq_length` has cut (`truncated`) or left no answer (`dropped`).
    """
    sums: dict[str, Any] = {
        name: int(sum(client[name] for client in clients))
        for name in ("tokens", "truncated", "dropped")
        if all(name in client for client in clients)
    }
    if "tokens" in sums:
        sums["tokens_per_second"] = sums["tokens"] / seconds
    return sums


def forget_peak_memory() -> None:
    """Let `peak_memory` count from now on; in a multirun the process has done other runs.

    Linux only. Elsewhere it stays the most of the process's whole life.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most memory that this process has held, in bytes, since `forget_peak_memory`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
