"""What the server does: sample clients, check replies, aggregate, write the run down.

The strategy is Flower's own, named in `conf/strategy`. The loop around it is ours, so that
a reply is checked before it counts and each round is on disk before the next one begins.
"""

import random
import resource
import threading
import time
from collections.abc import Iterator
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
from safetensors import SafetensorError

import checkpoint
import comm
import dataset
import model
from examine import Examination, Scores
from journal import Journal, adapters, report_failures, report_memory
from utils import (
    Progress,
    Refusal,
    UserError,
    construct,
    learning_rate,
    mix_seed,
    say,
    write_json,
)

NODES_TIMEOUT = 600.0  # seconds that clients have to connect
PULL_INTERVAL = 0.02  # seconds between looks for replies, at first
# Keys of conf/strategy that are this module's, not the constructor's.
OURS = (
    "fraction_fit",
    "fraction_evaluate",
    "min_fit_replies",
    "max_round_retries",
    "clip_norm",
)
# What a reply must tell for its kind of message.
METRICS = {
    MessageType.QUERY: (),
    MessageType.TRAIN: ("num-examples", "train_loss", "peak_memory"),
    MessageType.EVALUATE: ("num-examples", "eval_loss", "eval_accuracy"),
}
# Strategies that are a function of the weighted mean of the replies.
AVERAGING = {FedAvg, FedProx, FedAvgM, FedAdam, FedYogi, FedAdagrad}


STOP = threading.Event()  # ends the run at the next look for replies


class RunFailed(UserError):
    """A round could not be completed. What came before it is on disk."""


class Stopped(UserError):
    """Somebody asked the run to end. What came before is on disk."""


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
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"{folder} cannot be written: {error}. {go_on(folder, done)}"
        ) from error
    except (RunFailed, Stopped) as error:
        journal.save_last(state)
        raise type(error)(f"{error} {go_on(folder, done)}") from error
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
    """Examine the final adapter; write `answers.json` and return what the summary tells.

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


def mean(scores: list[dict[str, float]]) -> dict[str, float]:
    """Of each score, the mean over all."""
    return {name: float(np.mean([each[name] for each in scores])) for name in scores[0]}


def go_on(folder: Path, done: int) -> str:
    """How to take up a run that has stopped."""
    if not done:
        return "No round was finished."
    return f"Go on after round {done} with: python main.py resume={folder}"


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
        self.refused: set[int] = set()
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
        willing = set(connected) - self.refused
        return sorted(willing, key=self.partitions.__getitem__)

    def _wait_for_nodes(self, wanted: int) -> None:
        # They connect while this already runs, and get their numbers all at once.
        started = time.monotonic()
        told = False
        while (here := len(set(self.grid.get_node_ids()) - self.refused)) < wanted:
            waited = time.monotonic() - started
            if waited > NODES_TIMEOUT:
                raise RunFailed(
                    f"Only {here} of {wanted} clients connected within "
                    f"{NODES_TIMEOUT:.0f} s (num_clients={self.cfg['num_clients']})."
                )
            if waited > 5 and not told:
                say(f"Waiting for {wanted} clients; {here} are connected.")
                told = True
            time.sleep(0.1)

    def initial_adapter(self) -> model.State:
        """The first adapter, made by the clients that train first.

        They all make the same one; asked together, their workers load the base side by
        side, and the first round finds it there.
        """
        cohort = self._cohort("fraction_fit", 1).nodes
        messages = [Message(RecordDict(), node, MessageType.QUERY) for node in cohort]
        exchange = Exchange(self, messages)
        first = None
        # To the last: a reply that nobody fetches stays in Flower's store, and its engine
        # would look at it again for every node until the run ends.
        for state, _ in exchange.replies():
            first = first or state
        report_failures(0, exchange.failures)
        if first is None:
            raise RunFailed(
                f"No client could load the model: {exchange.failures[0]['cause']}."
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

        Returns the new adapter and the round's entry for `history.json`.
        """
        began = time.monotonic()
        settings = self.cfg["strategy"]
        failures: list[dict[str, Any]] = []
        tried: set[int] = set()
        for attempt in range(1 + settings["max_round_retries"]):
            cohort = self._cohort("fraction_fit", server_round, attempt, tried)
            messages = self.strategy.configure_train(
                server_round, ArrayRecord(state), ConfigRecord(), cohort
            )
            exchange = Exchange(self, messages, state)
            aggregator = aggregator_for(self.cfg["mode"], self.strategy, state)
            seconds_aggregate = 0.0
            for update, client in exchange.replies():
                received = time.monotonic()
                aggregator.add(clip(update, settings["clip_norm"]), client)
                seconds_aggregate += time.monotonic() - received
            failures += exchange.failures
            tried |= set(cohort.nodes)
            if len(exchange.clients) >= settings["min_fit_replies"]:
                break
            say(
                f"round {server_round}: {len(exchange.clients)} usable replies where "
                f"strategy.min_fit_replies={settings['min_fit_replies']}."
            )
        else:
            raise RunFailed(
                f"Round {server_round} failed {attempt + 1} times "
                f"(strategy.max_round_retries={settings['max_round_retries']}). The last "
                f"cause: {failures[-1]['cause']}."
            )
        report_failures(server_round, failures)
        clients = sorted(exchange.clients, key=lambda client: client["partition"])
        arguments = self.cfg["train"]["training_arguments"]
        report_memory(server_round, clients, arguments["per_device_train_batch_size"])
        received = time.monotonic()
        new_state = aggregator.aggregate(server_round)
        for adapter in adapters(self.cfg, new_state).values():
            if fault := model.mismatch(adapter, self.expected):
                raise RunFailed(
                    f"Round {server_round}: the aggregate is no adapter: {fault}."
                )
        seconds_aggregate += time.monotonic() - received
        weights = [client["num-examples"] for client in clients]
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

    def evaluate_round(self, server_round: int, state: model.State) -> dict[str, Any]:
        """Let a share of the clients measure the new adapter on records held back.

        In round 0 the base without any, by those who will be asked last: before and after
        are then of the same clients, as long as nobody comes or goes. The means are weighted by examples; worst and spread (the standard deviation) are
        over clients.
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
            for name in ("eval_loss", "eval_accuracy"):
                values = [client[name] for client in clients]
                result[name] = float(np.average(values, weights=weights))
            losses = [client["eval_loss"] for client in clients]
            result["eval_perplexity"] = float(np.exp(min(result["eval_loss"], 700)))
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
    ) -> Cohort:
        """The nodes that take part, in order of their numbers; waits until there is one.

        Those that were `tried` in this round already come in only if the others are too few.
        """
        if not (nodes := self._available()):
            self._wait_for_nodes(1)
            nodes = self._available()
        size = cohort_size(len(nodes), self.cfg["strategy"][fraction])
        others = [node for node in nodes if node not in (tried or ())]
        parts = [self.cfg["seed"], fraction, server_round]
        seed = mix_seed(*parts, attempt) if attempt else mix_seed(*parts)
        return Cohort(sample(others if len(others) >= size else nodes, size, seed))


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
        dtype = server.cfg["comm"]["dtype"]
        arrays = {
            name: ArrayRecord(comm.pack(adapter, dtype)[0])
            for name, adapter in adapters(server.cfg, state or {}).items()
        }
        self.bytes_down = num_bytes(next(iter(arrays.values())))  # to each client
        for message in messages:
            # The strategy gave all of them one record; each names its own partition.
            config = message.content.config_records.get("config", ConfigRecord())
            partition = server.partitions[message.metadata.dst_node_id]
            config = ConfigRecord({**config, **server.told, "partition": partition})
            own = arrays.get(f"client_{partition}") or arrays[""]
            message.content = RecordDict({"arrays": own, "config": config})
        self.messages = messages

    def replies(self) -> Iterator[tuple[model.State, dict[str, Any]]]:
        """Each usable reply's arrays and its metrics, in order of arrival.

        Ends when everybody has answered, or `train.round_timeout` is over.
        """
        grid, timeout = self.server.grid, self.server.cfg["train"]["round_timeout"]
        began = time.monotonic()
        nodes = [message.metadata.dst_node_id for message in self.messages]
        waiting = {}
        for message_id, node in zip(
            grid.push_messages(self.messages), nodes, strict=True
        ):
            if message_id:
                waiting[message_id] = node
            else:
                self._fail(node, "it is no longer connected")
        while waiting:
            if STOP.is_set():
                raise Stopped("Stopped.")
            # An error of Flower's own does not name the node; the message that it answers
            # does.
            for reply in grid.pull_messages(set(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id)
                try:
                    state, client = self._read(reply)
                except ValueError as error:
                    self._fail(node, str(error))
                    if reply.has_error() and reply.error.code == Refusal.code:
                        self.server.refused.add(node)
                else:
                    partition = self.server.partitions[node]
                    sizes = {"partition": partition, "bytes_down": self.bytes_down}
                    self.clients.append(sizes | client)
                    yield state, self.clients[-1]
            waited = time.monotonic() - began
            if waiting and timeout and waited > timeout:
                for node in waiting.values():
                    self._fail(
                        node, f"no reply within train.round_timeout={timeout:g} s"
                    )
                return
            if waiting:
                # A long wait is no place for fifty questions a second over a network.
                time.sleep(max(PULL_INTERVAL, min(1.0, waited / 100)))

    def _fail(self, node: int, cause: str) -> None:
        partition = self.server.partitions[node]
        self.failures.append({"partition": partition, "cause": cause})

    def _read(self, reply: Message) -> tuple[model.State, dict[str, Any]]:
        """A reply's arrays in float32 and its metrics. Raises `ValueError` if unusable."""
        if reply.has_error():
            raise ValueError(reply.error.reason)
        metrics = dict(reply.content.metric_records.get("metrics", {}))
        kind = reply.metadata.message_type
        if missing := [name for name in METRICS[kind] if name not in metrics]:
            raise ValueError(f"its metrics lack {missing[0]}")
        if metrics.get("num-examples", 1) <= 0:
            raise ValueError("its number of examples is not positive")
        if not np.isfinite(list(metrics.values())).all():
            raise ValueError("a metric is not finite")
        arrays = reply.content.array_records.get("arrays")
        if arrays is None:
            return {}, metrics
        state = comm.unpack(arrays.to_torch_state_dict())
        if fault := model.mismatch(state, self.server.expected):
            raise ValueError(fault)
        return state, metrics | {"bytes_up": num_bytes(arrays)}


def clip(update: model.State, norm: float | None) -> model.State:
    """The update, scaled down to an L2 norm of `norm` over all tensors if it is longer.

    What a client can do to a mean is then bounded (Sun et al. 2019, arXiv 1911.07963).
    """
    if norm is None:
        return update
    length = torch.sqrt(
        sum(tensor.double().square().sum() for tensor in update.values())
    )
    scale = min(1.0, norm / max(length.item(), 1e-12))
    return {name: tensor * scale for name, tensor in update.items()}


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

    def add(self, update: model.State, client: dict[str, Any]) -> None:
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
        """The strategy's next adapter. Raises `RunFailed` where it makes none."""
        aggregated, _ = self.strategy.aggregate_train(server_round, self.replies())
        if aggregated is None:
            raise RunFailed(
                f"Round {server_round}: {type(self.strategy).__name__} made nothing of "
                "the replies. It may need more: raise strategy.fraction_fit."
            )
        return to_state(aggregated)


class Mean(Aggregator):
    """The running mean of updates, weighted by examples: memory for one, however many.

    Enough for every strategy that is a function of the mean. Summed in float64, where sums
    of float32 values that differ by less than a factor of 2^17 are exact: the order in
    which clients answer leaves no trace.
    """

    def __init__(self, strategy: FedAvg, state: model.State) -> None:
        super().__init__(strategy, state)
        self.sums = {
            k: torch.zeros_like(v, dtype=torch.float64) for k, v in state.items()
        }
        self.examples = 0

    def add(self, update: model.State, client: dict[str, Any]) -> None:
        weight = client["num-examples"]
        self.examples += weight
        for name, total in self.sums.items():
            total.add_(update[name], alpha=weight)

    def replies(self) -> list[Message]:
        """One reply that stands for all of them."""
        mean = {k: self.state[k] + v / self.examples for k, v in self.sums.items()}
        return [as_reply(to_float32(mean), self.examples)]


class All(Aggregator):
    """Every update, in order of partition: what robust strategies need."""

    def __init__(self, strategy: FedAvg, state: model.State) -> None:
        super().__init__(strategy, state)
        self.updates: list[tuple[int, model.State, int]] = []

    def add(self, update: model.State, client: dict[str, Any]) -> None:
        self.updates.append((client["partition"], update, client["num-examples"]))

    def replies(self) -> list[Message]:
        """One reply for each update, holding the adapter that it makes."""
        return [
            as_reply({k: self.state[k] + update[k] for k in update}, examples)
            for _, update, examples in sorted(self.updates, key=lambda entry: entry[0])
        ]


def as_reply(state: model.State, examples: int) -> Message:
    """An adapter in the form in which Flower's strategies take replies."""
    content = RecordDict(
        {
            "arrays": ArrayRecord(state),
            "metrics": MetricRecord({"num-examples": examples}),
        }
    )
    return Message(content, dst_node_id=0, message_type=MessageType.TRAIN)


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
