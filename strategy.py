"""What the server does: sample clients, check replies, aggregate, write the run down.

The strategy is Flower's own, named in `conf/strategy`. The loop around it is ours, so that
a reply is checked before it counts and each round is on disk before the next one begins.
"""

import copy
import logging
import math
import random
import resource
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
)

import checkpoint
import comm
import dataset
import model
from comm import Unusable
from examine import Examination, Scores
from journal import Journal, adapters, report_failures, report_memory
from utils import (
    STOP,
    Progress,
    Refusal,
    Stopped,
    Unwritable,
    UserError,
    command,
    construct,
    learning_rate,
    look_for_stop,
    mix_seed,
    one_line,
    override,
    say,
    telling,
    write_json,
)

NODES_TIMEOUT = 600.0  # seconds that clients have to connect
# Seconds that clients have at least in the first exchange, whatever train.round_timeout
# says: they load the base, and one of 13 GB from a slow disk takes minutes.
LOAD_TIMEOUT = 1800.0
PULL_INTERVAL = 0.02  # seconds between looks for replies, at first
# Keys of conf/strategy that are this module's, not the constructor's.
OURS = (
    "fraction_fit",
    "fraction_evaluate",
    "min_fit_replies",
    "max_round_retries",
    "clip_norm",
    "weighted_by",
    "max_weight",
)
# The metric that each `strategy.weighted_by` weighs a client by.
WEIGHTS = {"examples": "num-examples", "records": "records"}
# Strategies that are a function of the weighted mean of the replies.
AVERAGING = {FedAvg, FedProx, FedAvgM, FedAdam, FedYogi, FedAdagrad}


class RunFailed(UserError):
    """A round could not be completed. What came before it is on disk."""


# --- what a client may tell of itself --------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A metric of a reply: one number, whole or not, within bounds."""

    kind: type
    low: float = 0
    high: float = 2**53  # beyond it readers of JSON lose whole numbers
    needed: bool = False


LOSS = Figure(float, high=1e4, needed=True)  # nats a token; a guess of no idea costs 10
SECONDS = Figure(float, high=1e9)
COUNT = Figure(int)
# By the kind of message that is answered. What is not listed here is not looked at.
FIGURES: dict[str, dict[str, Figure]] = {
    MessageType.QUERY: {},
    MessageType.TRAIN: {
        "num-examples": Figure(int, low=1, needed=True),
        "train_loss": LOSS,
        "peak_memory": Figure(int, needed=True),
        "records": Figure(int, low=1),
        "micro_batch": Figure(int, low=1),
        **dict.fromkeys(("tokens", "truncated", "dropped"), COUNT),
        "seconds": SECONDS,
        **{
            f"seconds_{lap}": SECONDS
            for lap in ("load", "tokenise", "set", "train", "read")
        },
    },
    MessageType.EVALUATE: {
        "num-examples": Figure(int, low=1, needed=True),
        "eval_loss": LOSS,
        "eval_accuracy": Figure(float, high=1, needed=True),
        **dict.fromkeys(("truncated", "dropped"), COUNT),
    },
}


def read_figures(kind: str, metrics: Any) -> dict[str, float]:
    """The metrics of a reply to a message of this kind that are known.

    Raises `Unusable` where one is missing, is no number, or is out of bounds.
    """
    figures: dict[str, float] = {}
    for name, figure in FIGURES[kind].items():
        value = metrics.get(name)
        if value is None:
            if figure.needed:
                raise Unusable(f"its metrics lack {name}")
            continue
        if type(value) is not int and type(value) is not figure.kind:
            whole = "whole " if figure.kind is int else ""
            raise Unusable(f"its {name} is no {whole}number")
        if not figure.low <= value <= figure.high:  # NaN is not
            raise Unusable(f"its {name} is not within {figure.low} and {figure.high:g}")
        figures[name] = figure.kind(value)
    return figures


# --- whom to ask, and how to aggregate -------------------------------------------------------


def build(node: dict[str, Any]) -> FedAvg:
    """The strategy that `conf/strategy` names.

    `Server` decides whom it asks, so it takes everyone that it is shown.
    Raises `UserError` for settings that it does not take.
    """
    settings = {k: v for k, v in node.items() if k not in OURS}
    everyone = {
        "fraction_train": 1.0,
        "fraction_evaluate": 1.0,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
    }
    return construct(settings, "flwr.serverapp.strategy", **everyone)


def rehearse(node: dict[str, Any], count: int) -> None:
    """Let the strategy that `conf/strategy` names aggregate `count` small made-up replies.

    Raises `UserError` where it makes no adapter of them, as it would after the first round.
    """
    made = build(node)
    made.min_train_nodes = made.min_available_nodes = 0  # nobody is asked
    log = logging.getLogger("flwr")
    log.disabled, before = True, log.disabled
    start = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    try:
        made.configure_train(1, ArrayRecord(start), ConfigRecord(), Cohort([]))
        gathered = aggregator_for("federated", made, start)
        for i in range(count):
            update = {k: torch.full_like(v, (i + 1) / 64) for k, v in start.items()}
            client = {"partition": i, "num-examples": i + 1, "train_loss": 1.0}
            gathered.add(update, client, i + 1)
        fault = model.mismatch(gathered.aggregate(1), start)
    except Exception as error:  # whatever a class makes of what is no use to it
        fault = str(error) or type(error).__name__
    finally:
        log.disabled = before
    if fault:
        raise UserError(
            f"strategy._target_={node['_target_']} makes no adapter of {count} replies: "
            f"{one_line(fault)}"
        )


def cohort_size(num_clients: int, fraction: float) -> int:
    """How many clients a fraction means: rounded down, but at least one."""
    # 0.29 * 100 is a hair under 29 in floating point.
    return max(1, int(num_clients * fraction + 1e-9))


def sample(nodes: list[int], size: int, seed: int) -> list[int]:
    """The nodes that take part, in the order in which they stand; `seed` alone decides."""
    places = sorted(random.Random(seed).sample(range(len(nodes)), size))
    return [nodes[place] for place in places]


class Cohort:
    """A grid that shows a strategy no nodes but the sampled ones."""

    def __init__(self, nodes: list[int]) -> None:
        self.nodes = nodes

    def get_node_ids(self) -> list[int]:
        return self.nodes


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
        if name := comm.lost(first, dtype := self.cfg["comm"]["dtype"]):
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
            if fault := model.misshapen(adapter, self.expected):
                raise Unusable(f"the aggregate is no adapter: {fault}")
            if name := comm.lost(adapter, dtype):
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


def most_used(
    cfg: dict[str, Any], kind: str, name: str, partition: int, federated: bool
) -> float:
    """The most `num-examples` or `records` that a client can have used for a message.

    Infinite where only its node can know.
    """
    arguments = cfg["train"]["training_arguments"]
    steps = arguments["max_steps"]
    if kind == MessageType.TRAIN and name == "num-examples" and steps > 0:
        batch = arguments["per_device_train_batch_size"] * cfg["launch"]["processes"]
        return steps * arguments["gradient_accumulation_steps"] * batch
    if federated:
        return math.inf
    if kind == MessageType.EVALUATE:
        rows = dataset.load_partition(cfg, partition)
        return len(dataset.split(cfg, rows)[1])
    rows = len(dataset.training_rows(cfg, partition))
    passes = arguments["num_train_epochs"] if name == "num-examples" else 1
    return math.ceil(passes * rows)


class OutOfRange(Unusable):
    """An adapter that is finite here, and would not be where it is sent."""


class Exchange:
    """One exchange of messages: sends them, and hands out usable replies as they come.

    Afterwards `clients` holds the metrics of those, `failures` who failed and why.
    """

    def __init__(
        self, server: Server, messages: list[Message], state: model.State | None = None
    ) -> None:
        self.server = server
        self.clients: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.kind = messages[0].metadata.message_type
        self.timeout = server.cfg["train"]["round_timeout"]
        if self.kind == MessageType.QUERY and self.timeout:
            self.timeout = max(self.timeout, LOAD_TIMEOUT)
        dtype = server.cfg["comm"]["dtype"]
        self.adapters = adapters(server.cfg, state or {})
        arrays = {
            name: ArrayRecord(comm.pack(adapter, dtype)[0])
            for name, adapter in self.adapters.items()
        }
        self.bytes_down = num_bytes(next(iter(arrays.values())))  # to each client
        for message in messages:
            # The strategy gave all of them one record; each names its own partition.
            # Under a name that the strategy may be told (`configrecord_key`).
            config = next(iter(message.content.config_records.values()), {})
            partition = server.partitions[message.metadata.dst_node_id]
            config = ConfigRecord({**config, **server.told, "partition": partition})
            own = arrays.get(f"client_{partition}") or arrays[""]
            message.content = RecordDict({"arrays": own, "config": config})
        self.messages = messages

    def replies(self) -> Iterator[tuple[model.State, dict[str, Any]]]:
        """Each usable reply's arrays and its metrics, in order of arrival.

        Ends when everybody has answered, or the time is over: `train.round_timeout`, or in
        the first exchange, where bases are loaded, `LOAD_TIMEOUT` if that is longer.
        """
        began = time.monotonic()
        pushed = set(self.server.grid.push_messages(self.messages))
        waiting = {}
        for message in self.messages:
            node, message_id = message.metadata.dst_node_id, message.metadata.message_id
            if message_id in pushed:  # which is how a grid says whom it reaches
                waiting[message_id] = node
            else:
                self._fail(node, "it is no longer connected")
        while waiting:
            look_for_stop()
            for message_id, reply in self._pull(set(waiting)):
                node = waiting.pop(message_id, None)
                if node is None:  # it has answered already, or was never asked
                    continue
                partition = self.server.partitions[node]
                try:
                    if isinstance(reply, Exception):
                        raise reply
                    state, client = self._read(partition, reply)
                except Exception as error:  # whatever can be made of foreign data
                    ours = isinstance(error, Unusable)
                    kind = f"its reply cannot be read ({type(error).__name__})"
                    self._fail(node, str(error) if ours else kind)
                    if isinstance(error, Refused):
                        self.server.refused[node] = self.failures[-1]["cause"]
                else:
                    self.clients.append(client)
                    yield state, client
            waited = time.monotonic() - began
            if waiting and self.timeout and waited > self.timeout:
                name = "train.round_timeout=" * (self.kind != MessageType.QUERY)
                for node in waiting.values():
                    self._fail(node, f"no reply within {name}{self.timeout:g} s")
                return
            if waiting:
                # A long wait is no place for fifty questions a second over a network.
                STOP.wait(max(PULL_INTERVAL, min(1.0, waited / 100)))

    def _pull(self, waiting: set[str]) -> list[tuple[str, Message | Exception]]:
        """The replies that have come in, each with the message that it answers.

        An error of Flower's own does not name the node; the message that it answers does.
        Flower puts replies together as it fetches them, and what one client has broken
        would cost all that are fetched with it: from then on each is fetched by itself.
        """
        found: list[tuple[str, Message | Exception]] = []
        for ids in (
            [{each} for each in sorted(waiting)] if self.server.singly else [waiting]
        ):
            try:
                for reply in self.server.grid.pull_messages(ids):
                    found.append((reply.metadata.reply_to_message_id, reply))
            except (OSError, httpx.HTTPError):  # the line to the SuperLink
                raise
            except Exception as error:
                if not self.server.singly:
                    self.server.singly = True
                    return self._pull(waiting)
                found.append((*ids, error))
        return found

    def _fail(self, node: int, cause: str) -> None:
        partition = self.server.partitions[node]
        cause = one_line(cause) or "no cause was given"
        self.failures.append({"partition": partition, "cause": cause})

    def _read(
        self, partition: int, reply: Message
    ) -> tuple[model.State, dict[str, Any]]:
        """A reply's arrays in float32 and its figures, as the message that was sent asks.

        An update comes clipped. Raises `Unusable` for a reply that has not what it needs.
        """
        if reply.has_error():
            refused = reply.error.code == Refusal.code
            raise (Refused if refused else Unusable)(one_line(reply.error.reason or ""))
        client = {"partition": partition, "bytes_down": self.bytes_down}
        metrics = reply.content.metric_records.get("metrics", {})
        client |= read_figures(self.kind, metrics)
        cfg, expected = self.server.cfg, self.server.expected
        if self.kind == MessageType.TRAIN:
            self.server.bound(client, self.kind)
            weight = WEIGHTS[cfg["strategy"]["weighted_by"]]
            if weight not in client:
                raise Unusable(f"its metrics lack {weight}")
        if self.kind == MessageType.EVALUATE:
            self.server.bound(client, self.kind)
            return {}, client
        arrays = reply.content.array_records.get("arrays")
        if arrays is None:
            raise Unusable("it holds no arrays")
        if self.kind == MessageType.QUERY:  # as it was made: in float32
            return comm.decode(arrays, expected, "float32"), client
        dtype = cfg["comm"]["dtype"]
        update = comm.decode(arrays, expected, dtype)
        update = clip(update, cfg["strategy"]["clip_norm"])
        before = self.adapters.get(f"client_{partition}") or self.adapters[""]
        after = {name: before[name] + update[name] for name in update}
        if name := comm.lost(after, dtype):
            raise Unusable(
                f"with its update {name} would hold values beyond comm.dtype={dtype}"
            )
        return update, client | {"bytes_up": num_bytes(arrays)}


class Refused(Unusable):
    """A client that will not take part."""


def norm(update: model.State) -> float:
    """The L2 norm over all tensors."""
    squares = sum(tensor.double().square().sum().item() for tensor in update.values())
    return math.sqrt(squares)


def clip(update: model.State, longest: float | None) -> model.State:
    """The update, scaled down to an L2 norm of `longest` over all tensors if it is longer.

    What a client can do to a mean is then bounded (Sun et al. 2019, arXiv 1911.07963).
    """
    if longest is None:
        return update
    scale = min(1.0, longest / max(norm(update), 1e-12))
    return {name: tensor * scale for name, tensor in update.items()}


def alike(one: model.State, other: model.State) -> bool:
    """Whether two fresh adapters are the same but for what bfloat16 rounds away (2**-8)."""
    return all(
        torch.allclose(one[name], other[name], rtol=2**-7, atol=1e-6) for name in one
    )


# --- from updates to the replies that a strategy aggregates ------------------------------------


def aggregator_for(
    mode: str, strategy: FedAvg, state: model.State
) -> "Mean | All | Alone":
    """What gathers updates to the adapter `state` and makes the next one of them."""
    if mode == "local":
        return Alone(state)
    kind = Mean if type(strategy) in AVERAGING else All
    return kind(strategy, state)


class Alone:
    """Every client's own adapter, which nobody else gets: the baseline `mode=local`.

    They are in one state, under `<partition>/<name>`.
    """

    def __init__(self, state: model.State) -> None:
        self.states = dict(state)

    def add(self, update: model.State, client: dict[str, Any], weight: int) -> None:
        for name, tensor in update.items():
            own = f"{client['partition']}/{name}"
            self.states[own] = self.states[own] + tensor

    def aggregate(self, server_round: int) -> model.State:
        return self.states


class Aggregator:
    """Gathers updates for a strategy of Flower's."""

    def __init__(self, strategy: FedAvg, state: model.State) -> None:
        self.strategy, self.state = strategy, state

    def replies(self) -> list[Message]:
        """What the strategy aggregates."""
        raise NotImplementedError

    def aggregate(self, server_round: int) -> model.State:
        """The strategy's next adapter. Raises `Unusable` where it makes none."""
        name = type(self.strategy).__name__
        try:
            aggregated, _ = self.strategy.aggregate_train(server_round, self.replies())
        except Exception as error:  # of any type: each strategy has its own
            cause = one_line(f"{type(error).__name__}: {error}")
            raise Unusable(f"{name} made nothing of the replies: {cause}") from error
        if aggregated is None:
            raise Unusable(
                f"{name} made nothing of the replies. It may need more: raise "
                "strategy.fraction_fit"
            )
        return to_state(aggregated)


class Mean(Aggregator):
    """The running weighted mean of updates: memory for one, however many.

    Enough for every strategy that is a function of the mean. Summed in float64, where sums
    of float32 values that differ by less than a factor of 2^17 are exact: the order in
    which clients answer leaves no trace.
    """

    def __init__(self, strategy: FedAvg, state: model.State) -> None:
        super().__init__(strategy, state)
        self.sums = {
            k: torch.zeros_like(v, dtype=torch.float64) for k, v in state.items()
        }
        self.weight, self.loss = 0, 0.0

    def add(self, update: model.State, client: dict[str, Any], weight: int) -> None:
        self.weight += weight
        self.loss += weight * client["train_loss"]
        for name, total in self.sums.items():
            total.add_(update[name], alpha=weight)

    def replies(self) -> list[Any]:
        """One reply that stands for all of them."""
        mean = {k: self.state[k] + v / self.weight for k, v in self.sums.items()}
        return [Reply(to_float32(mean), self.weight, self.loss / self.weight)]


class All(Aggregator):
    """Every update, in order of partition: what robust strategies need."""

    def __init__(self, strategy: FedAvg, state: model.State) -> None:
        super().__init__(strategy, state)
        self.updates: list[tuple[int, model.State, int, float]] = []

    def add(self, update: model.State, client: dict[str, Any], weight: int) -> None:
        loss = client["train_loss"]
        self.updates.append((client["partition"], update, weight, loss))

    def replies(self) -> list[Any]:
        """One reply for each update, holding the adapter that it makes."""
        self.updates.sort(key=lambda entry: entry[0])
        return [
            Reply({k: self.state[k] + update[k] for k in update}, weight, loss)
            for _, update, weight, loss in self.updates
        ]


class Reply:
    """An adapter in the form in which Flower's strategies take replies.

    They ask no more of a `Message`, which can be made inside of a run only.
    """

    def __init__(self, state: model.State, weight: int, loss: float) -> None:
        metrics = {"num-examples": weight, "train_loss": loss}
        self.content = RecordDict(
            {"arrays": ArrayRecord(state), "metrics": MetricRecord(metrics)}
        )

    def has_error(self) -> bool:
        return False


def to_float32(state: model.State) -> model.State:
    return {name: tensor.to(torch.float32) for name, tensor in state.items()}


def to_state(arrays: ArrayRecord) -> model.State:
    """An adapter as a strategy made it, in float32 (some give float64)."""
    return to_float32(arrays.to_torch_state_dict())


def num_bytes(arrays: ArrayRecord) -> int:
    """Size of the serialised arrays, in bytes."""
    return sum(len(array.data) for array in arrays.values())


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
