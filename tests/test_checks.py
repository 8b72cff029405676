"""pytest tests/test_checks.py: wrong settings and data are answered with what to do.

What is malformed (files that are broken, settings of another kind) is in test_bad_input.py.
"""

import copy
import json
import os
import re
import shutil

import pytest
import torch

import architectures
import checks
import model
from utils import PROJECT, UserError, compose

# Overrides of the quickstart, and a part of the message that they must be answered with.
SETTINGS = [
    ("num_rounds=abc", "num_rounds=abc: a whole number is needed"),
    ("num_rounds=2.5", "num_rounds=2.5: a whole number is needed"),
    ("num_rounds=0", "num_rounds=0: it must be 1 or more"),
    ("num_clients=0", "num_clients=0: it must be 1 or more"),
    ("seed=-1", "seed=-1: it must be 0 to 4294967295"),
    ("verbose=maybe", "verbose=maybe: take true or false"),
    ("strategy.fraction_fit=0", "strategy.fraction_fit=0: it must be above 0"),
    ("strategy.fraction_fit=1.5", "fraction_fit=1.5: it must be above 0 and up to 1"),
    ("strategy.fraction_evaluate=1.5", "fraction_evaluate=1.5: it must be 0 to 1"),
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
    return checks.check(compose(f"experiment=quickstart {overrides}"))


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


def test_data_of_ones_own_passes(tmp_path):
    path = write({"/a.jsonl": GOOD, "/b.jsonl": GOOD}, tmp_path)
    cfg = check(f"{MINE} evaluate.exact_match=false dataset.path={path}")
    assert cfg["dataset"]["path"] == str(path)


@pytest.fixture
def model_folder(tmp_path):
    """The shipped model without its chat template and without weights."""
    tokenizer = copy.deepcopy(model.load_tokenizer("assets/tiny_llama"))
    tokenizer.chat_template = None
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    shutil.copy(PROJECT / "assets/tiny_llama/config.json", folder)
    return folder


def test_chat_template_that_the_tokenizer_lacks_is_answered(model_folder):
    shutil.copy(PROJECT / "assets/tiny_llama/model.safetensors", model_folder)
    check(f"model.name={model_folder}")
    with pytest.raises(UserError, match="this model's tokenizer has no chat template"):
        check(f"model.name={model_folder} dataset.template=chat")


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


def test_a_template_of_tokens_that_the_base_lacks_is_answered(base_with):
    overrides = base_with(mask_token="<turn>")
    check(overrides)  # nothing but the template would write it
    folder = overrides.split()[0].removeprefix("model.name=")
    with open(f"{folder}/chat_template.jinja", "w") as file:
        file.write("{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}")
    model.load_tokenizer.cache_clear()
    with pytest.raises(UserError, match="the template of its tokenizer has token 2048"):
        check(f"{overrides} dataset.template=chat")


@pytest.mark.parametrize("token", [None, "<pad>", "<another>"])
def test_a_padding_token_is_one_that_the_base_has(token, base_with):
    overrides = base_with(pad_token=token)
    cfg = check(overrides)
    tokenizer = model.load_tokenizer(cfg["model"]["name"])
    assert 0 <= tokenizer.pad_token_id < 2048
