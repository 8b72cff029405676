"""A model foretells the answer, token by token: instructions, questions, conversations."""

import itertools
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from compute.loss import answer_loss, answer_scores, answer_sums
from records import templates
from records.batches import Batch, Collate, Collator, at_once, by_length, padded
from records.templates import Example, Record
from tasks import words
from tasks.base import Task
from utils import IGNORED, Settings, UserError, look_for_stop


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

    def nats(self, net: Any, batch: Batch) -> torch.Tensor:
        return -answer_sums(net, batch)

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
    """Answers to tokenised prompts, in their order, stripped of outer space, nothing drawn.

    `ends`: the tokens at which an answer is over.
    """
    answers = [""] * len(prompts)
    # An encoder reads from the first token on; a decoder goes on from the last.
    apart = net.config.is_encoder_decoder
    side = "right" if apart else "left"
    for chosen in by_length(prompts, at_once(net.device)):
        asked = [prompts[i] for i in chosen]
        ids = padded(asked, tokenizer.pad_token_id, side)
        mask = padded([[1] * len(row) for row in asked], 0, side)
        with torch.no_grad():
            output = net.generate(
                input_ids=ids.to(net.device),
                attention_mask=mask.to(net.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
                stopping_criteria=StoppingCriteriaList([_stopped]),
            )
        # Prompt embeddings count as no input tokens, so the answer is what was added: behind
        # the prompt, or what a decoder of its own begins with (of BART an end).
        added = output[:, 1 if apart else ids.shape[1] :].tolist()
        texts = tokenizer.batch_decode(
            [before_end(row, ends) for row in added], skip_special_tokens=True
        )
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
