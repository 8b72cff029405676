"""pytest tests/test_secure.py: sums of updates of which the server knows nothing else."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common import serde
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from methods import secure
from methods.base import Unusable
from methods.secure import KEY, LIMIT, Member, OneSum, Total
from methods.store import Kept
from node import permit
from server.rounds import RunFailed, Server, run
from utils import PROJECT, Refusal, UserError

SECURE = (
    "privacy.secure_aggregation=true",
    "strategy.fraction_fit=1",
    "comm.dtype=float32",
    "train.training_arguments.max_steps=1",
)


def anyone(numbers: list[int]) -> None:
    """A round of which no other sum was known."""


class Sum:
    """A sum in this process; who leaves before which step is for a test to say."""

    def __init__(self, numbers: list[int]) -> None:
        self.members = {number: Member(ConfigRecord()) for number in numbers}
        keys = {number: one.keys() for number, one in self.members.items()}
        self.total = Total(
            {number: secure.read_keys(key) for number, key in keys.items()}
        )

    def share(self, gone: set[int] = frozenset()) -> None:
        total = self.total
        for number in {*self.members} - gone:
            sealed = self.members[number].shares(total.keys, total.numbers)
            total.read_sealed(number, sealed)
        total.check()

    def masked(self, number: int, vector: np.ndarray) -> np.ndarray:
        member = self.members[number]
        member.begin(self.total.members, self.total.sealed_for(number))
        return member.mask(vector)

    def add(self, vectors: dict[int, np.ndarray]) -> None:
        for number, vector in vectors.items():
            self.total.add(number, self.masked(number, vector))
        self.total.check()

    def reveal(self, gone: set[int] = frozenset()) -> np.ndarray:
        who = {self.total.numbers[i] for i in self.total.added} - gone
        for number in who:
            opened = self.members[number].reveal(self.total.added, anyone)
            self.total.read_opened(number, opened)
        return self.total.unmasked()


def vector(seed: int, length: int = 50) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 2**64, length, dtype=np.uint64)


# --- the sum ----------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data(), count=st.integers(3, 9), length=st.integers(1, 40))
def test_the_masked_sum_is_the_plain_one_bit_for_bit(data, count, length):
    """Whoever leaves before their shares, before their update, or before they reveal."""
    numbers = data.draw(
        st.lists(st.integers(0, 10**6), min_size=count, max_size=count, unique=True)
    )
    needed, shares = secure.least(count), secure.threshold(count)
    spare = count - needed
    early = data.draw(st.integers(0, spare))
    late = data.draw(st.integers(0, spare - early))
    silent = data.draw(st.integers(0, count - early - late - shares))
    order = data.draw(st.permutations(numbers))
    gone = {*order[:early]}
    left = order[early + late :]
    one = Sum(numbers)
    one.share(gone)
    vectors = {number: vector(number, length) for number in left}
    one.add(vectors)
    found = one.reveal({*left[:silent]})
    plain = np.zeros(length, np.uint64)
    for each in vectors.values():
        plain += each
    assert np.array_equal(found, plain)


def test_half_of_the_shares_give_nothing():
    one = Sum([*range(6)])
    one.share()
    one.add({i: vector(i) for i in range(6)})
    with pytest.raises(Unusable, match=r"3 clients have opened .* and 4 are needed"):
        one.reveal({0, 1, 2})


@pytest.mark.parametrize("count", [3, 4, 6])
def test_shares_are_put_together_as_flower_does(count):
    secret, needed = random.Random(0).randbytes(KEY), secure.threshold(count)
    shares = create_shares(secret, needed, count)
    for some in itertools.combinations(shares, needed):
        points = [secure._numbered(share) for share in some]
        assert secure.combined([*some], secure.lagrange(points)) == secret
        assert combine_shares([*some]) == secret


def test_any_key_fits_to_too_few_shares():
    """One share is missing: for each key there is one that would make it."""
    shares = create_shares(bytes(KEY), 4, 6)[:3]
    weights = secure.lagrange([1, 2, 3, 4])
    for key in (bytes(KEY), b"\x07" * KEY, random.Random(1).randbytes(KEY)):
        padded, missing = key + bytes([16]) * 16, b"\x04\0\0\0"
        for start in range(0, 48, 16):
            value = int.from_bytes(padded[start : start + 16], "big")
            for share, weight in zip(shares, weights, strict=False):
                part = int.from_bytes(share[4 + start : 20 + start], "big")
                value ^= secure._times(weight, part)
            value = secure._times(value, secure._inverse(weights[3]))
            missing += value.to_bytes(16, "big")
        assert secure.combined([*shares, missing], weights) == key


def test_one_false_share_is_found_out():
    one = Sum([*range(4)])
    one.share()
    vectors = {i: vector(i) for i in range(4)}
    one.add(vectors)
    for number in range(4):
        opened = one.members[number].reveal(one.total.added, anyone)
        if number == 1:
            opened = [share[:-1] + bytes([share[-1] ^ 1]) for share in opened]
        one.total.read_opened(number, opened)
    assert np.array_equal(one.total.unmasked(), sum(vectors.values()))


def test_who_seals_no_shares_is_named():
    one = Sum([10, 11, 12, 13])
    total = one.total
    for number, member in one.members.items():
        sealed = member.shares(total.keys, total.numbers)
        if number == 12:
            sealed = [share and b"x" * len(share) for share in sealed]
        total.read_sealed(number, sealed)
    one.add({number: vector(number) for number in one.members})
    with pytest.raises(Unusable, match="the shares of 1 clients' keys"):
        one.reveal()
    assert total.lost == [12]


# --- what the server sees ---------------------------------------------------------------------


def p_of_bytes(values: np.ndarray) -> float:
    """Of the hypothesis that all 256 values of a byte are as likely (chi-square)."""
    counts = np.bincount(np.frombuffer(values.tobytes(), np.uint8), minlength=256)
    return chisquare(counts).pvalue


def test_one_message_looks_like_random_bytes():
    """Whatever is in it, and also what it differs by from another or the next one."""
    length = 40_000
    plain = secure.encode(
        {"a": torch.randn(length) * 1e-3},
        {"train_loss": 1.0, "tokens": 5, "peak_memory": 2**30},
        16,
        3,
        16,
    )
    assert p_of_bytes(plain) < 1e-9
    seen = []
    for _ in range(2):
        one = Sum([0, 1, 2])
        one.share()
        seen += [one.masked(number, plain) for number in (0, 1)]
    for message in (*seen, seen[0] - seen[1], seen[0] - seen[2], seen[0] - plain):
        assert p_of_bytes(message) > 1e-7
    assert not np.array_equal(seen[0], seen[2])


def test_a_part_that_comes_late_stays_masked():
    """Though all masks with others are known by then: the own one is not."""
    one = Sum([0, 1, 2, 3])
    one.share()
    late = one.masked(3, vector(3))
    secrets = [*one.members[3].kept["secrets"]]
    one.add({i: vector(i) for i in range(3)})
    one.reveal()
    for other in range(3):
        key = secure.agreed("mask", secrets[1], one.total.keys[other][KEY : 2 * KEY])
        secure.add_mask(late, key, -secure._pairwise(3, other))
    assert not (late == vector(3)).any()
    secure.add_mask(late, secure._derived("own", secrets[2]), -1)
    assert np.array_equal(late, vector(3))
    with pytest.raises(Unusable, match="not among the members"):
        one.members[3].reveal([0, 1, 2], anyone)


# --- a client, and what it is asked -----------------------------------------------------------


def test_each_step_is_done_once_and_in_turn():
    one = Sum([0, 1, 2])
    member, total = one.members[0], one.total
    steps = {
        "mask": lambda: member.mask(vector(0)),
        "reveal": lambda: member.reveal([0, 1, 2], anyone),
        "begin": lambda: member.begin([0, 1, 2], total.sealed_for(0)),
        "shares": lambda: member.shares(total.keys, total.numbers),
    }
    for number in (1, 2):
        total.read_sealed(number, one.members[number].shares(total.keys, [0, 1, 2]))
    total.read_sealed(0, steps["shares"]())
    for turn in ("begin", "mask", "reveal", ""):
        for name in steps.keys() - {turn}:
            state = dict(member.kept)
            with pytest.raises(Unusable, match=f"'{name}' is out of turn"):
                steps[name]()
            assert dict(member.kept) == state
        if turn:
            steps[turn]()
    assert not member.kept  # the secrets are forgotten


KEYS = [Member({}).keys() for _ in range(3)]


@pytest.mark.parametrize(
    ("keys", "numbers", "cause"),
    [
        (lambda mine: [mine, KEYS[0]], [0, 1], "a sum of 2 clients is refused"),
        (lambda mine: [mine] * 1001, [*range(1001)], "a sum of 1001 clients"),
        (lambda mine: KEYS, [0, 1, 2], "the client's own are not among them"),
        (lambda mine: [mine, KEYS[0], KEYS[0]], [0, 1, 2], "keys came in twice"),
        (lambda mine: [mine, mine, KEYS[0]], [0, 1, 2], "keys came in twice"),
        (lambda mine: [mine, KEYS[0], KEYS[1][1:]], [0, 1, 2], "are none"),
        (lambda mine: [mine, KEYS[0], 5], [0, 1, 2], "are none"),
        (lambda mine: [mine, *KEYS[:2]], [0, 1, 1], "no numbers of their own"),
        (lambda mine: [mine, *KEYS[:2]], [0, 1], "no numbers of their own"),
    ],
)
def test_a_client_looks_at_the_keys_that_come(keys, numbers, cause):
    member = Member({})
    mine = member.keys()
    with pytest.raises(Unusable, match=cause):
        member.shares(keys(mine), numbers)
    with pytest.raises(Unusable, match="out of turn"):  # no second try with others
        member.shares([mine, *KEYS[:2]], [0, 1, 2])


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ([0, 1], "a sum of 2 clients is refused: of 5 there have to be 3"),
        ([1, 2, 3], "not among the members"),
        ([0, 1, 1, 2], "one is there twice"),
        ([2, 1, 0], "one is there twice"),
        ([0, 1, 7], "that are none"),
        ([0, 1, True], "that are none"),
    ],
)
def test_a_client_looks_at_the_members_of_its_sum(members, cause):
    one = Sum([*range(5)])
    one.share()
    with pytest.raises(Unusable, match=cause):
        one.members[0].begin(members, [b""] * len(members))
    one = Sum([*range(5)])
    one.share()
    one.masked(0, vector(0))
    with pytest.raises(Unusable, match=cause):
        one.members[0].reveal(members, anyone)
    with pytest.raises(Unusable, match="out of turn"):  # not even what would be right
        one.members[0].reveal([0, 1, 2], anyone)


def test_a_node_may_ask_for_larger_sums(monkeypatch, tmp_path):
    monkeypatch.chdir(PROJECT)  # and back, because a node goes there
    own = {"partition-id": 1, "num-partitions": 4, "cpus": 1, "least-sum": 4}
    own |= {"cache-path": str(tmp_path)}
    told = {"overrides": "experiment=quickstart num_clients=4", "run": "first"}
    with pytest.raises(Refusal, match="its least-sum"):
        permit.settle(told, own)
    told["overrides"] += f" {' '.join(SECURE)}"
    cfg, _ = permit.settle(told, own)
    one = Sum([*range(5)])
    one.members[0].fewest = cfg.least_sum
    one.share()
    with pytest.raises(Unusable, match="a sum of 3 clients is refused"):
        one.members[0].begin([0, 1, 2], [b""] * 3)


def test_of_a_round_one_sum_is_known(tmp_path):
    """The same again for a run that goes on; with others it would tell a difference."""
    for numbers in ([3, 1, 2], [1, 2, 3]):
        OneSum(Kept(tmp_path, 1, 7))(numbers)
    with pytest.raises(Unusable, match="another sum of round 7"):
        OneSum(Kept(tmp_path, 1, 7))([1, 2, 3, 4])
    OneSum(Kept(tmp_path, 1, 8))([1, 2, 4])
    with pytest.raises(Unusable, match="another sum of round 7"):
        OneSum(Kept(tmp_path, 1, 7))([1, 2, 4])


# --- the server, and what it is told ----------------------------------------------------------


@pytest.mark.parametrize(
    "keys", [None, "k" * 96, b"", b"k" * 95, [b"k" * 96], bytes(96), b"\1" + bytes(95)]
)
def test_keys_that_are_none_are_refused(keys):
    """Also those of low order, with which everybody would make the same key."""
    with pytest.raises(ValueError, match=r"keys are none|shared key"):
        secure.read_keys(keys)


def test_shares_that_are_none_are_refused():
    one = Sum([0, 1, 2])
    total = one.total
    sealed = one.members[0].shares(total.keys, total.numbers)
    for broken in (None, 5, [], sealed[:2], [*sealed, b""], ["", *sealed[1:]]):
        with pytest.raises(Unusable):
            total.read_sealed(0, broken)
    with pytest.raises(Unusable):
        total.read_sealed(1, sealed)
    total.read_sealed(0, sealed)
    for number in (1, 2):
        total.read_sealed(number, one.members[number].shares(total.keys, [0, 1, 2]))
    one.add({i: vector(i) for i in range(3)})
    opened = one.members[0].reveal([0, 1, 2], anyone)
    for broken in (None, {}, opened[:2], [b"x", *opened[1:]], [1, 2, 3]):
        with pytest.raises(Unusable):
            total.read_opened(0, broken)
    with pytest.raises(Unusable, match="another client's"):
        total.read_opened(1, opened)


# --- fixed point ------------------------------------------------------------------------------

FIGURES = {"train_loss": 2.5, "tokens": 100, "peak_memory": 2.0**31}


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.integers(1, 10_000), min_size=3, max_size=12),
    size=st.sampled_from([1e-6, 1e-3, 1.0, LIMIT]),
)
def test_the_mean_is_off_by_half_a_step_at_most(seed, weights, size):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b": (3, 4), "a": (5,)}
    updates = [
        {
            k: (torch.rand(v, generator=generator) * 2 - 1) * size
            for k, v in shapes.items()
        }
        for _ in weights
    ]
    count, most = len(weights), max(weights)
    total = np.zeros(secure.size(shapes), np.uint64)
    for update, weight in zip(updates, weights, strict=True):
        total += secure.encode(update, FIGURES, weight, count, most)
    mean, figures = secure.decode(total, shapes, count, count, most)
    for name in shapes:
        exact = sum(
            update[name].double() * weight
            for update, weight in zip(updates, weights, strict=True)
        ) / sum(weights)
        # And what float64 loses of a sum of so many.
        bound = 0.5 / secure.scale(count, most) + 2.0**-50 * size
        assert (mean[name] - exact).abs().max() <= bound
    assert figures["weight"] == sum(weights)
    assert figures["train_loss"] == pytest.approx(2.5, rel=1e-9)
    assert figures["tokens"] == 100 * count
    assert figures["peak_memory"] == 2**31


def test_the_largest_sum_does_not_run_over():
    for count, most in ((3, 1), (7, 1000), (1000, 2**18)):
        update = {"a": torch.tensor([LIMIT, -LIMIT])}
        one = secure.encode(update, FIGURES, most, count, most)
        total = one * np.uint64(count)
        exact = [int(value) * count for value in one.view(np.int64)]
        assert total.view(np.int64).tolist() == exact
        mean, _ = secure.decode(total, {"a": (2,)}, count, count, most)
        assert mean["a"].tolist() == [LIMIT, -LIMIT]


def test_what_does_not_fit_is_said():
    for value in (1025.0, float("nan"), float("inf")):
        with pytest.raises(Unusable, match="holds values beyond 1024"):
            secure.encode({"a": torch.tensor([value])}, FIGURES, 1, 3, 1)
    with pytest.raises(
        Unusable, match=r"Set strategy\.max_weight=\d+ or less"
    ) as error:
        secure.scale(1000, 2**20)
    most = int(str(error.value).split("max_weight=")[1].split()[0])
    assert secure.scale(1000, most) == secure.FINE


def test_a_sum_of_no_updates_is_refused():
    shapes = {"a": (2,)}
    one = secure.encode({"a": torch.ones(2)}, FIGURES, 2, 3, 4)
    for place in range(len(one)):
        total = one * np.uint64(3)
        total[place] = np.uint64(2**63)
        with pytest.raises(Unusable, match="out of bounds"):
            secure.decode(total, shapes, 3, 3, 4)


# --- in a run ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["strategy=fedavg", "strategy=fedadam", "sharing=ffa", "sharing=rolora"]
)
def test_a_round_gives_the_adapter_that_it_gives_without(method, configure, loopback):
    cfg = configure(*SECURE[1:], method)
    hidden = configure(*SECURE, method)
    plain, summed = (Server(each, loopback(each)) for each in (cfg, hidden))
    start = plain.initial_adapter()
    summed.initial_adapter()
    wanted, told = plain.train_round(1, start)
    found, entry = summed.train_round(1, start)
    moved = max((wanted[name] - start[name]).abs().max() for name in start)
    assert moved > 1e-4
    for name in start:
        # Half a step of 2^-44 (16 clients of weight 4), and float32's own rounding.
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-9)
    assert entry["train_loss"] == pytest.approx(told["train_loss"], rel=1e-9)
    assert entry["tokens"] == told["tokens"]
    assert entry["replied"] == 4


@pytest.mark.slow
def test_the_server_is_told_nothing_of_one_client(configure, loopback, tmp_path):
    cfg = configure(*SECURE)
    grid = loopback(cfg, folder=tmp_path)
    replies = []
    grid.tamper = lambda partition, reply: replies.append(reply) or reply
    run(cfg, grid, tmp_path)
    kinds = [reply.metadata.message_type for reply in replies]
    assert {kind: kinds.count(kind) for kind in {*kinds}} == {
        "query": 4,
        "query.agree": 2 * 3 * 4,
        "train.masked": 2 * 4,
    }
    for reply in replies:
        if reply.metadata.message_type == "train.masked":
            assert [*reply.content] == ["arrays"]
            assert [*reply.content["arrays"]] == ["masked"]
    history = json.loads((tmp_path / "history.json").read_text())["rounds"]
    for entry in history:
        assert entry["clients"] == []
        assert entry["aggregation_error"] is None
        assert entry["asked"] == [0, 1, 2, 3]
    left = (tmp_path / "residuals").rglob("*")
    kept = [path.name for path in left if path.is_file()]
    assert kept
    assert all(name.startswith("sum-") for name in kept)  # no secret is on disk


@pytest.mark.slow
def test_messages_and_secrets_are_the_same_after_flowers_wire(configure, loopback):
    """As between processes, where a client's state is written down after each message."""

    def there(record: RecordDict) -> RecordDict:
        return serde.recorddict_from_proto(serde.recorddict_to_proto(record))

    class Wire(loopback):
        def push_messages(self, messages):
            for message in messages:
                message.content = there(message.content)
            return super().push_messages(messages)

        def pull_messages(self, ids):
            for context in self.contexts.values():
                context.state = there(context.state)
            replies = super().pull_messages(ids)
            for reply in replies:
                assert not reply.has_error(), reply.error
                reply.content = there(reply.content)
            return replies

    cfg = configure(*SECURE)
    plain, wired = (Server(cfg, grid(cfg)) for grid in (loopback, Wire))
    start = plain.initial_adapter()
    wired.initial_adapter()
    wanted, found = (each.train_round(1, start)[0] for each in (plain, wired))
    assert all(torch.equal(found[name], wanted[name]) for name in start)


def broken(step: str, partition: int, how):
    """A `tamper` that spoils what a client answers in a step."""
    asked = {"keys": bytes, "shares": list, "reveal": list}
    seen = {"count": 0}

    def tamper(sender: int, reply: Message) -> Message:
        if sender != partition or reply.has_error():
            return reply
        content = reply.content
        if step == "masked" and "masked" in content.get("arrays", {}):
            how(content)
        elif "secure" in content:
            seen["count"] += 1
            turn = ["keys", "shares", "reveal"][(seen["count"] - 1) % 3]
            if turn == step and isinstance(content["secure"]["answer"], asked[step]):
                how(content)
        return reply

    return tamper


def drop(content) -> None:
    for name in [*content]:
        del content[name]


def answer(value):
    def how(content) -> None:
        content["secure"] = ConfigRecord({"answer": value})

    return how


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "how", "cause", "replied"),
    [
        ("keys", drop, "cannot be read", 4),
        ("keys", answer(b"short"), "its keys are none", 4),
        ("keys", answer(bytes(96)), "cannot be read (ValueError)", 4),
        ("shares", drop, "cannot be read", 4),
        ("shares", answer([b"x"] * 5), "its sealed shares are not", 4),
        ("masked", drop, "holds no arrays", 4),
        ("reveal", drop, "cannot be read", 5),
        ("reveal", answer([b"y" * 52] * 5), "another client's", 5),
    ],
)
def test_a_client_that_fails_in_a_step_is_named(
    step, how, cause, replied, configure, loopback
):
    cfg = configure(*SECURE, "num_clients=5")
    server = Server(cfg, loopback(cfg, broken(step, 2, how)))
    _, entry = server.train_round(1, server.initial_adapter())
    assert entry["replied"] == replied
    assert entry["retries"] == 0
    [failure] = entry["failures"]
    assert failure["partition"] == 2
    assert cause in failure["cause"]


@pytest.mark.slow
def test_a_round_without_enough_parts_is_repeated_and_then_fails(configure, loopback):
    cfg = configure(*SECURE, "num_clients=3", "strategy.max_round_retries=1")
    server = Server(cfg, loopback(cfg, broken("masked", 1, drop)))
    start = server.initial_adapter()
    with pytest.raises(RunFailed, match=r"Round 1 failed 2 times .* holds no arrays"):
        server.train_round(1, start)
    # Had it been known already, the sum of the other two would have told each of them the
    # other's: no client has opened a share.
    opened = [m for m in server.grid.sent if _step(m) == "reveal"]
    assert opened == []


def _step(message: Message) -> str | None:
    return message.content.get("secure", {}).get("step")


@pytest.mark.slow
def test_a_forged_vector_spoils_its_round_and_no_run(configure, loopback):
    """Nobody can say whose it was; the next attempt is made anew."""
    cfg = configure(*SECURE, "num_clients=4")
    spoiled = []

    def tamper(sender: int, reply: Message) -> Message:
        arrays = {} if reply.has_error() else reply.content.get("arrays", {})
        if sender == 2 and "masked" in arrays and not spoiled:
            spoiled.append(sender)
            forged = vector(0, len(arrays["masked"].numpy()))
            arrays["masked"] = type(arrays["masked"])(forged)
        return reply

    server = Server(cfg, loopback(cfg, tamper))
    _, entry = server.train_round(1, server.initial_adapter())
    assert entry["retries"] == 1
    assert entry["replied"] == 4


# --- what it does not go with -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("strategy=krum", "it looks at each update"),
        ("strategy=fedmedian", "it looks at each update"),
        ("strategy=svd", "it looks at each update"),
        ("strategy=scaffold", "it looks at each update"),
        ("strategy=qfedavg", "it looks at each update"),
        ("strategy.clip_norm=1.0", "set strategy.clip_norm=null"),
        ("strategy.clip_weights=1.0", "set strategy.clip_weights=null"),
        ("strategy.fraction_evaluate=1", "set strategy.fraction_evaluate=0"),
        ("comm.dtype=int8", "set comm.dtype=float16"),
        (
            "strategy.fraction_fit=0.5",
            "are 2 clients a round, and a sum is of 3 to 1000",
        ),
        ("mode=local", "nobody's updates are added there"),
    ],
)
def test_what_needs_single_updates_is_refused_in_a_line(override, told, configure):
    with pytest.raises(UserError) as error:
        configure(*SECURE, override)
    assert told in str(error.value)
    assert "privacy.secure_aggregation=true" in str(error.value)
    assert "\n" not in str(error.value)
