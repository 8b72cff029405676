"""pytest tests/test_clusters.py: text grouped by topic and dealt out, once for all processes."""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk

import dataset
import utils
from records.clusters import ClusterPartitioner, cluster

TOPICS = {
    "kitchen": "flour butter oven recipe salt dough bake pan spoon sugar",
    "space": "planet orbit rocket moon star comet galaxy telescope crater eclipse",
    "law": "court judge lawyer verdict trial jury appeal statute witness plea",
    "music": "violin chord melody rhythm choir tempo sonata drum opera flute",
}
SETTINGS = {
    "num_partitions": 8,
    "columns": {"instruction": "ask", "input": None, "output": "reply"},
    "num_clusters": 4,
    "alpha": 0.3,
    "min_partition_size": 1,
    "seed": 0,
}


def sentence(words: str, draw: random.Random) -> str:
    chosen = draw.choices(words.split(), k=8)
    return f"Tell me about the {' and the '.join(chosen)}, if you can."


def records() -> list[dict[str, str]]:
    """400 records without a label, but for the tests: 100 of each topic."""
    draw = random.Random(0)
    return [
        {
            "ask": sentence(words, draw),
            "reply": sentence(words, draw),
            "topic": topic,
            "id": f"{topic} {number}",
        }
        for number in range(100)
        for topic, words in TOPICS.items()
    ]


def deal(rows: Dataset, **changed) -> ClusterPartitioner:
    made = ClusterPartitioner(**SETTINGS | changed)
    made.dataset = rows
    return made


def parts(partitioner: ClusterPartitioner) -> list[list[dict]]:
    clients = range(partitioner.num_partitions)
    return [list(partitioner.load_partition(client)) for client in clients]


def test_texts_of_one_topic_are_one_cluster():
    rows = [row for part in parts(deal(Dataset.from_list(records()))) for row in part]
    found = {topic: Counter() for topic in TOPICS}
    for row in rows:
        found[row["topic"]][row["cluster"]] += 1
    commonest = [counts.most_common(1)[0] for counts in found.values()]
    assert len({name for name, _ in commonest}) == 4
    assert sum(count for _, count in commonest) >= 0.98 * len(rows)  # purity
    for topic, (name, _) in zip(found, commonest, strict=True):
        assert set(name.split(": ")[1].split()) <= set(TOPICS[topic].split())


def test_partitions_are_disjoint_complete_and_decided_by_the_seed():
    rows = Dataset.from_list(records())
    dealt = parts(deal(rows))
    assert len(dealt) == 8
    ids = sorted(row["id"] for part in dealt for row in part)
    assert ids == sorted(row["id"] for row in rows)
    assert parts(deal(rows)) == dealt
    assert parts(deal(rows, seed=1)) != dealt


# Deals what is in each folder, and says whether it had to cluster for that.
ELSEWHERE = """
import json, sys
from datasets import load_from_disk
from records.clusters import ClusterPartitioner

said = []
for folder in sys.argv[2:]:
    made = ClusterPartitioner(**json.loads(sys.argv[1]))
    made.dataset = load_from_disk(folder)
    dealt = [made.load_partition(i)["id"][:] for i in range(made.num_partitions)]
    said.append([dealt, "sklearn" in sys.modules])
print(json.dumps(said))
"""


@pytest.mark.slow
def test_other_processes_deal_alike_and_cluster_only_where_none_has(tmp_path):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    Dataset.from_list(records()).save_to_disk(here)
    shutil.copytree(here, elsewhere)
    dealt = [[row["id"] for row in part] for part in parts(deal(load_from_disk(here)))]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(SETTINGS), here, elsewhere],
        cwd=utils.PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[dealt, False], [dealt, True]]


def test_a_column_may_hold_anything_or_nothing():
    names = cluster(["oven", None, 7], ["salt", "moon", "x"], num_clusters=1, seed=0)
    assert len(names["cluster"]) == 3
    assert len(set(names["cluster"])) == 1


def test_a_name_tells_a_cluster_from_the_others():
    draw = random.Random(0)
    # The instruction is the same in all records, and each word of a topic has three forms.
    ask = "Answer this medical question truthfully, please"
    rows = [
        " ".join(
            draw.choice(word) + end
            for word in [words.split()]
            for end in ("", "s", "ed")
        )
        for words in TOPICS.values()
        for _ in range(50)
    ]
    found = cluster([ask] * len(rows), rows, num_clusters=4, seed=0)["cluster"]
    assert len(set(found)) == 4
    for name in set(found):
        number, *words = name.replace(":", "").split()
        assert number.isdigit()
        assert not set(words) & set(ask.lower().replace(",", "").split())
        assert len({word[:4] for word in words}) == len(words) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("partitioner.num_clusters=500", "cannot divide .* n_clusters=500"),
        ("partitioner.alpha=0", "refuses its settings: .*greater than zero"),
        (
            "partitioner._target_=records.clusters.Dataset",
            "not a class of flwr_datasets",
        ),
        (
            "partitioner._target_=records.clusters.files.text",
            "not a class of flwr_datasets",
        ),
    ],
)
def test_what_cannot_be_is_answered(override, message, local):
    with pytest.raises(utils.UserError, match=message):
        local(override)


@pytest.mark.slow
def test_a_run_deals_by_clusters(local):
    cfg = local("partitioner.num_clusters=4")
    rows = [dataset.load_partition(cfg, client) for client in range(4)]
    assert sum(map(len, rows)) == 400
    assert "cluster" in rows[0].column_names


@pytest.fixture
def local(configure, tmp_path: Path):
    """Configure a run on the records in a file, dealt out by clusters."""
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in records()))

    def make(*overrides: str):
        return configure(
            f"dataset=local dataset.path={file} dataset.columns.instruction=ask",
            "dataset.columns.input=null dataset.columns.output=reply",
            "partitioner=clusters",
            *overrides,
        )

    return make
