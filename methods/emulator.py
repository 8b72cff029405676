"""Offsite-tuning (arXiv 2302.04870): clients train on a lighter stand-in for a base.

    python -m methods.emulator --base FOLDER --keep 2 --drop 0.5 --distil data.jsonl OUT

OUT is a base as any other: the first and last `keep` layers of FOLDER whole, of those between
a share left out, the others trained to do the work of all. Its config.json holds, as
`emulator`, the map of layers by name; with `peft=outer` an adapter is for whole layers alone,
and by that map it is plugged into the base. Needs torch, transformers and safetensors alone.
"""

import argparse
import copy
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import mse_loss

import utils
from utils import UserError

OUTER = "emulated"  # peft.exclude_modules: what stands for other layers than itself

# FS-LLM's (federatedscope/llm/offsite_tuning): of the hidden states' loss, and of the text's.
HIDDEN, TEXT = 0.9, 0.1

LARGEST_MAP = 4096  # layers


# --- the map -------------------------------------------------------------------------------


def read(told: Any) -> dict[str, Any] | None:
    """The map of names in a base's settings, or beside an adapter; None if there is none.

    `of`: the digest of the base's weights. `outer`: each whole layer of the emulator, and the
    base's that it is. `emulated`: each other one, and the base's that it began as. Raises
    `ValueError` for what is no such map.
    """
    if told is None:
        return None
    fits = isinstance(told, dict) and told.keys() == {"of", "outer", "emulated"}
    fits = fits and isinstance(told["of"], str) and len(told["of"]) == 64
    for part in ("outer", "emulated") if fits else ():
        names = told[part]
        fits = fits and isinstance(names, dict) and 1 <= len(names) <= LARGEST_MAP
        fits = fits and len({*names.values()}) == len(names)
        for name in [*names, *names.values()] if fits else ():
            fits = fits and isinstance(name, str) and re.fullmatch(r"[\w.]+\.\d+", name)
    if not fits:
        raise ValueError("its map of an emulator's layers is broken")
    return told


def inner(layers: Sequence[str]) -> str:
    """A pattern of all modules in the same list of layers as these, theirs left out."""
    path = layers[0].rpartition(".")[0]
    whole = "|".join(name.rpartition(".")[2] for name in layers)
    return rf"{re.escape(path)}\.(?!({whole})\.)\d+\..*"


def excluded(config: Any) -> str:
    """What `peft.exclude_modules=emulated` means on the base of this configuration.

    Raises `UserError` where it is no emulator.
    """
    told = read(getattr(config, "emulator", None))
    if told is None:
        raise UserError(
            f"peft.exclude_modules={OUTER} (peft=outer): the base is no emulator, its "
            "config.json has no map. Make one with python -m methods.emulator, or take peft=lora."
        )
    return inner([*told["outer"]])


def found(base: str) -> Path:
    """The folder of a base's files, which `base` names here or on the hub.

    Raises `UserError` where there is neither.
    """
    from transformers.utils import cached_file

    try:
        return utils.local_path(base) or Path(cached_file(base, "config.json")).parent
    except Exception as error:  # the hub's, for a name that is none, too
        raise UserError(
            f"{base} is neither a folder here nor reachable on the hub: {utils.one_line(error)}"
        ) from error


def digest(folder: Path) -> str:
    """SHA-256 of a base's weights by name, however they are dealt out to files.

    Raises `UserError` where there are none.
    """
    each: dict[str, str] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no dict)
                flat = weights.get_tensor(name).flatten().view(torch.uint8)
                each[name] = hashlib.sha256(flat.numpy()).hexdigest()
    if not each:
        raise UserError(f"{folder} holds no .safetensors file.")
    return hashlib.sha256(json.dumps(sorted(each.items())).encode()).hexdigest()


# --- an adapter, plugged into the base -------------------------------------------------------


def plug(adapter: Path, told: Any, full: Path, out: Path) -> None:
    """Write PEFT's two files of an emulator's adapter into `out` as the base `full` takes them.

    Each tensor goes, by name, to the layer that the map `told` names. Raises `ValueError` for
    an adapter that is none of an emulator's whole layers, and for another base than the one
    that the emulator was made of.
    """
    if (told := read(told)) is None:
        raise ValueError("it was trained on a whole base, and is plugged into no other")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    state = load_file(adapter / "adapter_model.safetensors")
    others = inner([*told["outer"]])
    lost = any(re.search(rf"(?<![^.]){others}", name) for name in state)
    if lost or settings.get("exclude_modules") != others:
        raise ValueError(
            "it was trained on layers that the base does not have: take peft=outer"
        )
    if settings.get("alpha_pattern"):
        raise ValueError("its alpha_pattern names layers in a way that no map reads")
    if digest(full) != told["of"]:
        raise ValueError(f"its emulator was made of another base than {full}")
    whole = "|".join(map(re.escape, told["outer"]))
    layer = re.compile(rf"(?<![^.])({whole})(?=\.)")

    def renamed(name: str) -> str:
        return layer.sub(lambda found: told["outer"][found[1]], name, count=1)

    settings["exclude_modules"] = inner([*told["outer"].values()])
    if isinstance(targets := settings.get("target_modules"), list):
        settings["target_modules"] = sorted(map(renamed, targets))
    utils.write_json(out / "adapter_config.json", settings)
    moved = {renamed(name): tensor for name, tensor in state.items()}
    save_file(moved, out / "adapter_model.safetensors", metadata={"format": "pt"})


# --- the emulator ----------------------------------------------------------------------------


def shortened(config: Any, places: Sequence[int]) -> Any:
    """The same configuration, of these of its layers alone."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:  # one entry a layer
            setattr(text, name, [value[place] for place in places])
    text.num_hidden_layers = len(places)
    return config


def list_of(base: torch.nn.Module) -> str:
    """The name of a causal model's list of layers. Raises `UserError` where not one is plain."""
    count = base.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == count
        and len({type(layer) for layer in module}) == 1
    ]
    outermost = [
        name
        for name in found
        if not any(name.startswith(f"{other}.") for other in found)
    ]
    if len(outermost) != 1:
        raise UserError(
            f"--base: {type(base).__name__} has no plain list of {count} layers of one kind. "
            "Take another base."
        )
    return outermost[0]


def chosen(layers: int, keep: int, drop: float) -> list[int]:
    """Which of a base's layers are kept: the outer ones, and a share of the others evenly.

    Raises `UserError` where that is all of the middle or none.
    """
    middle = layers - 2 * keep
    left = round(middle * (1 - drop))
    if not 0 < left < middle:
        raise UserError(
            f"--keep={keep} --drop={drop}: of {layers} layers {max(middle, 0)} are between the "
            f"outer ones, and {max(left, 0)} would be left of them. At least one has to be "
            "left, and one left out."
        )
    step = (middle - 1) / max(left - 1, 1)
    start = 0 if left > 1 else (middle - 1) / 2
    inside = [keep + int(start + i * step + 0.5) for i in range(left)]
    return [*range(keep), *inside, *range(layers - keep, layers)]


def student(base: Any, path: str, places: Sequence[int], keep: int) -> Any:
    """`base` with these layers alone: the outer ones and all else are its own tensors, the
    middle ones are copies in float32."""
    config = shortened(base.config, places)
    layers = base.get_submodule(path)
    inside = {places[i] for i in range(keep, len(places) - keep)}
    copied = {
        id(tensor)
        for place in inside
        for tensor in [*layers[place].parameters(), *layers[place].buffers()]
    }
    memo = {
        id(tensor): tensor
        for tensor in [*base.parameters(), *base.buffers()]
        if id(tensor) not in copied
    }
    # One object for all parts, as in `base`, or two where the text has its own.
    memo[id(base.config.get_text_config(decoder=True))] = config.get_text_config(
        decoder=True
    )
    memo[id(base.config)] = config
    made = copy.deepcopy(base, memo)
    whole = made.get_submodule(path)
    made.set_submodule(path, torch.nn.ModuleList([whole[place] for place in places]))
    for layer in made.get_submodule(path)[keep : len(places) - keep]:
        layer.float().requires_grad_(True)
    return made


class Entry:
    """What comes into a layer, (rows, length, width), as of the model's last pass."""

    states: torch.Tensor

    def __init__(self, layer: torch.nn.Module) -> None:
        layer.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _: Any, args: Any, kwargs: Any) -> None:
        self.states = args[0] if args else kwargs["hidden_states"]


def distil(
    teacher: Any,
    made: Any,
    entries: tuple[Entry, Entry],
    batches: Iterator[torch.Tensor],
    steps: int,
    rate: float,
) -> None:
    """Train the student's middle to hand to the last layers what the teacher's does.

    The loss: 0.9 of the squared distance of hidden states, over the teacher's mean square, and
    0.1 of the text's (nats a token). AdamW, the rate by a cosine to 0. `batches`: token ids,
    (rows, length). Raises `UserError` where it diverges.
    """
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    gpu = made.device.type == "cuda"
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = utils.cosine(step + 1, steps, rate, 0.0)
        ids = next(batches).to(made.device)
        with torch.autocast(made.device.type, torch.bfloat16, enabled=gpu):
            with torch.no_grad():
                teacher(input_ids=ids, use_cache=False)
            text = made(input_ids=ids, labels=ids, use_cache=False).loss
        wanted, got = (entry.states.float() for entry in entries)
        hidden = mse_loss(got, wanted) / wanted.square().mean()
        (HIDDEN * hidden + TEXT * text).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(
                f"step {step + 1}: hidden {hidden.item():.4f}, text {text.item():.4f}"
            )
            if not (hidden + text).isfinite():
                raise UserError(
                    f"--distil: the loss is no number after {step + 1} steps. Take a lower "
                    f"--learning-rate than {rate:g}."
                )


def texts(path: str) -> list[str]:
    """A line's words: the values of its record that are text, a line each."""
    found = []
    for number, line in enumerate(utils.read_text(Path(path)).splitlines(), 1):
        try:
            record = json.loads(line)
            words = [v for v in record.values() if isinstance(v, str) and v.strip()]
            found.append("\n".join(words))
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"--distil={path}: line {number} is no record in JSON."
            ) from error
    return found


def pieces(
    given: Sequence[str], tokenizer: Any, rows: int, length: int, seed: int
) -> Iterator[torch.Tensor]:
    """Token ids (rows, length) without end: the texts one after another, cut and shuffled."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [
        token
        for start in range(0, len(given), 1000)
        for one in tokenizer(given[start : start + 1000])["input_ids"]
        for token in [*one, *end]
    ]
    cut = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if len(cut) < rows:
        raise UserError(
            f"--distil: {len(ids)} tokens, and a batch takes {rows} x {length}. Give more text, "
            "or a smaller --batch-size or --seq-length."
        )
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(cut), generator=generator)
        yield from (
            cut[order[at : at + rows]] for at in range(0, len(cut) - rows + 1, rows)
        )


@torch.no_grad()
def same(one: Any, other: Any) -> bool:
    """Whether two models make the same of 2 x 64 tokens, but for rounding."""
    ids = torch.arange(4, 132, device=one.device).view(2, 64)
    ids = ids % one.get_input_embeddings().weight.shape[0]
    made = [net(input_ids=ids, use_cache=False).logits.float() for net in (one, other)]
    return bool((made[0] - made[1]).abs().max() <= 1e-3 * made[1].abs().max())


def make(options: argparse.Namespace) -> dict[str, Any]:
    """Write the emulator that the command line asks for; its map.

    Raises `UserError` for what cannot be one, before anything is trained.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = Path(options.out)
    if out.exists():
        raise UserError(f"{out} exists already. Remove it, or name another folder.")
    folder = found(options.base)
    source = str(utils.local_path(options.base) or options.base)
    given = texts(options.distil) if options.distil else []
    device = torch.device(
        options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    try:
        base = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever the libraries make of a broken folder
        raise UserError(f"--base={options.base}: {utils.one_line(error)}") from error
    stored = base.dtype
    base.to(device, torch.float32 if device.type == "cpu" else stored)
    base.eval().requires_grad_(False)
    path, keep = list_of(base), options.keep
    text = base.config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", None) or options.seq_length
    if options.distil and options.seq_length > most:
        raise UserError(
            f"--seq-length={options.seq_length}: the base takes {most} tokens at most."
        )
    layers = base.get_submodule(path)
    places = chosen(len(layers), keep, options.drop)
    made = student(base, path, places, keep)
    if options.distil:
        batches = pieces(
            given, tokenizer, options.batch_size, options.seq_length, options.seed
        )
        entries = Entry(layers[-keep]), Entry(made.get_submodule(path)[-keep])
        distil(base, made, entries, batches, options.steps, options.learning_rate)
    names = {f"{path}.{i}": f"{path}.{place}" for i, place in enumerate(places)}
    inside = {f"{path}.{i}" for i in range(keep, len(places) - keep)}
    told = {
        "of": digest(folder),
        "outer": {name: of for name, of in names.items() if name not in inside},
        "emulated": {name: of for name, of in names.items() if name in inside},
    }
    made.config.emulator = told
    for weight in made.requires_grad_(False).parameters():
        weight.data = weight.data.to(stored)  # buffers are not stored, nor rounded
    with utils.commit(out) as temporary:
        made.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        # Where a layer's place decides what it does, it does something else in another one.
        written = AutoModelForCausalLM.from_pretrained(temporary, use_safetensors=True)
        if not same(made.float(), written.eval().to(device, torch.float32)):
            raise UserError(
                f"--base={options.base}: a layer of {type(base).__name__} is another one in "
                "another place. Take another base."
            )
    return told


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m methods.emulator",
        description="Write a lighter base for clients to train on, made of one they do not get.",
    )
    parser.add_argument("out", help="the new folder")
    parser.add_argument("--base", required=True, help="a folder, or a name of the hub")
    parser.add_argument(
        "--keep",
        type=utils.positive,
        default=2,
        help="layers at either end that stay whole",
    )
    parser.add_argument(
        "--drop", type=float, default=0.5, help="share of the others that is left out"
    )
    parser.add_argument(
        "--distil",
        help="public text, a JSON record a line, on which those that are left learn the work "
        "of all (default: they stay as they are)",
    )
    parser.add_argument("--steps", type=utils.positive, default=500)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=utils.positive, default=8)
    parser.add_argument(
        "--seq-length", type=utils.positive, default=512, help="in tokens"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the text")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU, if any)")
    options = parser.parse_args(arguments)
    if not 0 < options.drop < 1:
        parser.error("--drop must be between 0 and 1")
    if not options.learning_rate > 0:
        parser.error("--learning-rate must be above 0")
    return options


def main() -> None:
    options = parse()
    with utils.as_command():
        told = make(options)
    kept = ", ".join(f"{name} is {of}" for name, of in told["outer"].items())
    print(f"Written: {options.out}. Whole: {kept}. Train on it with peft=outer.")


if __name__ == "__main__":
    main()
