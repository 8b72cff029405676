"""pytest tests/test_sampling.py: who is asked in a round, and who in a run that goes on."""

import json
from collections import Counter
from itertools import chain

import pytest
from flwr.app import Error, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.testbed.loopback import Killed
from server import rounds
from server.cohort import Clients, cohort_size, sample
from settings import plan
from utils import Settings, UserError, mix_seed

# Of clients: how many there are, the share that trains, and the seed.
SIZES = (st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 2**32 - 1))


class Nodes:
    """A grid of which no more is asked than who is connected."""

    def __init__(self, count: int) -> None:
        self.here = [*range(count)]

    def get_node_ids(self) -> list[int]:
        return self.here


def made(count: int, fraction: float, seed: int, sampling: str = "epoch") -> Clients:
    strategy = {"fraction_fit": fraction, "fraction_evaluate": fraction}
    cfg = {"num_clients": count, "seed": seed, "strategy": strategy}
    strategy["sampling"] = sampling
    return Clients(Settings.of(cfg), Nodes(count), named=False)


def numbers(clients: Clients, *args, **more) -> list[int]:
    nodes = clients.sample("fraction_fit", *args, **more)
    return [clients.partitions[node] for node in nodes]


def play(clients: Clients, first: int, last: int) -> list[list[int]]:
    """The cohorts of these rounds, each of which ends well at once."""
    cohorts = []
    for number in range(first, last + 1):
        cohorts.append(numbers(clients, number))
        clients.note(cohorts[-1])
    return cohorts


@given(*SIZES)
def test_everybody_is_asked_once_before_anybody_twice(count, fraction, seed):
    clients = made(count, fraction, seed)
    asked = Counter(dict.fromkeys(range(count), 0))
    for cohort in play(clients, 1, 20):
        assert len({*cohort}) == cohort_size(count, fraction)
        assert cohort == sorted(cohort)
        asked.update(cohort)
        assert max(asked.values()) - min(asked.values()) <= 1


@pytest.mark.slow
@settings(max_examples=60)
@given(*SIZES, st.data())
def test_nor_with_clients_that_fail_come_and_leave(count, fraction, seed, data):
    clients = made(count, fraction, seed)
    asked: Counter[int] = Counter(dict.fromkeys(range(count), 0))
    always, came = {*range(count)}, 0
    for number in range(1, 16):
        gone = data.draw(st.sets(st.sampled_from(range(count)), max_size=2))
        always -= gone
        came += data.draw(st.integers(0, 2))
        clients.grid.here = [node for node in range(count + came) if node not in gone]
        here = {*clients.available()}
        if not here:
            continue
        # A round asks again, up to twice, where replies fail.
        tried: set[int] = set()
        for attempt in range(1 + data.draw(st.integers(0, 2))):
            nodes = clients.sample("fraction_fit", number, attempt, tried)
            assert {*nodes} <= here
            size = cohort_size(len(here), fraction)
            assert len({*nodes}) == size
            # Those that were tried come last.
            assert {*nodes} & tried == set() or here - tried <= {*nodes}
            tried |= {*nodes}
        whom = [clients.partitions[node] for node in tried]
        clients.note(whom)
        asked.update(whom)
        # Nobody more than once in a pass, and in each one whoever is always there.
        assert max(asked.values()) <= clients.current
        for node in always:
            assert asked[clients.partitions[node]] >= clients.current - 1


@given(*SIZES, st.integers(0, 12))
def test_a_run_that_goes_on_asks_the_same(count, fraction, seed, done):
    whole = play(made(count, fraction, seed), 1, 12)
    again = made(count, fraction, seed)
    for cohort in whole[:done]:
        again.note(cohort)
    assert play(again, done + 1, 12) == whole[done:]


@pytest.mark.slow
@given(st.integers(0, 2**31))
def test_a_pass_has_an_order_of_its_own_which_the_seed_decides(seed):
    one, same, other = (play(made(40, 0.1, s), 1, 20) for s in (seed, seed, seed + 1))
    passes = [one[:10], one[10:]]
    assert all(sorted(chain(*each)) == [*range(40)] for each in passes)
    assert one == same
    assert passes[0] not in (passes[1], other[:10])


@given(*SIZES, st.integers(0, 3), st.integers(1, 9))
def test_random_cohorts_are_those_they_have_always_been(
    count, fraction, seed, attempt, number
):
    clients = made(count, fraction, seed, "random")
    parts = [seed, "fraction_fit", number] + [attempt] * bool(attempt)
    size = cohort_size(count, fraction)
    wanted = sample([*range(count)], size, mix_seed(*parts))
    assert numbers(clients, number, attempt) == wanted
    clients.note(wanted)
    assert numbers(clients, number, attempt) == wanted


@given(*SIZES)
def test_who_measures_is_drawn_by_the_round_alone(count, fraction, seed):
    clients = made(count, fraction, seed)
    before = clients.sample("fraction_evaluate", 20)
    play(clients, 1, 20)
    assert clients.sample("fraction_evaluate", 20) == before


def test_who_comes_late_is_asked_as_often_as_the_others_from_then_on():
    clients = made(8, 0.25, seed=0)
    play(clients, 1, 40)  # each ten times
    clients.grid.here += [8, 9]
    assert play(clients, 41, 41) == [[8, 9]]
    asked = Counter(number for cohort in play(clients, 42, 61) for number in cohort)
    assert [asked[number] for number in range(10)] == [4] * 10


def test_nodes_of_a_federation_keep_their_numbers_when_a_run_goes_on(tmp_path):
    def begun(*here: int) -> Clients:
        clients = made(4, 0.5, seed=0)
        clients.grid.here = [*here]
        clients.keep(tmp_path / "nodes.json")
        return clients

    first = begun(50, 70)
    assert first.available() == [50, 70]
    first.grid.here.append(60)  # late, and of a lower id
    assert first.available() == [50, 70, 60]
    # The run goes on without one of them, and with another that is new.
    again = begun(60, 70, 10)
    assert again.available() == [70, 60, 10]
    assert again.partitions == {50: 0, 70: 1, 60: 2, 10: 3}
    assert begun(70).available() == [70]


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"x": 0}', '{"5": "a"}', '{"5": 0, "6": 0}', '{"5": 3}']
)
def test_numbers_that_no_run_has_written_are_refused(content, tmp_path):
    file = tmp_path / "nodes.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"nodes\.json is broken") as told:
        made(4, 0.5, seed=0).keep(file)
    assert len(str(told.value).splitlines()) == 1


def asked_in(folder) -> list[list[int]]:
    history = json.loads((folder / "history.json").read_text())
    return [entry["asked"] for entry in history["rounds"]]


@pytest.mark.slow
def test_a_killed_run_asks_and_ends_as_if_it_was_not(configure, loopback, tmp_path):
    cfg = configure("num_clients=5", "num_rounds=4", "strategy.min_fit_replies=2")
    (whole := tmp_path / "whole").mkdir()
    (parts := tmp_path / "parts").mkdir()
    order: list[int] = []

    def spoil(partition: int, reply: Message, stop: int = 0) -> Message:
        """Client 0 always fails; at the `stop`th training reply the run is killed."""
        if "metrics" not in reply.content:
            return reply
        order.append(partition)
        if len(order) == stop:
            raise Killed
        if partition:
            return reply
        asked = next(
            m
            for grid in grids
            for m in grid.sent
            if m.metadata.message_id == reply.metadata.reply_to_message_id
        )
        return Message(Error(2, "RuntimeError: broken"), reply_to=asked)

    grids = [loopback(cfg, spoil, whole)]
    rounds.run(cfg, grids[0], whole)
    failed = [
        failure["partition"]
        for entry in json.loads((whole / "history.json").read_text())["rounds"]
        for failure in entry["failures"]
    ]
    assert set(failed) == {0}
    counts = Counter(number for asked in asked_in(whole) for number in asked)
    assert max(counts.values()) - min(counts.values()) <= 1

    grids = [loopback(cfg, lambda i, reply: spoil(i, reply, stop=6), parts)]
    order.clear()
    with pytest.raises(Killed):
        rounds.run(cfg, grids[0], parts)
    again = cfg | {"resume": str(parts)}
    order.clear()
    grids = [loopback(again, spoil, parts)]
    rounds.run(again, grids[0], parts)
    assert asked_in(parts) == asked_in(whole)
    last = "peft_4/adapter_model.safetensors"
    assert (parts / last).read_bytes() == (whole / last).read_bytes()


@pytest.mark.slow
def test_the_first_adapter_is_asked_of_those_that_train_first(configure, loopback):
    cfg = configure("num_clients=4")
    grid = loopback(cfg)
    server = rounds.Server(cfg, grid)
    _, entry = server.train_round(1, server.initial_adapter())
    assert [message.metadata.message_type for message in grid.sent] == [
        "query",
        "query",
        "train",
        "train",
    ]
    partitions = [message.content["config"]["partition"] for message in grid.sent]
    assert partitions == [*entry["asked"], *entry["asked"]]
    _, second = server.train_round(2, server.initial_adapter())
    assert sorted(entry["asked"] + second["asked"]) == [0, 1, 2, 3]


@pytest.mark.slow
def test_pooled_data_are_trained_by_who_always_did(configure):
    assert configure("mode=centralized").strategy.sampling == "random"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "1 of 2 rounds: everybody once before anybody twice"),
        (["num_rounds=3"], "1 or 2 of 3 rounds: everybody once before anybody twice"),
        (
            ["strategy.sampling=random"],
            "1 of 2 rounds on average, as it is drawn",
        ),
        (["mode=local"], "2 of 2 rounds: everybody once before anybody twice"),
    ],
)
def test_the_plan_tells_how_often_a_client_trains(overrides, told, configure):
    assert dict(plan.plan(configure(*overrides)))["a client trains in"] == told


def test_sampling_repeats_by_seed_and_counts_down():
    nodes = list(range(20))
    assert sample(nodes, 2, 5) == sample(nodes, 2, 5)
    draws = {tuple(sample(nodes, 2, seed)) for seed in range(50)}
    assert len(draws) > 25
    assert {p for draw in draws for p in draw} == set(range(20))
    sizes = [(20, 0.1), (20, 0.14), (100, 0.29), (3, 0.1), (7, 1.0)]
    assert [cohort_size(*size) for size in sizes] == [2, 2, 29, 1, 7]
