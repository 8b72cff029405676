"""pytest tests/test_house.py: what lies at the root, and which room imports which."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils import PROJECT

DOORS = {"main", "app", "test"}
PATH = {"client", "model", "dataset", "utils"}
WINGS = {
    *("settings", "server", "methods", "node"),
    *("records", "compute", "tasks", "evaluation", "reporting"),
}
ROOMS = DOORS | PATH | WINGS
# docs/design.md's table: what a room may import of ours beside itself, by the longest prefix.
MAY = {
    "main": ROOMS - {"reporting", "test"},
    "app": ROOMS - {"reporting", "main", "test"},
    "test": {"model", "dataset", "evaluation", "records", "tasks", "utils"},
    "settings": ROOMS - DOORS,  # it looks before they run
    "server": {
        *("methods", "evaluation.examine", "model", "dataset", "reporting.figures"),
        *("tasks", "utils"),
    },
    "node": {
        *("settings.schema", "settings.compose", "client", "methods", "model"),
        *("dataset", "tasks", "utils"),
    },
    "node.resident": {"app"},  # which it imports in the trainer
    "client": {
        *("model", "dataset", "methods", "records", "compute", "evaluation.examine"),
        *("tasks", "utils"),
    },
    "model": {
        *("methods.base", "methods.emulator", "methods.wire", "records", "compute"),
        "utils",
    },
    "dataset": {"records", "tasks", "utils"},
    "methods": {"utils"},
    "records": {"utils"},
    "compute": {"utils"},
    "tasks": {"records", "compute", "utils"},
    "evaluation": {"model", "dataset", "records", "compute", "tasks", "utils"},
    # It tries the run's own level of privacy, and draws what it finds as a run's figures are.
    "evaluation.audit": {
        *("methods", "model", "dataset", "records", "compute", "reporting.figures"),
        "utils",
    },
    "reporting": {"server.runs", "utils"},
    # They read, merge and describe an adapter, its tokenizer and its prompt.
    "reporting.export": {"server.runs", "model", "records", "utils"},
    "reporting.card": {"server.runs", "model", "records", "utils"},
    "utils": set(),
}


def sources() -> list[Path]:
    """Our Python files, tests and what is no part of the app left out."""
    return [
        *PROJECT.glob("*.py"),
        *(f for w in WINGS for f in PROJECT.glob(f"{w}/**/*.py")),
    ]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts)


def imports(source: str) -> Iterator[str]:
    """Every module of ours that a source imports, inside of functions as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ROOMS)


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def wrong(module: str, source: str) -> set[tuple[str, str]]:
    """The imports of a module that the table does not allow, as (module, imported)."""
    room = max((room for room in MAY if within(module, {room})), key=len)
    allowed = MAY[room] | {module.split(".")[0]}
    found = {name for name in imports(source) if not within(name, allowed)}
    parts = (".".join(name.split(".")[:2]) for name in found)
    return {
        (module, part if part.split(".")[0] in WINGS else part.split(".")[0])
        for part in parts
    }


def test_every_import_is_in_the_table():
    found = {
        pair for path in sources() for pair in wrong(name_of(path), path.read_text())
    }
    assert found == set()


@pytest.mark.parametrize(
    ("module", "source", "imported"),
    [
        ("client", "from server.rounds import Server", "server.rounds"),
        ("client", "import evaluation.harness", "evaluation.harness"),
        ("methods.wire", "def f():\n    import model\n", "model"),
        ("node.permit", "def f():\n    from server import runs\n", "server.runs"),
        ("server.rounds", "from settings.preflight import check", "settings.preflight"),
        ("server.rounds", "from reporting import report", "reporting.report"),
        ("evaluation.examine", "from reporting import figures", "reporting.figures"),
        ("reporting.report", "if True:\n    import model", "model"),
        ("records.files", "from compute import loss", "compute.loss"),
        ("utils", "import dataset", "dataset"),
        ("main", "import reporting.report", "reporting.report"),
    ],
)
def test_a_wrong_import_is_found(module, source, imported):
    assert wrong(module, source) == {(module, imported)}


def test_benchmarks_and_tests_do_not_import_each_other():
    """What both need is in `assets/testbed`; a benchmark is run as a command."""
    for folder in ("tests", "benchmarks", "assets"):
        for path in PROJECT.glob(f"{folder}/**/*.py"):
            for line in path.read_text().splitlines():
                assert not re.match(r"\s*(from|import) (tests|benchmarks)\b", line), (
                    line
                )


def test_the_table_is_the_one_in_the_docs():
    page = (PROJECT / "docs/design.md").read_text()
    table = page[page.index("| room | may import") :].split("\n\n")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines()[2:]]
    named = {name: row for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert named.keys() == ROOMS
    for room, (_, may, _) in named.items():
        if not may.strip().startswith("all"):
            told = set(re.findall(r"[a-z][\w.]*", may.split(";")[0])) - {
                "none",
                "of",
                "ours",
            }
            assert told == MAY[room], room


# --- the root, and what a site loads -----------------------------------------------------------


def test_the_root_holds_the_main_path_and_the_wings():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    files = listed.stdout.splitlines() or pytest.skip("no git checkout")
    top = {file.split("/")[0] for file in files if (PROJECT / file).exists()}
    python = {f"{name}.py" for name in DOORS | PATH}
    assert {name for name in top if name.endswith(".py")} == python
    others = {"README.md", "conf", "requirements.txt", "pyproject.toml", "LICENSE"}
    others |= {"tests", "benchmarks", "assets", "deploy", "docs"}
    assert {name for name in top if not name.startswith(".")} == (
        python | WINGS | others
    )


def test_the_bundle_that_nodes_get_has_every_wing():
    listed = (PROJECT / "pyproject.toml").read_text()
    assert [wing for wing in WINGS if f'"/{wing}/**/*.py"' not in listed] == []


@pytest.mark.parametrize("room", ["node", "client"])
def test_a_site_reads_no_code_of_the_server(room):
    """Whatever `node` or `client` imports, and that in turn, is nothing of `server`."""
    files = {name_of(path): path for path in sources()}
    # The door's process hands messages to one that loads `app`, as `loads_nothing` counts.
    own = [name for name in files if within(name, {room}) and name != "node.resident"]
    reached, left = {}, [(name, room) for name in own]
    while left:
        name, by = left.pop()
        if name in reached:
            continue
        reached[name] = by
        for imported in imports(files[name].read_text()):
            parts = imported.split(".")
            found = [".".join(parts[:n]) for n in (1, 2)]
            left += [(one, f"{name} of {by}") for one in found if one in files]
    assert {n: by for n, by in reached.items() if within(n, {"server", "main"})} == {}


NODE = """
import sys
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
import app

TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
run = (
    "experiment=quickstart num_clients=4 model.gradient_checkpointing=auto "
    "train.training_arguments.max_steps=1"
)
told = {"server-round": 1, "partition": 0, "overrides": run, "run": "first"}
own = {"partition-id": 0, "num-partitions": 4, "cpus": 1}
own |= {"model-path": "assets/tiny_llama", "cache-path": sys.argv[1]}

def ask(kind, arrays):
    content = {"arrays": arrays, "config": ConfigRecord(told)}
    message = Message(RecordDict(content), 5, kind)
    message.metadata.__dict__["_message_id"] = "message"
    return app.client(message, Context(1, 5, own, RecordDict(), {}))

first = ask("query", ArrayRecord({}))
assert not ask("train", first.content["arrays"]).has_error()
rooms = ("server", "reporting", "settings.preflight", "settings.plan", "settings.start")
print("loaded:", *(name for name in sorted(sys.modules) if name.startswith(rooms)))
"""


@pytest.mark.slow
def test_a_node_loads_nothing_of_the_server(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NODE, str(tmp_path)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.slow
def test_the_entry_leaves_transformers_for_later():
    """`utils.quiet` has to come before it, and so has the answer to a mistake in a setting."""
    script = (
        "import main, sys; assert not {'transformers', 'peft'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], cwd=PROJECT, check=True)
