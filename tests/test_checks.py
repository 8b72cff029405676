"""pytest tests/test_checks.py: wrong settings and data are answered with what to do.

What is malformed (files that are broken, settings of another kind) is in test_bad_input.py.
"""

import copy
import dataclasses
import json
import os
import re
import shutil

import datasets
import pytest
import torch
from transformers import TrainingArguments

import architectures
import client
import model
import utils
from settings import preflight, schema
from settings.compose import compose
from utils import LIGER, PROJECT, UserError

# Overrides of the quickstart, and a part of the message that they must be answered with.
SETTINGS = [
    ("num_rounds=abc", "num_rounds=abc: a whole number is needed"),
    ("num_rounds=2.5", "num_rounds=2.5: a whole number is needed"),
    ("num_rounds=0", "num_rounds=0: it must be 1 or more"),
    ("num_clients=0", "num_clients=0: it must be 1 to 1000000"),
    ("seed=-1", "seed=-1: it must be 0 to 4294967295"),
    ("verbose=maybe", "verbose=maybe: take true or false"),
    ("strategy.fraction_fit=0", "strategy.fraction_fit=0: it must be above 0"),
    ("strategy.fraction_fit=1.5", "fraction_fit=1.5: it must be above 0 and up to 1"),
    ("strategy.fraction_evaluate=1.5", "fraction_evaluate=1.5: it must be 0 to 1"),
    # A negative number is taken by Flower, and leads away from the mean or does nothing.
    (
        "strategy=fedprox strategy.proximal_mu=-1",
        "proximal_mu=-1: it must be 0 or more",
    ),
    ("strategy=fedavgm strategy.server_learning_rate=-1", "must be 0 or more"),
    # A word is true to Python.
    ("peft=dora 'peft.use_dora=\"false\"'", "peft.use_dora=false: take true or false"),
    # What partitioners answer with errors of their own.
    ("partitioner.num_partitions=2.5", "num_partitions=2.5: a whole number is needed"),
    ("partitioner=clusters partitioner.columns=x", "ClusterPartitioner refuses its"),
    ("sharing._target_=methods.sharing.Kept", "Kept is no adapter"),
    ("strategy._target_=methods.aggregate.Reply", "Reply is no aggregation"),
    ("optimized_metric=trian_loss", "summary.json has no such key"),
    ("model.gradient_checkpointing=1", "take true, false or auto"),
    ("mode=local baseline.clients=true", "take 1 or all"),
    ("partitioner=natural partitioner.partition_by=[output]", "text is needed"),
    (
        "partitioner=dirichlet partitioner.min_partition_size=x",
        "DirichletPartitioner cannot divide",
    ),
    ("model.quantization=5", "model.quantization=5: take 4, 8 or null"),
    ("model.quantization=4.0", "model.quantization=4.0: take 4, 8 or null"),
    ("train.seq_length=1", "train.seq_length=1: it must be 2 or more"),
    ("train.padding_side=up", "train.padding_side=up: take left or right"),
    ("train.learning_rate_max=-1e-3", "learning_rate_max=-0.001: it must be 0 or more"),
    ("train.learning_rate_min=-1e-3", "learning_rate_min=-0.001: it must be 0 or more"),
    # transformers.TrainingArguments
    ("+train.training_arguments.learning_rate=-1", "training_arguments.learning_rate"),
    (
        "+train.training_arguments.weight_deca=0.1",
        "weight_deca: transformers.TrainingArguments has no such field. "
        "Did you mean weight_decay?",
    ),
    (
        "+train.training_arguments.output_dir=/tmp",
        "train.training_arguments.output_dir is set by hydra.run.dir here",
    ),
    (
        "+train.training_arguments.gradient_checkpointing=true",
        "is set by model.gradient_checkpointing here",
    ),
    (
        "train.training_arguments.save_strategy=steps",
        "save_strategy=steps: take no (adapters are saved by train.save_every_round)",
    ),
    (
        "train.training_arguments.report_to=tensorboard",
        "take null or none (a tracker is",
    ),
    ("+train.training_arguments.optim=galore_adamw", "install `galore_torch`"),
    ("+train.training_arguments.optim=lomo", "install `lomo_optim`"),
    ("+train.training_arguments.optim=schedule_free_adamw", "install `schedulefree`"),
    (
        "train.training_arguments.lr_scheduler_type=reduce_lr_on_plateau",
        "requires an eval strategy",
    ),
    (
        "+train.training_arguments.warmup_steps=3",
        "warmup_steps=3 changes nothing with optim=adamw_torch_fused and "
        "lr_scheduler_type=constant",
    ),
    (
        "+train.training_arguments.optim=sgd +train.training_arguments.adam_beta1=0.5",
        "adam_beta1=0.5 changes nothing with optim=sgd",
    ),
    ("+train.training_arguments.adam_beta2=1.5", "Invalid beta parameter"),
    ("+train.training_arguments.weight_decay=-1", "weight_decay=-1: it must be 0"),
    ("train.training_arguments.lr_scheduler_type=zigzag", "zigzag is not a valid"),
    ("train.training_arguments.max_steps=abc", "max_steps"),
    (
        "train.training_arguments.per_device_train_batch_size=0",
        "per_device_train_batch_size",
    ),
    (
        "train.training_arguments.gradient_accumulation_steps=0",
        "gradient_accumulation_steps",
    ),
    # the machine
    pytest.param(
        "client_resources.num_gpus=1",
        "num_gpus=1, but there is no CUDA device here. To try the app without one: "
        "python main.py experiment=quickstart",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"),
    ),
    ("client_resources.num_gpus=1000", "client_resources.num_gpus=1000, but there"),
    (
        f"client_resources.num_cpus={os.cpu_count() + 1}",
        f"Set client_resources.num_cpus={os.cpu_count()} or less",
    ),
    # the strategy
    ("strategy=fedtrimmedavg strategy.beta=0.7", "`beta` must be in the range"),
    (
        "strategy=bulyan num_clients=10 strategy.fraction_fit=0.6",
        "strategy.fraction_fit=0.6 of num_clients=10 are 6 clients a round; Bulyan "
        "with num_malicious_nodes=1 needs 7",
    ),
    ("strategy._target_=os.system", "os.system"),
    # the adapter
    ("model.lora.target_modules=[nothing]", "Target modules {'nothing'} not found"),
    ("model.lora.peft_lora_r=0", "model.lora.peft_lora_r=0: it must be 1 or more"),
    ("model.lora.peft_lora_dropout=-1", "peft_lora_dropout"),
    ("peft._target_=os.system", "_target_=os.system is not a class of peft"),
    (
        "peft=prefix model.gradient_checkpointing=true",
        "PREFIX_TUNING does not work with gradient checkpointing",
    ),
    # the model
    (
        "model.name=nobody/nothing",
        "model.name=nobody/nothing is neither a local folder nor reachable on the hub",
    ),
    # the data
    (
        "dataset.path=null dataset.name=nobody/nothing evaluate.exact_match=false",
        "nobody/nothing is neither a local folder nor reachable on the hub",
    ),
    (
        "dataset.path=null dataset.name=text evaluate.exact_match=false",
        "dataset.name=text: a dataset of the hub has a name like owner/name",
    ),
    ("dataset=local", "dataset.path must be given: dataset.path=..."),
    ("dataset.path=/nowhere.jsonl", "/nowhere.jsonl: there is no such file or folder"),
    ("dataset.path=main.py", "no data file here. Known: .json, .jsonl, .csv, .parquet"),
    ("dataset.path=5", "dataset.path=5"),
    (
        "dataset.template=llama",
        "dataset.template=llama is unknown: take alpaca, vicuna, chat",
    ),
    (
        "dataset.columns.output=nothing",
        "no column 'nothing' (dataset.columns, dataset.label). "
        "It has: instruction, input, output, category",
    ),
    (
        "dataset.test_path=null",
        "exact_match, every_round and choices need test questions",
    ),
    ("dataset.test_path=/nowhere.jsonl", "dataset.test_path=/nowhere.jsonl"),
    (
        "partitioner._target_=os.system",
        "_target_=os.system is not a class of flwr_datasets.partitioner",
    ),
]

ROW = {"question": "q", "context": "i", "answer": "a", "topic": "t"}
ROWS = [ROW | {"topic": "xyz"[i % 3]} for i in range(12)]
LINES = [json.dumps(row) + "\n" for row in ROWS]
GOOD = "".join(LINES)
BROKEN = '{"question": "q", "answer": a}\n'
CSV = "question,context,answer,topic\n" + "q,i,a,t\n" * 12
# What the file (or the files of the folder) `data` holds; more overrides; the message.
DATA = {
    "csv_column": (
        {".csv": CSV.replace("question", "ask")},
        "",
        r"no column 'question' \(dataset.columns, dataset.label\). "
        r"It has: ask, context, answer, topic",
    ),
    "jsonl_column": (
        {".jsonl": GOOD.replace("answer", "reply")},
        "",
        r"no column 'answer' \(dataset.columns, dataset.label\). "
        r"It has: question, context, reply, topic",
    ),
    "too_many_clients": ({".csv": CSV}, "num_clients=13", "num_clients=12 or less"),
    "natural_label": (
        {".jsonl": GOOD},
        "partitioner=natural dataset.label=colour",
        "no column 'colour' .* It has: question, context, answer, topic",
    ),
    "dirichlet_label": (
        {".jsonl": GOOD},
        "partitioner=dirichlet dataset.label=colour",
        "no column 'colour' .* It has: question, context, answer, topic",
    ),
    "natural_number": (
        {".jsonl": GOOD},
        "partitioner=natural dataset.label=topic num_clients=4",
        "set num_clients=3",
    ),
    "dirichlet_shares": (
        {".jsonl": GOOD},
        "partitioner=dirichlet dataset.label=topic num_clients=4",
        "DirichletPartitioner cannot divide .* among 4 clients",
    ),
    # The first client has enough, and another has not.
    "one_record_of_a_label": (
        {".jsonl": GOOD + json.dumps(ROW | {"topic": "zz"})},
        "partitioner=natural dataset.label=topic num_clients=4 "
        "strategy.fraction_evaluate=0.5",
        "client 3 would have 1 records, and 2 are needed",
    ),
    "no_answer_for_a_label": (
        {
            ".jsonl": GOOD.replace(
                '"answer": "a", "topic": "z"', '"answer": "", "topic": "z"'
            )
        },
        "partitioner=natural dataset.label=topic num_clients=3",
        r"client \d would train, or be evaluated, on records that have no answer",
    ),
    "size_shares": (
        {".jsonl": GOOD},
        "partitioner=size num_clients=12",
        "LinearPartitioner cannot divide .* among 12 clients",
    ),
    # A client's only record cannot be both trained on and held back.
    "nothing_left_to_train_on": (
        {".jsonl": GOOD},
        "num_clients=12 strategy.fraction_evaluate=0.5",
        "num_clients|fraction_evaluate",
    ),
}
MINE = (
    "dataset=local dataset.columns.instruction=question dataset.columns.input=context "
    "dataset.columns.output=answer num_clients=2 "
)


def check(overrides):
    return preflight.check(compose(f"experiment=quickstart {overrides}"))


def write(files, folder):
    """Write `files`, named by what follows `data`; return the data file or folder."""
    for name, text in files.items():
        path = folder / f"data{name}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="latin-1")
    return path.parent if name.startswith("/") else path


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "num_clients=1 num_rounds=1 strategy.fraction_fit=1.0 model.quantization=8",
        "model.quantization=null strategy.fraction_fit=1 client_resources.num_cpus=1.0",
        "strategy=bulyan num_clients=10 strategy.fraction_fit=0.7",
        "dataset.template=chat peft=prefix",
        "train.learning_rate_min=0 +train.training_arguments.weight_decay=0.01",
    ],
)
def test_good_settings_pass_and_come_back_as_a_plain_dict(overrides):
    cfg = check(overrides)
    assert json.loads(json.dumps(cfg)) == cfg  # no DictConfig and no ??? in it
    assert cfg["peft"].get("r", 16) == cfg["model"]["lora"]["peft_lora_r"] == 16


# Each field that is taken, by a value that is not its default, and others that it needs.
EFFECTS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "num_train_epochs": {"num_train_epochs": 0.02, "max_steps": -1},
    "learning_rate": 1e-4,
    "max_grad_norm": 1e-3,
    "optim": "adamw_8bit",
    "optim_args": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "weight_decay": 0.5,
    "neftune_noise_alpha": 5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.1,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.5},
    },
    "warmup_steps": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
}
# What is taken and changes no adapter.
NO_EFFECT = {
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "logging_strategy": "no",
    "logging_first_step": True,
    "torch_empty_cache_steps": 1,
    "save_steps": 200,
    "save_total_limit": 10,
}
GPU_ONLY = {"use_liger_kernel"}  # tests/test_cuda.py


@pytest.mark.slow
def test_each_argument_that_is_taken_has_its_effect(configure):
    """As a client trains by it; and as `transformers` has none of what is not taken."""
    assert {*EFFECTS, *NO_EFFECT} | GPU_ONLY == {*schema.TrainingArguments.model_fields}
    before = configure()
    first = client.initial_adapter(before)

    def trained(given: dict) -> tuple:
        cfg = copy.deepcopy(before)
        cfg["train"]["training_arguments"] |= given
        schema.check_training_arguments(cfg)
        state, metrics = client.train(cfg, first, partition=0, server_round=1)
        return metrics["train_loss"], torch.cat([x.flatten() for x in state.values()])

    loss, weights = trained({})
    for name, value in (EFFECTS | NO_EFFECT).items():
        given = value if isinstance(value, dict) else {name: value}
        now, moved = trained(given)
        assert moved.isfinite().all(), name
        if name in NO_EFFECT:
            assert now == pytest.approx(loss), name  # summed in other parts
            assert moved.equal(weights), name
        else:
            others = {other: given[other] for other in given if other != name}
            assert not moved.equal(weights), name
            if others and name not in ("lr_scheduler_kwargs", "num_train_epochs"):
                assert not moved.equal(trained(others)[1]), name


def test_kernels_of_a_gpu_are_refused_on_a_cpu_and_where_they_are_not(
    configure, monkeypatch
):
    cfg = configure("+train.training_arguments.use_liger_kernel=false")
    schema.check_kernels(cfg)
    cfg.train.training_arguments["use_liger_kernel"] = True
    with pytest.raises(UserError, match="run on a GPU, and clients train on the CPU"):
        schema.check_kernels(cfg)
    monkeypatch.setattr(utils, "find_spec", lambda name: None)
    cfg.client_resources["num_gpus"] = 1
    with pytest.raises(UserError, match=f"is not installed: pip install {LIGER}"):
        schema.check_kernels(cfg)


def test_every_other_argument_is_refused(configure):
    """Also one that a later transformers brings."""

    @dataclasses.dataclass
    class Later(TrainingArguments):
        new_in_a_later_release: int = 0

    cfg = configure()
    given = cfg["train"]["training_arguments"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "TrainingArguments", Later)
        for field in dataclasses.fields(Later):
            if field.name in schema.TrainingArguments.model_fields:
                continue
            changed = {**given, field.name: True}
            with pytest.raises(UserError, match=f"{field.name} is (set|not taken)"):
                schema.check_training_arguments(
                    cfg | {"train": cfg.train | {"training_arguments": changed}}
                )
    named = " ".join(schema.INSTEAD.values()).split()
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {*named, *schema.TrainingArguments.model_fields} <= fields
    assert len({*named, *schema.TrainingArguments.model_fields}) == len(named) + len(
        schema.TrainingArguments.model_fields
    )


@pytest.mark.slow
def test_null_stands_for_an_argument_that_is_not_given(configure):
    """As published: `output_dir: null # to be set by hydra`, and a learning rate likewise."""
    nulls = ("output_dir", "learning_rate", "hub_token", "warmup_steps")
    cfg = configure(*(f"+train.training_arguments.{name}=null" for name in nulls))
    given, plain = (client.training_arguments(c, 1, 0) for c in (cfg, configure()))
    assert given.learning_rate == plain.learning_rate
    assert given.to_dict() | {"logging_dir": 0} == plain.to_dict() | {"logging_dir": 0}


@pytest.mark.parametrize(("overrides", "message"), SETTINGS)
def test_wrong_setting_is_answered(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check(overrides)


@pytest.mark.filterwarnings("ignore:The specified min_partition_size")
@pytest.mark.parametrize("case", DATA)
def test_wrong_data_is_answered(case, tmp_path):
    files, overrides, message = DATA[case]
    path = write(files, tmp_path)
    with pytest.raises(UserError, match=message):
        check(f"{MINE} evaluate.exact_match=false dataset.path={path} {overrides}")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({".jsonl": ""}, "data.jsonl: no records here"),
        ({".jsonl": "".join([*LINES[:4], BROKEN])}, "data.jsonl, line 5: broken JSON"),
        (
            {".csv": CSV.replace("answer", "reply")},
            r"data.csv, line 2: no column 'answer'",
        ),
    ],
    ids=["empty", "broken", "column"],
)
def test_wrong_test_data_is_answered(files, message, tmp_path):
    (train := tmp_path / "train.jsonl").write_text(GOOD)
    test = write(files, tmp_path)
    with pytest.raises(UserError, match=message):
        check(f"{MINE} dataset.path={train} dataset.test_path={test}")


@pytest.mark.slow
def test_data_of_ones_own_passes(tmp_path):
    path = write({"/a.jsonl": GOOD, "/b.jsonl": GOOD}, tmp_path)
    cfg = check(f"{MINE} evaluate.exact_match=false dataset.path={path}")
    assert cfg["dataset"]["path"] == str(path)


def asked(count, start=0, **more):
    """Lines with questions of their own."""
    return "".join(
        json.dumps(ROW | {"question": f"q{i}"} | more) + "\n"
        for i in range(start, start + count)
    )


LONG = "word " * 200
# What is trained on and tested with, and the message.
QUESTIONS = [
    (
        asked(12),
        asked(3, 20, question=LONG),
        "None of the 3 test questions can be scored",
    ),
    (asked(12), asked(3, 20, answer=""), "None of the 3 test questions can be scored"),
    (asked(12), asked(3), "All 3 test questions also stand in the training data"),
    (GOOD, LINES[0], "All 1 test questions also stand in the training data"),
]


@pytest.mark.parametrize(("train", "test", "message"), QUESTIONS)
@pytest.mark.parametrize("wanted", ["exact_match=true", "every_round=1", "choices=all"])
def test_questions_that_measure_nothing_are_refused(
    wanted, train, test, message, tmp_path
):
    test = "".join(
        json.dumps(row | {"all": [row["answer"], "other"]}) + "\n"
        for row in map(json.loads, test.splitlines())
    )
    (tmp_path / "train.jsonl").write_text(train)
    (tmp_path / "test.jsonl").write_text(test)
    with pytest.raises(UserError, match=message):
        check(
            f"{MINE} dataset.path={tmp_path}/train.jsonl evaluate.exact_match=false "
            f"dataset.test_path={tmp_path}/test.jsonl evaluate.{wanted}"
        )


@pytest.mark.slow
def test_questions_that_fall_out_or_are_known_are_counted(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text(asked(12))
    test = (
        asked(2) + asked(3, 20) + asked(1, 30, answer=" ") + asked(1, 40, context=LONG)
    )
    (tmp_path / "test.jsonl").write_text(test)
    check(
        f"{MINE} dataset.path={tmp_path}/train.jsonl "
        f"dataset.test_path={tmp_path}/test.jsonl"
    )
    assert capsys.readouterr().out.splitlines() == [
        "2 of 7 test questions also stand in the training data.",
        "2 of 7 test questions are left out: they have no answer, or are longer than "
        "train.seq_length=128 tokens.",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["the file", "its folder", "a link", "a hard link"])
def test_what_is_tested_with_is_not_trained_on(way, tmp_path):
    (folder := tmp_path / "data").mkdir()
    (folder / "one.jsonl").write_text(asked(12))
    (folder / "two.jsonl").write_text(asked(5, 20))
    path, test = folder / "two.jsonl", folder / "two.jsonl"
    if way == "its folder":
        path = folder
    elif way == "a link":
        (path := tmp_path / "other.jsonl").symlink_to(test)
    elif way == "a hard link":
        (path := tmp_path / "other.jsonl").hardlink_to(test)
    with pytest.raises(UserError, match=rf"{folder}/two.jsonl as well\. Name a file"):
        check(f"{MINE} dataset.path={path} dataset.test_path={test}")
    check(f"{MINE} dataset.path={folder}/one.jsonl dataset.test_path={test}")


@pytest.mark.parametrize("files", [{".jsonl": BROKEN}, {".jsonl": '{"messages": 5}\n'}])
def test_a_plan_is_refused_what_the_run_would_be(files, tmp_path):
    path = write(files, tmp_path)
    with pytest.raises(UserError, match=r"data\.jsonl, line 1: "):
        check(f"{MINE} evaluate.exact_match=false dataset.path={path} dry_run=true")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    path = write({".jsonl": GOOD}, tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nowhere/datasets")
    with pytest.raises(UserError) as told:
        check(f"{MINE} evaluate.exact_match=false dataset.path={path}")
    assert (
        "the cache /proc/nowhere/datasets cannot be used (No such file or directory"
        in str(told.value)
    )
    assert "HF_HOME" in str(told.value)


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("/" + "a" * 300, "File name too long"),
        ("main.py/data.jsonl", "Not a directory"),
    ],
)
def test_a_path_that_cannot_be_looked_at_is_told_why(path, cause):
    with pytest.raises(UserError, match=f"cannot be read: {cause}"):
        check(f"{MINE} evaluate.exact_match=false dataset.path={path}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = write({".jsonl": GOOD}, tmp_path)
    path.chmod(0)
    with pytest.raises(
        UserError, match=r"data\.jsonl cannot be read: Permission denied"
    ):
        check(f"{MINE} evaluate.exact_match=false dataset.path={path}")


@pytest.fixture
def model_folder(tmp_path):
    """The shipped model without its chat template and without weights."""
    tokenizer = copy.deepcopy(model.load_tokenizer("assets/tiny_llama"))
    tokenizer.chat_template = None
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    shutil.copy(PROJECT / "assets/tiny_llama/config.json", folder)
    return folder


@pytest.mark.slow
def test_chat_template_that_the_tokenizer_lacks_is_answered(model_folder):
    shutil.copy(PROJECT / "assets/tiny_llama/model.safetensors", model_folder)
    check(f"model.name={model_folder}")
    with pytest.raises(UserError, match="this model's tokenizer has no chat template"):
        check(f"model.name={model_folder} dataset.template=chat")


@pytest.mark.slow
def test_chat_template_that_fails_is_answered(model_folder):
    shutil.copy(PROJECT / "assets/tiny_llama/model.safetensors", model_folder)
    template = "{{ raise_exception('system needed') }}"
    (model_folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError) as told:
        check(f"model.name={model_folder} dataset.template=chat")
    assert str(told.value) == (
        "dataset.template=chat: this model's chat template fails (TemplateError: system "
        "needed). Take dataset.template=alpaca or vicuna."
    )


@pytest.fixture
def base_with(tmp_path):
    """A tiny base of so many tokens with the shipped tokenizer, otherwise set."""

    def make(tokens: int = 2048, **special: str | None) -> str:
        folder = architectures.save("llama", tmp_path / "base", vocab_size=tokens)
        tokenizer = copy.deepcopy(model.load_tokenizer("assets/tiny_llama"))
        for name, token in special.items():
            setattr(tokenizer, name, token)
        if added := [token for token in special.values() if token]:
            tokenizer.add_tokens(added, special_tokens=True)
        tokenizer.save_pretrained(folder)
        model.load_tokenizer.cache_clear()
        return f"model.name={folder} model.quantization=null"

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"eos_token": None}, "its tokenizer has no eos_token"),
        ({"eos_token": "<end>"}, "the eos_token of its tokenizer has token 2048"),
        ({"bos_token": "<begin>"}, "the bos_token of its tokenizer has token 2048"),
        ({"tokens": 1000}, "the vocabulary of its tokenizer has token 2047"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_base_is_answered(made, message, base_with):
    with pytest.raises(UserError, match=message):
        check(base_with(**made))


@pytest.mark.slow
def test_a_template_of_tokens_that_the_base_lacks_is_answered(base_with):
    overrides = base_with(mask_token="<turn>")
    check(overrides)  # nothing but the template would write it
    folder = overrides.split()[0].removeprefix("model.name=")
    with open(f"{folder}/chat_template.jinja", "w") as file:
        file.write("{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}")
    model.load_tokenizer.cache_clear()
    with pytest.raises(UserError, match="the template of its tokenizer has token 2048"):
        check(f"{overrides} dataset.template=chat")


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, "<pad>", "<another>"])
def test_a_padding_token_is_one_that_the_base_has(token, base_with):
    overrides = base_with(pad_token=token)
    cfg = check(overrides)
    tokenizer = model.load_tokenizer(cfg["model"]["name"])
    assert 0 <= tokenizer.pad_token_id < 2048
