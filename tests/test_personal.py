"""pytest tests/test_personal.py: adapters of clients' own, made, kept, chosen and never sent."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import app
import client
import model
from assets.testbed.adapters import same
from assets.testbed.federation import Federation
from assets.testbed.loopback import killed_in
from methods import personal, wire
from methods.store import Kept
from node import permit
from reporting import export
from server import rounds, runs
from server.exchange import PERSONAL
from server.rounds import Server
from settings import plan, preflight
from settings.compose import compose, record, resumed
from utils import PROJECT, Refusal, UserError

# Some of the records are enough to look at.
HELD = ("strategy.fraction_evaluate=1", "evaluate.holdout=0.02")
DITTO = ("personal=ditto", *HELD)
SGD = (
    "+train.training_arguments.optim=sgd",
    "+train.training_arguments.learning_rate=0.05",
    "+train.training_arguments.max_grad_norm=0",
)
OWN = "0/personal-{:06d}.safetensors"


def distance(one: dict, other: dict) -> float:
    return sum((one[k] - other[k]).square().sum().item() for k in one) ** 0.5


def away(state: dict, size: float = 0.1) -> dict:
    draw = torch.Generator().manual_seed(1)
    return {
        k: v + size * torch.randn(v.shape, generator=draw) for k, v in state.items()
    }


# --- between the shared adapter and one's own ------------------------------------------------


@given(st.floats(-4, 4, width=32), st.floats(-4, 4, width=32), st.floats(0, 1))
def test_between_is_the_mean_and_the_ends_are_exact(shared, own, weight):
    one, other = {"w": torch.tensor([shared])}, {"w": torch.tensor([own])}
    mean = personal.between(one, other, weight)["w"].item()
    assert mean == pytest.approx((1 - weight) * shared + weight * own, abs=1e-5)
    assert same(personal.between(one, other, 0), one)
    assert same(personal.between(one, other, 1), other)


@st.composite
def scored(draw):
    """Nats and tokens of 1 to 9 records with 1 to 5 weights."""
    count = draw(st.integers(1, 9))
    tokens = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    nats = st.lists(st.integers(0, 99), min_size=count, max_size=count)
    weights = draw(st.lists(st.integers(0, 8), min_size=1, max_size=5, unique=True))
    return {
        w / 8: torch.tensor([draw(nats), tokens], dtype=torch.float64).T
        for w in sorted(weights)
    }


@given(scored())
def test_each_record_is_measured_with_what_is_best_on_the_others(scores):
    weight, loss = personal.choose(scores)
    nats = {w: each[:, 0].tolist() for w, each in scores.items()}
    assert sum(nats[weight]) == min(map(sum, nats.values()))
    tokens = next(iter(scores.values()))[:, 1].sum().item()
    count, told = len(nats[weight]), 0.0
    for i in range(count):
        others = [j for j in range(count) if j != i] or [i]
        best = min(nats, key=lambda w: sum(nats[w][j] for j in others))
        told += nats[best][i]
    assert loss * tokens == pytest.approx(told)


def test_what_is_not_finite_is_never_chosen():
    fine, broken = torch.tensor([[2.0, 1], [3, 1]]), torch.tensor([[1.0, 1], [0, 1]])
    for value in (torch.nan, torch.inf):
        broken[1, 0] = value
        assert personal.choose({0: fine, 1: broken}) == (0, 2.5)
        own = {"w": torch.tensor([value])}
        shared = {"w": torch.tensor([1.0])}
        assert same(personal.between(shared, own, 0), shared)


def test_fine_tuning_ends_where_it_goes_astray():
    method = personal.Finetune(rounds=4, interpolate=[1])
    start = {"w": torch.tensor([1.0])}

    def alone(state: dict, number: int) -> dict:
        return {"w": state["w"] + 1 if number < 3 else state["w"] * torch.nan}

    shared, own = method.finish(alone, start, start, None)
    assert shared["w"] == 1
    assert own["w"] == 3


# --- Ditto's step ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mu", [0.5, 4.0])
def test_a_step_is_the_papers(configure, mu):
    """v <- v - eta (grad F(v) + mu (v - w)), whose gradient a step without mu tells."""
    cfg = configure(*SGD, "train.training_arguments.max_steps=1")
    w = client.initial_adapter(cfg)
    v = away(w)
    plain, _ = client.train(cfg, v, 0, 1)
    near, _ = client.train(cfg, v, 0, 1, mu, anchor=w)
    by_hand = {k: plain[k] - 0.05 * mu * (v[k] - w[k]) for k in v}
    assert distance(near, by_hand) < 1e-5 < distance(near, plain)


@pytest.mark.slow
def test_much_mu_is_the_shared_adapter_and_none_is_training_alone(configure):
    cfg = configure(*SGD, "train.training_arguments.max_steps=3")
    w = client.initial_adapter(cfg)
    v = away(w)
    gone = [
        distance(client.train(cfg, v, 0, 1, mu, anchor=w)[0], w) for mu in (20, 4, 0)
    ]
    assert gone == sorted(gone)
    assert gone[0] < 0.2 * distance(v, w) < 0.9 * distance(v, w) < gone[2]
    alone, _ = client.train(cfg, v, 0, 1)
    assert same(client.train(cfg, v, 0, 1, anchor=w)[0], alone)


@pytest.mark.slow
def test_without_mu_it_is_what_the_client_makes_alone(configure, loopback):
    everybody = ("num_clients=2", "strategy.fraction_fit=1", "comm.dtype=float32")
    cfg = configure(*DITTO, "personal.mu=0", *everybody)
    grid = loopback(cfg)
    server = Server(cfg, grid)
    state = first = server.initial_adapter()
    for number in (1, 2):
        state, _ = server.train_round(number, state)
    alone, _ = client.train(cfg, first, 0, 1)
    alone, _ = client.train(cfg, alone, 0, 2)
    kept = load_file(grid.folder / "residuals" / OWN.format(2))
    assert same(kept, alone)
    assert not same(kept, state)


@pytest.mark.slow
def test_the_shared_adapter_is_the_same_to_the_bit_without(configure, loopback):
    states = []
    for choice in ("none", "ditto"):
        cfg = configure(*DITTO, f"personal={choice}")
        server = Server(cfg, loopback(cfg))
        state = server.initial_adapter()
        for number in (1, 2):
            state, _ = server.train_round(number, state)
        states.append(state)
    assert same(*states)


# --- fine-tuning --------------------------------------------------------------------------------


def after(cfg: dict, state: dict, partition: int, count: int) -> dict:
    """What a client makes of an adapter alone, in a run of `count` rounds."""
    cfg = cfg | {"num_rounds": count}
    for number in range(1, count + 1):
        state, _ = client.train(cfg, state, partition, number)
    return state


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "strategy=svd", "sharing=fedsa"])
def test_fine_tuned_is_the_finished_adapter_trained_on_alone(
    more, configure, loopback, tmp_path
):
    cfg = configure(
        f"{more} personal=finetune personal.rounds=3 num_clients=2 comm.dtype=float32",
        "strategy.fraction_fit=1 model.lora.target_modules=[q_proj] train.seq_length=64",
        "personal.interpolate=[1] train.schedule_rounds=9",
        *HELD,
    )
    grid = loopback(cfg, folder=tmp_path)
    rounds.run(cfg, grid, tmp_path)
    first = client.initial_adapter(cfg)
    schedule = cfg | {"train": cfg["train"] | {"schedule_rounds": None}}
    for partition in (0, 1):
        shared = adapter_in(tmp_path / "peft_2", first)
        if more == "sharing=fedsa":  # B has stayed with the client
            kept = load_file(tmp_path / f"residuals/{partition}/own-000002.safetensors")
            shared |= kept
        own = adapter_in(tmp_path / f"personal/client_{partition}", first)
        wanted = after(schedule, shared, partition, 3)
        assert distance(own, wanted) < 1e-4 * distance(own, shared)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [one["personal_weight"] for one in summary["personal_clients"]] == [1, 1]
    assert summary["eval_loss_own"] < summary["eval_loss_global"]


@pytest.mark.slow
def test_a_client_of_a_lower_rank_has_an_adapter_of_that_rank(
    configure, loopback, tmp_path
):
    cfg = configure(
        "personal=finetune strategy=svd strategy.ranks=[2,4] num_clients=2",
        *("strategy.fraction_fit=1", "personal.interpolate=[0,0.5,1]", *HELD),
    )
    rounds.run(cfg, loopback(cfg, folder=tmp_path), tmp_path)
    for partition, rank in enumerate((2, 4)):
        folder = tmp_path / f"personal/client_{partition}"
        made = load_file(folder / "adapter_model.safetensors")
        assert {len(v) for name, v in made.items() if "lora_A" in name} == {rank}
        base = AutoModelForCausalLM.from_pretrained(cfg.model.name)
        loaded = PeftModel.from_pretrained(base, folder)
        assert loaded.peft_config["default"].r == rank


def adapter_in(folder: Path, like: dict) -> dict:
    """A PEFT folder's tensors, by the names of `like`."""
    found = load_file(folder / "adapter_model.safetensors")
    return {name: found[name.replace(".default", "")].float() for name in like}


@pytest.mark.slow
def test_the_shared_adapter_is_the_same_to_the_bit_without_fine_tuning(
    configure, loopback, tmp_path
):
    states = []
    for choice in ("none", "finetune"):
        folder = tmp_path / choice
        folder.mkdir()
        cfg = configure(*HELD, f"personal={choice}")
        rounds.run(cfg, loopback(cfg, folder=folder), folder)
        states.append(load_file(folder / "peft_2/adapter_model.safetensors"))
        losses = json.loads((folder / "history.json").read_text())["rounds"]
        assert not any("eval_loss_own" in entry for entry in losses)
    assert same(*states)


def test_a_run_with_fine_tuning_goes_on_for_more_rounds(tmp_path):
    words = ["experiment=quickstart", "personal=finetune", *HELD]
    record(compose(" ".join(words)), words, tmp_path)
    config, _ = resumed(str(tmp_path), ["num_rounds=30"])
    assert config.personal.rounds == config.num_rounds == 30


def test_fine_tuning_goes_on_for_as_many_rounds_as_were_shared(configure):
    assert configure("personal=finetune", *HELD, "num_rounds=5").personal.rounds == 5
    told = dict(plan.plan(configure("personal=finetune", *HELD, "personal.rounds=4")))
    assert told["steps after the last round"] == "8 by each client, of its own adapter"


# --- a whole run -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(configure_once, loopback_once, tmp_path_factory):
    """A run's folder, its configuration, and all that was sent in either direction."""
    folder = tmp_path_factory.mktemp("run")
    overrides = [*DITTO, "comm.dtype=float16", "train.seq_length=64"]
    cfg = configure_once(*overrides)
    record(compose("experiment=quickstart"), overrides, folder)
    messages: list[Message] = []

    def tamper(partition: int, reply: Message) -> Message:
        messages.append(reply)
        return reply

    grid = loopback_once(cfg, tamper, folder)
    rounds.run(cfg, grid, folder)
    return folder, cfg, [*messages, *grid.sent]


def bytes_of(messages: list[Message]) -> list[bytes]:
    return [
        array.data
        for message in messages
        if message.has_content()
        for record in message.content.array_records.values()
        for array in record.values()
    ]


def forms(tensor: torch.Tensor) -> list[bytes]:
    """A tensor's values as they would travel."""
    return [
        packed["w"].numpy().tobytes()
        for dtype in ("float32", "float16", "int8")
        for packed, _ in [wire.pack({"w": tensor}, dtype)]
    ]


@pytest.mark.slow
def test_nothing_of_it_is_in_any_message(finished):
    folder, _, messages = finished
    everything = b"".join(bytes_of(messages))
    shared = model.State()
    for file in (folder / "checkpoints").glob("*/adapter.safetensors"):
        shared = load_file(file)
        found = [forms(tensor)[1] in everything for tensor in shared.values()]
        assert all(found)  # what is sent is found by this
    own = [*(folder / "residuals").glob("*/personal-*")]
    assert len(own) >= 4
    for file in own:
        for name, tensor in load_file(file).items():
            for value in (tensor, tensor - shared[name]):
                assert not any(form in everything for form in forms(value)), file.name
    kinds = {message.metadata.message_type for message in messages}
    assert PERSONAL in kinds
    told = [m for m in messages if m.metadata.message_type == PERSONAL]
    assert [m for m in told if "metrics" in m.content] == told[: len(told) // 2]
    assert all(not m.content.array_records for m in told[: len(told) // 2])


@pytest.mark.slow
def test_what_it_comes_to_is_told_by_client_and_in_the_mean(finished):
    folder, cfg, _ = finished
    summary = runs.read(folder, "summary.json")
    history = runs.read(folder, "history.json")
    each = summary["personal_clients"]
    assert [one["partition"] for one in each] == [0, 1, 2, 3]
    last = history["rounds"][-1]
    for one, measured in zip(each, last["eval_clients"], strict=True):
        assert one["num-examples"] == measured["num-examples"]
        assert one["eval_loss_global"] == pytest.approx(measured["eval_loss"])
        assert one["eval_loss_own"] == pytest.approx(measured["eval_loss_own"])
        assert one["personal_weight"] in cfg.personal.interpolate
    assert summary["eval_loss_own"] == pytest.approx(last["eval_loss_own"])
    assert "eval_loss_own" not in history["before"]
    # Who has not trained has what all share.
    trained = {c["partition"] for e in history["rounds"] for c in e["clients"]}
    for one in each:
        if one["partition"] not in trained:
            assert one["eval_loss_own"] == one["eval_loss_global"]


@pytest.mark.slow
def test_a_clients_folder_is_a_plain_adapter_and_scores_as_told(finished):
    folder, cfg, _ = finished
    made = load_file(folder / "checkpoints/000002/adapter.safetensors")
    shared = wire.unpack(wire.pack(made, "float16")[0])  # as it came
    for one in runs.read(folder, "summary.json")["personal_clients"]:
        place = folder / runs.PERSONAL / f"client_{one['partition']}"
        about = model.read_about(str(place))
        net, _ = model.open_adapter(str(place), about, torch.device("cpu"))
        kept = Kept(folder / "residuals", one["partition"], 3).load("personal")
        weight = one["personal_weight"]
        chosen = personal.between(shared, kept or shared, weight)
        held = dict(net.named_parameters())
        assert all(held[name].equal(chosen[name]) for name in chosen)
        loss = client.evaluate(cfg, chosen, one["partition"])["eval_loss"]
        if weight in (0, 1):
            name = "eval_loss_own" if weight else "eval_loss_global"
            assert loss == pytest.approx(one[name])


@pytest.mark.slow
def test_it_is_exported_with_its_own_figures(finished, tmp_path):
    folder, _, _ = finished
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    summary = runs.read(run, "summary.json")
    one = summary["personal_clients"][1]
    source = run / runs.PERSONAL / "client_1"
    options = export.parse([f"--peft-path={source}"])
    written = export.export(options)
    assert written == source.with_name("adapter_client_1")
    card = (written / "README.md").read_text()
    assert f"{one['eval_loss_personal']:.4g}" in card
    assert f"of {one['num-examples']} records that 1 clients held back" in card
    assert f"one client: {one['personal_weight']:.0%} its own" in card
    assert f"{summary['eval_loss_global']:.4g}" not in card


@pytest.fixture(scope="module")
def whole(configure_once, loopback_once, tmp_path_factory) -> tuple[dict, Path]:
    """A run that nobody kills: its configuration and its folder."""
    everybody = ("num_clients=2", "strategy.fraction_fit=1", "num_rounds=3")
    cfg = configure_once(*DITTO, *everybody)
    folder = tmp_path_factory.mktemp("whole")
    rounds.run(cfg, loopback_once(cfg, folder=folder), folder)
    return cfg, folder


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1], ids=["killed", "and a checkpoint is lost"])
def test_a_run_that_goes_on_has_the_same_adapters(lost, whole, loopback, tmp_path):
    (cfg, whole), parts = whole, tmp_path
    killed_in(cfg, parts, replies=6)  # both have trained and kept theirs in round 3
    for newest in sorted((parts / "checkpoints").glob("*"))[2 - lost :]:
        shutil.rmtree(newest)
    again = cfg | {"resume": str(parts)}
    rounds.run(again, loopback(again, folder=parts), parts)
    for partition in (0, 1):
        kept = [
            Kept(x / "residuals", partition, 4).load("personal") for x in (whole, parts)
        ]
        assert same(*kept)
        place = f"{runs.PERSONAL}/client_{partition}/adapter_model.safetensors"
        assert same(load_file(whole / place), load_file(parts / place))
    told = [runs.read(x, "summary.json")["personal_clients"] for x in (whole, parts)]
    assert told[0] == told[1]


@pytest.mark.slow
def test_what_sharing_leaves_with_a_client_is_its_own(configure, loopback, tmp_path):
    """The B half with FedSA (arXiv 2410.01463), which shares the A half."""
    cfg = configure(*HELD, "sharing=fedsa", "strategy.fraction_fit=1")
    rounds.run(cfg, loopback(cfg, folder=tmp_path), tmp_path)
    summary = runs.read(tmp_path, "summary.json")
    for one in summary["personal_clients"]:
        # What all share has no B: it is the base.
        assert one["eval_loss_own"] < one["eval_loss_global"]
        kept = Kept(tmp_path / "residuals", one["partition"], 3).load("own")
        place = tmp_path / runs.PERSONAL / f"client_{one['partition']}"
        saved = load_file(place / "adapter_model.safetensors")
        for name, tensor in kept.items():
            found = saved[name.replace(".default", "")]
            assert torch.allclose(found, one["personal_weight"] * tensor)
    last = runs.read(tmp_path, "history.json")["rounds"][-1]
    assert last["eval_loss"] == pytest.approx(summary["eval_loss_own"])


# --- replies that are wrong, settings that are ---------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("personal_weight", 1.5, "personal_weight is not within 0 and 1"),
        ("eval_loss_own", float("nan"), "eval_loss_own is not within"),
        ("eval_loss_personal", None, "lack eval_loss_personal"),
        ("num-examples", 10**6, "num-examples is above"),
    ],
)
def test_figures_out_of_bounds_are_left_out(
    name, value, told, configure, loopback, capsys
):
    cfg = configure(*DITTO, "num_clients=2")

    def tamper(partition: int, reply: Message) -> Message:
        if partition == 1 and reply.metadata.message_type == PERSONAL:
            metrics = reply.content["metrics"]
            if value is None:
                del metrics[name]
            else:
                metrics[name] = value
        return reply

    server = Server(cfg, loopback(cfg, tamper))
    told_of = server.personalise(server.initial_adapter())
    assert [one["partition"] for one in told_of["personal_clients"]] == [0]
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("mode=local strategy.fraction_evaluate=1", "no adapter that clients share"),
        ("mode=centralized strategy.fraction_evaluate=1", "Take personal=none"),
        ("strategy.fraction_evaluate=0", "Set strategy.fraction_evaluate=1"),
        ("personal=finetune personal.rounds=0", "personal.rounds=0"),
        ("personal=finetune personal.rounds=null", "Give a whole number"),
        ("personal.interpolate=[]", "give 1 to 20 weights"),
        ("personal.interpolate=[0,2]", "from 0 to 1"),
        ("personal.interpolate=x", "give 1 to 20 weights"),
        ("personal.mu=-1", "personal.mu=-1: it must be 0 or more"),
        ("personal.lambda=1", "unexpected keyword argument 'lambda'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(overrides, told):
    plus = "+" * overrides.startswith("personal.lambda")
    with pytest.raises(UserError) as error:
        preflight.check(
            compose(f"experiment=quickstart personal=ditto {plus}{overrides}")
        )
    assert told in str(error.value)
    assert "\n" not in str(error.value)


# --- a node's own -----------------------------------------------------------------------------

RUN = (
    "experiment=quickstart num_clients=4 evaluate.exact_match=false personal=ditto "
    f"{' '.join(HELD)} train.training_arguments.max_steps=2"
)


@pytest.fixture
def node(tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(PROJECT)
    return {
        **{"partition-id": 1, "num-partitions": 4, "cpus": 1},
        "cache-path": str(tmp_path / "cache"),
        "personal-path": str(tmp_path / "mine/here"),
    }


def ask(kind: str, settings: dict, adapter: dict, number: int = 1) -> Message:
    told = {"overrides": RUN, "run": "../first", "server-round": number}
    content = {"arrays": ArrayRecord(adapter), "config": ConfigRecord(told)}
    message = Message(RecordDict(content), 5, kind)
    message.metadata.__dict__["_message_id"] = "message"
    return app.client(message, Context(1, 5, settings, RecordDict(), {}))


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_a_node_writes_its_own_where_it_says_and_sends_none(
    named, node, loopback, tmp_path
):
    loopback({"num_clients": 1, "model": {}})  # so that Messages can be made
    if not named:
        del node["personal-path"]
    first = ask("query", node, {}).content["arrays"].to_torch_state_dict()
    assert not ask("train", node, first).has_error()
    reply = ask(PERSONAL, node, first)
    assert not reply.has_error(), reply.error
    assert not reply.content.array_records
    written = [*tmp_path.glob("mine/here/___first-*/client_1")]
    assert len(written) == named
    kept = [*(tmp_path / "cache/runs").glob("___first-*/1/personal-000001.safetensors")]
    assert len(kept) == 1
    for place in written:
        about = model.read_about(str(place))
        assert about["round"] == 1
        assert "cache" not in about["model"]
        model.open_adapter(str(place), about, torch.device("cpu"))


def test_a_nodes_folder_is_its_own_and_can_be_written(node, tmp_path):
    (tmp_path / "file").write_text("")
    node["personal-path"] = str(tmp_path / "file/below")
    with pytest.raises(Refusal, match="its settings or data are at fault"):
        permit.settle({"overrides": RUN, "run": "first"}, node)


@pytest.mark.parametrize(
    ("more", "times"), [("", 2), ("personal=finetune personal.rounds=5", 5)]
)
def test_a_nodes_limit_counts_all_trainings_of_a_message(more, times, node):
    told = {"overrides": f"{RUN} {more}", "run": "first"}
    needed = times * 2 * 16 * 128  # trainings, steps, examples, tokens
    permit.settle(told, node | {"max-tokens": needed})
    with pytest.raises(Refusal, match="max-tokens"):
        permit.settle(told, node | {"max-tokens": needed - 1})


@pytest.mark.slow
def test_in_a_federation_each_node_has_its_own_also_after_a_power_cut(tmp_path):
    """One is killed between two rounds and started again; the server never has either's."""
    overrides = f"{RUN} num_clients=2 num_rounds=6 strategy.fraction_fit=1"
    with Federation(tmp_path / "federation") as federation:
        nodes = []
        for i in (0, 1):
            settings = {
                **{"partition-id": i, "num-partitions": 2, "cpus": 1},
                "model-path": str(PROJECT / "assets/tiny_llama"),
                "cache-path": str(tmp_path / "cache"),
                "personal-path": str(tmp_path / f"own-{i}"),
            }
            words = (f"{key}={json.dumps(value)}" for key, value in settings.items())
            nodes.append(federation.supernode(f"node-{i}", " ".join(words)))
        run = federation.submit(PROJECT, f"{overrides} train.round_timeout=50")
        run.wait_for(r"round 1/6 .* 2 of 2 clients")
        nodes[1].kill()
        nodes[1].start()
        status, output = federation.finish(run)
        assert status == "finished:completed", output
        [folder] = federation.superlink.folder.glob("outputs/*/*")
        # The one that came back is a third client to the server, and the same to itself.
        told = runs.read(folder, "summary.json")["personal_clients"]
        assert len(told) == 2
        assert not (folder / runs.PERSONAL).exists()
        for i in (0, 1):
            [place] = (tmp_path / f"own-{i}").glob(f"*/client_{i}")
            assert model.read_about(str(place))["round"] == 6
            kept = [*(tmp_path / "cache/runs").glob(f"*/{i}/personal-*")]
            assert len(kept) == 3
        # Made when the last round is over, of the adapter that the server has.
        shorter = "num_clients=2 num_rounds=1 strategy.fraction_fit=1 personal=finetune"
        place = "personal.rounds=2 hydra.run.dir=results/later"
        status, output = federation.run(PROJECT, f"{RUN} {shorter} {place}")
        assert status == "finished:completed", output
        folder = federation.superlink.folder / "results/later"
        shared = load_file(folder / "peft_1/adapter_model.safetensors")
        told = runs.read(folder, "summary.json")["personal_clients"]
        assert all(one["eval_loss_own"] != one["eval_loss_global"] for one in told)
        different = 0
        for i in (0, 1):
            places = (tmp_path / f"own-{i}").glob(f"*/client_{i}")
            later = max(places, key=os.path.getctime)
            assert model.read_about(str(later))["round"] == 1
            own = load_file(later / "adapter_model.safetensors")
            assert own.keys() == shared.keys()
            different += any(not own[name].equal(shared[name]) for name in own)
        assert different == sum(one["personal_weight"] > 0 for one in told)
