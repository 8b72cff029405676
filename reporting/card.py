"""The model card of what is shared: its figures here, its text in `templates/card.md.jinja`."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from reporting.templates import fill
from server import runs
from utils import public, table

if TYPE_CHECKING:  # seconds, which --help need not take
    from transformers import PreTrainedTokenizerBase

QUESTION = (
    "What is the capital of France?"  # for the card; the run's own may be private
)

INPUT = "Answer in one word."

# Where a text is rewritten.
SOURCE = "In school we learn that Paris is the capital of France."

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "flwr")


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
    client: str | None = None  # whose own adapter it is (client_3), if not that of all
    plugged: bool = False  # into the base, and the run's scores are of its emulator

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
        self.summary = runs.read(self.run, "summary.json", {})
        history = runs.read(self.run, "history.json", {"rounds": []})
        self.rounds, self.per = history["rounds"], runs.per(history)
        self.entry = next(
            (e for e in self.rounds if e["round"] == self.about["round"]), {}
        )  # of the round that made this adapter
        self.chosen: dict[str, Any] = {}
        if self.client:  # the run's scores are of the adapter that all share
            last = self.summary.get("rounds") == self.about["round"]
            each = self.summary.get("personal_clients", []) if last else []
            named = {f"client_{one['partition']}": one for one in each}
            self.chosen, self.summary = named.get(self.client, {}), {}
            self.entry = {}
            if self.chosen:
                loss = self.chosen["eval_loss_personal"]
                self.entry = {"eval_loss": loss, "eval_clients": [self.chosen]}
        import model

        kind = self.settings.get("task_type") or "CAUSAL_LM"
        self.asked = kind == "CAUSAL_LM"  # by a template
        self.headed = kind in model.HEADED
        self.labels = self.about["model"].get("labels") if self.headed else None
        self.auto = model.CLASSES[kind].__name__
        if self.asked:
            self.prompt, self.with_input = (
                templates.text(
                    self.template,
                    [{"instruction": QUESTION, "input": given}],
                    self.tokenizer,
                )
                for given in ("", INPUT)
            )
            _, end = templates.end(self.template, self.tokenizer)
            self.end = self.tokenizer.convert_ids_to_tokens(end)
        else:
            self.prompt = f"{self.about['task'].get('prefix', '')}{SOURCE}"

        settings = self.settings
        self.mergeable = model.mergeable(settings["peft_type"])
        # vllm/lora/peft_helper.py and lora_model.py take the two matrices of a layer alone.
        self.trains_more = bool(
            settings.get("modules_to_save")
            or settings.get("bias", "none") != "none"
            or settings.get("lora_bias")
        )
        plain = self.method in ("LoRA", "rsLoRA") and "r" in settings
        self.for_vllm = plain and not self.trains_more

    @property
    def rank(self) -> int:
        """vLLM's `--max-lora-rank`."""
        return next((r for r in RANKS if r >= self.settings["r"]), self.settings["r"])

    def text(self) -> str:
        """The whole of README.md. What others have written is escaped for where it stands."""
        figures = self.figures()
        rows = [
            (name.replace("_", " "), *shown, runs.UNITS[name].format(per=self.per))
            for name, shown in figures.items()
        ]
        limit = self.cfg.get("evaluate", {}).get("max_new_tokens")
        evaluated = self.entry.get("eval_clients", [])
        return fill(
            "card.md.jinja",
            card=self,
            title=Path(self.base).name,
            folder=f"./{self.name}",
            chat=self.template == "chat",
            training=table(["", ""], self.training(), numbers=False),
            figures=figures,
            scores=table(["", "base", "tuned", "unit"], rows, numbers=False),
            own=[name for name in runs.UNITS if name.startswith("eval_")],
            test_path=self.cfg.get("dataset", {}).get("test_path"),
            questions=self.summary.get("test_questions")
            or len(runs.read(self.run, "answers.json", [])),
            held=[int(client["num-examples"]) for client in evaluated],
            limit=limit if "exact_match" in figures else None,
        )

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
            pipeline_tag="text-generation" if self.asked else None,
            tags=[*tags, "flower", self.method.lower()],
        )
        missing = "" if self.license else "\n# license: still to be stated"
        return f"---\n{fields.to_yaml()}{missing}\n---"

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
        if self.plugged:
            yield "trained on", "an emulator of the base, which clients did not have"
        if self.chosen:
            weight = self.chosen["personal_weight"]
            yield (
                "made for",
                f"one client: {weight:.0%} its own, the rest what all share",
            )
        if "sampled" in self.entry:
            yield "clients a round", self.entry["sampled"]
        yield "rounds", self.about["round"]
        trained = [e for e in self.rounds if e["round"] <= self.about["round"]]
        if records := runs.trained_records(self.cfg, trained):
            yield "records to train on", records
        if "train_loss" in self.entry:
            yield f"train loss, nats per {self.per}", f"{self.entry['train_loss']:.4g}"
        if "epsilon" in self.entry:
            epsilon, delta, adjacency = map(
                self.entry.get, ("epsilon", "delta", "adjacency")
            )
            yield "privacy", f"epsilon {epsilon:.3g} at delta {delta:g}: {adjacency}"
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
        if start := self.cfg.get("model", {}).get("adapter"):
            yield "began with the adapter", public(str(start))
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

    def figures(self) -> dict[str, tuple[str, str]]:
        """By its name each score of this round, of the base (if it is known) and tuned."""
        if self.plugged:
            return {}
        figures = {
            name: ("", f"{self.entry[name]:.4g}")
            for name in runs.UNITS
            if name in self.entry
        }
        if self.summary.get("rounds") == self.about["round"]:  # it tells of the last
            for name in runs.UNITS:
                pair = [
                    self.summary.get(f"{name}_{when}") for when in ("before", "after")
                ]
                if None not in pair:
                    figures[name] = tuple(f"{value:.4g}" for value in pair)
        return figures

    def request(self, name: str) -> str:
        """What asks a server the question of the example."""
        body: dict[str, Any] = {"model": name, "max_tokens": 64, "temperature": 0}
        if self.template == "chat":
            body["messages"] = [{"role": "user", "content": QUESTION}]
        else:
            body["prompt"] = self.prompt
        return json.dumps(body)


def _class(settings: dict[str, Any]) -> str:
    return settings["_target_"].rpartition(".")[2]
