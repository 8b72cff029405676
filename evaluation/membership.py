"""Was a record trained on? Scores by which to tell, higher for what looks as if it was.

All are of the answer's tokens, which are what is trained on, in nats.
"""

import math
import zlib

import numpy as np
import torch

import model
from compute.loss import answer_likelihoods
from records import templates
from records.batches import Collator, batches

LEAST = 0.2  # share of an answer's tokens that Min-K% looks at, one at least

# By name: what is shown of each. The last needs no other model, and is the control: without
# training, nothing can tell members apart unless they are of another kind to begin with.
SCORES = {
    "base minus tuned": "loss of the base less the tuned model's",
    "loss": "Yeom et al. 2018",
    "zlib": "loss over the bits that zlib needs (Carlini et al. 2021)",
    "Min-K%": "mean of the 20 % least likely tokens (Shi et al. 2024)",
    "Min-K%++": "the same of tokens' z-scores (Zhang et al. 2024)",
}

CONTROL = "base alone"


def likelihoods(
    net: torch.nn.Module,
    examples: list[templates.Example],
    collate: Collator,
    batch: int,
) -> list[np.ndarray]:
    """`compute.loss.answer_likelihoods` example by example: each (answer's tokens, 3)."""
    found: list[np.ndarray] = [np.empty((0, 3))] * len(examples)
    for chosen, tensors in batches(examples, collate, batch, net.device):
        with torch.no_grad(), model.autocast(net):
            rows, values = (each.cpu() for each in answer_likelihoods(net, tensors))
        for place, i in enumerate(chosen):
            found[i] = values[rows == place].numpy()
    return found


def scores(
    tuned: list[np.ndarray], base: list[np.ndarray], answers: list[str]
) -> dict[str, np.ndarray]:
    """Each of `SCORES`, and the `CONTROL`, of records by what both models make of them."""
    own = np.array([-tokens[:, 0].mean() for tokens in tuned])
    before = np.array([-tokens[:, 0].mean() for tokens in base])
    sums = np.array([-tokens[:, 0].sum() for tokens in tuned])
    bits = np.array([8 * len(zlib.compress(text.encode())) for text in answers])
    return {
        "base minus tuned": before - own,
        "loss": -own,
        "zlib": -sums / bits,
        "Min-K%": np.array([least(tokens[:, 0]) for tokens in tuned]),
        "Min-K%++": np.array([least(normed(tokens)) for tokens in tuned]),
        CONTROL: -before,
    }


def normed(tokens: np.ndarray) -> np.ndarray:
    """How far each token's log-likelihood lies from what the model foresees, in its spread."""
    return (tokens[:, 0] - tokens[:, 1]) / np.sqrt(np.maximum(tokens[:, 2], 1e-12))


def least(values: np.ndarray) -> float:
    """The mean of the lowest values, `LEAST` of them all, one at least."""
    return float(np.sort(values)[: max(1, math.floor(LEAST * len(values)))].mean())
