"""Everything that can be known to be wrong before anything slow starts.

The quickest checks come first, and a library is imported only where it is needed: the
commonest mistakes are answered in a second or two.
"""

import math
import os
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from methods import privacy, sharing, wire
from settings.compose import decided, resolve
from settings.schema import (
    check_against,
    check_kernels,
    check_kinds,
    check_training_arguments,
    is_number,
    validated,
)
from utils import (
    DEEPSPEED,
    Settings,
    UserError,
    local_path,
    one_line,
    read_json,
    require,
    say,
    spelt,
)


def check(config: DictConfig, deployed: bool = False) -> Settings:
    """Resolve the configuration and hold it against this machine and its data.

    `deployed`: this is the server of a federation, where data, devices and the base's
    weights are the nodes' own affair. Returns what a run is to read: a new configuration,
    with what a baseline's mode means put in and gradient_checkpointing=auto decided. Raises
    `UserError` with what is wrong and what to do.
    """
    from server import runs, tracking

    cfg = validated(resolve(config))
    if (metric := cfg.optimized_metric) not in (known := runs.Summary.__annotations__):
        raise UserError(
            f"optimized_metric={metric}: summary.json has no such key. Take one of "
            f"{', '.join(known)}."
        )
    tracking.make(cfg.tracking)  # whose library has to be here
    if not (cfg.dry_run or deployed):
        address = cfg.simulation.init_args.address
        if address == "local":
            check_machine(cfg.client_resources)
        else:
            check_cluster(address)
    check_launch(cfg, deployed)
    check_strategy(cfg, deployed)
    check_task(cfg)
    cfg = check_privacy(cfg)
    check_secure(cfg)
    check_comm(cfg)
    check_personal(cfg)
    check_training_arguments(cfg)
    if deployed and cfg.baseline:
        raise UserError(
            f"mode={cfg.mode} is a baseline for simulations: the data of a federation "
            "cannot be pooled, and its nodes need no server to train alone."
        )
    if deployed and cfg.audit.canaries:
        raise UserError(
            f"audit.canaries={cfg.audit.canaries}: made-up records are planted in a "
            "simulation; no node lets a server do that. Set audit.canaries=0."
        )
    cfg = as_baseline(cfg)
    by_epochs = cfg.train.training_arguments.max_steps < 1
    import dataset
    import tasks

    dataset.check_name(cfg.dataset)
    # A plan by steps needs no data, so none is downloaded for it.
    if not deployed and (by_epochs or not cfg.dry_run or cfg.dataset.path):
        for note in dataset.check(cfg):
            say(note)
    else:  # what needs no data to be wrong
        tasks.build(cfg).check_records([], "")
    with naming(cfg.model.name):
        cfg = decided(cfg)
    frame = check_model(cfg, weights=not (cfg.dry_run or deployed))
    if not deployed:
        check_kernels(cfg, frame.config.model_type)
    check_adapter(cfg, deployed)
    check_ranks(cfg, deployed)
    if note := loud(cfg, frame):
        say(f"Note: {note}.")
    if cfg.resume:
        check_progress(cfg, Path(cfg.resume))
    return cfg


def check_machine(resources: dict[str, float]) -> None:
    """That at least one client fits this machine."""
    import torch

    gpus, cpus = resources.num_gpus, resources.num_cpus
    if gpus > 0 and not torch.cuda.is_available():
        raise UserError(
            f"client_resources.num_gpus={gpus:g}, but there is no CUDA device here. To try "
            "the app without one: python main.py experiment=quickstart. To train on the "
            "CPU: experiment=laptop, or client_resources.num_gpus=0"
        )
    if gpus > torch.cuda.device_count():
        raise UserError(
            f"client_resources.num_gpus={gpus:g}, but there are only "
            f"{torch.cuda.device_count()} CUDA devices here."
        )
    if cpus > (here := os.cpu_count() or 1):
        raise UserError(
            f"client_resources.num_cpus={cpus:g}, but this machine has {here} CPUs: no "
            f"client would ever start. Set client_resources.num_cpus={here} or less."
        )


def check_cluster(address: str) -> None:
    """That something answers where a Ray cluster is to be joined.

    Ray by itself would look for more than a minute.
    """
    from ray._private.services import canonicalize_bootstrap_address

    try:
        host, _, port = canonicalize_bootstrap_address(address).rpartition(":")
        socket.create_connection((host, int(port)), timeout=3).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"simulation.init_args.address={address}: no Ray cluster answers there. Start "
            "one with `ray start --head`, and give host:port of its head, or auto for the "
            "one that RAY_ADDRESS names or this machine belongs to. local needs none."
        ) from error


def check_nodes(cfg: Settings, nodes: list[dict[str, Any]]) -> None:
    """That one of Ray's nodes, as `ray.nodes()` tells them, has room for a client.

    And that there is room for one only where its processes meet at one address.
    """
    cpus, gpus = cfg.client_resources.num_cpus, cfg.client_resources.num_gpus
    rooms = [
        (node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        for node in nodes
        if node["Alive"]
    ]
    at_once = sum(
        int(min(room[0] / cpus, room[1] / gpus if gpus else math.inf)) for room in rooms
    )
    if not at_once:
        have = ", ".join(f"{room[0]:g} and {room[1]:g}" for room in rooms)
        raise UserError(
            f"client_resources: {cpus:g} CPUs and {gpus:g} GPUs fit no node of Ray's; they "
            f"have {have}. No client would ever start: ask for less, or add a node."
        )
    if cfg.launch.rendezvous and at_once > 1:
        most = max(room[0] for room in rooms)
        local = ", simulation.init_args.address=local" * (len(rooms) > 1)
        raise UserError(
            f"launch.rendezvous={cfg.launch.rendezvous}: there is room for {at_once} clients "
            "at once, and the processes of one only can meet there. Leave room for one, on "
            f"one machine: client_resources.num_cpus={most:g}{local}."
        )


def check_launch(cfg: Settings, deployed: bool = False) -> None:
    """That each process of a client has its own GPU, or none, and what it needs of the base."""
    launch = cfg.launch
    processes, zero = launch.processes, launch.deepspeed
    gpus, here = cfg.client_resources.num_gpus, processes
    if launch.rendezvous and not deployed:  # where it is each node's own
        from node.processes import hosts_here, place

        place(launch.rendezvous)
        here //= hosts_here(processes)
    if gpus not in (0, here) and max(gpus, here) > 1:
        also = f", {here} of them on this machine" if here != processes else ""
        raise UserError(
            f"client_resources.num_gpus={gpus:g}, but launch.processes={processes}{also}: "
            "each process takes one GPU. Set both to the same number (above 1 with "
            "launch=ddp or launch=fsdp), or client_resources.num_gpus=0."
        )
    by = f"launch=zero{zero.zero_optimization.stage}" if zero else "launch=fsdp"
    if processes == 1:
        if zero or launch.sharded:
            raise UserError(
                f"{by} with launch.processes=1: one process divides nothing, and would train "
                "as with launch=single, without offload. Set launch.processes=2 or more, or "
                "take launch=single."
            )
        return
    if zero:
        check_zero(cfg, by, deployed)
    if not launch.sharded:
        return
    bits = cfg.model.quantization
    if bits == 8 or (bits and zero):
        raise UserError(
            f"{by} with model.quantization={bits}: such a base cannot be sharded. Set "
            f"model.quantization=null{'' if zero else ' or 4'}, or launch=ddp, which holds it "
            "whole on every GPU."
        )
    if (kind := cfg.task.model) in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        raise UserError(
            f"{by} with task.model={kind}: a head is trained whole, and no process has "
            "it whole. Take launch=zero2 or launch=ddp."
        )
    kind = cfg.peft._target_.removeprefix("peft.")
    whole = "DoRA" if cfg.peft.get("use_dora") else kind
    if whole in ("DoRA", "PromptTuningConfig", "PromptEncoderConfig", "ShiraConfig"):
        raise UserError(
            f"{by}: {whole} reads weights of the base that no process has whole. "
            "Take peft=lora, rslora, ia3, miss or prefix, or launch=zero2 or launch=ddp."
        )


def check_zero(cfg: Settings, by: str, deployed: bool) -> None:
    """That DeepSpeed is here, and that what steps of a client need is whole in a process."""
    from methods import aggregate

    node, divides = cfg.strategy, cfg.launch.deepspeed.zero_optimization.stage == 3
    if cfg.launch.sharded is not divides:
        raise UserError(
            f"launch.sharded={spelt(cfg.launch.sharded)} with {by}: stage 3 of "
            "launch.deepspeed divides the base's weights, and stage 2 does not. Take the "
            "files as they are, launch=zero2 or launch=zero3."
        )
    key = "launch.deepspeed.zero_optimization"
    if not deployed:
        require(DEEPSPEED, by)
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        check_against(DeepSpeedZeroConfig, cfg.launch.deepspeed.zero_optimization, key)
    offload = cfg.launch.deepspeed.zero_optimization.get("offload_param", {})
    if offload.get("device", "none") != "none" and not divides:
        raise UserError(
            f"{key}.offload_param.device={offload.device} with {by}: stage 2 leaves the base "
            "where it is. Take launch=zero3, or offload_optimizer."
        )
    if aggregate.build(node).corrects:
        raise UserError(
            f"{by} with strategy._target_={node._target_}: a client corrects its gradients, "
            "which DeepSpeed has in parts. Take launch=ddp or launch=fsdp."
        )
    drawn = {
        "strategy.proximal_mu": node.get("proximal_mu", 0),
        "personal.mu": cfg.personal.get("mu", 0),
    }
    for name, value in drawn.items():
        if value and divides:
            raise UserError(
                f"{by} with {name}={value}: the distance of weights that no process has "
                "whole. Take launch=zero2, ddp or fsdp."
            )
    if node.get("ranks") and divides:
        raise UserError(
            f"{by} with strategy.ranks: clients put adapters of other ranks on the base that "
            "is in parts. Take launch=zero2, ddp or fsdp."
        )


def check_strategy(cfg: Settings, deployed: bool = False) -> None:
    """That the strategy takes its settings and makes an adapter of a round's replies."""
    from methods import aggregate
    from server.cohort import cohort_size

    node = cfg.strategy
    sharing.build(cfg.sharing)
    made = aggregate.build(node)
    check_sharing(cfg, made.keeps)
    check_kinds("strategy", node, type(getattr(made, "strategy", made)))
    for name, value in node.items():
        if is_number(value) and value < 0:
            raise UserError(f"strategy.{name}={value}: it must be 0 or more.")
    clip = next((x for x in ("clip_norm", "clip_weights") if node[x]), None)
    if clip and made.corrects:
        raise UserError(
            f"strategy.{clip}={node[clip]} with strategy._target_={node._target_}: it "
            "would bound a client's update and not its control variate, by which it "
            f"steers the others'. Set strategy.{clip}=null, or take strategy=fedavg."
        )
    cohort = cohort_size(cfg.num_clients, node.fraction_fit)
    if cohort < node.min_fit_replies:
        raise UserError(
            f"strategy.min_fit_replies={node.min_fit_replies}, but strategy.fraction_fit="
            f"{node.fraction_fit} of num_clients={cfg.num_clients} are {cohort} "
            "clients a round."
        )
    if node._target_.endswith(".Bulyan"):
        needed = 4 * node.num_malicious_nodes + 3
        if cohort < needed:
            raise UserError(
                f"strategy.fraction_fit={node.fraction_fit} of num_clients="
                f"{cfg.num_clients} are {cohort} clients a round; Bulyan with "
                f"num_malicious_nodes={node.num_malicious_nodes} needs {needed}."
            )
    aggregate.rehearse(node, min(cohort, 100))
    records = node.weighted_by == "records"
    by_epochs = cfg.train.training_arguments.max_steps < 1
    if deployed and (records or by_epochs) and node.max_weight is None:
        setting = "strategy.weighted_by=records" if records else "max_steps=-1"
        raise UserError(
            f"{setting}: how many records a node has is its own word, and it weighs by "
            "it. Say what to believe at most: strategy.max_weight=5000"
        )


def check_task(cfg: Settings) -> None:
    """That the task goes with the rest."""
    import tasks

    tasks.build(cfg).check(cfg)


def check_privacy(cfg: Settings) -> Settings:
    """That the level of privacy holds with the rest; `cfg` with the noise that it takes."""
    from methods import aggregate
    from server.cohort import cohort_size

    level, node = privacy.build(cfg.privacy), cfg.strategy
    if node.sampling == "poisson":
        cohort = cohort_size(cfg.num_clients, node.fraction_fit)
        faults = {
            "it is for privacy=client, and costs a run its repeatability. Take "
            "strategy.sampling=epoch": level.released != "summed",
            # Nobody is in a round with a chance of e^-30.
            f"{cohort} clients a round would at times be none. Take 30 or more, by "
            "num_clients and strategy.fraction_fit": cohort < 30,
            "a round that is repeated for want of replies would tell how many there "
            "were. Set strategy.min_fit_replies=1": node.min_fit_replies > 1,
        }
        for fault in filter(faults.get, faults):
            raise UserError(f"strategy.sampling=poisson: {fault}.")
    return privacy.checked(cfg, aggregate.build(node))


def loud(cfg: Settings, frame: Any) -> str | None:
    """What the noise will do where it drowns what clients send, in a line; or None."""
    length, size, cohort = loudness(cfg, frame)
    if length <= 1:
        return None
    return (
        f"privacy: the noise on a round's mean will be {length:.3g} times as long as "
        f"privacy.clip_norm, and drown what {cohort} clients send of {size:,} values. More "
        "clients a round (strategy.fraction_fit), fewer rounds, or fewer values "
        "(sharing=ffa, model.lora.peft_lora_r) make it shorter"
    )


def loudness(cfg: Settings, frame: Any) -> tuple[float, int, int]:
    """The length of the noise on a round's mean over `clip_norm`, the values that clients of
    `frame`'s adapter send, and how many clients do."""
    from server.cohort import cohort_size

    held = {n: p for n, p in frame.named_parameters() if p.requires_grad}
    sent = sharing.build(cfg.sharing).goes(held.keys(), 1)
    size = sum(held[name].numel() for name in sent)
    cohort = cohort_size(cfg.num_clients, cfg.strategy.fraction_fit)
    return privacy.build(cfg.privacy).loudness(size, cohort), size, cohort


def check_sharing(cfg: Settings, keeps: tuple[str, ...]) -> None:
    """That what is shared goes with the rest; `keeps`: what the strategy keeps for later."""
    if cfg.sharing.stays and cfg.baseline:
        raise UserError(
            f"sharing.stays={spelt(cfg.sharing.stays)} with mode={cfg.mode}: nobody shares anything "
            "there. Set sharing.stays=[], or mode=federated."
        )
    if not (every := cfg.sharing.get("refactor_every")):
        return
    other = {
        f"strategy={cfg.strategy._target_.rpartition('.')[2].lower()}": bool(keeps),
        f"comm.dtype={cfg.comm.dtype}": cfg.comm.dtype == "int8",  # error feedback
        "peft.target_parameters": bool(cfg.peft.get("target_parameters")),
    }
    for setting in filter(other.get, other):
        raise UserError(
            f"sharing.refactor_every={every} with {setting}: what that keeps or means is "
            "about factors that a refactoring replaces. Leave out the one or the other."
        )


def check_personal(cfg: Settings) -> None:
    """That adapters of clients' own are made beside a shared one, and can be chosen."""
    from methods import aggregate, personal

    method = personal.build(cfg.personal)
    if not method.makes:
        return
    name = f"personal._target_={cfg.personal._target_}"
    if cfg.baseline:
        raise UserError(
            f"{name} with mode={cfg.mode}: there is no adapter that clients share, beside "
            "which each has its own. Take personal=none, or mode=federated."
        )
    every = cfg.sharing.get("refactor_every")
    replaced = {
        f"sharing.refactor_every={every}": every,
        f"strategy._target_={cfg.strategy._target_}": aggregate.build(
            cfg.strategy
        ).products,
    }
    for setting in filter(replaced.get, replaced if method.trainings > 1 else ()):
        raise UserError(
            f"{name} with {setting}: what a client keeps is near the shared factors, which "
            "that replaces by others. Leave out the one or the other."
        )
    if not cfg.strategy.fraction_evaluate:
        raise UserError(
            f"{name}: a client chooses between the shared adapter and its own on records "
            "that it holds back, and strategy.fraction_evaluate=0 holds back none. Set "
            "strategy.fraction_evaluate=1."
        )


def check_secure(cfg: Settings) -> None:
    """That a run whose server knows a sum of updates alone asks it for nothing more."""
    from methods import aggregate, privacy, secure
    from server.cohort import cohort_size

    if not privacy.build(cfg.privacy).secure_aggregation:
        return
    key, node = "privacy.secure_aggregation=true", cfg.strategy
    if cfg.baseline:
        raise UserError(
            f"{key} with mode={cfg.mode}: nobody's updates are added there. Set "
            "privacy.secure_aggregation=false, or mode=federated."
        )
    made = aggregate.build(node)
    if not made.linear or made.corrects:
        raise UserError(
            f"{key} with strategy._target_={node._target_}: it looks at each update, and "
            "the server knows their sum alone. Take strategy=fedavg, fedprox, fedavgm, "
            "fedadagrad, fedadam or fedyogi."
        )
    refused = {
        "strategy.clip_norm": (node.clip_norm, "null: no single update is known"),
        "strategy.clip_weights": (node.clip_weights, "null: no single update is known"),
        "strategy.fraction_evaluate": (
            node.fraction_evaluate,
            "0: each client would tell the loss on its own records",
        ),
        "comm.dtype": (
            cfg.comm.dtype == "int8" and "int8",
            "float16: a sum comes up in fixed point, whose error nobody has to make up for",
        ),
    }
    for name, (value, instead) in refused.items():
        if value:
            raise UserError(f"{name}={value} with {key}: set {name}={instead}.")
    cohort = cohort_size(cfg.num_clients, node.fraction_fit)
    if not secure.LEAST <= cohort <= secure.MOST:
        raise UserError(
            f"{key}: strategy.fraction_fit={node.fraction_fit} of num_clients="
            f"{cfg.num_clients} are {cohort} clients a round, and a sum is of "
            f"{secure.LEAST} to {secure.MOST}: of two, each knows the other's part."
        )


def check_comm(cfg: Settings) -> None:
    """That what saves bytes goes with what computes with them."""
    from methods import aggregate, privacy

    comm, node = cfg.comm, cfg.strategy
    if comm.delta_down and not comm.top_k:
        raise UserError(
            "comm.delta_down=true with comm.top_k=null: then all of the adapter changes in a "
            "round, and the changes are no less than the whole. Set comm.top_k=0.1, say."
        )
    made, level = aggregate.build(node), privacy.build(cfg.privacy)
    for key in filter(comm.get, ("top_k", "compress", "delta_down")):
        strategy, private = node._target_, cfg.privacy._target_
        faults = {
            "privacy.secure_aggregation=true: masked values are noise to who carries "
            "them, as many for all": level.secure_aggregation,
            f"privacy._target_={private}: how many bytes an update takes, and "
            "what of it comes later, hangs on records that its noise is to hide": (
                bool(level.released)
            ),
            f"strategy._target_={strategy}: what goes beside updates, or ranks of clients' "
            "own, are not told so": made.corrects or made.products,
        }
        if key == "delta_down":
            faults |= {
                "comm.dtype=int8: a scale of its own for each client's changes would make "
                "adapters differ. Take float16": comm.dtype == "int8",
                f"mode={cfg.mode}: each client there has an adapter of its own, or there is "
                "one": bool(cfg.baseline),
            }
        if key == "top_k":
            every = cfg.sharing.get("refactor_every")
            faults |= {
                f"strategy._target_={strategy}: it compares whole updates, and of these "
                "most values are 0": not made.linear,
                f"sharing.refactor_every={every}: what was left out is of factors that "
                "it replaces": bool(every),
            }
        for fault in filter(faults.get, faults):
            raise UserError(
                f"comm.{key}={spelt(comm[key])} with {fault}. Leave out the one or the "
                "other."
            )


def as_baseline(cfg: Settings) -> Settings:
    """What the settings come to in a mode to compare with, as `cfg.baseline` has it.

    The steps are those of mode=federated, differently spent.
    """
    from methods import aggregate
    from server.cohort import cohort_size

    if (told := cfg.baseline) is None:
        return cfg
    clients, node, train = cfg.num_clients, cfg.strategy, cfg.train
    fraction = 1.0 if told.clients == "all" else 1 / clients
    strategy = Settings({name: node[name] for name in aggregate.OURS})
    strategy |= told.strategy | {"fraction_fit": fraction}
    arguments = train["training_arguments"]
    if told.steps == "cohort":
        cohort = cohort_size(clients, node.fraction_fit)
        most = arguments.max_steps
        arguments = arguments | {
            "num_train_epochs": arguments.num_train_epochs * (cohort / clients),
            "max_steps": most * cohort if most > 0 else most,
        }
    train = train | {"training_arguments": arguments}
    return cfg | {"strategy": strategy, "train": train}


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn what a library makes of a base that is broken or not there into `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        found = local_path(name) is not None
        with suppress(HFValidationError):
            found |= isinstance(try_to_load_from_cache(name, "config.json"), str)
        if found:
            # Transformers adds the names of all bases that would do, several hundred.
            cause = one_line(error, limit=400)
            raise UserError(f"model.name={name}: {cause}") from error
        raise UserError(
            f"model.name={name} is neither a local folder nor reachable on the hub. Check "
            "the name, the network and, for a gated model, `hf auth login`."
        ) from error


def check_model(cfg: Settings, weights: bool) -> Any:
    """That the base can be found and takes this adapter; needs its `config.json` only.

    `weights`: they and the tokenizer are needed here. Returns the `model.skeleton` of both.
    """
    from safetensors import SafetensorError, safe_open

    import dataset
    import model
    import tasks
    from records import templates

    name = cfg.model.name
    path = local_path(name)
    if path and weights and not list(path.glob("*.safetensors")):
        raise UserError(
            f"model.name={name}: the folder {path} holds no .safetensors file. "
            "Save the model with save_pretrained(folder, safe_serialization=True)."
        )
    for file in path.glob("*.safetensors") if path and weights else ():
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"model.name={name}: {file} is broken ({error})."
            ) from error
    with naming(name):
        frame = model.skeleton(cfg.model, cfg.peft)
        check_kinds("peft", cfg.peft, type(frame.peft_config["default"]))
        held = {n: p for n, p in frame.named_parameters() if p.requires_grad}
        shapes = {name: tuple(p.shape) for name, p in held.items()}
        if shapes and (fault := sharing.build(cfg.sharing).fault(shapes)):
            raise UserError(fault)
        check_products(cfg, frame)
        check_changes(cfg, [*held])
        model.rehearse(cfg.model, cfg.peft, cfg.seed, cfg.train.seq_length)
        if cfg.dry_run:
            return frame
        tokenizer = model.load_tokenizer(name, cfg.model.use_fast_tokenizer)
    if not any(p.numel() for p in frame.parameters() if p.requires_grad):
        raise UserError(f"{cfg.peft._target_} with these settings trains nothing.")
    tasks.build(cfg).check_tokenizer(tokenizer)
    ids = []
    if cfg.task.model == "CAUSAL_LM":  # others have no prompt
        asked = [{"instruction": "", "input": ""}]
        ids = templates.prompt(cfg.dataset.template, asked, tokenizer)
    rows = frame.get_base_model().get_input_embeddings().weight.shape[0]
    check_tokenizer(name, tokenizer, rows, ids)
    check_canaries(cfg, tokenizer)
    if dataset.test_wanted(cfg):
        kept, left_out = dataset.scorable(cfg, tokenizer)
        if left_out:
            say(
                f"{left_out} of {len(kept) + left_out} test questions are left out: they "
                "have no answer, or are longer than "
                f"train.seq_length={cfg.train.seq_length} tokens."
            )
    return frame


def check_products(cfg: Settings, frame: Any) -> None:
    """That the adapter is a sum of products, and known whole, where something computes so."""
    from methods import aggregate, lora

    products = aggregate.build(cfg.strategy).products
    key = f"strategy._target_={cfg.strategy._target_}"
    if not products:
        key = f"strategy.clip_weights={cfg.strategy.clip_weights}"
    if not products and cfg.strategy.clip_weights is None:
        return
    if fault := lora.fault(frame):
        raise UserError(
            f"{key} computes with what LoRA's factors do together, and peft="
            f"{cfg.peft._target_} cannot be taken apart so: {fault}. Take peft=lora or rslora."
        )
    part = sharing.build(cfg.sharing)
    names = [name for name, p in frame.named_parameters() if p.requires_grad]
    sent = [part.goes(names, number) for number in (1, 2)] if products else []
    if any(len(each) < len(names) for each in [part.comes(names), *sent]):
        raise UserError(
            f"sharing._target_={cfg.sharing._target_} leaves a part of the adapter out, and "
            f"{key} needs all of it. Take sharing=all, or leave that away."
        )
    if products and cfg.comm.dtype == "int8":
        raise UserError(
            f"comm.dtype=int8 with {key}: what rounding took from an update is added to the "
            "client's next one, and by then the factors are others. Take comm.dtype=float16."
        )


def check_changes(cfg: Settings, names: list[str]) -> None:
    """That a whole adapter comes down, where clients are sent what has changed in it."""
    part = sharing.build(cfg.sharing)
    if cfg.comm.delta_down and (part.own(names) or part.lasts(names)):
        raise UserError(
            f"comm.delta_down=true with sharing._target_={cfg.sharing._target_}: that leaves "
            "parts of the adapter out by itself. Take sharing=all and no sharing.stays, or "
            "comm.delta_down=false."
        )


def check_adapter(cfg: Settings, deployed: bool) -> None:
    """That the adapter that clients begin with, if one is named, is one like the run's."""
    import model
    import tasks

    if not (folder := cfg.model.adapter):
        return
    names = model.saved(cfg.model, cfg.peft).keys()
    about = read_json((local_path(folder) or Path()) / "adapter_config.json")
    base, other = cfg.model.name, str(about.get("base_model_name_or_path") or "")
    if other and model.portable_name(other) != model.portable_name(base):
        # One of them may be a folder of the other, so it is no fault by itself.
        say(f"Note: {folder} was trained on {other}; here it goes on with {base}.")
    if deployed and tasks.build(cfg).refers:
        raise UserError(
            f"model.adapter={folder} with task._target_={cfg.task._target_}: the adapter is what "
            "answers are compared with, and nodes do not have that folder. Merge it into the "
            "base (python -m reporting.export --merge), and give that as model.name."
        )
    part = sharing.build(cfg.sharing)
    if deployed and (part.own(names) or part.lasts(names)):
        raise UserError(
            f"model.adapter={folder} with sharing._target_={cfg.sharing._target_}: nodes make "
            "what they are not sent from the seed, and do not have that folder. Take "
            "sharing=all and no sharing.stays."
        )


def check_ranks(cfg: Settings, deployed: bool) -> None:
    """That clients of the ranks in `strategy.ranks` can be there, if it gives any."""
    import model

    if not (ranks := cfg.strategy.get("ranks")):
        return
    key = f"strategy.ranks={spelt(ranks)}"
    if deployed:
        raise UserError(
            f"{key}: in a federation a node's rank is its own setting, --node-config rank=8. "
            "Set strategy.ranks=null."
        )
    highest = model.highest_rank(cfg.peft)
    if max(ranks) > highest:
        raise UserError(
            f"{key}: the run's adapter has rank {highest}, and no client has more. Raise "
            f"model.lora.peft_lora_r to {max(ranks)}."
        )
    start = cfg.peft.get("init_lora_weights", True)
    if start not in (True, False, "gaussian") or cfg.peft.get("lora_bias"):
        raise UserError(
            f"{key}: clients of different ranks would begin with different bases, or biases, "
            "with these settings of peft. Set peft.init_lora_weights=true and no lora_bias."
        )


def check_tokenizer(name: str, tokenizer: Any, rows: int, prompt: list[int]) -> None:
    """That the base has an embedding for what its tokenizer writes.

    `rows`: of the embedding; `prompt`: the token ids of an empty question, if one is asked. Tokens that were
    added to the vocabulary may lie beyond, as Gemma 3's for images: only a text that spells
    one out would have it.
    """
    if prompt and tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name={name}: its tokenizer has no eos_token, with which an answer is to "
            "end. Set one in its tokenizer_config.json."
        )
    highest = {
        "eos_token": tokenizer.eos_token_id or 0,
        "bos_token": tokenizer.bos_token_id or 0,
        "vocabulary": tokenizer.vocab_size - 1,
        "template": max(prompt, default=0),
    }
    for what, token in highest.items():
        if token >= rows:
            raise UserError(
                f"model.name={name}: the {what} of its tokenizer has token {token}, and the "
                f"base has {rows} (0 to {rows - 1}). Tokens were added, or the tokenizer is "
                "another model's: take the one that belongs to it, or save the base after "
                "resize_token_embeddings(len(tokenizer))."
            )


def check_canaries(cfg: Settings, tokenizer: Any) -> None:
    """That the canaries, if there are any, fit the records' columns and are not cut."""
    import dataset
    from records import canaries, templates

    template, length = cfg.dataset.template, cfg.train.seq_length
    made = canaries.draw(cfg.audit.canaries, cfg.num_clients, cfg.seed)
    key = f"audit.canaries={cfg.audit.canaries}"
    for one in made:
        example = templates.encode(one.record(), template, tokenizer, length)
        if example is None or templates.is_cut(example, template, tokenizer):
            raise UserError(
                f"{key}: a canary is longer than train.seq_length={length} tokens. Raise it."
            )
    for one in [one for one in made if one.planted][:1]:
        try:
            dataset.training_rows(cfg, one.partition)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{key}: a canary is text, and the columns of the records take none "
                f"({error}). Set audit.canaries=0."
            ) from error


def check_search(cfg: Settings, searched: Collection[str]) -> None:
    """That a search has something to try, and is led by records that clients hold back.

    `cfg` is a run's, without what is `searched`.
    """
    from server import runs

    metric = cfg.optimized_metric
    held_out = [
        name
        for name in runs.Summary.__annotations__
        if name.startswith("eval_") and not name.endswith("_before")
    ]
    if not searched:
        raise UserError(
            "hydra.sweeper.params: nothing is searched. Give a setting a range: "
            "'train.learning_rate_max=tag(log,interval(1e-5,1e-1))'"
        )
    if "num_rounds" in searched:
        raise UserError(
            "num_rounds cannot be searched: hydra.sweeper.rungs are parts of it. Give one number."
        )
    if metric not in held_out:
        raise UserError(
            f"optimized_metric={metric}: a search is led by what clients hold back, never by "
            f"the test questions, nor by what was trained on. Take one of {', '.join(held_out)}."
        )
    if not cfg.strategy.fraction_evaluate:
        raise UserError(
            "strategy.fraction_evaluate=0 in a search: no client would hold anything back for "
            "it. Set strategy.fraction_evaluate=1."
        )
    if privacy.build(cfg.privacy).adjacency:
        raise UserError(
            f"privacy._target_={cfg.privacy._target_} in a search: each trial would spend a "
            "budget of its own, on the same records. Search on records that need none, with "
            "privacy=none."
        )
    if cfg.resume:
        raise UserError(
            f"resume={cfg.resume} in a search: its trials begin anew, and a search that was "
            "stopped goes on by its own command. Leave resume out."
        )
    if cfg.dry_run:
        raise UserError(
            "dry_run=true in a search: it would plan the same run for each trial. Plan one: "
            "add hydra.mode=RUN."
        )


def check_progress(cfg: Settings, folder: Path) -> None:
    """That what a run has left in `folder` can be read, fits, and is not all of it."""
    import model
    from methods.base import adapters
    from server import checkpoint, runs

    if (newest := checkpoint.newest(folder)) is None:
        return
    state, done = checkpoint.read(newest)[:2]
    runs.read_history(folder, done)
    frame = model.skeleton(cfg.model, cfg.peft)
    expected = {n: p for n, p in frame.named_parameters() if p.requires_grad}
    for adapter in adapters(state).values():
        if fault := wire.mismatch(adapter, expected):
            raise UserError(
                f"resume={folder}: {newest} does not fit the base: {fault}."
            )
    if cfg.num_rounds < done:
        raise UserError(
            f"resume={folder}: {done} rounds are done, and num_rounds="
            f"{cfg.num_rounds}. Set num_rounds={done} or more."
        )
