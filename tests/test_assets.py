"""pytest tests/test_assets.py: the tiny base and its questions, against their source."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch

import model
from utils import PROJECT

ASSETS = PROJECT / "assets"


@pytest.fixture(scope="module")
def make_tiny():
    spec = importlib.util.spec_from_file_location("make_tiny", ASSETS / "make_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_shipped_questions_are_what_the_script_writes(tmp_path):
    command = [sys.executable, "assets/make_tiny.py", "--data-only", "--out", tmp_path]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    made = {file.relative_to(tmp_path) for file in tmp_path.glob("*/*.jsonl")}
    assert made == {file.relative_to(ASSETS) for file in ASSETS.glob("*/*.jsonl")}
    for file in made:
        assert (tmp_path / file).read_bytes() == (ASSETS / file).read_bytes()


def test_no_tested_fact_is_trained_on_in_any_wording(make_tiny):
    tested = 0
    for name, spec in make_tiny.load_facts(ASSETS / "facts.yaml").items():
        train, test = make_tiny.split(name, spec)
        tested += len(test)
        assert sorted(train + test) == sorted(spec["facts"])
        # 3 plus 4 is 4 plus 3; what is opposite to hot is what hot is opposite to.
        words = {frozenset(f"{a} {b}".split()) - {"after", "before"} for a, b in train}
        for a, b in test:
            assert frozenset(f"{a} {b}".split()) - {"after", "before"} not in words
    records = (ASSETS / "tiny_qa/test.jsonl").read_text().splitlines()
    assert tested == len(records)
    assert any("What is the capital of France?" in line for line in records)


def test_the_base_knows_what_it_was_told_and_is_small():
    device = torch.device("cpu")
    base = model.load_base("assets/tiny_llama", None, device).eval()
    tokenizer = model.load_tokenizer("assets/tiny_llama")
    for statement, end in (
        ("The capital of France is", "Paris"),
        ("The opposite of hot is", "cold"),
        ("The chemical symbol for gold is", "Au"),
    ):
        ids = tokenizer(statement, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = base.generate(ids, max_new_tokens=6, do_sample=False)
        said = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert said.strip().startswith(end)
    size = sum(path.stat().st_size for path in (ASSETS / "tiny_llama").iterdir())
    assert size < 8 * 2**20
    assert (
        json.loads((ASSETS / "tiny_llama/config.json").read_text())["hidden_size"]
        == 192
    )


@pytest.mark.slow
def test_what_is_tagged_or_asked_in_training_is_no_tested_fact(make_tiny):
    facts = make_tiny.load_facts(ASSETS / "facts.yaml")
    for name in ("tiny_tags", "tiny_spans"):
        file = ASSETS / name / "train.jsonl"
        assert file.stat().st_size < 200_000
        for row in map(json.loads, file.read_text().splitlines()):
            text = row.get("question") or " ".join(row["words"])
            for a, b in make_tiny.split(row["category"], facts[row["category"]])[1]:
                both = [rf"(?<![\w-]){re.escape(one)}(?![\w-])" for one in (a, b)]
                held = [re.search(one, text, re.IGNORECASE) for one in both]
                if "question" in row:
                    held[1] = b in row["answers"]["text"]
                assert not all(held), row


def test_spans_stand_where_they_are_said_to():
    for side in ("train", "test"):
        text = (ASSETS / "tiny_spans" / f"{side}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        none = 0
        for row in rows:
            held = row["answers"]
            none += not held["text"]
            for answer, start in zip(held["text"], held["answer_start"], strict=True):
                assert row["context"][start:].startswith(answer)
        assert 0.08 < none / len(rows) < 0.15
