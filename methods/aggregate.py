"""How the updates of a round are combined: Flower's strategies, fed one update at a time."""

import logging
import math
from typing import Any

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
)

from methods import wire
from methods.wire import State, Unusable
from utils import UserError, construct, one_line

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
        fault = wire.mismatch(gathered.aggregate(1), start)
    except Exception as error:  # whatever a class makes of what is no use to it
        fault = str(error) or type(error).__name__
    finally:
        log.disabled = before
    if fault:
        raise UserError(
            f"strategy._target_={node['_target_']} makes no adapter of {count} replies: "
            f"{one_line(fault)}"
        )


def norm(update: State) -> float:
    """The L2 norm over all tensors."""
    squares = sum(tensor.double().square().sum().item() for tensor in update.values())
    return math.sqrt(squares)


def clip(update: State, longest: float | None) -> State:
    """The update, scaled down to an L2 norm of `longest` over all tensors if it is longer.

    What a client can do to a mean is then bounded (Sun et al. 2019, arXiv 1911.07963).
    """
    if longest is None:
        return update
    scale = min(1.0, longest / max(norm(update), 1e-12))
    return {name: tensor * scale for name, tensor in update.items()}


# --- from updates to the replies that a strategy aggregates ------------------------------------


def aggregator_for(mode: str, strategy: FedAvg, state: State) -> "Mean | All | Alone":
    """What gathers updates to the adapter `state` and makes the next one of them."""
    if mode == "local":
        return Alone(state)
    kind = Mean if type(strategy) in AVERAGING else All
    return kind(strategy, state)


class Alone:
    """Every client's own adapter, which nobody else gets: the baseline `mode=local`.

    They are in one state, under `<partition>/<name>`.
    """

    def __init__(self, state: State) -> None:
        self.states = dict(state)

    def add(self, update: State, client: dict[str, Any], weight: int) -> None:
        for name, tensor in update.items():
            own = f"{client['partition']}/{name}"
            self.states[own] = self.states[own] + tensor

    def aggregate(self, server_round: int) -> State:
        return self.states


class Aggregator:
    """Gathers updates for a strategy of Flower's."""

    def __init__(self, strategy: FedAvg, state: State) -> None:
        self.strategy, self.state = strategy, state

    def replies(self) -> list[Message]:
        """What the strategy aggregates."""
        raise NotImplementedError

    def aggregate(self, server_round: int) -> State:
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

    def __init__(self, strategy: FedAvg, state: State) -> None:
        super().__init__(strategy, state)
        self.sums = {
            k: torch.zeros_like(v, dtype=torch.float64) for k, v in state.items()
        }
        self.weight, self.loss = 0, 0.0

    def add(self, update: State, client: dict[str, Any], weight: int) -> None:
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

    def __init__(self, strategy: FedAvg, state: State) -> None:
        super().__init__(strategy, state)
        self.updates: list[tuple[int, State, int, float]] = []

    def add(self, update: State, client: dict[str, Any], weight: int) -> None:
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

    def __init__(self, state: State, weight: int, loss: float) -> None:
        metrics = {"num-examples": weight, "train_loss": loss}
        self.content = RecordDict(
            {"arrays": ArrayRecord(state), "metrics": MetricRecord(metrics)}
        )

    def has_error(self) -> bool:
        return False


def to_float32(state: State) -> State:
    return {name: tensor.to(torch.float32) for name, tensor in state.items()}


def to_state(arrays: ArrayRecord) -> State:
    """An adapter as a strategy made it, in float32 (some give float64)."""
    return to_float32(arrays.to_torch_state_dict())


class Cohort:
    """A grid that shows a strategy no nodes but the sampled ones."""

    def __init__(self, nodes: list[int]) -> None:
        self.nodes = nodes

    def get_node_ids(self) -> list[int]:
        return self.nodes
