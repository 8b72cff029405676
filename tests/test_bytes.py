"""pytest tests/test_bytes.py: top-k, compression, and changes on the way down."""

import json
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file

from assets.testbed.adapters import same
from assets.testbed.loopback import killed_in
from methods import deflate, down, sharing, sparse, steps, wire
from methods.base import Contribution, Unusable
from methods.store import Kept
from server import checkpoint, rounds
from server.exchange import Changes, Downlink
from server.rounds import Server
from settings import plan
from utils import Settings, UserError

DTYPES = ["float32", "float16", "int8"]
shapes = st.dictionaries(
    st.text("ab.", min_size=1, max_size=4),
    st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple),
    min_size=1,
    max_size=4,
)


def drawn(of: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in of.items()}


def comm(dtype: str, top_k: float | None, compress: str | None) -> Settings:
    return Settings(dtype=dtype, top_k=top_k, compress=compress, delta_down=False)


# --- what arrives is what was sent, and the rest is kept ---------------------------------------


@pytest.mark.parametrize("compress", [None, "zlib"])
@pytest.mark.parametrize("share", [None, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(of=shapes, seed=st.integers(0, 2**20))
def test_an_update_and_what_was_left_out_are_all_of_it(
    dtype, share, compress, of, seed, tmp_path_factory
):
    way = steps.travels(comm(dtype, share, compress))
    kept = Kept(tmp_path_factory.mktemp("kept"), 0, 1)
    update = drawn(of, seed)
    packed = ArrayRecord(way.leave(update, kept))
    shaped = {name: torch.empty(shape) for name, shape in of.items()}
    one = way.arrive(Contribution(0, shaped, packed, 1, 1.0))
    assert {k: v.shape for k, v in one.update.items()} == {
        k: v.shape for k, v in update.items()
    }
    left = Kept(kept.folder, 0, 2).load("residual")
    if dtype == "int8" or share:
        for name, whole in update.items():
            assert torch.allclose(one.update[name] + left[name], whole, atol=1e-6)
    else:
        plain = wire.unpack(wire.pack(update, dtype)[0])
        assert all(one.update[name].equal(plain[name]) for name in of)
    if share:
        values = sparse.flat(one.update)
        size = len(values)
        most = max(1, int(np.ceil(share * size)))
        assert (values != 0).sum() <= most
        if dtype != "int8":
            least = sparse.flat(update).abs().sort(descending=True).values[:most]
            sent = values.abs().sort(descending=True).values[:most]
            assert torch.allclose(sent, least, rtol=1e-3, atol=1e-6)


def test_error_feedback_by_hand(tmp_path):
    """Two of four values a round: what was to be sent is what was, and what is left."""
    way = sparse.TopK("float32", 0.5)
    updates = [[3.0, -1.0, 0.5, 2.0], [0.5, -1.0, 0.25, 0.0], [0.0, 0.0, 0.5, 0.25]]
    sent = [[3.0, 0.0, 0.0, 2.0], [0.0, -2.0, 0.75, 0.0], [0.5, 0.0, 0.5, 0.0]]
    left = [[0.0, -1.0, 0.5, 0.0], [0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.25]]
    for number, update in enumerate(updates):
        tensors = {"b": torch.tensor(update[:2]), "c": torch.tensor(update[2:])}
        packed = way.leave(tensors, Kept(tmp_path, 0, number + 1))
        found = way.unpack(packed, tensors)
        assert sparse.flat(found).tolist() == sent[number]
        kept = Kept(tmp_path, 0, number + 2).load("residual")
        assert sparse.flat(kept).tolist() == left[number]
    total = torch.tensor(updates).sum(0)
    assert (torch.tensor(sent).sum(0) + torch.tensor(left[-1])).equal(total)


def test_what_is_left_of_a_half_waits_for_its_turn(tmp_path):
    way = sparse.TopK("float32", 0.5)
    a, b = {"A": torch.tensor([2.0, 1.0])}, {"B": torch.tensor([4.0, 3.0])}
    for number, update in enumerate((a, b, a), start=1):
        packed = way.leave(update, Kept(tmp_path, 0, number))
    assert way.unpack(packed, a)["A"].tolist() == [2.0, 0.0]  # 2 and 1 + 1: the first
    kept = Kept(tmp_path, 0, 4).load("residual")
    assert {k: v.tolist() for k, v in kept.items()} == {"A": [0, 2], "B": [0, 3]}


def test_what_is_not_finite_is_not_kept(tmp_path):
    way = sparse.TopK("float16", 0.5)
    update = {"w": torch.tensor([1e6, float("nan"), 1.0, float("inf")])}
    packed = way.leave(update, Kept(tmp_path, 0, 1))
    assert not torch.isfinite(way.unpack(packed, update)["w"]).all()
    assert Kept(tmp_path, 0, 2).load("residual")["w"].isfinite().all()


@settings(max_examples=50, deadline=None)
@given(size=st.sampled_from([1, 2, 255, 256, 257, 65536, 65537]), data=st.data())
def test_places_and_values_come_back(size, data):
    places = data.draw(st.sets(st.integers(0, size - 1), max_size=40))
    places = torch.tensor(sorted(places), dtype=torch.int64)
    values = torch.randn(len(places)).half().float()
    made = sparse.encode(values, places, size, "float16")
    assert len(made) == sparse.length(len(places), size, "float16")
    found, told = sparse.decode(made, size, "float16")
    assert (found.tolist(), told.tolist()) == (places.tolist(), values.tolist())


# --- what comes in is foreign ------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=60),
    size=st.integers(1, 70_000),
    dtype=st.sampled_from(DTYPES),
)
def test_bytes_of_any_kind_are_places_or_refused(data, size, dtype):
    try:
        found, values = sparse.decode(np.frombuffer(data, np.uint8), size, dtype)
    except Unusable:
        return
    assert len(found) == len(values) <= size
    assert found.tolist() == sorted({*found.tolist()})
    assert all(0 <= place < size for place in found)


def test_places_twice_backwards_or_beyond_are_refused():
    values = torch.ones(2)
    for places in ([3, 3], [5, 3], [3, 8], [3, 255]):
        made = sparse.encode(values, torch.tensor(places), 8, "float32")
        with pytest.raises(Unusable, match="places of its values"):
            sparse.decode(made, 8, "float32")
    for few in (0, 1, 3):  # in the only block, where two are
        made[0] = few
        with pytest.raises(Unusable, match="places of its values"):
            sparse.decode(made, 8, "float32")
    with pytest.raises(Unusable, match="11 bytes are not places"):
        sparse.decode(made[:11], 8, "float32")
    full = sparse.encode(torch.ones(9), torch.arange(9), 8, "float32")
    with pytest.raises(Unusable, match="bytes are not places and values of 8"):
        sparse.decode(full, 8, "float32")


LAYOUT = {"w": ("int8", (100, 10)), "w:scale": ("float32", (10,))}


def array(data: bytes) -> ArrayRecord:
    made = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return ArrayRecord({deflate.NAME: made})


def test_a_bomb_is_never_unpacked():
    bomb = array(zlib.compress(bytes(200_000_000)))
    flat = array(zlib.compress(bytes(3000), 0))
    short = array(zlib.compress(bytes(1039)))
    cut = array(zlib.compress(bytes(1040))[:-1])
    more = array(zlib.compress(bytes(1040)) + b"x")
    noise = array(b"x" * 900)
    fits = array(zlib.compress(bytes(1040)))
    small_bomb = array(zlib.compress(bytes(500_000)))
    tracemalloc.start()
    for spoiled, told in (
        (bomb, "longer than 1040 bytes, compressed"),
        (flat, "longer than 1040 bytes, compressed"),
        (small_bomb, "more than 1040 bytes, or has no end"),
        (short, "fewer bytes than the 1040"),
        (cut, "has no end"),
        (more, "has no end"),
        (noise, "not what zlib has compressed"),
        (ArrayRecord({}), "more or less than one compressed array"),
        (ArrayRecord({"x": torch.zeros(3)}), "more or less than one"),
        (ArrayRecord({deflate.NAME: torch.zeros(3)}), "not of type uint8"),
    ):
        with pytest.raises(Unusable, match=told):
            deflate.inflate(spoiled, LAYOUT)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    assert deflate.inflate(fits, LAYOUT)["w"].shape == (100, 10)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(min_size=1, max_size=300), packs=st.booleans())
def test_bytes_of_any_kind_are_a_layout_or_refused(data, packs):
    try:
        found = deflate.inflate(array(zlib.compress(data) if packs else data), LAYOUT)
    except Unusable:
        return
    assert {k: (str(v.dtype)[6:], v.shape) for k, v in found.items()} == LAYOUT


@pytest.mark.parametrize(
    ("words", "spoiled", "told"),
    [
        ("comm.top_k=0.1", {"top_k": torch.zeros(5, dtype=torch.uint8)}, "has shape"),
        ("comm.top_k=0.1", {}, "missing or unknown"),
        ("comm.top_k=0.1 comm.compress=zlib", {"zlib": torch.zeros(9)}, "uint8"),
        (
            "comm.compress=zlib",
            {"zlib": torch.zeros(9, dtype=torch.uint8)},
            "not what zlib has compressed",
        ),
    ],
)
def test_a_client_that_sends_no_such_thing_is_left_out(
    words, spoiled, told, configure, loopback
):
    cfg = configure(words, "num_clients=2", "strategy.fraction_fit=1")

    def spoil(partition, reply):
        if partition == 1 and "train_loss" in reply.content.get("metrics", {}):
            reply.content["arrays"] = ArrayRecord(spoiled)
        return reply

    server = Server(cfg, loopback(cfg, spoil))
    _, entry = server.train_round(1, server.initial_adapter())
    [failure] = entry["failures"]
    assert failure["partition"] == 1
    assert told in failure["cause"]
    assert entry["replied"] == 1


# --- from end to end ---------------------------------------------------------------------------

COMBINED = [
    "comm.top_k=0.1 comm.delta_down=true comm.compress=zlib",
    "comm.top_k=0.05 comm.dtype=int8 comm.compress=zlib",
    "comm.dtype=int8 comm.compress=zlib sharing=ffa",
    "comm.compress=zlib sharing=rolora comm.top_k=0.2",
    "comm.top_k=0.1 comm.delta_down=true strategy=fedadam strategy.fraction_evaluate=1",
]


@pytest.mark.slow
@pytest.mark.parametrize("words", COMBINED)
def test_a_run_that_was_killed_ends_bit_identical_and_learns(
    words, configure, loopback, tmp_path
):
    cfg = configure(
        *(words, "num_rounds=4", "num_clients=3", "strategy.fraction_fit=0.7"),
        "evaluate.holdout=0.02",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    rounds.run(cfg, loopback(cfg, folder=whole), whole)
    killed_in(cfg, parts, replies=6)  # in its third round
    again = cfg | {"resume": str(parts)}
    rounds.run(again, loopback(again, folder=parts), parts)
    file = "peft_4/adapter_model.safetensors"
    made = load((whole / file).read_bytes())
    assert same(made, load((parts / file).read_bytes()))
    one, other = (
        json.loads((folder / "history.json").read_text())["rounds"]
        for folder in (whole, parts)
    )
    for name in ("train_loss", "failures", "bytes_up"):
        assert [e[name] for e in one] == [e[name] for e in other]
    assert [e["failures"] for e in one] == [[]] * 4
    told = "eval_loss" if cfg.strategy.fraction_evaluate else "train_loss"
    losses = [entry[told] for entry in one]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("compress", ["null", "zlib"])
def test_who_is_asked_again_gets_changes_and_has_what_the_server_sends(
    compress, configure, loopback
):
    cfg = configure(
        *("comm.top_k=0.1", "comm.delta_down=true", f"comm.compress={compress}"),
        *("num_clients=4", "strategy.fraction_fit=0.5", "num_rounds=8"),
        "train.training_arguments.max_steps=1",
    )
    grid = loopback(cfg)
    server = Server(cfg, grid)
    state = server.initial_adapter()
    whole = plan.wire_bytes(server.frame, "float16")
    down_bytes = []
    for number in range(1, 5):
        state, entry = server.train_round(number, state)
        assert entry["failures"] == []
        sent = server.downlink.view
        for one in entry["clients"]:
            down_bytes.append(one["bytes_down"])
            file = f"{one['partition']}/view-{number:06d}.safetensors"
            held = load_file(grid.folder / "residuals" / file)
            assert down.printed(held) == sent.prints[number - 1]
    # Everybody once, and then what at most three rounds have changed.
    told = ["since" in message.content["config"] for message in grid.sent[2:]]
    assert told == [False] * 4 + [True] * 4
    assert compress == "zlib" or min(down_bytes[:4]) > whole
    assert max(down_bytes[4:]) < 0.5 * whole
    behind = sparse.flat(state) - sparse.flat(sent.state)
    assert behind.abs().max() > 0  # which waits
    for file in grid.folder.glob("residuals/1/view-*"):
        file.unlink()
    entries = []
    for number in range(5, 9):
        state, entry = server.train_round(number, state)
        entries.append(entry)
    [failure] = [failure for entry in entries for failure in entry["failures"]]
    assert failure["partition"] == 1
    assert "changes were sent is not here as the server has it" in failure["cause"]
    mine = [c for e in entries for c in e["clients"] if c["partition"] == 1]
    assert compress == "zlib" or mine[0]["bytes_down"] > whole


@pytest.mark.slow
def test_after_the_last_round_clients_measure_the_adapter_that_is_saved(
    configure, loopback
):
    words = ("comm.top_k=0.05", "num_rounds=3", "strategy.fraction_evaluate=1")
    words += ("evaluate.holdout=0.02",)
    cfg = configure(*words, "comm.delta_down=true")
    server = Server(cfg, loopback(cfg))
    state = server.initial_adapter()
    for number in (1, 2):
        state, _ = server.train_round(number, state)
    behind = server.evaluate_round(2, state)["eval_loss"]
    whole = Server(cfg := configure(*words), loopback(cfg))  # which sends all of it
    whole.initial_adapter()
    assert behind != pytest.approx(whole.evaluate_round(2, state)["eval_loss"])
    state, _ = server.train_round(3, state)
    measured = server.evaluate_round(3, state)
    assert measured["evaluate_failures"] == []
    assert measured["eval_loss"] == whole.evaluate_round(3, state)["eval_loss"]


@pytest.mark.slow
def test_a_run_that_was_stopped_after_its_last_round_offers_the_adapter_that_is_saved(
    configure, loopback, tmp_path
):
    cfg = configure(
        *("comm.top_k=0.05", "comm.delta_down=true", "personal=ditto", "num_rounds=2"),
        *("strategy.fraction_evaluate=1", "num_clients=2", "strategy.fraction_fit=1"),
    )
    rounds.run(cfg, loopback(cfg, folder=tmp_path), tmp_path)
    told = json.loads((tmp_path / "summary.json").read_text())["personal_clients"]
    server = Server(cfg, loopback(cfg, folder=tmp_path))
    newest = checkpoint.newest(tmp_path)
    state, *_ = checkpoint.load(newest, server.aggregation, server.downlink)
    assert server.personalise(state)["personal_clients"] == told


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    share=st.sampled_from([0.01, 0.2, 1.0]),
    compress=st.sampled_from([None, "zlib"]),
    missed=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_whoever_was_away_comes_to_the_same_adapter(
    seed, share, compress, missed, tmp_path_factory
):
    state = drawn({"a": (7, 5), "b": (11,)}, seed)
    told = Settings(dtype="float16", top_k=share, compress=compress, delta_down=True)
    view = down.View(state, "float16", share)
    kept = Kept(tmp_path_factory.mktemp("kept"), 0, 1)
    here, number = view.state, view.number
    generator = torch.Generator().manual_seed(seed)
    for away in missed:
        state = {
            k: v + torch.randn(v.shape, generator=generator) for k, v in state.items()
        }
        before = sparse.flat(state) - sparse.flat(view.state)
        view.move(state)
        # What is furthest has come, as it is in float16; the rest waits.
        after = sparse.flat(state) - sparse.flat(view.state)
        assert (after.abs() <= before.abs() + 1e-6).all()
        assert (after != before).sum() <= sparse.count(share, 46)
        if away:
            continue
        kept.save("view", here)
        since, packed = view.since(number)
        arrays = ArrayRecord(deflate.deflate(packed) if compress else packed)
        kept.number += 1
        here = down.opened(arrays, {"since": since}, told, None, kept, dict)
        assert same(here, view.state)
        number = view.number


@pytest.mark.parametrize("compress", [None, "zlib"])
def test_a_client_takes_no_bomb_for_changes(compress, tmp_path):
    told = Settings(dtype="float16", top_k=0.1, compress=compress, delta_down=True)
    view = down.View(drawn({"a": (7, 5)}, 0), "float16", 0.1)
    kept = Kept(tmp_path, 0, 1)
    kept.save("view", view.state)
    kept.number += 1
    bomb = zlib.compress(bytes(500_000)) if compress else bytes(500_000)
    name = deflate.NAME if compress else down.CHANGED
    arrays = ArrayRecord({name: torch.frombuffer(bytearray(bomb), dtype=torch.uint8)})
    with pytest.raises(
        Unusable, match=r"no end|longer than|not places and values of 35"
    ):
        down.opened(arrays, {"since": view.prints[0]}, told, None, kept, dict)
    with pytest.raises(UserError, match="is not here as the server has it"):
        down.opened(arrays, {"since": "another"}, told, None, kept, dict)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("words", ["sharing=all", "sharing=ffa", "sharing=rolora"])
def test_what_comes_down_compressed_is_what_would_come(words, dtype, configure):
    cfg = configure(words, f"comm.dtype={dtype}", "comm.compress=zlib")
    part = sharing.build(cfg.sharing)
    a, b = "x.lora_A.weight", "x.lora_B.weight"
    state = drawn({a: (3, 9), b: (7, 3)}, 0)
    plain = Downlink(part, cfg.comm | {"compress": None}, state)
    small = Downlink(part, cfg.comm, state)
    for _ in range(2):
        found = []
        for one in (plain, small):
            arrays, told = one.pack({0: state})[0]
            kept = Kept(Path("nowhere"), 0, 1)
            found.append(down.opened(arrays, told, one.comm, part, kept, lambda: state))
            one.answer(0)
            one.close_round()
        assert same(*found)


def test_a_version_is_packed_once_and_the_next_one_anew(configure):
    cfg = configure("comm.top_k=0.1", "comm.delta_down=true", "comm.compress=zlib")
    part, here = sharing.build(cfg.sharing), Kept(Path("nowhere"), 0, 1)
    state = drawn({"a": (30, 9), "b": (7, 30)}, 0)
    sender = Changes(part, cfg.comm, state)
    sent = []
    for seed in (1, 2):
        first, again = (sender.pack({0: state, 1: state})[0] for _ in "ab")
        assert again[0] is first[0]
        assert same(
            down.opened(*first, cfg.comm, part, here, lambda: state), sender.view.state
        )
        sent.append(first[0])
        sender.move(drawn({"a": (30, 9), "b": (7, 30)}, seed))
    assert sent[0] is not sent[1]


# --- the plan, and what makes no sense ---------------------------------------------------------


def values(content) -> int:
    """Bytes of the arrays in a message without numpy's header of 128."""
    return sum(len(array.data) - 128 for array in content["arrays"].values())


@pytest.mark.slow
@pytest.mark.parametrize("words", ["comm.top_k=0.1", COMBINED[0], COMBINED[2]])
def test_the_plan_is_what_travels_at_most(words, configure, loopback):
    cfg = configure(
        *(words, "num_clients=2", "strategy.fraction_fit=1", "num_rounds=4"),
        "train.training_arguments.max_steps=1",
    )
    up = []

    def count(partition, reply):
        if "train_loss" in reply.content.get("metrics", {}):
            up.append(values(reply.content))
        return reply

    grid = loopback(cfg, count)
    server = Server(cfg, grid)
    state = server.initial_adapter()
    asked = len(grid.sent)
    for number in range(1, 5):
        state, entry = server.train_round(number, state)
        assert entry["failures"] == []
        assert entry["bytes_up"] == sum(up[-2:]) + 256  # one array of each
    down_ = sum(values(message.content) for message in grid.sent[asked:])
    told_down, told_up = dict(plan.plan(cfg))["bytes a round"].split(", ")
    at_most = {"down": "zlib" in words or "delta" in words, "up": "zlib" in words}
    for told, found in ((told_down, down_), (told_up, sum(up))):
        number, unit, way = told.removeprefix("at most ").split()
        planned = float(number) * {"B": 1, "KiB": 2**10, "MiB": 2**20}[unit]
        assert found / 4 <= planned * 1.01
        assert told.startswith("at most ") == at_most[way]
        assert at_most[way] or found / 4 >= planned * 0.99


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("comm.top_k=0", "comm.top_k=0: it must be above 0 and up to 1"),
        ("comm.top_k=1.5", "comm.top_k=1.5: it must be above 0 and up to 1"),
        ("comm.top_k=true", "comm.top_k=true: a number"),
        ("comm.compress=gzip", "comm.compress=gzip"),
        ("comm.delta_down=true", "with comm.top_k=null: then all"),
        ("comm.top_k=0.1 comm.delta_down=true comm.dtype=int8", "Take float16"),
        (
            "comm.top_k=0.1 comm.delta_down=true sharing=ffa",
            "Take sharing=all and no sharing.stays",
        ),
        ("comm.top_k=0.1 comm.delta_down=true sharing=fedsa", "Take sharing=all"),
        ("comm.top_k=0.1 comm.delta_down=true mode=local", "mode=local: each client"),
        ("comm.top_k=0.1 strategy=krum", "it compares whole updates"),
        ("comm.top_k=0.1 strategy=qfedavg", "it compares whole updates"),
        ("comm.top_k=0.1 strategy=svd", "are not told so"),
        ("comm.compress=zlib strategy=svd", "are not told so"),
        ("comm.compress=zlib strategy=scaffold", "are not told so"),
        (
            "comm.top_k=0.1 sharing=ffa sharing.refactor_every=2",
            "sharing.refactor_every=2: what was left out",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(words, told, configure):
    with pytest.raises(UserError) as refused:
        configure(words)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("comm.")


PRIVATE = (
    "num_clients=20 strategy.fraction_fit=0.5 strategy.fraction_evaluate=0 "
    "strategy.weighted_by=examples "
)


@pytest.mark.parametrize("key", ["comm.top_k=0.1", "comm.compress=zlib"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("privacy=local privacy.noise_multiplier=9", "its noise is to hide"),
        ("privacy=client privacy.noise_multiplier=9", "its noise is to hide"),
        ("privacy.secure_aggregation=true", "masked values are noise"),
    ],
)
def test_privacy_wants_messages_of_one_length(key, words, told, configure):
    with pytest.raises(UserError, match=told):
        configure(PRIVATE, words, key)
