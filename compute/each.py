"""Gradients of each example of a batch, by one backward pass of all.

A linear layer's weight has of an example the gradient g^T x, of its inputs x (length, in) and
its outputs' gradients g (length, out): they are there in a backward pass of the batch, where
autograd would sum over its examples as well (Goodfellow 2015, arXiv 1510.01799). Needs torch
alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear
from torch.nn.modules.batchnorm import _BatchNorm

# Losses of some examples, (examples,), and of each parameter their gradients, (examples,
# *shape), or None where there are none.
Found = tuple[torch.Tensor, list[torch.Tensor | None]]


def alone(parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> Found:
    """Of one example, by a backward pass of its `loss`, a scalar."""
    _clear(parameters)
    loss.backward()
    gradients = [p.grad if p.grad is None else p.grad[None] for p in parameters]
    _clear(parameters)
    return loss.detach()[None], gradients


def together(
    net: torch.nn.Module,
    parameters: Sequence[torch.nn.Parameter],
    losses: Callable[[], torch.Tensor],
    rows: int,
) -> Found | None:
    """Of the examples of a batch; None where that cannot be told, and they have to be alone.

    `losses` calls `net` with `rows` rows, of which those of example i of n are i, i + n and so
    on, and gives each example's loss, (n,). No row may depend on another one (`_mixes`). A
    parameter that is (also) used elsewhere than in a linear layer's own forward on (rows,
    length, features), or a classifier's on (rows, features), is found out: it has a gradient by
    autograd. So has one on (rows, rows, features), where the length may come first.
    """
    layers = {
        name: module
        for name, module in net.named_modules()
        if type(module) is torch.nn.Linear and _trained(module)
    }
    known = {p for layer in layers.values() for p in layer.parameters(recurse=False)}
    if not known.issuperset(parameters) or _mixes(net):
        return None
    _clear(parameters)
    made: dict[torch.nn.Parameter, torch.Tensor] = {}
    words = getattr(net, "get_output_embeddings", lambda: None)() is not None
    with _watched(layers, rows, words, made):
        each = losses()
        each.sum().backward()
    mixed = any(parameter.grad is not None for parameter in parameters)
    _clear(parameters)
    if mixed:
        return None
    # A preference's answers are rows of their own.
    gradients = (made.get(p) for p in parameters)
    return each.detach(), [
        g if g is None else g.unflatten(0, (-1, len(each))).sum(0) for g in gradients
    ]


@contextmanager
def _watched(
    layers: dict[str, torch.nn.Linear],
    rows: int,
    words: bool,
    made: dict[torch.nn.Parameter, torch.Tensor],
) -> Iterator[None]:
    """Have `layers` add each row's gradients to `made`, and autograd not sum them.

    `words`: whether the model has a head for words, which sees some tokens of all rows.
    """

    def forward(layer: torch.nn.Linear, head: bool, x: torch.Tensor) -> torch.Tensor:
        if len(x) == rows and x.dim() == 3 and x.shape[1] != rows:
            return _Each.apply(x, layer.weight, layer.bias, made)
        if len(x) == rows and x.dim() == 2 and head:
            return _Each.apply(x[:, None], layer.weight, layer.bias, made)[:, 0]
        return linear(x, layer.weight, layer.bias)

    for name, layer in layers.items():
        # In a numbered block it may be an expert, with as many tokens as there are rows.
        head = not words and not any(part.isdigit() for part in name.split("."))
        layer.forward = partial(forward, layer, head)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


class _Each(torch.autograd.Function):
    """A linear layer; what is saved is dropped and recomputed by checkpointing as any other."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.nn.Parameter,
        bias: torch.nn.Parameter | None,
        made: dict[torch.nn.Parameter, torch.Tensor],
    ) -> torch.Tensor:
        output = linear(x, weight, bias)
        ctx.save_for_backward(x.to(output.dtype))  # as autocast multiplied it
        ctx.layer = x.dtype, weight, bias, made
        return output

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, None, None, None]:
        (x,), (dtype, weight, bias, made) = ctx.saved_tensors, ctx.layer
        if weight.requires_grad:
            _add(made, weight, upstream.mT @ x)
        if bias is not None and bias.requires_grad:
            _add(made, bias, upstream.sum(1))
        back = upstream @ weight.to(upstream.dtype)
        return back.to(dtype), None, None, None


def _add(
    made: dict[torch.nn.Parameter, torch.Tensor],
    parameter: torch.nn.Parameter,
    gradient: torch.Tensor,
) -> None:
    gradient = gradient.to(parameter.dtype)
    made[parameter] = made[parameter] + gradient if parameter in made else gradient


def _trained(layer: torch.nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters(recurse=False))


def _mixes(net: torch.nn.Module) -> bool:
    """Whether what a row comes to depends on the others: by what LLM.int8 takes for outliers, by
    batch norms, or by how many tokens an expert has room for."""
    return hasattr(getattr(net, "config", None), "expert_capacity") or any(
        type(module).__name__ == "Linear8bitLt" or isinstance(module, _BatchNorm)
        for module in net.modules()
    )


def _clear(parameters: Sequence[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
