"""The Flower apps: unpack Messages into plain arguments, and pack the results again.

`main.py` makes both around a composed configuration. `flwr run` takes `server` and `client`
below, which compose the same `conf/` from the run's one setting, `overrides`.
"""

# A node that keeps no trainer (`node/resident.py`) has a process for every message, which pays
# for what is imported up here; torch and all that needs it is imported where it is used.
import logging
import shlex
import sys
import traceback
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from hydra.errors import HydraException

import utils
from methods.parcel import Parcels, by_parcel
from node import permit

if TYPE_CHECKING:
    from methods.base import State
    from methods.secure import Member
    from methods.store import Kept

# Seconds, unless train.round_timeout says otherwise. A SuperNode that is started again with
# the same key is online, and will never answer what its predecessor was asked.
ROUND_TIMEOUT = 3600.0
# A client's configuration and its partition, for a message.
Settle = Callable[[Message, Context], tuple[dict[str, Any], int]]


# --- in a simulation: around a configuration ----------------------------------------------


def make_server_app(cfg: utils.Settings, folder: Path) -> ServerApp:
    """A ServerApp that runs `cfg` and writes the results into `folder`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from server import rounds

        rounds.run(cfg, grid, folder)

    return app


def make_client_app(cfg: utils.Settings, folder: Path) -> ClientApp:
    """A ClientApp that trains and evaluates whichever partition a message names.

    What its clients keep from one round to another, and their own adapters at the end, go
    into the run's `folder`.
    """
    folder = folder.resolve()
    cfg = cfg | {
        "residuals": str(folder / "residuals"),
        "personal_path": str(folder / "personal"),
    }

    def settle(message: Message, context: Context) -> tuple[dict[str, Any], int]:
        return cfg, int(message.content["config"]["partition"])

    return client_app(settle, private=False)


# --- in `flwr run`: from the run's overrides, and a node's own settings ----------------------


def federation_server() -> ServerApp:
    """A ServerApp that composes `conf/` and writes the results where `hydra.run.dir` says.

    That is a folder of the SuperLink's working directory.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from server import runs
        from settings.compose import compose_run
        from settings.start import start

        logging.getLogger("flwr").addFilter(shorten)
        overrides = str(context.run_config["overrides"])
        config = permit.compose(permit.parse(overrides))  # as every node does
        if not config.verbose:
            logging.getLogger("flwr").setLevel(logging.WARNING)
        _, folder, named = compose_run(overrides)

        def train(cfg: utils.Settings, folder: Path, chosen: list[str]) -> None:
            from server import rounds

            # A run that goes on was begun with other overrides than it is gone on with.
            told = {"overrides": shlex.join(chosen), "run": run_name(folder)}
            timeout = cfg.train.round_timeout or ROUND_TIMEOUT
            cfg = cfg | {"train": cfg.train | {"round_timeout": timeout}}
            rounds.run(cfg, Parcels(grid), folder.resolve(), told)

        with ExitStack() as held:
            if not config.resume:
                folder = runs.begin(folder, named).resolve()
                held.enter_context(runs.own(folder))
            start(config, shlex.split(overrides), folder, train, deployed=True)

    return app


def run_name(folder: Path) -> str:
    """What nodes know a run by: kept in its folder, and no other run's, wherever that is."""
    if not (file := folder / "run.json").exists():
        utils.write_json(file, f"{folder.name}-{uuid.uuid4().hex[:8]}")
    return str(utils.read_json(file))


def federation_client() -> ClientApp:
    """A ClientApp that takes part in a run as far as its node's own settings allow."""

    def settle(message: Message, context: Context) -> tuple[dict[str, Any], int]:
        # A node of `flwr run`'s simulation is a worker of Ray, which a SuperNode's never is.
        ray = sys.modules.get("ray")
        simulated = ray is not None and ray.is_initialized()
        told = message.content["config"]
        return permit.settle(told, context.node_config, simulated)

    return client_app(settle, private=True, mods=[by_parcel])


def shorten(record: logging.LogRecord) -> bool:
    """Log what a user can mend in a line; Flower would add the traceback."""
    if record.exc_info and isinstance(record.exc_info[1], HydraException):
        record.msg, record.args = str(record.exc_info[1]), ()
        record.exc_info = None
    return True


# --- what a client does with a message -------------------------------------------------------


def client_app(
    settle: Settle, private: bool, mods: list[Mod] | None = None
) -> ClientApp:
    """A ClientApp on the configuration and partition that `settle` gives for a message.

    `private`: of an error that is no `Refusal` the server is told no more than its type,
    because its text may quote data. `mods` are Flower's, around each answer.
    """
    app = ClientApp(mods=mods)

    def answer(handle: Callable[..., RecordDict]) -> Callable[..., Message]:
        # Left to Flower, an error would be printed three times, traceback included.
        def respond(message: Message, context: Context) -> Message:
            try:
                cfg, partition = settle(message, context)
                content = handle(cfg, partition, message, context)
                if private:  # what its operator can hold the node to
                    line = permit.account(message, cfg, content)
                    print(utils.one_line(line, limit=2000), flush=True)
                return Message(content, reply_to=message)
            except Exception as error:
                code, told = ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)
                if isinstance(error, utils.Refusal):
                    why = f" ({error.__cause__})" if error.__cause__ else ""
                    code, log = error.code, f"Refused: {error}{why}"
                else:
                    log = traceback.format_exc()
                    told = "its own log says more" if private else told
                    told = f"{type(error).__name__}: {told}"
                print(utils.printable(log), file=sys.stderr)
                return Message(Error(code, utils.one_line(told)), reply_to=message)

        return respond

    app.query()(answer(query))
    app.query("agree")(answer(agree))
    app.train()(answer(train))
    app.train("masked")(answer(train))
    app.evaluate()(answer(evaluate))
    app.evaluate("personal")(answer(personalise))
    return app


def query(
    cfg: utils.Settings, partition: int, message: Message, context: Context
) -> RecordDict:
    """The first adapter."""
    from node import processes

    return RecordDict({"arrays": ArrayRecord(processes.initial_adapter(cfg))})


def agree(
    cfg: utils.Settings, partition: int, message: Message, context: Context
) -> RecordDict:
    """What the others, or the server, need of this client for a sum of updates."""
    from methods import secure, store

    number = int(message.content["config"]["server-round"])
    kept = store.Kept(Path(cfg.residuals), partition, number)
    made = secure.answer(_member(cfg, context), dict(message.content["secure"]), kept)
    return RecordDict({"secure": ConfigRecord({"answer": made})})


def _member(cfg: utils.Settings, context: Context) -> "Member":
    # Its secrets are in Flower's state of the client: no file, and gone with the process.
    from methods import secure

    if "secure" not in context.state:
        context.state["secure"] = ConfigRecord()
    return secure.Member(context.state["secure"], cfg.get("least_sum", secure.LEAST))


def train(
    cfg: utils.Settings, partition: int, message: Message, context: Context
) -> RecordDict:
    """One round's update to the adapter that came in, and its metrics; or its masked part of
    the sum that alone is to be known."""
    from methods import (
        aggregate,
        personal,
        privacy,
        scaffold,
        secure,
        sharing,
        steps,
        store,
        wire,
    )
    from node import processes

    config = message.content["config"]
    number = int(config["server-round"])
    kept = store.Kept(Path(cfg.residuals), partition, number)
    level = privacy.build(cfg.privacy)
    summed: secure.Part | None = None
    if level.secure_aggregation:
        summed = secure.Part(_member(cfg, context), dict(message.content["secure"]))
    part = sharing.build(cfg.sharing)
    before = _joined(cfg, message, part, kept, kept)
    mu = config.get("proximal-mu", 0.0)
    correction = {}
    if "control" in message.content:
        level.answers("control variates")
        control = wire.unpack(message.content["control"].to_torch_state_dict())
        correction = scaffold.correction(control, before, kept)
    after, metrics = processes.train(cfg, before, partition, number, mu, correction)
    if "rank" in cfg:
        metrics["rank"] = cfg.rank
    metrics = level.tells(metrics)
    after, change = scaffold.change(after, kept, cfg.comm.dtype)

    def fit(start: "State", anchor: "State", mu: float) -> "State":
        return processes.train(cfg, start, partition, number, mu, None, anchor)[0]

    personal.build(cfg.personal).train(fit, before, kept)
    packed = steps.build(cfg, level=level).leave(part.leave(before, after, kept), kept)
    if summed:
        packed = level.share(packed, secure.least(summed.members))
        weight = int(metrics[aggregate.WEIGHTS[cfg.strategy.weighted_by]])
        figures = dict.fromkeys(secure.FIGURES, 0) | metrics  # not all levels tell all
        masked = Array(summed.masked(packed, figures, level.counts(weight)))
        return RecordDict({"arrays": ArrayRecord({"masked": masked})})
    content = {"arrays": ArrayRecord(packed), "metrics": MetricRecord(metrics)}
    if change:
        content["control"] = ArrayRecord(change)
    return RecordDict(content)


def evaluate(
    cfg: utils.Settings, partition: int, message: Message, context: Context
) -> RecordDict:
    """The metrics of the adapter that came in; of the base before round 1."""
    from methods import personal, privacy
    from node import processes

    privacy.build(cfg.privacy).answers("measurements")
    number = int(message.content["config"]["server-round"])
    shared, joined, kept = _up_to(cfg, partition, number, message)
    method, base = personal.build(cfg.personal), number == 0
    _, own = method.pair(shared, joined, kept)
    # One that was not trained by itself is what is evaluated anyway.
    beside = own if method.trainings > 1 and not base else None
    metrics = processes.evaluate(cfg, joined, partition, base, beside)
    return RecordDict({"metrics": MetricRecord(metrics)})


def personalise(
    cfg: utils.Settings, partition: int, message: Message, context: Context
) -> RecordDict:
    """The metrics of the adapter of the client's own that it chooses, and writes, at the end."""
    import client
    from methods import personal, privacy
    from node import processes

    privacy.build(cfg.privacy).answers("measurements")
    number = int(message.content["config"]["server-round"])
    method = personal.build(cfg.personal)
    # Its rounds have a schedule of their own.
    by_itself = {"num_rounds": method.rounds}
    by_itself["train"] = cfg.train | {"schedule_rounds": None}

    def alone(start: "State", number: int) -> "State":
        return processes.train(cfg | by_itself, start, partition, number)[0]

    shared, own = method.finish(alone, *_up_to(cfg, partition, number, message))
    metrics = processes.personalise(cfg, shared, own, partition)
    if cfg.personal_path:
        chosen = personal.between(shared, own, metrics["personal_weight"])
        client.save(
            cfg, chosen, Path(cfg.personal_path) / f"client_{partition}", number
        )
    return RecordDict({"metrics": MetricRecord(metrics)})


def _up_to(
    cfg: utils.Settings, partition: int, number: int, message: Message
) -> tuple["State", "State", "Kept"]:
    """The adapter that all share, that with what has stayed here up to this round, and what
    else has."""
    from methods import sharing, store
    from node import processes

    now, after = (
        store.Kept(Path(cfg.residuals), partition, n) for n in (number, number + 1)
    )
    part = sharing.build(cfg.sharing)
    joined = _joined(cfg, message, part, after, now)
    own = part.own(joined.keys())
    first = processes.first_adapter(cfg) if own else {}
    return joined | {name: first[name] for name in own}, joined, after


def _joined(
    cfg: utils.Settings, message: Message, part: Any, earlier: Any, now: Any
) -> dict[str, Any]:
    """The adapter that a message is about, of what came and what is here of `earlier`."""
    from methods import down, lora
    from node import processes

    arrays, told = message.content["arrays"], message.content["config"]

    def first() -> "State":
        return processes.first_adapter(cfg)

    received = down.opened(arrays, told, cfg.comm, part, earlier, first)
    if cfg.comm.delta_down:
        now.save("view", received)
    if "rank" in cfg:  # the node's own, which is below the run's
        received = lora.cut(received, cfg.rank, lora.power(cfg.peft))
    adapter = part.join(received, told.get("unsent"), earlier, first)
    part.hold(received, adapter, now)
    return adapter


server = federation_server()
client = federation_client()
