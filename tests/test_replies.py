"""pytest tests/test_replies.py: no reply ends a run, poisons it, or buys more than its share.

One of four clients is hostile. The others answer at once, with a small adapter and without
a model: what is under test is all on the server.
"""

import copy
import io
import json
import math
import re
import time
import tracemalloc

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import client
import dataset
import model
import utils
from evaluation import examine
from methods import aggregate, steps, wire
from server import exchange, rounds
from settings import preflight
from settings.compose import compose, resolve
from tasks import generation
from utils import PROJECT, STOP, Refusal

SHAPES = {"x.lora_A.weight": (4, 6), "x.lora_B.weight": (6, 3), "x.magnitude": (5,)}
START = {name: torch.ones(shape) for name, shape in SHAPES.items()}
FIRST = next(iter(SHAPES))
EXAMPLES = 8  # 2 steps of 4, as `configure` has it
HOSTILE = 1  # its partition


def honest_update(partition: int) -> dict[str, torch.Tensor]:
    return {k: torch.full(s, 0.01 * (partition + 1)) for k, s in SHAPES.items()}


def honest(kind: str, partition: int, dtype: str = "float16") -> RecordDict:
    """What an honest client answers, without training for it."""
    if kind == "query":
        return RecordDict({"arrays": ArrayRecord(START)})
    if kind == "evaluate":
        metrics = {"num-examples": 3, "eval_loss": 2.0, "eval_accuracy": 0.5}
        return RecordDict({"metrics": MetricRecord(metrics)})
    packed, _ = wire.pack(honest_update(partition), dtype)
    metrics = {"num-examples": EXAMPLES, "train_loss": 2.0, "peak_memory": 7}
    metrics |= {"records": 40, "micro_batch": 4, "seconds": 0.5}
    return RecordDict({"arrays": ArrayRecord(packed), "metrics": MetricRecord(metrics)})


HONEST_APP = ClientApp()


def _answer(kind: str):
    def answer(message: Message, context) -> Message:
        config = message.content["config"]
        content = honest(kind, config["partition"], DTYPE["now"])
        return Message(content, reply_to=message)

    return answer


DTYPE = {"now": "float16"}
HONEST_APP.query()(_answer("query"))
HONEST_APP.train()(_answer("train"))
HONEST_APP.evaluate()(_answer("evaluate"))


@pytest.fixture(scope="module")
def composed() -> dict:
    return preflight.check(
        compose(
            "experiment=quickstart num_clients=4 num_rounds=2 strategy.fraction_fit=1 "
            "strategy.fraction_evaluate=1 evaluate.exact_match=false "
            "train.training_arguments.max_steps=2 "
            "train.training_arguments.per_device_train_batch_size=4 "
            "strategy.max_round_retries=0"
        )
    )


@pytest.fixture(scope="module")
def frame(composed):
    return model.skeleton(composed["model"], composed["peft"])


@pytest.fixture
def serve(composed, frame, loopback, monkeypatch):
    """Makes a server of four clients, of which the hostile one's replies go by `tamper`."""
    monkeypatch.setattr(model, "skeleton", lambda *_: frame)
    monkeypatch.setattr(model, "seeded", lambda *_: START)
    monkeypatch.setitem(DTYPE, "now", "float16")

    def make(tamper=lambda reply: reply, told=None, grid=loopback, **changed):
        cfg = copy.deepcopy(composed)
        for key, value in changed.items():
            section, name = key.split("__")
            cfg[section][name] = value
        DTYPE["now"] = cfg["comm"]["dtype"]
        grid = grid(cfg)
        grid.client_app = HONEST_APP
        grid.tamper = lambda who, reply: tamper(reply) if who == HOSTILE else reply
        server = rounds.Server(cfg, grid, told)
        server.held = START
        return server

    return make


def mean(partitions: list[int]) -> float:
    """By how much the adapter moves where these are averaged, all alike."""
    return sum(0.01 * (p + 1) for p in partitions) / len(partitions)


def moved(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(state[name] - START[name]).flatten() for name in START])


# --- replies as a stranger may make them -------------------------------------------------------


def npy(values: np.ndarray, **header) -> bytes:
    """A `.npy` file of `values` whose header says something else."""
    file = io.BytesIO()
    told = {
        "descr": np.lib.format.dtype_to_descr(values.dtype),
        "fortran_order": False,
        "shape": values.shape,
    }
    np.lib.format.write_array_header_1_0(file, told | header)
    return file.getvalue() + values.tobytes()


def arrays(**first) -> ArrayRecord:
    """An honest update but for what its first array says of itself."""
    record = honest("train", HOSTILE)["arrays"]
    for name, value in first.items():
        setattr(record[FIRST], name, value)
    return record


def npz(names: list[str]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: np.ones((4, 6), np.float16) for name in names})
    return file.getvalue()


HALF = np.ones((4, 6), np.float16)
LONG = "\x1b[2J\x1b]0;owned\x07\nround 1/1  loss 0.0001\u202e \ud800" + "x" * 10**6


def replaced(name: str, record) -> RecordDict:
    content = honest("train", HOSTILE)
    content[name] = record
    return content


def without(name: str) -> RecordDict:
    content = honest("train", HOSTILE)
    del content[name]
    return content


def metric(name: str, value) -> RecordDict:
    content = honest("train", HOSTILE)
    content["metrics"][name] = value
    return content


def values(how) -> RecordDict:
    update = {name: how(tensor.half()) for name, tensor in START.items()}
    return replaced("arrays", ArrayRecord(update))


def renamed() -> RecordDict:
    content = honest("train", HOSTILE)
    return RecordDict({"evil\x1b[2J": content["arrays"], "metrics": content["metrics"]})


def renamed_tensor(name: str) -> RecordDict:
    record = honest("train", HOSTILE)["arrays"]
    record[name] = record.pop(FIRST)
    return replaced("arrays", record)


def more_tensors() -> RecordDict:
    record = honest("train", HOSTILE)["arrays"]
    for i in range(5000):
        record[f"evil {i}"] = Array(np.ones(1, np.float16))
    return replaced("arrays", record)


def with_first(array: Array) -> RecordDict:
    record = honest("train", HOSTILE)["arrays"]
    record[FIRST] = array
    return replaced("arrays", record)


def deep_header() -> bytes:
    text = b"{'descr': '<f2', 'fortran_order': False, 'shape': " + b"(" * 9000
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


# By a name: what it sends in the place of a trained adapter, and a word of the cause.
TABLE = {
    "no arrays": (lambda: without("arrays"), "it holds no arrays"),
    "no metrics": (lambda: without("metrics"), "lack num-examples"),
    "nothing": (lambda: RecordDict(), "lack num-examples"),
    "arrays under another name": (renamed, "it holds no arrays"),
    "metrics in the place of arrays": (
        lambda: replaced("arrays", MetricRecord({"a": 1})),
        "it holds no arrays",
    ),
    "a configuration": (
        lambda: replaced("arrays", ConfigRecord({"a": b"x" * 10**6})),
        "it holds no arrays",
    ),
    "no tensors": (lambda: replaced("arrays", ArrayRecord()), "3 adapter tensors"),
    "a tensor renamed": (lambda: renamed_tensor("\x1b[2Jevil"), "1 adapter tensors"),
    "a scale": (lambda: renamed_tensor(FIRST + wire.SCALE), "1 adapter tensors"),
    "5000 tensors more": (more_tensors, "5000 unknown tensors"),
    # what an array says of itself
    "another type": (lambda: values(torch.Tensor.float), "not of type float16"),
    "eight bits": (lambda: values(lambda v: v.to(torch.int8)), "not of type float16"),
    "words": (
        lambda: with_first(Array(np.full((4, 6), "a" * 5))),
        "not of type float16",
    ),
    "complex": (
        lambda: with_first(Array(HALF.astype(np.complex64))),
        "not of type float16",
    ),
    "a long word for a type": (
        lambda: replaced("arrays", arrays(dtype=LONG)),
        "not of type float16",
    ),
    "another serialisation": (
        lambda: replaced("arrays", arrays(stype="pickle")),
        "not of type float16",
    ),
    "another shape": (lambda: with_first(Array(HALF.T.copy())), "has shape other"),
    "one dimension more": (lambda: with_first(Array(HALF[None])), "has shape other"),
    "a shape of lies": (
        lambda: replaced("arrays", arrays(shape=(10**30, -1))),
        "has shape other",
    ),
    "an endless shape": (
        lambda: replaced("arrays", arrays(shape=(1,) * 10**5)),
        "has shape other",
    ),
    "no bytes": (lambda: replaced("arrays", arrays(data=b"")), "not serialised"),
    "a byte too few": (
        lambda: replaced("arrays", arrays(data=npy(HALF)[:-1])),
        "not serialised",
    ),
    "a byte too many": (
        lambda: replaced("arrays", arrays(data=npy(HALF) + b"x")),
        "not serialised",
    ),
    "64 MiB": (
        lambda: replaced("arrays", arrays(data=bytes(2**26))),
        "not serialised",
    ),
    "zeros": (lambda: replaced("arrays", arrays(data=bytes(176))), "not serialised"),
    "an npz": (lambda: replaced("arrays", arrays(data=npz(["a"]))), "not serialised"),
    "a broken zip": (
        lambda: replaced("arrays", arrays(data=b"PK\x03\x04" + bytes(172))),
        "not serialised",
    ),
    "a pickle": (
        lambda: replaced("arrays", arrays(data=b"\x80\x04cos\nsystem\n" + bytes(160))),
        "not serialised",
    ),
    "a header of 10^13 values": (
        lambda: replaced("arrays", arrays(data=npy(HALF, shape=(10**13,)))),
        "not serialised",
    ),
    "a header of 10^30 values": (
        lambda: replaced("arrays", arrays(data=npy(HALF, shape=(10**15, 10**15)))),
        "not serialised",
    ),
    "a header of another shape": (
        lambda: replaced("arrays", arrays(data=npy(HALF, shape=(6, 4)))),
        "not serialised",
    ),
    "a header of objects": (
        lambda: replaced("arrays", arrays(data=npy(HALF, descr="|O"))),
        "not serialised",
    ),
    "a header of another type": (
        lambda: replaced("arrays", arrays(data=npy(HALF, descr="<i2"))),
        "not serialised",
    ),
    "the other byte order": (
        lambda: replaced("arrays", arrays(data=npy(HALF, descr=">f2"))),
        "not serialised",
    ),
    "a nested header": (
        lambda: replaced("arrays", arrays(data=deep_header() + bytes(100))),
        "not serialised",
    ),
    # what the values are
    "not a number": (lambda: values(lambda v: v * math.nan), "not finite"),
    "infinite": (lambda: values(lambda v: v / 0), "not finite"),
    "one infinite": (
        lambda: values(lambda v: v.index_fill(0, torch.tensor(0), -math.inf)),
        "not finite",
    ),
    # 1 + 65504 is 65504 again in float16, 65504 and 32 infinite.
    "to the end of float16 and beyond": (
        lambda: with_first(Array(np.full((4, 6), 65504, np.float16))),
        None,
    ),
    # what it tells of itself
    "a list of examples": (lambda: metric("num-examples", [5, 5]), "no whole number"),
    "an empty list": (lambda: metric("num-examples", []), "no whole number"),
    "half an example": (lambda: metric("num-examples", 0.5), "no whole number"),
    "eight, as a fraction": (lambda: metric("num-examples", 8.0), "no whole number"),
    "next to no example": (lambda: metric("num-examples", 1e-320), "no whole number"),
    "no example": (lambda: metric("num-examples", 0), "not within 1"),
    "less than none": (lambda: metric("num-examples", -5), "not within 1"),
    "one too many": (lambda: metric("num-examples", EXAMPLES + 1), "is above 8"),
    "10^18": (lambda: metric("num-examples", 10**18), "not within 1"),
    "more records than there are": (lambda: metric("records", 10**6), "is above"),
    "a list of losses": (lambda: metric("train_loss", [2.0]), "train_loss is no"),
    "a loss below 0": (lambda: metric("train_loss", -1e9), "not within 0"),
    "a loss of 1e308": (lambda: metric("train_loss", 1e308), "not within 0"),
    "an infinite loss": (lambda: metric("train_loss", math.inf), "not within 0"),
    "no loss": (lambda: metric("train_loss", math.nan), "not within 0"),
    "a memory of words": (lambda: metric("peak_memory", [1] * 10**5), "peak_memory"),
    "less than no memory": (lambda: metric("peak_memory", -1), "not within 0"),
    "all memory": (lambda: metric("peak_memory", 2**63 - 1), "not within 0"),
    "a micro-batch of -7": (lambda: metric("micro_batch", -7), "not within 1"),
    "endless seconds": (lambda: metric("seconds", math.inf), "not within 0"),
    "no seconds": (lambda: metric("seconds_train", math.nan), "not within 0"),
    "dropped less than none": (lambda: metric("dropped", -1), "not within 0"),
}
ERRORS = {
    "an error of a megabyte": Error(2, LONG),
    "an error without a reason": Error(2, None),
    "an empty error": Error(0, ""),
    "an error of control characters": Error(-1, "\x1b[2J\x00\r\n\t"),
    "a refusal": Error(Refusal.code, LONG),
    "an error of numbers": Error(10**30, 7),
}


def play(server: rounds.Server) -> tuple[dict, dict]:
    """A round, of which history.json could be written; what it holds of the hostile one."""
    state, entry = server.train_round(1, START)
    text = json.dumps(entry, allow_nan=False, ensure_ascii=False)
    text.encode()  # no half of a character
    assert len(text) < 5000
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    return state, entry


def left_out(server: rounds.Server, capsys) -> str:
    """That a round goes on with the other three, and why the hostile client was left out."""
    state, entry = play(server)
    assert [one["partition"] for one in entry["clients"]] == [0, 2, 3]
    expected = torch.full((4 * 6 + 6 * 3 + 5,), mean([0, 2, 3]))
    assert torch.allclose(moved(state), expected, atol=1e-4)
    [failure] = entry["failures"]
    assert failure["partition"] == HOSTILE
    cause = failure["cause"]
    assert 0 < len(cause) <= 200
    assert cause.isprintable()
    printed = capsys.readouterr().out
    assert f"round 1: left out client 1: {cause}\n" in printed
    assert len(printed) < 300
    return cause


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_a_hostile_reply_costs_itself_and_nothing_else(name, serve, capsys):
    make, word = TABLE[name]

    def tamper(reply: Message) -> Message:
        reply.content = make()
        return reply

    server = serve(tamper)
    if word is None:  # it can be used
        _, entry = play(server)
        assert entry["replied"] == 4
    else:
        assert word in left_out(server, capsys)


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_told_in_one_line(name, serve, capsys):
    def tamper(reply: Message) -> Message:
        wrong = Message(
            ERRORS[name], reply_to=ASKED[reply.metadata.reply_to_message_id]
        )
        return wrong

    server = serve(tamper)
    push = server.grid.push_messages

    def note(messages):
        pushed = push(messages)
        ASKED.update({message.metadata.message_id: message for message in messages})
        return pushed

    server.grid.push_messages = note
    cause = left_out(server, capsys)
    assert "\x1b" not in cause
    assert len(server.clients.refused) == (name == "a refusal")


ASKED: dict[str, Message] = {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["query", "evaluate", "train", "system", "\x1b[2J"])
def test_a_reply_is_read_as_what_was_asked_for_whatever_it_says_it_is(kind, serve):
    def tamper(reply: Message) -> Message:
        reply.metadata.__dict__["_message_type"] = kind
        return reply

    _, entry = play(serve(tamper))
    assert entry["replied"] == 4
    result = serve(tamper).evaluate_round(1, START)
    assert [one["partition"] for one in result["eval_clients"]] == [0, 1, 2, 3]


def test_what_a_client_says_of_its_place_is_not_looked_at(serve, capsys):
    lies = {"partition": 3, "bytes_down": -5, "bytes_up": -1}
    lies |= {f"evil {i}": 1.0 for i in range(10**4)}

    def tamper(reply: Message) -> Message:
        reply.content["metrics"].update(lies)
        return reply

    _, entry = play(serve(tamper))
    assert [one["partition"] for one in entry["clients"]] == [0, 1, 2, 3]
    assert len({one["bytes_down"] for one in entry["clients"]}) == 1
    assert len({one["bytes_up"] for one in entry["clients"]}) == 1
    assert all(one.keys() == entry["clients"][0].keys() for one in entry["clients"])


@pytest.mark.slow
def test_every_figure_of_a_real_client_is_known(configure):
    cfg = configure("strategy.fraction_evaluate=1", "evaluate.holdout=0.01")
    start = client.initial_adapter(cfg)
    for kind, figures in (
        ("train", client.train(cfg, start, 0, 1)[1]),
        ("evaluate", client.evaluate(cfg, start, 0)),
    ):
        assert exchange.read_figures(kind, figures) == figures


# --- where the bytes are many -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("word", ["shape", "data", "type"])
def test_a_refused_array_costs_no_memory_of_its_size(word, serve):
    big = Array(np.zeros(2**25, np.float16))  # 64 MiB
    if word == "data":
        big.shape = (4, 6)
    if word == "type":
        big = Array(np.zeros((4, 6, 2**17), np.float64))
    record = with_first(big)
    del big

    def tamper(reply: Message) -> Message:
        reply.content = record
        return reply

    server = serve(tamper)
    tracemalloc.start()
    try:
        _, entry = play(server)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert entry["replied"] == 3
    assert peak < 2**22


# --- replies that come in another way ---------------------------------------------------------


def test_replies_that_come_twice_or_answer_nothing_are_passed_over(serve, loopback):
    class Twice(loopback):
        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            for reply in replies[:1]:
                stray = copy.deepcopy(reply)
                stray.metadata.__dict__["_reply_to_message_id"] = "never sent"
                return [stray, reply, reply]
            return replies

    _, entry = play(serve(grid=Twice))
    assert [one["partition"] for one in entry["clients"]] == [0, 1, 2, 3]
    assert entry["failures"] == []


def test_what_flower_cannot_put_together_costs_its_sender_only(serve, loopback):
    class Broken(loopback):
        """Fetches as Flower does: all that have come in, or none where one is broken."""

        def pull_messages(self, message_ids):
            here = [m for m in self.waiting if m.metadata.message_id in message_ids]
            if any(m.content["config"]["partition"] == HOSTILE for m in here):
                raise KeyError("dtype")
            replies = []
            for message in here:
                self.waiting = [message]
                replies += super().pull_messages(message_ids)
            self.waiting = [m for m in self.all if m not in here]
            return replies

        def push_messages(self, messages):
            self.all = messages
            return super().push_messages(messages)

    server = serve(grid=Broken)
    for _ in range(2):
        _, entry = play(server)
        assert entry["replied"] == 3
        assert entry["failures"] == [
            {"partition": HOSTILE, "cause": "its reply cannot be read (KeyError)"}
        ]


def test_a_broken_line_to_the_superlink_is_no_clients_fault(serve, monkeypatch):
    server = serve()

    def gone(ids):
        raise ConnectionError("gone")

    server.grid.pull_messages = gone
    with pytest.raises(ConnectionError):
        server.train_round(1, START)


# --- whatever it sends --------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.lists(st.integers(-5, 5), max_size=3),
    st.lists(st.floats(), max_size=3),
    st.sampled_from([EXAMPLES, 1, 0.0, 1e308, 5e-324, -0.0, 2**53, 65504]),
)
FIGURE_NAMES = st.one_of(
    st.sampled_from(sorted(set().union(*exchange.FIGURES.values()))),
    st.sampled_from(["partition", "bytes_up", "bytes_down"]),
    st.text(max_size=8),
)
DTYPES = ["<f2", "<f4", "<f8", ">f2", "|i1", "<i8", "|b1", "<U2", "|V3", "<c8"]
SIZES = st.integers(0, 7)


@st.composite
def odd_arrays(draw) -> Array:
    """An array whose bytes, header and own words may each say another thing."""
    shape = draw(
        st.one_of(
            st.sampled_from([*SHAPES.values()]),
            st.lists(SIZES, max_size=3).map(tuple),
        )
    )
    kind = np.dtype(draw(st.sampled_from(DTYPES)))
    size = math.prod(shape) * kind.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    header = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "shape": st.lists(
                    st.one_of(SIZES, st.integers(-1, 10**30)), max_size=3
                ).map(tuple),
                "descr": st.sampled_from([*DTYPES, "|O"]),
                "fortran_order": st.booleans(),
            },
        )
    )
    data = npy(np.frombuffer(raw, kind).reshape(shape), **header)
    data = draw(st.sampled_from([data, data, data, data[:-1], data + b"x", raw, b""]))
    return Array(
        draw(st.sampled_from([kind.name, "float16", "float32", "int8", "object", ""])),
        draw(st.sampled_from([shape, shape, (4, 6), (), (10**9, 10**9), (-1,)])),
        draw(st.sampled_from(["numpy.ndarray", "numpy.ndarray", "torch", ""])),
        data,
    )


@st.composite
def odd_contents(draw) -> RecordDict:
    """A reply that is honest in some of its parts, and may be anything in the others."""
    content = honest("train", HOSTILE, DTYPE["now"])
    record, metrics = content["arrays"], content["metrics"]
    for name, value in draw(st.dictionaries(FIGURE_NAMES, NUMBERS, max_size=3)).items():
        metrics[name] = value
    for name in draw(st.sets(st.sampled_from(sorted(metrics)), max_size=1)):
        del metrics[name]
    names = st.one_of(
        st.sampled_from([*SHAPES, *(name + wire.SCALE for name in SHAPES)]),
        st.text(max_size=5),
    )
    for name, array in draw(st.dictionaries(names, odd_arrays(), max_size=2)).items():
        record[name] = array
    factor = draw(st.sampled_from([None, None, 0.0, -1.0, 1e3, 6e4]))
    if factor is not None:
        update = {k: torch.full(s, factor) for k, s in SHAPES.items()}
        record = ArrayRecord(wire.pack(update, DTYPE["now"])[0])
    return RecordDict(
        draw(
            st.sampled_from(
                [
                    {"arrays": record, "metrics": metrics},
                    {"arrays": record, "metrics": metrics},
                    {"arrays": record, "metrics": metrics},
                    {"arrays": record},
                    {"metrics": metrics},
                    {"arrays": metrics, "metrics": record},
                    {"x": record, "metrics": metrics, "arrays": ConfigRecord()},
                    {},
                ]
            )
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_no_reply_ends_a_round_or_moves_it_beyond_its_share(dtype, serve, capsys):
    longest = 0.5
    server = serve(comm__dtype=dtype, strategy__clip_norm=longest)
    honest_norm = max(
        math.sqrt(sum(v.square().sum().item() for v in honest_update(p).values()))
        for p in range(4)
    )
    assert honest_norm < longest  # the honest are not clipped

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(odd_contents(), st.sampled_from(["train", "query", "evaluate", "x"]))
    def attempt(content: RecordDict, kind: str) -> None:
        def tamper(who: int, reply: Message) -> Message:
            if who == HOSTILE:
                reply.content = content
                reply.metadata.__dict__["_message_type"] = kind
            return reply

        server.grid.tamper = tamper
        state, entry = play(server)
        assert {0, 2, 3} <= {one["partition"] for one in entry["clients"]}
        assert len(entry["failures"]) == 4 - entry["replied"]
        # Three honest updates of 8 examples each, and one of at most 8 and at most so long.
        others = 3 * EXAMPLES * mean([0, 2, 3])
        weight = sum(one["num-examples"] for one in entry["clients"]) - 3 * EXAMPLES
        assert 0 <= weight <= EXAMPLES
        beside = moved(state) - others / (3 * EXAMPLES + weight)
        reach = weight * longest / (3 * EXAMPLES + weight)
        assert beside.norm().item() <= reach + 1e-3
        assert 0 <= entry["train_loss"] <= 1e4
        capsys.readouterr()

    attempt()


EVAL_NUMBERS = st.fixed_dictionaries(
    {
        "num-examples": NUMBERS,
        "eval_loss": NUMBERS,
        "eval_accuracy": NUMBERS,
    }
)


@pytest.mark.slow
def test_no_reply_ends_an_evaluation_or_decides_it(serve, capsys):
    server = serve()

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(EVAL_NUMBERS)
    def attempt(figures: dict) -> None:
        def tamper(who: int, reply: Message) -> Message:
            if who == HOSTILE:
                reply.content = RecordDict({"metrics": MetricRecord(figures)})
            return reply

        server.grid.tamper = tamper
        result = server.evaluate_round(1, START)
        json.dumps(result, allow_nan=False)
        asked = {one["partition"]: one for one in result["eval_clients"]}
        assert {0, 2, 3} <= asked.keys()
        assert result["eval_loss"] >= 0
        assert 0 <= result["eval_accuracy"] <= 1
        capsys.readouterr()

    attempt()
    # It holds back a tenth of its records and no more.
    held = exchange.most_used(server.cfg, False, "evaluate", "num-examples", HOSTILE)
    figures = {"eval_loss": 0.0, "eval_accuracy": 1.0}
    for count, usable in ((held, True), (held + 1, False)):
        record = MetricRecord({"num-examples": count, **figures})

        def tamper(who: int, reply: Message) -> Message:
            if who == HOSTILE:
                reply.content = RecordDict({"metrics": record})  # noqa: B023
            return reply

        server.grid.tamper = tamper
        result = server.evaluate_round(1, START)
        assert (len(result["eval_clients"]) == 4) is usable


def test_a_client_of_few_questions_may_have_held_back_all_that_it_has(
    configure, tmp_path
):
    # Of two questions, asked five times each, one is held back whole: more than a tenth.
    rows = [
        {"instruction": f"q{i % 2}", "input": "", "output": str(i)} for i in range(10)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = configure(
        f"dataset=local dataset.path={tmp_path}/data.jsonl num_clients=1",
        "strategy.fraction_evaluate=1 strategy.fraction_fit=1",
    )
    held = dataset.split(cfg, dataset.load_partition(cfg, 0))[1]
    assert len(held) == 5
    assert exchange.most_used(cfg, False, "evaluate", "num-examples", 0) == 5


# --- what a client weighs ------------------------------------------------------------------------


def claims(figures: dict[int, dict[str, int]]):
    """A grid's `tamper` by which clients tell these figures."""

    def tamper(who: int, reply: Message) -> Message:
        reply.content["metrics"].update(figures.get(who, {}))
        return reply

    return tamper


def test_records_weigh_where_they_are_to(serve):
    server = serve(strategy__weighted_by="records")
    records = {0: 10, 1: 20, 2: 30, 3: 40}
    server.grid.tamper = claims({who: {"records": n} for who, n in records.items()})
    state, _ = play(server)
    # (10 * 1 + 20 * 2 + 30 * 3 + 40 * 4) / 100 hundredths
    assert moved(state).mean().item() == pytest.approx(0.03, abs=1e-5)


def test_a_reply_without_what_it_is_weighed_by_is_left_out(serve, capsys):
    def tamper(reply: Message) -> Message:
        del reply.content["metrics"]["records"]
        return reply

    server = serve(tamper, strategy__weighted_by="records")
    assert left_out(server, capsys) == "its metrics lack records"


@pytest.mark.slow
def test_by_epochs_a_client_counts_for_its_own_records_and_no_more(serve, capsys):
    server = serve()
    server.cfg["train"]["training_arguments"] |= {
        "max_steps": -1,
        "num_train_epochs": 3,
    }
    most = exchange.most_used(server.cfg, False, "train", "num-examples", HOSTILE)
    rows = exchange.most_used(server.cfg, False, "train", "records", HOSTILE)
    assert most == 3 * rows > 0
    server.grid.tamper = claims({HOSTILE: {"num-examples": most}})
    assert play(server)[1]["replied"] == 4
    server.grid.tamper = claims({HOSTILE: {"num-examples": most + 1}})
    assert "is above" in left_out(server, capsys)


def test_in_a_federation_more_counts_for_no_more(serve):
    # Seven processes of a node's own: seven times the examples, which the server cannot
    # look into. It is taken, and counts as one process.
    server = serve(told={"run": "x"})
    server.grid.tamper = claims({HOSTILE: {"num-examples": 7 * EXAMPLES}})
    state, entry = play(server)
    assert {one["num-examples"] for one in entry["clients"]} == {EXAMPLES}
    assert moved(state).mean().item() == pytest.approx(mean([0, 1, 2, 3]), abs=1e-5)
    server = serve(
        told={"run": "x"}, strategy__weighted_by="records", strategy__max_weight=50
    )
    server.grid.tamper = claims({HOSTILE: {"records": 10**12}})
    state, _ = play(server)
    # Three of 40 records, and one of 50 at most.
    expected = (40 * (1 + 3 + 4) + 50 * 2) / 170 / 100
    assert moved(state).mean().item() == pytest.approx(expected, abs=1e-5)
    server.grid.tamper = claims({HOSTILE: {"num-examples": 10**12}})
    result = server.evaluate_round(1, START)
    assert result["eval_loss"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ("train.training_arguments.max_steps=-1", "max_steps=-1"),
        ("strategy.weighted_by=records", "strategy.weighted_by=records"),
    ],
)
def test_a_federation_by_records_has_to_say_what_it_believes(overrides, word):
    config = compose(f"experiment=quickstart {overrides}")
    with pytest.raises(utils.UserError, match=f"{word}: .* strategy.max_weight=5000"):
        preflight.check_strategy(resolve(config), deployed=True)
    preflight.check_strategy(resolve(config))
    config.strategy.max_weight = 5000
    preflight.check_strategy(resolve(config), deployed=True)


# --- an adapter that would not arrive --------------------------------------------------------------


def fill(values: dict[int, float], dtype: str = "float16"):
    """A grid's `tamper` by which clients send updates full of one value."""

    def tamper(who: int, reply: Message) -> Message:
        if "arrays" in reply.content and who in values:
            update = {k: torch.full(s, values[who]) for k, s in SHAPES.items()}
            packed = wire.pack(update, dtype)[0]
            reply.content["arrays"] = ArrayRecord(packed)
        return reply

    return tamper


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 65504.0), ("float32", 3e38), ("int8", 3e38)]
)
def test_an_update_that_would_not_arrive_is_left_out(dtype, value, serve, capsys):
    start = {name: tensor * value for name, tensor in START.items()}
    server = serve(comm__dtype=dtype)
    server.grid.tamper = fill({HOSTILE: value}, dtype)
    state, entry = server.train_round(1, start)
    assert [one["partition"] for one in entry["clients"]] == [0, 2, 3]
    [failure] = entry["failures"]
    assert f"beyond comm.dtype={dtype}" in failure["cause"]
    assert wire.lost(state, dtype) is None
    # Clipped it can do no harm, and is taken.
    server.steps = steps.Steps(steps.Clip(1e-3), steps.travels(server.cfg.comm))
    server.grid.tamper = fill({HOSTILE: value / 2}, dtype)
    _, entry = server.train_round(1, {k: v * 0 for k, v in start.items()})
    assert entry["replied"] == 4


def test_a_momentum_that_leads_out_of_range_leaves_out_the_longest(serve, capsys):
    node = {
        "_target_": "flwr.serverapp.strategy.FedAvgM",
        "server_momentum": 1.0,
        "server_learning_rate": 8.0,
    }
    server = serve(strategy__max_round_retries=1)
    server.aggregation = aggregate.build(node)
    server.grid.tamper = fill({HOSTILE: 65000.0, 0: 1.0})
    # Each by itself is within float16, and so is the mean, but not eight times the mean.
    state, entry = server.train_round(1, START)
    assert wire.lost(state, "float16") is None
    assert entry["retries"] == 1
    [failure] = entry["failures"]
    assert failure["partition"] == HOSTILE
    assert "the longest" in failure["cause"]
    assert [one["partition"] for one in entry["clients"]] == [0, 2, 3]
    # The momentum knows nothing of it either.
    expected = 8 * (1.0 + 0.03 + 0.04) / 3
    assert moved(state).mean().item() == pytest.approx(expected, rel=1e-3)
    printed = capsys.readouterr().out
    assert "cannot be sent as comm.dtype=float16" in printed


def test_what_the_server_broke_is_no_refusal_of_the_clients(configure):
    cfg = configure()
    net = model.build_once(cfg["model"], cfg["peft"], cfg["seed"], torch.device("cpu"))
    state = model.adapter_state(net)
    name = next(iter(state))
    with pytest.raises(model.Misfit, match="does not fit the base"):
        model.set_adapter_state(net, {**state, name: torch.ones(1)})
    broken = {**state, name: state[name] * math.inf}
    with pytest.raises(utils.UserError, match="not finite") as error:
        model.set_adapter_state(net, broken)
    assert not isinstance(error.value, Refusal)


def test_a_strategy_that_fails_is_asked_again_and_then_named(serve):
    server = serve(strategy__max_round_retries=1)
    server.aggregation = aggregate.build(
        {"_target_": "flwr.serverapp.strategy.Bulyan", "num_malicious_nodes": 1}
    )
    with pytest.raises(
        rounds.RunFailed, match=r"failed 2 times .* Bulyan made nothing"
    ):
        server.train_round(1, START)


# --- the first adapter ----------------------------------------------------------------------------

METHODS = sorted(
    {path.stem for path in (PROJECT / "conf/peft").glob("*.yaml")} - {"outer"}
)  # which needs an emulator as its base (tests/test_emulator.py)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_seed_makes_the_first_adapter_on_the_server_as_on_a_client(name, configure):
    cfg = configure(f"peft={name}")
    ours = model.seeded(cfg["model"], cfg["peft"], cfg["seed"])
    theirs = client.initial_adapter(cfg)
    assert list(ours) == list(theirs)
    unknown = [k for k in ours if not torch.equal(ours[k], theirs[k])]
    assert all(torch.isnan(ours[k]).all() for k in unknown)
    read = ["lora_magnitude_vector" in k for k in ours] if name == "dora" else []
    assert len(unknown) == sum(read)


@pytest.mark.slow
def test_what_is_finite_without_weights_is_the_clients_own_for_all_of_peft(configure):
    """Every method of PEFT's that the tiny base takes with hardly a setting."""
    cfg = configure("model.quantization=null")["model"]
    starts = ["gaussian", "orthogonal", "pissa", "olora"]
    more = {"AdaLoraConfig": {"total_step": 10}}
    built, known = 0, 0
    for kind in sorted({*PEFT_TYPE_TO_CONFIG_MAPPING.values()}, key=str):
        name = kind.__name__
        for start in starts if name == "LoraConfig" else [None]:
            node = {"_target_": f"peft.{name}", "task_type": "CAUSAL_LM"}
            node |= {"target_modules": ["q_proj", "v_proj"], **more.get(name, {})}
            if start:
                node["init_lora_weights"] = start
            try:
                made = model.build(cfg, node, 0, torch.device("cpu"))
            except utils.UserError:
                continue
            theirs = model.adapter_state(made)
            built += 1
            try:
                ours = model.seeded(cfg, node, 0)
            except utils.UserError:  # it takes the weights apart
                assert name != "LoraConfig" or start in ("pissa", "olora")
                continue
            assert list(ours) == list(theirs)
            # Two are made in the type of the base: bfloat16, where the CPU has it.
            in_its_type = start == "orthogonal" or name == "ShadowConfig"
            rounding = 2**-8 if in_its_type else 0
            for key, tensor in ours.items():
                if not torch.isnan(tensor).all():
                    close = {"rtol": rounding, "atol": 0, "msg": name}
                    torch.testing.assert_close(tensor, theirs[key], **close)
            known += all(torch.isfinite(tensor).all() for tensor in ours.values())
    assert built >= 18
    assert known >= 14


def forged(values: dict[int, float], name: str = "x.magnitude"):
    """A grid's `tamper` by which clients make this of a tensor of the first adapter."""

    def tamper(who: int, reply: Message) -> Message:
        if who in values:
            made = {**START, name: torch.full(SHAPES[name], values[who])}
            reply.content["arrays"] = ArrayRecord(made)
        return reply

    return tamper


def test_what_the_seed_decides_no_client_can(serve, capsys):
    server = serve()
    server.grid.tamper = forged(dict.fromkeys(range(4), 9.0), FIRST)
    state = server.initial_adapter()
    assert all(torch.equal(state[name], START[name]) for name in START)
    assert capsys.readouterr().out == ""


@pytest.fixture
def read_from_the_base(monkeypatch, serve):
    """Let a tensor be one that only clients can make, as DoRA's magnitudes are."""
    nan = {**START, "x.magnitude": torch.full(SHAPES["x.magnitude"], math.nan)}
    monkeypatch.setattr(model, "seeded", lambda *_: nan)


def test_where_peft_makes_nothing_without_weights_clients_make_it_all(
    serve, monkeypatch, capsys
):
    server = serve()

    def cannot(*_):
        raise utils.UserError("linalg.svd: it holds NaN")

    monkeypatch.setattr(model, "seeded", cannot)
    server.grid.tamper = forged({3: 9.0}, FIRST)
    state = server.initial_adapter()
    assert all(torch.equal(state[name], START[name]) for name in START)
    assert "left out client 3" in capsys.readouterr().out


@pytest.mark.parametrize("value", [9.0, 1.02, -1.0, 0.0, 1e6])
def test_what_the_base_decides_more_than_half_must_have_made(
    value, serve, read_from_the_base, capsys
):
    server = serve()
    server.grid.tamper = forged({3: value})  # the first to answer: they come reversed
    state = server.initial_adapter()
    assert all(torch.equal(state[name], START[name]) for name in START)
    assert "round 0: left out client 3: its first adapter" in capsys.readouterr().out


def test_what_bfloat16_rounds_is_no_difference(serve, read_from_the_base, capsys):
    server = serve()
    server.grid.tamper = forged({3: 1 + 2**-9, 0: 1 - 2**-9})
    state = server.initial_adapter()
    assert torch.allclose(state["x.magnitude"], START["x.magnitude"], rtol=2**-8)
    assert capsys.readouterr().out == ""


def test_a_first_adapter_that_would_not_arrive_is_not_sent(serve, read_from_the_base):
    server = serve(lambda reply: reply)
    values = {**START, "x.magnitude": torch.full((5,), 1e5)}
    content = RecordDict({"arrays": ArrayRecord(values)})
    server.grid.tamper = lambda who, reply: setattr(reply, "content", content) or reply
    with pytest.raises(rounds.RunFailed, match=r"comm.dtype=float16: x.magnitude"):
        server.initial_adapter()


def test_the_settings_of_a_round_arrive_under_whatever_name(serve):
    server = serve()
    server.aggregation.strategy.configrecord_key = "mine"
    server.train_round(3, START)
    configs = [message.content["config"] for message in server.grid.sent]
    assert [config["server-round"] for config in configs] == [3] * 4


def test_where_none_is_made_by_more_than_half_the_run_does_not_begin(
    serve, read_from_the_base
):
    server = serve(strategy__max_round_retries=1)
    server.grid.tamper = forged({0: 2.0, 1: 2.0})
    with pytest.raises(rounds.RunFailed, match="make 2 different first adapters"):
        server.initial_adapter()


def test_three_are_asked_for_what_the_base_decides_even_if_fewer_train(
    serve, read_from_the_base
):
    server = serve(strategy__fraction_fit=0.25)
    server.grid.tamper = forged({0: 9.0})
    state = server.initial_adapter()
    assert len(server.grid.sent) == 3
    assert torch.equal(state["x.magnitude"], START["x.magnitude"])


def test_who_cannot_load_the_base_is_replaced_by_others(serve, capsys):
    server = serve(strategy__fraction_fit=0.25, strategy__max_round_retries=3)
    first = server.clients.sample("fraction_fit", 1)
    broken = {server.clients.partitions[node] for node in first}

    def fail(who: int, reply: Message) -> Message:
        if who in broken:
            reply.content = RecordDict()
        return reply

    server.grid.tamper = fail
    state = server.initial_adapter()
    assert len(server.grid.sent) == 2
    assert all(torch.equal(state[name], START[name]) for name in START)
    assert "it holds no arrays" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, (_, word) in TABLE.items() if word])
def test_no_reply_keeps_the_first_adapter_from_being_made(name, serve):
    def tamper(reply: Message) -> Message:
        reply.content = TABLE[name][0]()
        return reply

    state = serve(tamper).initial_adapter()
    assert all(torch.equal(state[name], START[name]) for name in START)


# --- waiting ---------------------------------------------------------------------------------------


@pytest.fixture
def stop():
    yield STOP
    STOP.clear()


def test_a_stop_is_heard_while_nodes_are_waited_for(serve, stop, monkeypatch):
    server = serve()
    server.grid.nodes = []
    asked = []

    def nobody():
        asked.append(1)
        if len(asked) == 3:
            stop.set()
        return []

    server.grid.get_node_ids = nobody
    with pytest.raises(utils.Stopped):
        server.clients.wait_for(4)
    assert len(asked) == 3


def test_a_stop_is_heard_while_replies_are_waited_for(serve, stop):
    server = serve()

    def nothing(ids):
        stop.set()
        return []

    server.grid.pull_messages = nothing
    with pytest.raises(utils.Stopped):
        server.train_round(1, START)


@pytest.mark.slow
def test_a_stop_is_heard_between_two_batches_and_two_tokens(stop, configure):
    cfg = configure()
    tokenizer = model.load_tokenizer(cfg["model"]["name"])
    net = model.build_once(cfg["model"], cfg["peft"], 0, torch.device("cpu")).eval()
    seen = []

    def forward(module, arguments) -> None:
        seen.append(1)
        if len(seen) == 2:
            stop.set()

    hook = net.get_base_model().register_forward_pre_hook(forward)
    try:
        with pytest.raises(utils.Stopped):
            generation.generate(net, tokenizer, [[5, 6, 7]], 20, [])
        assert len(seen) == 2
        example = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
        with pytest.raises(utils.Stopped):
            examine.score(net, None, [example] * 3, None, 1)
    finally:
        hook.remove()


def test_when_all_have_refused_the_run_says_so_at_once(serve, monkeypatch):
    server = serve()

    def refuse(who: int, reply: Message) -> Message:
        answered = reply.metadata.reply_to_message_id
        message = next(m for m in server.grid.sent if m.metadata.message_id == answered)
        return Message(Error(Refusal.code, "it has 3 records"), reply_to=message)

    server.grid.tamper = refuse
    monkeypatch.setattr(server.clients, "wait_for", pytest.fail)
    with pytest.raises(rounds.RunFailed, match="Round 1 failed 1 times"):
        server.train_round(1, START)
    with pytest.raises(
        rounds.RunFailed, match="All 4 clients refused: it has 3 records"
    ):
        server.train_round(2, START)


def test_the_base_may_take_longer_to_load_than_a_round(serve, monkeypatch):
    """A clock that goes on a minute with each look at it."""
    ticks = iter(range(0, 10**6, 60))
    server = serve(train__round_timeout=4.0)
    pull = server.grid.pull_messages
    asked = []

    def slow(ids):
        asked.append(1)
        return pull(ids) if len(asked) > 5 else []

    server.grid.pull_messages = slow
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    monkeypatch.setattr(STOP, "wait", lambda seconds: None)
    state = server.initial_adapter()
    assert all(torch.equal(state[name], START[name]) for name in START)
    asked.clear()
    with pytest.raises(
        rounds.RunFailed, match=r"no reply within train\.round_timeout=4"
    ):
        server.train_round(1, START)


# --- which strategies there are --------------------------------------------------------------------


@pytest.mark.slow
def test_every_strategy_of_flowers_works_or_is_refused_in_a_line():
    import flwr.serverapp.strategy as flower

    ours = {
        node["_target_"].rpartition(".")[2]: node
        for path in (PROJECT / "conf/strategy").glob("*.yaml")
        if (node := compose(f"experiment=quickstart strategy={path.stem}").strategy)
        and node["_target_"].startswith("flwr.")
    }
    readme = (PROJECT / "README.md").read_text()
    [row] = [line for line in readme.splitlines() if line.startswith("| `strategy=`")]
    named = set(re.findall(r"`(\w+)`", row.split("|")[2]))
    assert named == {path.stem for path in (PROJECT / "conf/strategy").glob("*.yaml")}
    for name in flower.__all__:
        if name in ours:
            aggregate.rehearse(dict(ours[name]), 8)
            continue
        node = {"_target_": f"flwr.serverapp.strategy.{name}"}
        with pytest.raises(utils.UserError) as refused:
            aggregate.rehearse(node, 8)
        told = str(refused.value)
        assert name in told
        assert len(told.splitlines()) == 1
    assert len(ours) == 12


def test_a_text_becomes_one_line():
    assert utils.one_line(" a\n\tb\x1b[2J\u202e c ") == "a b [2J c"
    assert utils.one_line("x" * 201) == "x" * 197 + "..."
    assert len(utils.one_line(LONG * 50)) == 200
    assert utils.one_line("\x00\r\n") == ""
    assert utils.one_line("größer als 10 %") == "größer als 10 %"
