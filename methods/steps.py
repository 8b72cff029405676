"""What is done to updates on their way, as the configuration has it."""

from collections.abc import Sequence
from dataclasses import replace

from methods import lora, privacy
from methods.base import Contribution, Step, Steps, clipped
from methods.deflate import Deflated
from methods.sparse import TopK
from methods.wire import Arrays, Wire
from utils import Settings, cohort_size


def build(
    cfg: Settings,
    layers: Sequence[lora.Layer] = (),
    level: privacy.Privacy | None = None,
) -> Steps:
    """The steps of a run, in the order in which a client takes them.

    `layers`: the adapter's, which the server knows. `level`: what `conf/privacy` names, where
    the caller goes on to ask it.
    """
    level = level or privacy.build(cfg.privacy)
    cohort = cohort_size(cfg.num_clients, cfg.strategy.fraction_fit)
    return Steps(
        Clip(cfg.strategy.clip_norm),
        ClipWeights(cfg.strategy.clip_weights, layers),
        level.step(cohort),
        # In a sum updates travel in fixed point (`methods.secure`).
        Step() if level.secure_aggregation else travels(cfg.comm),
    )


def form(comm: Settings) -> Wire:
    """What an update is packed to."""
    return TopK(comm.dtype, comm.top_k) if comm.top_k else Wire(comm.dtype)


def travels(comm: Settings) -> Steps:
    """An update as it travels: packed, and compressed or not."""
    made = form(comm)
    return Steps(made, (Deflated if comm.compress else Arrays)(made.layout))


class Clip(Step):
    """Updates scaled down to an L2 norm of `longest` over all tensors, if they are longer.

    By the server, who need not trust the clients for it. What one can do to a mean is then
    bounded (Sun et al. 2019, arXiv 1911.07963). None: as they are.
    """

    def __init__(self, longest: float | None) -> None:
        self.longest = longest

    def arrive(self, one: Contribution) -> Contribution:
        if self.longest is None:
            return one
        return replace(one, update=clipped(one.update, self.longest))


class ClipWeights(Step):
    """Updates scaled down until what they do to the base's weights is at most `longest`.

    That is ||s (B_i A_i - B A)||_F over all layers of LoRA: what a client can do to the exact
    mean of products, which `strategy=svd` takes. The mean of factors is bounded by `Clip`:
    huge factors may do little together, and much with another client's. By the server. None:
    as they are.
    """

    def __init__(self, longest: float | None, layers: Sequence[lora.Layer]) -> None:
        self.longest, self.layers = longest, layers

    def arrive(self, one: Contribution) -> Contribution:
        if self.longest is None:
            return one
        scale = lora.share_within(self.layers, one, self.longest)
        return replace(one, update={k: v * scale for k, v in one.update.items()})
