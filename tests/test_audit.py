"""pytest tests/test_audit.py: what an audit concludes, against scipy, by hand, and of faults."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats
from sklearn.metrics import roc_auc_score

import dataset
import model
from compute.loss import answer_likelihoods
from evaluation import audit, bounds, canary_clients, membership
from methods import privacy
from node import permit
from records import batches, canaries, templates
from server import rounds
from settings import preflight
from settings.compose import compose, record, resolve
from utils import IGNORED, PROJECT, Refusal, UserError

DELTA = 1e-5
CLAIMED = 4.377  # epsilon of one release at z = 1 and this delta


# --- intervals ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_area_is_sklearns_and_its_interval_is_where_the_error_explains_it(seed):
    rng = np.random.default_rng(seed)
    members, others = rng.integers(2, 9, 40), rng.integers(0, 7, 25)  # with ties
    found = bounds.auc(members, others)
    truth = np.repeat([1, 0], [40, 25])
    scores = np.concatenate([members, others])
    assert found.value == pytest.approx(roc_auc_score(truth, scores))
    for end in (found.low, found.high):  # Hanley and McNeil's formula, as they give it
        q1, q2 = end / (2 - end), 2 * end**2 / (1 + end)
        variance = end * (1 - end) + 39 * (q1 - end**2) + 24 * (q2 - end**2)
        error = math.sqrt(variance / (40 * 25))
        assert abs(end - found.value) == pytest.approx(1.959964 * error, rel=1e-4)


@pytest.mark.parametrize("true", [0.5, 0.7, 0.95])
def test_the_interval_of_the_area_holds_it_as_often_as_it_says(true):
    rng = np.random.default_rng(1)
    shift = math.sqrt(2) * stats.norm.ppf(true)
    held = 0
    for _ in range(400):
        found = bounds.auc(rng.normal(shift, 1, 60), rng.normal(0, 1, 40))
        held += found.low <= true <= found.high
    assert 0.92 <= held / 400 <= 0.99


def test_areas_of_nothing_and_all_have_an_interval_too():
    high, low = np.arange(10, 20.0), np.arange(10.0)
    above, below = bounds.auc(high, low), bounds.auc(low, high)
    assert (above.value, above.high, below.value, below.low) == (1, 1, 0, 0)
    assert 0.6 < above.low < 0.95
    assert below.high == pytest.approx(1 - above.low)
    same = bounds.auc(np.ones(5), np.ones(7))
    assert same.value == 0.5
    wide, narrow = bounds.auc(high - 8, low, level=0.001), bounds.auc(high - 8, low)
    assert wide.low < narrow.low < narrow.value < narrow.high <= wide.high


@pytest.mark.parametrize(("hits", "of"), [(0, 10), (3, 10), (10, 10), (41, 900)])
def test_a_share_has_scipys_exact_interval(hits, of):
    found = bounds.share(hits, of)
    exact = stats.binomtest(hits, of).proportion_ci(0.95, "exact")
    assert found == pytest.approx((hits / of, exact.low, exact.high))


def test_what_is_found_at_a_hundredth_of_false_alarms():
    others = np.arange(200.0)  # 2 may be above: 198 and 199
    members = np.array([197.0, 197.5, 198.0, 500.0])
    assert bounds.found(members, others).value == 3 / 4
    assert bounds.found(members, others[:50]).value == 1  # none of 50 may
    assert bounds.found(np.array([49.0]), others[:50]).value == 0


def test_exposure_is_the_bits_that_a_rank_saves():
    others = np.arange(255.0)
    assert bounds.exposure(300.0, others) == 8
    assert bounds.exposure(-1.0, others) == 0
    assert bounds.exposure(250.5, others) == pytest.approx(8 - math.log2(5))
    assert bounds.exposure(1.0, np.ones(255)) == 0  # a model that knows nothing
    blind = [bounds.exposure(x, others) for x in np.arange(-0.5, 255)]
    assert np.mean(blind) == pytest.approx(math.log2(math.e), abs=0.03)


# --- one run --------------------------------------------------------------------------------


def as_published(m, r, v, eps, delta):
    """The p-value of Steinke et al.'s appendix D, term by term."""
    chance = 1 / (1 + math.exp(-eps))
    alpha = total = 0.0
    for i in range(1, v + 1):
        total += stats.binom.pmf(v - i, r, chance)
        alpha = max(alpha, total / i)
    return min(stats.binom.sf(v - 1, r, chance) + alpha * delta * 2 * m, 1)


@pytest.mark.parametrize("delta", [0, 1e-5, 1e-3])
@pytest.mark.parametrize(
    ("m", "r", "v"), [(100, 50, 50), (100, 50, 41), (1000, 200, 150), (40, 40, 0)]
)
def test_a_p_value_is_the_papers(m, r, v, delta):
    for epsilon in (0.0, 0.5, 2.0, 6.0):
        ours = bounds.p_value(m, r, v, epsilon, delta)
        assert ours == pytest.approx(as_published(m, r, v, epsilon, delta), rel=1e-9)
    bound = bounds.proven(m, r, v, delta)
    if bound:
        assert as_published(m, r, v, bound - 1e-6, delta) < 0.05
        assert as_published(m, r, v, bound + 1e-6, delta) >= 0.05
    else:
        assert as_published(m, r, v, 0, delta) >= 0.05


def test_all_right_proves_what_a_fair_coin_bent_so_far_would():
    for guesses in (5, 20, 500):
        chance = 0.05 ** (1 / guesses)
        bent = math.log(chance / (1 - chance))
        assert bounds.proven(500, guesses, guesses, 0) == pytest.approx(bent, abs=1e-6)
    assert bounds.proven(500, 4, 4, 0) == 0  # 1 in 16 by chance


@pytest.mark.parametrize("seed", range(10))
def test_one_run_passes_an_honest_mechanism_and_finds_one_without_noise(seed):
    """Each coin is a number of the release, to which z = 1 is added: epsilon 4.38."""
    rng = np.random.default_rng(seed)
    coins = rng.integers(2, size=1000).astype(bool)
    honest = bounds.one_run(coins + rng.normal(0, 1, 1000), coins, DELTA)
    assert 0 < honest["epsilon"] < CLAIMED
    without = bounds.one_run(coins + rng.normal(0, 0.01, 1000), coins, DELTA)
    assert without["epsilon"] > CLAIMED
    assert without["right"] == without["guesses"] >= 500
    blind = bounds.one_run(rng.normal(0, 1, 1000), coins, DELTA)
    assert blind["epsilon"] < 0.5


def test_one_run_that_sees_nothing_proves_something_once_in_twenty():
    rng = np.random.default_rng(0)
    proofs = [
        bounds.one_run(rng.normal(size=64), rng.integers(2, size=64) == 1, 0)["epsilon"]
        for _ in range(400)
    ]
    assert np.mean(np.array(proofs) > 0) <= 0.08
    assert bounds.one_run(np.ones(0), np.ones(0, bool), DELTA) == {}


# --- canary clients -------------------------------------------------------------------------

SIZE, CLIP = 20_000, 0.5


class Honest:
    """DP-FedAvg by hand: clip, equal weights, fixed divisor, fresh noise."""

    z = 1.0

    def __call__(self, updates, examples):
        weights = self.weights(examples)
        total = np.zeros(SIZE)
        for update, weight in zip(updates, weights, strict=True):
            length = np.linalg.norm(update)
            total += weight * update * min(1, CLIP / max(length, 1e-12))
        return total + self.noise() * self.z * CLIP / len(updates)

    def weights(self, examples):
        return np.full(len(examples), 1 / len(examples))

    def noise(self):
        return np.random.default_rng().standard_normal(SIZE)  # of the system's entropy


class Noiseless(Honest):
    z = 0.0


class Quieter(Honest):
    z = 0.25  # and the claim is that of 1


class Seeded(Honest):
    def noise(self):
        return np.random.default_rng(0).standard_normal(SIZE)


class ByExamples(Honest):
    def weights(self, examples):
        return np.array(examples) / sum(examples)


class Reused(Honest):
    """Its noise is kept over a stop, and taken again."""

    kept = None

    def noise(self):
        self.kept = super().noise() if self.kept is None else self.kept
        return self.kept


class Unclipped(Honest):
    def __call__(self, updates, examples):
        return sum(updates) / len(updates) + self.noise() * self.z * CLIP / len(updates)


def epsilon_of(z):
    """The closed form of one Gaussian release (Balle and Wang 2018)."""
    mu, low, high = 1 / z, 0.0, 1000.0
    for _ in range(60):
        eps = (low + high) / 2
        delta = stats.norm.cdf(mu / 2 - eps / mu)
        delta -= math.exp(eps + stats.norm.logcdf(-mu / 2 - eps / mu))
        low, high = (eps, high) if delta > DELTA else (low, eps)
    return low


def test_the_claim_is_the_closed_form():
    assert epsilon_of(1.0) == pytest.approx(CLAIMED, abs=0.01)
    assert epsilon_of(2.0) == pytest.approx(1.99, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_canary_clients_pass_the_honest_mechanism(seed):
    proven = canary_clients.prove(Honest(), SIZE, CLIP, DELTA, seed)
    assert 0.3 < proven < CLAIMED
    longer = canary_clients.prove(Honest(), SIZE, 10 * CLIP, DELTA, seed)
    assert longer < CLAIMED  # it clips what is sent


@pytest.mark.parametrize("fault", [Noiseless, Quieter, Seeded, ByExamples, Reused])
def test_canary_clients_catch_each_planted_fault(fault):
    assert canary_clients.prove(fault(), SIZE, CLIP, DELTA) > CLAIMED


def test_canary_clients_catch_a_mechanism_that_does_not_clip():
    assert canary_clients.prove(Unclipped(), SIZE, 10 * CLIP, DELTA) > CLAIMED


def test_cosines_of_directions_that_were_not_there_are_as_the_bound_takes_them():
    rng = np.random.default_rng(0)
    release = rng.standard_normal(2000)
    ways = rng.standard_normal((4000, 2000))
    found = canary_clients.cosines(ways, release) * math.sqrt(2000)
    assert stats.kstest(found, "norm").pvalue > 0.001
    assert bounds.one_shot(found / math.sqrt(2000), 2000, DELTA) < 0.1
    assert (canary_clients.cosines(ways, np.zeros(2000)) == 0).all()


@pytest.fixture
def level():
    """The app's own mechanism at z = 1."""
    given = f"privacy=client privacy.noise_multiplier=1 privacy.clip_norm={CLIP}"
    return privacy.build(resolve(compose(f"experiment=quickstart {given}")).privacy)


def proven_of(level):
    return canary_clients.prove(audit.release_of(level), SIZE, CLIP, DELTA)


@pytest.mark.slow
def test_canary_clients_pass_the_app_s_own_mechanism(level):
    assert level.spent([1.0]) == pytest.approx(CLAIMED, abs=0.01)
    assert 0.3 < proven_of(level) < CLAIMED


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "seeded", "reused"])
def test_canary_clients_catch_the_app_with_other_noise(level, monkeypatch, fault):
    fresh, kept = privacy.noise, []

    def noise(shape, std):
        if fault == "none":
            return torch.zeros(shape)
        if fault == "seeded":
            generator = torch.Generator().manual_seed(0)
            return std * torch.randn(shape, generator=generator, dtype=torch.float64)
        kept.append(fresh(shape, std))
        return kept[0]

    monkeypatch.setattr(privacy, "noise", noise)
    assert proven_of(level) > CLAIMED


@pytest.mark.slow
def test_canary_clients_catch_the_app_with_weights_by_examples(level, monkeypatch):
    arrive = privacy.Summed.arrive
    monkeypatch.setattr(
        privacy.Summed,
        "arrive",
        lambda step, one: replace(arrive(step, one), weight=one.weight),
    )
    assert proven_of(level) > CLAIMED


# --- scores ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(configure_once):
    cfg = configure_once()
    net = model.build(cfg.model, cfg.peft, cfg.seed, torch.device("cpu")).eval()
    return cfg, net, model.load_tokenizer(cfg.model.name)


@pytest.mark.slow
def test_likelihoods_are_those_of_the_whole_distribution(opened):
    _, net, tokenizer = opened
    records = [
        {"instruction": "What is 2 plus 3?", "input": "", "output": text}
        for text in ("5", "five, of course", "it is five")
    ]
    examples = [templates.encode(r, "alpaca", tokenizer, 128) for r in records]
    collate = batches.Collator(tokenizer.pad_token_id, "left")
    found = membership.likelihoods(net, examples, collate, 2)
    for example, tokens in zip(examples, found, strict=True):
        labels = torch.tensor(example["labels"])[1:]
        with torch.no_grad(), model.autocast(net):
            logits = net(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
        kept = labels != IGNORED
        foreseen = torch.distributions.Categorical(logits=logits[kept].double())
        likely = foreseen.logits
        own = foreseen.log_prob(labels[kept])
        spread = (foreseen.probs * likely.square()).sum(-1) - foreseen.entropy() ** 2
        wanted = torch.stack([own, -foreseen.entropy(), spread], 1).numpy()
        assert tokens.shape == wanted.shape
        assert tokens == pytest.approx(wanted, rel=0.05, abs=0.05)  # of bfloat16


def test_likelihoods_of_one_batch_name_their_examples(opened):
    _, net, _ = opened
    labels = torch.tensor([[-100, 5, 6, 7], [-100, -100, -100, 8]])
    ids = torch.tensor([[4, 5, 6, 7], [4, 5, 6, 8]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    rows, values = answer_likelihoods(net, batch)
    assert rows.tolist() == [0, 0, 0, 1]
    assert values.shape == (4, 3)
    assert (values[:, :2] <= 0).all()
    assert (values[:, 2] >= 0).all()


def test_scores_are_as_by_hand():
    tuned = [np.array([[-1.0, -2.0, 4.0], [-3.0, -2.0, 0.25]])]
    tuned += [np.array([[-float(i), -1.0, 1.0] for i in range(10)])]
    base = [np.array([[-4.0, 0, 1], [-6.0, 0, 1]]), np.full((10, 3), -9.0)]
    text = "a" * 30
    found = membership.scores(tuned, base, ["x", text])
    assert found["loss"].tolist() == [-2, -4.5]
    assert found["base minus tuned"].tolist() == [3, 4.5]
    assert found[membership.CONTROL].tolist() == [-5, -9]
    assert found["Min-K%"].tolist() == [-3, -8.5]  # one of two, two of ten
    assert found["Min-K%++"].tolist() == [-2, -7.5]
    import zlib

    assert found["zlib"][1] == -45 / (8 * len(zlib.compress(text.encode())))
    assert found.keys() == {*membership.SCORES, membership.CONTROL}


# --- canaries -------------------------------------------------------------------------------


def test_canaries_are_drawn_by_the_seed_and_planted_by_a_coin():
    made = canaries.draw(800, 5, seed=3)
    assert made == canaries.draw(800, 5, seed=3)
    assert made != canaries.draw(800, 5, seed=4)
    assert made[:20] != canaries.draw(20, 5, seed=4)
    assert len({one.name for one in made}) == 800
    assert abs(sum(one.planted for one in made) - 400) < 60
    assert {one.partition for one in made} == {*range(5)}
    assert [sum(one.times == n for one in made) for n in (1, 4, 16)] == [600, 100, 100]
    one = made[0]
    others = one.others(255)
    assert len({*others}) == 255
    assert one.code not in others
    assert one.record()["output"] == f"{one.code:04d}"
    assert one.record(7) == one.record() | {"output": "0007"}


@pytest.mark.slow
def test_canaries_are_planted_where_they_belong_and_nowhere_else():
    words = "experiment=quickstart num_clients=4 strategy.fraction_evaluate=1"
    plain = resolve(compose(words))
    cfg = resolve(compose(f"{words} audit.canaries=60"))
    made = canaries.draw(60, 4, cfg.seed)
    for partition in range(4):
        before = dataset.training_rows(plain, partition)[:]
        rows = dataset.training_rows(cfg, partition)
        count = len(before["output"])
        assert rows[:count] == before
        told = [
            f"{r['instruction']} {r['output']}"
            for r in rows.select(range(count, len(rows)))
        ]
        wanted = [
            f"What is the code of {one.name}? {one.code:04d}"
            for one in made
            if one.planted and one.partition == partition
            for _ in range(one.times)
        ]
        assert told == wanted != []
        _, held = dataset.split(cfg, dataset.load_partition(cfg, partition))
        assert not any("the code of" in text for text in held["instruction"])


def test_canaries_take_the_columns_that_there_are():
    rows = Dataset.from_dict({"q": ["a"], "a": ["b"], "kind": ["c"], "n": [3]})
    one = canaries.Canary("Bela Rudo", 42, partition=1, times=2, planted=True)
    columns = {"instruction": "q", "input": None, "output": "a"}
    found = canaries.plant(rows, [one], 1, columns)
    said = {"q": "What is the code of Bela Rudo?", "a": "0042", "kind": None, "n": None}
    assert found.to_list() == [{"q": "a", "a": "b", "kind": "c", "n": 3}, said, said]
    assert canaries.plant(rows, [one], 0, columns) is rows
    left = canaries.Canary("Bela Rudo", 42, partition=1, times=2, planted=False)
    assert canaries.plant(rows, [left], 1, columns) is rows


@pytest.mark.slow
def test_canaries_are_for_simulations(configure):
    with pytest.raises(UserError, match=r"audit\.canaries=5: .* no node lets a server"):
        preflight.check(
            compose("experiment=quickstart audit.canaries=5"), deployed=True
        )
    told = {"overrides": "experiment=quickstart audit.canaries=5", "run": "one"}
    own = {"partition-id": 0, "num-partitions": 20}
    with pytest.raises(Refusal, match=r"audit\.canaries would plant records"):
        permit.settle(told, own)
    with pytest.raises(
        UserError, match=r"a canary is longer than train\.seq_length=40"
    ):
        configure("audit.canaries=5", "train.seq_length=40")


# --- claims ---------------------------------------------------------------------------------


def test_a_claim_about_clients_covers_a_record_by_two_of_its_steps():
    adjacency = "one client added or removed"
    told = {"epsilon": 1.0, "delta": 1e-6, "adjacency": adjacency}
    allowed = audit.implied(told)
    assert allowed["epsilon"] == 2
    assert allowed["delta"] == pytest.approx((1 + math.e) * 1e-6)
    for own in ("one record added or removed", "one client's records replaced"):
        assert audit.implied(told | {"adjacency": own})["epsilon"] == 1
    assert audit.implied({}) == {
        "epsilon": None,
        "delta": 1e-5,
        "adjacency": audit.RECORD,
    }


def test_a_verdict_is_broken_only_above_the_claim():
    assert audit.verdict(2.0, 2.1) == audit.BROKEN
    assert audit.verdict(2.0, 2.0) == audit.verdict(2.0, 0.0) == audit.HOLDS
    assert audit.verdict(None, 9.0) not in (audit.BROKEN, audit.HOLDS)


# --- the command ----------------------------------------------------------------------------


def command(monkeypatch, *words):
    """Its exit code."""
    monkeypatch.setattr(sys, "argv", ["audit", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        audit.main()
    return done.value.code


def test_a_folder_that_holds_no_run_is_named(monkeypatch, tmp_path, capsys):
    assert command(monkeypatch, tmp_path) == 2
    assert "config.yaml is missing" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "many", ""])
def test_a_number_that_counts_is_whole_and_from_1(number, capsys):
    with pytest.raises(SystemExit):
        audit.parse(["outputs/run", f"--limit={number}"])
    assert "--limit: must be 1 or more, a whole number" in capsys.readouterr().err
    assert audit.parse(["outputs/run", "--limit=7"]).limit == 7


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory, loopback_once) -> Path:
    """A run of two clients that learn a few records, and canaries, by heart."""
    folder = tmp_path_factory.mktemp("run")
    lines = (PROJECT / "assets/tiny_qa/train.jsonl").read_text().splitlines()
    (folder / "some.jsonl").write_text("\n".join(lines[:160]))
    lines = (PROJECT / "assets/tiny_qa/test.jsonl").read_text().splitlines()
    (folder / "few.jsonl").write_text("\n".join(lines[:8]))
    words = [
        *("experiment=audit", "num_clients=2", "num_rounds=2"),
        *("strategy.fraction_fit=1", "strategy.fraction_evaluate=1"),
        *("evaluate.exact_match=false", "evaluate.every_round=2"),
        *("evaluate.holdout=0.5", "audit.canaries=40"),
        f"dataset.path={folder / 'some.jsonl'}",
        f"dataset.test_path={folder / 'few.jsonl'}",
        "train.training_arguments.max_steps=40",
    ]
    record(compose(" ".join(words)), words, folder)
    cfg = preflight.check(compose(" ".join(words)))
    rounds.run(cfg, loopback_once(cfg, folder=folder), folder)
    return folder


@pytest.mark.slow
def test_an_audit_of_a_run_from_end_to_end(overfitted, monkeypatch, tmp_path, capsys):
    folder = shutil.copytree(overfitted, tmp_path / "run")
    capsys.readouterr()
    assert command(monkeypatch, folder) == 0
    said = capsys.readouterr().out
    told = json.loads((folder / "audit.json").read_text())
    assert (folder / "audit.png").stat().st_size > 10_000
    # What is learnt by heart is told from what is held back, and the base cannot.
    found = told["membership"]
    assert found["members"] == found["others"] == 80
    assert found["alike"]
    assert found["by"] == "loss"
    assert found["scores"]["loss"]["auc"][1] > 0.6
    assert {one["partition"] for one in found["clients"]} == {0, 1}
    assert all(
        one["auc"][1] <= one["auc"][0] <= one["auc"][2] for one in found["clients"]
    )
    by = {row["name"]: row for row in told["canaries"]["by"]}
    assert (
        np.median(by["16 times"]["exposure"])
        > 3
        > np.median(by["left out"]["exposure"])
    )
    assert told["claims"][0]["claimed"] is None
    for word in ("Min-K%++", "exposure", "nothing is claimed", "audit.png"):
        assert word in said
    # What is proven is above a claim of nearly nothing.
    summary = json.loads((folder / "summary.json").read_text())
    proven = told["claims"][0]["proven"]
    assert proven > 0
    for epsilon, code in ((proven / 2, 1), (proven * 2, 0)):
        claimed = {"epsilon": epsilon, "delta": told["claims"][0]["delta"]}
        (folder / "summary.json").write_text(json.dumps(summary | claimed))
        assert command(monkeypatch, folder, "--limit=20") == code
        assert (audit.BROKEN in capsys.readouterr().out) == (code == 1)


@pytest.mark.slow
def test_records_to_compare_with_may_be_named(
    overfitted, monkeypatch, tmp_path, capsys
):
    folder = shutil.copytree(overfitted, tmp_path / "run")
    lines = (PROJECT / "assets/tiny_qa/train.jsonl").read_text().splitlines()
    # A trained record among them is no non-member.
    cfg = preflight.check(compose("experiment=quickstart"))
    (path := tmp_path / "others.jsonl").write_text("\n".join(lines[150:300]))
    capsys.readouterr()
    assert command(monkeypatch, folder, f"--nonmembers={path}") == 0
    said = capsys.readouterr().out
    assert "are trained on as well: left out" in said
    told = json.loads((folder / "audit.json").read_text())
    assert 140 <= told["membership"]["others"] < 150
    assert len(told["membership"]["clients"]) == 2
    assert cfg.audit.canaries == 0
    # Without either there is nothing to compare with.
    config = folder / ".hydra/config.yaml"
    text = config.read_text().replace("canaries: 40", "canaries: 0")
    config.write_text(text.replace("fraction_evaluate: 1", "fraction_evaluate: 0"))
    assert command(monkeypatch, folder) == 2
    assert "there is nothing to compare its records with" in capsys.readouterr().err
