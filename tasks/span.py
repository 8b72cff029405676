"""A model finds the answer to a question where it stands in a text (extractive, as SQuAD)."""

import json
import re
import string
from collections import Counter
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from records.batches import Batch, Collate, at_once, batches
from records.templates import Example, Record
from tasks import pieces as tokens
from tasks.base import Metric, Task, Unsuited
from utils import IGNORED, Settings, UserError, spelt

# Where an answer stands in a text: its first character, and the one after its last.
Place = tuple[int, int]


# --- how good an answer is ------------------------------------------------------------------


def normal(text: str) -> list[str]:
    """The words of an answer as SQuAD's own evaluation compares them (v1.1).

    In lower case, without ASCII punctuation and the articles a, an and the.
    """
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def exact_match(given: str, wanted: str) -> float:
    """1 where both have the same words in the same order, else 0."""
    return float(normal(given) == normal(wanted))


def f1(given: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of the words, in [0, 1]; of no words as v2.0."""
    ours, theirs = normal(given), normal(wanted)
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


# --- the task ---------------------------------------------------------------------------------


class Span(Task):
    """Cross entropy of the answer's first and last token; judged as SQuAD's answers are.

    A record: `instruction` is the question, `input` the text, `output` the answer, which
    stands in the text and is looked for there; or as JSON what accepts several, a list, or
    SQuAD's {"text": [...], "answer_start": [...]}. With none in it the text does not answer
    the question; the first token of all stands for that. The first answer is trained on.

    A text that is too long is read in windows that overlap by half. Trained on is the one
    where the answer is furthest from the ends.
    """

    lists = ("output",)
    per = "boundary"
    judged_by: ClassVar[dict[str, Metric]] = {"exact_match": exact_match, "f1": f1}

    def check(self, cfg: Settings) -> None:
        tokens.check_settings(cfg)
        if cfg.dataset.columns.input is None:
            raise UserError(
                "dataset.columns.input=null: task=span looks for answers in a text. Name its "
                "column: dataset.columns.input=context"
            )
        if cfg.dataset.labels:  # transformers' head would have a row for each
            raise UserError(
                f"dataset.labels={spelt(cfg.dataset.labels)}: task=span tells no labels apart. Set "
                "dataset.labels=null."
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokens.check(tokenizer)

    def fault(self, record: Record) -> str | None:
        if not record["output"].strip():
            return None
        try:
            places(record)
        except ValueError as error:
            return str(error)
        return None

    def encode(
        self, record: Record, tokenizer: PreTrainedTokenizerBase, training: bool = False
    ) -> Example | None:
        """With `types`, which of the two texts a token is of; its labels are the two places.

        And with `lost`, how many other windows there are.
        """
        if not record["output"].strip():  # nobody has told it
            return None
        try:
            found = places(record)
        except ValueError as error:
            raise Unsuited(f"{error}.") from error
        windows = self._windows(record, tokenizer)
        if found:
            held = [(one, held_at(one["places"], *found[0])) for one in windows]
        else:
            held = [(one, (0, 0)) for one in windows[:1]]
        held = [(window, at) for window, at in held if at]
        if not held:
            return None
        window, at = max(held, key=lambda one: margin(one[0]["places"], one[1]))
        made = {name: window[name] for name in ("input_ids", "types")}
        made["labels"] = list(at)
        return made | ({"lost": [len(windows) - 1]} if len(windows) > 1 else {})

    def _windows(
        self, record: Record, tokenizer: PreTrainedTokenizerBase
    ) -> list[dict[str, list[Any]]]:
        """The question with each window of the text; none where it leaves no room for one.

        `places`: of each token of the text its `Place`, and None of the others.
        """
        asked, text = record["instruction"].strip(), record["input"]
        room = self.seq_length - tokenizer.num_special_tokens_to_add(pair=True)
        room -= len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        if room < 1:
            return []
        made = tokenizer(
            asked,
            text,
            truncation="only_second",
            max_length=self.seq_length,
            stride=room // 2,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        windows = []
        for number, ids in enumerate(made["input_ids"]):
            place, text_of = made["offset_mapping"][number], made.sequence_ids(number)
            both = zip(place, text_of, strict=True)
            where = [at if of == 1 and at[0] < at[1] else None for at, of in both]
            types = made["token_type_ids"][number]
            windows.append({"input_ids": ids, "types": types, "places": where})
        return windows

    def is_cut(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> bool:
        return "lost" in example

    def blank(self) -> Example:
        return {"input_ids": [0], "types": [0], "labels": [IGNORED, IGNORED]}

    def collator(self, tokenizer: PreTrainedTokenizerBase, side: str) -> Collate:
        return tokens.labelled(tokens.collator(tokenizer, types=0))

    def nats(self, net: Any, batch: Batch) -> torch.Tensor:
        """Of first and last token, whose mean is the loss, as transformers' heads have it."""
        logits = self._logits(net, batch).transpose(1, 2)
        return cross_entropy(logits, batch["labels"], reduction="none").sum(1)

    def _logits(self, net: Any, batch: Batch) -> torch.Tensor:
        """That an answer begins, and that it ends, with each token: (batch, 2, length)."""
        with tokens.segments(net, batch["types"]):
            made = net(**tokens.inputs(batch))
        both = [made.start_logits, made.end_logits]
        logits = torch.stack([tokens.at_tokens(one, batch) for one in both], dim=1)
        return logits.masked_fill(batch["attention_mask"][:, None] == 0, -torch.inf)

    @torch.no_grad()
    def score(self, net: Any, batch: Batch) -> torch.Tensor:
        """Of first and last token together: summed loss, how many right, 2."""
        labels, logits = batch["labels"], self._logits(net, batch)
        nats = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        right = logits.argmax(-1) == labels
        each = [nats.view_as(labels), right, labels != IGNORED]
        return torch.stack([one.double().sum(1) for one in each], dim=1)

    def answers(
        self,
        net: Any,
        tokenizer: PreTrainedTokenizerBase,
        records: list[Record],
        limit: int,
    ) -> list[str]:
        """Of all windows the likeliest span of at most `limit` tokens; "" where none is likelier
        than that there is none."""
        made = [self._windows(record, tokenizer) for record in records]
        windows = [(i, one) for i, each in enumerate(made) for one in each]
        # The likeliest span's logits and text; and the least that a window says for none.
        best, none = [(-torch.inf, "")] * len(records), [torch.inf] * len(records)
        collate = tokens.collator(tokenizer, types=0)
        read, size = [one for _, one in windows], at_once(net.device)
        for chosen, batch in batches(read, collate, size, net.device):
            logits = self._logits(net, batch).cpu()
            for place, (starts, ends) in zip(chosen, logits, strict=True):
                i, window = windows[place]
                none[i] = min(none[i], (starts[0] + ends[0]).item())
                likely, (start, end) = likeliest(starts, ends, window["places"], limit)
                text = records[i]["input"][start:end].strip()
                best[i] = max(best[i], (likely, text))
        return [
            text if likely > blank else ""
            for (likely, text), blank in zip(best, none, strict=True)
        ]

    def told(
        self,
        net: Any,
        tokenizer: PreTrainedTokenizerBase,
        records: list[Record],
        limit: int,
    ) -> list[str]:
        given = self.answers(net, tokenizer, records, limit)
        return [text or "(the text does not answer it)" for text in given]

    def judge(self, given: list[str], wanted: list[str]) -> dict[str, list[float]]:
        """By each measure the best over the answers that are accepted."""
        pairs = [
            (one, accepted(text)[0] or [""])
            for one, text in zip(given, wanted, strict=True)
        ]
        return {
            name: [max(metric(one, other) for other in others) for one, others in pairs]
            for name, metric in self.judged_by.items()
        }


# --- answers and their places ---------------------------------------------------------------


def accepted(output: str) -> tuple[list[str], list[int] | None]:
    """The answers of a record's output, and where they begin, if it says so.

    Raises `ValueError` with what is wrong with them.
    """
    try:
        made = json.loads(output)
    except (ValueError, RecursionError):
        made = output
    starts = None
    if isinstance(made, dict) and "text" in made:
        made, starts = made["text"], made.get("answer_start")
        fits = isinstance(starts, list) and all(type(one) is int for one in starts)
        if not fits or not isinstance(made, list) or len(starts) != len(made):
            raise ValueError(f"{output[:80]}: text and answer_start are no equal lists")
    if not isinstance(made, list) or not all(isinstance(one, str) for one in made):
        made = [output]
    return made, starts


def places(record: Record) -> list[Place]:
    """Where in its text a record's answers stand; none where it has none.

    Of an answer that comes without its place the first that is like it. Raises `ValueError`
    with the first that does not stand in the text, or not where it is said to.
    """
    text = record["input"]
    answers, starts = accepted(record["output"])
    found = []
    for i, answer in enumerate(answers):
        bare = answer.strip()
        start = text.find(bare)
        if starts:
            start = starts[i] + len(answer) - len(answer.lstrip())
        if not bare or start < 0 or not text.startswith(bare, start):
            at = f" at {starts[i]}" if starts else ""
            raise ValueError(
                f"its answer {answer[:80]!r} does not stand in its text{at}"
            )
        found.append((start, start + len(bare)))
    return found


def held_at(where: list[Place | None], start: int, end: int) -> Place | None:
    """The first and last token of what stands from `start` to `end`; None where it is cut.

    `where`: the places of a window's tokens, None of those that are not of the text.
    """
    of_text = [i for i, place in enumerate(where) if place]
    inside = [i for i in of_text if where[i][0] < end and where[i][1] > start]
    if not inside:
        return None
    first, last = inside[0], inside[-1]
    if first == of_text[0] and where[first][0] > start:
        return None
    if last == of_text[-1] and where[last][1] < end:
        return None
    return first, last


def margin(where: list[Place | None], at: Place) -> int:
    """How many tokens of its text a window has beside an answer, on the shorter side."""
    of_text = [i for i, place in enumerate(where) if place]
    return min(at[0] - of_text[0], of_text[-1] - at[1]) if of_text else 0


def likeliest(
    starts: torch.Tensor, ends: torch.Tensor, where: list[Place | None], limit: int
) -> tuple[float, Place]:
    """The span of a window's text of at most `limit` tokens whose logits are highest.

    `starts`, `ends`: of each token, (length,). The sum of the two, and where in the text it is.
    """
    of_text = [i for i, place in enumerate(where) if place]
    if not of_text:
        return -torch.inf, (0, 0)
    chosen = torch.tensor(of_text)
    sums = starts[chosen][:, None] + ends[chosen]
    ones = torch.ones_like(sums, dtype=torch.bool)
    sums = sums.masked_fill(~ones.triu() | ones.triu(limit), -torch.inf)
    first, last = divmod(int(sums.argmax()), len(of_text))
    return sums[first, last].item(), (where[of_text[first]][0], where[of_text[last]][1])
