"""The client's half of a method: what it gets, trains and gives of the adapter."""

from methods.base import State


class Adapter:
    """All of it, every round, and what goes is the change that training made."""

    def outgoing(self, before: State, after: State) -> State:
        """What is sent for the tensors of `after`."""
        return {name: after[name] - before[name] for name in after}
