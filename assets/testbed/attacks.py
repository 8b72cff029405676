"""Clients that forge their updates, and the strategies to hold against them.

Shared by `benchmarks/byzantine.py`, which measures what they cost, and its test.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

import utils
from methods import wire
from server import exchange

# Beside the figures of every client the server writes this one down.
exchange.FIGURES["train"]["update_norm"] = exchange.Figure(float, high=1e9)
NUM_MALICIOUS = 4
SETTINGS = "experiment=quickstart seed=0 strategy.fraction_fit=1"
# A mean of twenty bears larger steps on smaller batches than the quickstart's mean of two,
# and needs fewer rounds.
LARGE = (
    "train.learning_rate_max=1e-2 "
    "train.training_arguments.per_device_train_batch_size=4"
)
STRATEGIES = {
    "fedavg": f"num_rounds=10 {LARGE}",
    # About what an honest update measures halfway through the run.
    "fedavg, clip_norm": f"strategy.clip_norm=10 num_rounds=10 {LARGE}",
    "fedmedian": f"strategy=fedmedian num_rounds=10 {LARGE}",
    # What it trims on the side of the honest slows it down under an attack.
    "fedtrimmedavg": f"strategy=fedtrimmedavg strategy.beta=0.2 num_rounds=15 {LARGE}",
    # It takes one client's adapter and no mean, so it needs the quickstart's own steps.
    "krum": f"strategy=krum strategy.num_malicious_nodes={NUM_MALICIOUS}",
    "bulyan": f"strategy=bulyan strategy.num_malicious_nodes={NUM_MALICIOUS} "
    f"num_rounds=10 {LARGE}",
}
# What is sent for a tensor of an honest update.
Attack = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "scaled": lambda honest, generator: 50 * honest,
    "sign-flipped": lambda honest, generator: -10 * honest,
    "random": lambda honest, generator: torch.randn(honest.shape, generator=generator),
}


def malicious(cfg: dict[str, Any]) -> set[int]:
    """The partitions of the clients that attack."""
    everyone = range(cfg["num_clients"])
    return set(random.Random(cfg["seed"]).sample(everyone, NUM_MALICIOUS))


def byzantine(
    honest: ClientApp, cfg: dict[str, Any], attack: Attack | None
) -> ClientApp:
    """The app `honest`, but its malicious clients forge the updates that they send.

    Every client tells the norm of the update that it has made, forged or not.
    """
    forgers = malicious(cfg) if attack else set()
    client_app = ClientApp()
    client_app.query()(honest)
    client_app.evaluate()(honest)

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        if reply.has_error():
            return reply
        config = message.content["config"]
        update = wire.unpack(reply.content["arrays"].to_torch_state_dict())
        squares = sum(tensor.square().sum() for tensor in update.values())
        reply.content["metrics"]["update_norm"] = squares.sqrt().item()
        if config["partition"] in forgers:
            parts = cfg["seed"], config["partition"], config["server-round"]
            generator = torch.Generator().manual_seed(utils.mix_seed(*parts))
            forged = {k: attack(v, generator) for k, v in update.items()}
            packed, _ = wire.pack(forged, cfg["comm"]["dtype"])
            reply.content["arrays"] = ArrayRecord(packed)
        return reply

    return client_app
