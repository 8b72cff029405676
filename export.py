"""Share a trained adapter: a folder with a model card, for the hub and for servers.

python export.py --peft-path=outputs/.../peft_100            # the adapter, as it is
python export.py --peft-path=outputs/.../peft_100 --merge    # a model of its own

An adapter needs its base beside it (PEFT, vLLM's LoRA flag); a merged model stands alone
(transformers, vLLM, llama.cpp).
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils

if TYPE_CHECKING:  # seconds, which --help need not take
    from transformers import GenerationConfig, PreTrainedTokenizerBase

QUESTION = (
    "What is the capital of France?"  # for the card; the run's own may be private
)
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "flwr")


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
    utils.quiet()
    utils.offline_if_unreachable()
    try:
        folder = export(options)
    except (utils.UserError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
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
    from transformers import AutoTokenizer

    import model

    about = model.read_about(options.peft_path)
    source = Path(options.peft_path).resolve()
    kind = "merged" if options.merge else "adapter"
    folder = Path(options.out or source.with_name(f"{kind}_{about['round']}"))
    if folder.exists():
        raise utils.UserError(
            f"{folder} exists already. Remove it, or name another folder: --out=..."
        )
    device = model.chosen_device(options.device)
    settings = _read(source / "adapter_config.json")
    if "peft_type" not in settings:
        raise utils.UserError(f"{source}/adapter_config.json names no peft_type.")
    merged = model.merge(str(source), about, device) if options.merge else None
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)

    base = about["model"]["name"]
    about["model"]["name"] = settings["base_model_name_or_path"] = public(base)
    card = Card(
        name=folder.name,
        merged=options.merge,
        license=options.license,
        about=about,
        settings=settings,
        tokenizer=tokenizer,
        run=source.parent,
        local=utils.local_path(base) is not None or public(base) != base,
    )
    with utils.commit(folder) as temporary:
        if merged:
            end_with(merged.generation_config, tokenizer)
            merged.save_pretrained(temporary)
        else:
            shutil.copy(source / "adapter_model.safetensors", temporary)
            utils.write_json(temporary / "adapter_config.json", settings)
            utils.write_json(temporary / model.ABOUT, about)
        save_tokenizer(tokenizer, temporary)
        (temporary / "README.md").write_text(card.text())
    return folder


def end_with(
    generation: "GenerationConfig", tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Have answers end where training ended them, if the base's own settings do not."""
    ends = generation.eos_token_id
    if tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        generation.eos_token_id = tokenizer.eos_token_id


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write a tokenizer that transformers 4 reads as well, which servers may still have."""
    tokenizer.save_pretrained(folder)
    config = _read(folder / "tokenizer_config.json")
    for name in ("is_local", "local_files_only"):  # how it was loaded here
        config.pop(name, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # known to both
    utils.write_json(folder / "tokenizer_config.json", config)


def public(name: str) -> str:
    """`name`, or the last part of it where it is a path outside of the project."""
    import model

    path = Path(model.portable_name(name)).expanduser()
    return path.name if path.is_absolute() else str(path)


# --- the model card -----------------------------------------------------------------------


@dataclass
class Card:
    """What was trained, on what, how well it does, and how it is used."""

    name: str  # of the folder
    merged: bool
    license: str | None
    about: dict[str, Any]  # the adapter's flowertune.json
    settings: dict[str, Any]  # its adapter_config.json
    tokenizer: "PreTrainedTokenizerBase"
    run: Path  # the run's folder, whose figures are taken as far as they are there
    local: bool  # the base is a folder on this machine

    def __post_init__(self) -> None:
        import dataset

        self.base = self.about["model"]["name"]
        self.bits = self.about["model"]["quantization"]
        self.template = self.about["template"]
        self.method = self.settings["peft_type"]
        if self.method == "LORA":
            dora, rslora = (self.settings.get(f"use_{x}") for x in ("dora", "rslora"))
            self.method = "DoRA" if dora else "rsLoRA" if rslora else "LoRA"
        self.cfg = _config(self.run)
        self.mode = self.cfg.get("mode", "federated") if self.cfg else None
        question = {"instruction": QUESTION, "input": ""}
        self.prompt = dataset.TEMPLATES[self.template]([question], self.tokenizer)

    def text(self) -> str:
        """The whole of README.md."""
        parts = (
            self.front_matter(),
            f"# {Path(self.base).name}, fine-tuned with llm-flowertune",
            *self.notes(),
            "## Training",
            _table([("", ""), *self.training()]),
            *self.evaluation(),
            "## Prompt",
            f"It was trained with the template `{self.template}`, and ends an answer with "
            f"`{self.tokenizer.eos_token}`. Ask it in the same words:",
            f"```text\n{self.prompt}\n```",
            "## Use",
            "From the folder that holds this one:",
            _code("python", *self.python()),
            *(self.serve_merged() if self.merged else self.serve_adapter()),
        )
        return "\n\n".join(parts) + "\n"

    def front_matter(self) -> str:
        """The YAML that the hub reads."""
        from huggingface_hub import ModelCardData

        data = self.cfg["dataset"]["name"] if self.cfg else None
        tags = ["federated-learning"] if self.mode == "federated" else []
        fields = ModelCardData(
            base_model=self.base,
            base_model_relation="finetune" if self.merged else "adapter",
            datasets=[data] if data and not utils.local_path(data) else None,
            library_name="transformers" if self.merged else "peft",
            license=self.license,
            pipeline_tag="text-generation",
            tags=[*tags, "flower", self.method.lower()],
        )
        missing = "" if self.license else "\n# license: still to be stated"
        return f"---\n{fields.to_yaml()}{missing}\n---"

    def notes(self) -> Iterator[str]:
        """What is left to do before it is shared."""
        if not self.license:
            yield (
                "> **No licence is stated yet.** Whoever shares this states one, as "
                "`license:` at the top, within what the licences of the base and of the "
                "data allow."
            )
        if self.local:
            places = "" if self.merged else ", `adapter_config.json` and the commands"
            yield (
                f"> **The base, `{self.base}`, was a folder on one machine.** The name by "
                f"which others find it belongs into `base_model:` at the top{places}."
            )

    def training(self) -> Iterator[tuple[str, Any]]:
        """The rows of a table."""
        bits = {4: "in 4 bits (nf4, doubly quantised)", 8: "in 8 bits (LLM.int8)"}
        yield "base", f"{self.base}, {bits.get(self.bits, 'not quantised')}"
        shape = ("r", "lora_alpha", "lora_dropout", "num_virtual_tokens")
        parts = [f"{k} {self.settings[k]}" for k in shape if k in self.settings]
        if modules := self.settings.get("target_modules"):
            named = [modules] if isinstance(modules, str) else sorted(modules)
            parts.append(f"on {', '.join(named)}")
        yield "method", ", ".join([self.method, *parts])
        if self.cfg:
            data = self.cfg["dataset"]
            yield "data of the run", public(str(data["path"] or data["name"]))
            yield "partitioner", _class(self.cfg["partitioner"])
            yield "mode", self.mode
            yield "clients", self.cfg["num_clients"]
        if entry := self.history():
            yield "clients a round", entry["sampled"]
        yield "rounds", self.about["round"]
        if self.cfg:
            yield "strategy", _class(self.cfg["strategy"])
        if commit := utils.git_commit():
            yield "commit of llm-flowertune", commit
        yield (
            "exported with",
            ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        )

    def history(self) -> dict[str, Any]:
        """The round that made this adapter, as `history.json` tells of it."""
        rounds = _read(self.run / "history.json").get("rounds", [])
        return next((e for e in rounds if e["round"] == self.about["round"]), {})

    def evaluation(self) -> Iterator[str]:
        """A table of all figures that there are of this round, beside the base's."""
        figures = {
            name: ("", value)
            for name, value in self.history().items()
            if name.startswith(("train_", "eval_", "test_")) and type(value) is float
        }
        summary = _read(self.run / "summary.json")
        if summary.get("rounds") == self.about["round"]:  # it tells of the last alone
            for name in [key.removesuffix("_after") for key in summary]:
                if f"{name}_before" in summary:
                    figures[name] = summary[f"{name}_before"], summary[f"{name}_after"]
        if not figures:
            return
        yield "## Evaluation"
        tested = [x for x in figures if not x.startswith(("train_", "eval_"))]
        questions = self.cfg and self.cfg["dataset"]["test_path"]
        if tested and questions:
            yield f"The test questions are those of `{public(questions)}`."
        rows = [
            (name.replace("_", " "), *(x if x == "" else f"{x:.4g}" for x in pair))
            for name, pair in figures.items()
        ]
        yield _table([("", "base", "tuned"), *rows])

    def python(self) -> Iterator[str]:
        """Lines of code that ask the question of the example."""
        folder = f"./{self.name}"
        quantised = {
            4: 'load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            "bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16",
            8: "load_in_8bit=True",
        }.get(self.bits)
        names = "AutoModelForCausalLM, AutoTokenizer"
        if self.merged:
            yield f"from transformers import {names}"
            yield ""
            load = f'"{folder}", device_map="auto"'
            yield f"model = AutoModelForCausalLM.from_pretrained({load})"
        else:
            yield "import torch"
            yield "from peft import PeftModel"
            load = f'"{self.base}", dtype=torch.bfloat16, device_map="auto"'
            if quantised:
                names += ", BitsAndBytesConfig"
                load += ", quantization_config=quantised"
            yield f"from transformers import {names}"
            yield ""
            if quantised:
                yield f"quantised = BitsAndBytesConfig({quantised})"
            yield f"base = AutoModelForCausalLM.from_pretrained({load})"
            yield f'model = PeftModel.from_pretrained(base, "{folder}")'
        yield f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
        yield f"prompt = {self.prompt!r}"
        # A chat template writes its own beginning of sequence.
        more = ", add_special_tokens=False" if self.template == "chat" else ""
        yield f'ids = tokenizer(prompt, return_tensors="pt"{more}).input_ids'
        yield "ids = ids.to(model.device)"
        yield "answer = model.generate(ids, max_new_tokens=64, do_sample=False)[0]"
        yield "print(tokenizer.decode(answer[ids.shape[1]:], skip_special_tokens=True))"

    def serve_merged(self) -> Iterator[str]:
        folder = f"./{self.name}"
        yield (
            "The weights are the base's as it was in training, with the adapter added, in "
            "float32. `dtype=torch.bfloat16` halves the memory, and may turn an answer "
            "where two words are next to equally likely."
        )
        yield "With vLLM, or transformers (`pip install 'transformers[serving]'`):"
        yield _code("bash", f"vllm serve {folder} --dtype bfloat16")
        yield _code("bash", f"transformers serve {folder}")
        yield from self.request(folder)
        yield "With llama.cpp, from its own folder:"
        convert = f"python convert_hf_to_gguf.py /path/to/{self.name} --outtype bf16"
        yield _code(
            "bash",
            f"{convert} --outfile {self.name}.gguf",
            f"llama-server -m {self.name}.gguf",
        )

    def serve_adapter(self) -> Iterator[str]:
        import model

        merge = "llm-flowertune's `python export.py --merge` makes one."
        if not model.mergeable(self.settings["peft_type"]):
            yield f"{self.method} is for PEFT alone: vLLM and llama.cpp do not take it."
            return
        if self.method not in ("LoRA", "rsLoRA"):
            yield f"vLLM and llama.cpp need a merged model for {self.method}: {merge}"
            return
        rank = next((r for r in RANKS if r >= self.settings["r"]), self.settings["r"])
        command = f"vllm serve {self.base} --enable-lora --max-lora-rank {rank}"
        command += f" --lora-modules {self.name}=./{self.name}"
        if self.bits == 4:
            command += " --quantization bitsandbytes"
        if self.bits == 8:
            yield "vLLM does not quantise to 8 bits, as training did: answers may differ."
        yield "With vLLM, if it has LoRA for the base's architecture:"
        yield _code("bash", command)
        yield from self.request(self.name)
        yield f"llama.cpp and `transformers serve` need a merged model: {merge}"

    def request(self, name: str) -> Iterator[str]:
        """The question of the example, put to a server."""
        body: dict[str, Any] = {"model": name, "max_tokens": 64, "temperature": 0}
        path = "completions"
        if self.template == "chat":
            path = "chat/completions"
            body["messages"] = [{"role": "user", "content": QUESTION}]
        else:
            body["prompt"] = self.prompt
            yield (
                "Ask it by `/v1/completions`, with the whole prompt. A chat endpoint would "
                "put the question in other words than it was trained with."
            )
        yield _code(
            "bash",
            f"curl http://localhost:8000/v1/{path} -H 'Content-Type: application/json' "
            f"-d {shlex.quote(json.dumps(body))}",
        )


def _config(run: Path) -> dict[str, Any]:
    """The run's configuration, or nothing where there is none."""
    from omegaconf import OmegaConf

    path = run / ".hydra/config.yaml"
    if not path.is_file():
        return {}
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # whatever YAML and OmegaConf make of a broken file
        raise utils.UserError(f"{path} is broken: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's content, or nothing where there is none."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise utils.UserError(f"{path} is broken: {error}") from error


def _class(settings: dict[str, Any]) -> str:
    return settings["_target_"].rpartition(".")[2]


def _table(rows: Iterable[tuple[Any, ...]]) -> str:
    header, *rows = (f"| {' | '.join(map(str, row))} |" for row in rows)
    return "\n".join([header, "|---" * (header.count("|") - 1) + "|", *rows])


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


if __name__ == "__main__":
    main()
