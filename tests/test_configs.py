"""pytest tests/test_configs.py: every shipped YAML composes and builds what it names."""

import copy
import json
import pickle
import re
import tomllib
from collections import Counter
from functools import lru_cache

import hydra
import pytest
from flwr_datasets.partitioner import Partitioner
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from peft import PeftConfig

import client
from methods import aggregate, personal, privacy, sharing
from server import journal, rounds
from settings import preflight, schema, start
from settings.compose import compose, record, resolve, resumed
from utils import PROJECT, Refusal, UserError, construct

CONF = PROJECT / "conf"
FILES = sorted(str(path.relative_to(CONF)) for path in CONF.glob("**/*.yaml"))

# The published default, under the names that the seed documents use.
PUBLISHED = {
    "num_clients": 20,
    "num_rounds": 100,
    "client_resources.num_cpus": 8,
    "client_resources.num_gpus": 1.0,
    "strategy.fraction_fit": 0.1,
    "strategy.fraction_evaluate": 0.0,
    "dataset.name": "vicgalle/alpaca-gpt4",
    "model.name": "openlm-research/open_llama_7b_v2",
    "model.quantization": 4,
    "model.gradient_checkpointing": "auto",
    "model.use_fast_tokenizer": True,
    "model.lora.peft_lora_r": 32,
    "model.lora.peft_lora_alpha": 64,
    "model.lora.peft_lora_dropout": 0.075,
    "model.lora.target_modules": None,
    "train.save_every_round": 5,
    "train.seq_length": 512,
    "train.padding_side": "left",
    "train.learning_rate_max": 5e-5,
    "train.learning_rate_min": 1e-6,
    "train.training_arguments.max_steps": 10,
    "train.training_arguments.per_device_train_batch_size": 16,
    "train.training_arguments.gradient_accumulation_steps": 1,
    "train.training_arguments.lr_scheduler_type": "constant",
}
# The configuration of the medical course, to the letter.
MEDICAL = {
    "dataset.name": "medalpaca/medical_meadow_medical_flashcards",
    "dataset.columns.instruction": "instruction",
    "dataset.columns.input": "input",
    "dataset.columns.output": "output",
    "model.name": "EleutherAI/pythia-70m",
    "model.quantization": 4,
    "model.gradient_checkpointing": True,
    "model.use_fast_tokenizer": True,
    "model.lora.peft_lora_r": 16,
    "model.lora.peft_lora_alpha": 64,
    "model.lora.target_modules": None,
    "train.save_every_round": 5,
    "train.seq_length": 512,
    "train.padding_side": "left",
    "train.training_arguments.learning_rate": 5e-4,
    "train.training_arguments.per_device_train_batch_size": 2,
    "train.training_arguments.gradient_accumulation_steps": 1,
    "train.training_arguments.logging_steps": 1,
    "train.training_arguments.max_steps": 5,
    "train.training_arguments.report_to": None,
    "train.training_arguments.save_steps": 200,
    "train.training_arguments.save_total_limit": 10,
    "train.training_arguments.lr_scheduler_type": "cosine",
}


def names(group):
    return sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))


def plain(overrides):
    return resolve(compose(overrides))


@lru_cache
def keys():
    """Those of the published default, which all have."""
    return plain("").keys()


def flat(node, prefix=""):
    """A nested dict as one of dotted keys."""
    settings = {}
    for key, value in node.items():
        if isinstance(value, dict):
            settings |= flat(value, f"{prefix}{key}.")
        else:
            settings[prefix + key] = value
    return settings


def subset(settings, keys):
    """Those settings that `keys` names; one that is missing stands out by its absence."""
    return {key: settings[key] for key in keys if key in settings}


# --- every file -------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("peft"))
def test_peft_builds_its_config_class(name):
    node = plain(f"experiment=quickstart peft={name}")["peft"]
    made = construct(node, "peft")
    assert isinstance(made, PeftConfig)
    target = node.pop("_target_")
    assert target == f"peft.{type(made).__name__}"
    assert {key: getattr(made, key) for key in node} == node


@pytest.mark.parametrize("name", names("partitioner"))
def test_partitioner_builds(name):
    cfg = plain(f"experiment=quickstart partitioner={name} num_clients=7")
    node = cfg["partitioner"]
    package, _, kind = node["_target_"].rpartition(".")
    assert package in ("flwr_datasets.partitioner", "records.clusters")
    made = construct(node, package)
    assert isinstance(made, Partitioner)
    assert type(made).__name__ == kind
    assert node.get("num_partitions", 7) == 7
    assert node.get("partition_by", "category") == cfg["dataset"]["label"] == "category"


@pytest.mark.parametrize("name", names("strategy"))
def test_strategy_builds(name):
    node = plain(f"experiment=quickstart strategy={name}")["strategy"]
    made = aggregate.build(node)
    made = getattr(made, "strategy", made)
    assert node["_target_"].endswith(f".{type(made).__name__}")
    assert type(made).__name__.lower() == name
    assert 0 < node["fraction_fit"] <= 1
    assert node["fraction_evaluate"] == 0


@pytest.mark.parametrize("name", names("sharing"))
def test_sharing_builds(name):
    node = plain(f"experiment=quickstart sharing={name}")["sharing"]
    made = type(sharing.build(node)).__name__.lower()
    assert made == (name if name in ("ffa", "rolora") else "adapter")


@pytest.mark.parametrize("name", names("personal"))
def test_personal_builds(name):
    node = plain(f"experiment=quickstart personal={name}")["personal"]
    kind = {"none": "personal"}.get(name, name)
    assert type(personal.build(node)).__name__.lower() == kind


@pytest.mark.parametrize("name", names("privacy"))
def test_privacy_builds(name):
    assert privacy.build(plain(f"experiment=quickstart privacy={name}")["privacy"])


@pytest.mark.slow
@pytest.mark.parametrize("group", ["model", "dataset"])
def test_files_of_a_group_have_the_same_keys(group):
    default = flat(plain("")[group]).keys()
    for name in names(group):
        node = flat(compose_raw(f"experiment=quickstart {group}={name}")[group])
        assert node.keys() == default, name


def compose_raw(overrides):
    """As a plain dict in which a value that must be given still reads ???."""
    return OmegaConf.to_container(compose(overrides), resolve=False)


@pytest.mark.parametrize("name", names("experiment"))
def test_experiment_composes(name):
    assert compose(f"experiment={name}").keys() == keys()


@pytest.mark.parametrize("name", names("method"))
def test_a_method_is_what_may_be_chosen_singly(name):
    cfg = schema.validated(plain(f"experiment=quickstart method={name}"))
    assert cfg.keys() == keys()
    assert aggregate.build(cfg.strategy)


@pytest.mark.parametrize("name", FILES)
def test_file_opens_with_a_command_that_composes(name):
    lines = (CONF / name).read_text().splitlines()
    if lines[0] == "# @package _global_":
        lines = lines[1:]
    # What two spaces set off is a remark.
    command = re.match(r"# python main\.py( \S+)*?(?=$|  )", lines[0])
    assert command, f"{name} opens with: {lines[0]}"
    overrides = command[0].removeprefix("# python main.py").split()
    if "--multirun" in overrides:
        overrides = [text for text in overrides if text.startswith("experiment=")]
    group, _, option = name.removesuffix(".yaml").rpartition("/")
    # The quickstart uses the one, and files of their group the others.
    if group and name != "dataset/tiny_qa.yaml" and option != "_base":
        assert f"{group}={option}" in overrides
    compose_raw(" ".join(overrides))


def test_every_group_is_covered_here():
    covered = [
        "peft",
        "partitioner",
        "strategy",
        "sharing",
        "personal",
        "privacy",
        "model",
        "dataset",
        "launch",
        "task",
    ]
    covered += [
        "experiment",
        "method",
        "mode",
        "tracking",
        "hydra/sweeper",
    ]  # the last two in test_tracking.py and test_search.py
    expected = Counter(
        f"{group}/{name}.yaml" for group in covered for name in names(group)
    )
    shared = ["config.yaml", "dataset/_base.yaml", "model/_base.yaml"]
    assert Counter(FILES) == expected + Counter(shared)


@pytest.mark.parametrize(
    "group", ["launch", "method", "mode", "model", "dataset", "peft"]
)
def test_a_group_has_one_kind_of_file(group):
    """All of them hold one section, or all say what they change elsewhere."""
    texts = [(CONF / group / f"{name}.yaml").read_text() for name in names(group)]
    assert len({text.startswith("# @package _global_\n") for text in texts}) == 1


def test_what_a_baseline_means_is_in_the_configuration():
    assert plain("mode=federated")["baseline"] is None
    for mode, clients in (("local", "all"), ("centralized", 1)):
        cfg = plain(f"mode={mode}")
        assert (cfg["mode"], cfg["baseline"]["clients"]) == (mode, clients)


def test_every_setting_of_conf_is_in_the_schema_and_is_settings():
    cfg = schema.validated(plain("experiment=quickstart"))
    assert cfg.train.seq_length == cfg["train"]["seq_length"] == 128
    for copied in (copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg)), cfg | {}):
        assert copied == cfg
        assert copied.model.lora.peft_lora_r == 16
    assert json.loads(json.dumps(cfg)) == {**cfg} == plain("experiment=quickstart")
    with pytest.raises(AttributeError):
        _ = cfg.train.seq_lenght


def test_a_run_of_an_older_version_goes_on_or_is_told_why(tmp_path):
    """Before `mode` was a group, and modules had a folder."""
    words = ["experiment=quickstart", "partitioner=clusters", "mode=local"]
    record(before := compose(" ".join(words)), words, tmp_path)
    OmegaConf.set_struct(before, False)
    for key in ("baseline", "optimized_metric"):
        del before[key]
    before.partitioner._target_ = "clusters.ClusterPartitioner"
    before.tracking._target_ = "tracking.Tracker"
    record(before, words, tmp_path)
    config, _ = resumed(str(tmp_path), ["num_rounds=30"])
    assert config.baseline.clients == "all"
    record(before, [*words, "train.old_setting=5"], tmp_path)
    with pytest.raises(UserError, match="begun with other settings than conf/ has now"):
        resumed(str(tmp_path), [])
    (tmp_path / "residuals").mkdir()
    (tmp_path / "residuals/0-residual-000001.safetensors").touch()
    with pytest.raises(UserError, match="goes on with that version alone"):
        resumed(str(tmp_path), [])


@pytest.mark.slow
def test_a_check_changes_nothing():
    cfg = compose("experiment=quickstart mode=local model.gradient_checkpointing=auto")
    before = copy.deepcopy(cfg)
    settled = preflight.check(cfg)
    assert cfg == before
    assert settled.strategy.fraction_fit == 1
    assert settled.model.gradient_checkpointing is False


# --- published values --------------------------------------------------------------------


def test_default_is_the_published_one():
    cfg = plain("")
    assert subset(flat(cfg), PUBLISHED) == PUBLISHED
    assert cfg["strategy"]["_target_"] == "flwr.serverapp.strategy.FedAvg"
    assert cfg["peft"] == {
        "_target_": "peft.LoraConfig",
        "task_type": "CAUSAL_LM",
        "r": 32,
        "lora_alpha": 64,
        "target_modules": None,
        "lora_dropout": 0.075,
    }
    assert cfg["partitioner"] == {
        "_target_": "flwr_datasets.partitioner.IidPartitioner",
        "num_partitions": 20,
    }


def test_default_learning_rate_falls_from_maximum_to_minimum():
    cfg = plain("")
    rates = [client.training_arguments(cfg, r, 0).learning_rate for r in (1, 51, 100)]
    assert rates[0] == 5e-5
    assert rates[1] == pytest.approx(2.55e-5)  # half-way
    assert rates[2] == pytest.approx(1e-6, abs=2e-8)


def test_medical_pythia_is_the_courses_configuration():
    cfg = plain("experiment=medical_pythia")
    assert subset(flat(cfg), MEDICAL) == MEDICAL
    for server_round in (1, 50, 100):
        arguments = client.training_arguments(cfg, server_round, seed=0)
        assert arguments.learning_rate == 5e-4
        assert arguments.lr_scheduler_type == "cosine"
        assert arguments.max_steps == 5
        assert arguments.train_batch_size == 2
        assert arguments.report_to == []


@pytest.mark.parametrize("name", names("experiment"))
def test_an_experiment_that_sweeps_does_so_without_being_told(name):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", [f"experiment={name}"], return_hydra_config=True)
    sweeps = bool(cfg.hydra.sweeper.params)
    assert (cfg.hydra.mode == RunMode.MULTIRUN) == sweeps


@pytest.mark.slow
def test_flowertune_sweep_expands_to_the_eight_published_settings():
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose(
            "config", ["experiment=flowertune_sweep"], return_hydra_config=True
        )
    params = cfg.hydra.sweeper.params
    sweeps = [f"{key}={values}" for key, values in params.items()]
    parsed = OverridesParser.create().parse_overrides(sweeps)
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    settings = []
    for job in jobs:
        one = plain(" ".join(["experiment=flowertune_sweep", *job]))
        model, share = one["model"], one["strategy"]["fraction_fit"]
        settings.append((model["name"], model["quantization"], share))
    assert sorted(settings) == [
        (f"openlm-research/open_llama_{size}_v2", bits, share)
        for size in ("3b", "7b")
        for bits in (4, 8)
        for share in (0.1, 0.2)
    ]


@pytest.mark.slow
def test_a_run_is_started_gone_on_with_and_told_to_a_sweeper(loopback, tmp_path):
    def train(cfg, folder, overrides):
        rounds.run(cfg, loopback(cfg, folder=folder), folder)

    words = ["experiment=debug", "optimized_metric=rounds"]
    record(config := compose(" ".join(words)), words, tmp_path)
    assert start.start(config, words, tmp_path, train) == 1
    more = [f"resume={tmp_path}", "num_rounds=2"]
    config = compose(" ".join([*words, *more]))
    assert start.start(config, more, tmp_path / "another", train) == 2
    assert not (tmp_path / "another").exists()
    with pytest.raises(
        UserError, match=r"no such number\. Take rounds, train_loss_fir"
    ):
        start.metric("accuracy", tmp_path)


def test_a_federation_goes_on_with_nothing_that_its_nodes_would_refuse(tmp_path):
    words = ["experiment=debug", "+peft.use_rslora=true"]  # as a simulation may
    record(compose(" ".join(words)), words, tmp_path)
    before = (tmp_path / ".hydra/overrides.yaml").read_text()
    more = [f"resume={tmp_path}", "num_rounds=2"]
    config = compose(" ".join(["experiment=debug", *more]))
    with pytest.raises(Refusal, match=r"peft\.use_rslora does more than give a plain"):
        start.start(config, more, tmp_path, pytest.fail, deployed=True)
    assert (tmp_path / ".hydra/overrides.yaml").read_text() == before


@pytest.mark.slow
def test_a_laptop_trains_a_model_and_records_of_ones_own(loopback, tmp_path, capsys):
    path = PROJECT / "assets/tiny_qa/train.jsonl"
    overrides = (
        f"experiment=laptop model.name=assets/tiny_llama dataset.path={path} "
        "num_rounds=1 train.training_arguments.max_steps=1"
    )
    cfg = preflight.check(compose(overrides))
    assert cfg["model"]["quantization"] is None
    assert cfg["client_resources"] == {"num_cpus": 1, "num_gpus": 0}
    assert journal.quantised_on_cpu(cfg) is None
    rounds.run(cfg, loopback(cfg), tmp_path)
    journal.report(cfg, tmp_path)
    said = capsys.readouterr().out
    assert "records of 4 clients" in said  # what they hold back, before and after
    assert "Nothing but the training loss" not in said


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.name", "model.name=null: text is needed"),
        ("dataset.path", "dataset.path must be given"),
    ],
)
def test_a_laptop_s_own_must_be_named(missing, message):
    given = {"model.name": "assets/tiny_llama", "dataset.path": "assets/tiny_qa"}
    words = [f"{key}={value}" for key, value in given.items() if key != missing]
    with pytest.raises(UserError, match=message):
        preflight.check(compose(" ".join(["experiment=laptop", *words])))


# --- requirements --------------------------------------------------------------------------


def test_requirements_are_pinned_and_repeated_in_pyproject():
    text = (PROJECT / "requirements.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pinned = r"[\w-]+(\[\w+\])?==[\d.]+(; sys_platform == .linux.)?"
    assert all(re.fullmatch(pinned, line) for line in lines)
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    repeated = sum(project["optional-dependencies"].values(), project["dependencies"])
    assert sorted(map(str, map(Requirement, lines))) == sorted(
        map(str, map(Requirement, repeated))
    )
