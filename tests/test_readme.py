"""pytest tests/test_readme.py: the commands and links of README.md and docs/ hold."""

import importlib
import operator
import os
import re
import shlex
import subprocess
import sys

import pytest
from flwr.common.config import parse_config_args
from hydra.core.override_parser.types import Override

import test as ask
import utils
from evaluation import audit, benchmarks
from methods import emulator
from node import permit, processes
from reporting import export, report
from settings.compose import compose, parse

PAGES = [utils.PROJECT / "README.md", *sorted(utils.PROJECT.glob("docs/*.md"))]
BLANKS = {"<date>": "2026-11-20", "<time>": "12-00-00", "<head>": "10.0.0.7"}
TEXT = "\n".join(page.read_text() for page in PAGES)
for _blank, _value in BLANKS.items():
    TEXT = TEXT.replace(_blank, _value)
# What the tests below look at, and what is not ours to try.
SCRIPTS = {
    *("python main.py", "python test.py", "python benchmarks/", "deploy/certs/make.sh"),
    *("python -m reporting.export", "python -m reporting.report"),
    *("python -m evaluation.audit", "python -m methods.emulator"),
    "python -m node.processes",
    *("flwr run", "flower-supernode"),
}
OTHERS = {
    *("docker compose", "export", "flower-superlink", "flwr supernode", "hf upload"),
    *("python3 -m venv", "ray start", "sudo chown"),
}
# What a run or a command makes, and what a reader is to make.
MADE = (
    "outputs/",
    "multirun/",
    "conf/experiment/mine.yaml",
    "llama.cpp/",
    "bytes/",
    "deploy/certs/",
)


def commands(name: str) -> list[str]:
    """Every command of that name, each once: a line of its own, or in backticks."""
    found = re.findall(rf"^({name}\b.*)$|`({name}\b[^`]*)`", TEXT, re.MULTILINE)
    return list(dict.fromkeys(line or quoted for line, quoted in found))


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def first(given: Override) -> str:
    """An override itself; of a sweep, the one with its first value."""
    if not given.is_sweep_override():
        return given.input_line
    if given.is_interval_sweep():
        return f"{given.get_key_element()}={given.value().start}"
    return f"{given.get_key_element()}={next(given.sweep_string_iterator())}"


@pytest.mark.parametrize("command", commands(r"python main\.py"))
def test_each_run_composes(command):
    given = [word for word in words(command)[2:] if word not in ("--cfg", "job")]
    parsed = [parse(word) for word in given if word != "--multirun"]
    cfg = compose(shlex.join(map(first, parsed)))
    assert cfg.num_rounds >= 1


@pytest.mark.parametrize("command", commands(r"python test\.py"))
def test_each_question_and_benchmark_is_parsed(command):
    given = words(command)[2:]
    door = benchmarks if any(word.startswith("--tasks") for word in given) else ask
    assert door.parse(given).peft_path


@pytest.mark.parametrize("command", commands("python -m reporting.export"))
def test_each_export_is_parsed(command):
    assert export.parse(words(command)[3:]).peft_path


@pytest.mark.parametrize("command", commands(r"python -m evaluation\.audit"))
def test_each_audit_is_parsed(command):
    assert audit.parse(words(command)[3:]).run


@pytest.mark.parametrize("command", commands(r"python -m methods\.emulator"))
def test_each_emulator_is_parsed(command):
    assert emulator.parse(words(command)[3:]).out


@pytest.mark.parametrize("command", commands(r"python -m node\.processes [0-9.]+"))
def test_each_part_of_a_team_is_parsed(command):
    assert processes.parse(words(command)[3:]).host >= 1


def test_each_report_is_parsed(monkeypatch, capsys):
    monkeypatch.setattr(report, "write", lambda folder: folder)
    for command in commands("python -m reporting.report"):
        monkeypatch.setattr(sys, "argv", words(command)[2:])
        report.main()
    assert "2026-11-20/12-00-00/report.html" in capsys.readouterr().out


def test_each_federated_run_composes_and_no_node_would_refuse_it():
    runs = [words(line) for line in commands("flwr run") if "--run-config" in line]
    assert len(runs) >= 4
    for run in runs:
        given = parse_config_args([run[run.index("--run-config") + 1]])
        assert given.keys() == {"overrides"}
        permit.compose(permit.parse(given["overrides"]))


def test_each_nodes_settings_are_known():
    nodes = [words(line) for line in commands("flower-supernode") if " --" in line]
    assert len(nodes) >= 4
    for node in nodes:
        if "--node-config" in node:
            given = parse_config_args([node[node.index("--node-config") + 1]])
            paths = {key: "." for key in given if key.endswith("-path")}
            permit.check_settings(given | paths)


def test_each_certificate_is_one_that_make_sh_makes():
    script = utils.PROJECT / "deploy/certs/make.sh"
    assert os.access(script, os.X_OK)
    made = re.findall(r"deploy/certs/make\.sh (\w+) \S+", TEXT)
    assert set(made) == {"server", "node"}
    assert len(made) >= 4


PARSE = """
import argparse, runpy, shlex, sys

class Parsed(Exception):
    pass

def parse(parser, *_):
    before(parser)
    raise Parsed

before, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, parse
for line in sys.stdin:
    sys.argv = shlex.split(line, comments=True)[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except Parsed:
        print(sys.argv[0])
"""


@pytest.mark.slow
def test_each_benchmark_takes_its_options():
    asked = commands(r"python benchmarks/\w+\.py")
    assert {words(line)[1] for line in asked} == {
        f"benchmarks/{path.name}" for path in utils.PROJECT.glob("benchmarks/*.py")
    }
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input="\n".join(asked),
        cwd=utils.PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [words(line)[1] for line in asked], done.stderr


def test_no_command_is_left_out():
    blocks = re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    assert len(lines) > 50
    known = (*SCRIPTS, *OTHERS)
    assert [line for line in lines if not line.startswith(known)] == []


def test_the_seed_commands_stand_in_it():
    readme = PAGES[0].read_text()
    assert len(commands(r"python main\.py")) >= 10
    for command in (
        'python main.py model.name="openlm-research/open_llama_3b_v2" model.quantization=8',
        "python main.py num_rounds=50 strategy.fraction_fit=0.25",
        'python test.py --peft-path=/path/to/peft_100 --question="What is the ideal 1-day '
        'plan in London?"',
    ):
        assert command in readme.splitlines()


# --- links and files ---------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.is_relative_to(utils.PROJECT), link
        assert there.is_file(), link
        headings = re.findall(r"^#+ (.*)$", there.read_text(), re.M) if anchor else []
        slugs = [
            re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings
        ]
        assert not anchor or anchor in slugs, link


def test_each_file_that_a_page_names_exists():
    kinds = r"py|ya?ml|sh|txt|toml|md|jsonl?|png"
    for name in re.findall(rf"[\s`]((?:[\w-]+/)+[\w.-]+\.(?:{kinds}))\b", TEXT):
        assert name.startswith(MADE) or (utils.PROJECT / name).is_file(), name
    for name in re.findall(r"^    (\w+(?:\.py|\.md|\.txt|/)) ", TEXT, re.MULTILINE):
        assert (utils.PROJECT / name).exists(), name


def test_each_name_of_ours_is_in_its_module():
    for name in re.findall(r"`(\w+)\.(\w+)\.([\w.]+)`", TEXT):
        room, module, inside = name
        if (utils.PROJECT / room / f"{module}.py").is_file():
            operator.attrgetter(inside)(importlib.import_module(f"{room}.{module}"))


def test_the_readme_is_a_front_page_that_names_every_other():
    readme = PAGES[0].read_text()
    assert len(readme.splitlines()) <= 170
    for page in PAGES[1:]:
        assert f"docs/{page.name})" in readme
