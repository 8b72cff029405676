"""One client's part of a round, on plain arguments: adapter in, adapter and figures out.

No Flower type comes in here. `cfg` is the resolved configuration.
"""

import resource
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

import dataset
import model
import tasks
from compute import each, patches, zero
from evaluation import examine
from methods import dpsgd, lora, personal, privacy, scaffold, sharing
from methods.base import State
from records.batches import Collator
from records.templates import Example
from tasks.base import Task, Unsuited
from utils import Settings, learning_rate, mix_seed

Metrics = dict[str, float]


def initial_adapter(cfg: Settings) -> State:
    """The adapter that everybody starts from; `cfg.seed` decides it.

    Made where the base is: some methods (DoRA) take their start from its weights, and the
    server need not hold it. The first round finds the base loaded.
    """
    model.use_cpus(cfg.client_resources.num_cpus)
    device = model.default_device()
    return model.first_state(cfg.model, cfg.peft, cfg.seed, device)


def train(
    cfg: Settings,
    state: State,
    partition: int,
    server_round: int,
    proximal_mu: float = 0.0,
    correction: State | None = None,
    anchor: State | None = None,
) -> tuple[State, Metrics]:
    """Train the adapter for one round on one partition.

    Each process of a team calls this, and all of them get the same adapter and figures.
    `proximal_mu` above 0 adds FedProx's term, the distance from `anchor` or else from `state`.
    `correction`, by name, is added to the gradient of each step; what the gradients were
    without, on the mean, then comes with the adapter as `gradient/<name>` (SCAFFOLD's). The
    metrics: `num-examples` trained on and
    the `records` that they are drawn from, `train_loss` (nats per answer token), `tokens`
    (of prompts and answers, without padding), examples `truncated` to `train.seq_length`,
    draws `dropped` (no answer, or no room for one), the `micro_batch` that memory allowed,
    `peak_memory` in bytes (of the GPU where there is one, else of this process), and
    `seconds`, whole and by part. With `privacy=record` the steps are noisy, and the metrics
    those of `methods.dpsgd.Mechanism` alone.
    """
    clock = Clock()
    net = _load(cfg, state)
    tokenizer, task = _tokenizer(cfg), tasks.build(cfg)
    clock.lap("load")
    rows = dataset.training_rows(cfg, partition)
    seed = mix_seed(cfg.seed, "train", partition, server_round)
    level = privacy.build(cfg.privacy)
    mechanism = level.begin(cfg, partition, len(rows))
    size = cfg.train.training_arguments.per_device_train_batch_size
    if mechanism:
        cfg = one_by_one(cfg)
    arguments = training_arguments(cfg, server_round, seed)
    batch = arguments.train_batch_size * arguments.world_size  # of all processes
    encode = partial(_encode, cfg, task, tokenizer, discreet=level.discreet)
    count = arguments.max_steps * arguments.gradient_accumulation_steps * batch
    if mechanism:
        steps = mechanism.draw()
        drawn = sorted({place for step in steps for place in step})
        encoded = {place: encode(rows[place]) for place in drawn}
        # A record that cannot be trained on is one whose gradient is 0.
        examples = [[encoded[i] for i in step if encoded[i]] for step in steps]
    else:
        examples, dropped = dataset.draw(
            rows,
            encode,
            seed,
            examples=count if count > 0 else None,
            passes=cfg.train.training_arguments.num_train_epochs,
        )
        examples = dataset.group_by_length(examples, batch, seed)
    drawn = [one for one in encoded.values() if one] if mechanism else examples
    with zero.awake(net, divided(cfg) if task.refers else None):
        _refer(cfg, net, task, drawn, tokenizer)
    clock.lap("tokenise")
    trains = sharing.build(cfg.sharing).trains(state.keys(), server_round)
    kind = LocalTrainer
    if mechanism:
        kind = partial(NoisyTrainer, mechanism=mechanism, size=size)

    gradients: State = {}

    def fit(arguments: TrainingArguments) -> float:
        model.set_adapter_state(net, state)
        clock.lap("set")
        with frozen(net, state.keys() - set(trains)):
            trainer = kind(
                model=net,
                args=arguments,
                task=task,
                train_dataset=fill(examples, batch, task.blank())
                if arguments.world_size > 1
                else examples,
                data_collator=task.collator(tokenizer, cfg.train.padding_side),
                proximal_mu=proximal_mu,
                anchor=anchor,
            )
            if not cfg.verbose:
                trainer.remove_callback(PrinterCallback)
            correct = Correct(net, correction or {})
            trainer.add_callback(correct)
            loss = trainer.mean(trainer.train().training_loss)
            gradients.update(correct.means())
            if divided(cfg):
                zero.end(trainer)
            return loss

    loss = None
    try:
        loss = fit(arguments)
    except torch.OutOfMemoryError:
        if arguments.train_batch_size == 1 or arguments.world_size > 1:
            raise
    # Retried outside of `except`: its traceback keeps the failed step's tensors alive.
    if loss is None:
        arguments = training_arguments(smaller(cfg), server_round, seed)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        loss = fit(arguments)
    clock.lap("train")
    trained = model.adapter_state(net) | gradients
    clock.lap("read")
    if mechanism:
        return trained, mechanism.metrics(loss)
    return trained, {
        "num-examples": len(examples),
        "records": len(rows),
        "train_loss": loss,
        "tokens": sum(map(task.length, examples)),
        "truncated": sum(task.is_cut(example, tokenizer) for example in examples),
        "dropped": dropped,
        "micro_batch": arguments.train_batch_size,
        "peak_memory": peak_memory(),
        **clock.seconds(),
    }


@contextmanager
def frozen(net: torch.nn.Module, names: Collection[str]) -> Iterator[None]:
    """Keep these of the adapter's parameters as they are."""
    kept = [parameter for name, parameter in net.named_parameters() if name in names]
    for parameter in kept:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in kept:
            parameter.requires_grad_(True)


def smaller(cfg: Settings) -> Settings:
    """The same steps on the same examples, with half the examples in memory at a time."""
    settings = cfg.train.training_arguments
    size = settings.per_device_train_batch_size
    # An odd size has no half.
    parts = next(n for n in range(2, size + 1) if size % n == 0)
    settings = settings | {
        "per_device_train_batch_size": size // parts,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps * parts,
    }
    return cfg | {"train": cfg.train | {"training_arguments": settings}}


def fill(examples: list[Example], batch: int, blank: Example) -> list[Example]:
    """Pad with `blank` examples to a multiple of `batch`.

    Otherwise accelerate fills the last batch with records from the first.
    """
    return examples + [blank] * (-len(examples) % batch)


def one_by_one(cfg: Settings) -> Settings:
    """A step of the Trainer's for each of DP-SGD's, which is one item of its dataset."""
    steps = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 0.0,
    }
    settings = cfg.train.training_arguments | steps
    return cfg | {"train": cfg.train | {"training_arguments": settings}}


class Clock:
    """Times the parts of a round: `lap(name)` is the time since the last lap."""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[f"seconds_{name}"] = now - self.last
        self.last = now

    def seconds(self) -> dict[str, float]:
        """All laps, and the whole under `seconds`."""
        return {**self.laps, "seconds": self.last - self.started}


def evaluate(
    cfg: Settings,
    state: State,
    partition: int,
    base: bool = False,
    own: State | None = None,
) -> Metrics:
    """How the adapter does on the records held back here; or, with `base`, the base alone.

    The metrics: `num-examples`, and each of the task's (`Task.metrics`) as `eval_loss` (nats
    per answer token), `eval_accuracy` (share of answer tokens, in [0, 1]) and so on, `dropped`
    and `truncated` as in `train`, and `eval_loss_own` of an adapter of the client's own, if
    one is given. Raises `ValueError` where no record can be used.
    """
    tokenizer, task = _tokenizer(cfg), tasks.build(cfg)
    examples, dropped = _held_back(cfg, task, partition, tokenizer)
    scores = _scores(cfg, task, state, examples, tokenizer, base)
    told = {
        "num-examples": len(examples),
        **{f"eval_{name}": value for name, value in task.metrics(scores).items()},
        "dropped": dropped,
        "truncated": sum(task.is_cut(example, tokenizer) for example in examples),
    }
    if own:
        scores = _scores(cfg, task, own, examples, tokenizer)
        told["eval_loss_own"] = task.metrics(scores)["loss"]
    return told


def personalise(cfg: Settings, shared: State, own: State, partition: int) -> Metrics:
    """Which mean of the shared adapter and the client's own is best on its records held back.

    The metrics: `num-examples`, `personal_weight` (of its own, the best of
    `personal.interpolate`), and in nats per answer token `eval_loss_global`, `eval_loss_own`
    and `eval_loss_personal` (see `methods.personal.choose`).
    """
    tokenizer, task = _tokenizer(cfg), tasks.build(cfg)
    examples, _ = _held_back(cfg, task, partition, tokenizer)
    tried = {}
    for weight in sorted({0, 1, *cfg.personal.interpolate}):
        mixed = personal.between(shared, own, weight)
        tried[weight] = _scores(cfg, task, mixed, examples, tokenizer)
    weight, loss = personal.choose(
        {w: tried[w][:, [0, 2]] for w in sorted(cfg.personal.interpolate)}
    )
    return {
        "num-examples": len(examples),
        "eval_loss_global": task.metrics(tried[0])["loss"],
        "eval_loss_own": task.metrics(tried[1])["loss"],
        "eval_loss_personal": loss,
        "personal_weight": float(weight),
    }


def save(cfg: Settings, state: State, folder: Path, done: int) -> None:
    """Write an adapter of round `done` as a PEFT folder, in the place of an earlier one."""
    settings, rank = cfg.peft, lora.rank(state)
    if rank and rank < (model.highest_rank(settings) or 0):  # a client's own
        settings = model.capped(settings, rank)
    frame = model.skeleton(cfg.model, settings)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_adapter(frame, state, _tokenizer(cfg), model.about(cfg, done), folder)


def _held_back(
    cfg: Settings, task: Task, partition: int, tokenizer: Any
) -> tuple[list[Example], int]:
    """The client's records to evaluate on, tokenised, and how many rows fell out."""
    rows = dataset.load_partition(cfg, partition)
    _, rows = dataset.split(cfg, rows)
    return dataset.draw(rows, partial(_encode, cfg, task, tokenizer), cfg.seed)


def _scores(
    cfg: Settings,
    task: Task,
    state: State,
    examples: list[Example],
    tokenizer: Any,
    base: bool = False,
) -> torch.Tensor:
    """`examine.score` with this adapter, or with none."""
    net = _load(cfg, state).eval()
    size = cfg.train.training_arguments.per_device_train_batch_size
    with ExitStack() as held:
        held.enter_context(zero.awake(net, divided(cfg)))
        _refer(cfg, net, task, examples, tokenizer)
        model.set_adapter_state(net, state)
        if base:  # a fresh LoRA changes nothing, but a fresh prompt or prefix does
            held.enter_context(net.disable_adapter())
        collate = task.collator(tokenizer, cfg.train.padding_side)
        return examine.score(net, task, examples, collate, size)


def _refer(
    cfg: Settings, net: Any, task: Task, examples: list[Example], tokenizer: Any
) -> None:
    """`examine.refer`, in batches of a step's examples."""
    size = cfg.train.training_arguments.per_device_train_batch_size
    pad = Collator(tokenizer.pad_token_id, cfg.train.padding_side)
    examine.refer(cfg, net, task, examples, pad, size)


class Correct(TrainerCallback):
    """Adds to each step's gradients, once they are clipped, and keeps what they were before."""

    def __init__(self, net: torch.nn.Module, correction: State) -> None:
        self.steps = 0
        self.each = {
            name: (p, torch.empty_like(p).copy_(correction[name]), torch.zeros_like(p))
            for name, p in net.named_parameters()
            if name in correction and p.requires_grad
        }

    @torch.no_grad()
    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.steps += 1
        for parameter, correction, total in self.each.values():
            if parameter.grad is None:  # of a part that no example has come by
                parameter.grad = torch.zeros_like(parameter)
            total.add_(parameter.grad)
            parameter.grad.add_(correction)

    def means(self) -> State:
        """On the CPU, in float32, as `gradient/<name>`."""
        return {
            scaffold.GRADIENT + name: (total / max(self.steps, 1)).to(
                "cpu", torch.float32
            )
            for name, (_, _, total) in self.each.items()
        }


class LocalTrainer(Trainer):
    """`transformers.Trainer` in the base's compute type, with FedProx's proximal term."""

    def __init__(
        self,
        *args: Any,
        task: Task,
        proximal_mu: float = 0.0,
        anchor: State | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # So that Trainer passes `num_items_in_batch` to `compute_loss` for every model.
        self.model_accepts_loss_kwargs = True
        self.task = task
        self.proximal_mu = proximal_mu
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.trained = [*named.values()]
        self.anchor: list[torch.Tensor] = []
        if proximal_mu:
            start = anchor or {n: p.detach().clone() for n, p in named.items()}
            self.anchor = [start[n].to(p) for n, p in named.items()]

    def training_step(self, model_: Any, *given: Any, **named: Any) -> torch.Tensor:
        # Checkpointed layers are recomputed in the backward pass, after `model.autocast`: a
        # forward that cast its inputs would be another one.
        with patches.inputs_as_they_come(model_):
            return super().training_step(model_, *given, **named)

    def compute_loss(
        self, model_: Any, inputs: Any, *_: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The task's loss, plus mu/2 ||w - anchor||^2 (FedProx, arXiv 1812.06127)."""
        with model.autocast(model_):
            loss = self.task.loss(model_, inputs, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # A share of the sum over all processes, whose gradients are then averaged.
            loss = loss * self.args.world_size
        if self.proximal_mu:
            distance = sum(
                (now - before).square().sum()
                for now, before in zip(self.trained, self.anchor, strict=True)
            )
            # The task's loss is a share of the accumulated batch's; so is this.
            parts = self.args.gradient_accumulation_steps
            loss = loss + self.proximal_mu / 2 * distance / parts
        return loss

    def mean(self, loss: float) -> float:
        """The mean of all processes' losses."""
        here = torch.tensor(loss, dtype=torch.float64, device=self.args.device)
        return self.accelerator.reduce(here, "mean").item()


class NoisyTrainer(LocalTrainer):
    """Steps on noisy sums of records' clipped gradients: DP-SGD.

    An item of its dataset is a step: the examples that are in it, none perhaps. Of `size`
    examples the gradients are computed at a time, or of fewer where a GPU has no room, or of
    one where they cannot be told apart (`each.together`). Only of such as have one length when
    padded alone: a record's gradient is not to depend on another one, and some bases see
    padding (by absolute positions, scaled rotary ones, Fourier transforms).
    """

    def __init__(
        self, *args: Any, mechanism: dpsgd.Mechanism, size: int, **kwargs: Any
    ) -> None:
        self.collate = kwargs["data_collator"]
        kwargs["data_collator"] = lambda steps: steps[0]
        super().__init__(*args, **kwargs)
        self.mechanism = mechanism
        self.size = size

    def training_step(
        self, model_: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Puts the step's gradients into the parameters. The loss, per answer token of each
        record and then over the records, is noisy as well."""
        model_.train()
        # The Trainer's seed is known to the server. A record would move the places of all that
        # come after it in what dropout draws.
        torch.seed()
        with patches.inputs_as_they_come(model_):
            loss = self.mechanism.step(self.trained, self._found(model_, inputs))
        # Of no data, so it needs no noise.
        for now, before in zip(self.trained, self.anchor, strict=bool(self.anchor)):
            now.grad.add_(now.detach() - before, alpha=self.proximal_mu)
        return torch.tensor(loss, device=self.args.device)

    def _found(self, model_: Any, examples: list[Example]) -> Iterator[each.Found]:
        """Losses and gradients of all examples, those of one length together."""
        alike: dict[Any, list[Example]] = {}
        for example in examples:
            batch = self.collate([example])
            shapes = ((name, *tensor.shape) for name, tensor in batch.items())
            rows = len(batch["input_ids"])
            alike.setdefault((rows, *shapes), []).append(example)
        for (rows, *shapes), waiting in alike.items():
            lengths = {length for _, _, *rest in shapes for length in rest}
            while waiting:
                found, size = None, min(self.size, len(waiting))
                # As many rows as tokens: which are which?
                while size > 1 and rows * size in lengths:
                    size -= 1
                try:
                    found = self._gradients(model_, waiting[:size])
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                    self.size = size // 2
                if found:
                    del waiting[:size]
                    yield found
                elif torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _gradients(self, model_: Any, examples: list[Example]) -> each.Found | None:
        batch = self._prepare_inputs(self.collate(examples))

        def losses() -> torch.Tensor:
            with model.autocast(model_):
                return self.task.losses(model_, batch)

        if len(examples) > 1:
            rows = len(batch["input_ids"])
            if found := each.together(model_, self.trained, losses, rows):
                return found
            self.size = 1
            return None
        return each.alone(self.trained, losses().sum())


def training_arguments(
    cfg: Settings, server_round: int, seed: int
) -> TrainingArguments:
    """`train.training_arguments` with this round's learning rate and seed.

    Raises `TypeError` or `ValueError` for what `TrainingArguments` does not take.
    """
    given = cfg.train.training_arguments.items()
    settings = {name: value for name, value in given if value is not None}
    settings["learning_rate"] = learning_rate(cfg, server_round)
    settings |= {"report_to": "none", "save_strategy": "no"}
    device = model.default_device()
    settings["use_cpu"] = device.type == "cpu"
    # A step waits for nothing of a GPU: batches are copied from pinned memory while it works,
    # and no loss is looked at. (One that is not finite makes an adapter that nobody takes.)
    settings["accelerator_config"] = {"non_blocking": not settings["use_cpu"]}
    settings.setdefault("logging_nan_inf_filter", False)
    if settings.get("use_liger_kernel"):
        # Those of a layer. The loss is of answers alone and computed in parts as it is.
        losses = ("cross_entropy", "fused_linear_cross_entropy")
        settings["liger_kernel_config"] = dict.fromkeys(losses, False)
    if zeros := divided(cfg):
        told = zero.training(zeros, model.compute_dtype(device))
        settings["accelerator_config"] |= told.pop("accelerator_config")
        settings |= told
    # `draw` has made the passes over the data already.
    settings["num_train_epochs"] = 1
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        seed=seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        disable_tqdm=True,
        **settings,
    )
    patches.use_one_gpu(arguments)
    return arguments


# Settings of the optimizer and schedule that `rehearse` tries.
REHEARSED = (
    *("optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_kwargs", "warmup_steps"),
)


def rehearse(cfg: Settings) -> torch.Tensor:
    """A weight after ten steps of a round's optimizer and schedule: do they work here?

    On the CPU, of shape (64, 64): bitsandbytes keeps smaller ones in 32 bits. Raises
    whatever the libraries do where a value does not fit or a package is missing.
    """
    steps = 10
    arguments = training_arguments(cfg, server_round=1, seed=0)
    arguments.learning_rate = 1e-3
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 64, generator=generator))
    made, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    group = {"params": [weight], "weight_decay": arguments.weight_decay}
    optimizer = made([group], **settings)
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    for _ in range(steps):
        weight.grad = torch.randn(64, 64, generator=generator)
        optimizer.step()
        schedule.step()
    return weight.detach()


def peak_memory() -> int:
    """The most memory held so far, in bytes: allocated on the GPU, or by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _load(cfg: Settings, state: State) -> torch.nn.Module:
    """The model, with an adapter of the rank that `state` has."""
    model.use_cpus(cfg.client_resources.num_cpus)
    net = model.build_once(cfg.model, cfg.peft, cfg.seed, model.default_device())
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    with zero.whole(trained.values()):
        own = lora.rank(trained)
    if (rank := lora.rank(state)) != own and rank:
        model.set_rank(net, cfg.peft, rank)
    return net


def divided(cfg: Settings) -> Settings | None:
    """DeepSpeed's settings, in a process of a team that is divided by it."""
    return cfg.model.get("deepspeed")


def _tokenizer(cfg: Settings) -> Any:
    return model.load_tokenizer(cfg.model.name, cfg.model.use_fast_tokenizer)


def _encode(
    cfg: Settings,
    task: Task,
    tokenizer: Any,
    row: dict[str, Any],
    discreet: bool = False,
) -> Example | None:
    """`discreet`: a record that does not fit the task is one of which nothing is learnt."""
    record = dataset.to_record(row, cfg.dataset.columns)
    try:
        return task.encode(record, tokenizer, training=True)
    except Unsuited:
        if discreet:
            return None
        raise
