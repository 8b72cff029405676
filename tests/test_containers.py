"""pytest tests/test_containers.py: the commands of compose.yaml, run without Docker."""

import re
import shlex
import subprocess

import pytest
import yaml

from assets.testbed.federation import ONLINE, Federation
from utils import PROJECT

COMPOSE = (PROJECT / "deploy/compose.yaml").read_text()
SERVICES = yaml.safe_load(COMPOSE)["services"]
NODES = ["node-0", "node-1"]


def binds(service: str) -> dict[str, str]:
    """What is mounted from the host, by its place in the container."""
    volumes = [volume.split(":") for volume in SERVICES[service]["volumes"]]
    return {target: source for source, target, *_ in volumes if source[0] == "."}


def test_the_image_holds_what_requirements_txt_says():
    lines = (PROJECT / "deploy/Dockerfile").read_text().splitlines()
    flower = re.search(
        r"^flwr\[simulation\]==(.+)$", (PROJECT / "requirements.txt").read_text(), re.M
    )
    assert f"FROM flwr/base:{flower[1]}-py3.11-ubuntu24.04" in lines
    assert "RUN python -m pip install --no-cache-dir -r requirements.txt" in lines
    assert not [line for line in lines if line.startswith("USER")]  # the base's: app
    copied = [line.split()[1] for line in lines if line.startswith("COPY")]
    ignored = (PROJECT / ".dockerignore").read_text().splitlines()
    assert [f"!{name}" for name in copied] == [line for line in ignored if "!" in line]
    assert "*" in ignored


def test_what_a_container_mounts_of_the_project_is_there():
    mounted = {source for name in SERVICES for source in binds(name).values()}
    assert "../assets/tiny_llama" in mounted
    for source in mounted:
        own = source.startswith(("./certs/", "./data/"))  # the operator's
        assert own or (PROJECT / "deploy" / source).exists()


def test_nobody_sees_more_than_its_own():
    assert set(SERVICES) == {"superlink", *NODES}
    for name, service in SERVICES.items():
        others = [volume for volume in service["volumes"] if volume[0] != "."]
        assert others == [f"{name}:/app/home"]
        assert all(v.endswith(":ro") for v in service["volumes"] if v[0] == ".")
        own = {
            source for source in binds(name).values() if re.search("key|data", source)
        }
        key = "server" if name == "superlink" else name
        assert own - {f"./data/{name}"} == {f"./certs/{key}.key"}
    assert SERVICES["superlink"]["ports"] == ["127.0.0.1:8000:8000"]
    assert not any("ports" in SERVICES[node] for node in NODES)


@pytest.mark.slow
def test_the_commands_make_a_federation_that_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # The project as compose.yaml finds it, with the keys that its first lines make.
    deploy = tmp_path / "deploy"
    (deploy / "certs").mkdir(parents=True)
    (deploy / "certs/make.sh").symlink_to(PROJECT / "deploy/certs/make.sh")
    (tmp_path / "assets").symlink_to(PROJECT / "assets")
    make = re.search(r"#  +(certs/make\.sh server.*)", COMPOSE)[1]
    subprocess.run(make, shell=True, cwd=deploy, check=True, capture_output=True)
    records = (PROJECT / "assets/tiny_qa/train.jsonl").read_text().splitlines()
    for i, node in enumerate(NODES):
        (deploy / "data" / node).mkdir(parents=True)
        (deploy / "data" / node / "own.jsonl").write_text("\n".join(records[i::2]))

    def outside(service: str, address: str = "") -> list[str]:
        """The service's command, with the host's paths."""
        names = {target: deploy / source for target, source in binds(service).items()}
        assert all(path.exists() for path in names.values())
        names["superlink:8000"] = address
        return [
            re.sub("|".join(names), lambda match: str(names[match[0]]), argument)
            for argument in shlex.split(SERVICES[service]["command"])
        ]

    federation = Federation(tmp_path / "federation", certificates=deploy / "certs")
    command, *federation.options = outside("superlink")
    assert command == "flower-superlink"
    with federation:
        for node in NODES:
            key = deploy / "certs" / f"{node}.key.pub"
            federation.ask("supernode", "register", str(key))
            federation.serve(node, ONLINE, *outside(node, federation.address))
        assert list(federation.nodes().values()) == ["online", "online"]
        status, output = federation.run(
            PROJECT,
            "experiment=quickstart num_clients=2 num_rounds=1 strategy.fraction_fit=1 "
            "evaluate.exact_match=false train.training_arguments.max_steps=2",
        )
        assert status == "finished:completed", output
    assert list((tmp_path / "federation/superlink/outputs").rglob("peft_1"))
