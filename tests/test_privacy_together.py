"""pytest tests/test_privacy_together.py: each level of privacy with secure aggregation."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from methods.base import clipped
from server.rounds import run
from utils import read_json

ALL = ("num_clients=4", "strategy.fraction_fit=1", "num_rounds=1")
SECURE = "privacy.secure_aggregation=true"


def adapter(folder):
    return load_file(folder / "peft_1/adapter_model.safetensors")


def far(one, other):
    return max((one[k].double() - other[k].double()).abs().max().item() for k in one)


@pytest.mark.slow
def test_clients_that_add_the_noise_make_the_sum_that_the_server_would(
    configure, loopback, tmp_path
):
    """With next to no noise: each update clipped, counted alike, over the cohort."""
    quiet = ("privacy=client", "privacy.epsilon=null", "privacy.noise_multiplier=1e-9")
    quiet += ("privacy.clip_norm=0.05", "comm.dtype=float32")
    for name, more in (("open", ()), ("summed", (SECURE,))):
        cfg = configure(*ALL, *quiet, *more)
        (tmp_path / name).mkdir()
        run(cfg, loopback(cfg), tmp_path / name)
    assert far(adapter(tmp_path / "open"), adapter(tmp_path / "summed")) < 1e-7
    ledgers = [read_json(tmp_path / n / "privacy.json") for n in ("open", "summed")]
    assert [entry["clients"] for entry in ledgers[0]] == [[0, 1, 2, 3]]
    assert [entry["clients"] for entry in ledgers[1]] == [[0, 1, 2, 3]]


@pytest.mark.slow
def test_the_noise_of_the_clients_parts_is_that_which_is_claimed(
    configure, loopback, tmp_path
):
    """At least that: as much as if only those had sent their part that have to."""
    overrides = (
        *("privacy=client", "privacy.epsilon=null", "privacy.clip_norm=0.5"),
        *("comm.dtype=float32", SECURE, *ALL),
    )
    for name, z in (("quiet", 1e-9), ("noisy", 2)):
        cfg = configure(*overrides, f"privacy.noise_multiplier={z}")
        (tmp_path / name).mkdir()
        run(cfg, loopback(cfg), tmp_path / name)
    noisy, quiet = adapter(tmp_path / "noisy"), adapter(tmp_path / "quiet")
    noise = np.concatenate(
        [(noisy[k] - quiet[k]).double().numpy().ravel() for k in quiet]
    )
    # Four parts where three would do: (2 x 0.5)^2 / 3 each, over a cohort of 4.
    assert noise.std() == pytest.approx((4 / 3) ** 0.5 / 4, rel=0.02)
    entry = json.loads((tmp_path / "noisy/history.json").read_text())["rounds"][0]
    assert entry["clients"] == []
    assert "train_loss" not in entry
    assert entry["epsilon"] == pytest.approx(1.99, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["record", "local"])
def test_other_levels_are_summed_as_well(level, configure, loopback, tmp_path):
    overrides = [f"privacy={level}", SECURE, *ALL]
    cfg = configure(*overrides)
    run(cfg, loopback(cfg), tmp_path)
    entry = json.loads((tmp_path / "history.json").read_text())["rounds"][0]
    assert entry["replied"] == 4
    assert entry["clients"] == []
    assert all(torch.isfinite(v).all() for v in adapter(tmp_path).values())


def test_clipping_is_to_the_norm_over_all_tensors():
    update = {"a": torch.full((4,), 3.0), "b": torch.full((4,), 4.0)}  # norm 10
    one = clipped(update, 5.0)
    assert torch.equal(one["a"], torch.full((4,), 1.5))
    assert torch.equal(one["b"], torch.full((4,), 2.0))
