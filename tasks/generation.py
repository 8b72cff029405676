"""A model foretells the answer, token by token: instructions, questions, conversations."""

import itertools
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from compute.loss import answer_loss, answer_scores
from records import templates
from records.batches import Collator
from records.templates import Example, Record
from tasks import words
from tasks.base import Batch, Collate, Task
from utils import IGNORED, Settings, UserError, look_for_stop

# Prompts that are answered side by side. With 64 on a CPU a base of 135M (1.1 GiB) took 0.3
# GiB more for its answers, with 16 0.1, for about the same time.
BATCH, BATCH_ON_CPU = 64, 16


class Generation(Task):
    """Cross entropy of the answer's tokens; answers are generated greedily."""

    judged_by = words.METRICS
    perplexity = True

    def __init__(self, cfg: Settings, model: str) -> None:
        super().__init__(cfg, model)
        self.every = cfg.train.get("assistant_turns") == "all"

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        try:
            templates.check_template(self.template, tokenizer)
        except UserError as error:
            raise UserError(
                f"dataset.template={self.template}: {error} Take dataset.template=alpaca or "
                "vicuna."
            ) from error

    def encode(
        self, record: Record, tokenizer: PreTrainedTokenizerBase, training: bool = False
    ) -> Example | None:
        every = training and self.every
        return templates.encode(
            record, self.template, tokenizer, self.seq_length, every
        )

    def is_cut(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> bool:
        return templates.is_cut(example, self.template, tokenizer)

    def fit(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Record:
        """Of a long conversation the last turns."""
        return templates.fit(record, self.template, tokenizer, self.seq_length)

    def blank(self) -> Example:
        return {"input_ids": [0], "labels": [IGNORED]}

    def collator(self, tokenizer: PreTrainedTokenizerBase, side: str) -> Collate:
        return Collator(tokenizer.pad_token_id, side)

    def loss(self, net: Any, batch: Batch, count: Any = None) -> torch.Tensor:
        """In nats per token of an answer."""
        return answer_loss(net, batch, count)

    def score(self, net: Any, batch: Batch) -> torch.Tensor:
        return answer_scores(net, batch)

    def answers(
        self,
        net: Any,
        tokenizer: PreTrainedTokenizerBase,
        records: list[Record],
        limit: int,
    ) -> list[str]:
        prompts = [
            templates.prompt(self.template, [templates.question(one)], tokenizer)
            for one in records
        ]
        ends = templates.ends(self.template, tokenizer, net.generation_config)
        return generate(net, tokenizer, prompts, limit, ends)


def generate(
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
    collate = Collator(tokenizer.pad_token_id, padding_side="left")
    size = BATCH_ON_CPU if net.device.type == "cpu" else BATCH
    for start in range(0, len(prompts), size):
        look_for_stop()
        chosen = by_length[start : start + size]
        batch = collate(
            [{"input_ids": prompts[i], "labels": prompts[i]} for i in chosen]
        )
        with torch.no_grad():
            output = net.generate(
                input_ids=batch["input_ids"].to(net.device),
                attention_mask=batch["attention_mask"].to(net.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
                stopping_criteria=answering(),
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


def answering() -> StoppingCriteriaList:
    """What lets a run be stopped between two tokens of its answers."""
    return StoppingCriteriaList([_stopped])


def _stopped(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
    """For each sequence, whether it is finished: never, but a run may be stopped here."""
    look_for_stop()
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
