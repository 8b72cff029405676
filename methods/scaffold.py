"""A client's half of SCAFFOLD (arXiv 1910.06378): it corrects the gradients of its steps.

By c - c_i: what all clients' gradients are like, less what its own are. c_i is the mean of
the gradients of its last round, before their correction. For plain SGD that is the paper's
option II, c_i - c + (x - y) / (K eta), with which other optimizers would make of c_i what
their own steps are like; so corrected, they get what SGD gets. The theorems are of SGD.

The server's half is `methods.aggregate.Scaffold`. On the wire c goes down beside the
adapter, and up comes the change of c_i.
"""

from typing import Any

from methods.base import State
from methods.wire import mismatch, misshapen, pack, unpack
from utils import Refusal, UserError

GRADIENT = "gradient/"  # before the name of what was trained: its mean gradient


def correction(control: State, adapter: State, kept: Any) -> State:
    """c - c_i of each tensor that has one, for the `control` that came with `adapter`.

    Raises `Refusal` for what does not fit the adapter, and `UserError` for values that are
    not finite.
    """
    expected = {name: adapter[name] for name in control.keys() & adapter.keys()}
    if fault := misshapen(control, expected):
        raise Refusal(f"the control variates do not fit the adapter: {fault}")
    if fault := mismatch(control, expected):
        raise UserError(f"the control variates that came in are broken: {fault}")
    own = kept.load("control") or {}
    return {k: c - own[k] if k in own else c for k, c in control.items()}


def change(trained: State, kept: Any, dtype: str) -> tuple[State, State]:
    """The adapter of what training gave, and what is sent of the gradients that are with it.

    What is kept is c_i as the server knows it then, so that c stays the mean of all c_i,
    whatever `dtype` rounds away.
    """
    adapter = {k: v for k, v in trained.items() if not k.startswith(GRADIENT)}
    if len(adapter) == len(trained):
        return adapter, {}
    own = kept.load("control") or {}
    new = {k: trained[GRADIENT + k] for k in adapter if GRADIENT + k in trained}
    packed, _ = pack({k: v - own[k] if k in own else v for k, v in new.items()}, dtype)
    told = unpack(packed)
    kept.save(
        "control", own | {k: own[k] + v if k in own else v for k, v in told.items()}
    )
    return adapter, packed
