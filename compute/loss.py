"""The loss on the tokens that count: head and cross entropy on answer positions only.

Most positions of a batch are prompt or padding, and their logits are the largest thing that
a step would hold: 16 x 512 x 32,000 float32 values are 1 GB, and their gradient another.
Here the head sees the answers' positions alone, a chunk of them at a time, and what is kept
of a chunk is its gradient with respect to the hidden states (as in Liger Kernel's fused
linear cross entropy, arXiv 2410.10989). Needs torch alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from compute import zero

IGNORED = torch.nn.CrossEntropyLoss().ignore_index  # -100, as `utils.IGNORED`
CHUNK = 1024  # positions whose logits exist at one time

Inputs = dict[str, torch.Tensor]

Kept = tuple[torch.Tensor, torch.Tensor]

Way = Callable[[Any, Any, Inputs, Kept], torch.Tensor]

_WAYS: WeakKeyDictionary[Any, Way] = WeakKeyDictionary()  # by base


def answer_loss(
    net: Any, batch: dict[str, torch.Tensor], num_items: Any = None
) -> torch.Tensor:
    """Cross entropy over the labelled tokens of a batch, in nats; a scalar with gradient.

    `net` is a causal LM, with or without PEFT, on several processes inside DDP or with its
    base sharded; `batch` holds `input_ids`, `attention_mask` and `labels`, each (batch,
    length), or is what `decoding` makes for an encoder-decoder. The sum is divided by `num_items`, or else by the number of labelled tokens.
    Equal to the model's own loss up to rounding.
    """
    inner, labels, inputs = _parts(net, batch)
    head, way = _head(inner, inputs)
    kept = _kept(labels)
    targets = labels[kept]
    if way is _hidden:
        total = _total(head, way(net, head, inputs, kept), targets)
    else:
        logits = way(net, head, inputs, kept)
        total = cross_entropy(logits.float(), targets, reduction="sum")
    return total / (len(targets) if num_items is None else num_items)


def answer_sums(net: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-likelihood of each example's labelled tokens, summed, in nats; (batch,), float32.

    With gradient, 0 for an example without such tokens. Arguments, and what is held in
    memory, as of `answer_loss`.
    """
    inner, labels, inputs = _parts(net, batch)
    head, way = _head(inner, inputs)
    kept = _kept(labels)
    targets, rows = labels[kept], kept[0]
    found = way(net, head, inputs, kept)
    if way is _hidden:
        nats = _total(head, found, targets, each=True)
    else:
        nats = cross_entropy(found.float(), targets, reduction="none")
    return nats.new_zeros(len(labels)).index_add(0, rows, -nats)


def decoding(net: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch for an encoder-decoder, with `decoder_input_ids` by the model's own shift.

    `labels`: (batch, length) with one before each target that is ignored, so that what comes
    at position i of the decoder is label i + 1, as it is where a causal LM reads its answer.
    """
    base = base_of(net)
    labels = batch["labels"].roll(-1, dims=1)
    # mBART's shift looks for the last token of each row that is no padding.
    labels[(labels == IGNORED).all(1), 0] = int(base.config.pad_token_id == 0)
    shift = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    return batch | {
        "decoder_input_ids": (shift or partial(_shift, base.config))(labels)
    }


def _shift(config: Any, labels: torch.Tensor) -> torch.Tensor:
    """BART's shift, for those that have it in their forward alone (M2M-100, Blenderbot)."""
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = config.decoder_start_token_id
    return shifted.masked_fill(shifted == IGNORED, config.pad_token_id)


@torch.no_grad()
def answer_scores(net: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Per example of a batch: summed loss, tokens right, tokens; (batch, 3), in float64.

    The columns: cross entropy summed over the example's labelled tokens, in nats; how many
    of those the model finds likeliest; how many there are. Arguments as of `answer_loss`.
    """
    size = batch["labels"].shape[0]
    scores = torch.zeros(size, 3, dtype=torch.float64, device=batch["labels"].device)
    for some, wanted, row in _answers(net, batch):
        each = [
            cross_entropy(some.float(), wanted, reduction="none"),
            some.argmax(-1) == wanted,
            torch.ones_like(wanted),
        ]
        scores.index_add_(0, row, torch.stack([one.double() for one in each], dim=1))
    return scores


@torch.no_grad()
def answer_likelihoods(
    net: Any, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each labelled token of a batch, in order: its example, (tokens,), and what follows.

    (tokens, 3) in float64: its log-likelihood in nats, and the mean and the variance that the
    model gives the log-likelihood of the token there. Arguments as of `answer_loss`.
    """
    rows, found = [], []
    for some, wanted, row in _answers(net, batch):
        likely = some.float().log_softmax(-1)
        own = likely.gather(1, wanted[:, None])[:, 0]
        shares = likely.exp()
        mean = (shares * likely).sum(-1)
        spread = (shares * (likely - mean[:, None]).square()).sum(-1)
        rows.append(row)
        found.append(torch.stack([own, mean, spread], dim=1).double())
    return torch.cat(rows), torch.cat(found)


def _answers(
    net: Any, batch: dict[str, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Logits, token and example of each labelled token, up to `CHUNK` of them at a time."""
    inner, labels, inputs = _parts(net, batch)
    head, way = _head(inner, inputs)
    kept = _kept(labels)
    targets, rows = labels[kept], kept[0]
    logits = way(net, head, inputs, kept).split(CHUNK)
    if way is _hidden:
        logits = map(head, logits)
    yield from zip(logits, targets.split(CHUNK), rows.split(CHUNK), strict=True)


@torch.no_grad()
def hidden_states(net: Any, ids: torch.Tensor) -> torch.Tensor:
    """A causal LM's last hidden states, the head's input: (rows, length - 1, hidden).

    `ids`: (rows, length). For a model whose head fails on empty input, the logits instead.
    """
    inner, labels, inputs = _parts(
        net,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids},
    )
    base = base_of(inner)
    try:
        states = _hidden(net, base.get_output_embeddings(), inputs, _kept(labels))
    except Exception:  # a model may fail in any way on zero positions
        states = _plain(net, None, inputs, _kept(labels))
    return states.view(*labels.shape, -1)


def _parts(
    net: Any, batch: dict[str, torch.Tensor]
) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
    """The model without DDP or DeepSpeed, the labels shifted by one, and the model's inputs.

    Position i predicts labels[i]; the shifted labels are (batch, length - 1).
    """
    inner = _unwrapped(net)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return inner, batch["labels"][:, 1:], inputs


def _unwrapped(net: Any) -> Any:
    """The model in DDP's or DeepSpeed's wrapper, or `net` itself."""
    return getattr(net, "module", net)


def base_of(net: Any) -> Any:
    """The model of transformers' that is inside of PEFT's, and of DDP's or DeepSpeed's."""
    inner = _unwrapped(net)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


# --- three ways to the logits of the answers, (answer tokens, vocabulary) ---------------------
# Each takes `net` itself: DDP has to be called, or the gradients would not be averaged.


def _hidden(net: Any, head: Any, inputs: Inputs, kept: Kept) -> torch.Tensor:
    """The head's input at the answers' positions, (answer tokens, hidden); no logits."""
    taken: list[torch.Tensor] = []

    def take(states: torch.Tensor) -> torch.Tensor:
        taken.append(states)
        return states[:, :0]

    with _before(head, take):
        net(**inputs, use_cache=False)
    [states] = taken
    return _foretelling(states, kept)


def _narrowed(net: Any, head: Any, inputs: Inputs, kept: Kept) -> torch.Tensor:
    """The model's own logits, with the head applied to the answers' positions alone."""
    with _before(head, lambda states: _foretelling(states, kept).unsqueeze(0)):
        return net(**inputs, use_cache=False).logits.squeeze(0)


def _plain(net: Any, _: Any, inputs: Inputs, kept: Kept) -> torch.Tensor:
    """The model's own logits at all positions, and the answers' out of them."""
    logits = net(**inputs, use_cache=False).logits
    return _foretelling(logits, kept)


@contextmanager
def _before(
    head: Any, choose: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Replace the head's input by `choose(input)`, by a forward pre-hook on the head.

    A hook, because PEFT may have wrapped the head in a layer of its own.
    """
    handle = head.register_forward_pre_hook(
        lambda _, given: (choose(given[0]), *given[1:])
    )
    try:
        yield
    finally:
        handle.remove()


def _head(inner: Any, inputs: Inputs) -> tuple[Any, Way]:
    """The head (`lm_head`), and the cheapest way that gives this model's own logits.

    Some models scale or cap the logits after the head, and some have no separate head.
    Tried once for each base, on 16 tokens.
    """
    base = base_of(inner)
    head = base.get_output_embeddings()
    if base not in _WAYS:
        _WAYS[base] = _find_way(inner, head, inputs, _sharded(base))
    return head, _WAYS[base]


@torch.no_grad()
def _find_way(inner: Any, head: Any, inputs: Inputs, sharded: bool) -> Way:
    if head is None:
        return _plain
    ids = inputs["input_ids"][inputs["attention_mask"] != 0]
    ids = ids[:16].repeat(16)[:16].view(2, 8)
    few = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in inputs:
        few["decoder_input_ids"] = ids
    labels = ids[:, 1:].clone()
    labels[0, :3] = labels[1, 4:] = IGNORED  # answers of other places and lengths
    kept = _kept(labels)
    made: list[torch.Tensor] = []
    # Draws of dropout: the same in each try, and none that training would miss.
    with torch.random.fork_rng([ids.device] if ids.is_cuda else []):
        torch.manual_seed(0)
        handle = head.register_forward_hook(lambda *call: made.append(call[-1]))
        try:
            whole = inner(**few, use_cache=False).logits
        finally:
            handle.remove()
        untouched = len(made) == 1 and torch.equal(made[0].float(), whole.float())
        wanted = _foretelling(whole, kept).float()
        # FSDP and ZeRO-3 gather a sharded head's weights only inside the model's own forward.
        for way in (_hidden, _narrowed) if untouched and not sharded else (_narrowed,):
            torch.manual_seed(0)
            try:
                found = way(inner, head, few, kept)
                found = head(found) if way is _hidden else found
            except Exception:  # a model may fail in any way on fewer positions
                continue
            # Matrix products of another shape round differently, by 2**-8 in bfloat16.
            far = (found.float() - wanted).abs().max() if len(found) else 0
            if found.shape == wanted.shape and far <= 0.02 * wanted.abs().max():
                return way
    return _plain


def _sharded(base: Any) -> bool:
    """Whether each process holds a part of every weight (FSDP2, ZeRO-3)."""
    return isinstance(base, FSDPModule) or zero.in_parts(base)


def _kept(labels: torch.Tensor) -> Kept:
    """Where a token is foretold: each one's row, and its column counted from the end.

    Places and not a mask, for which a GPU would be waited for once more at each use, and again
    in the backward pass.
    """
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    return rows, columns - labels.shape[1]


def _foretelling(states: torch.Tensor, kept: Kept) -> torch.Tensor:
    """The states, or logits, before those tokens; prompt tuning prepends virtual tokens."""
    rows, ends = kept
    return states[rows, ends + states.shape[1] - 1]


def _total(
    head: Any, hidden: torch.Tensor, targets: torch.Tensor, each: bool = False
) -> torch.Tensor:
    """Cross entropy of `head(hidden)`, (positions, hidden), chunk by chunk: summed, or `each`
    position's, (positions,)."""
    if not any(parameter.requires_grad for parameter in head.parameters()):
        return _FrozenHead.apply(hidden, targets, head, each)
    parts = [
        checkpoint(_nats, head, rows, wanted, each, use_reentrant=False)
        for rows, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(parts) if each else sum(parts)


def _nats(
    head: Any, rows: torch.Tensor, targets: torch.Tensor, each: bool
) -> torch.Tensor:
    reduction = "none" if each else "sum"
    return cross_entropy(head(rows).float(), targets, reduction=reduction)


class _FrozenHead(torch.autograd.Function):
    """Computes each chunk's gradient in the forward pass, so its logits can be freed."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Any, each: bool
    ) -> torch.Tensor:
        shape = (len(hidden),) if each else ()
        total = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            rows = hidden[part].detach().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                loss = _nats(head, rows, targets[part], each)
            total[part if each else ...] += loss.detach()
            if gradient is not None:
                # No position's loss is another one's as well, so each keeps its own.
                ones = torch.ones_like(loss)
                (gradient[part],) = torch.autograd.grad(loss, rows, ones)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, None, None, None]:
        # Freed at once: the layers' backward needs the memory.
        gradient, ctx.gradient = ctx.gradient, None
        by = upstream[:, None] if upstream.dim() else upstream
        return gradient.mul_(by), None, None, None
