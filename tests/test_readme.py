"""pytest tests/test_readme.py: the README's commands fit conf/ and the scripts."""

import re
import shlex

import pytest
from flwr.common.config import parse_config_args

import utils
from node import permit
from settings.compose import compose

README = (utils.PROJECT / "README.md").read_text()
for _blank, _value in {
    "<date>": "2026-11-20",
    "<time>": "12-00-00",
    "<head>": "10.0.0.7",
}.items():
    README = README.replace(_blank, _value)
RUNS = [
    (line or quoted).removeprefix("python main.py")
    for line, quoted in re.findall(
        r"^(python main\.py.*)$|`(python main\.py[^`]*)`", README, re.MULTILINE
    )
]


@pytest.mark.parametrize("arguments", RUNS)
def test_each_run_composes(arguments):
    words = [
        word for word in shlex.split(arguments, comments=True) if word != "--multirun"
    ]
    if "--multirun" in arguments:  # the first value of each sweep
        words = [word.split(",")[0] for word in words]
    cfg = compose(" ".join(map(shlex.quote, words)))
    assert cfg.num_rounds >= 1


def commands(name: str) -> list[list[str]]:
    """Every command of that name in the README, as words."""
    lines = re.findall(rf"^({name} .*)$", README, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_each_federated_run_composes_and_no_node_would_refuse_it():
    runs = [words for words in commands("flwr") if words[1] == "run"]
    assert len(runs) >= 3
    for words in runs:
        given = parse_config_args([words[words.index("--run-config") + 1]])
        assert given.keys() == {"overrides"}
        permit.compose(permit.parse(given["overrides"]))


def test_each_nodes_settings_are_known():
    nodes = commands("flower-supernode")
    assert len(nodes) >= 4
    for words in nodes:
        given = parse_config_args([words[words.index("--node-config") + 1]])
        paths = {key: "." for key in given if key.endswith("-path")}
        permit.check_settings(given | paths)


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
