"""pytest tests/test_heterogeneity.py: the figures by hand, the plan's rows, the picture."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from transformers import LlamaConfig

import model
import utils
from records import templates
from settings import heterogeneity, plan
from settings.heterogeneity import describe, gini, mix_distance, plot


@pytest.fixture
def write(tmp_path):
    """Make a file of records out of sizes by label; the longer label answers longer."""

    def make(sizes: dict[str, int]) -> str:
        rows = [
            {"instruction": f"Say {i}.", "output": "yes " * len(label), "label": label}
            for label, size in sizes.items()
            for i in range(size)
        ]
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"dataset=local dataset.path={file} dataset.columns.input=null"

    return make


def test_gini_by_hand():
    assert gini(np.array([5, 5, 5])) == 0
    # Mean absolute difference of 1 and 3: (0 + 2 + 2 + 0) / 4 = 1; over twice the mean, 4.
    assert gini(np.array([3, 1])) == pytest.approx(1 / 4)
    assert gini(np.array([0, 0, 0, 8])) == pytest.approx(3 / 4)


def test_mix_distance_by_hand():
    assert mix_distance(np.array([[2, 2], [5, 5]])) == 0
    # The whole is half and half; each client is half a step away from it.
    assert mix_distance(np.array([[4, 0], [0, 4]])) == pytest.approx(1 / 2)
    # The whole is (1/4, 3/4): distances 3/4 and 1/4.
    assert mix_distance(np.array([[4, 0], [0, 12]])) == pytest.approx(1 / 2)
    apart = mix_distance(np.eye(100))
    assert apart == pytest.approx(0.99)


def test_dealing_anew_keeps_sizes_and_categories():
    counts = np.array([[40, 0, 0], [0, 30, 0], [0, 0, 50]])
    dealt = heterogeneity.deal_anew(counts, 0)
    assert (dealt.sum(axis=0) == counts.sum(axis=0)).all()
    assert (dealt.sum(axis=1) == counts.sum(axis=1)).all()
    assert mix_distance(dealt) < 0.2 < mix_distance(counts)


@pytest.mark.slow
def test_a_description_by_hand(configure, write):
    cfg = configure(
        write({"a": 4, "bbb": 12}),
        "partitioner=natural dataset.label=label num_clients=2",
    )
    found = describe(cfg)
    assert json.loads(json.dumps(found)) == found
    assert found["category"] == "label"
    assert found["sampled"] == 200
    small, large = sorted(found["clients"], key=lambda client: client["records"])
    assert (small["records"], small["categories"]) == (4, {"a": 4})
    assert (large["records"], large["categories"]) == (12, {"bbb": 12})
    tokenizer = model.load_tokenizer(cfg["model"]["name"])
    for client, answer in ((small, "yes "), (large, "yes yes yes ")):
        lengths = []
        for number in range(client["records"]):
            asked = {"instruction": f"Say {number}.", "input": "", "output": answer}
            example = templates.encode(asked, "alpaca", tokenizer, 512)
            lengths.append(len(example["input_ids"]))
        assert client["tokens"] == np.percentile(lengths, (10, 50, 90)).tolist()
    summary = found["summary"]
    assert summary["records"] == [4, 8.0, 12]
    assert summary["gini"] == pytest.approx((8 + 8) / 4 / (2 * 8))
    assert summary["mix_distance"] == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert 0 <= summary["mix_by_chance"] < summary["mix_distance"]
    assert summary["median_tokens"] == [small["tokens"][1], large["tokens"][1]]
    assert summary["p90_tokens"] == [small["tokens"][2], large["tokens"][2]]


@pytest.mark.slow
def test_lengths_are_those_before_the_cut(configure, write):
    sizes = write({"a": 9})
    lengths = [
        describe(configure(sizes, f"train.seq_length={length}"))["clients"]
        for length in (8, 512)
    ]
    assert lengths[0] == lengths[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "partitioner", ["dirichlet", "clusters partitioner.num_clusters=8"]
)
def test_a_small_alpha_is_more_unequal_than_a_large_one(partitioner, configure):
    few, many = (
        describe(
            configure(
                f"partitioner={partitioner} partitioner.alpha={alpha}",
                "partitioner.min_partition_size=2 num_clients=6",
            )
        )["summary"]
        for alpha in (0.1, 1000)
    )
    assert few["mix_distance"] > many["mix_distance"] + 0.2
    assert few["gini"] > many["gini"] + 0.1
    assert few["mix_distance"] > few["mix_by_chance"] + 0.2
    assert many["mix_distance"] < many["mix_by_chance"] + 0.05


@pytest.mark.slow
def test_clusters_are_the_categories_even_where_there_is_a_label(configure):
    assert describe(configure("partitioner=clusters"))["category"] == "cluster"
    assert describe(configure("partitioner=size"))["category"] == "category"


def rows_of(cfg: dict, folder: Path) -> dict[str, str]:
    lines = plan.show(cfg, folder).splitlines()
    return {label: value.strip() for label, value in (x.split("  ", 1) for x in lines)}


@pytest.mark.slow
def test_the_plan_tells_and_draws(configure, write, tmp_path):
    cfg = configure(
        write({"a": 4, "b": 12}),
        "partitioner=natural dataset.label=label num_clients=2",
    )
    rows = rows_of(cfg, tmp_path)
    assert rows["clients' records"] == (
        "4 to 12, median 8, Gini 0.25 (0: equal, 1: apart)"
    )
    assert rows["category mix"].startswith(
        "0.50 from the pooled mix by label (0: equal"
    )
    assert "in a client's median" in rows["tokens an example"]
    assert (tmp_path / "clients.png").is_file()


@pytest.mark.slow
def test_without_a_label_or_a_tokenizer_the_rest_is_told(configure, write, tmp_path):
    cfg = configure(write({"a": 9}), "num_clients=3")
    LlamaConfig(hidden_size=64, num_attention_heads=4).save_pretrained(tmp_path)
    cfg["model"]["name"] = str(tmp_path)
    rows = rows_of(cfg, tmp_path)
    assert rows["clients' records"].startswith("3 to 3")
    assert rows["category mix"].startswith("not known: dataset.label names no column")
    assert rows["tokens an example"] == f"not known: no tokenizer in {tmp_path}"
    assert (tmp_path / "clients.png").is_file()


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ("dataset.path=/nowhere.jsonl", "there is no such file"),
        ("num_clients=5000", "num_clients=5000 is more than"),
    ],
)
def test_data_that_a_run_would_refuse_has_no_plan(overrides, why, configure):
    with pytest.raises(utils.UserError, match=why):
        configure(f"dry_run=true {overrides}")


@pytest.mark.slow
def test_data_that_is_not_here_leaves_the_plan(configure, tmp_path):
    rows = rows_of(configure("dry_run=true dataset=dolly"), tmp_path)
    assert rows["clients"].startswith("not shown: ")
    why = "databricks/databricks-dolly-15k has not been downloaded"
    assert why in rows["clients"]
    assert "memory a client" in rows
    assert not (tmp_path / "clients.png").exists()


def test_a_dataset_in_the_cache_is_here(monkeypatch, tmp_path):
    monkeypatch.setattr(heterogeneity.datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert not heterogeneity._is_here("lucas/CodeAlpaca-20k")
    (tmp_path / "lucas___code_alpaca-20k").mkdir()
    assert heterogeneity._is_here("lucas/CodeAlpaca-20k")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clients", "categories"), [(1, 1), (5, 1), (20, 30), (100, 5)]
)
def test_a_picture_of_any_number_of_clients(clients, categories, tmp_path):
    draw = np.random.default_rng(0)
    data = {
        "category": "topic",
        "clients": [
            {
                "records": int(counts.sum()),
                "categories": {str(i): int(n) for i, n in enumerate(counts) if n},
                "tokens": [10.0, 20.0, 40.0] if counts.sum() % 7 else None,
            }
            for counts in draw.integers(0, 9, (clients, categories)) + 1
        ],
        "summary": {"median_tokens": [20.0, 20.0]},
    }
    plot(data, tmp_path / "clients.png")
    picture = image.imread(tmp_path / "clients.png")
    assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 10


@pytest.mark.slow
def test_a_dry_run_leaves_the_picture_in_its_folder(tmp_path):
    command = "main.py experiment=quickstart dry_run=true partitioner=clusters"
    done = subprocess.run(
        [sys.executable, *command.split(), f"hydra.run.dir={tmp_path}"],
        cwd=utils.PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "from the pooled mix by cluster" in done.stdout
    assert (tmp_path / "clients.png").is_file()
