"""Nodes that weigh next to nothing: many of them in one process, for one SuperLink.

    python assets/testbed/nodes.py 127.0.0.1:9092 500 3 "experiment=quickstart num_clients=500"

Each speaks to the SuperLink through Flower's own connection of a SuperNode, with the same
calls, but starts no process for a message: it answers at once, with an update of the right
names, shapes and type that nobody has trained. The third argument is how many seconds it waits
where there is no message: a SuperNode waits 3. Says when all are online, and runs until it is
ended.
"""

import sys
import threading
import time
from functools import partial
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

import numpy as np  # noqa: E402
from flwr.app import (  # noqa: E402
    Array,
    ArrayRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.supercore.inflatable.inflatable_object import (  # noqa: E402
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (  # noqa: E402
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supernode.fleet_http_connection import http_request_response  # noqa: E402

import client  # noqa: E402
from methods import parcel  # noqa: E402
from settings.compose import compose, resolve  # noqa: E402

FIGURES = {
    **{"num-examples": 16, "train_loss": 1.0, "peak_memory": 0, "seconds": 0.0},
    **{"eval_loss": 1.0, "eval_accuracy": 0.5},
}


class Node(threading.Thread):
    """One node, which answers a query with `first`."""

    def __init__(
        self, address: str, number: int, poll: float, first: ArrayRecord, dtype: str
    ) -> None:
        super().__init__(daemon=True)
        self.address, self.poll, self.first, self.dtype = address, poll, first, dtype
        self.draw = np.random.default_rng(number)
        self.online = threading.Event()

    def run(self) -> None:
        with http_request_response(self.address, insecure=True) as calls:
            _, receive, send, get_run, get_fab, pull, push, confirm = calls
            self.online.set()
            known: set[int] = set()
            while True:
                if (received := receive()) is None:
                    time.sleep(self.poll)
                    continue
                message, tree = received
                run, name = message.metadata.run_id, message.metadata.message_id
                if run not in known:
                    get_fab(get_run(run).fab_hash, run)
                    known.add(run)
                objects = [each.object_id for each in iterate_object_tree(tree)]
                contents = pull_objects(objects, partial(pull, run))
                confirm(run, name)
                message = inflate_object_from_contents(name, contents)
                message.metadata.__dict__["_message_id"] = name
                reply = parcel.by_parcel(message, None, self.answer)
                with no_object_id_recompute():
                    reply.metadata.__dict__["_message_id"] = reply.object_id
                    wanted, session = send(reply, get_object_tree(reply), 0.0)
                    push_objects(
                        get_all_nested_objects(reply),
                        partial(push, run, session),
                        object_ids_to_push=wanted,
                    )

    def answer(self, message: Message, _: Context) -> Message:
        content = RecordDict({"metrics": MetricRecord(FIGURES)})
        if message.metadata.message_type == "query":
            content["arrays"] = self.first
        if message.metadata.message_type == "train":
            content["arrays"] = ArrayRecord(
                {
                    name: Array(self.draw.normal(0, 1e-3, one.shape).astype(self.dtype))
                    for name, one in message.content["arrays"].items()
                }
            )
        return Message(content, reply_to=message)


def main() -> None:
    address, count, poll, overrides = sys.argv[1:]
    cfg = resolve(compose(overrides))
    first = ArrayRecord(client.initial_adapter(cfg))
    nodes = [
        Node(address, i, float(poll), first, cfg.comm.dtype) for i in range(int(count))
    ]
    for node in nodes:
        node.start()
    for node in nodes:
        node.online.wait()
    print(f"{count} nodes are online", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
