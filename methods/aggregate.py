"""How the updates of a round are combined: Flower's strategies, fed one update at a time."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import flwr.serverapp.strategy as flower
import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.multikrum import select_multikrum

from methods import lora, wire
from methods.base import Aggregation, Contribution, State, Unusable
from utils import UserError, construct, one_line

# Keys of conf/strategy that are not the constructor's.
OURS = (
    "fraction_fit",
    "fraction_evaluate",
    "sampling",
    "min_fit_replies",
    "max_round_retries",
    "clip_norm",
    "clip_weights",
    "weighted_by",
    "max_weight",
)

# The metric that each `strategy.weighted_by` weighs a client by.
WEIGHTS = {"examples": "num-examples", "records": "records"}


def build(node: dict[str, Any], layers: Sequence[lora.Layer] = ()) -> Aggregation:
    """What `conf/strategy` names: a class of this module, or of Flower's one that it wraps.

    `layers`: the adapter's, as far as it is LoRA. Raises `UserError` for settings that it
    does not take.
    """
    made = _build(node)
    made.layers = layers
    return made


def _build(node: dict[str, Any]) -> Aggregation:
    settings = {k: v for k, v in node.items() if k not in OURS}
    if node["_target_"].startswith(f"{__name__}."):
        return construct(settings, __name__, Aggregation)
    # Whom a round asks is not its choice, so it is shown nobody.
    nobody = {
        "fraction_train": 1.0,
        "fraction_evaluate": 1.0,
        "min_train_nodes": 0,
        "min_evaluate_nodes": 0,
        "min_available_nodes": 0,
    }
    made = construct(settings, "flwr.serverapp.strategy", **nobody)
    return WRAPPED.get(type(made), All)(made)


def rehearse(node: dict[str, Any], count: int) -> None:
    """Let what `conf/strategy` names aggregate `count` small made-up updates.

    Raises `UserError` where it makes no adapter of them, as it would after the first round.
    """
    made = build(node)
    try:
        state = made.start({"a": torch.ones(2, 3), "b": torch.zeros(4)}, count)
        made.begin(state, 1)
        for i in range(count):
            start = made.down(state, i)
            update = {k: torch.full_like(v, (i + 1) / 64) for k, v in start.items()}
            made.add(Contribution(i, start, update, weight=i + 1, loss=1.0))
        fault = wire.mismatch(made.apply(made.gathered()), state)
    except Exception as error:  # whatever a class makes of what is no use to it
        fault = str(error) or type(error).__name__
    if fault:
        raise UserError(
            f"strategy._target_={node['_target_']} makes no adapter of {count} replies: "
            f"{one_line(fault)}"
        )


class Alone(Aggregation):
    """Every client's own adapter, which nobody else gets: what `mode=local` names."""

    def start(self, adapter: State, clients: int) -> State:
        # Copies: a checkpoint takes no tensors that share memory.
        return {
            f"{i}/{name}": tensor.clone()
            for i in range(clients)
            for name, tensor in adapter.items()
        }

    def begin(self, state: State, server_round: int) -> None:
        super().begin(state, server_round)
        self.changes: State = {}

    def add(self, one: Contribution) -> None:
        self.changes |= {f"{one.partition}/{k}": v for k, v in one.update.items()}

    def gathered(self) -> State:
        return self.changes


class Every(Aggregation):
    """Every update, whole."""

    def begin(self, state: State, server_round: int) -> None:
        super().begin(state, server_round)
        self.all: list[Contribution] = []

    def add(self, one: Contribution) -> None:
        self.all.append(one)

    def in_order(self) -> list[Contribution]:
        """By partition: who answers first leaves no trace."""
        return sorted(self.all, key=lambda one: one.partition)


class Svd(Every):
    """The best adapter of the run's rank for what clients' adapters do on the mean.

    FlexLoRA (arXiv 2402.11505): M = sum p_i s_i B_i A_i for each layer, and of it the nearest
    of rank r, B = U S / s and A = V^T. The strength goes into B alone, as in a fresh adapter,
    whose B is 0: a row of A is then as long whatever its direction's strength, so a weak one
    gets the gradients that a strong one gets. Split evenly, a direction of strength 0 would
    have two zeros, and never learn again. What is no half of LoRA is the mean.

    A client may have a lower rank: it is sent the strongest directions, and the others stay as
    they are. `ranks`: a list that is dealt out to partitions again and again, or the share of
    clients that has each rank; None: the run's, or what a node says that it has.
    """

    products = True

    def __init__(self, ranks: list[int] | dict[int, float] | None = None) -> None:
        self.ranks = ranks
        self.dealt: list[int] = []
        self.count: Counter[int] = Counter()  # of those dealt out
        self.heard: dict[int, int] = {}  # by partition, the rank that a node has
        self.cuts: tuple[State, dict[int, State]] = {}, {}  # of a state, by rank

    def rank(self, partition: int) -> int | None:
        """The highest rank that a client can have, if it is known to be limited."""
        if isinstance(self.ranks, list):
            return self.ranks[partition % len(self.ranks)]
        while self.ranks and len(self.dealt) <= partition:
            # To whichever is furthest behind its share.
            part = (len(self.dealt) + 1) / sum(self.ranks.values())
            behind = {r: n * part - self.count[r] for r, n in self.ranks.items()}
            self.dealt.append(max(behind, key=behind.__getitem__))
            self.count[self.dealt[-1]] += 1
        return self.dealt[partition] if self.ranks else self.heard.get(partition)

    def hear(self, client: dict[str, Any]) -> None:
        self.heard.pop(client["partition"], None)
        if "rank" in client:
            self.heard[client["partition"]] = client["rank"]

    def down(self, state: State, partition: int) -> State:
        most = self.rank(partition)
        if most is None or most >= (lora.rank(state) or 0):
            return state
        if self.cuts[0] is not state:
            self.cuts = state, {}
        if most not in self.cuts[1]:
            self.cuts[1][most] = lora.cut(state, most, self.layers[0].power)
        return self.cuts[1][most]

    def gathered(self) -> State:
        replies = self.in_order()
        total = sum(one.weight for one in replies)
        made: State = {}
        for layer in self.layers:
            rank = len(self.state[layer.a])
            left, right = lora.best(lora.mean(layer, self.state, replies), rank)
            made |= {layer.a: right, layer.b: left / layer.scale(rank)}
        change = {name: made[name] - self.state[name].double() for name in made}
        for name in self.state.keys() - made.keys():
            weighted = (one.update[name].double() * one.weight for one in replies)
            change[name] = sum(weighted) / total
        return change


class Flower(Aggregation):
    """A strategy of Flower's, which makes an adapter of replies that hold adapters."""

    def __init__(self, strategy: flower.FedAvg) -> None:
        self.strategy = strategy

    def told(self, server_round: int) -> dict[str, Any]:
        """Likewise, with what the strategy adds: FedProx's `proximal-mu`."""
        return dict(self._configure(server_round, {}))

    def _configure(self, server_round: int, state: State) -> ConfigRecord:
        config = ConfigRecord()
        # FedAvgM would go on from what it made last, whether that was of use or not.
        self.strategy.current_arrays = None
        with unheard():
            self.strategy.configure_train(server_round, record(state), config, Nobody())
        return config

    def _aggregate(self, state: State, replies: list["Reply"]) -> State:
        """The strategy's adapter after `state`, as precise as it makes it."""
        name = type(self.strategy).__name__
        try:
            self._configure(self.number, state)
            with unheard():
                aggregated, _ = self.strategy.aggregate_train(self.number, replies)
        except Exception as error:  # of any type: each strategy has its own
            cause = one_line(f"{type(error).__name__}: {error}")
            raise Unusable(f"{name} made nothing of the replies: {cause}") from error
        if aggregated is None:
            raise Unusable(
                f"{name} made nothing of the replies. It may need more: raise "
                "strategy.fraction_fit"
            )
        return aggregated.to_torch_state_dict()

    def memory(self) -> dict[str, State]:
        """What the strategy has in the attributes of `keeps`: arrays, by name."""
        return {
            attribute: {k: torch.from_numpy(np.array(v)) for k, v in kept.items()}
            for attribute in self.keeps
            if (kept := getattr(self.strategy, attribute)) is not None
        }

    def recall(self, memory: dict[str, State]) -> None:
        for attribute in self.keeps:
            kept = memory.get(attribute)
            arrays = {k: v.numpy() for k, v in kept.items()} if kept else None
            setattr(self.strategy, attribute, arrays)


class Running(Aggregation):
    """The running weighted mean of updates: memory for one, however many.

    Summed in float64, where sums of float32 values that differ by less than a factor of
    2^17 are exact: the order in which clients answer leaves no trace.
    """

    linear = True

    def begin(self, state: State, server_round: int) -> None:
        super().begin(state, server_round)
        self.sums: State = {}
        self.weight, self.loss = 0, 0.0

    def add(self, one: Contribution) -> None:
        self.weight += one.weight
        self.loss += one.weight * one.loss
        for name, tensor in one.update.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(tensor, dtype=torch.float64)
            self.sums[name].add_(tensor, alpha=one.weight)

    def gathered(self) -> State:
        return {name: total / self.weight for name, total in self.sums.items()}


class Scaffold(Running):
    """SCAFFOLD (arXiv 1910.06378): beside the mean of updates a control variate c for clients.

    It moves by their changes of c_i (`methods.scaffold`), divided by the number of all
    `clients`: so c is the mean of what they have told of their c_i, whoever takes part. The
    updates are weighed as everywhere; the paper's all count the same, as do those of
    clients that take the same number of steps.
    """

    corrects = True
    keeps = ("control",)

    def __init__(self, clients: int) -> None:
        self.clients = clients
        self.control: State = {}  # none yet is 0

    def beside(self, state: State) -> State:
        return self.control or {k: torch.zeros_like(v) for k, v in state.items()}

    def begin(self, state: State, server_round: int) -> None:
        super().begin(state, server_round)
        self.changes: State = {}

    def add(self, one: Contribution) -> None:
        super().add(one)
        for name, change in one.beside.items():
            self.changes[name] = self.changes.get(name, 0) + change.double()

    def apply(self, mean: State) -> State:
        control = self.beside(self.state)
        self.control = control | {
            name: (control[name] + total / self.clients).to(torch.float32)
            for name, total in self.changes.items()
        }
        return super().apply(mean)

    def memory(self) -> dict[str, State]:
        return {"control": self.control} if self.control else {}

    def recall(self, memory: dict[str, State]) -> None:
        self.control = memory.get("control", {})


class Mean(Running, Flower):
    """Enough for every strategy of Flower's that is a function of the mean."""

    def apply(self, mean: State) -> State:
        """The strategy's adapter of the one that the mean update makes, as a single reply."""
        whole = super().apply(mean)
        part = mean.keys() < self.state.keys()
        before = self.memory() if part else {}
        reply = Reply(whole, self.weight, self.loss / self.weight)
        made = self._aggregate(self.state, [reply])
        # What was not sent stays, and so do its momenta: of a half that is trained every
        # second round they would fade in between.
        if part:
            after = self.memory()
            for kept, each in after.items():
                old = before.get(kept, {})
                rest = [name for name in each if name not in mean]
                each |= {k: old.get(k, torch.zeros_like(each[k])) for k in rest}
            self.recall(after)
        return {
            name: (made[name] if name in mean else tensor).to(torch.float32)
            for name, tensor in self.state.items()
        }


class Momentum(Mean):
    """FedAvgM's, which is a list in the order of the adapter's tensors."""

    keeps = ("momentum_vector",)

    def memory(self) -> dict[str, State]:
        kept = self.strategy.momentum_vector
        if kept is None:
            return {}
        named = zip(self.state, map(torch.from_numpy, kept), strict=True)
        return {"momentum_vector": dict(named)}

    def recall(self, memory: dict[str, State]) -> None:
        super().recall(memory)
        if kept := self.strategy.momentum_vector:
            self.strategy.momentum_vector = [*kept.values()]


class Moments(Mean):
    """The first and second moments of FedAdam and its kind."""

    keeps = ("m_t", "v_t")


class All(Every, Flower):
    """What robust strategies need: every reply by itself."""

    def gathered(self) -> State:
        """The strategy's change, of replies that hold the adapter that each update makes."""
        sent = {k: self.state[k] for k in self.all[0].update}
        made = self._aggregate(
            sent,
            [
                Reply(
                    {k: self.state[k] + one.update[k] for k in one.update},
                    one.weight,
                    one.loss,
                )
                for one in self.in_order()
            ],
        )
        return {k: made[k].double() - self.state[k].double() for k in made}


class Closest(All):
    """Multi-Krum and Krum, which take the clients whose adapters do nearly the same.

    Flower compares factors, value by value: two that do the same may be far apart there. Its
    rule is given places at the distances of what the adapters do, where they are LoRA.
    """

    def _aggregate(self, state: State, replies: list["Reply"]) -> State:
        settings = self.strategy
        count, bad = settings.num_nodes_to_select, settings.num_malicious_nodes
        chosen = self.select([reply.content for reply in replies], bad, count)
        near = [r for r in replies if any(r.content is one for one in chosen)]
        return super()._aggregate(state, near)

    def select(
        self, contents: list[RecordDict], malicious: int, count: int
    ) -> list[RecordDict]:
        """The contents of so many replies, which are those of the round, in its order."""
        if not self.layers:
            return select_multikrum(contents, malicious, count)
        places = lora.places(self.layers, self.state, self.in_order())
        stands = [RecordDict({"arrays": record({"place": place})}) for place in places]
        chosen = {*map(id, select_multikrum(stands, malicious, count))}
        pairs = zip(contents, stands, strict=True)
        return [content for content, stand in pairs if id(stand) in chosen]


class Trimmed(Closest):
    """Bulyan, whose first step that is."""

    def __init__(self, strategy: flower.Bulyan) -> None:
        super().__init__(strategy)
        strategy.selection_rule = self.select

    def _aggregate(self, state: State, replies: list["Reply"]) -> State:
        return Flower._aggregate(self, state, replies)


# Those that are a function of the mean, or compare replies. Every other gets all of them.
WRAPPED: dict[type, type[Flower]] = {
    flower.FedAvg: Mean,
    flower.FedProx: Mean,
    flower.FedAvgM: Momentum,
    flower.FedAdagrad: Moments,
    flower.FedAdam: Moments,
    flower.FedYogi: Moments,
    flower.Krum: Closest,
    flower.MultiKrum: Closest,
    flower.Bulyan: Trimmed,
}


class Reply:
    """An adapter in the form in which Flower's strategies take replies.

    They ask no more of a `Message`, which can be made inside of a run only.
    """

    def __init__(self, state: State, weight: int, loss: float) -> None:
        metrics = {"num-examples": weight, "train_loss": loss}
        self.content = RecordDict(
            {"arrays": record(state), "metrics": MetricRecord(metrics)}
        )

    def has_error(self) -> bool:
        return False


class Unsent(Array):
    """A tensor where Flower takes an array, without the bytes that nobody is sent."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__("float32", tuple(tensor.shape), "numpy.ndarray", b"")
        self.__dict__["tensor"] = tensor

    def numpy(self) -> np.ndarray:
        """A copy: some strategies compute in place."""
        return self.tensor.numpy().copy()


@contextmanager
def unheard() -> Iterator[None]:
    """What Flower logs would mislead: no nodes sampled, the mean as one of one results."""
    log = logging.getLogger("flwr")
    log.disabled, before = True, log.disabled
    try:
        yield
    finally:
        log.disabled = before


def record(state: State) -> ArrayRecord:
    made = ArrayRecord()
    for name, tensor in state.items():
        made[name] = Unsent(tensor)  # the constructor would copy what is sent
    return made


class Nobody:
    """A grid without nodes."""

    def get_node_ids(self) -> list[int]:
        return []
