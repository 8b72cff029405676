"""What an adapter may tell of the clients and the records that it was trained on."""

from typing import Any

from methods.base import State, Step
from utils import construct


def build(node: dict[str, Any]) -> "Privacy":
    """What `conf/privacy` names. Raises `UserError` for what is no such class."""
    return construct(node, __name__, Privacy)


class Privacy:
    """None but that records stay where they are."""

    def __init__(self, secure_aggregation: bool) -> None:
        self.secure_aggregation = secure_aggregation

    def step(self) -> Step:
        """What is done to updates on their way, before `strategy` gathers them."""
        return Step()

    def counts(self, weight: int) -> int:
        """With secure aggregation, what a client of this weight counts for."""
        return weight

    def share(self, update: State, least: int) -> State:
        """With secure aggregation, on a client: the update with this client's part of the
        noise, where `least` clients' parts at least come together."""
        return update
