"""Whole steps of a client's Trainer or of a loop: timed, their waits counted, and profiled."""

import json
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from assets.testbed.vram import wait_for

# What a GPU's kernel, or an operator on a CPU, is for: the first that its name matches.
KINDS = {
    "copies to and from the host": r"Memcpy (HtoD|DtoH)",
    "attention": r"flash|fmha|attention|sdpa",
    "dequantising": r"[qQ]uant",
    "matrix products": r"gemm|gemv|nvjet|cutlass|splitK|::(mm|addmm|bmm|baddbmm|linear)\b",
    "optimizer, clipping": r"multi_tensor|adam|_foreach|lpnorm|linalg_vector_norm",
    "softmax, loss": r"softmax|nll|cross_entropy",
    "dropout": r"dropout|bernoulli|random_|distribution",
    "copies, casts": r"Memcpy|Memset|copy|CatArray|cat\b|fill|index|gather|embedding",
    "elementwise, norms": r"elementwise|reduce|norm|::(mul|add|sub|div|neg|silu|rsqrt|pow|mean|sum)",
}


class Span:
    """Opens contexts before step `first` (of 0, 1, ...) and closes them before step `last`."""

    def __init__(
        self,
        first: int,
        last: int,
        *opened: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.first, self.last, self.opened = first, last, opened
        self.begun = 0
        self.stack = ExitStack()

    def step(self) -> None:
        """To be called before every step."""
        if self.begun == self.first:
            for one in self.opened:
                self.stack.enter_context(one())
        if self.begun == self.last:
            self.stack.close()
        self.begun += 1


@contextmanager
def before_steps(trainer: type, call: Callable[[], None]) -> Iterator[None]:
    """Have `call` called before each step of all Trainers of this class."""
    own = trainer.training_step

    def training_step(self: Any, *given: Any, **named: Any) -> torch.Tensor:
        call()
        return own(self, *given, **named)

    before = vars(trainer).get("training_step")
    trainer.training_step = training_step
    try:
        yield
    finally:
        if before:
            trainer.training_step = before
        else:  # it was inherited
            del trainer.training_step


@contextmanager
def timed(device: torch.device, seconds: list[float]) -> Iterator[None]:
    wait_for(device)
    began = time.perf_counter()
    yield
    wait_for(device)
    seconds.append(time.perf_counter() - began)


@contextmanager
def waits(found: Counter[str]) -> Iterator[None]:
    """Count, by place in the code, where the host waits for the GPU."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for one in told:
        if "called a synchronizing" in str(one.message):
            found[f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}"] += 1


# Stream or thread, name, beginning and length in microseconds, and what else is told (the bytes
# of a copy).
Event = tuple[Any, str, float, float, dict[str, Any]]


@contextmanager
def profiled(device: torch.device, events: list[Event]) -> Iterator[None]:
    """The GPU's kernels and copies; on a CPU the operators, each without those inside of it."""
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        yield
        wait_for(device)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(path := Path(folder) / "trace.json"))
        events += read_trace(json.loads(path.read_text()), cuda)


def read_trace(trace: dict[str, Any], cuda: bool) -> list[Event]:
    """The events of a Chrome trace (Kineto's) that are work of the device."""
    wanted = {"kernel", "gpu_memcpy", "gpu_memset"} if cuda else {"cpu_op"}
    return [
        (one["tid"], one["name"], one["ts"], one["dur"], one.get("args", {}))
        for one in trace["traceEvents"]
        if one.get("ph") == "X" and one.get("cat") in wanted
    ]


def by_kind(events: list[Event]) -> dict[str, float]:
    """Microseconds by `KINDS`, the longest first; the rest as "other".

    Of an event that has others inside of it, in its own thread, what they leave of it.
    """
    own: list[float] = []
    around: dict[Any, list[tuple[float, int]]] = {}  # by thread: ends and places
    ordered = sorted(events, key=lambda one: (str(one[0]), one[2], -one[3]))
    for thread, _, began, length, _ in ordered:
        open_ = around.setdefault(thread, [])
        while open_ and open_[-1][0] <= began:
            open_.pop()
        if open_:
            own[open_[-1][1]] -= length
        open_.append((began + length, len(own)))
        own.append(length)
    total: Counter[str] = Counter()
    for (_, name, *_), length in zip(ordered, own, strict=True):
        kinds = (kind for kind, like in KINDS.items() if re.search(like, name))
        total[next(kinds, "other")] += length
    return dict(total.most_common())


def busy(events: list[Event]) -> float:
    """Microseconds in which anything was at work: of two side by side one."""
    total, until = 0.0, float("-inf")
    for _, _, began, length, _ in sorted(events, key=lambda one: one[2]):
        end = began + length
        total += max(0.0, end - max(began, until))
        until = max(until, end)
    return total
