"""One exchange of messages with the clients: what is sent, and what is fit to be used of what comes back."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    RecordDict,
)

import dataset
import model
from methods import wire
from methods.aggregate import WEIGHTS, clip
from methods.wire import Unusable
from server.journal import adapters
from utils import STOP, Refusal, look_for_stop, one_line

# Seconds that clients have at least in the first exchange, whatever train.round_timeout
# says: they load the base, and one of 13 GB from a slow disk takes minutes.
LOAD_TIMEOUT = 1800.0

PULL_INTERVAL = 0.02  # seconds between looks for replies, at first

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
        self, server: Any, messages: list[Message], state: model.State | None = None
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
            name: ArrayRecord(wire.pack(adapter, dtype)[0])
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
            return wire.decode(arrays, expected, "float32"), client
        dtype = cfg["comm"]["dtype"]
        update = wire.decode(arrays, expected, dtype)
        update = clip(update, cfg["strategy"]["clip_norm"])
        before = self.adapters.get(f"client_{partition}") or self.adapters[""]
        after = {name: before[name] + update[name] for name in update}
        if name := wire.lost(after, dtype):
            raise Unusable(
                f"with its update {name} would hold values beyond comm.dtype={dtype}"
            )
        return update, client | {"bytes_up": num_bytes(arrays)}


class Refused(Unusable):
    """A client that will not take part."""


def alike(one: model.State, other: model.State) -> bool:
    """Whether two fresh adapters are the same but for what bfloat16 rounds away (2**-8)."""
    return all(
        torch.allclose(one[name], other[name], rtol=2**-7, atol=1e-6) for name in one
    )


def num_bytes(arrays: ArrayRecord) -> int:
    """Size of the serialised arrays, in bytes."""
    return sum(len(array.data) for array in arrays.values())
