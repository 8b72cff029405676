"""Share a trained adapter: a folder with a model card, for the hub and for servers.

python -m reporting.export --peft-path=outputs/.../peft_100            # the adapter, as it is
python -m reporting.export --peft-path=outputs/.../peft_100 --merge    # a model of its own

An adapter needs its base beside it (PEFT, vLLM's LoRA flag); a merged model stands alone
(transformers, vLLM, llama.cpp).
"""

import argparse
import copy
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

from typing_extensions import TypedDict

import utils
from server import runs
from utils import code, escape, public, table

if TYPE_CHECKING:  # seconds, which --help need not take
    from transformers import GenerationConfig, PreTrainedTokenizerBase


QUESTION = (
    "What is the capital of France?"  # for the card; the run's own may be private
)

INPUT = "Answer in one word."

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "flwr")


class Settings(TypedDict):
    """What is read of an `adapter_config.json` that may be a stranger's."""

    peft_type: str
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
    from transformers import AutoTokenizer, GenerationConfig

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
    path = source / "adapter_config.json"
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
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)

    adapter = copy.deepcopy(about)  # as it names its base on this machine
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
        if options.merge:
            model.merge(str(source), adapter, device, temporary)
            generation = GenerationConfig.from_pretrained(temporary)
            end_with(generation, tokenizer, about["template"])
            generation.save_pretrained(temporary)
        else:
            shutil.copy(source / "adapter_model.safetensors", temporary)
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
        from records import templates

        self.base = self.about["model"]["name"]
        self.bits = self.about["model"]["quantization"]
        self.template = self.about["template"]
        self.method = self.settings["peft_type"]
        if self.method == "LORA":
            dora, rslora = (self.settings.get(f"use_{x}") for x in ("dora", "rslora"))
            self.method = "DoRA" if dora else "rsLoRA" if rslora else "LoRA"
        self.cfg = runs.read(self.run, runs.CONFIG, {})
        self.mode = self.cfg.get("mode", "federated") if self.cfg else None
        self.rounds = runs.read(self.run, "history.json", {"rounds": []})["rounds"]
        self.entry = next(
            (e for e in self.rounds if e["round"] == self.about["round"]), {}
        )  # of the round that made this adapter
        fill = templates.TEMPLATES[self.template]
        question = {"instruction": QUESTION, "input": ""}
        self.prompt = fill([question], self.tokenizer)
        self.with_input = fill([question | {"input": INPUT}], self.tokenizer)
        _, end = templates.end(self.template, self.tokenizer)
        self.end = self.tokenizer.convert_ids_to_tokens(end)

    def text(self) -> str:
        """The whole of README.md. What others have written is escaped for where it stands."""
        parts = (
            self.front_matter(),
            f"# {escape(Path(self.base).name)}, fine-tuned with llm-flowertune",
            *self.notes(),
            "## Training",
            table(["", ""], self.training(), numbers=False),
            *self.evaluation(),
            "## Prompt",
            f"It was trained with the template {escape(self.template)}, and ends an answer "
            f"with {escape(self.end)}. Ask it in the same words:",
            code("text", self.prompt),
            "A record that has an input beside its instruction:",
            code("text", self.with_input),
            "## Use",
            "From the folder that holds this one:",
            code("python", *self.python()),
            *(self.serve_merged() if self.merged else self.serve_adapter()),
        )
        return "\n\n".join(parts) + "\n"

    def front_matter(self) -> str:
        """The YAML that the hub reads."""
        from huggingface_hub import ModelCardData

        data = str(self.cfg["dataset"].get("name") or "") if self.cfg else ""
        on_hub = HUB_NAME.fullmatch(data) and not utils.local_path(data)
        tags = ["federated-learning"] if self.mode == "federated" else []
        fields = ModelCardData(
            base_model=self.base,
            base_model_relation="finetune" if self.merged else "adapter",
            datasets=[data] if on_hub else None,
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
                f"> **The base, {escape(self.base)}, was a folder on one machine.** The name by "
                f"which others find it belongs into `base_model:` at the top{places}."
            )

    def training(self) -> Iterator[tuple[str, Any]]:
        """The rows of a table."""
        bits = {4: "in 4 bits (nf4, doubly quantised)", 8: "in 8 bits (LLM.int8)"}
        yield "base", f"{self.base}, {bits.get(self.bits, 'not quantised')}"
        shape = ("r", "lora_alpha", "lora_dropout", "num_virtual_tokens")
        parts = [f"{k} {self.settings[k]}" for k in shape if k in self.settings]
        if modules := self.settings.get("target_modules"):
            named = modules if isinstance(modules, list) else [modules]
            parts.append(f"on {', '.join(sorted(map(str, named)))}")
        yield "method", ", ".join([self.method, *parts])
        if self.cfg:
            yield from self.settings_of_the_run()
        if "sampled" in self.entry:
            yield "clients a round", self.entry["sampled"]
        yield "rounds", self.about["round"]
        trained = [e for e in self.rounds if e["round"] <= self.about["round"]]
        if records := runs.trained_records(trained):
            yield "records to train on", records
        if "train_loss" in self.entry:
            yield f"train loss, {runs.NATS}", f"{self.entry['train_loss']:.4g}"
        if commit := utils.git_commit():
            yield "commit of llm-flowertune", commit
        yield (
            "exported with",
            ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        )

    def settings_of_the_run(self) -> Iterator[tuple[str, Any]]:
        """Rows of the same table, from the run's configuration."""
        data, train = self.cfg["dataset"], self.cfg["train"]
        arguments = train["training_arguments"]
        yield "data of the run", public(str(data.get("path") or data.get("name")))
        yield "partitioner", _class(self.cfg["partitioner"])
        yield "mode", self.mode
        yield "clients", self.cfg["num_clients"]
        yield "strategy", _class(self.cfg["strategy"])
        rate = arguments.get("learning_rate")
        high, low = (train.get(f"learning_rate_{x}") for x in ("max", "min"))
        yield "learning rate", rate or f"{high}, by a cosine over the rounds to {low}"
        steps = arguments.get("max_steps", -1)
        passes = f"{arguments.get('num_train_epochs')} passes over its records"
        yield "a client's round", f"{steps} steps" if steps > 0 else passes
        batch = arguments.get("per_device_train_batch_size")
        more = arguments.get("gradient_accumulation_steps", 1)
        yield (
            "batch",
            f"{batch} examples" + (f", {more} times a step" if more > 1 else ""),
        )
        yield "longest example, tokens", train["seq_length"]
        yield "seed", self.cfg["seed"]
        yield "updates sent in", self.cfg["comm"]["dtype"]

    def evaluation(self) -> Iterator[str]:
        """A table of all figures that there are of this round, beside the base's."""
        figures = {
            name: ("", self.entry[name]) for name in runs.UNITS if name in self.entry
        }
        summary = runs.read(self.run, "summary.json", {})
        if summary.get("rounds") == self.about["round"]:  # it tells of the last alone
            for name in runs.UNITS:
                pair = summary.get(f"{name}_before"), summary.get(f"{name}_after")
                if None not in pair:
                    figures[name] = pair
        if not figures:
            return
        yield "## Evaluation"
        file = self.cfg and self.cfg["dataset"].get("test_path")
        if file and not all(name.startswith("eval_") for name in figures):
            count = summary.get("test_questions") or len(
                runs.read(self.run, "answers.json", [])
            )
            yield (
                f"The test questions are {f'the {count}' if count else 'those'} of "
                f"{escape(public(str(file)))}."
            )
        if held := [int(c["num-examples"]) for c in self.entry.get("eval_clients", [])]:
            yield (
                f"The rows of `eval` are of {sum(held)} records that {len(held)} clients held "
                "back from training, the means by records."
            )
        if limit := self.answer_limit(figures):
            yield f"Answers are cut at {limit} tokens."
        rows = [
            (
                name.replace("_", " "),
                *(x if x == "" else f"{x:.4g}" for x in pair),
                runs.UNITS[name],
            )
            for name, pair in figures.items()
        ]
        yield table(["", "base", "tuned", "unit"], rows, numbers=False)

    def answer_limit(self, figures: dict[str, Any]) -> Any:
        evaluate = self.cfg.get("evaluate", {})
        return evaluate.get("max_new_tokens") if "exact_match" in figures else None

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
            load = f'{folder!r}, device_map="auto"'
            yield f"model = AutoModelForCausalLM.from_pretrained({load})"
        else:
            yield "import torch"
            yield "from peft import PeftModel"
            load = f'{self.base!r}, dtype=torch.bfloat16, device_map="auto"'
            if quantised:
                names += ", BitsAndBytesConfig"
                load += ", quantization_config=quantised"
            yield f"from transformers import {names}"
            yield ""
            if quantised:
                yield f"quantised = BitsAndBytesConfig({quantised})"
            yield f"base = AutoModelForCausalLM.from_pretrained({load})"
            yield f"model = PeftModel.from_pretrained(base, {folder!r})"
        yield f"tokenizer = AutoTokenizer.from_pretrained({folder!r})"
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
            "float32. Computed in float32 it answers as base and adapter do in float32. In "
            "bfloat16, which halves the memory, and beside llm-flowertune's own test.py, which "
            "computes in bfloat16 where it can, longer free answers are often in other words: "
            "where two words are next to equally likely, the rounding decides."
        )
        yield "With vLLM, or transformers (`pip install 'transformers[serving]'`):"
        yield code("bash", shlex.join(["vllm", "serve", folder, "--dtype", "bfloat16"]))
        yield code("bash", shlex.join(["transformers", "serve", folder]))
        yield from self.request(folder)
        yield "With llama.cpp, from its own folder:"
        convert = ["python", "convert_hf_to_gguf.py", f"/path/to/{self.name}"]
        made = ["--outtype", "bf16", "--outfile", f"{folder}.gguf"]
        yield code(
            "bash",
            shlex.join(convert + made),
            shlex.join(["llama-server", "-m", f"{folder}.gguf"]),
        )

    def serve_adapter(self) -> Iterator[str]:
        import model

        merge = "llm-flowertune's `python -m reporting.export --merge` makes one."
        method = escape(self.method)
        if not model.mergeable(self.settings["peft_type"]):
            yield f"{method} is for PEFT alone: vLLM and llama.cpp do not take it."
            return
        # vllm/lora/peft_helper.py and lora_model.py take the two matrices of a layer alone.
        more = self.settings.get("modules_to_save")
        more = more or self.settings.get("bias", "none") != "none"
        more = more or self.settings.get("lora_bias")
        if more or self.method not in ("LoRA", "rsLoRA") or "r" not in self.settings:
            method += " that trains more than matrices" * bool(more)
            yield f"vLLM and llama.cpp need a merged model for {method}: {merge}"
            return
        rank = next((r for r in RANKS if r >= self.settings["r"]), self.settings["r"])
        base = f"./{self.base}" if self.base.startswith("-") else self.base
        command = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(rank)]
        command += ["--lora-modules", f"{self.name}=./{self.name}"]
        if self.bits == 4:
            command += ["--quantization", "bitsandbytes"]
        if self.bits == 8:
            yield "vLLM does not quantise to 8 bits, as training did: answers may differ."
        yield "With vLLM, if it has LoRA for the base's architecture:"
        yield code("bash", shlex.join(command))
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
        yield code(
            "bash",
            f"curl http://localhost:8000/v1/{path} -H 'Content-Type: application/json' "
            f"-d {shlex.quote(json.dumps(body))}",
        )


def _class(settings: dict[str, Any]) -> str:
    return settings["_target_"].rpartition(".")[2]


if __name__ == "__main__":
    main()
