"""A message's arrays in one, for the way between machines.

Flower carries an array as two objects, and asks for each of them by itself between any two of
ServerApp, SuperLink, SuperNode and ClientApp: the 96 tensors of LoRA on a base of 24 layers
are some 200 requests at each of these. In a parcel they are two.
"""

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Annotated

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid
from pydantic import Field, TypeAdapter

PARCEL = "parcel"  # its name, and how it is serialised; no parameter is called that

PREFIX = 8  # bytes, of a number: how many hold the list of what is in it

LIST = 2**20  # bytes at most: nine thousand tensors; Flower takes 20 us for each

Count = Annotated[int, Field(ge=0)]

# Of each array its name, type, shape, how it is serialised, and in how many bytes.
CONTENTS = TypeAdapter(list[tuple[str, str, tuple[Count, ...], str, Count]])


def pack(arrays: ArrayRecord) -> ArrayRecord:
    """The same arrays in one."""
    each = [*arrays.values()]
    told = [(a.dtype, a.shape, a.stype, len(a.data)) for a in each]
    named = [(name, *one) for name, one in zip(arrays, told, strict=True)]
    contents = json.dumps(named).encode()
    size = len(contents).to_bytes(PREFIX, "little")
    data = b"".join([size, contents, *(array.data for array in each)])
    return ArrayRecord({PARCEL: Array("uint8", (len(data),), PARCEL, data)})


def packed(arrays: ArrayRecord) -> bool:
    return [*arrays] == [PARCEL] and arrays[PARCEL].stype == PARCEL


def unpack(arrays: ArrayRecord) -> ArrayRecord:
    """The arrays that are in one; any others as they are.

    A parcel is foreign: raises `ValueError` unless its list accounts for each of its bytes.
    """
    if not packed(arrays):
        return arrays
    data = arrays[PARCEL].data
    size = int.from_bytes(data[:PREFIX], "little")
    at = PREFIX + size
    if not size <= min(LIST, len(data) - PREFIX):
        raise ValueError("a parcel's list is longer than it may be")
    found: dict[str, Array] = {}
    listed = CONTENTS.validate_json(data[PREFIX:at])
    for name, dtype, shape, stype, length in listed:
        found[name] = Array(dtype, shape, stype, data[at : at + length])
        at += length
    if at != len(data) or len(found) != len(listed):
        raise ValueError("a parcel does not hold what it lists")
    return ArrayRecord(found)


def change(message: Message, how: Callable[[ArrayRecord], ArrayRecord]) -> None:
    """Pack or unpack all arrays of a message, if it has any."""
    if message.has_content():
        records = message.content.array_records
        rest = {k: v for k, v in message.content.items() if k not in records}
        made = {name: how(arrays) for name, arrays in records.items()}
        message.content = RecordDict({**rest, **made})


def by_parcel(
    message: Message, context: Context, answer: Callable[[Message, Context], Message]
) -> Message:
    """Flower's mod for a client: who is asked by parcel answers by parcel."""
    asked = any(map(packed, message.content.array_records.values()))
    change(message, unpack)
    reply = answer(message, context)
    if asked:
        change(reply, pack)
    return reply


class Parcels:
    """A server's grid by which arrays go, and come, in parcels."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = [*messages]
        contents = [message.content.array_records.values() for message in messages]
        each = {id(arrays): arrays for found in contents for arrays in found}
        # Packed once, however many get it.
        made = {key: pack(arrays) for key, arrays in each.items()}
        for message in messages:
            change(message, lambda arrays: made[id(arrays)])
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message in self.grid.pull_messages(message_ids):
            with suppress(ValueError):  # it then lacks the tensors that it should hold
                change(message, unpack)
            yield message
