"""pytest tests/test_pulling.py: how the server fetches hundreds of replies."""

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from server import exchange
from server.exchange import Exchange
from utils import STOP


class Ready:
    """A grid of which all have answered at once, or after `empty` looks."""

    def __init__(self, empty: int = 0) -> None:
        self.empty, self.looks, self.ahead, self.most = empty, 0, 0, 0

    def push_messages(self, messages):
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = str(number)
        self.sent = {message.metadata.message_id: message for message in messages}
        return [*self.sent]

    def pull_messages(self, ids):
        self.looks += 1
        if self.looks <= self.empty:
            return []
        here = [self.sent.pop(each) for each in ids if each in self.sent]
        self.ahead += len(here)
        self.most = max(self.most, self.ahead)
        return [Message(RecordDict(), reply_to=message) for message in here]


@pytest.fixture
def ask(monkeypatch):
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    waits: list[float] = []
    monkeypatch.setattr(STOP, "wait", waits.append)

    def ask(grid: Ready, count: int) -> tuple[list[int], list[float]]:
        def read(partition: int, content: RecordDict) -> int:
            grid.ahead -= 1
            return partition

        nodes = {1000 + i: i for i in range(count)}
        asked = Exchange(grid, "train", nodes, lambda _: RecordDict(), read)
        return [*asked.replies()], waits

    return ask


def test_no_more_replies_are_in_memory_than_are_fetched_at_once(ask):
    grid = Ready()
    read, waits = ask(grid, 100)
    assert sorted(read) == [*range(100)]
    assert grid.most == exchange.PULLED
    assert waits == []


def test_empty_looks_take_a_sixth_of_the_time(ask, monkeypatch):
    """A look of seven requests, each of which takes 10 ms here, by a clock of our own."""
    clock = [0.0]
    monkeypatch.setattr(exchange.time, "monotonic", lambda: clock[0])
    grid = Ready(empty=7)
    pull = grid.pull_messages

    def slow(ids):
        clock[0] += 0.01
        return pull(ids)

    grid.pull_messages = slow
    read, waits = ask(grid, 100)
    assert sorted(read) == [*range(100)]
    assert waits == [pytest.approx(0.35)]
