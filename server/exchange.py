"""One exchange of messages with the clients: what is sent, what of it comes back is usable."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

import dataset
from methods import deflate, down, sharing, wire
from methods.base import State, Unusable
from methods.wire import SCALE
from server.runs import PERSONAL_LOSSES
from utils import STOP, Refusal, Settings, look_for_stop, one_line

Read = TypeVar("Read")

# Seconds that clients have at least in the first exchange, whatever train.round_timeout
# says: they load the base, and one of 13 GB from a slow disk takes minutes.
LOAD_TIMEOUT = 1800.0

PULL_INTERVAL = 0.02  # seconds between looks for replies, at first

# Replies that are fetched at once: Flower has all of these in memory before it hands out one.
PULLED = 16

# --- what a client may tell of itself --------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A metric of a reply: one number, whole or not, within bounds."""

    kind: type
    low: float = 0
    high: float = 2**53  # beyond it readers of JSON lose whole numbers
    needed: bool = False


LOSS = Figure(float, high=1e4, needed=True)  # nats a token; a guess of no idea costs 10

NATS = Figure(float, high=LOSS.high)  # of one that need not be told

SECONDS = Figure(float, high=1e9)

COUNT = Figure(int)

# The kind of message by which clients choose between the shared adapter and their own.
PERSONAL = f"{MessageType.EVALUATE}.personal"

# By which they answer with an update of which the sum of all alone will be known.
MASKED = f"{MessageType.TRAIN}.masked"

# By the kind of message that is answered. What is not listed here is not looked at.
FIGURES: dict[str, dict[str, Figure]] = {
    MessageType.QUERY: {},
    MessageType.TRAIN: {
        "num-examples": Figure(int, low=1, needed=True),
        "train_loss": LOSS,
        "peak_memory": COUNT,
        "epsilon": Figure(float, high=1e9),
        "records": Figure(int, low=1),
        "micro_batch": Figure(int, low=1),
        "rank": Figure(int, low=1),
        **dict.fromkeys(("tokens", "truncated", "dropped"), COUNT),
        "seconds": SECONDS,
        **{
            f"seconds_{lap}": SECONDS
            for lap in ("load", "tokenise", "set", "train", "read")
        },
    },
    MASKED: {},  # they are in the sum
    MessageType.EVALUATE: {
        "num-examples": Figure(int, low=1, needed=True),
        "eval_loss": LOSS,
        "eval_accuracy": Figure(float, high=1, needed=True),
        "eval_margin": Figure(float, low=-1e6, high=1e6),
        "eval_loss_own": NATS,
        "eval_macro_f1": Figure(float, high=1),
        "eval_mcc": Figure(float, low=-1, high=1),
        "eval_entity_f1": Figure(float, high=1),
        **dict.fromkeys(("truncated", "dropped"), COUNT),
    },
    PERSONAL: {
        "num-examples": Figure(int, low=1, needed=True),
        **dict.fromkeys(PERSONAL_LOSSES, LOSS),
        "personal_weight": Figure(float, high=1, needed=True),
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


# Of a kind of message, `num-examples` or `records`, and a client: see `most_used`.
MostUsed = Callable[[str, str, int], float]


def most_used(
    cfg: Settings, federated: bool, kind: str, name: str, partition: int
) -> float:
    """The most `num-examples` or `records` that a client can have used for a message.

    Infinite where only its node can know.
    """
    arguments = cfg.train.training_arguments
    steps = arguments.max_steps
    if kind == MessageType.TRAIN and name == "num-examples" and steps > 0:
        batch = arguments.per_device_train_batch_size * cfg.launch.processes
        return steps * arguments.gradient_accumulation_steps * batch
    if federated:
        return math.inf
    if kind in (MessageType.EVALUATE, PERSONAL):
        rows = dataset.load_partition(cfg, partition)
        return len(dataset.split(cfg, rows)[1])
    rows = len(dataset.training_rows(cfg, partition))
    passes = arguments.num_train_epochs if name == "num-examples" else 1
    return math.ceil(passes * rows)


def bound(
    client: dict[str, Any], kind: str, federated: bool, most: float, used: MostUsed
) -> None:
    """Hold a client's word for how much it used against what the server knows.

    In a simulation the server knows all of it, and more is a lie: raises `Unusable`. In a
    federation records, and processes that train side by side, are a node's own: more counts
    for what one process takes, or for `most`, which is `strategy.max_weight`.
    """
    for name in ("num-examples", "records"):
        if name not in client:
            continue
        known = used(kind, name, client["partition"])
        if client[name] > known and not federated:
            raise Unusable(f"its {name} is above {known}, which is all that it has")
        client[name] = min(client[name], known, most)


def largest(name: str, partitions: list[int], most: float, used: MostUsed) -> int:
    """The most that any of these clients can count for, in `num-examples` or `records`."""
    return int(min(max(used(MessageType.TRAIN, name, i) for i in partitions), most))


# --- what is sent ----------------------------------------------------------------------------


Told = dict[str, Any]  # to a client, beside arrays


class Downlink:
    """What each client is sent of its adapter: all that it cannot have from before.

    That is what `part.lasts` of it: a client has what it was sent when it last answered, or
    else what `first` holds, which it can make; who has failed is taken to have nothing.
    """

    # As `Aggregation.keeps`, and likewise `memory` and `recall`.
    keeps: tuple[str, ...] = ()

    def __init__(self, part: sharing.Adapter, comm: Settings, first: State) -> None:
        self.part, self.comm = part, comm
        self.first = {name: sharing.digest(tensor) for name, tensor in first.items()}
        self.has: dict[int, Any] = {}  # by partition: digests by name
        self.sent: dict[int, Any] = {}
        self.answered: dict[int, Any] = {}

    def pack(self, down: dict[int, State]) -> dict[int, tuple[ArrayRecord, Told]]:
        """By partition the arrays of what is to be sent of `down`, and what is told of it:
        as `unsent` the `fingerprint` of what is not, if that is anything, and then by `sent`
        the names of what is, where the arrays do not tell."""
        # Packed once, however many get it.
        each = {id(adapter): adapter for adapter in down.values()}
        packed = {key: self._whole(adapter) for key, adapter in each.items()}
        ready: dict[tuple[int, frozenset[str]], ArrayRecord] = {}
        made: dict[int, tuple[ArrayRecord, Told]] = {}
        for partition, adapter in down.items():
            whole, lasting = packed[id(adapter)]
            has = self.has.get(partition, self.first)
            unsent = {k: v for k, v in lasting.items() if has.get(k) == v}
            sent = {
                k: v for k, v in whole.items() if k.removesuffix(SCALE) not in unsent
            }
            key = id(adapter), frozenset(unsent)
            if key not in ready:
                ready[key] = self._arrays(sent)
            told: Told = {}
            if unsent:
                told["unsent"] = sharing.fingerprint(unsent)
            if unsent and self.comm.compress:
                told["sent"] = [name for name in sent if not name.endswith(SCALE)]
            made[partition] = ready[key], told
            self.sent[partition] = lasting
        return made

    def _arrays(self, packed: State) -> ArrayRecord:
        compress = self.comm.compress and packed
        return ArrayRecord(deflate.deflate(packed) if compress else packed)

    def _whole(self, adapter: State) -> tuple[State, dict[str, str]]:
        """All that comes of an adapter, packed, and the digests of what lasts, as it arrives."""
        lasts = {*self.part.lasts(adapter.keys())}
        packed: State = {}
        digests: dict[str, str] = {}
        for name, dtype in self.part.types(adapter.keys(), self.comm.dtype).items():
            one, _ = wire.pack({name: adapter[name]}, dtype)
            packed |= one
            if name in lasts:
                digests[name] = sharing.digest(wire.unpack(one)[name])
        return packed, digests

    def move(self, state: State) -> None:
        """A round has made this state."""

    def finish(self) -> None:
        """The last round is done: what is sent from now on is what the run leaves."""

    def memory(self) -> dict[str, State]:
        return {}

    def recall(self, memory: dict[str, State]) -> None:
        pass

    def answer(self, partition: int) -> None:
        """It has what it was sent. That counts from the next round on: a round that is done
        again is done from the same values."""
        self.answered[partition] = self.sent[partition]

    def fail(self, partition: int) -> None:
        self.has[partition] = {}
        self.answered.pop(partition, None)

    def close_round(self) -> None:
        self.has |= {i: held for i, held in self.answered.items() if held}
        self.answered.clear()


class Changes(Downlink):
    """What has changed, for clients that answered before, of an adapter that all share.

    A client has the version of it that it was sent when it last answered.
    """

    keeps = ("view",)
    view: down.View | None = None
    packed: tuple[State, ArrayRecord] | None = None  # all of a version, as it is sent
    finished = False

    def pack(self, down: dict[int, State]) -> dict[int, tuple[ArrayRecord, Told]]:
        if self.finished or not any(down.values()):
            return super().pack(down)
        view = self.view = self.view or self._view(next(iter(down.values())))
        if not self.packed or self.packed[0] is not view.state:
            # Once for the evaluation after a round and the training of the next.
            self.packed = view.state, self._arrays(self._whole(view.state)[0])
        whole = self.packed[1]
        ready: dict[int, tuple[ArrayRecord, Told]] = {0: (whole, {})}
        for number in {self.has.get(i, 0) for i in down} - {0}:
            since, packed = view.since(number)
            arrays = self._arrays(packed)
            less = num_bytes(arrays) < num_bytes(whole)
            ready[number] = (arrays, {"since": since}) if less else (whole, {})
        self.sent |= dict.fromkeys(down, view.number)  # in full, or by what has changed
        return {i: ready[self.has.get(i, 0)] for i in down}

    def _view(self, state: State) -> down.View:
        return down.View(state, self.comm.dtype, self.comm.top_k)

    def move(self, state: State) -> None:
        self.view.move(state)

    def finish(self) -> None:
        self.finished = True

    def fail(self, partition: int) -> None:
        super().fail(partition)
        self.has[partition] = 0

    def memory(self) -> dict[str, State]:
        return {"view": self.view.state}

    def recall(self, memory: dict[str, State]) -> None:
        self.view = self._view(memory["view"])


# --- the exchange ----------------------------------------------------------------------------


class Exchange:
    """One exchange of messages: sends them, and hands out usable replies as they come.

    `nodes`: whom it asks, each with its partition. `write` makes the content for a
    partition, and `read` something of a reply's; it raises `Unusable` for one that has not
    what it needs. `timeout` is in seconds. `singly`: replies are fetched one by one, which
    the exchange begins to do itself where one cannot be fetched.

    Afterwards `failures` holds who failed and why, `refused` which nodes will not take part
    in any other, and `bytes_down` is the size of all arrays that were sent. `fault`: why all
    of it is of no use, where it is the whole that fails, and by `out`, its nodes.
    """

    fault = ""
    out: frozenset[int] = frozenset()

    def __init__(
        self,
        grid: Grid,
        kind: str,
        nodes: dict[int, int],
        write: Callable[[int], RecordDict],
        read: Callable[[int, RecordDict], Read],
        timeout: float | None = None,
        singly: bool = False,
    ) -> None:
        self.grid, self.kind, self.nodes = grid, kind, nodes
        self.write, self.read = write, read
        self.timeout, self.singly = timeout, singly
        if kind == MessageType.QUERY and timeout:
            self.timeout = max(timeout, LOAD_TIMEOUT)
        self.failures: list[dict[str, Any]] = []
        self.refused: dict[int, str] = {}

    def replies(self) -> Iterator[Read]:
        """What `read` makes of each usable reply, in order of arrival.

        Ends when everybody has answered, or the time is over: `timeout`, or in the first
        exchange, where bases are loaded, `LOAD_TIMEOUT` if that is longer.
        """
        began = time.monotonic()
        messages = [
            Message(self.write(partition), node, self.kind)
            for node, partition in self.nodes.items()
        ]
        self.bytes_down = sum(
            num_bytes(arrays)
            for message in messages
            for arrays in message.content.array_records.values()
        )
        pushed = set(self.grid.push_messages(messages))
        waiting = {}
        for message in messages:
            node, message_id = message.metadata.dst_node_id, message.metadata.message_id
            if message_id in pushed:  # which is how a grid says whom it reaches
                waiting[message_id] = node
            else:
                self._fail(node, "it is no longer connected")
        while waiting:
            look_for_stop()
            looked, found = time.monotonic(), False
            for message_id, reply in self._pull(sorted(waiting)):
                found = True
                node = waiting.pop(message_id, None)
                if node is None:  # it has answered already, or was never asked
                    continue
                try:
                    read = self.read(self.nodes[node], _content(reply))
                except Exception as error:  # whatever can be made of foreign data
                    ours = isinstance(error, Unusable)
                    kind = f"its reply cannot be read ({type(error).__name__})"
                    self._fail(node, str(error) if ours else kind)
                    if isinstance(error, Refused):
                        self.refused[node] = self.failures[-1]["cause"]
                else:
                    yield read
            waited = time.monotonic() - began
            if waiting and self.timeout and waited > self.timeout:
                # Those may take longer than a round.
                longer = self.kind in (MessageType.QUERY, PERSONAL)
                name = "" if longer else "train.round_timeout="
                for node in waiting.values():
                    self._fail(node, f"no reply within {name}{self.timeout:g} s")
                return
            if waiting:
                # A long wait is no place for fifty questions a second over a network, and a
                # SuperLink with hundreds of nodes has others to answer.
                took = 0.0 if found else time.monotonic() - looked
                STOP.wait(max(PULL_INTERVAL, min(1.0, max(waited / 100, 5 * took))))

    def _pull(self, waiting: list[str]) -> Iterator[tuple[str, Message | Exception]]:
        """The replies that have come in, each with the message that it answers.

        An error of Flower's own does not name the node; the message that it answers does.
        Flower puts replies together as it fetches them, and what one client has broken
        would cost all that are fetched with it: from then on each is fetched by itself.
        """
        size = 1 if self.singly else PULLED
        for start in range(0, len(waiting), size):
            ids = {*waiting[start : start + size]}
            try:
                for reply in self.grid.pull_messages(ids):
                    yield reply.metadata.reply_to_message_id, reply
            except (OSError, httpx.HTTPError):  # the line to the SuperLink
                raise
            except Exception as error:
                if size > 1:
                    self.singly = True
                    yield from self._pull(waiting[start:])
                    return
                yield *ids, error

    def _fail(self, node: int, cause: str) -> None:
        cause = one_line(cause) or "no cause was given"
        self.failures.append({"partition": self.nodes[node], "cause": cause})


class Refused(Unusable):
    """A client that will not take part."""


def _content(reply: Message | Exception) -> RecordDict:
    """What a reply holds. Raises what it tells, or what came in its place."""
    if isinstance(reply, Exception):
        raise reply
    if reply.has_error():
        refused = reply.error.code == Refusal.code
        raise (Refused if refused else Unusable)(one_line(reply.error.reason or ""))
    return reply.content


def arrays_of(content: RecordDict, name: str = "arrays") -> ArrayRecord:
    """A reply's arrays of that name. Raises `Unusable` where it has none."""
    arrays = content.array_records.get(name)
    if arrays is None:
        raise Unusable(f"it holds no {name}")
    return arrays


def num_bytes(arrays: ArrayRecord) -> int:
    """Size of the serialised arrays, in bytes."""
    return sum(len(array.data) for array in arrays.values())
