"""pytest tests/test_record_privacy.py: DP-SGD on clients, its accounting, a node's ceiling."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy import stats

import app
import client
import dataset
import model
import tasks
from compute import each
from methods import dpsgd, privacy
from methods.noise import noise
from node import permit
from records import batches, templates
from server import rounds
from utils import PROJECT, Refusal, Settings, UserError, read_json

RECORDS = [
    {
        "instruction": f"Question {i}" + " of many words" * (i % 3),
        "input": "",
        "output": "It is " + "none of those that were named" * (i % 2),
    }
    for i in range(6)
]


def mechanism(**values) -> dpsgd.Mechanism:
    plain = {
        **{"records": 10, "rate": 0.5, "steps": 1, "clip_norm": 1.0},
        **{"noise_multiplier": 1.0, "told": {}},
    }
    return dpsgd.Mechanism(**plain | values)


@pytest.fixture
def six(tmp_path) -> str:
    """Overrides: one client, that has six records of different lengths, in each step."""
    (path := tmp_path / "six.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return (
        f"dataset=local dataset.path={path} num_clients=1 strategy.fraction_fit=1 "
        "train.training_arguments.gradient_accumulation_steps=2 privacy=record "
        "privacy.epsilon=null privacy.noise_multiplier=1e-4 "
        "model.quantization=null +train.training_arguments.optim=sgd "
        "+train.training_arguments.learning_rate=0.5 train.training_arguments.max_steps=1"
    )


@pytest.fixture
def exactly(monkeypatch) -> None:
    """Compute in float32: what is compared would differ by bfloat16's rounding."""
    monkeypatch.setattr(model, "compute_dtype", lambda device: torch.float32)
    model.forget()
    yield
    model.forget()


# --- gradients ------------------------------------------------------------------------------


def one_by_one(net: torch.nn.Module, names: list[str]) -> list[dict[str, torch.Tensor]]:
    """Each record's gradients, by transformers' own loss of a batch that it is alone in."""
    tokenizer = model.load_tokenizer("assets/tiny_llama")
    parameters = dict(net.named_parameters())
    found = []
    for record in RECORDS:
        example = templates.encode(record, "alpaca", tokenizer, 128)
        ids, labels = (torch.tensor([example[k]]) for k in ("input_ids", "labels"))
        net.zero_grad()
        net(input_ids=ids, labels=labels).loss.backward()
        found.append({name: parameters[name].grad.clone() for name in names})
    net.zero_grad()
    return found


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["peft=lora", "sharing=ffa", "peft=ia3"])
def test_a_step_is_the_mean_of_each_records_clipped_gradient(
    method, checkpointing, six, exactly, configure, tmp_path
):
    given = f"{method} model.gradient_checkpointing={checkpointing}"
    cfg = configure(six, given)
    generator = torch.Generator().manual_seed(0)
    start = {
        # B begins as 0, and A would have no gradient.
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in client.initial_adapter(cfg).items()
    }
    trained = [n for n in start if method != "sharing=ffa" or "lora_A" not in n]
    net = model.build(cfg["model"], cfg["peft"], cfg["seed"], torch.device("cpu"))
    model.set_adapter_state(net, start)
    found = one_by_one(net, trained)
    norms = sorted(map(norm, found))
    longest = (norms[2] + norms[3]) / 2  # three are clipped, and three are not
    assert norms[2] < 0.99 * longest < 1.01 * longest < norms[3]

    clip = longest / math.sqrt(1 - dpsgd.LOSS_SHARE**2)
    cfg = configure(six, given, f"privacy.clip_norm={clip}")
    cfg["residuals"] = str(tmp_path)
    state, metrics = client.train(cfg, start, partition=0, server_round=1)
    for name in start:
        moved = (start[name] - state[name]) / 0.5
        if name not in trained:
            assert torch.equal(state[name], start[name])
            continue
        by_hand = sum(g[name] * min(1, longest / norm(g)) for g in found) / 6
        assert (moved - by_hand).abs().max() < 3e-4 * longest, name
    assert metrics["num-examples"] == 8  # as if there were as many as are expected


def test_no_record_changes_a_sum_by_more_than_the_clip_norm():
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    unused = torch.nn.Parameter(torch.ones(4))

    def loss(scale: float) -> torch.Tensor:
        return scale * (parameters[0].sum() + parameters[1].square().sum())

    noiseless = mechanism(noise_multiplier=0.0, clip_norm=0.7)

    def summed(*scales: float) -> list[float]:
        every = [*parameters, unused]
        mean = noiseless.step(every, (each.alone(every, loss(x)) for x in scales))
        flat = torch.cat([p.grad for p in [*parameters, unused]]).tolist()
        # Its coordinate of the vector that the noise is for.
        coordinate = mean * dpsgd.LOSS_SHARE * 0.7 / dpsgd.LARGEST_LOSS
        return np.array([*flat, coordinate]) * noiseless.expected

    short = summed(0.01)
    assert short[:3] == pytest.approx([0.01] * 3)  # as it is
    for scale in (0.01, 1.0, 1e6):
        change = np.linalg.norm(summed(0.01, scale) - short)
        assert change <= 0.7 * (1 + 1e-6)
    assert np.linalg.norm(summed(1e6)) == pytest.approx(0.7, rel=1e-3)
    for broken in (math.nan, math.inf, 1e38):  # a sum that is not finite would tell
        assert summed(0.01, broken) == pytest.approx(short)


@pytest.mark.slow
def test_proximal_term_has_no_noise_and_is_there_without_records(configure):
    cfg = configure("privacy=record")
    start = client.initial_adapter(cfg)
    net = model.build(cfg["model"], cfg["peft"], cfg["seed"], torch.device("cpu"))
    model.set_adapter_state(net, start)
    trainer = client.NoisyTrainer(
        model=net,
        args=client.training_arguments(cfg, 1, 0),
        task=tasks.build(cfg),
        data_collator=batches.Collator(0, "left"),
        mechanism=mechanism(noise_multiplier=0.0),
        size=1,
        proximal_mu=0.5,
        anchor={name: value - 0.01 for name, value in start.items()},
    )
    trainer.training_step(net, [])
    for parameter in trainer.trained:
        assert torch.allclose(parameter.grad, torch.full_like(parameter, 0.5 * 0.01))


@pytest.mark.slow
def test_control_variates_are_means_of_noisy_gradients(six, configure, tmp_path):
    cfg = configure(
        six, "privacy.noise_multiplier=1 train.training_arguments.max_steps=3"
    )
    cfg["residuals"] = str(tmp_path)
    start = client.initial_adapter(cfg)
    zero = {name: torch.zeros_like(value) for name, value in start.items()}
    state, _ = client.train(cfg, start, 0, 1, correction=zero)
    for name in start:
        by_control = start[name] - 0.5 * 3 * state[f"gradient/{name}"]
        assert torch.allclose(state[name], by_control, atol=1e-5)


# --- randomness -----------------------------------------------------------------------------


def test_noise_is_gaussian_of_the_deviation_that_is_accounted_for():
    parameter = torch.nn.Parameter(torch.zeros(200, 1000))
    noisy = mechanism(noise_multiplier=1.5, clip_norm=0.4)  # of 5 expected records
    noisy.step([parameter], [])
    values = parameter.grad.flatten().double().numpy() / (1.5 * 0.4 / 5)
    assert stats.kstest(values, "norm").pvalue > 1e-6
    assert values.std() == pytest.approx(1, abs=0.01)
    few = torch.nn.Parameter(torch.zeros(1))
    nats = np.array([noisy.step([few], []) for _ in range(2000)])
    deviation = 1.5 * dpsgd.LARGEST_LOSS / dpsgd.LOSS_SHARE / 5
    assert stats.kstest(nats / deviation, "norm").pvalue > 1e-6


def test_no_seed_decides_noise_or_draws():
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        made.append((noise((50,), 1.0).tolist(), mechanism(records=100).draw()))
    assert made[0][0] != made[1][0]
    assert made[0][1] != made[1][1]


def test_batches_are_poisson():
    steps = mechanism(records=100, rate=0.03, steps=20_000).draw()
    sizes = np.array([len(step) for step in steps])
    assert sizes.mean() == pytest.approx(3, abs=0.1)  # 8 standard errors
    assert sizes.var() == pytest.approx(100 * 0.03 * 0.97, rel=0.1)
    assert (sizes == 0).mean() == pytest.approx(0.97**100, abs=0.015)
    times = np.bincount([place for step in steps for place in step], minlength=100)
    assert len(times) == 100
    assert times.min() > 600 - 6.5 * math.sqrt(600)
    assert times.max() < 600 + 6.5 * math.sqrt(600)
    assert all(step == sorted(set(step)) for step in steps)


def test_every_record_is_in_each_step_where_the_batch_is_as_large():
    assert mechanism(records=5, rate=1.0, steps=3).draw() == [[0, 1, 2, 3, 4]] * 3


# --- accounting -------------------------------------------------------------------------------


def test_epsilon_is_opacus():
    prv, rdp = PRVAccountant(), RDPAccountant()
    for accountant in (prv, rdp):
        for _ in range(100):
            accountant.step(noise_multiplier=1.1, sample_rate=0.05)
        for _ in range(50):
            accountant.step(noise_multiplier=0.9, sample_rate=0.02)
    ours = dpsgd.epsilon(((1.1, 0.05, 100), (0.9, 0.02, 50)), 1e-5)
    assert ours == pytest.approx(prv.get_epsilon(1e-5), rel=1e-9)
    assert ours < rdp.get_epsilon(1e-5)
    assert dpsgd.epsilon((), 1e-5) == 0


def test_epsilon_of_whole_batches_is_above_the_gaussian_mechanisms_own():
    """Every record in each step: mu = sqrt(k) / z, and z = 1 is at 4.38 and 10.0 there."""
    for steps, exact in ((1, 4.38), (4, 10.0)):
        assert exact <= dpsgd.epsilon(((1.0, 1.0, steps),), 1e-5) < 1.2 * exact


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.075), (2.0, 0.01), (0.7, 0.5)])
def test_epsilon_of_one_step_is_the_exact_one(noise, rate):
    """The sum of one coordinate with the record's, (1 - q) N(0, z) + q N(1, z), is above e^eps
    times as likely as without it, N(0, z), beyond a point; delta is by how much."""

    def delta(epsilon: float) -> float:
        point = noise**2 * math.log((math.exp(epsilon) - 1 + rate) / rate) + 1 / 2
        without = stats.norm.sf(point / noise)
        withit = (1 - rate) * without + rate * stats.norm.sf((point - 1) / noise)
        return withit - math.exp(epsilon) * without

    ours = dpsgd.epsilon(((noise, rate, 1),), 1e-5)
    assert delta(ours) <= 1e-5 < delta(ours - 0.03)


def test_little_noise_is_told_as_what_it_is():
    assert dpsgd.epsilon(((1e-3, 1.0, 10),), 1e-5) > 1e6


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.5, 8.0])
def test_the_noise_that_is_found_is_enough_and_no_more(target):
    noise = dpsgd.noise_for(target, 1e-5, 0.08, 200)
    assert dpsgd.epsilon(((noise, 0.08, 200),), 1e-5) <= target
    assert dpsgd.epsilon(((0.97 * noise, 0.08, 200),), 1e-5) > target


def test_no_noise_is_enough_for_next_to_nothing():
    with pytest.raises(UserError, match=r"privacy.epsilon=1e-06"):
        dpsgd.noise_for(1e-6, 1e-5, 1.0, 10)


# --- the ledger -------------------------------------------------------------------------------


def in_a_process(work: Callable[[], None]) -> int:
    if not (child := os.fork()):
        work()
        os._exit(0)
    return child


def test_what_was_charged_survives_kill_9(tmp_path):
    ledger = dpsgd.Ledger(tmp_path / "a" / "0-privacy.json")

    def train() -> None:
        ledger.charge(dpsgd.Use("run", 1.0, 0.1, 10), [])
        os.kill(os.getpid(), signal.SIGKILL)

    for times in (1, 2):  # the round is done again
        os.waitpid(in_a_process(train), 0)
        assert ledger.uses() == [dpsgd.Use("run", 1.0, 0.1, 10 * times)]


def test_no_charge_is_lost_where_two_runs_ask_at_a_time(tmp_path):
    ledger = dpsgd.Ledger(tmp_path / "0-privacy.json")

    def train(run: str) -> None:
        for _ in range(20):
            ledger.charge(dpsgd.Use(run, 1.0, 0.1, 1), [])

    for child in [in_a_process(lambda run=run: train(run)) for run in "abab"]:
        os.waitpid(child, 0)
    assert {use.run: use.steps for use in ledger.uses()} == {"a": 40, "b": 40}


def until_refused(work: Callable[[int], float], why: str) -> list[float]:
    done: list[float] = []

    def go_on() -> None:
        while len(done) < 100:
            done.append(work(len(done)))

    with pytest.raises(Refusal, match=why):
        go_on()
    return done


@pytest.mark.slow
def test_a_limit_is_never_passed_and_what_was_refused_is_not_charged(tmp_path):
    ledger = dpsgd.Ledger(tmp_path / "0-privacy.json")
    limit = dpsgd.Limit("the limit", 4.0, 1e-5)

    def charge(number: int) -> int:
        ledger.charge(dpsgd.Use(f"run {number % 2}", 1.0, 0.1, 10), [limit])
        return number

    done = len(until_refused(charge, "would pass the limit"))
    assert done > 1
    assert sum(use.steps for use in ledger.uses()) == 10 * done
    assert dpsgd.epsilon(((1.0, 0.1, 10 * done),), 1e-5) <= 4
    assert dpsgd.epsilon(((1.0, 0.1, 10 * done + 10),), 1e-5) > 4


def test_a_broken_ledger_is_no_empty_one(tmp_path):
    (file := tmp_path / "0-privacy.json").write_text('[{"run": "a"}]')
    with pytest.raises(UserError, match="is broken"):
        dpsgd.Ledger(file).charge(dpsgd.Use("a", 1.0, 0.1, 1), [])


# --- a node's own ceiling -----------------------------------------------------------------------

RUN = (
    "experiment=quickstart num_clients=4 num_rounds=2 strategy.fraction_fit=1 "
    "evaluate.exact_match=false train.training_arguments.max_steps=2 "
    "train.training_arguments.per_device_train_batch_size=4"
)
NOISY = "privacy=record privacy.epsilon=null privacy.noise_multiplier=1"


@pytest.fixture
def node(tmp_path, monkeypatch) -> dict:
    """The settings of a node with 30 records of its own."""
    monkeypatch.chdir(PROJECT)  # and back, because a node goes there
    rows = [RECORDS[i % 6] for i in range(30)]
    (file := tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"data-path": str(file), "cache-path": str(tmp_path / "cache"), "cpus": 1}


def settle(node: dict, overrides: str, run: str = "first") -> tuple[Settings, int]:
    return permit.settle({"overrides": f"{RUN} {overrides}", "run": run}, node)


def begin(node: dict, overrides: str, run: str = "first") -> dpsgd.Mechanism:
    cfg, partition = settle(node, overrides, run)
    return privacy.build(cfg.privacy).begin(cfg, partition, cfg.records)


@pytest.mark.slow
def test_no_run_passes_a_nodes_ceiling_nor_do_several(node):
    rate = 4 / 30
    least, most = (
        dpsgd.epsilon(((1.0, rate, steps),), 1e-5) for steps in (6, 8)
    )  # of three rounds, and of four
    node |= {"epsilon": (least + most) / 2, "delta": 1e-5, "tell-epsilon": True}

    def train(number: int) -> float:  # two rounds a run
        return begin(node, NOISY, f"run {number // 2}").told["epsilon"]

    told = until_refused(train, "would pass its own epsilon")
    # What is told is the run's own: none has passed the ceiling by itself.
    first = [dpsgd.epsilon(((1.0, rate, steps),), 1e-5) for steps in (2, 4)]
    assert told == [*first, first[0]]


def test_a_ceiling_takes_runs_with_accounting_only(node):
    node |= {"epsilon": 4}
    with pytest.raises(Refusal, match="takes privacy=record only"):
        settle(node, "")
    with pytest.raises(Refusal, match="would pass its own epsilon"):
        begin(node, f"{NOISY} privacy.noise_multiplier=0.1")


def test_a_node_tells_its_epsilon_if_it_agrees(node):
    assert "epsilon" not in begin(node, NOISY).told
    assert "epsilon" in begin(node | {"tell-epsilon": True}, NOISY).told


@pytest.mark.slow
def test_each_data_set_has_its_own_ledger(node, tmp_path):
    node |= {"epsilon": 1.01 * dpsgd.epsilon(((1.0, 4 / 30, 2),), 1e-5)}  # one round
    begin(node, NOISY)
    with pytest.raises(Refusal, match="would pass"):
        begin(node, NOISY, "another")
    other = tmp_path / "other.jsonl"
    other.write_text(Path(node["data-path"]).read_text())
    begin(node | {"data-path": str(other)}, NOISY)


@pytest.mark.slow
def test_the_app_of_a_node_answers_until_its_ceiling(node, capfd):
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    node |= {"epsilon": 1.01 * dpsgd.epsilon(((1.0, 4 / 30, 2),), 1e-5)}  # one round

    def ask(kind: str, adapter: ArrayRecord) -> Message:
        told = {"overrides": f"{RUN} {NOISY}", "run": "first", "server-round": 1}
        content = RecordDict({"arrays": adapter, "config": ConfigRecord(told)})
        message = Message(content, 5, kind)
        message.metadata.__dict__["_message_id"] = "message"
        return app.client(message, Context(1, 5, node, RecordDict(), {}))

    first = ask("query", ArrayRecord()).content["arrays"]
    reply = ask("train", first)
    assert not reply.has_error(), reply.error
    assert {*reply.content["metrics"]} == {"num-examples", "train_loss"}
    assert "privacy: epsilon" in capfd.readouterr().out
    again = ask("train", first)
    assert again.error.code == Refusal.code
    assert again.error.reason == "another round would pass its own epsilon"
    assert ask("evaluate", first).error.code == Refusal.code


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"epsilon": "4"}, "epsilon=4 must be a number"),
        ({"epsilon": 0}, "epsilon is above 0"),
        ({"epsilon": 4, "delta": 1.5}, "delta between 0 and 1"),
        ({"tell-epsilon": 1}, "must be true or false"),
    ],
)
def test_a_nodes_ceiling_is_checked(wrong, told, node):
    with pytest.raises(UserError, match=told):
        permit.check_settings(node | wrong)


@pytest.mark.parametrize(
    "override", ["strategy.fraction_evaluate=1", "personal=ditto", "privacy.delta=null"]
)
def test_a_node_takes_no_run_that_undoes_it(override, node):
    with pytest.raises(Refusal):
        settle(node, f"{NOISY} {override}")


# Of a task and what the server holds records against, one that fits and one that does not.
UNFIT = {
    "classification": ("yes", "hiv", "dataset.labels=[no,yes]"),
    "tagging": ('["O", "O"]', '["O", "HIV"]', "dataset.labels=[O]"),
    "span": ("two", "three", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("level", ["privacy=none", NOISY, "privacy=local"])
@pytest.mark.parametrize("task", UNFIT)
def test_a_record_that_does_not_fit_decides_over_no_answer(task, level, node, caplog):
    """The server chooses labels: by refusals it would learn which ones a node's records have."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    right, wrong, labels = UNFIT[task]
    text = '["two", "words"]' if task == "tagging" else "two words"
    rows = [{"instruction": "What?", "input": text, "output": right}] * 30
    if task == "tagging":
        rows = [{"instruction": text, "input": "", "output": right}] * 30
    file = Path(node["data-path"])
    told = (
        f"task={task} model=tiny_bert model.quantization=null {labels} {level} "
        "train.training_arguments.per_device_train_batch_size=30"
    )

    def ask(kind: str, adapter: ArrayRecord) -> Message:
        content = {"overrides": f"{RUN} {told}", "run": "first", "server-round": 1}
        parts = {"arrays": adapter, "config": ConfigRecord(content)}
        message = Message(RecordDict(parts), 5, kind)
        message.metadata.__dict__["_message_id"] = "message"
        return app.client(message, Context(1, 5, node, RecordDict(), {}))

    replies = []
    for last in (right, wrong):
        changed = [*rows[:-1], rows[-1] | {"output": last}]
        file.write_text("\n".join(map(json.dumps, changed)))
        first = ask("query", ArrayRecord())
        begun = first.content["arrays"] if first.has_content() else ArrayRecord()
        replies.append([first, ask("train", begun)])
    fit, unfit = replies
    assert not any(reply.has_error() for reply in fit)
    assert all(reply.has_error() for reply in unfit) == (level == "privacy=none")
    if level != "privacy=none":
        for one, other in zip(*replies, strict=True):
            assert not other.has_error()
            assert (
                one.content.metric_records.keys() == other.content.metric_records.keys()
            )
        assert "Nothing is learnt of such records." in caplog.text


@pytest.mark.parametrize("more", [f"task=dpo {NOISY}", "task=kto privacy=local"])
def test_columns_that_a_task_needs_are_asked_for_at_every_level(more, node):
    with pytest.raises(Refusal, match="does not fit the task"):
        settle(node, more)


# --- what is told -------------------------------------------------------------------------------


def reply_to(grid, kind: str, config: dict, arrays: ArrayRecord) -> Message:
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(config)})
    message = Message(content, grid.nodes[0], kind)
    grid.push_messages([message])
    [reply] = grid.pull_messages({message.metadata.message_id})
    return reply


@pytest.mark.slow
def test_a_reply_tells_nothing_of_the_records_but_what_is_noisy(
    configure, loopback, tmp_path
):
    """Two clients with as many records, of other lengths, some without an answer."""
    replies = []
    for name, answers in (("a", ["yes"] * 40), ("b", ["a long answer " * 30, ""] * 20)):
        rows = [{"instruction": "q", "input": "", "output": text} for text in answers]
        (path := tmp_path / name).with_suffix(".jsonl").write_text(
            "\n".join(map(json.dumps, rows))
        )
        cfg = configure(
            f"{NOISY} num_clients=1 strategy.fraction_fit=1 dataset=local "
            f"dataset.path={path}.jsonl"
        )
        grid = loopback(cfg)
        arrays = ArrayRecord(client.initial_adapter(cfg))
        config = {"partition": 0, "server-round": 1}
        replies.append(reply_to(grid, "train", config, arrays).content)
        for kind in ("evaluate", "evaluate.personal"):
            refused = reply_to(grid, kind, config, arrays)
            assert "no measurements" in refused.error.reason
    told = [dict(reply["metrics"]) for reply in replies]
    assert told[0].keys() == {"num-examples", "train_loss", "epsilon"}
    for one in told:
        assert 0 <= one.pop("train_loss") <= dpsgd.LARGEST_LOSS
    assert told[0] == told[1]
    assert {*replies[0]} == {"arrays", "metrics"}
    layout = [
        {name: (array.dtype, array.shape) for name, array in reply["arrays"].items()}
        for reply in replies
    ]
    assert layout[0] == layout[1]


@pytest.mark.slow
def test_a_run_tells_what_each_client_has_spent(configure, loopback, tmp_path):
    cfg = configure(f"{NOISY} strategy.fraction_fit=1 evaluate.exact_match=false")
    rounds.run(cfg, loopback(cfg, folder=tmp_path), tmp_path)
    summary = read_json(tmp_path / "summary.json")
    history = read_json(tmp_path / "history.json")["rounds"]
    assert summary["epsilon_clients"].keys() == {"0", "1", "2", "3"}
    for partition, told in summary["epsilon_clients"].items():
        ledger = dpsgd.Ledger(tmp_path / "residuals" / f"{partition}-privacy.json")
        [use] = ledger.uses()
        records = len(dataset.load_partition(cfg, int(partition)))
        assert (use.noise_multiplier, use.rate, use.steps) == (1, 4 / records, 4)
        accountant = PRVAccountant()
        accountant.history = [(1, 4 / records, 4)]
        assert told == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)
    assert summary["epsilon"] == max(summary["epsilon_clients"].values())
    assert history[1]["epsilon"] == summary["epsilon"] > history[0]["epsilon"]
    for one in (summary, history[1]):
        assert one["delta"] == 1e-5
        assert one["adjacency"] == "one record added or removed"


@pytest.mark.slow
def test_a_round_that_is_done_again_is_counted_and_the_budget_ends_it(
    configure, tmp_path
):
    cfg = configure("privacy=record privacy.epsilon=3 strategy.fraction_fit=1")
    cfg["residuals"] = str(tmp_path)
    level = privacy.build(cfg.privacy)
    told = [level.begin(cfg, 0, 100).told["epsilon"] for _ in range(2)]
    assert told[0] < told[1] <= 3
    with pytest.raises(Refusal, match=r"would pass the run's privacy.epsilon"):
        level.begin(cfg, 0, 100)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("privacy.epsilon=null", "one of privacy.epsilon and privacy.noise_multiplier"),
        ("privacy.clip_norm=null", "privacy.clip_norm"),
        ("train.training_arguments.max_steps=-1", "no epochs"),
        ("+train.training_arguments.max_grad_norm=1", "clipped by itself"),
        ("strategy.fraction_evaluate=1", "held back"),
        ("strategy.weighted_by=records", "weighted_by=examples"),
        ("launch=ddp client_resources.num_cpus=2", "launch=single"),
        ("personal=ditto strategy.fraction_evaluate=0", "personal=none"),
        ("mode=centralized", "mode=federated"),
    ],
)
def test_what_does_not_go_with_it_is_refused(override, told, configure):
    with pytest.raises(UserError, match=told):
        configure("privacy=record", override)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "turns"),
    [
        ("num_clients=16 num_rounds=14 strategy.fraction_fit=1", 14),
        ("num_clients=16 num_rounds=14 strategy.fraction_fit=0.25", 4),
        (
            "num_clients=16 num_rounds=14 strategy.fraction_fit=0.25 "
            "strategy.sampling=random",
            14,
        ),
    ],
)
def test_noise_is_for_all_rounds_that_a_client_may_be_asked_in(
    overrides, turns, configure
):
    assert privacy.planned(configure(overrides)) == turns
