"""pytest tests/test_baselines.py: what a federation is compared with: clients alone, and pooled data."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import client
import dataset
from server.rounds import Server, run
from server.runs import trained_records


@pytest.mark.slow
def test_alone_each_client_trains_an_adapter_that_nobody_else_gets(
    few, configure, loopback, tmp_path
):
    overrides = ("mode=local", "strategy=fedadam", "strategy.fraction_evaluate=1")
    overrides += ("evaluate.holdout=0.02",)
    cfg = configure(few, *overrides, "evaluate.exact_match=true", "comm.dtype=float32")
    cfg["evaluate"]["max_new_tokens"] = 1
    run(cfg, loopback(cfg), tmp_path)
    start = Server(cfg, loopback(cfg)).initial_adapter()
    for partition in range(4):
        state = start
        for number in (1, 2):
            trained, _ = client.train(cfg, state, partition, number)
            # By way of the update, as it travels.
            state = {k: state[k] + (trained[k] - state[k]) for k in state}
        file = f"peft_2/client_{partition}/adapter_model.safetensors"
        saved = load_file(tmp_path / file)
        assert len(saved) == len(state)
        assert all(
            torch.equal(saved[name.replace(".default", "")], state[name])
            for name in state
        )
    summary = json.loads((tmp_path / "summary.json").read_text())
    each = [entry["test_loss"] for entry in summary["clients"]]
    assert len(set(each)) == 4
    assert summary["test_loss_after"] == pytest.approx(np.mean(each))
    # The scores of each question are the clients' means as well.
    told = json.loads((tmp_path / "test_scores.json").read_text())
    for whose, when in (("base", "before"), ("tuned", "after")):
        ratio = sum(told[whose]["nats"]) / sum(told[whose]["tokens"])
        assert summary[f"test_loss_{when}"] == pytest.approx(ratio)
        share = np.mean(told[whose]["f1"])
        assert summary[f"f1_{when}"] == pytest.approx(share)
    [_, last] = json.loads((tmp_path / "history.json").read_text())["rounds"]
    own = client.evaluate(cfg, state, partition=3)
    assert last["eval_clients"][3]["eval_loss"] == own["eval_loss"]


@pytest.mark.slow
def test_centralized_one_takes_the_cohorts_steps_on_everybodys_data(
    configure, loopback, tmp_path
):
    cfg = configure("mode=centralized", "strategy=krum", "strategy.fraction_fit=1")
    assert cfg["train"]["training_arguments"]["max_steps"] == 4 * 2
    rows = dataset.training_rows(cfg, partition=2)
    parts = [dataset.load_partition(cfg, partition) for partition in range(4)]
    assert [*rows] == [row for part in parts for row in part]
    run(cfg, loopback(cfg), tmp_path)
    rounds = json.loads((tmp_path / "history.json").read_text())["rounds"]
    for entry in rounds:
        assert entry["replied"] == 1
        assert entry["clients"][0]["num-examples"] == 4 * 2 * 4
    # Whoever is asked has the same records: they count once.
    assert trained_records(cfg, rounds) == f"{len(rows)}, everybody's"


@pytest.mark.slow
def test_centralized_by_epochs_as_many_passes_as_the_cohort_makes(configure):
    epochs = "train.training_arguments.max_steps=-1"
    cfg = configure("mode=centralized", "strategy.fraction_fit=0.5", epochs)
    arguments = cfg["train"]["training_arguments"]
    assert (arguments["max_steps"], arguments["num_train_epochs"]) == (-1, 0.5)


@pytest.mark.slow
def test_nothing_that_is_held_back_is_pooled(configure):
    cfg = configure("mode=centralized", "strategy.fraction_evaluate=1")
    trained = [str(row) for row in dataset.training_rows(cfg, partition=0)]
    for partition in range(4):
        rows = dataset.load_partition(cfg, partition)
        _, held = dataset.hold_out(rows, cfg["evaluate"]["holdout"], cfg["seed"])
        assert not {str(row) for row in held} & set(trained)
