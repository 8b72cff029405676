"""A grid without processes: the server's loop and the ClientApp in one, without Ray."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, MessageType, RecordDict, UserConfig
from flwr.supercore.task_identity import TaskIdentity

import app
from server import rounds


class LoopbackGrid:
    """Delivers messages to a real ClientApp in this process, in reversed order.

    `tamper(partition, reply)` may change or replace a reply on its way back. `nodes` may
    change between rounds, and those in `silent` never answer. What clients keep from one
    round to another is in `folder`.
    """

    def __init__(
        self,
        cfg: dict[str, Any],
        tamper: Callable[[int, Message], Message] = lambda partition, reply: reply,
        folder: Path | None = None,
    ) -> None:
        self.own_folder = tempfile.TemporaryDirectory(prefix="clients-")
        self.folder = folder or Path(self.own_folder.name)
        # What Flower's runtime sets before an app may make Messages.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.client_app = app.make_client_app(cfg, self.folder)
        # Unordered, as Flower's node ids are.
        self.nodes = [1000 - 7 * (i % 3) + 31 * i for i in range(cfg["num_clients"])]
        self.silent: set[int] = set()
        self.tamper = tamper
        self.sent: list[Message] = []
        self.waiting: list[Message] = []
        self.contexts: dict[int, Context] = {}

    def get_node_ids(self) -> list[int]:
        return self.nodes

    def push_messages(self, messages: list[Message]) -> list[str]:
        for message in messages:
            self.sent.append(message)
            message.metadata.__dict__["_message_id"] = f"message {len(self.sent)}"
        here = [m for m in messages if m.metadata.dst_node_id in self.nodes]
        self.waiting = [m for m in here if m.metadata.dst_node_id not in self.silent]
        return [m.metadata.message_id if m in here else None for m in messages]

    def pull_messages(self, message_ids: set[str]) -> list[Message]:
        if not self.waiting:
            return []
        message = self.waiting.pop()
        node = message.metadata.dst_node_id
        context = self.contexts.setdefault(
            node, Context(1, node, UserConfig(), RecordDict(), UserConfig())
        )
        reply = self.client_app(message, context)
        return [self.tamper(message.content["config"]["partition"], reply)]


class Killed(BaseException):
    """Ends a run in this process as suddenly as a signal would."""


def killed_in(cfg: dict[str, Any], folder: Path, replies: int) -> None:
    """Run in `folder` until so many replies of clients that train have come in."""
    trained = 0

    def kill(partition: int, reply: Message) -> Message:
        nonlocal trained
        trained += reply.metadata.message_type == MessageType.TRAIN
        if trained == replies:
            raise Killed
        return reply

    try:
        rounds.run(cfg, LoopbackGrid(cfg, kill, folder), folder)
    except Killed:
        return
    raise AssertionError(f"the run ended before {replies} clients had trained")
