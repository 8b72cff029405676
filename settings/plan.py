"""What a run will take, before it takes it: `python main.py dry_run=true`.

From the configuration and the base's `config.json`; no weights are loaded. What the clients
hold comes with it where the data is at hand.
"""

import math
import os
from pathlib import Path

import torch

import dataset
import model
from compute.vram import allocated, at_peak, occupied
from methods import aggregate, personal
from server.cohort import cohort_size
from server.journal import quantised_on_cpu
from server.rounds import due
from settings import heterogeneity
from settings.compose import estimate
from utils import Settings, UserError, learning_rate

Rows = list[tuple[str, str]]  # label and value

VALUE_BYTES = {"float32": 4, "float16": 2, "int8": 1}

PROCESS = (
    800 * 2**20
)  # bytes of a worker without model and examples (the quickstart's: 913)

SCALE_BYTES = 4  # int8: a float32 for each row


def show(cfg: Settings, folder: Path | None = None) -> str:
    """The plan as text, one line a row, the values one below the other.

    With a `folder`, also how unequal the clients are, and `clients.png` in there.
    """
    rows = plan(cfg) + (clients(cfg, folder) if folder else [])
    widest = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:{widest}}  {value}" for label, value in rows)


def plan(cfg: Settings) -> Rows:
    """Parameters, work, bytes on the wire and VRAM of the resolved configuration."""
    frame = model.skeleton(cfg.model, cfg.peft)
    return [
        *_parameters(frame),
        *_work(cfg),
        *_traffic(cfg, frame),
        *_memory(cfg, frame),
    ]


def clients(cfg: Settings, folder: Path) -> Rows:
    """How unequal the clients are, and a plot of it in `folder`; or why that is not known."""
    try:
        data = heterogeneity.describe(cfg)
    except UserError as error:
        return [("clients", f"not shown: {error}")]
    picture = folder / "clients.png"
    heterogeneity.plot(data, picture)
    summary = data["summary"]
    least, median, most = summary["records"]
    mix = "not known: dataset.label names no column (partitioner=clusters finds one)"
    if data["category"]:
        mix = (
            f"{summary['mix_distance']:.2f} from the pooled mix by {data['category']} "
            f"(0: equal, 1: apart; by chance {summary['mix_by_chance']:.2f})"
        )
    tokens = f"not known: no tokenizer in {cfg.model.name}"
    if summary["median_tokens"]:
        medians, highs = (
            f"{low:.0f} to {high:.0f}"
            for low, high in (summary["median_tokens"], summary["p90_tokens"])
        )
        tokens = (
            f"{medians} in a client's median, {highs} in its 90th percentile "
            f"(of up to {data['sampled']} records; cut at {cfg.train.seq_length})"
        )
    return [
        (
            "clients' records",
            f"{least} to {most}, median {median:g}, "
            f"Gini {summary['gini']:.2f} (0: equal, 1: apart)",
        ),
        ("category mix", mix),
        ("tokens an example", tokens),
        ("plotted in", str(picture)),
    ]


def wire_bytes(frame: torch.nn.Module, dtype: str) -> int:
    """Bytes of one adapter on the wire in float32, float16 or int8.

    The values alone, and int8's scales: one for each row, a 1-D tensor being one row.
    Each tensor's name and header come on top, some hundred bytes.
    """
    total = 0
    for parameter in _trained(frame):
        total += VALUE_BYTES[dtype] * parameter.numel()
        if dtype == "int8":
            total += SCALE_BYTES * (parameter.shape[0] if parameter.ndim > 1 else 1)
    return total


def steps_per_client(cfg: Settings) -> int:
    """Optimizer steps of one client in one round; of the one with most data, by epochs."""
    arguments = cfg.train.training_arguments
    if arguments.max_steps > 0:
        return arguments.max_steps
    records = max(len(dataset.load_partition(cfg, i)) for i in range(cfg.num_clients))
    if cfg.strategy.fraction_evaluate:
        records -= max(1, math.floor(cfg.evaluate.holdout * records))
    examples = math.ceil(arguments.num_train_epochs * records)
    each = arguments.per_device_train_batch_size * cfg.launch.processes
    batches = math.ceil(examples / each)
    return math.ceil(batches / arguments.gradient_accumulation_steps)


def _trained(frame: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in frame.parameters() if p.requires_grad]


def _parameters(frame: torch.nn.Module) -> Rows:
    total = sum(p.numel() for p in frame.parameters())
    trained = sum(p.numel() for p in _trained(frame))
    return [
        ("parameters", _count(total)),
        ("trained", f"{_count(trained)} ({trained / total:.2%})"),
    ]


def _work(cfg: Settings) -> Rows:
    arguments = cfg.train.training_arguments
    size = arguments.per_device_train_batch_size * cfg.launch.processes
    parts = arguments.gradient_accumulation_steps
    rounds, clients = cfg.num_rounds, _cohort(cfg, "fraction_fit")
    # Of the adapter that all share, and of the client's own.
    steps = steps_per_client(cfg) * personal.build(cfg.personal).trainings
    most = "" if arguments.max_steps > 0 else "at most "
    tokens = clients * steps * size * parts * cfg.train.seq_length
    return [
        ("clients a round", f"{clients} of {cfg.num_clients}"),
        (
            "steps a round",
            f"{most}{clients * steps:,} ({steps:,} a client, {size} x {parts} examples each)",
        ),
        *_weight(cfg),
        ("learning rate", _rate(cfg)),
        ("tokens a round", f"at most {tokens:,}"),
        (
            f"steps in {rounds} rounds",
            f"{most}{rounds * clients * steps:,} steps, at most {_count(rounds * tokens)} "
            "tokens",
        ),
    ]


def _weight(cfg: Settings) -> Rows:
    """What clients weigh in the mean, where there is one of several."""
    if cfg.baseline or not aggregate.build(cfg.strategy).linear:
        return []
    by_steps = cfg.train.training_arguments.max_steps > 0
    if cfg.strategy.get("weighted_by", "examples") == "records":
        weight = "by its records"
    elif by_steps:
        weight = "the same for all, however few its records: all take as many steps"
    else:
        weight = "by its records, because it goes over all of them"
    return [("a client's weight", weight)]


def _rate(cfg: Settings) -> str:
    first, last = (learning_rate(cfg, n) for n in (1, cfg.num_rounds))
    rounds = f"{cfg.num_rounds} rounds"
    if first == last:
        return f"{first:.3g} in {rounds}"
    return f"{first:.3g} -> {last:.3g} over {rounds}"


def _traffic(cfg: Settings, frame: torch.nn.Module) -> Rows:
    dtype, rounds = cfg.comm.dtype, cfg.num_rounds
    adapter = wire_bytes(frame, dtype)
    way = _cohort(cfg, "fraction_fit") * adapter
    # The clients of the first round make the first adapter and send it in float32.
    first = _cohort(cfg, "fraction_fit") * wire_bytes(frame, "float32")
    rows = [
        ("adapter on the wire", f"{_bytes(adapter)} ({dtype})"),
        ("bytes a round", f"{_bytes(way)} down, {_bytes(way)} up"),
        (
            f"bytes in {rounds} rounds",
            f"{_bytes(2 * rounds * way)} both ways, and {_bytes(first)} for the first adapter",
        ),
    ]
    if cfg.strategy.fraction_evaluate:
        down = _cohort(cfg, "fraction_evaluate") * adapter
        times = 1 + sum(
            due(cfg, n, default=1) for n in range(1, rounds + 1)
        )  # the base
        text = f"{_bytes(down)} down each time, {_bytes(times * down)} in all"
        rows.append(("evaluation", text))
    return rows


def _memory(cfg: Settings, frame: torch.nn.Module) -> Rows:
    """What a client's step takes of a GPU, or of memory where it has none, and how many fit."""
    checkpointing = cfg.model.gradient_checkpointing
    rows = [
        (
            "checkpointing",
            "on: activations are computed twice instead of kept"
            if checkpointing
            else "off: activations are kept",
        )
    ]
    if not cfg.client_resources.num_gpus:
        return rows + _ram(cfg, frame)
    return rows + _vram(cfg, frame)


def _ram(cfg: Settings, frame: torch.nn.Module) -> Rows:
    # A CPU computes on a 4-bit base unpacked once.
    bits = cfg.model.quantization
    settings = cfg.model | {"quantization": None if bits == 4 else bits}
    terms = estimate(cfg | {"model": settings}, frame)
    cores, each = os.cpu_count() or 1, cfg.client_resources.num_cpus
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    busy = min(max(1, int(cores / each)), _cohort(cfg, "fraction_fit"))
    use = f"{busy} side by side, {int(each)} of {cores} cores each"
    if (free := cores // busy) > each:
        use += f"; client_resources.num_cpus={free} would use them all"
    if isinstance(terms, str):
        rows = [("memory a client", f"not known: {terms}")]
        fits = ""
    else:
        del terms["CUDA context"]
        terms["Python and its libraries"] = PROCESS
        total = sum(at_peak(terms).values())
        rows = [("memory a client", f"{_bytes(total)} (estimate)")]
        rows += [(f"  {name}", _bytes(size)) for name, size in at_peak(terms).items()]
        fits = f"fits {memory // total} clients; "
    rows.append(("this machine", f"{_bytes(memory)}: {fits}runs {use}"))
    if note := quantised_on_cpu(cfg):
        rows.append(("quantisation", note))
    return rows


def _vram(cfg: Settings, frame: torch.nn.Module) -> Rows:
    terms = estimate(cfg, frame)
    if isinstance(terms, str):
        return [("VRAM a client", f"not known: {terms}")]
    rows = [
        (
            "VRAM a client",
            f"{_bytes(occupied(terms))} (estimate): {_bytes(allocated(terms))} allocated, "
            f"{_bytes(terms['CUDA context'])} CUDA context",
        ),
        *((f"  {name}", _bytes(size)) for name, size in at_peak(terms).items()),
    ]
    share = cfg.client_resources.num_gpus
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        fit = gpu.total_memory // occupied(terms)
        value = f"fits {fit} clients"
        if share:
            started = max(1, int(1 / share + 1e-9))
            value += f"; client_resources.num_gpus={share:g} starts {started}"
            value += " (too many)" if started > fit else ""
        rows.append(
            (f"GPU {index}", f"{gpu.name}, {_bytes(gpu.total_memory)}: {value}")
        )
    if not torch.cuda.device_count():
        rows.append(("GPUs", "none visible here"))
    return rows


def _cohort(cfg: Settings, fraction: str) -> int:
    return cohort_size(cfg.num_clients, cfg.strategy[fraction])


def _count(number: int) -> str:
    """A number of things to four digits: 16.78M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def _bytes(number: int) -> str:
    """A number of bytes in binary units: 64.0 MiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
