"""What a run will take, before it takes it: `python main.py dry_run=true`.

From the configuration and the base's `config.json`; no weights are loaded. What the clients
hold comes with it where the data is at hand.
"""

import itertools
import math
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import torch
from peft import PeftModel

import dataset
import model
from compute.vram import allocated, at_peak, occupied
from methods import aggregate, deflate, personal, privacy, sharing, sparse, steps, wire
from server.cohort import cohort_size
from server.first import seeded
from server.journal import quantised_on_cpu
from server.rounds import due
from settings import heterogeneity
from settings.compose import estimate
from settings.preflight import loudness
from utils import Settings, UserError, learning_rate

Rows = list[tuple[str, str]]  # label and value

PROCESS = (
    800 * 2**20
)  # bytes of a worker without model and examples (the quickstart's: 913)


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
        *_ranks(cfg),
        *_work(cfg, frame),
        *_traffic(cfg, frame),
        *_privacy(cfg, frame),
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


def wire_bytes(
    frame: torch.nn.Module, dtype: str, names: Collection[str] | None = None
) -> int:
    """Bytes on the wire in float32, float16 or int8 of one adapter, or of those `names`.

    The values alone, and int8's scales. Each tensor's name and header come on top, some
    hundred bytes.
    """
    return _size(wire.layout(_sent(frame, names), dtype))


def _sent(
    frame: torch.nn.Module, names: Collection[str] | None
) -> dict[str, torch.nn.Parameter]:
    trained = _trained(frame).items()
    return {name: p for name, p in trained if names is None or name in names}


def _size(layout: wire.Layout) -> int:
    return sum(deflate.size_of(*each) for each in layout.values())


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


def _trained(frame: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in frame.named_parameters() if p.requires_grad}


def _parameters(frame: torch.nn.Module) -> Rows:
    total = sum(p.numel() for p in frame.parameters())
    trained = sum(p.numel() for p in _trained(frame).values())
    return [
        ("parameters", _count(total)),
        ("trained", f"{_count(trained)} ({trained / total:.2%})"),
    ]


def _by_rank(cfg: Settings) -> list[tuple[int, int, torch.nn.Module]]:
    """Each rank that clients have, how many have it, and a frame of it."""
    made = aggregate.build(cfg.strategy)
    counts = Counter(made.rank(i) for i in range(cfg.num_clients))
    return [
        (rank, count, model.skeleton(cfg.model, model.capped(cfg.peft, rank)))
        for rank, count in sorted(counts.items())
    ]


def _ranks(cfg: Settings) -> Rows:
    """What clients of different ranks send and hold, where they have any."""
    if not cfg.strategy.get("ranks"):
        return []
    rows = []
    for rank, count, frame in _by_rank(cfg):
        terms = (_gpu if cfg.client_resources.num_gpus else _cpu)(cfg, frame)
        memory = terms if isinstance(terms, str) else _bytes(sum(terms.values()))
        wire = _bytes(wire_bytes(frame, cfg.comm.dtype))
        told = f"{count} clients, {wire} on the wire, {memory} of memory (estimate)"
        rows.append((f"rank {rank}", told))
    return rows


def _cpu(cfg: Settings, frame: torch.nn.Module) -> dict[str, int] | str:
    """What a client takes of memory, by what takes it, or why that is not known."""
    # A CPU computes on a 4-bit base unpacked once.
    bits = cfg.model.quantization
    settings = cfg.model | {"quantization": None if bits == 4 else bits}
    terms = estimate(cfg | {"model": settings}, frame)
    if isinstance(terms, str):
        return terms
    del terms["CUDA context"]
    return at_peak(terms | {"Python and its libraries": PROCESS})


def _gpu(cfg: Settings, frame: torch.nn.Module) -> dict[str, int] | str:
    """Likewise, of a GPU."""
    terms = estimate(cfg, frame)
    return terms if isinstance(terms, str) else {"VRAM": occupied(terms)}


def _work(cfg: Settings, frame: PeftModel) -> Rows:
    arguments = cfg.train.training_arguments
    size = arguments.per_device_train_batch_size * cfg.launch.processes
    parts = arguments.gradient_accumulation_steps
    rounds, clients = cfg.num_rounds, _cohort(cfg, "fraction_fit")
    # Of the adapter that all share, and of the client's own.
    once, method = steps_per_client(cfg), personal.build(cfg.personal)
    steps = once * method.trainings
    most = "" if arguments.max_steps > 0 else "at most "
    tokens = clients * steps * size * parts * cfg.train.seq_length
    last = f"{most}{once * method.rounds:,} by each client, of its own adapter"
    after = [("steps after the last round", last)] if method.rounds else []
    return [
        ("clients a round", f"{clients} of {cfg.num_clients}"),
        ("a client trains in", _turns(cfg)),
        (
            "steps a round",
            f"{most}{clients * steps:,} ({steps:,} a client, {size} x {parts} examples each)",
        ),
        *_mean(cfg, frame),
        ("learning rate", _rate(cfg)),
        ("tokens a round", f"at most {tokens:,}"),
        (
            f"steps in {rounds} rounds",
            f"{most}{rounds * clients * steps:,} steps, at most {_count(rounds * tokens)} "
            "tokens",
        ),
        *after,
    ]


def _turns(cfg: Settings) -> str:
    rounds, clients = cfg.num_rounds, cfg.num_clients
    turns = rounds * _cohort(cfg, "fraction_fit") / clients
    if cfg.strategy.sampling != "epoch":
        return f"{turns:.3g} of {rounds} rounds on average, as it is drawn"
    few, most = math.floor(turns), math.ceil(turns)
    times = f"{few}" if few == most else f"{few} or {most}"
    return f"{times} of {rounds} rounds: everybody once before anybody twice"


def _mean(cfg: Settings, frame: PeftModel) -> Rows:
    """What clients weigh in the mean, where there is one of several, and if it is exact."""
    if cfg.baseline or not aggregate.build(cfg.strategy).linear:
        return []
    by_steps = cfg.train.training_arguments.max_steps > 0
    if cfg.strategy.get("weighted_by", "examples") == "records":
        weight = "by its records"
    elif by_steps:
        weight = "the same for all, however few its records: all take as many steps"
    else:
        weight = "by its records, because it goes over all of them"
    part = sharing.build(cfg.sharing)
    names = [n for n, p in frame.named_parameters() if p.requires_grad]
    exact = all(  # what is trained may change from round to round
        model.averages_exactly(frame.active_peft_config, part.trains(names, n))
        for n in (1, 2)
    )
    return [
        ("a client's weight", weight),
        (
            "the mean",
            "exact: it does to each weight what the clients' adapters do in the mean"
            if exact
            else "not exact: it does not do what the clients' adapters do in the mean",
        ),
    ]


def _rate(cfg: Settings) -> str:
    first, last = (learning_rate(cfg, n) for n in (1, cfg.num_rounds))
    rounds = f"{cfg.num_rounds} rounds"
    if first == last:
        return f"{first:.3g} in {rounds}"
    return f"{first:.3g} -> {last:.3g} over {rounds}"


def _traffic(cfg: Settings, frame: torch.nn.Module) -> Rows:
    dtype, rounds = cfg.comm.dtype, cfg.num_rounds
    # What zlib makes of it hangs on the values.
    packed = "at most " if cfg.comm.compress else ""
    part, names = sharing.build(cfg.sharing), _trained(frame)
    cohort = _cohort(cfg, "fraction_fit")
    adapter = wire_bytes(frame, dtype)
    # What comes anew in every round, and what comes once to each client and lasts.
    lasts = part.lasts(names)
    first = seeded(cfg, names) if lasts else {}
    anew = wire_bytes(frame, dtype, {*part.comes(names)} - {*lasts})
    kind = "float32" if part.exact else dtype
    once = sum(
        _times(cfg, part, name, first[name], kind) * wire_bytes(frame, kind, [name])
        for name in lasts
    )
    down = rounds * cohort * anew + once
    most = "at most " if once and cohort < cfg.num_clients else packed
    if cfg.comm.delta_down:
        down, most = _changes(cfg, frame), "at most "
    summed = cfg.privacy.secure_aggregation
    form = wire.Wire("uint64") if summed else steps.form(cfg.comm)
    up = cohort * sum(
        _size(form.layout(_sent(frame, part.goes(names, n))))
        for n in range(1, rounds + 1)
    )
    if cfg.strategy.get("ranks"):  # on average over the clients
        sizes = sum(n * wire_bytes(each, dtype) for _, n, each in _by_rank(cfg))
        adapter = round(sizes / cfg.num_clients)
        anew, down = adapter, rounds * cohort * adapter
        up = down
    if aggregate.build(cfg.strategy).corrects:  # as much again, by control variates
        down, up = down + rounds * cohort * adapter, up + rounds * cohort * adapter
    # The clients of the first round make the first adapter and send it in float32.
    made = cohort * wire_bytes(frame, "float32")
    rows = [
        ("adapter on the wire", f"{_bytes(adapter)} ({dtype})"),
        (
            "bytes a round",
            f"{most}{_bytes(down // rounds)} down, {packed}{_bytes(up // rounds)} up",
        ),
        (
            f"bytes in {rounds} rounds",
            f"{most}{_bytes(down + up)} both ways, and {_bytes(made)} for the first "
            "adapter",
        ),
    ]
    if cfg.strategy.fraction_evaluate:
        most = "at most " if once or cfg.comm.delta_down else packed
        new = wire_bytes(frame, kind, lasts) if once else 0
        down = _cohort(cfg, "fraction_evaluate") * (anew + new)
        times = 1 + sum(
            due(cfg, n, default=1) for n in range(1, rounds + 1)
        )  # the base
        text = f"{_bytes(down)} down each time, {_bytes(times * down)} in all"
        rows.append(("evaluation", most + text))
    return rows


def _privacy(cfg: Settings, frame: torch.nn.Module) -> Rows:
    """What the run may tell of a client, and the noise that keeps it to that."""
    level = privacy.build(cfg.privacy)
    if not level.released:
        return []
    times, z = privacy.planned(cfg), level.release()["noise_multiplier"]
    epsilon = level.spent([z] * times, privacy.secret_rate(cfg))
    length, size, cohort = loudness(cfg, frame)
    return [
        (
            "epsilon",
            f"{epsilon:.3g} at delta {level.delta:g}, at most: {level.adjacency}, in {times} "
            f"of {cfg.num_rounds} rounds",
        ),
        (
            "noise",
            f"{z:.4g} times clip_norm a value; on a round's mean of {cohort} clients and "
            f"{size:,} values {length:.3g} times as long as clip_norm",
        ),
    ]


def _changes(cfg: Settings, frame: torch.nn.Module) -> int:
    """Bytes down in all rounds at most, where clients are sent what has changed.

    All of the adapter the first time, and then what the rounds between two times have changed:
    in all of a client's times no more than all rounds have.
    """
    sent, dtype = _trained(frame), cfg.comm.dtype
    whole, size = wire_bytes(frame, dtype), sparse.size_of(sent)
    times = cfg.num_rounds * _cohort(cfg, "fraction_fit")
    first = min(times, cfg.num_clients)
    changed = cfg.num_rounds * sparse.count(cfg.comm.top_k, size)
    later = cfg.num_clients * sparse.length(changed, size, dtype)
    return first * whole + min(later, (times - first) * whole)


def _times(
    cfg: Settings, part: sharing.Adapter, name: str, first: torch.Tensor, dtype: str
) -> int:
    """To how many clients a tensor that lasts is sent in all rounds, at most.

    Once after every change, to each that is asked before the next one; and in the beginning,
    unless what clients make themselves is what would arrive.
    """
    rounds = range(1, cfg.num_rounds + 1)
    changed = [n for n in rounds if part.changes([name], n)]
    if not wire.unpack(wire.pack({name: first}, dtype)[0])[name].equal(first):
        changed = [0, *changed]
    lengths = [b - a for a, b in itertools.pairwise([*changed, cfg.num_rounds])]
    cohort = _cohort(cfg, "fraction_fit")
    return sum(min(cfg.num_clients, cohort * length) for length in lengths)


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
    terms = _cpu(cfg, frame)
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
        total = sum(terms.values())
        rows = [("memory a client", f"{_bytes(total)} (estimate)")]
        rows += [(f"  {name}", _bytes(size)) for name, size in terms.items()]
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
