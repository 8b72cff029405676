"""How good an adapter is: its loss on answers that are known, and the answers that it gives.

A client asks this of the records that it holds back, the server of the test questions.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

import dataset
import model
from compute.loss import answer_scores
from records import templates
from utils import Settings, look_for_stop

# Prompts that are answered side by side. With 64 on a CPU a base of 135M (1.1 GiB) took 0.3
# GiB more for its answers, with 16 0.1, for about the same time.
BATCH, BATCH_ON_CPU = 64, 16


class Scores(dict[str, float]):
    """Scores over all test questions, by name.

    `questions`: what they are made of, a value for each question, by name. `nats`, `right` and
    `tokens` of the answer (sums over its tokens; too long ones are not there), the other
    scores under their own names.
    """

    def __init__(self, *known: Any, questions: dict[str, list[float]]) -> None:
        super().__init__(*known)
        self.questions = questions


# --- known answers ----------------------------------------------------------------------------


def score(
    net: torch.nn.Module,
    examples: list[templates.Example],
    collate: dataset.Collator,
    batch: int,
) -> torch.Tensor:
    """`loss.answer_scores` of tokenised examples, in their order: (examples, 3)."""
    scores = torch.zeros(len(examples), 3, dtype=torch.float64)
    for chosen, tensors in batches(net, examples, collate, batch):
        with torch.no_grad(), model.autocast(net):
            scores[chosen] = answer_scores(net, tensors).cpu()
    return scores


def batches(
    net: torch.nn.Module,
    examples: list[templates.Example],
    collate: dataset.Collator,
    batch: int,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Places of up to `batch` examples of like length, and their tensors on the device."""
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i]["labels"]))
    for start in range(0, len(examples), batch):
        look_for_stop()
        chosen = by_length[start : start + batch]
        tensors = collate([examples[i] for i in chosen])
        yield chosen, {name: tensor.to(net.device) for name, tensor in tensors.items()}


def loss_and_accuracy(scores: torch.Tensor) -> tuple[float, float]:
    """Nats per answer token, and the share in [0, 1] of tokens found likeliest.

    Both over all tokens of all examples of `score`, whatever their lengths.
    """
    nats, right, tokens = scores.sum(0).tolist()
    return nats / tokens, right / tokens


# --- answers in words -------------------------------------------------------------------------


def answer(
    net: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    ends: list[int],
) -> list[str]:
    """Greedy answers to tokenised prompts, in their order, stripped of outer space.

    `ends`: the tokens at which an answer is over.
    """
    answers = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    collate = dataset.Collator(tokenizer.pad_token_id, padding_side="left")
    size = BATCH_ON_CPU if net.device.type == "cpu" else BATCH
    for start in range(0, len(prompts), size):
        look_for_stop()
        chosen = by_length[start : start + size]
        batch = collate(
            [{"input_ids": prompts[i], "labels": prompts[i]} for i in chosen]
        )
        with torch.no_grad(), model.autocast(net):
            output = net.generate(
                input_ids=batch["input_ids"].to(net.device),
                attention_mask=batch["attention_mask"].to(net.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
                stopping_criteria=StoppingCriteriaList([_stopped]),
            )
        # Prompt embeddings count as no input tokens, so the answer is what was added.
        added = [
            before_end(row, ends)
            for row in output[:, batch["input_ids"].shape[1] :].tolist()
        ]
        texts = tokenizer.batch_decode(added, skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip()
    return answers


def before_end(ids: list[int], ends: list[int]) -> list[int]:
    """An answer's tokens without the one that ends it, which may be no special token."""
    return list(itertools.takewhile(lambda token: token not in ends, ids))


def _stopped(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
    """For each sequence, whether it is finished: never, but a run may be stopped here."""
    look_for_stop()
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def exact_match(given: str, wanted: str) -> float:
    """1 where the answer is the wanted one to the letter, else 0."""
    return float(given == wanted.strip())


def f1(given: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of the words, in [0, 1] (SQuAD's F1)."""
    ours, theirs = words(given), words(wanted)
    return _harmonic((Counter(ours) & Counter(theirs)).total(), ours, theirs)


def rouge_l(given: str, wanted: str) -> float:
    """The same of the longest common subsequence of words (ROUGE-L, Lin 2004), in [0, 1]."""
    ours, theirs = words(given), words(wanted)
    lengths = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0  # the cell up and to the left
        for i, other in enumerate(theirs, start=1):
            here = before + 1 if word == other else max(lengths[i], lengths[i - 1])
            before, lengths[i] = lengths[i], here
    return _harmonic(lengths[-1], ours, theirs)


def words(text: str) -> list[str]:
    """Lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def _harmonic(common: int, ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * common / (len(ours) + len(theirs))


METRICS = {"exact_match": exact_match, "f1": f1, "rouge_l": rouge_l}

# What people are shown of scores, and how.
SHOWN = {
    "loss": ("loss, nats a token", "{:.3f}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "accuracy": ("token accuracy", "{:.1%}"),
    "exact_match": ("exact match", "{:.1%}"),
    "f1": ("F1 of words", "{:.1%}"),
    "rouge_l": ("ROUGE-L", "{:.1%}"),
    "choice_accuracy": ("right choices", "{:.1%}"),
}


def table(title: str, columns: dict[str, Scores]) -> str:
    """Scores as text, side by side under the names of `columns`; unknown ones are left out."""
    lines = [f"{title:30}" + "".join(f"{name:>10}" for name in columns)]
    for name, (label, form) in SHOWN.items():
        cells = [
            form.format(scores[key]) if key else "-"
            for scores in columns.values()
            for key in [_key(scores, name)]
        ]
        if any(cell != "-" for cell in cells):
            lines.append(f"  {label:28}" + "".join(f"{cell:>10}" for cell in cells))
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
        self.answers_known = cfg.dataset.columns.output is not None
        self.template = cfg.dataset.template
        self.seq_length = cfg.train.seq_length
        self.batch = cfg.train.training_arguments.per_device_train_batch_size
        self.net, self.tokenizer = opened or _build(cfg)
        self.collate = dataset.Collator(self.tokenizer.pad_token_id, "left")
        if self.answers_known:
            kept, self.left_out = dataset.scorable(cfg, self.tokenizer)
        else:
            kept = [(record, [], None) for record in dataset.load_test(cfg)[0]]
            self.left_out = 0
        self.records = [record for record, _, _ in kept]
        self.choices = [choices for _, choices, _ in kept if choices]
        self.examples = [example for _, _, example in kept if example]

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
            pairs = [
                (given, record["output"])
                for given, record in zip(answers, self.records, strict=True)
            ]
            for name, metric in METRICS.items():
                scores.questions[name] = [metric(*pair) for pair in pairs]
        if self.choices:
            scores.questions["choice_accuracy"] = self._choose()
        for name in (*METRICS, "choice_accuracy"):
            if values := scores.questions.get(name):
                scores[name] = sum(values) / len(values)
        return scores, answers

    def _measure(self) -> Scores:
        scores = score(self.net, self.examples, self.collate, self.batch)
        loss, accuracy = loss_and_accuracy(scores)
        told = {
            "test_loss": loss,
            "test_perplexity": math.exp(min(loss, 700)),  # what a float can hold
            "test_accuracy": accuracy,
        }
        columns = zip(("nats", "right", "tokens"), scores.T.tolist(), strict=True)
        return Scores(told, questions=dict(columns))

    def _answers(self) -> list[str]:
        prompts = [
            templates.prompt(
                self.template, [templates.question(record)], self.tokenizer
            )
            for record in self.records
        ]
        limit = self.settings["max_new_tokens"]
        ends = templates.ends(self.template, self.tokenizer, self.net.generation_config)
        return answer(self.net, self.tokenizer, prompts, limit, ends)

    def _choose(self) -> list[float]:
        """Of each question, 1 where its right answer is the likeliest of the choices, else 0.

        By summed log-likelihood, as the language model evaluation harness's `acc`.
        """
        examples, owners = [], []
        for place, (record, choices) in enumerate(
            zip(self.records, self.choices, strict=True)
        ):
            for choice in choices:
                example = self._encode({**record, "output": choice})
                if example:  # an empty choice has none
                    examples.append(example)
                    owners.append((place, choice == record["output"]))
        nats = score(self.net, examples, self.collate, self.batch)[:, 0].tolist()
        likeliest: dict[int, tuple[float, bool]] = {}
        for (place, right), value in zip(owners, nats, strict=True):
            best = likeliest.get(place, (math.inf, False))
            likeliest[place] = min(best, (value, right))
        places = range(len(self.records))
        return [float(likeliest.get(place, (0.0, False))[1]) for place in places]

    def _encode(self, record: templates.Record) -> templates.Example | None:
        return templates.encode(record, self.template, self.tokenizer, self.seq_length)

    def side_by_side(self, base: list[str], tuned: list[str]) -> list[dict[str, str]]:
        """Each test record with both answers."""
        return [
            {**record, "base": before, "tuned": after}
            for record, before, after in zip(self.records, base, tuned, strict=True)
        ]
