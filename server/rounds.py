"""What the server does: sample clients, check replies, aggregate, write the run down.

What a method is stands in `methods`; the loop here names none. A reply is checked before it
counts, and each round is on disk before the next one begins.
"""

import itertools
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import DEFAULT_TTL, ArrayRecord, ConfigRecord, MessageType, RecordDict
from flwr.serverapp import Grid

import dataset
import model
import tasks
from evaluation.examine import Examination, Scores
from methods import aggregate, lora, personal, privacy, secure, sharing, steps, wire
from methods.base import Contribution, OutOfRange, State, Unusable, adapters, norm
from server import checkpoint, first
from server.cohort import Clients, RunFailed
from server.exchange import (
    MASKED,
    PERSONAL,
    Changes,
    Downlink,
    Exchange,
    arrays_of,
    bound,
    largest,
    most_used,
    num_bytes,
    read_figures,
)
from server.journal import Journal, report_failures, report_memory
from server.ledger import Ledger, Spent
from server.runs import PERSONAL_LOSSES, telling
from server.secure import Summed, read_masked
from utils import (
    Progress,
    Settings,
    Stopped,
    Unwritable,
    command,
    learning_rate,
    override,
    say,
    write_json,
)

# --- the run -------------------------------------------------------------------------------------


def run(
    cfg: Settings,
    grid: Grid,
    folder: Path,
    told: dict[str, str] | None = None,
) -> None:
    """Fine-tune for `cfg.num_rounds` rounds; write history, adapters and summary.

    The clients are whoever is connected: workers of a simulation, or the nodes of a
    federation, which come and go. `told` is what nodes are told with every message.

    With `cfg.resume` it goes on after the newest checkpoint in `folder`. Raises
    `RunFailed` when no client of a round gives a usable reply or the disk is full, and
    `Stopped` after `STOP.set()`; what the rounds before have left stays.
    """
    started = time.monotonic()
    forget_peak_memory()
    server = Server(cfg, grid, told)
    if told:
        server.clients.keep(folder / "nodes.json")
    journal = Journal(cfg, server.frame, folder)
    examination = Examination(cfg) if dataset.test_wanted(cfg) else None
    base = examination.base() if examination else ({}, [])
    state: State = {}
    done = 0
    if cfg.resume and (newest := checkpoint.newest(folder)):
        state, done, seconds = checkpoint.load(
            newest, server.aggregation, server.downlink
        )
        started -= seconds
        journal.go_on(done)
        server.level.recall(journal.rounds[-1])
        for entry in journal.rounds:  # one from before this was told begins a new pass
            server.clients.note(entry.get("asked", []))
        for client in itertools.chain(*(e["clients"] for e in journal.rounds)):
            server.aggregation.hear(client)
        say(f"Going on after round {done}.")
    server.ledger.keep(folder / "privacy.json", done)
    progress = Progress(cfg.num_rounds, done)
    journal.track()
    try:
        measured: list[Scores] = []
        if not done:
            state = server.aggregation.start(server.initial_adapter(), cfg.num_clients)
            journal.write_before(base[0] | server.evaluate_round(0, state))
        progress.begin({} if done else journal.before)
        for server_round in range(done + 1, cfg.num_rounds + 1):
            new_state, entry = server.train_round(server_round, state)
            if due(cfg, server_round, default=1):
                entry |= server.evaluate_round(server_round, new_state)
            if examination and due(cfg, server_round, default=0):
                measured = [*map(examination.measure, adapters(new_state).values())]
                entry |= mean(measured)
            journal.write_round(entry, new_state)
            seconds = time.monotonic() - started
            memory = server.aggregation.memory() | server.downlink.memory()
            checkpoint.save(folder, server_round, new_state, memory, seconds)
            state, done = new_state, server_round
            progress.advance(entry)
        scores = server.personalise(state)
        if examination:
            scores |= conclude(cfg, examination, base, state, measured, folder)
        scores |= server.ledger.summary() | {"seconds": time.monotonic() - started}
        journal.write_summary(scores)
    except Unwritable as error:
        raise RunFailed(f"{error} {go_on(folder, done, bool(told))}") from error
    except Spent as error:
        journal.save_last(state)
        saved = f" The last adapter is {folder}/peft_{done}." if done else ""
        raise Spent(f"{error}{saved}") from error
    except (RunFailed, Stopped) as error:
        with suppress(Unwritable):  # the checkpoint has it
            journal.save_last(state)
        raise type(error)(f"{error} {go_on(folder, done, bool(told))}") from error
    finally:
        progress.close()
        journal.close()


def due(cfg: Settings, server_round: int, default: int) -> bool:
    """Whether the adapter of this round is evaluated: every so many rounds, and at the end.

    `default` stands for `evaluate.every_round=0`; 0 is never.
    """
    every = cfg.evaluate.every_round or default
    last = server_round == cfg.num_rounds
    return bool(every) and (server_round % every == 0 or last)


def conclude(
    cfg: Settings,
    examination: Examination,
    before: tuple[Scores, list[str]],
    state: State,
    measured: list[Scores],
    folder: Path,
) -> dict[str, Any]:
    """Examine the final adapter; write `answers.json` and `test_scores.json` (the scores of
    each question, of base and adapter) and return what the summary tells.

    `measured`: what the last round has found of it already, if anything. Where each client
    has an adapter of its own the scores are their means, and the answers those of the
    client in the middle.
    """
    final = adapters(state)
    after = [
        examination.tuned(adapter, known)
        for adapter, known in zip(
            final.values(), measured or [None] * len(final), strict=True
        )
    ]
    each = [scores for scores, _ in after]
    told = {f"{name}_before": score for name, score in before[0].items()}
    told |= {f"{name}_after": score for name, score in mean(each).items()}
    told |= {
        "test_questions": len(examination.records),
        "test_left_out": examination.left_out,
    }
    questions = {
        "base": before[0].questions,
        "tuned": mean([scores.questions for scores in each]),
    }
    write_json(folder / "test_scores.json", questions)
    if labels := each[0].labels if "" in final else []:
        told["test_labels"] = labels
    if "" not in final:
        clients = [{"partition": i, **scores} for i, scores in enumerate(each)]
        told["clients"] = clients
    if cfg.evaluate.exact_match:
        after.sort(key=lambda examined: -examined[0]["test_loss"])
        _, answers = after[len(after) // 2]
        write_json(
            folder / "answers.json", examination.side_by_side(before[1], answers)
        )
    return told


def mean(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each score, or of each place in a list of scores, the mean over all."""
    return {
        name: np.mean([each[name] for each in scores], axis=0).tolist()
        for name in scores[0]
    }


def go_on(folder: Path, done: int, federated: bool = False) -> str:
    """How to take up a run that has stopped."""
    if not done:
        return "No round was finished."
    how = command("main.py", resume=folder)
    if federated:
        how = f"flwr run with {override('resume', str(folder))} in its overrides"
    return f"Go on after round {done} with: {how}"


class Server:
    """Talks to the clients: what goes out, what comes back, what is fit to be used."""

    def __init__(
        self, cfg: Settings, grid: Grid, told: dict[str, str] | None = None
    ) -> None:
        self.cfg = cfg
        self.grid = grid
        self.told = told or {}
        self.frame = model.skeleton(cfg.model, cfg.peft)
        self.layers = lora.layers(self.frame)
        self.aggregation = aggregate.build(cfg.strategy, self.layers)
        self.sharing = sharing.build(cfg.sharing)
        self.task = tasks.build(cfg)
        self.personal = personal.build(cfg.personal)
        self.level = privacy.build(cfg.privacy)
        self.steps = steps.build(cfg, self.layers, self.level)
        rate = privacy.secret_rate(cfg)
        self.ledger = Ledger(self.level, cfg.num_clients, rate)
        self.dtype = cfg.comm.dtype
        # All that the adapter holds. Less of it may be trained, or sent.
        self.held = {n: p for n, p in self.frame.named_parameters() if p.requires_grad}
        lasts = self.sharing.lasts(self.held.keys())
        made = first.seeded(cfg, self.held) if lasts else {}
        way = Changes if cfg.comm.delta_down else Downlink
        self.downlink = way(self.sharing, cfg.comm, made)
        # Counted once: it is 0.05 s for a client of a thousand records.
        self.most_used = cache(partial(most_used, cfg, bool(self.told)))
        self.max_weight = cfg.strategy.max_weight or math.inf
        self.singly = False  # whether replies are fetched one by one
        self.clients = Clients(cfg, grid, named=bool(self.told))
        self.clients.wait_for(cfg.num_clients)

    def _exchange(
        self,
        kind: str,
        nodes: list[int],
        read: Callable[[RecordDict, dict[str, Any], State], Any],
        state: State | None = None,
        more: dict[str, Any] | None = None,
        beside: State | None = None,
    ) -> Exchange:
        """An exchange with these nodes: the adapter that each gets of `state`, and its settings.

        `read` is given a reply's content, its figures, and the adapter that was sent.
        """
        partitions = {node: self.clients.partitions[node] for node in nodes}
        down = {
            i: self.aggregation.down(state, i) if state else {}
            for i in partitions.values()
        }
        packed = self.downlink.pack(down)
        control = ArrayRecord(wire.pack(beside or {}, self.dtype)[0])

        def write(partition: int) -> RecordDict:
            arrays, told = packed[partition]
            config = {**(more or {}), **self.told, **told, "partition": partition}
            content = RecordDict({"arrays": arrays, "config": ConfigRecord(config)})
            if control:
                content["control"] = control
            return content

        def use(partition: int, content: RecordDict) -> Any:
            sent = num_bytes(packed[partition][0]) + num_bytes(control)
            client = {"partition": partition, "bytes_down": sent}
            client |= read_figures(kind, content.metric_records.get("metrics", {}))
            bound(client, kind, bool(self.told), self.max_weight, self.most_used)
            found = read(content, client, down[partition])
            self.downlink.answer(partition)
            return found

        timeout = self.cfg.train.round_timeout
        if kind == PERSONAL and timeout:
            # Its rounds are in this one message, which Flower keeps for 12 hours.
            longest = max(timeout, DEFAULT_TTL)
            timeout = min(timeout * max(1, self.personal.rounds), longest)
        return Exchange(self.grid, kind, partitions, write, use, timeout, self.singly)

    def _replies(self, exchange: Exchange | Summed, server_round: int) -> Iterator[Any]:
        """What is usable of them; at the end, who failed is told and who refused noted."""
        yield from exchange.replies()
        self.clients.refused |= exchange.refused
        self.singly = exchange.singly
        for failure in exchange.failures:
            self.downlink.fail(failure["partition"])
        if not self.clients.secret:
            report_failures(server_round, exchange.failures)

    def initial_adapter(self) -> State:
        """The first adapter, which the clients that train first are asked for.

        So their workers load the base side by side, and who cannot take part is known.
        """

        def ask(attempt: int, tried: set[int], least: int) -> first.Asked:
            nodes = self.clients.sample("fraction_fit", 1, attempt, tried, least=least)
            exchange = self._exchange(MessageType.QUERY, nodes, self._read_first)
            return nodes, self._replies(exchange, 0), exchange.failures

        return first.adapter(self.cfg, self.held, ask)

    def _read_first(
        self, content: RecordDict, client: dict[str, Any], _: State
    ) -> tuple[State, dict[str, Any]]:
        # As it was made: in float32.
        return wire.decode(arrays_of(content), self.held, "float32"), client

    def train_round(
        self, server_round: int, state: State
    ) -> tuple[State, dict[str, Any]]:
        """Send the adapter out, check what comes back and aggregate it.

        Returns the new state and the round's entry for `history.json`. Where the replies
        are too few, or make no adapter that could be sent out again, others are asked,
        `strategy.max_round_retries` times.
        """
        began = time.monotonic()
        settings = self.cfg.strategy
        failures: list[dict[str, Any]] = []
        tried: set[int] = set()
        out: set[int] = set()  # who is left out of the whole round
        for attempt in range(1 + settings.max_round_retries):
            nodes = self.clients.sample(
                "fraction_fit", server_round, attempt, tried, out
            )
            asked = [self.clients.partitions[node] for node in nodes]
            self.ledger.enter("asked", server_round, asked)
            exchange = self._updates(nodes, state, server_round)
            self.aggregation.begin(state, server_round)
            memory = self.aggregation.memory()
            exactness = lora.Exactness(self._whole(server_round, state))
            seconds_aggregate = 0.0
            lengths: dict[int, float] = {}  # of those updates that are known one by one
            clients: list[dict[str, Any]] = []
            replied: list[int] = []
            for one, client in self._replies(exchange, server_round):
                received = time.monotonic()
                if not one.members:
                    lengths[one.partition] = norm(one.update)
                replied += one.clients
                self.aggregation.add(one)
                exactness.add(one)
                clients.append(client)
                seconds_aggregate += time.monotonic() - received
            failures += exchange.failures
            tried |= set(nodes)
            out |= exchange.out
            received = time.monotonic()
            few = len(replied) < settings.min_fit_replies
            try:
                if few:
                    raise Unusable(
                        exchange.fault
                        or f"{len(replied)} usable replies where "
                        f"strategy.min_fit_replies={settings.min_fit_replies}"
                    )
                failed = {failure["partition"] for failure in exchange.failures}
                self.ledger.enter("summed", server_round, {*asked} - failed)
                mean = self.steps.total(self.aggregation.gathered(), len(replied))
                new_state = self.aggregation.apply(mean)
                new_state = self.sharing.finish(new_state, server_round)
                self._check(new_state, state)
            except Unusable as error:
                say(f"round {server_round}: {error}.")
                self.aggregation.recall(memory)  # it may have taken up what is no use
                lost = few and exchange.failures
                cause = exchange.failures[-1]["cause"] if lost else str(error)
                if isinstance(error, OutOfRange) and lengths and not self.level.hides:
                    longest = max(lengths, key=lengths.__getitem__)
                    numbers = self.clients.partitions.items()
                    out |= {node for node, number in numbers if number == longest}
                    why = "its update is the longest of those that make no adapter"
                    failures.append({"partition": longest, "cause": why})
                    report_failures(server_round, failures[-1:])
            else:
                break
        else:
            raise RunFailed(
                f"Round {server_round} failed {attempt + 1} times "
                f"(strategy.max_round_retries={settings.max_round_retries}). The last "
                f"cause: {cause}."
            )
        error = exactness.error(state, new_state)
        self.downlink.close_round()
        self.downlink.move(new_state)
        if server_round == self.cfg.num_rounds:
            self.downlink.finish()
        seconds_aggregate += time.monotonic() - received
        clients.sort(key=lambda client: client.get("partition", -1))
        arguments = self.cfg.train.training_arguments
        told = [] if self.level.hides else clients
        report_memory(server_round, told, arguments["per_device_train_batch_size"])
        seconds = time.monotonic() - began
        asked = sorted(self.clients.partitions[node] for node in tried)
        self.clients.note(asked)
        entry = {
            "round": server_round,
            **self._loss(told),
            "learning_rate": learning_rate(self.cfg, server_round),
            **totals(told, seconds),
            **most_spent(self.level, told),
            "asked": asked,
            "sampled": len(nodes),
            "replied": len(replied),
            "retries": attempt,
            "failures": failures,
            "bytes_down": exchange.bytes_down,
            "bytes_up": sum(client["bytes_up"] for client in clients),
            **most_memory(told),
            "peak_memory_server": peak_memory(),
            "aggregation_error": error,
            "clients": [client for client in told if "partition" in client],
            "seconds_aggregate": seconds_aggregate,
            "seconds": seconds,
            **self.ledger.told(),
            **self.level.memory(),
        }
        return new_state, self.clients.shown(entry)

    def _loss(self, clients: list[dict[str, Any]]) -> dict[str, float]:
        """The mean of the clients' training losses, as they are weighed; nothing of nobody."""
        if not clients:
            return {}
        weights = [self._weight(client) for client in clients]
        losses = [client["train_loss"] for client in clients]
        return {"train_loss": float(np.average(losses, weights=weights))}

    def _updates(
        self, nodes: list[int], state: State, server_round: int
    ) -> Exchange | Summed:
        """The exchange in which these nodes train: with their updates one by one, or in one
        sum."""
        told = self.aggregation.told(server_round)
        beside = self._beside(state, server_round)
        if not self.level.secure_aggregation:
            return self._exchange(
                MessageType.TRAIN, nodes, self._read_update, state, told, beside
            )
        goes = self.sharing.goes(state.keys(), server_round)
        shapes = {name: tuple(state[name].shape) for name in goes}
        weigh = aggregate.WEIGHTS[self.cfg.strategy.weighted_by]
        asked = [self.clients.partitions[node] for node in nodes]
        most = largest(weigh, asked, self.max_weight, self.most_used)
        most = self.level.counts(most)

        def read(
            content: RecordDict, client: dict[str, Any], _: State
        ) -> tuple[np.ndarray, dict[str, Any]]:
            vector, length = read_masked(content, secure.size(shapes))
            return vector, client | {"bytes_up": length}

        def finish(
            vector: np.ndarray, who: list[int], members: int, length: int
        ) -> tuple[Contribution, dict[str, Any]]:
            mean, sums = secure.decode(vector, shapes, len(who), members, most)
            before = {name: state[name] for name in shapes}
            rest = {name: state[name] for name in state.keys() - before.keys()}
            weight, loss = int(sums["weight"]), sums["train_loss"]
            one = Contribution(-1, before, mean, weight, loss, rest, members=tuple(who))
            return one, {
                weigh: weight,
                "train_loss": loss,
                "tokens": int(sums["tokens"]),
                "peak_memory": sums["peak_memory"],
                "bytes_up": length,
            }

        masked = self._exchange(MASKED, nodes, read, state, told)
        return Summed(masked, most, finish)

    def _whole(self, server_round: int, state: State) -> Sequence[lora.Layer]:
        """The adapter's LoRA layers, where a client's whole adapter is known here: what it
        does not answer with is as it was sent."""
        # How far single clients are from the mean is not told, or not known.
        if self.level.hides or self.level.secure_aggregation:
            return ()
        names = state.keys()
        trained = {*self.sharing.trains(names, server_round)}
        stays = {*self.sharing.comes(names)} - trained
        known = stays | {*self.sharing.goes(names, server_round)}
        return self.layers if known == {*names} else ()

    def _read_update(
        self, content: RecordDict, client: dict[str, Any], before: State
    ) -> tuple[Contribution, dict[str, Any]]:
        weight, loss = self._weight(client), client["train_loss"]
        self.aggregation.hear(client)
        # A node may have made less of what it was sent.
        before = self.aggregation.down(before, client["partition"])
        if "ranks" in self.cfg.strategy:
            client = client | {"rank": lora.rank(before)}
        arrays = arrays_of(content)
        goes = self.sharing.goes(before.keys(), self.aggregation.number)
        sent = {name: before[name] for name in goes}
        rest = {name: before[name] for name in before.keys() - sent.keys()}
        one = Contribution(client["partition"], sent, arrays, weight, loss, rest)
        one = self.steps.arrive(one)
        size = num_bytes(arrays)
        if control := self._beside(before, self.aggregation.number):
            arrays = arrays_of(content, "control")
            one.beside = wire.decode(arrays, control, self.dtype)
            size += num_bytes(arrays)
        for was, change in ((one.before, one.update), (control, one.beside)):
            after = {name: was[name] + change[name] for name in was}
            if name := wire.lost(after, self.dtype):
                raise Unusable(
                    f"with its update {name} would hold values beyond "
                    f"comm.dtype={self.dtype}"
                )
        return one, client | {"bytes_up": size}

    def _beside(self, state: State, server_round: int) -> State:
        """What goes and comes beside the tensors that a client answers with."""
        goes = {*self.sharing.goes(state.keys(), server_round)}
        beside = self.aggregation.beside(state)
        return {name: tensor for name, tensor in beside.items() if name in goes}

    def _check(self, state: State, before: State) -> None:
        """Raise `Unusable` for what is no state, `OutOfRange` for one that would not arrive
        as it is sent out."""
        if fault := wire.misshapen(state, before):
            raise Unusable(f"the aggregate is no adapter: {fault}")
        if name := wire.lost(state, self.dtype):
            raise OutOfRange(
                f"the aggregate cannot be sent as comm.dtype={self.dtype}: {name} holds "
                "values that are not finite in it"
            )

    def _weight(self, client: dict[str, Any]) -> int:
        """What a client counts for in the mean, in examples or records."""
        weight = aggregate.WEIGHTS[self.cfg.strategy.weighted_by]
        if weight not in client:
            raise Unusable(f"its metrics lack {weight}")
        return client[weight]

    def evaluate_round(self, server_round: int, state: State) -> dict[str, Any]:
        """Let a share of the clients measure the new adapter on records held back.

        In round 0 the base without any, by those who will be asked last: before and after
        are then of the same clients, as long as nobody comes or goes. The means are weighted
        by examples; worst and spread (the standard deviation) are over the clients with
        enough records for that (`utils.telling`), if there are any.
        """
        if not self.cfg.strategy.fraction_evaluate:
            return {}
        asked = server_round or self.cfg.num_rounds
        nodes = self.clients.sample("fraction_evaluate", asked)
        exchange = self._exchange(
            MessageType.EVALUATE,
            nodes,
            lambda content, client, sent: client,
            state,
            {"server-round": server_round},
        )
        clients = [*self._replies(exchange, server_round)]
        self.downlink.close_round()
        result: dict[str, Any] = {"evaluate_failures": exchange.failures}
        if clients:
            names = ("eval_loss", "eval_accuracy", "eval_margin", "eval_loss_own")
            names += ("eval_macro_f1", "eval_mcc", "eval_entity_f1")
            result |= self._means(clients, names)
            if self.task.perplexity:
                result["eval_perplexity"] = float(np.exp(min(result["eval_loss"], 700)))
            if losses := [client["eval_loss"] for client in telling(clients)]:
                result["eval_loss_worst"] = max(losses)
                result["eval_loss_spread"] = float(np.std(losses))
            result["eval_clients"] = clients
        return result

    def personalise(self, state: State) -> dict[str, Any]:
        """Let all clients choose between this adapter, the last, and their own.

        On the records that they hold back, as what they write in a place of their own stays
        with them. Nothing where they have none of their own, or hold nothing back.
        """
        held_back = self.cfg.strategy.fraction_evaluate > 0
        if not held_back or not self.personal.any(self.sharing, self.held):
            return {}
        self.downlink.finish()  # also of a run that was stopped after its last round
        done = self.cfg.num_rounds
        exchange = self._exchange(
            PERSONAL,
            self.clients.available(),
            lambda content, client, sent: client,
            state,
            {"server-round": done},
        )
        clients = [*self._replies(exchange, done)]
        if not clients:
            return {}
        means = self._means(clients, PERSONAL_LOSSES)
        return {**means, "personal_clients": clients}

    def _means(
        self, clients: list[dict[str, Any]], names: Iterable[str]
    ) -> dict[str, float]:
        """Of what all of them have measured, the means weighted by examples.

        Puts them into the order of their numbers.
        """
        clients.sort(key=lambda client: client["partition"])
        weights = [client["num-examples"] for client in clients]
        if self.told:
            # A node's word is all there is; ten times the middle one is enough.
            middle = sorted(weights)[(len(weights) - 1) // 2]
            weights = [min(weight, 10 * middle) for weight in weights]
        return {
            name: float(np.average([one[name] for one in clients], weights=weights))
            for name in names
            if all(name in one for one in clients)
        }


def totals(clients: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What clients count, over all of them; left out where one of them does not tell.

    `tokens` trained on, without padding, and how many a second of the round; records that
    `train.seq_length` has cut (`truncated`) or left no answer (`dropped`).
    """
    sums: dict[str, Any] = {
        name: int(sum(client[name] for client in clients))
        for name in ("tokens", "truncated", "dropped")
        if clients and all(name in client for client in clients)
    }
    if "tokens" in sums:
        sums["tokens_per_second"] = sums["tokens"] / seconds
    return sums


def most_memory(clients: list[dict[str, Any]]) -> dict[str, int]:
    """The most that a client has held, in bytes; nothing of nobody."""
    held = [client["peak_memory"] for client in clients if "peak_memory" in client]
    return {"peak_memory_client": max(held)} if held else {}


def most_spent(level: privacy.Privacy, clients: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest epsilon that clients tell of their records, if any does, and of what."""
    told = [client["epsilon"] for client in clients if "epsilon" in client]
    of = {"delta": level.delta, "adjacency": level.adjacency}
    return {"epsilon": max(told), **of} if told else {}


def forget_peak_memory() -> None:
    """Let `peak_memory` count from now on; in a multirun the process has done other runs.

    Linux only. Elsewhere it stays the most of the process's whole life.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most memory that this process has held, in bytes, since `forget_peak_memory`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
