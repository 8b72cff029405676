"""A round's updates by secure aggregation: the exchanges around the one in which clients train.

What is computed is in `methods.secure`; here is who is asked, and what of the answers is fit.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from flwr.app import ConfigRecord, MessageType, RecordDict

from methods import wire
from methods.base import Unusable
from methods.secure import Total, read_keys
from server.exchange import Exchange, arrays_of

Found = TypeVar("Found")

AGREE = f"{MessageType.QUERY}.agree"  # on keys, shares of them, and whose part counts


class Summed:
    """An `Exchange` of which the sum of all replies is known, and none of them.

    `train`: the exchange with those that are to train; it reads a reply as the masked vector
    and what else is known of the client. `most`: the largest weight of a client. `finish`
    makes of the sum (a vector, of whom, of how many that sent keys, bytes that came) what `replies` then yields once. Where there is no sum, `fault` says why, and `out`
    holds the nodes at fault.
    """

    def __init__(
        self,
        train: Exchange,
        most: int,
        finish: Callable[[np.ndarray, list[int], int, int], Found],
    ) -> None:
        self.train, self.most, self.finish = train, most, finish
        self.nodes, self.singly = train.nodes, train.singly
        self.failures: list[dict[str, Any]] = []
        self.refused: dict[int, str] = {}
        self.bytes_down = self.bytes_up = 0
        self.fault = ""
        self.out: set[int] = set()

    def replies(self) -> Iterator[Found]:
        try:
            found = self._summed()
        except Unusable as error:
            self.fault = str(error)
        else:
            yield found

    def _summed(self) -> Found:
        keys: dict[int, bytes] = {}

        def read(number: int, keys_: bytes) -> None:
            if keys_ in keys.values():
                raise Unusable("its keys are another client's")
            keys[number] = read_keys(keys_)

        self._agree("keys", [*self.nodes.values()], lambda number: {}, read)
        total = Total(keys)
        told = {"keys": total.keys, "numbers": total.numbers}
        self._agree("shares", total.numbers, lambda number: told, total.read_sealed)
        total.check()
        self._train(total)
        total.check()
        told = {"survivors": total.added}
        who = [total.numbers[i] for i in total.added]
        self._agree("reveal", who, lambda number: told, total.read_opened)
        try:
            vector = total.unmasked()
        except Unusable:
            why = "the shares of its keys do not make them"
            self.failures += [{"partition": i, "cause": why} for i in total.lost]
            self.out = {*self._of(total.lost)}
            raise
        return self.finish(vector, who, len(total.keys), self.bytes_up)

    def _of(self, numbers: list[int]) -> dict[int, int]:
        """The nodes of these numbers, each with its own."""
        return {
            node: number for node, number in self.nodes.items() if number in numbers
        }

    def _agree(
        self,
        step: str,
        numbers: list[int],
        write: Callable[[int], dict[str, Any]],
        read: Callable[[int, Any], None],
    ) -> None:
        """Ask these clients for a step of `methods.secure.Member`, and `read` what each of
        them answers."""

        def content(number: int) -> RecordDict:
            asked = ConfigRecord({"step": step, **write(number)})
            self.bytes_down += weight(asked)
            config = self.train.write(number)["config"]
            return RecordDict({"config": config, "secure": asked})

        def use(number: int, content: RecordDict) -> None:
            answer = content.config_records["secure"]
            read(number, answer.get("answer"))
            self.bytes_up += weight(answer)

        self._hold(AGREE, numbers, content, use)

    def _train(self, total: Total) -> None:
        def content(number: int) -> RecordDict:
            sealed = total.sealed_for(number)
            asked = {"members": total.members, "sealed": sealed, "most": self.most}
            content = self.train.write(number)
            content["secure"] = ConfigRecord(asked)
            self.bytes_down += weight(content["secure"])
            return content

        def use(number: int, content: RecordDict) -> None:
            vector, client = self.train.read(number, content)
            total.add(number, vector)
            self.bytes_up += client["bytes_up"]

        numbers = [total.numbers[i] for i in total.members]
        self._hold(self.train.kind, numbers, content, use)

    def _hold(
        self,
        kind: str,
        numbers: list[int],
        write: Callable[[int], RecordDict],
        read: Callable[[int, RecordDict], None],
    ) -> None:
        exchange = Exchange(
            self.train.grid,
            kind,
            self._of(numbers),
            write,
            read,
            self.train.timeout,
            self.singly,
        )
        for _ in exchange.replies():
            pass
        self.failures += exchange.failures
        self.refused |= exchange.refused
        self.singly = exchange.singly
        self.bytes_down += exchange.bytes_down


def read_masked(content: RecordDict, size: int) -> tuple[np.ndarray, int]:
    """A reply's masked vector, and its size in bytes. Raises `Unusable`."""
    arrays = arrays_of(content)
    if len(arrays) != 1 or "masked" not in arrays:
        raise Unusable("it holds more or less than one masked vector")
    vector = wire.values("masked", arrays["masked"], np.dtype("uint64"), (size,))
    return vector, len(arrays["masked"].data)


def weight(record: ConfigRecord) -> int:
    """Bytes of the keys and shares in it."""
    lists = [value if isinstance(value, list) else [value] for value in record.values()]
    return sum(len(one) for each in lists for one in each if isinstance(one, bytes))
