"""What each setting of `conf/` is: its type, its range, what it means, and whether a run that
goes on may have it otherwise.

`validated` holds a configuration against `Run`, one class a section. A class that is `Open`
also takes what a constructor takes that its `_target_` names.
"""

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from utils import LIGER, Settings, UserError, require, spelt

# What Hydra reads as nothing, a truth value or a number.
NO_NAME = re.compile(r"null|true|false|[\d.+-]+", re.IGNORECASE)


PARTS = re.compile(r"\w+(\.\w+)*")  # of a tensor's name, between dots


def setting(meaning: str, later: bool = False, **limits: Any) -> Any:
    """A field that must be given. `later`: a run that goes on may have it otherwise."""
    return Field(description=meaning, json_schema_extra={"later": later}, **limits)


def choice(*values: Any) -> Any:
    """One of these, by type as well: for a `Literal` 1 is True, and 4.0 is 4."""

    def exact(value: Any) -> Any:
        if not any(value == one and type(value) is type(one) for one in values):
            raise PydanticCustomError("literal_error", "it is none of them")
        return value

    return Annotated[Literal[values], BeforeValidator(exact)]


Name = Annotated[str, Field(min_length=1)]


def _labels(value: Any) -> Any:
    each = value if isinstance(value, list) else [None]
    # A head has a row for each.
    fits = 1 <= len(each) <= 10_000
    if value is not None and not (
        fits and all(isinstance(x, str) and 1 <= len(x) <= 500 for x in each)
    ):
        raise ValueError(
            f"dataset.labels={spelt(value)[:200]}: a list of names is needed, 10,000 at most of "
            '500 characters at most. A number takes quotes: dataset.labels=\'["0","1"]\''
        )
    return value


Labels = Annotated[list[str] | None, BeforeValidator(_labels)]


class Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Open(Section):
    """With keys of a constructor's beside those that are named here."""

    model_config = ConfigDict(extra="allow")


class Target(Open):
    target: Name = Field(alias="_target_", description="the class that is made")


class Audit(Section):
    canaries: int = setting("made-up records to look for later", ge=0, le=100_000)


class ClientResources(Section):
    num_cpus: float = setting("cores of one client", ge=1)
    num_gpus: float = setting("GPUs of one client", ge=0)


class Comm(Section):
    dtype: choice("float32", "float16", "int8") = setting(
        "type of adapters on the wire"
    )
    top_k: float | None = setting(
        "share of an update's values that is sent", gt=0, le=1
    )
    compress: choice("zlib", None) = setting("compression of what is sent, both ways")
    delta_down: bool = setting(
        "send clients what has changed since they were last asked"
    )


class Columns(Section):
    instruction: Name
    input: Name | None
    output: Name
    messages: Name | None = None  # of a conversation, in the place of the three
    rejected: Name | None = None  # of an answer that is worse than the output
    desirable: Name | None = None  # whether the output is a good answer


class Dataset(Section):
    name: Name | None = setting("a dataset of the hub")
    split: Name = setting("the hub dataset's part to train on")
    subset: Name | None = None  # which of the hub dataset's configurations
    path: Name | None = setting("a file or folder of records, instead")
    test_path: Name | None = setting("a file or folder of test questions")
    columns: Columns
    label: Name | None = setting("the column that records are dealt out by")
    labels: Labels = setting("what a task with labels tells apart, in order")
    template: Name = setting("how a question is put: alpaca, vicuna or chat")


class Evaluate(Section):
    every_round: int = setting(
        "rounds between two examinations; 0: none", later=True, ge=0
    )
    exact_match: bool = setting("have the test questions answered", later=True)
    max_new_tokens: int = setting("length of an answer", later=True, ge=1)
    choices: Name | None = setting("the column of answers to choose from", later=True)
    holdout: float = setting(
        "share of a client's records that is held back", ge=0.01, le=0.9
    )


class Offload(Section):
    # DeepSpeed's own nvme names a folder, which no run may choose on a node.
    device: choice("none", "cpu") = setting("where what is offloaded is kept")
    pin_memory: bool = False


class ZeroOptimization(Open):
    stage: choice(2, 3) = setting("2: optimizer and gradients in parts; 3: weights too")
    offload_param: Offload = Offload(device="none")
    offload_optimizer: Offload = Offload(device="none")


class DeepSpeed(Section):
    zero_optimization: ZeroOptimization


class Launch(Section):
    processes: int = setting("processes of one client, a GPU each", ge=1)
    sharded: bool = setting("each process holds a part of the base")
    deepspeed: DeepSpeed | None = setting("DeepSpeed's own configuration")
    rendezvous: Name | None = setting("host:port where other machines come", later=True)


class Lora(Section):
    peft_lora_r: int = setting("rank of the adapter", ge=1)
    peft_lora_alpha: float = setting("scale of the adapter, times its rank", gt=0)
    peft_lora_dropout: float = setting("share of inputs left out", ge=0, le=0.99)
    target_modules: Any = setting("names of layers, all-linear, or null: PEFT's choice")


class Model(Section):
    name: Name = setting("a model of the hub, or a folder")
    adapter: Name | None = setting("a folder with an adapter to begin with")
    labels: Labels = setting("dataset.labels, which a head tells apart")
    quantization: choice(4, 8, None) = setting("bits of the base's weights")
    gradient_checkpointing: choice(True, False, "auto") = setting(
        "compute activations twice instead of keeping them"
    )
    use_fast_tokenizer: bool
    lora: Lora


class Partitioner(Target):
    num_clusters: int | None = Field(None, ge=1, le=1000)
    num_partitions: int | None = Field(None, ge=1, le=1_000_000)  # as num_clients
    partition_by: Name | None = None


class InitArgs(Open):
    """Arguments of `ray.init`, but for those that are set elsewhere."""

    address: str = setting("local, auto or host:port of Ray's head")

    @model_validator(mode="before")
    @classmethod
    def ours(cls, values: Any) -> Any:
        by = {"log_to_driver": "verbose", "logging_level": "verbose"}
        by["runtime_env"] = "main.py"
        for name in by.keys() & (values if isinstance(values, dict) else {}):
            raise ValueError(f"simulation.init_args.{name} is set by {by[name]} here.")
        return values


class Personal(Target):
    mu: float | None = Field(None, ge=0)
    # Of what comes after the last round.
    rounds: int | None = Field(None, ge=1, json_schema_extra={"later": True})
    interpolate: Any = setting("weights of a client's own adapter", later=True)

    @model_validator(mode="after")
    def weights(self) -> "Personal":
        given = self.interpolate
        fit = isinstance(given, list) and 1 <= len(given) <= 20
        if not fit or not all(is_number(x) and 0 <= x <= 1 for x in given):
            raise ValueError(
                f"personal.interpolate={spelt(given)}: give 1 to 20 weights of a client's own "
                "adapter, from 0 to 1: [0,0.5,1]."
            )
        return self


class Privacy(Target):
    secure_aggregation: bool = setting("the server sees the updates' sum alone")
    # Noise far below what float32 tells apart would hide nothing.
    clip_norm: float | None = Field(None, ge=1e-6)
    noise_multiplier: float | None = Field(None, ge=1e-12)
    epsilon: float | None = Field(None, gt=0)
    delta: float | None = Field(None, gt=0, le=0.1)
    adaptive: bool | None = None


class Simulation(Section):
    init_args: InitArgs


class Sharing(Target):
    stays: Any = setting("parts of the names of what stays with a client")
    refactor_every: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def names(self) -> "Sharing":
        parts = self.stays if isinstance(self.stays, list) else [None]
        if not all(isinstance(part, str) and PARTS.fullmatch(part) for part in parts):
            raise ValueError(
                f"sharing.stays={spelt(self.stays)}: a list of parts of names is needed, "
                "[lora_B] say, or []."
            )
        return self


class Strategy(Target):
    fraction_fit: float = setting("share of the clients that train", gt=0, le=1)
    fraction_evaluate: float = setting("share that measures", ge=0, le=1)
    sampling: choice("epoch", "random", "poisson") = setting("who trains in a round")
    min_fit_replies: int = setting("replies that a round needs", ge=1)
    max_round_retries: int = setting("repetitions of a round with fewer replies", ge=0)
    clip_norm: float | None = setting("largest L2 norm of an update", gt=0)
    clip_weights: float | None = setting("largest change of the weights", gt=0)
    weighted_by: choice("examples", "records") = setting("what a client counts for")
    max_weight: int | None = setting("largest weight of a client", ge=1)
    clients: int | None = Field(None, ge=1, le=1_000_000)  # as num_clients

    ranks: Any = Field(
        None
    )  # a list, or shares by rank: of strategies that take others

    @field_validator("ranks")
    @classmethod
    def whole(cls, ranks: Any) -> Any:
        shares = ranks.values() if isinstance(ranks, dict) else []
        each = ranks if isinstance(ranks, (list, dict)) else []
        fits = each and all(type(rank) is int and rank >= 1 for rank in each)
        if ranks is not None and not (
            fits and all(is_number(n) and n > 0 for n in shares)
        ):
            raise ValueError(
                f"strategy.ranks={spelt(ranks)}: take a list of whole numbers from 1, or a share "
                "above 0 for each, {4: 0.5, 16: 0.5}."
            )
        return ranks


class TrainingArguments(Open):
    """The fields of transformers.TrainingArguments that do here what they say there.

    The last seven change no adapter: those of logging are for verbose=true, two are for a
    GPU's time and memory, and those of saving stand in published settings. `check_training_arguments`
    refuses all others.
    """

    per_device_train_batch_size: int = setting("examples of a forward", ge=1)
    gradient_accumulation_steps: int = setting("forwards of a step", ge=1)
    max_steps: int = setting("steps of a client in a round; -1: by epochs", ge=-1)
    num_train_epochs: float = setting("epochs of a client in a round", gt=0)
    learning_rate: float | None = Field(None, gt=0)
    max_grad_norm: float | None = Field(None, ge=0)
    optim: Any = None
    optim_args: Any = None
    weight_decay: float | None = Field(None, ge=0)
    neftune_noise_alpha: float | None = Field(None, gt=0)
    adam_beta1: float | None = None
    adam_beta2: float | None = None
    adam_epsilon: float | None = None
    lr_scheduler_type: Any
    lr_scheduler_kwargs: Any = None
    warmup_steps: float | None = None
    report_to: choice(None, "none") = setting("a tracker is tracking=wandb")
    save_strategy: choice("no") = setting(
        "adapters are saved by train.save_every_round"
    )
    logging_steps: float | None = None
    logging_strategy: Any = None
    logging_first_step: bool | None = None
    torch_empty_cache_steps: Any = None
    use_liger_kernel: bool | None = None
    save_steps: float | None = None
    save_total_limit: Any = None


class Task(Target):
    model: choice(
        "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM"
    ) = setting("the base's class, by PEFT's name for the task")
    class_weights: Any = None
    beta: float | None = Field(None, gt=0)
    desirable_weight: float | None = Field(None, gt=0)
    undesirable_weight: float | None = Field(None, gt=0)
    prefix: str | None = None  # of every source, for encoder-decoders

    @field_validator("class_weights")
    @classmethod
    def above(cls, given: Any) -> Any:
        each = given if isinstance(given, list) and given else [None]
        if given is not None and not all(is_number(x) and x > 0 for x in each):
            raise ValueError(
                f"task.class_weights={spelt(given)}: a number above 0 for each of dataset.labels is "
                "needed, [1,2.5] say, or null."
            )
        return given


class Train(Section):
    save_every_round: int = setting("rounds between two adapters", later=True, ge=1)
    round_timeout: float | None = setting(
        "seconds to wait for a round", later=True, ge=1
    )
    min_records: int = setting("records of a node that takes part", ge=1)
    seq_length: int = setting("tokens of an example", ge=2)
    assistant_turns: choice("all", "last") = setting(
        "answers of a conversation that are trained on"
    )
    padding_side: choice("left", "right")
    learning_rate_max: float = setting("learning rate of the first round", ge=0)
    learning_rate_min: float = setting("learning rate that the last round nears", ge=0)
    schedule_rounds: int | None = setting("rounds of the cosine", ge=1)
    training_arguments: TrainingArguments

    @model_validator(mode="after")
    def falls(self) -> "Train":
        low, high = self.learning_rate_min, self.learning_rate_max
        if low > high:
            raise ValueError(
                f"train.learning_rate_min={low} is above train.learning_rate_max={high}."
            )
        return self


class Baseline(Section):
    """What a mode to compare with means: the same steps, differently spent."""

    clients: choice(1, "all") = setting("that train in a round")
    records: choice("own", "all") = setting("that each of them trains on")
    steps: choice("own", "cohort") = setting("of each of them in a round")
    strategy: Target


class Run(Section):
    mode: choice("federated", "centralized", "local")
    baseline: Baseline | None
    num_clients: int = setting(
        "clients among whom the data is dealt out", ge=1, le=1_000_000
    )
    num_rounds: int = setting("rounds to train", later=True, ge=1)
    seed: int = setting("seed of all that is drawn", ge=0, le=2**32 - 1)
    verbose: bool = setting("show the workers' output", later=True)
    resume: Name | None = setting("the folder of a run to go on with", later=True)
    optimized_metric: Name = setting("of summary.json, for a sweeper", later=True)
    dry_run: bool = setting("print the plan, and stop", later=True)
    audit: Audit
    client_resources: ClientResources = setting("of one client", later=True)
    comm: Comm
    dataset: Dataset
    evaluate: Evaluate
    launch: Launch
    model: Model
    partitioner: Partitioner
    peft: Target
    sharing: Sharing = setting("what of the adapter comes, is trained and goes")
    personal: Personal
    privacy: Privacy = setting("what an adapter may tell of clients and records")
    simulation: Simulation = setting("where the clients run", later=True)
    strategy: Strategy
    task: Task = setting("what is learnt of the records")
    tracking: Target = setting("what follows the run", later=True)
    train: Train

    @model_validator(mode="after")
    def in_schedule(self) -> "Run":
        length = self.train.schedule_rounds
        if length is not None and length < self.num_rounds:
            raise ValueError(
                f"train.schedule_rounds={length} with num_rounds={self.num_rounds}: the "
                f"learning rate would rise again. Set it to {self.num_rounds} or more, or null."
            )
        return self


# All other fields of transformers' do nothing in this loop, or too much, or fail; and where to
# turn instead. One that stands in neither, which a later transformers has brought, is refused.
INSTEAD = {
    "is set by hydra.run.dir here": "output_dir",
    "is set by seed here": (
        "seed data_seed full_determinism train_sampling_strategy length_column_name"
    ),
    "is set by dataset.columns here": "remove_unused_columns label_names",
    "is set by verbose here": (
        "disable_tqdm log_level log_level_replica log_on_each_node"
    ),
    "is set by client_resources.num_gpus here": "use_cpu",
    "is set by model.gradient_checkpointing here": (
        "gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing "
        "activation_checkpointing_kwargs"
    ),
    "is set by launch=ddp and launch=fsdp here": (
        "fsdp fsdp_config deepspeed accelerator_config parallelism_config local_rank "
        "average_tokens_across_devices ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout"
    ),
    "is not taken here: the device decides (bfloat16 where it computes in it)": (
        "bf16 fp16 bf16_full_eval fp16_full_eval tf32"
    ),
    "is not taken here: the loss is the answers' cross entropy, computed in parts": (
        "label_smoothing_factor liger_kernel_config"
    ),
    "is not taken here: clients evaluate by strategy.fraction_evaluate, the server by "
    "evaluate.every_round": (
        "do_eval do_predict eval_strategy eval_steps eval_delay eval_on_start "
        "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "per_device_eval_batch_size prediction_loss_only include_for_metrics "
        "batch_eval_metrics load_best_model_at_end metric_for_best_model "
        "greater_is_better"
    ),
    "is not taken here: adapters are saved by train.save_every_round, and resume=... goes "
    "on with a run": (
        "save_only_model save_on_each_node enable_jit_checkpoint resume_from_checkpoint "
        "ignore_data_skip restore_callback_states_from_checkpoint"
    ),
    "is not taken here: an adapter is shared by reporting.export": (
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy "
        "hub_always_push hub_revision"
    ),
    "is not taken here: a tracker and its settings are tracking=wandb's": (
        "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    "is not taken here: a client tokenises and orders its records before a round": (
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order"
    ),
    "is not taken here: a client short of GPU memory takes smaller parts by itself": (
        "auto_find_batch_size"
    ),
}


def validated(cfg: Settings) -> Settings:
    """`cfg` itself, when each setting fits its type and range.

    Raises `UserError` with the first that does not fit.
    """
    check_against(Run, cfg)
    return cfg


def check_against(model: type[BaseModel], values: Any, path: str = "") -> None:
    """Raise `UserError` for the first of `values`, settings below `path`, that does not fit."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        raise UserError(_told(model, error.errors()[0], path)) from None


def check_kinds(path: str, settings: dict[str, Any], made: type) -> None:
    """That a number, or true or false, stands where the constructor of `made` defaults to one
    and takes no word in its place."""
    kinds: dict[str, Any] = {}
    for name, parameter in inspect.signature(made).parameters.items():
        words = re.search(r"\bstr\b|Literal", str(parameter.annotation))
        kind = bool if isinstance(parameter.default, bool) else float
        if not words and isinstance(parameter.default, (bool, int, float)):
            kinds[name] = (kind | None, None)
    check_against(create_model(made.__name__, __base__=Open, **kinds), settings, path)


def check_kernels(cfg: Settings, model_type: str | None = None) -> None:
    """That Liger's kernels, where asked for, can run where clients train, and are there for a
    base of `model_type`, transformers' name (None: unknown)."""
    if not cfg.train.training_arguments.get("use_liger_kernel"):
        return
    key = "train.training_arguments.use_liger_kernel=true"
    if not cfg.client_resources.num_gpus:
        raise UserError(
            f"{key}: Liger's kernels run on a GPU, and clients train on the CPU here. "
            "Leave it out."
        )
    require(LIGER, key)
    if model_type is None:
        return
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"{key}: {LIGER} has none for a {model_type}. Leave it out.")


def check_training_arguments(cfg: Settings) -> None:
    """That each of `train.training_arguments` has its effect here.

    null stands for one that is not given.
    """
    import client

    fields = dataclasses.fields(client.TrainingArguments)
    defaults = {field.name: field.default for field in fields}
    reasons = {
        name: reason for reason, names in INSTEAD.items() for name in names.split()
    }
    given, taken = cfg.train.training_arguments, TrainingArguments.model_fields
    for name in [name for name in given if name not in taken]:
        key = f"train.training_arguments.{name}"
        if name not in defaults:
            hint = _near(name, taken)
            raise UserError(
                f"{key}: transformers.TrainingArguments has no such field.{hint}"
            )
        if given[name] is not None:
            raise UserError(f"{key} {reasons.get(name, 'is not taken here')}.")
    try:
        moved = client.rehearse(cfg)
    except Exception as error:  # whatever the libraries make of a value
        raise UserError(f"train.training_arguments: {error}") from error
    for name in client.REHEARSED:
        if given.get(name, defaults[name]) in (None, defaults[name]):
            continue
        train = cfg.train | {"training_arguments": given | {name: None}}
        try:
            useless = client.rehearse(cfg | {"train": train}).equal(moved)
        except (TypeError, ValueError):  # what cannot be left out has an effect
            continue
        if useless:
            optim = given.get("optim") or defaults["optim"]
            raise UserError(
                f"train.training_arguments.{name}={spelt(given[name])} changes nothing with "
                f"optim={optim} and lr_scheduler_type={spelt(given['lr_scheduler_type'])}."
            )


def may_change(model: type[BaseModel] = Run, path: str = "") -> Iterator[str]:
    """The keys, sections among them, that a run which goes on may have otherwise."""
    for name, field in model.model_fields.items():
        if (field.json_schema_extra or {}).get("later"):
            yield path + name
        elif inner := _section(field):
            yield from may_change(inner, f"{path}{name}.")


def is_number(value: Any) -> bool:
    kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    return kind and math.isfinite(value)


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _section(field: FieldInfo | None) -> type[BaseModel] | None:
    """The class of a field that is a section, or may be one."""
    kinds = (field.annotation, *get_args(field.annotation)) if field else ()
    classes = (kind for kind in kinds if isinstance(kind, type))
    return next((kind for kind in classes if issubclass(kind, BaseModel)), None)


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f" Did you mean {near[0]}?" if near else ""


def _told(model: type[BaseModel], error: dict[str, Any], path: str) -> str:
    """An error of pydantic's in a line: the key, what is wrong with it, what to set."""
    if "error" in error.get("ctx", {}):  # a validator's own words
        return str(error["ctx"]["error"])
    field: FieldInfo | None = None
    section: type[BaseModel] | None = model
    for name in error["loc"]:
        known = _fields(section)
        field = known.get(name)
        section = _section(field)
    key = ".".join([*filter(None, [path]), *error["loc"]])
    given, kind = error["input"], error["type"]
    value = spelt(given)
    if field is None:
        return f"{key}={value}: there is no such setting.{_near(name, known)}"
    if section:
        one = f"{key}.{next(iter(_fields(section)))}=..."
        if kind == "missing":
            return f"{key} is missing, a section. Set its keys: +{one}"
        return f"{key}={value}: {key} is a section, not a value. Set its keys: {one}"
    if kind == "missing":
        return f"{key} is missing, and has no default. Set it: +{key}=..."
    limits = {
        name: limit
        for name in ("ge", "gt", "le")
        for one in field.metadata
        if (limit := getattr(one, name, None)) is not None
    }
    meaning = f" ({field.description})" if field.description else ""
    if kind == "literal_error":
        words = [*map(spelt, get_args(field.annotation))]
        wanted = f"take {' or '.join(filter(None, [', '.join(words[:-1]), words[-1]]))}"
    elif kind.startswith("bool"):
        wanted = "take true or false"
    elif kind.startswith("string"):
        wanted = "text is needed"
        if is_number(given):
            meaning = f". A number takes quotes: {key}='\"{value}\"'"
    elif kind.startswith("int"):
        wanted = "a whole number is needed"
    elif kind.startswith(("float", "finite")):
        wanted = "a number is needed"
    elif "gt" in limits:
        above = f" and up to {limits['le']}" if "le" in limits else ""
        wanted = f"it must be above {limits['gt']}{above}"
    elif "ge" in limits:
        most = f"to {limits['le']}" if "le" in limits else "or more"
        wanted = f"it must be {limits['ge']} {most}"
    else:  # of a library's own section
        wanted = error["msg"]
    return f"{key}={value}: {wanted}{meaning}."
