"""Share a trained adapter: a folder with a model card, for the hub and for servers.

python -m reporting.export --peft-path=outputs/.../peft_100            # the adapter, as it is
python -m reporting.export --peft-path=outputs/.../peft_100 --merge    # a model of its own
python -m reporting.export --peft-path=outputs/.../personal/client_3   # one client's adapter
python -m reporting.export --peft-path=outputs/.../peft_100 --full=<base>   # an emulator's

An adapter needs its base beside it (PEFT, vLLM's LoRA flag); a merged model stands alone
(transformers, vLLM, llama.cpp).
"""

import argparse
import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired

from typing_extensions import TypedDict

import utils
from server import runs
from utils import public

if TYPE_CHECKING:  # seconds, which --help need not take
    from transformers import GenerationConfig, PreTrainedTokenizerBase


@runs.typed
class Settings(TypedDict):
    """What is read of an `adapter_config.json` that may be a stranger's."""

    peft_type: str
    task_type: NotRequired[str | None]
    r: NotRequired[int]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Write a trained adapter into a folder to share, with a model card."
    )
    parser.add_argument("--peft-path", required=True, help="an adapter: .../peft_100")
    parser.add_argument(
        "--merge", action="store_true", help="add it to the base: one plain model"
    )
    parser.add_argument(
        "--full",
        help="of an adapter of an emulator (methods.emulator): the base to plug it into",
    )
    parser.add_argument(
        "--out", help="the new folder (default: adapter_100 or merged_100 beside it)"
    )
    parser.add_argument(
        "--license", help="for the model card, as the hub names it: apache-2.0, ..."
    )
    parser.add_argument(
        "--device", help="where --merge quantises the base (default: the GPU, if any)"
    )
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    with utils.as_command():
        folder = export(options)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"Written: {folder} ({size / 1e6:.1f} MB), with a model card, README.md.")
    if not options.license:
        print("Its `license:` is still to be stated, there or with --license.")
    print(f"Share it: hf upload <you>/<name> {folder}")


def export(options: argparse.Namespace) -> Path:
    """Write the folder that the command line asks for, whole or not at all.

    Returns its path. Raises `UserError` for a folder that is there already, for what is no
    adapter, and with `--merge` for a method that no weight of the base can take up.
    """
    # Imported here, so that --help and a mistyped option answer at once.
    import model

    with model.plugged(options.peft_path, options.full) as read:
        return _export(options, Path(read).resolve())


def _export(options: argparse.Namespace, read: Path) -> Path:
    """Likewise, of the adapter as it is in the folder `read`."""
    from transformers import AutoTokenizer, GenerationConfig

    import model
    from records import templates
    from reporting.card import HUB_NAME, Card

    about = model.read_about(str(read))
    source = Path(options.peft_path).resolve()
    kind = "merged" if options.merge else "adapter"
    # <run>/peft_100, or <run>/personal/client_3.
    own = source.name if source.parent.name == runs.PERSONAL else None
    folder = Path(options.out or source.with_name(f"{kind}_{own or about['round']}"))
    if folder.exists():
        raise utils.UserError(
            f"{folder} exists already. Remove it, or name another folder: --out=..."
        )
    device = model.chosen_device(options.device)
    path = read / "adapter_config.json"
    settings = runs.fit(utils.read_json(path), Settings, path)
    base = str(about["model"]["name"])
    if not utils.local_path(base) and not HUB_NAME.fullmatch(public(base)):
        raise utils.UserError(
            f"{source}/{model.ABOUT}: the base is neither a folder here nor a name of the hub."
        )
    if not (public(base) + folder.name).isprintable():
        raise utils.UserError(
            f"{folder.name!r}, or the base's name, holds control characters: rename it."
        )
    tokenizer = AutoTokenizer.from_pretrained(read, trust_remote_code=False)
    asked = (settings.get("task_type") or "CAUSAL_LM") == "CAUSAL_LM"
    if asked:  # older adapters carry their base's
        template = templates.chat_template(about["template"], tokenizer)
        tokenizer.chat_template = template

    adapter = copy.deepcopy(about)  # as it names its base on this machine
    about["model"]["name"] = settings["base_model_name_or_path"] = public(base)
    card = Card(
        name=folder.name,
        merged=options.merge,
        license=options.license,
        about=about,
        settings=settings,
        tokenizer=tokenizer,
        run=source.parents[1] if own else source.parent,
        client=own,
        plugged=options.full is not None,
        local=utils.local_path(base) is not None or public(base) != base,
    )
    with utils.commit(folder) as temporary:
        if options.merge:
            model.merge(str(read), adapter, device, temporary)
            if asked:
                generation = GenerationConfig.from_pretrained(temporary)
                end_with(generation, tokenizer, about["template"])
                generation.save_pretrained(temporary)
        else:
            shutil.copy(read / "adapter_model.safetensors", temporary)
            utils.write_json(temporary / "adapter_config.json", settings)
            utils.write_json(temporary / model.ABOUT, about)
        save_tokenizer(tokenizer, temporary)
        (temporary / "README.md").write_text(card.text())
    return folder


def end_with(
    generation: "GenerationConfig", tokenizer: "PreTrainedTokenizerBase", template: str
) -> None:
    """Have answers end where training ended them, and where the base's own do."""
    from records import templates

    ends = templates.ends(template, tokenizer, generation)
    generation.eos_token_id = ends if len(ends) > 1 else ends[0]


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write a tokenizer that transformers 4 reads as well, which servers may still have."""
    tokenizer.save_pretrained(folder)
    config = utils.read_json(folder / "tokenizer_config.json")
    for name in ("is_local", "local_files_only"):  # how it was loaded here
        config.pop(name, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # known to both
    utils.write_json(folder / "tokenizer_config.json", config)


if __name__ == "__main__":
    main()
