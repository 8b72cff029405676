"""pytest tests/test_assets.py: the tiny base and its questions, against their source."""

import importlib.util
import json
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
    made = sorted(tmp_path.glob("*/*.jsonl"))
    assert len(made) == 6
    for file in made:
        shipped = ASSETS / file.relative_to(tmp_path)
        assert file.read_bytes() == shipped.read_bytes()


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
