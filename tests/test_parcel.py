"""pytest tests/test_parcel.py: a message's arrays in one, as they go between machines."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from methods import parcel

TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


def some() -> ArrayRecord:
    values = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b:scale": np.array(0.5, np.float16),
        "c": np.zeros((0, 4), np.int8),
    }
    return ArrayRecord({name: Array(value) for name, value in values.items()})


def forged(contents: object, data: bytes) -> ArrayRecord:
    listed = json.dumps(contents).encode()
    whole = len(listed).to_bytes(8, "little") + listed + data
    return raw(whole)


def raw(data: bytes) -> ArrayRecord:
    array = Array("uint8", (len(data),), parcel.PARCEL, data)
    return ArrayRecord({parcel.PARCEL: array})


def test_what_is_packed_comes_out_as_it_was():
    assert parcel.unpack(parcel.pack(some())) == some()
    assert [*parcel.unpack(parcel.pack(some()))] == [*some()]
    assert parcel.unpack(parcel.pack(ArrayRecord())) == ArrayRecord()


def test_what_is_no_parcel_is_left_as_it_is():
    assert parcel.unpack(some()) == some()
    named = ArrayRecord({parcel.PARCEL: Array(np.ones(3))})
    assert parcel.unpack(named) == named


@pytest.mark.parametrize(
    "broken",
    [
        raw(b""),
        raw((2**40).to_bytes(8, "little") + b"[]"),
        raw((3).to_bytes(8, "little") + b"[]"),
        forged([["a", "int8", [3], "numpy.ndarray", 4]], b"abc"),
        forged([["a", "int8", [3], "numpy.ndarray", 2]], b"abc"),
        forged([["a", "int8", [3], "numpy.ndarray", -3]], b"abc"),
        forged([["a", "int8", [-3], "numpy.ndarray", 3]], b"abc"),
        forged([["a", "int8", 3, "numpy.ndarray", 3]], b"abc"),
        forged([[7, "int8", [3], "numpy.ndarray", 3]], b"abc"),
        forged([["a", "int8", [0], "numpy.ndarray", 0]] * 2, b""),
        forged([[f"{i}", "int8", [0], "", 0] for i in range(50_000)], b""),
        forged({"a": 1}, b""),
        forged("abc", b""),
    ],
)
def test_a_forged_parcel_is_refused(broken):
    with pytest.raises(ValueError, match=r"parcel|validation error"):
        parcel.unpack(broken)


@given(st.binary(max_size=64))
def test_whatever_the_bytes_it_is_a_value_error_or_arrays(data):
    try:
        found = parcel.unpack(raw(data))
    except ValueError:
        return
    assert sum(len(array.data) for array in found.values()) <= len(data)


def test_each_message_holds_two_objects_for_all_its_arrays():
    """Flower's own count: message, its content, and two for each array."""

    def objects(arrays: ArrayRecord) -> int:
        message = Message(RecordDict({"arrays": arrays}), 1, "train")
        return len(get_all_nested_objects(message))

    assert objects(ArrayRecord()) == 3
    many = ArrayRecord({str(i): Array(np.full(9, i)) for i in range(50)})
    assert objects(many) == 3 + 2 * 50
    assert objects(parcel.pack(many)) == 3 + 2


class Way:
    """A grid by which messages reach one client app, and its replies come back."""

    def __init__(self, app, tamper):
        self.app, self.tamper, self.replies = app, tamper, []

    def get_node_ids(self):
        return [1, 2]

    def push_messages(self, messages):
        shared = {id(message.content["arrays"]) for message in messages}
        assert len(shared) == 1  # packed once, however many get it
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = str(number)
            assert [*message.content["arrays"]] == [parcel.PARCEL]
            self.replies.append(parcel.by_parcel(message, None, self.app))
            self.tamper(number, self.replies[-1])
        return ["0", "1"]

    def pull_messages(self, message_ids):
        return self.replies


def test_who_is_asked_without_answers_without():
    def app(message, context):
        return Message(RecordDict({"arrays": some()}), reply_to=message)

    asked = Message(RecordDict({"arrays": some()}), 1, "train")
    assert parcel.by_parcel(asked, None, app).content["arrays"] == some()


def test_app_and_server_see_what_they_would_without():
    def app(message, context):
        assert message.content["config"]["number"] in (0, 1)
        assert message.content["arrays"] == some()
        return Message(RecordDict({"arrays": some()}), reply_to=message)

    def tamper(number, reply):
        assert [*reply.content["arrays"]] == [parcel.PARCEL]
        if number:
            reply.content["arrays"] = raw(b"forged")

    grid = parcel.Parcels(Way(app, tamper))
    assert grid.get_node_ids() == [1, 2]
    arrays = some()
    contents = [
        RecordDict({"arrays": arrays, "config": ConfigRecord({"number": i})})
        for i in (0, 1)
    ]
    grid.push_messages([Message(content, 1, "train") for content in contents])
    # One that cannot be read costs no other: it holds none of the tensors asked for.
    whole, broken = grid.pull_messages({"0", "1"})
    assert whole.content["arrays"] == some()
    assert not broken.content["arrays"].keys() & some().keys()
