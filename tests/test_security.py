"""pytest tests/test_security.py: who gets into a federation with TLS and node keys."""

import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from assets.testbed.federation import ONLINE, Federation, Process, key, make_certs
from utils import PROJECT

NODES = ["first", "second"]
MESSAGE = "Receiving: "  # what a SuperNode says of each
SHORT = (
    "experiment=quickstart num_clients=2 num_rounds=2 strategy.fraction_fit=1 "
    "evaluate.exact_match=false train.training_arguments.max_steps=2"
)


@pytest.fixture(scope="module")
def certs(tmp_path_factory) -> Path:
    """What one federation's operators have, and a key that nobody registers."""
    folder = tmp_path_factory.mktemp("certs")
    made = make_certs(folder, "server")
    assert made.returncode == 0, made.stderr
    made = make_certs(folder, "node", *NODES, "stranger")
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def other_ca(tmp_path_factory) -> Path:
    """The certificate of an authority that did not sign the SuperLink's."""
    folder = tmp_path_factory.mktemp("other")
    made = make_certs(folder, "server")
    assert made.returncode == 0, made.stderr
    return folder / "ca.crt"


# --- what deploy/certs/make.sh makes -------------------------------------------------------------


def test_keys_are_private_and_certificates_public(certs):
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in certs.iterdir()}
    assert modes["ca.crt"] == modes["server.crt"] == "0o644"
    keys = {name for name in modes if name.endswith(".key")}
    assert keys == {"ca.key", "server.key", "first.key", "second.key", "stranger.key"}
    assert {modes[key] for key in keys} == {"0o600"}


def test_the_certificate_names_its_hosts_for_a_year(tmp_path):
    hosts = ["fl.example.org", "10.0.0.7", "::1"]
    assert make_certs(tmp_path, "server", *hosts).returncode == 0
    certificate = x509.load_pem_x509_certificate((tmp_path / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    named = [str(name.value) for name in names.value]
    assert named == [*hosts, "localhost", "127.0.0.1"]
    validity = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert validity.days == 365


def test_a_strict_client_accepts_the_certificate(certs):
    context = ssl.create_default_context(cafile=certs / "ca.crt")
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certs / "server.crt", certs / "server.key")
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(ours, theirs, server_hostname="127.0.0.1")
    listener = server.wrap_bio(theirs, ours, server_side=True)
    for side in (client, listener, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert client.version() == "TLSv1.3"


def test_nothing_is_overwritten_and_renewal_keeps_the_authority(tmp_path):
    assert make_certs(tmp_path, "server").returncode == 0
    assert make_certs(tmp_path, "node", "first").returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for again in (["server", "example.org"], ["node", "first"]):
        refused = make_certs(tmp_path, *again)
        assert refused.returncode == 1
        assert "exists. Delete it if nobody needs it any more." in refused.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "server.crt").unlink()
    (tmp_path / "server.key").unlink()
    assert make_certs(tmp_path, "server").returncode == 0
    assert (tmp_path / "ca.crt").read_bytes() == before["ca.crt"]


@pytest.mark.parametrize(
    "arguments", [[], ["nodes", "first"], ["node"], ["server", "10.0.0.300"]]
)
def test_what_cannot_be_made_leaves_nothing(arguments, tmp_path):
    made = make_certs(tmp_path, *arguments)
    assert made.returncode != 0
    assert made.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"make.sh", "ca.crt", "ca.key"}


# --- a simulation -----------------------------------------------------------------------------

HOST = """
import os, subprocess, sys
import main
from settings.compose import compose, resolve
cfg = resolve(compose("experiment=quickstart"))
for run in (1, 2):  # as a multirun does
    with main.start_ray(cfg):
        import ray
        print("own", ray.get(ray.remote(lambda: run).remote()), flush=True)
        address = ray.get_runtime_context().gcs_address
        rest = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        if run == 2:
            code = sys.argv[1].replace("ADDRESS", address)
            sys.exit(subprocess.run([sys.executable, "-c", code], env=rest).returncode)
"""
STRANGER = """
import ray
ray.init(address="ADDRESS", log_to_driver=False)
print("stranger", ray.get(ray.remote(lambda: 3).remote()))
"""


@pytest.mark.slow
def test_a_stranger_runs_nothing_in_a_simulations_ray():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    host = subprocess.run(
        [sys.executable, "-c", HOST, STRANGER],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert host.stdout == "own 1\nown 2\n", host.stderr
    assert host.returncode == 1
    assert "InvalidAuthToken" in host.stderr


# --- a federation with both -------------------------------------------------------------------


@pytest.fixture(scope="module")
def federation(certs, tmp_path_factory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    options = ["--enable-supernode-auth"]
    with Federation(folder, *options, certificates=certs) as federation:
        for name in NODES:
            federation.ask("supernode", "register", str(certs / f"{name}.key.pub"))
        yield federation


@pytest.fixture(scope="module")
def run(federation, certs) -> Process:
    """A run that goes on while others try to get in: there is something to get."""
    base = f'model-path="{PROJECT / "assets/tiny_llama"}"'  # weights do not travel
    cache = f'cache-path="{federation.folder / "cache"}"'
    nodes = [
        federation.supernode(
            name, f"partition-id={i} num-partitions=2 {base} {cache}", key(certs, name)
        )
        for i, name in enumerate(NODES)
    ]
    run = federation.submit(PROJECT, SHORT)
    for node in nodes:
        node.wait_for(MESSAGE)
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trial", "cause"),
    [
        ("unknown key", "Failed to activate SuperNode"),
        ("no key", "must be registered"),
        ("other authority", "CERTIFICATE_VERIFY_FAILED"),
        ("plain text", "Giving up reconnection"),
    ],
)
def test_a_node_is_refused(trial, cause, federation, run, certs, other_ca):
    options, connect = {
        "unknown key": ([key(certs, "stranger")], None),
        "no key": ([], None),
        "other authority": (
            [key(certs, "first")],
            [f"--root-certificates={other_ca}"],
        ),
        # The others give up at once; this one would try for ever.
        "plain text": (["--max-retries=1"], ["--insecure"]),
    }[trial]
    node = federation.supernode(
        trial, "partition-id=0", *options, connect=connect, expect="Uvicorn running"
    )
    assert node.wait() == 1
    assert cause in node.output
    assert not re.search(f"{ONLINE}|{MESSAGE}", node.output)
    assert not (node.folder / "apps").exists()  # where the run's code would be
    assert list(federation.nodes().values()) == ["online", "online"]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["supernode", "list"], ["run", str(PROJECT)]])
@pytest.mark.parametrize("connection", ["plain text", "other authority"])
def test_a_user_is_refused(connection, arguments, federation, run, other_ca):
    connect = {
        "plain text": "insecure = true",
        "other authority": f"root-certificates = '{other_ca}'",
    }[connection]
    flwr = federation.flwr(*arguments, connect=connect)
    assert flwr.wait() == 1
    assert "Connection to the SuperLink is unavailable" in flwr.output
    assert "Successfully" not in flwr.output


@pytest.mark.slow
def test_the_registered_nodes_train_meanwhile(federation, run):
    status, output = federation.finish(run)
    assert status == "finished:completed", output
    assert all((federation.folder / name / "apps").exists() for name in NODES)
    (history,) = federation.superlink.folder.glob("outputs/**/history.json")
    rounds = json.loads(history.read_text())["rounds"]
    assert [entry["replied"] for entry in rounds] == [2, 2]
