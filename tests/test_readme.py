"""pytest tests/test_readme.py: the README's commands fit conf/ and the scripts."""

import re
import shlex

import pytest

import utils

README = (utils.PROJECT / "README.md").read_text()
RUNS = [
    (line or quoted).removeprefix("python main.py")
    for line, quoted in re.findall(
        r"^(python main\.py.*)$|`(python main\.py[^`]*)`", README, re.MULTILINE
    )
]


@pytest.mark.parametrize("arguments", RUNS)
def test_each_run_composes(arguments):
    words = [word for word in shlex.split(arguments) if word != "--multirun"]
    if "--multirun" in arguments:  # the first value of each sweep
        words = [word.split(",")[0] for word in words]
    cfg = utils.compose(" ".join(map(shlex.quote, words)))
    assert cfg.num_rounds >= 1


def test_the_seed_commands_stand_in_it():
    assert len(RUNS) >= 10
    for command in (
        'python main.py model.name="openlm-research/open_llama_3b_v2" model.quantization=8',
        "python main.py num_rounds=50 strategy.fraction_fit=0.25",
        'python test.py --peft-path=/path/to/peft_100 --question="What is the ideal 1-day '
        'plan in London?"',
    ):
        assert command in README


def test_every_script_and_file_that_it_names_exists():
    for name in re.findall(r"python ((?:benchmarks/)?\w+\.py)", README):
        assert (utils.PROJECT / name).is_file()
    for name in re.findall(r"^    (\w+(?:\.py|/)) ", README, re.MULTILINE):
        assert (utils.PROJECT / name).exists()
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (utils.PROJECT / picture).is_file()
