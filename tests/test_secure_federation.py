"""pytest tests/test_secure_federation.py: secure aggregation between real processes (slow)."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from assets.testbed.federation import Federation
from utils import PROJECT

pytestmark = pytest.mark.slow

RUN = (
    "experiment=quickstart num_clients=4 strategy.fraction_fit=1 num_rounds=1 "
    "evaluate.exact_match=false train.training_arguments.max_steps=2 "
    "train.save_every_round=1 train.round_timeout=600 privacy.secure_aggregation=true "
    "hydra.run.dir=results"
)


def test_a_node_is_killed_while_it_trains_and_its_masks_are_taken_away(tmp_path):
    """Of four: the sum of the other three is made from their shares, in the same attempt."""
    base = PROJECT / "assets/tiny_llama"
    with Federation(tmp_path / "federation") as federation:
        nodes = [
            federation.supernode(
                f"node-{i}",
                f'partition-id={i} num-partitions=4 cpus=1 model-path="{base}" '
                f'cache-path="{tmp_path}/cache-{i}" least-sum=3',
            )
            for i in range(4)
        ]
        run = federation.submit(PROJECT, RUN)
        nodes[3].wait_for(r"Receiving: train\.masked message")
        nodes[3].kill()
        status, output = federation.finish(run)
        assert status == "finished:completed", output
        folder = federation.superlink.folder / "results"
        [entry] = json.loads((folder / "history.json").read_text())["rounds"]
        assert (entry["replied"], entry["retries"]) == (3, 0)
        assert len(entry["failures"]) == 1
        assert entry["clients"] == []
        # A mask that is left in makes values of the size of 2^63 steps.
        state = load_file(folder / "peft_1/adapter_model.safetensors")
        assert max(tensor.abs().max() for tensor in state.values()) < 10
        assert all(torch.isfinite(tensor).all() for tensor in state.values())
        # What a node's operator can read: no figure of its records has left it.
        said = re.findall(r"train\.masked, run .*sent (.*)", nodes[0].output)
        assert len(said) == 1
        assert all(
            re.fullmatch(r"1 arrays of uint64, \d+ bytes in all", x) for x in said
        )
