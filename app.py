"""The Flower apps: unpack Messages into plain arguments, and pack the results again.

`main.py` makes both around a composed configuration.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import (
    ArrayRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

import client as local
import comm
import strategy


def make_server_app(cfg: dict[str, Any], folder: Path) -> ServerApp:
    """A ServerApp that runs `cfg` and writes the results into `folder`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy.run(cfg, grid, folder)

    return app


def make_client_app(cfg: dict[str, Any]) -> ClientApp:
    """A ClientApp that trains and evaluates whichever partition a message names."""
    app = ClientApp()

    @app.query()
    @reply_with_cause
    def query(message: Message, context: Context) -> RecordDict:
        return RecordDict({"arrays": ArrayRecord(local.initial_adapter(cfg))})

    @app.train()
    @reply_with_cause
    def train(message: Message, context: Context) -> RecordDict:
        config = message.content["config"]
        received = comm.unpack(message.content["arrays"].to_torch_state_dict())
        state, metrics = local.train(
            cfg,
            received,
            partition=config["partition"],
            server_round=config["server-round"],
            proximal_mu=config.get("proximal-mu", 0.0),
        )
        kept = context.state.array_records.get("residual")
        packed, residual = comm.pack(
            comm.update(state, received),
            cfg["comm"]["dtype"],
            kept.to_torch_state_dict() if kept else None,
        )
        if residual:
            context.state["residual"] = ArrayRecord(residual)
        return RecordDict(
            {"arrays": ArrayRecord(packed), "metrics": MetricRecord(metrics)}
        )

    @app.evaluate()
    @reply_with_cause
    def evaluate(message: Message, context: Context) -> RecordDict:
        metrics = local.evaluate(
            cfg,
            comm.unpack(message.content["arrays"].to_torch_state_dict()),
            partition=message.content["config"]["partition"],
        )
        return RecordDict({"metrics": MetricRecord(metrics)})

    return app


def reply_with_cause(
    handle: Callable[[Message, Context], RecordDict],
) -> Callable[[Message, Context], Message]:
    """Answer a message with the handler's result, or with the error it died of, in a line.

    Left to Flower, the same error would be printed three times, traceback included.
    """

    def answer(message: Message, context: Context) -> Message:
        try:
            return Message(handle(message, context), reply_to=message)
        except Exception as error:
            traceback.print_exc()
            cause = f"{type(error).__name__}: {error}"
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            return Message(Error(code, cause), reply_to=message)

    return answer
