"""A model learns which answers are good ones: DPO and ORPO of pairs, KTO of single ones.

Each answer of a record is a row of a batch, in the tokens in which `generation` would train on
it; the losses are of the log-likelihoods of whole answers. DPO and KTO compare these with a
reference's, the base without an adapter or with the one that training began from
(`model.adapter`): the same for all clients and over all rounds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from compute.loss import answer_sums
from records import templates
from records.batches import Batch, Collate, Collator, batches
from records.templates import Example, Record
from tasks.generation import Generation
from utils import IGNORED, Settings, UserError, spelt

INPUTS = ("input_ids", "attention_mask", "labels")  # what a model takes of a batch

# Below a mean log-likelihood of 0, whose odds are infinite.
SURE = -1e-6


class Preference(Generation):
    """Records of judged answers, the rows that they are in a batch, the sum of a loss.

    An example has its answers one after the other, each behind the prompt: `lengths` says how
    many tokens each row is, `desirable` which are the better, or good, ones, and `reference`
    their log-likelihoods in the reference, where one is needed. An item is what the loss is
    a mean of: a pair, or an answer.
    """

    perplexity = False
    per = "pair"
    rows = 2
    by_columns = True

    def __init__(self, cfg: Settings, model: str, beta: float) -> None:
        super().__init__(cfg, model)
        self.beta = beta

    def check(self, cfg: Settings) -> None:
        name = f"task._target_={cfg.task._target_}"
        if cfg.audit.canaries:
            raise UserError(
                f"audit.canaries={cfg.audit.canaries} with {name}: a canary is an answer that "
                "nobody has judged. Set audit.canaries=0."
            )
        if cfg.evaluate.choices:
            raise UserError(
                f"evaluate.choices={cfg.evaluate.choices} with {name}: what it chooses from "
                "are the judged answers. Set evaluate.choices=null."
            )
        if self.refers and cfg.model.adapter and cfg.strategy.get("ranks"):
            raise UserError(
                f"strategy.ranks={spelt(cfg.strategy.ranks)} with {name} and model.adapter: that "
                "adapter is the reference, and clients of lower ranks cannot hold it. Set "
                "strategy.ranks=null."
            )

    def fault(self, record: Record) -> str | None:
        if "rejected" in record:
            return None
        return (
            "this task takes records of a better and a worse answer, and it has no worse one: "
            "dataset.columns.rejected names its column, if it is not rejected. For plain "
            "answers take task=generation"
        )

    def judged(self, record: Record) -> list[tuple[str, bool]]:
        """A record's answers, and whether each is the better, or a good, one."""
        return [(record["output"], True), (record["rejected"], False)]

    def encode(
        self, record: Record, tokenizer: PreTrainedTokenizerBase, training: bool = False
    ) -> Example | None:
        """None also where the answers are the same, or what there is room for of them."""
        answers, fitted = self.judged(record), record
        arguments = self.template, tokenizer, self.seq_length
        for text, _ in answers:  # one prompt, with room for the longest
            fitted = templates.fit(fitted | {"output": text}, *arguments)
        rows = [
            templates.encode(fitted | {"output": text}, *arguments)
            for text, _ in answers
        ]
        told = {text.strip() for text, _ in answers}
        if not rows or None in rows or len(told) < len(rows):
            return None
        if len({tuple(row["input_ids"]) for row in rows}) < len(rows):
            return None
        example: Example = {
            "input_ids": [token for row in rows for token in row["input_ids"]],
            "labels": [label for row in rows for label in row["labels"]],
            "lengths": [len(row["input_ids"]) for row in rows],
            "desirable": [int(good) for _, good in answers],
        }
        lost = len(record.get("messages", ())) - len(fitted.get("messages", ()))
        return example | ({"lost": [lost]} if lost else {})

    def is_cut(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> bool:
        return "lost" in example or any(
            templates.is_cut(row, self.template, tokenizer) for row in rows_of(example)
        )

    def blank(self) -> Example:
        return {
            "input_ids": [0, 0],
            "labels": [IGNORED, IGNORED],
            "lengths": [1, 1],
            "desirable": [1, 0],
            "reference": [0.0, 0.0],
        }

    def collator(self, tokenizer: PreTrainedTokenizerBase, side: str) -> Collate:
        pad = Collator(tokenizer.pad_token_id, side)

        def collate(examples: list[Example]) -> Batch:
            """First all better answers, and then the worse: (rows, length), and of each row
            (rows,) the `example`, whether it is `desirable`, the `reference`."""
            rows = [rows_of(example) for example in examples]
            places = [
                (i, slot)
                for slot in range(max(map(len, rows)))
                for i, each in enumerate(rows)
                if slot < len(each)
            ]
            batch = pad([rows[i][slot] for i, slot in places])
            batch["example"] = torch.tensor([i for i, _ in places])
            for name in ("desirable", "reference"):
                if all(name in example for example in examples):
                    told = [examples[i][name][slot] for i, slot in places]
                    batch[name] = torch.tensor(told)
            learnt = batch["labels"].ne(IGNORED).any(1)
            # By which Trainer counts: one of each item, and IGNORED of a blank one.
            batch["shift_labels"] = torch.where(self.items(learnt), 1, IGNORED)
            return batch

        return collate

    def items(self, rows: torch.Tensor) -> torch.Tensor:
        """Of what is told of each row, (rows,), that of each item."""
        return rows[: len(rows) // 2]

    def loss(self, net: Any, batch: Batch, count: Any = None) -> torch.Tensor:
        """In nats per item."""
        losses = self.losses(net, batch)
        return losses.sum() / (max(len(losses), 1) if count is None else count)

    def losses(self, net: Any, batch: Batch) -> torch.Tensor:
        return self.weigh(net, batch)[0]

    @torch.no_grad()
    def score(self, net: Any, batch: Batch) -> torch.Tensor:
        """Beside the three the margin: the better answer's reward less the worse one's."""
        losses, rewards = self.weigh(net, batch)
        margins = rewards[0] - rewards[1]
        columns = losses, positive(margins), torch.ones_like(margins), margins
        return torch.stack([column.double() for column in columns], dim=1)

    def metrics(self, scores: torch.Tensor) -> dict[str, float]:
        """`accuracy`: how often the better answer has the higher reward, a tie being half;
        `margin`: the mean by which."""
        margin = scores[:, 3].sum() / scores[:, 2].sum()
        return super().metrics(scores) | {"margin": margin.item()}

    def weigh(self, net: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of the items that are not blank, (pairs,), and rewards, (2, pairs)."""
        kept = batch["shift_labels"].ne(IGNORED)
        sums = answer_sums(net, {name: batch[name] for name in INPUTS})
        tokens = batch["labels"][:, 1:].ne(IGNORED).sum(1)
        against = batch["reference"] if self.refers else torch.zeros_like(sums)
        parts = (one.view(2, -1)[:, kept] for one in (sums, tokens, against))
        return self.compare(*parts)

    def compare(
        self, sums: torch.Tensor, tokens: torch.Tensor, reference: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses, (pairs,), and rewards, (2, pairs), of the log-likelihoods, the numbers of
        tokens, and the log-likelihoods in the reference: the better answers', the worse ones'.
        """
        raise NotImplementedError


class Dpo(Preference):
    """-log sigmoid(r(better) - r(worse)), r = beta log (pi / reference) being the reward.

    Rafailov et al. 2023, arXiv 2305.18290, equation 7.
    """

    refers = True

    def refer(
        self, net: Any, examples: Sequence[Example], pad: Collator, batch: int
    ) -> None:
        look_up(net, [*filter(unknown, examples)], rows_of, "reference", pad, batch)

    def compare(
        self, sums: torch.Tensor, tokens: torch.Tensor, reference: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rewards = self.beta * (sums - reference)
        return -logsigmoid(rewards[0] - rewards[1]), rewards.detach()


class Orpo(Preference):
    """-m(better) - beta log sigmoid(log odds(better) - log odds(worse)), without a reference.

    Hong et al. 2024, arXiv 2403.07691, equations 6 and 7 with lambda = beta; m is the mean
    log-likelihood of an answer's tokens, exp(m) / (1 - exp(m)) its odds, beta m its reward.
    """

    def compare(
        self, sums: torch.Tensor, tokens: torch.Tensor, reference: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        means = sums / tokens
        odds = log_odds(means)
        losses = -means[0] - self.beta * logsigmoid(odds[0] - odds[1])
        return losses, self.beta * means.detach()


class Kto(Preference):
    """Of a good answer 1 - sigmoid(r - z), of a bad one 1 - sigmoid(z - r), by their weights.

    Ethayarajh et al. 2024, arXiv 2402.01306, equation 8; r = beta log (pi / reference), and
    z = beta KL(pi || reference), estimated as TRL does: the mean over a batch of the prompts
    with answers to other ones, 0 at least, without gradient. A pair is one good and one bad
    answer. An example's `others` are those that it adds to z.
    """

    refers = True
    per = "answer"

    def __init__(
        self,
        cfg: Settings,
        model: str,
        beta: float,
        desirable_weight: float,
        undesirable_weight: float,
    ) -> None:
        super().__init__(cfg, model, beta)
        self.weights = undesirable_weight, desirable_weight

    def check(self, cfg: Settings) -> None:
        super().check(cfg)
        key = "train.training_arguments.per_device_train_batch_size"
        if cfg.train.training_arguments.per_device_train_batch_size < 2:
            raise UserError(
                f"{key}=1 with task._target_={cfg.task._target_}: it compares an answer with "
                f"those to other prompts of its batch. Set {key}=2 or more."
            )
        if cfg.privacy._target_ == "methods.privacy.Record":
            raise UserError(
                f"privacy=record with task._target_={cfg.task._target_}: the loss of one record "
                "depends on the others of its batch. Take task=dpo or task=orpo."
            )

    def fault(self, record: Record) -> str | None:
        if {"rejected", "desirable"} & record.keys():
            return None
        return (
            "this task takes answers and whether each is a good one, and it does not tell: "
            "dataset.columns.desirable names the column, or dataset.columns.rejected that of "
            "worse answers. For plain answers take task=generation"
        )

    def judged(self, record: Record) -> list[tuple[str, bool]]:
        if "rejected" in record:
            return super().judged(record)
        good = record["desirable"]
        return [(record["output"], good == "true")] if good else []

    def blank(self) -> Example:
        one = {"input_ids": [0], "labels": [IGNORED]}
        told = {"lengths": [1], "desirable": [1], "reference": [0.0]}
        return one | told | {"others": [one], "others_reference": [0.0]}

    def refer(
        self, net: Any, examples: Sequence[Example], pad: Collator, batch: int
    ) -> None:
        """`batch`: of how many examples, in this order, a step's are: z is then of the
        answers in it."""
        missing = [*filter(unknown, examples)]
        groups = [examples[i : i + batch] for i in range(0, len(examples), batch)]
        if len(groups) > 1 and len(groups[-1]) == 1:
            last = groups.pop()
            groups[-1] = [*groups[-1], *last]
        for group in groups:
            for before, example in zip([group[-1], *group[:-1]], group, strict=True):
                example["others"] = self.mismatched(example, before)
        look_up(net, missing, rows_of, "reference", pad, batch)
        look_up(net, missing, others_of, "others_reference", pad, batch)

    def mismatched(self, example: Example, other: Example) -> list[Example]:
        """The prompts of an example with the answers of the other one."""
        rows, theirs = rows_of(example), rows_of(other)
        made = []
        for slot, row in enumerate(rows):
            answer = theirs[min(slot, len(theirs) - 1)]["labels"]
            answer = [label for label in answer if label != IGNORED]
            prompt = row["input_ids"][: row["labels"].count(IGNORED)]
            labels = [IGNORED] * len(prompt) + answer
            ids = prompt + answer
            made.append(
                {
                    "input_ids": ids[: self.seq_length],
                    "labels": labels[: self.seq_length],
                }
            )
        return made

    def collator(self, tokenizer: PreTrainedTokenizerBase, side: str) -> Collate:
        collate = super().collator(tokenizer, side)
        pad = Collator(tokenizer.pad_token_id, side)

        def with_others(examples: list[Example]) -> Batch:
            batch = collate(examples)
            if all("others_reference" in example for example in examples):
                others = [row for example in examples for row in others_of(example)]
                batch |= {f"other_{k}": v for k, v in pad(others).items()}
                told = [x for example in examples for x in example["others_reference"]]
                batch["other_reference"] = torch.tensor(told)
            return batch

        return with_others

    def items(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def weigh(self, net: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of the answers that are not blank, and their rewards, (answers,) both."""
        with torch.no_grad():
            others = {name: batch[f"other_{name}"] for name in INPUTS}
            further = answer_sums(net, others) - batch["other_reference"]
            further = further[others["labels"].ne(IGNORED).any(1)]
            divergence = further.mean().clamp(min=0) if len(further) else further.sum()
        kept = batch["shift_labels"].ne(IGNORED)
        sums = answer_sums(net, {name: batch[name] for name in INPUTS})
        ratios = (sums - batch["reference"])[kept]
        good = batch["desirable"][kept].bool()
        towards = torch.where(good, 1.0, -1.0) * (ratios - divergence)
        weights = torch.where(good, self.weights[True], self.weights[False])
        losses = weights * (1 - (self.beta * towards).sigmoid())
        return losses, self.beta * ratios.detach()

    @torch.no_grad()
    def score(self, net: Any, batch: Batch) -> torch.Tensor:
        """Beside the three, of the good and of the bad answers each the summed rewards and
        the number."""
        losses, rewards = self.weigh(net, batch)
        good = batch["desirable"].bool()
        right = positive(torch.where(good, rewards, -rewards))
        columns = [losses, right, torch.ones_like(losses)]
        for these in (good, ~good):
            columns += [rewards * these, these]
        told = torch.stack([column.double() for column in columns], dim=1)
        owner = batch["example"]
        return told.new_zeros(int(owner.max()) + 1, 7).index_add(0, owner, told)

    def metrics(self, scores: torch.Tensor) -> dict[str, float]:
        """`accuracy`: how often a good answer has a reward above 0, a bad one below, none of
        the two being half; `margin`: between their means, where there are both."""
        told = super(Preference, self).metrics(scores)
        good, goods, bad, bads = scores[:, 3:].sum(0).tolist()
        return told | ({"margin": good / goods - bad / bads} if goods and bads else {})


def rows_of(example: Example) -> list[Example]:
    """Each answer of an example behind its prompt."""
    rows, start = [], 0
    for length in example["lengths"]:
        part = slice(start, start + length)
        rows.append({name: example[name][part] for name in ("input_ids", "labels")})
        start += length
    return rows


def others_of(example: Example) -> list[Example]:
    return example["others"]


def unknown(example: Example) -> bool:
    """Whether nobody has asked the reference about it."""
    return "reference" not in example


@torch.no_grad()
def look_up(
    net: Any,
    examples: list[Example],
    rows: Callable[[Example], list[Example]],
    name: str,
    pad: Collator,
    batch: int,
) -> None:
    """Note in each example, under this name, the log-likelihoods of its rows in `net`."""
    for example in examples:
        example[name] = [0.0] * len(rows(example))
    places = [
        (example, slot, row)
        for example in examples
        for slot, row in enumerate(rows(example))
    ]
    for chosen, tensors in batches([r for *_, r in places], pad, batch, net.device):
        for place, value in zip(
            chosen, answer_sums(net, tensors).tolist(), strict=True
        ):
            example, slot, _ = places[place]
            example[name][slot] = value


def positive(values: torch.Tensor) -> torch.Tensor:
    """1 above 0, 1/2 at 0, 0 below: a model is at 0 everywhere where it is the reference."""
    return (values.sign() + 1) / 2


def log_odds(means: torch.Tensor) -> torch.Tensor:
    """log (p / (1 - p)) of mean log-likelihoods log p."""
    means = means.clamp(max=SURE)
    return means - torch.log(-torch.expm1(means))
