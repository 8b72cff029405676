"""pytest tests/test_node.py: what a run's settings can and cannot make a node do."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import app
import dataset
import model
from node import permit
from settings import schema
from settings.compose import compose
from utils import PROJECT, Refusal, Settings, UserError, flat

RUN = (
    "experiment=quickstart num_clients=4 evaluate.exact_match=false "
    "train.training_arguments.max_steps=2"
)
SHARE = {"partition-id": 1, "num-partitions": 4, "cpus": 1}


@pytest.fixture(autouse=True)
def at_home(monkeypatch) -> None:
    monkeypatch.chdir(PROJECT)  # and back, because a node goes there


@pytest.fixture
def notes(tmp_path) -> dict:
    """The settings of a node with 30 records of its own, in columns of its own."""
    records = [{"frage": f"Is it {i}?", "antwort": f"It is {i}."} for i in range(30)]
    file = tmp_path / "notes.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "data-path": str(file),
        "column-instruction": "frage",
        "column-input": "",
        "column-output": "antwort",
        "cache-path": str(tmp_path / "cache"),
        "cpus": 1,
    }


def settle(settings: dict, overrides: str = "", simulated: bool = False):
    return permit.settle(
        {"overrides": f"{RUN} {overrides}", "run": "../first"}, settings, simulated
    )


def test_a_node_trains_on_its_own_records_whatever_the_run_names(notes):
    cfg, partition = settle(
        notes,
        "dataset=local dataset.path=/etc/passwd dataset.test_path=/etc/shadow "
        "dataset.label=category partitioner=natural dataset.columns.output=secret",
    )
    rows = dataset.load_partition(cfg, partition)
    assert len(rows) == 30
    assert rows[7] == {"frage": "Is it 7?", "antwort": "It is 7."}
    record = dataset.to_record(rows[7], cfg["dataset"]["columns"])
    assert record == {"instruction": "Is it 7?", "input": "", "output": "It is 7."}
    assert cfg["dataset"]["test_path"] is None


def test_a_node_without_data_takes_its_share_of_the_bundles(configure):
    cfg, partition = settle(SHARE)
    rows = dataset.load_partition(cfg, partition)
    assert partition == 1
    assert rows[:] == dataset.load_partition(configure("num_clients=4"), 1)[:]


@pytest.mark.parametrize(
    "override",
    [
        "+train.training_arguments.push_to_hub=true",
        "++train.training_arguments.hub_token=x",
        "~strategy",
        "model@peft=tiny",
        "peft._target_=peft.XLoraConfig",
        "'peft={_target_: peft.XLoraConfig}'",
        "'peft.target_modules={a: /etc/passwd}'",
        "'dataset.template=${oc.env:HOME}'",
        "'dataset.columns.input=${oc.env:HOME}'",
        r"'mode=$\{oc.env:HOME\,federated\}'",
        r"'train.training_arguments=$\{oc.create:\{max_steps:2\,push_to_hub:true\}\}'",
        "'model.lora.target_modules=[q_proj,\"${oc.env:HOME}\"]'",
        "'model.lora.target_modules=[q_proj,[v_proj]]'",
        "seed=1,2",
        "model=../../../../../../tmp/evil",
        "experiment=/tmp/evil",
        "model=[tiny]",
    ],
)
def test_an_override_that_adds_or_reads_is_refused(override):
    with pytest.raises(Refusal, match="does more than give a plain value"):
        settle(SHARE, override)


# --- whatever a run's overrides spell, what is used is a plain value ------------------------

SECRET = "hf_SECRET_OF_THE_NODE"
CHOSEN = permit._chosen(tuple(permit.parse(RUN).choices.items()))
BUNDLE = flat(OmegaConf.to_container(CHOSEN))
LEAVES = flat(OmegaConf.to_container(permit.compose(permit.parse(RUN))))
NAMES = ("oc.env:SECRET", "oc.env:SECRET,1", "oc.decode:${oc.env:SECRET}", "num_rounds")
INTERPOLATIONS = st.sampled_from([f"${{{name}}}" for name in NAMES]) | st.sampled_from(
    ["${oc.create:{push_to_hub:true}}", "${oc.dict.values:model}", "a${num_rounds}b"]
)
PLAIN_TEXT = st.text("abz019_./- ", min_size=1, max_size=8)


def spelt(text: str, how: str) -> str:
    """The same text, as Hydra's grammar lets one spell it."""
    return {
        "bare": text,
        "escaped": "".join(f"\\{c}" if c in "{}:,() \\" else c for c in text),
        "half escaped": text.replace("{", "\\{").replace("}", "\\}"),
        "single": f"'{text}'",
        "double": f'"{text}"',
        "double escaped": '"' + text.replace("$", "\\$") + '"',
        "cast": f"str('{text}')",
    }[how]


HOW = ["bare", "escaped", "half escaped", "single", "double", "double escaped", "cast"]
WRITTEN = st.builds(spelt, INTERPOLATIONS | PLAIN_TEXT, st.sampled_from(HOW))
VALUES = st.recursive(
    WRITTEN | st.integers(-(10**12), 10**12).map(str) | st.floats().map(repr),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
        | inner.map(lambda value: f"{{a: {value}}}")
        | inner.map(lambda value: f"choice({value},1)")
    ),
    max_leaves=4,
)
KEYS = st.sampled_from([*LEAVES, "train", "model", "peft", "strategy", "no.such.key"])


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(["", "+", "++"]), KEYS, VALUES), max_size=3))
def test_what_is_accepted_differs_by_plain_values_alone(words):
    given = [f"{sign}{key}={value}" for sign, key, value in words]
    cfg, refused = None, ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET", SECRET)
        try:
            cfg = permit.compose(permit.parse(f"{RUN} {shlex.join(given)}"))
        except (Refusal, UserError) as error:
            refused = str(error)
    assert SECRET not in f"{cfg}{refused}"
    set_by_it = {key for _, key, _ in words}
    for key, value in flat(OmegaConf.to_container(cfg or CHOSEN)).items():
        if key in set_by_it and cfg:
            parts = value if isinstance(value, list) else [value]
            assert all(type(p) in (str, int, float, bool, type(None)) for p in parts)
            assert not any("${" in str(part) for part in parts)
        elif cfg and "${" not in str(BUNDLE[key]):  # what refers to another follows it
            assert value == LEAVES[key]


@pytest.mark.parametrize(
    "overrides",
    [
        "model.lora.target_modules=[q_proj,'v_proj'] model.lora.peft_lora_r=4",
        r"'dataset.columns.output=a\,b\:\ c' 'dataset.label=x y' seed=1_0",
        "launch=ddp launch.processes=3 comm.dtype=int8 model.quantization=null",
        "train.seq_length=int(9) strategy=fedprox strategy.proximal_mu=1e-3",
        "partitioner=dirichlet num_clients=7 dataset.label='' peft=dora",
    ],
)
def test_a_plain_value_means_what_it_means_to_hydra(overrides):
    assert permit.compose(permit.parse(overrides)) == compose(overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset=local dataset.path=/etc/passwd", "dataset.path is not in the bundle"),
        ("dataset.path=../../etc/passwd", "is not in the bundle"),
        ("dataset.path=assets/../..", "is not in the bundle"),
        (
            "dataset.path=null dataset.name=/srv/records",
            "dataset.name is no owner/name",
        ),
        ("dataset.path=null dataset.name=assets/tiny_qa", "dataset.name is no owner"),
        ("model.name=/srv/models/other", "model.name is no owner/name"),
        ("model.name=../other", "model.name is no owner/name"),
        ("train.seq_length=many", r"at fault \(train.seq_length\): see its log"),
        ("no_such_key=1", "the override of no_such_key: conf/ has no such setting"),
        ("train.training_arguments=5", "training_arguments: conf/ has no such setting"),
        ("num_clients=5", "num-partitions do not fit the run's num_clients"),
        ("train.min_records=4000", "it has fewer records than train.min_records"),
        (f"dataset.path={5000 * 'a'}", "dataset.path is not in the bundle"),
        (f"model.name={5000 * 'a'}", "model.name is no owner/name"),
        # Would read the node's data a thousand times, or make a table of 10^9 partitions.
        ("mode=centralized num_clients=4", "mode is a baseline's"),
        ("mode=local", "mode is a baseline's"),
        (
            "partitioner=size partitioner.num_partitions=1000000000",
            r"at fault \(partitioner.num_partitions\)",
        ),
        ("strategy='unclosed", "a quote is open"),
        ("train.seq_length=[1", "the override of train.seq_length cannot be read"),
    ],
)
def test_what_a_node_has_no_part_in_is_refused_with_the_reason(override, message):
    with pytest.raises(Refusal, match=message):
        settle(SHARE, override)


# --- what is told, and what may be asked for ------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("value", ["MARKER", "-77777"])
def test_no_value_of_the_runs_is_in_what_the_server_is_told(value):
    """For every setting of conf/, a value that fits none."""
    for key in LEAVES:
        if key == "dataset.path":  # looked for in the bundle, and not there
            continue
        try:
            asked = permit.compose(permit.parse(f"{RUN} {key}={value}"))
            cfg = OmegaConf.to_container(asked)
            schema.validated(cfg)
        except (Refusal, UserError):
            with pytest.raises(Refusal) as refusal:
                settle(SHARE, f"{key}={value}")
            assert "MARKER" not in str(refusal.value)
            assert "77777" not in str(refusal.value)


@pytest.mark.parametrize("key", permit.SETTINGS)
def test_no_value_of_the_nodes_is_in_what_the_server_is_told(key, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    value = "MARKER" if permit.SETTINGS[key] is str else -77777
    told = ""
    try:
        settle(SHARE | {key: value})
    except Refusal as refusal:
        told = str(refusal)
    assert "MARKER" not in told
    assert "77777" not in told


@pytest.mark.parametrize(
    ("own", "overrides", "ceiling"),
    [
        ({}, "train.training_arguments.max_steps=1000000000", "max-tokens"),
        (
            {},
            "train.training_arguments.max_steps=-1 "
            "train.training_arguments.num_train_epochs=1e9",
            "max-tokens",
        ),
        (
            {},
            "train.training_arguments.gradient_accumulation_steps=4000000",
            "max-tokens",
        ),
        ({}, "train.seq_length=1000000", "max-batch-tokens"),
        (
            {},
            "train.training_arguments.per_device_train_batch_size=50000",
            "max-batch-tokens",
        ),
        ({}, "model.lora.peft_lora_r=1000000", "max-rank"),
        ({}, "peft=prompt peft.num_virtual_tokens=1000000", "max-rank"),
        ({}, "peft=ptuning peft.encoder_hidden_size=1000000", "max-rank"),
        ({"max-rank": 15}, "", "max-rank"),
        ({"max-batch-tokens": 16 * 128 - 1}, "", "max-batch-tokens"),
        ({"max-tokens": 2 * 16 * 128 - 1}, "", "max-tokens"),
        ({"max-tokens": 2 * 16 * 128, "max-batch-tokens": 16 * 128}, "", None),
        ({"max-rank": 16}, "", None),
    ],
)
def test_a_run_asks_for_no_more_than_the_node_gives(own, overrides, ceiling):
    if ceiling is None:
        settle(SHARE | own, overrides)
        return
    with pytest.raises(Refusal, match=f"ask for more than its {ceiling}$"):
        settle(SHARE | own, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seq_length=1000000000000", "train.seq_length is out of all bounds"),
        ("train.learning_rate_max=1e400", "learning_rate_max is out of all bounds"),
        ("strategy.fraction_fit=nan", "strategy.fraction_fit is out of all bounds"),
        (f"seed={5000 * '9'}", "the override of seed cannot be read"),
        ("'model.lora.target_modules=\"(a+)+$\"'", "target_modules is a pattern"),
        ("'model.lora.target_modules=[\"(a|a)*b\"]'", "target_modules is a pattern"),
        (f"train.seq_length={1000 * '['}", "train.seq_length cannot be read"),
        ("seed=1 " * 5000, "have more than 20000 characters"),
    ],
)
def test_what_would_take_for_ever_to_compute_with_is_refused(override, message):
    with pytest.raises(Refusal, match=message):
        permit.parse(override)


@pytest.mark.parametrize("key", ["model.name", "dataset.path=null dataset.name"])
@pytest.mark.parametrize("name", ["private/records", "../private/records", "private"])
def test_no_answer_tells_what_lies_beside_the_node(key, name, tmp_path, monkeypatch):
    def answer() -> str:
        os.chdir(tmp_path)
        dataset.forget()
        try:
            cfg, _ = settle(SHARE, f"{key}={name}")
            model.load_base(cfg["model"]["name"], None, model.default_device())
        except Exception as error:
            return f"{type(error)} {error}"
        return "it was used"

    nothing = answer()
    (tmp_path / "private/records").mkdir(parents=True)
    (tmp_path / "private/records/records.py").touch()
    shutil.copytree(PROJECT / "assets/tiny_qa", tmp_path / "private/records/data")
    shutil.copytree(
        PROJECT / "assets/tiny_llama", tmp_path / "private/records", dirs_exist_ok=True
    )
    assert answer() == nothing
    assert nothing != "it was used"


@pytest.mark.parametrize("reader", [*_PACKAGED_DATASETS_MODULES, "gsm8k"])
def test_no_reader_of_local_files_is_a_dataset(reader):
    """`load_dataset("text")` would read all files of the working directory."""
    wanted = {"path": None, "name": reader}
    with pytest.raises(Refusal, match=r"dataset.name is no owner/name of the hub"):
        permit.choose_data(wanted, {})
    with pytest.raises(UserError, match=rf"dataset.name={reader}.*dataset=local"):
        dataset.check_name(Settings(wanted))


def test_the_base_is_the_nodes_own_where_it_names_one(notes):
    own = notes | {"model-path": "assets/tiny_llama", "model-name": "org/base"}
    cfg, _ = settle(own, "model.name=org/base")
    assert cfg["model"]["name"] == str(PROJECT / "assets/tiny_llama")
    with pytest.raises(Refusal, match=r"takes part with another model.name only"):
        settle(own, "model.name=org/another")


def test_a_base_without_weights_in_the_bundle_is_asked_for(
    tmp_path, monkeypatch, notes
):
    (tmp_path / "assets/tiny_llama").mkdir(parents=True)
    monkeypatch.setattr(permit, "PROJECT", tmp_path)
    with pytest.raises(Refusal, match="it needs model-path"):
        settle(notes)


def test_hydras_own_settings_stay_with_the_server():
    overrides = "seed=3 hydra.run.dir=/x hydra/launcher=x 'hydra.searchpath=[file:///srv]' num_rounds=2"
    assert permit.parse(overrides) == ({}, {"seed": 3, "num_rounds": 2})


@pytest.mark.parametrize("given", ["report_to=wandb", "save_strategy=epoch"])
def test_no_tracker_and_no_checkpoints_on_a_node(given, notes):
    key = f"train.training_arguments.{given}"
    with pytest.raises(Refusal, match=key.partition("=")[0]):
        settle(notes, key)


def test_threads_processes_and_folders_are_the_nodes(notes):
    cfg, _ = settle(notes, "launch=ddp launch.processes=64")
    assert cfg["client_resources"]["num_cpus"] == 1
    assert cfg["launch"]["processes"] == 1
    assert cfg["residuals"].startswith(f"{notes['cache-path']}/runs/___first-")


def test_a_simulated_node_has_the_threads_that_the_run_gives_it(tmp_path):
    share = SHARE | {"cache-path": str(tmp_path)}
    del share["cpus"]
    alone, _ = settle(share)
    assert alone["client_resources"]["num_cpus"] == os.cpu_count()
    # Beside others, more threads than free cores would spin, waiting for each other.
    beside_others, _ = settle(share, simulated=True)
    assert beside_others["client_resources"]["num_cpus"] == 1


def test_a_node_that_has_neither_data_nor_a_share_says_so():
    with pytest.raises(Refusal, match="neither data-path nor partition-id"):
        settle({})


@pytest.mark.parametrize(
    ("device", "visible"), [("cpu", ""), ("cuda:1", "1"), ("cuda:0,2", "0,2")]
)
def test_a_process_sees_no_other_device_than_its_nodes(monkeypatch, device, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    permit.choose_device(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_every_setting_is_in_the_docs():
    page = (PROJECT / "docs/federation.md").read_text()
    assert [key for key in permit.SETTINGS if f"`{key}`" not in page] == []


# --- the ClientApp of `flwr run` on such settings -------------------------------------------


@pytest.fixture
def identity() -> None:
    # What Flower's runtime sets before an app may make Messages.
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


def ask(kind: str, settings: dict, adapter: dict, overrides: str = "") -> Message:
    told = {"overrides": f"{RUN} {overrides}", "run": "first"}
    config = ConfigRecord({"server-round": 1, "partition": 3, **told})
    content = RecordDict({"arrays": ArrayRecord(adapter), "config": config})
    message = Message(content, 5, kind)
    message.metadata.__dict__["_message_id"] = "message"
    return app.client(message, Context(1, 5, settings, RecordDict(), {}))


@pytest.mark.slow
def test_the_app_answers_with_the_update_of_its_own_partition(
    identity, configure, tmp_path
):
    first = ask("query", SHARE, {}).content["arrays"].to_torch_state_dict()
    reply = ask("train", SHARE, first)
    assert not reply.has_error(), reply.error
    update = reply.content["arrays"].to_torch_state_dict()
    # The partition that the server names is not this node's: 3, where it has 1.
    cfg = configure(
        "num_clients=4 train.training_arguments.per_device_train_batch_size=16"
    )
    simulated = app.make_client_app(cfg, tmp_path)
    for partition, same in ((1, True), (3, False)):
        config = ConfigRecord({"server-round": 1, "partition": partition})
        message = Message(
            RecordDict({"arrays": ArrayRecord(first), "config": config}), 5, "train"
        )
        message.metadata.__dict__["_message_id"] = "message"
        answer = simulated(message, Context(1, 5, {}, RecordDict(), {}))
        expected = answer.content["arrays"].to_torch_state_dict()
        assert all(update[k].equal(expected[k]) for k in update) is same


def test_records_of_no_use_are_refused_without_a_word_of_them(identity, notes):
    secret = "patient 17"
    Path(notes["data-path"]).write_text(
        "".join(json.dumps({"frage": secret, "antwort": ""}) + "\n" for _ in range(20))
    )
    first = ask("query", SHARE, {}).content["arrays"].to_torch_state_dict()
    reply = ask("train", notes, first)
    assert reply.error.code == Refusal.code
    assert reply.error.reason.startswith("none of this client's records can be")
    assert secret not in reply.error.reason


def test_a_nodes_log_says_what_was_read_and_sent(identity, notes, capfd):
    first = ask("query", notes, {}).content["arrays"].to_torch_state_dict()
    reply = ask("train", notes, first)
    sent = reply.content["arrays"]
    size = sum(len(array.data) for array in sent.values())
    line = capfd.readouterr().out.splitlines()[-1]
    assert line.startswith(
        f"train, run first, round 1: read {notes['data-path']} (frage, antwort), "
        f"30 records; sent {len(sent)} arrays of float16, {size} bytes in all, "
    )
    for name, value in reply.content["metrics"].items():
        assert f"{name} {value:g}" in line


@pytest.mark.parametrize("error", [ValueError, Refusal, UserError, MemoryError])
def test_what_is_told_of_an_error_is_one_short_line(error, identity, capfd):
    def settle(message: Message, context: Context) -> None:
        raise error("a\x1b[2J\u202e\n round 1/1" + 10_000 * "b") from OSError("why")

    for private in (True, False):
        config = RecordDict({"config": ConfigRecord({"server-round": 1})})
        message = Message(config, 5, "train")
        message.metadata.__dict__["_message_id"] = "message"
        client = app.client_app(settle, private)
        told = client(message, Context(1, 5, {}, RecordDict(), {})).error.reason
        assert told.isprintable()
        assert len(told) <= 200
        if private and error is not Refusal:
            assert told == f"{error.__name__}: its own log says more"
        log = capfd.readouterr().err
        assert "why" in log  # the operator is told all of it
        assert "\x1b" not in log


def test_an_adapter_for_another_base_ends_the_nodes_part(identity):
    first = ask("query", SHARE, {}).content["arrays"].to_torch_state_dict()
    wider = {name: tensor.repeat(2, 1) for name, tensor in first.items()}
    reply = ask("train", SHARE, wider)
    assert reply.error.code == Refusal.code
    assert "does not fit the base that is here" in reply.error.reason
