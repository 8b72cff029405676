"""How good an adapter is: its loss on answers that are known, and the answers that it gives.

A client asks this of the records that it holds back, the server of the test questions.
"""

import math
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

import dataset
import model
import tasks
from records.batches import Collate, Collator, batches
from records.templates import Example
from tasks.base import Task
from utils import Settings


class Scores(dict[str, float]):
    """Scores over all test questions, by name.

    `questions`: what they are made of, a value for each question, by name. `nats`, `right` and
    `tokens` of the answer (sums over its tokens; too long ones are not there), the other
    scores under their own names. `labels`: of each label, where a task tells them apart.
    """

    def __init__(
        self,
        *known: Any,
        questions: dict[str, list[float]],
        labels: list[dict[str, Any]],
    ) -> None:
        super().__init__(*known)
        self.questions = questions
        self.labels = labels


# --- known answers ----------------------------------------------------------------------------


def score(
    net: torch.nn.Module,
    task: Task,
    examples: list[Example],
    collate: Collate,
    batch: int,
) -> torch.Tensor:
    """`task.score` of tokenised examples, in their order: (examples, 3 or more)."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(examples)
    for chosen, tensors in batches(examples, collate, batch, net.device):
        with torch.no_grad(), model.autocast(net):
            scores = task.score(net, tensors).cpu()
        for place, values in zip(chosen, scores, strict=True):
            found[place] = values
    return torch.stack(found)


def refer(
    cfg: Settings,
    net: PeftModel,
    task: Task,
    examples: list[Example],
    pad: Collator,
    batch: int,
) -> None:
    """`task.refer`, with the base or the adapter of `model.adapter` in the place of `net`'s."""
    if not task.refers:
        return
    trains = net.training
    with torch.no_grad(), model.autocast(net), model.reference(net.eval(), cfg):
        task.refer(net, examples, pad, batch)
    net.train(trains)


# --- shown ---------------------------------------------------------------------------------

# What people are shown of scores, and how.
SHOWN = {
    "loss": ("loss, nats a {per}", "{:.3f}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "accuracy": ("{per} accuracy", "{:.1%}"),
    "macro_f1": ("macro-F1", "{:.1%}"),
    "mcc": ("MCC", "{:.3f}"),
    "entity_f1": ("F1 of entities", "{:.1%}"),
    "margin": ("reward margin", "{:.3f}"),
    "exact_match": ("exact match", "{:.1%}"),
    "f1": ("F1 of words", "{:.1%}"),
    "rouge_l": ("ROUGE-L", "{:.1%}"),
    "choice_accuracy": ("right choices", "{:.1%}"),
}


def table(title: str, columns: dict[str, Scores], per: str) -> str:
    """Scores as text, side by side under the names of `columns`; unknown ones are left out.

    `per`: the task's, what its loss is a mean over.
    """
    lines = [f"{title:30}" + "".join(f"{name:>10}" for name in columns)]
    for name, (label, form) in SHOWN.items():
        cells = [
            form.format(scores[key]) if key else "-"
            for scores in columns.values()
            for key in [_key(scores, name)]
        ]
        if any(cell != "-" for cell in cells):
            named = label.format(per=per)
            lines.append(f"  {named:28}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def _key(scores: Scores, name: str) -> str | None:
    """Under which name a score is there: that of test questions, or of clients' records."""
    keys = (name, f"test_{name}", f"eval_{name}")
    return next((key for key in keys if key in scores), None)


def _build(cfg: Settings) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A run's base with a fresh adapter, and its tokenizer."""
    name, fast = cfg.model.name, cfg.model.use_fast_tokenizer
    net = model.build(cfg.model, cfg.peft, cfg.seed, model.default_device())
    return net.eval(), model.load_tokenizer(name, fast)


# --- the test questions -------------------------------------------------------------------------


class Examination:
    """The dataset's test questions, put to the base and to adapters.

    All scores are of the same `records`, those that can be scored; `left_out` is the number
    of the others. On all cores: the server asks them while no client is at work.
    """

    @model.all_cores()
    def __init__(
        self,
        cfg: Settings,
        opened: tuple[PeftModel, PreTrainedTokenizerBase] | None = None,
    ) -> None:
        """`opened`: an adapter on its base that is there already (`model.open_adapter`)."""
        self.settings = cfg.evaluate
        self.task = tasks.build(cfg)
        self.answers_known = cfg.dataset.columns.output is not None
        self.seq_length = cfg.train.seq_length
        self.batch = cfg.train.training_arguments.per_device_train_batch_size
        self.net, self.tokenizer = opened or _build(cfg)
        self.collate = self.task.collator(self.tokenizer, "left")
        if self.answers_known:
            kept, self.left_out = dataset.scorable(cfg, self.tokenizer)
        else:
            kept = [(record, [], None) for record in dataset.load_test(cfg)[0]]
            self.left_out = 0
        self.records = [record for record, _, _ in kept]
        self.choices = [choices for _, choices, _ in kept if choices]
        self.examples = [example for _, _, example in kept if example]
        pad = Collator(self.tokenizer.pad_token_id, "left")
        refer(cfg, self.net, self.task, self.examples, pad, self.batch)

    @model.all_cores()
    def measure(self, state: model.State) -> Scores:
        """The adapter's `test_loss`, `test_perplexity` and `test_accuracy` (of tokens)."""
        model.set_adapter_state(self.net, state)
        return self._measure()

    @model.all_cores()
    def base(self) -> tuple[Scores, list[str]]:
        """All scores of the base model without an adapter, and its answers."""
        with self.net.disable_adapter():
            return self._examine()

    @model.all_cores()
    def tuned(
        self, state: model.State | None = None, known: Scores | None = None
    ) -> tuple[Scores, list[str]]:
        """All scores with this adapter, or the one that is there, and its answers.

        `known`: what `measure` has found with it already.
        """
        if state is not None:
            model.set_adapter_state(self.net, state)
        return self._examine(known)

    def _examine(self, known: Scores | None = None) -> tuple[Scores, list[str]]:
        if not self.answers_known:
            return {}, self._answers()
        scores, answers = known or self._measure(), []
        if self.settings["exact_match"]:
            answers = self._answers()
            wanted = [record["output"] for record in self.records]
            scores.questions |= self.task.judge(answers, wanted)
            scores |= self.task.overall(answers, wanted)
        if self.choices:
            scores.questions["choice_accuracy"] = self._choose()
        for name in (*self.task.judged_by, "choice_accuracy"):
            if values := scores.questions.get(name):
                scores[name] = sum(values) / len(values)
        return scores, answers

    def _measure(self) -> Scores:
        scores = score(self.net, self.task, self.examples, self.collate, self.batch)
        told = self.task.metrics(scores)
        if self.task.perplexity:
            told["perplexity"] = math.exp(min(told["loss"], 700))  # what a float holds
        columns = zip(("nats", "right", "tokens"), scores.T.tolist(), strict=False)
        named = {f"test_{name}": value for name, value in told.items()}
        labels = self.task.by_label(scores)
        return Scores(named, questions=dict(columns), labels=labels)

    def _answers(self) -> list[str]:
        limit = self.settings["max_new_tokens"]
        with torch.no_grad(), model.autocast(self.net):
            return self.task.answers(self.net, self.tokenizer, self.records, limit)

    def _choose(self) -> list[float]:
        """Of each question, 1 where its right answer is the likeliest of the choices, else 0.

        By summed log-likelihood, as the language model evaluation harness's `acc`.
        """
        examples, owners = [], []
        for place, (record, choices) in enumerate(
            zip(self.records, self.choices, strict=True)
        ):
            for choice in choices:
                answered = {**record, "output": choice}
                example = self.task.encode(answered, self.tokenizer)
                if example:  # an empty choice has none
                    examples.append(example)
                    owners.append((place, choice == record["output"]))
        scores = score(self.net, self.task, examples, self.collate, self.batch)
        nats = scores[:, 0].tolist()
        likeliest: dict[int, tuple[float, bool]] = {}
        for (place, right), value in zip(owners, nats, strict=True):
            best = likeliest.get(place, (math.inf, False))
            likeliest[place] = min(best, (value, right))
        places = range(len(self.records))
        return [float(likeliest.get(place, (0.0, False))[1]) for place in places]

    def side_by_side(self, base: list[str], tuned: list[str]) -> list[dict[str, str]]:
        """Each test record with both answers."""
        return [
            {**record, "base": before, "tuned": after}
            for record, before, after in zip(self.records, base, tuned, strict=True)
        ]
