"""The head of a base that tells labels apart or finds a span: from the seed, and in batches.

Such a base (transformers' ForSequenceClassification, ForTokenClassification and
ForQuestionAnswering) has weights that no checkpoint of a language model holds. Needs torch
alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from compute.loss import base_of
from utils import UserError, mix_seed


def parts(base: Any) -> list[str]:
    """The modules of a base's head, by name: all outside of its body, and the body's pooler.

    BERT's pooler belongs to it because a checkpoint of its masked language model has none.
    Raises `UserError` where the model has no body of its own.
    """
    body = base.base_model
    if body is base:
        raise UserError(
            f"{type(base).__name__} does not tell its head from the rest. Take another "
            "architecture."
        )
    found = [
        name
        for name, module in base.named_children()
        if module is not body and any(True for _ in module.parameters())
    ]
    if getattr(body, "pooler", None) is not None:
        found.append(f"{base.base_model_prefix}.pooler")
    return found


def parameters(base: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The head's, by their names in the base."""
    for part in parts(base):
        yield from base.get_submodule(part).named_parameters(prefix=part)


def begin(base: Any, seed: int) -> None:
    """Make a head's values of `seed` and each one's name alone, whatever was loaded.

    Matrices normal with the base's own `initializer_range`, biases 0, scales 1; in float32,
    as all that is trained. On the meta device there is nothing to make.
    """
    spread = getattr(base.config, "initializer_range", None) or 0.02
    for name, old in list(parameters(base)):
        if old.is_meta:
            continue
        generator = torch.Generator().manual_seed(mix_seed(seed, "head", name))
        values = torch.full(old.shape, float(not name.endswith("bias")))
        if old.ndim > 1:
            values = torch.randn(old.shape, generator=generator) * spread
        module, _, own = name.rpartition(".")
        made = torch.nn.Parameter(values.to(old.device), requires_grad=False)
        setattr(base.get_submodule(module), own, made)


def logits(net: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a model for sequences says of each text: (rows, labels).

    A causal model's are those at its last token, by the attention mask. Transformers finds it
    by the padding token's id, which may well be a token of the text (5.23.0).
    """
    base, mask = base_of(net), inputs["attention_mask"]
    after = mask.flip(1).argmax(1)  # tokens of padding after the last one
    with _at(getattr(base, "score", None), after):
        return net(**inputs).logits


@contextmanager
def _at(score: Any, after: torch.Tensor) -> Iterator[None]:
    """Give all positions the logits of the one that `after` tells from the end."""

    def pick(_: Any, __: Any, made: torch.Tensor) -> torch.Tensor:
        if made.ndim < 3:  # it was asked for one position
            return made
        rows = torch.arange(len(made), device=made.device)
        # From the end, because prompt tuning puts tokens of its own before the text.
        chosen = made[rows, made.shape[1] - 1 - after]
        return chosen[:, None].expand(made.shape)

    if score is None:  # an encoder's
        yield
        return
    handle = score.register_forward_hook(pick)
    try:
        yield
    finally:
        handle.remove()
