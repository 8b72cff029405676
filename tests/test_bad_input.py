"""pytest tests/test_bad_input.py: what is malformed, how it is made, and the message it gets.

The table is in nine parts: SETTINGS, DATA, ADAPTERS, BASES, RUNS, CHECKPOINTS, NODES,
COMMANDS and ASKED. Values out of their range, and data that does not suit the settings, are in
test_checks.py; what a run may not ask of a node is in test_node.py.
"""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hydra.errors import CompactHydraException
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dataset
import model
import test as ask
from methods import aggregate
from methods.base import Contribution
from node import permit
from server import checkpoint, journal, rounds
from settings import preflight, schema
from settings.compose import compose, record, resolve, resumed
from utils import PROJECT, Refusal, UserError, write_json

QUICK = "experiment=quickstart evaluate.exact_match=false"
CPU = torch.device("cpu")
EVERY = list(hypothesis.HealthCheck)

# --- what the inputs are made of -----------------------------------------------------------

Made = Callable[[Path], Any]


class Trap:
    """Leaves a file in the working directory when it is unpickled."""

    def __reduce__(self) -> tuple:
        return open, ("ran", "w")


PICKLE = pickle.dumps(Trap())
CODE = "open('ran', 'w')\n"
ROW = {"instruction": "q", "input": "i", "output": "a"}
LINE = json.dumps(ROW) + "\n"
LINES = LINE * 12
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
INF = float("inf")
ARRAY = json.dumps([ROW] * 12, indent=1)
CSV = "instruction,input,output\n" + "q,i,a\n" * 12


def lines(**values: Any) -> str:
    return LINES + json.dumps(ROW | values) + "\n"


def parquet(*columns: tuple[str, Any]) -> bytes:
    """A file of one record, whose columns may have the same name."""
    names, values = zip(*columns, strict=True)
    table = pyarrow.table([[value] for value in values], names)
    pyarrow.parquet.write_table(table, sink := pyarrow.BufferOutputStream())
    return sink.getvalue().to_pybytes()


def put(name: str, content: str | bytes = "") -> Made:
    def made(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)

    return made


def link(name: str, to: str) -> Made:
    return lambda folder: (folder / name).symlink_to(to)


def folder_named(name: str) -> Made:
    return lambda folder: (folder / name).mkdir(parents=True)


def remove(*names: str) -> Made:
    def made(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return made


def halve(name: str) -> Made:
    def made(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return made


def change(name: str, **values: Any) -> Made:
    """Change keys of a JSON file, or those of an inner object: `model=dict(name=...)`."""

    def made(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for key, value in values.items():
            inner = isinstance(value, dict) and isinstance(content.get(key), dict)
            content[key] = content[key] | value if inner else value
        (folder / name).write_text(json.dumps(content))

    return made


def drop(name: str, key: str) -> Made:
    def made(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        del content[key]
        (folder / name).write_text(json.dumps(content))

    return made


def lacks(name: str, key: str) -> Made:
    """Take a key out of a JSON file."""

    def made(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        del content[key]
        (folder / name).write_text(json.dumps(content))

    return made


def tensors(name: str, alter: Callable[[dict], dict]) -> Made:
    def made(folder: Path) -> None:
        state = {k: v.clone() for k, v in load_file(folder / name).items()}
        save_file(alter(state), folder / name)

    return made


def first(alter: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    def altered(state: dict) -> dict:
        name = min(state)
        return state | {name: alter(state[name])}

    return altered


def both(*steps: Made) -> Made:
    def made(folder: Path) -> None:
        for step in steps:
            step(folder)

    return made


# --- the table --------------------------------------------------------------------------------

COUNTS = ("bytes_down", "bytes_up", "peak_memory_client", "peak_memory_server")
ENTRY = dict.fromkeys(("round", "train_loss", "sampled", *COUNTS), 1) | {
    "failures": [],
    "clients": [{"partition": 0, "num-examples": 8, "train_loss": 1}],
}
TOLD = {"rounds": [ENTRY, ENTRY | {"round": 2, "train_loss": 2.5}]}
WEIGHTS, ABOUT = "adapter_model.safetensors", model.ABOUT
NEWEST, OLDER = "checkpoints/000002", "checkpoints/000001"

# What is wrong, the overrides of the quickstart, a part of the message.
SETTINGS = [
    ("no number", "num_rounds=nan", "num_rounds=nan: a whole number is needed"),
    ("no value", "num_rounds=null", "num_rounds=null: a whole number is needed"),
    ("true for a number", "num_clients=true", "num_clients=true: a whole number is"),
    ("a list for a number", "num_rounds=[1]", "num_rounds=[1]: a whole number is"),
    (
        "an endless learning rate",
        "train.learning_rate_max=inf",
        "train.learning_rate_max=inf: a number is needed",
    ),
    (
        "an endless timeout",
        "train.round_timeout=inf",
        "train.round_timeout=inf: a number is needed",
    ),
    ("a seed for no generator", "seed=4294967296", "it must be 0 to 4294967295"),
    (
        "a schedule that rises",
        "train.learning_rate_max=1e-5 train.learning_rate_min=1e-4",
        "train.learning_rate_min=0.0001 is above train.learning_rate_max=1e-05",
    ),
    (
        "a value for a section",
        "train=5",
        "train=5: train is a section, not a value. Set",
    ),
    (
        "a section away",
        "~comm",
        "comm is missing, a section. Set its keys: +comm.dtype=",
    ),
    (
        "no columns",
        "dataset.columns=null",
        "dataset.columns=null: dataset.columns is a section",
    ),
    (
        "an inner section away",
        "simulation.init_args=5",
        "simulation.init_args=5: simulation.init_args is a section, not a value",
    ),
    (
        "a setting away",
        "~train.seq_length",
        "train.seq_length is missing, and has no default",
    ),
    ("a mistyped setting", "train.seq_lenght=5", "Could not override 'train.seq_leng"),
    ("a mistyped choice", "model=tinny", "Could not find 'model/tinny'"),
    (
        "a choice outside its group",
        "model=../config",
        "In 'model/../config': Could not find 'model/",
    ),
    (
        "a choice outside conf",
        "experiment=../../README",
        "Could not find 'experiment/../../README'",
    ),
    ("no template", "dataset.template=null", "dataset.template=null: text is needed"),
    ("two templates", "dataset.template=[a,b]", '["a", "b"]: text is needed'),
    (
        "no answers",
        "dataset.columns.output=null",
        "columns.output=null: text is needed",
    ),
    ("two paths", "dataset.path=[a,b]", 'dataset.path=["a", "b"]: text is needed'),
    ("a number for a name", "model.name=5", "text is needed. A number takes quotes"),
    ("no name", "model.name=''", "model.name=: text is needed"),
    ("no class", "~peft._target_", "peft._target_ is missing, and has no default"),
    ("a number to resume", "resume=5", "resume=5: text is needed"),
    ("two runs to resume", "resume=[a,b]", 'resume=["a", "b"]: text is needed'),
    (
        "a word for the strategy's number",
        "strategy=fedadam strategy.eta=fast",
        "strategy.eta=fast: a number is needed",
    ),
    (
        "a key that the strategy has not",
        "+strategy.speed=1",
        "unexpected keyword argument 'speed'",
    ),
    (
        "a word for the Trainer's number",
        "+train.training_arguments.weight_decay=much",
        "train.training_arguments.weight_decay=much: a number is needed",
    ),
    (
        "a word for true",
        "+train.training_arguments.logging_first_step=maybe",
        "train.training_arguments.logging_first_step=maybe: take true or false",
    ),
    ("a word for the rank", "peft.r=abc", "peft.LoraConfig on assets/tiny_llama: "),
    ("layers by number", "peft.target_modules=5", "'int' object is not iterable"),
    (
        "a key that PEFT has not",
        "+peft.rang=4",
        "peft.LoraConfig refuses its settings: LoraConfig.__init__() got an unexpected",
    ),
    (
        "nothing to train",
        "peft=prefix peft.num_virtual_tokens=0",
        "peft.PrefixTuningConfig with these settings trains nothing",
    ),
    (
        "an adapter with a loss of its own",
        "+peft.monteclora_config={num_samples:4}",
        "peft.monteclora_config: it needs a term of the loss",
    ),
    (
        "an adapter that goes by the first batch",
        "+peft.velora_config={init_type:batch_average_once}",
        "whichever client's. Take batch_average or random.",
    ),
    (
        "code of another package",
        "+peft.megatron_config={a:1} +peft.megatron_core=code",
        "config.megatron_core='code' does not start with a valid prefix",
    ),
    (
        "no number for the partitioner",
        "partitioner=dirichlet partitioner.alpha=-1",
        "DirichletPartitioner refuses its settings: Alpha values should be strictly",
    ),
    ("no name of the hub", "model.name=a/b/c", "model.name=a/b/c is neither a local"),
]

# What is wrong, the file (or the folder `data`) to train on, a part of the message.
DATA = [
    # json
    ("a truncated array", put("data.json", ARRAY[:130]), "line 13: broken JSON"),
    ("an empty array", put("data.json", "[]"), "data.json: no records here"),
    (
        "no answers at all",
        put("data.jsonl", (json.dumps(ROW | {"output": " "}) + "\n") * 12),
        "no record has an answer in 'output'",
    ),
    ("an object of records", put("data.json", json.dumps({"data": [ROW]})), "an array"),
    (
        "an object of columns",
        put("data.json", json.dumps({name: [x] * 9 for name, x in ROW.items()})),
        "data.json: an array of objects is needed, or one object a line",
    ),
    ("a number", put("data.json", "5"), "data.json: an array of objects is needed"),
    ("records without names", put("data.json", '[["q", "a"]]'), "record 1: an object"),
    (
        "a list in a record",
        put("data.json", json.dumps([ROW | {"output": ["a", "b"]}])),
        "record 1: 'output' holds a value of type list; text or a number is needed",
    ),
    (
        "brackets without end",
        put("data.json", "[" * 100_000),
        "data.json, record 1: nested too deeply (recursion depth)",
    ),
    (
        "a deep record after others",
        put("data.json", ARRAY[:-2] + ',{"instruction": ' + "[" * 100_000),
        "data.json, record 13: nested too deeply",
    ),
    (
        "a long number after others",
        put("data.json", ARRAY[:-2] + f',{{"instruction": {"9" * 5000}}}]'),
        "data.json, record 13: broken JSON (Exceeds the limit (4300 digits)",
    ),
    ("no comma", put("data.json", ARRAY[:-2] + "{}]"), "line 61: broken JSON (Expec"),
    ("more behind it", put("data.json", ARRAY + "{}"), "line 62: broken JSON (Extra"),
    (
        "an endless number",
        put("data.json", ARRAY[:-2] + f",{json.dumps(ROW | {'output': INF})}]"),
        "data.json, record 13: 'output' holds inf, which is no number of anything",
    ),
    ("blanks", put("data.json", " \n\n"), "data.json: no records here"),
    # jsonl
    ("an empty file", put("data.jsonl"), "data.jsonl: no records here"),
    (
        "a broken third line",
        put("data.jsonl", LINE * 2 + "{broken\n" + LINES),
        "data.jsonl, line 3: broken JSON",
    ),
    (
        "two records on a line",
        put("data.jsonl", LINE.strip() * 2),
        "line 1: broken JSON",
    ),
    ("an array on a line", put("data.jsonl", json.dumps([ROW])), "line 1: an object"),
    (
        "an object in a record",
        put("data.jsonl", lines(output={"text": "a"})),
        "line 13: 'output' holds a value of type dict",
    ),
    (
        "a record without a column",
        put("data.jsonl", LINES + '{"instruction": "q", "input": ""}\n'),
        "line 13: no column 'output' (dataset.columns, dataset.label). It has: inst",
    ),
    (
        "half a character",
        put("data.jsonl", lines(instruction="\ud800")),
        "line 13: 'instruction' holds half a character (surrogates not allowed)",
    ),
    (
        "a number without end",
        put(
            "data.jsonl", f'{{"instruction": {"9" * 5000}, "input": "", "output": ""}}'
        ),
        "line 1: broken JSON (Exceeds the limit (4300 digits)",
    ),
    (
        "a deep line",
        put("data.jsonl", LINES + '{"a":' * 100_000),
        "line 13: nested too deeply",
    ),
    (
        "a number too large for any",
        put("data.jsonl", LINES + '{"instruction": -1e999, "input": "", "output": ""}'),
        "line 13: 'instruction' holds -inf",
    ),
    (
        "other columns than are named",
        put("data.jsonl", '{"question": "q", "answer": "a"}\n' * 12),
        "line 1: no column 'input' or 'instruction' or 'output' (dataset.columns, "
        "dataset.label). It has: question, answer. Name them, as in "
        "dataset.columns.output=answer; dataset.columns.input=null where there is none",
    ),
    (
        "a name of half a character",
        put("data.jsonl", json.dumps({"\ud800": "q"})),
        "It has: \\ud800.",
    ),
    # chats
    (
        "no conversations",
        put("data.jsonl", json.dumps({"messages": "q"})),
        "line 1: 'messages' holds a text that is no list of turns",
    ),
    (
        "ShareGPT's conversations under another name",
        put("data.json", json.dumps([{"talk": [{"from": "gpt", "value": "a"}]}])),
        "record 1: 'talk' holds conversations: dataset.columns.messages=talk",
    ),
    (
        "a conversation in a column that is named",
        put("data.jsonl", lines(output=TURNS)),
        "line 13: 'output' holds conversations: dataset.columns.messages=output",
    ),
    (
        "messages of a stranger in parquet",
        put("data.parquet", parquet(("messages", [TURNS[0] | {"role": "bot"}]))),
        "record 1: 'messages', turn 1: the role 'bot' is unknown",
    ),
    # csv
    (
        "a comma in a text beside empty columns",
        put("data.csv", "instruction,input,output,\nq,i,a,\nq,i,a, b\n"),
        "data.csv, line 3: a field beyond the header's last name, 'output'",
    ),
    (
        "a semicolon without a word",
        put("data.csv", CSV.replace(",", ";")),
        "separate them by commas, or put a first line sep=;",
    ),
    (
        "a short line below sep=",
        put("data.csv", "sep=,\n" + CSV + "q,i\n"),
        "line 15: not as many fields",
    ),
    (
        "a quote that is not closed",
        put("data.csv", CSV + '"q,i,a\n' + "q,i,a\n"),
        "data.csv, line 15: broken CSV",
    ),
    ("a short line", put("data.csv", CSV + "q,i\n"), "line 14: not as many fields"),
    ("a long line", put("data.csv", CSV + "q,i,a,b\n"), "line 14: not as many fields"),
    ("no header", put("data.csv", "q,i,a\n" * 12), "It has: q, i, a"),
    (
        "another separator",
        put("data.csv", CSV.replace(",", ";")),
        "It has: instruction;",
    ),
    (
        "a column twice",
        put("data.csv", "instruction,input,output,output\n" + "q,i,a,b\n" * 12),
        "data.csv: two columns have the name 'output'",
    ),
    ("a header alone", put("data.csv", CSV[:25]), "data.csv: no records here"),
    # parquet
    (
        "a truncated parquet file",
        both(put("data.parquet", parquet(*ROW.items())), halve("data.parquet")),
        "data.parquet: broken parquet",
    ),
    ("text in its place", put("data.parquet", LINES), "data.parquet: broken parquet"),
    ("an empty one", put("data.parquet"), "data.parquet: broken parquet"),
    (
        "other columns",
        put("data.parquet", parquet(("text", "q"))),
        "record 1: no column 'input' or 'instruction' or 'output' (dataset.columns, "
        "dataset.label). It has: text. Name them, as in dataset.columns.output=answer; "
        "dataset.columns.input=null where there is none",
    ),
    (
        "a column of it twice",
        put("data.parquet", parquet(*ROW.items(), ("output", "b"))),
        "data.parquet: two columns have the name 'output'",
    ),
    (
        "bytes in a column",
        put("data.parquet", parquet(*(ROW | {"output": b"a"}).items())),
        "record 1: 'output' holds a value of type bytes",
    ),
    # encodings
    ("latin-1", put("data.csv", (CSV + "é,i,a\n").encode("latin-1")), "is not UTF-8"),
    ("UTF-16", put("data.jsonl", LINES.encode("utf-16")), "is not UTF-8 text"),
    (
        "UTF-16 without a mark",
        put("data.csv", CSV.encode("utf-16-le")),
        "data.csv, line 1: it holds NUL bytes, so it is damaged, or UTF-16",
    ),
    ("a NUL byte", put("data.csv", CSV + "q,i\0,a\n"), "line 14: it holds NUL bytes"),
    (
        "zeros after a crash",
        put("data.jsonl", LINES + "\0" * 99),
        "line 13: it holds NUL",
    ),
    ("an image", put("data.json", b"\x89PNG\r\n\x1a\n\0"), "is not UTF-8 text"),
    # files and folders
    ("a pickle", put("data.pkl", PICKLE), "data.pkl: no data file here. Known: .json"),
    ("a pickle as parquet", put("data.parquet", PICKLE), "broken parquet"),
    ("a pickle as json", put("data.json", PICKLE), "data.json is not UTF-8 text"),
    ("an archive", put("data.jsonl.gz", b"\x1f\x8b"), "no data file here"),
    ("an archive with a way out", put("data/..zip", b"PK"), "no data file here"),
    ("an empty folder", folder_named("data"), "no data file here"),
    ("hidden files alone", put("data/.a.jsonl", LINES), "no data file here"),
    (
        "data a folder deeper",
        put("data/train/a.jsonl", LINES),
        "no data file here. The folders in it are not looked into: did you mean ",
    ),
    (
        "an archive beside data",
        both(put("data/a.jsonl", LINES), put("data/b.jsonl.gz", b"\x1f\x8b")),
        "data: b.jsonl.gz may hold records, and would not be read",
    ),
    (
        "input that no record has",
        put("data.jsonl", '{"instruction": "q", "output": "a"}\n' * 12),
        "no column 'input' (dataset.columns, dataset.label). It has: instruction, ",
    ),
    (
        "two formats",
        both(put("data/a.json", ARRAY), put("data/b.jsonl", LINES)),
        "data: files of several formats",
    ),
    (
        "two kinds of columns",
        both(put("data/a.jsonl", LINES), put("data/b.jsonl", '{"text": "q"}')),
        "b.jsonl, line 1: no column 'input'",
    ),
    (
        "a folder with a file's name",
        folder_named("data/a.jsonl"),
        "data: a.jsonl is not a file, or a link that leads nowhere",
    ),
    (
        "a link that leads nowhere",
        both(folder_named("data"), link("data/a.jsonl", "/nowhere.jsonl")),
        "data: a.jsonl is not a file, or a link that leads nowhere",
    ),
    (
        "a link to itself",
        both(folder_named("data"), link("data/a.jsonl", "a.jsonl")),
        "data: a.jsonl is not a file, or a link that leads nowhere",
    ),
    (
        "a pipe",
        both(folder_named("data"), lambda here: os.mkfifo(here / "data/a.jsonl")),
        "data: a.jsonl is not a file, or a link that leads nowhere",
    ),
]

# What is wrong, what is done to a good adapter folder, a part of the message.
ADAPTERS = [
    ("no settings", remove("adapter_config.json"), "adapter_config.json is missing"),
    (
        "broken settings",
        put("adapter_config.json", "{"),
        "adapter_config.json cannot be used (JSONDecodeError",
    ),
    (
        "a list for settings",
        put("adapter_config.json", "[]"),
        "adapter_config.json cannot be used",
    ),
    (
        "an unknown method",
        change("adapter_config.json", peft_type="MAGIC"),
        "adapter_config.json cannot be used (KeyError: 'MAGIC')",
    ),
    (
        "no method",
        drop("adapter_config.json", "peft_type"),
        "missing required keys: {'peft_type'}",
    ),
    (
        "another method",
        change("adapter_config.json", peft_type="IA3"),
        "adapter tensors missing or unknown",
    ),
    (
        "another task",
        change("adapter_config.json", task_type="SEQ_CLS"),
        "it is for a model of another kind",
    ),
    (
        "a base class to import",
        change(
            "adapter_config.json",
            auto_mapping={"base_model_class": "X", "parent_library": "code"},
        ),
        "or names code to import",
    ),
    (
        "layers to import",
        change("adapter_config.json", megatron_config={"a": 1}, megatron_core="code"),
        "config.megatron_core='code' does not start with a valid prefix",
    ),
    (
        "a word for the rank",
        change("adapter_config.json", r="x"),
        "the adapter on this base cannot be used (TypeError",
    ),
    (
        "another rank",
        change("adapter_config.json", r=4),
        "lora_A.weight has shape (16, 512), not (4, 512)",
    ),
    (
        "a rank that no memory holds",
        change("adapter_config.json", r=10**12),
        "lora_A.weight has shape (16, 512), not (1000000000000, 512)",
    ),
    (
        "layers that the base has not",
        change("adapter_config.json", target_modules=["nothing"]),
        "Target modules {'nothing'} not found in the base model",
    ),
    (
        "pickled weights only",
        both(remove(WEIGHTS), put("adapter_model.bin", PICKLE)),
        "adapter_model.safetensors is missing",
    ),
    ("pickled weights renamed", put(WEIGHTS, PICKLE), f"{WEIGHTS} cannot be used"),
    ("half the weights", halve(WEIGHTS), f"{WEIGHTS} cannot be used (SafetensorError"),
    ("an empty file of weights", put(WEIGHTS), f"{WEIGHTS} cannot be used"),
    (
        "a tensor away",
        tensors(WEIGHTS, lambda state: dict(sorted(state.items())[1:])),
        "1 adapter tensors missing or unknown",
    ),
    (
        "a tensor more",
        tensors(WEIGHTS, lambda state: state | {"more": torch.zeros(1)}),
        "1 adapter tensors missing or unknown, more among them",
    ),
    (
        "a tensor of another shape",
        tensors(WEIGHTS, first(lambda value: value[:, 1:].clone())),
        "lora_A.weight has shape (16, 511), not (16, 512)",
    ),
    (
        "a tensor that is no number",
        tensors(WEIGHTS, first(lambda value: value * float("nan"))),
        "lora_A.weight holds values that are not finite",
    ),
    ("no note of the base", remove(ABOUT), f"{ABOUT} is missing"),
    ("a broken note", put(ABOUT, '{"round": 7'), f"{ABOUT} is broken (JSONDecodeError"),
    (
        "a note in bytes",
        put(ABOUT, b"\xff\xfe"),
        f"{ABOUT} is broken (UnicodeDecodeErr",
    ),
    (
        "a note of brackets",
        put(ABOUT, "[" * 100_000),
        f"{ABOUT} is broken (RecursionError",
    ),
    (
        "a note without end",
        put(ABOUT, " " * 2**21),
        f"{ABOUT} is larger than",
    ),
    ("a list for a note", put(ABOUT, "[]"), f"{ABOUT} is broken (TypeError"),
    (
        "no round",
        drop(ABOUT, "round"),
        f"{ABOUT} is broken (KeyError: 'round'",
    ),
    (
        "no template",
        drop(ABOUT, "template"),
        f"{ABOUT} is broken (KeyError: 'template'",
    ),
    ("an unknown template", change(ABOUT, template="zigzag"), "'zigzag' is unknown"),
    (
        "a template without end",
        both(change(ABOUT, template="chat"), put("chat_template.jinja", "{{ ")),
        "this model's chat template fails (TemplateSyntaxError",
    ),
    (
        "a note without a base",
        change(ABOUT, model=None),
        f"{ABOUT} is broken (TypeError",
    ),
    (
        "three bits",
        change(ABOUT, model={"quantization": 3}),
        "the base is quantised to neither 4 nor 8 bits",
    ),
    (
        "a base that is not there",
        change(ABOUT, model={"name": "/nowhere/base"}),
        "model.name=/nowhere/base: no weights could be loaded",
    ),
    (
        "a base on the way out",
        change(ABOUT, model={"name": "../../etc"}),
        "the base ../../etc leads out of the project",
    ),
    (
        "no base in the folder",
        change(ABOUT, model={"name": "/etc"}),
        "model.name=/etc: no weights could be loaded",
    ),
    (
        "no tokenizer",
        remove("tokenizer.json", "tokenizer_config.json"),
        "the tokenizer cannot be used",
    ),
    (
        "a broken tokenizer",
        put("tokenizer.json", "{"),
        "the tokenizer cannot be used (JSONDecodeError",
    ),
    (
        "a tokenizer that is code",
        both(
            put("code.py", CODE),
            change(
                "tokenizer_config.json",
                tokenizer_class="X",
                auto_map={"AutoTokenizer": ["code.X", None]},
            ),
        ),
        "contains custom code",
    ),
]

# What is wrong, what is done to the folder of a good base, a part of the message.
BASES = [
    (
        "pickled weights only",
        both(remove("model.safetensors"), put("pytorch_model.bin", PICKLE)),
        "holds no .safetensors file",
    ),
    (
        "pickled weights renamed",
        put("model.safetensors", PICKLE),
        "model.safetensors is broken",
    ),
    ("half the weights", halve("model.safetensors"), "model.safetensors is broken"),
    (
        "weights of one layer less",
        change("config.json", num_hidden_layers=5),
        "no weights could be loaded. 9 are missing or have another shape, model.layers.4",
    ),
    (
        "weights of another size",
        change("config.json", vocab_size=4096),
        "1 are missing or have another shape, model.embed_tokens.weight among them",
    ),
    ("no config", remove("config.json"), "Should have a `model_type` key"),
    ("a broken config", put("config.json", "{"), "config.json' is not a valid JSON"),
    (
        "a word for a size",
        change("config.json", hidden_size="wide"),
        "Field 'hidden_size' expected int, got str",
    ),
    (
        "an unknown kind of model",
        change("config.json", model_type="zigzag"),
        "has model type `zigzag` but Transformers does not recognize this",
    ),
    (
        "a model that is code",
        both(
            put("code.py", CODE),
            change(
                "config.json",
                model_type="mine",
                auto_map={"AutoConfig": "code.X", "AutoModelForCausalLM": "code.X"},
            ),
        ),
        "contains custom code",
    ),
    (
        "a tokenizer that is code",
        both(
            put("code.py", CODE),
            change(
                "tokenizer_config.json",
                tokenizer_class="X",
                auto_map={"AutoTokenizer": ["code.X", None]},
            ),
        ),
        "contains custom code",
    ),
    (
        "no tokenizer",
        remove("tokenizer.json", "tokenizer_config.json"),
        "Couldn't instantiate the backend tokenizer",
    ),
]


def asking(overrides: str) -> Made:
    """What is asked of a run that goes on, whose folder is whole."""
    return lambda folder: overrides


# What is wrong, what is done to the folder of a run of two rounds, a part of the message.
RUNS = [
    ("no folder", lambda here: shutil.rmtree(here), "no run to go on with is here"),
    ("no configuration", remove(".hydra"), "no run to go on with is here"),
    (
        "a broken configuration",
        put(".hydra/config.yaml", "a: [b"),
        "config.yaml is broken (ParserError: while parsing",
    ),
    (
        "a configuration in bytes",
        put(".hydra/config.yaml", b"\xff"),
        "config.yaml is broken (UnicodeDecodeError",
    ),
    (
        "a configuration of brackets",
        put(".hydra/config.yaml", "a: " + "[" * 3000),
        "config.yaml is broken (RecursionError",
    ),
    (
        "a configuration of aliases",
        put(".hydra/config.yaml", "a: &a [1]\nb: [*a, *a]"),
        "config.yaml is broken (ValueError: it holds aliases",
    ),
    (
        "an override that is none",
        put(".hydra/overrides.yaml", "- a: b"),
        "overrides.yaml is broken: {'a': 'b'} is no text",
    ),
    (
        "an override without quotes",
        put(".hydra/overrides.yaml", "- dataset.path=a (1)"),
        "this cannot be read as an override",
    ),
    ("a list for it", put(".hydra/config.yaml", "[a]"), "holds something else"),
    ("settings for overrides", put(".hydra/overrides.yaml", "a: b"), "something else"),
    (
        "a configuration with a gap",
        put(".hydra/config.yaml", "seed: ???"),
        "seed must be given",
    ),
    (
        "a reference to nothing",
        put(".hydra/config.yaml", "seed: ${nothing}"),
        "Interpolation key 'nothing' not found",
    ),
    (
        "another configuration",
        put(".hydra/config.yaml", "seed: 3"),
        "seed was 3 and would be 0",
    ),
    ("fewer rounds", asking("num_rounds=1"), "2 rounds are done, and num_rounds=1"),
    ("no history", remove("history.json"), "history.json does not fit the run"),
    ("half a history", halve("history.json"), "history.json does not fit the run"),
    (
        "a shorter history",
        put("history.json", json.dumps({"rounds": [ENTRY]})),
        "history.json does not fit the run: 2 rounds are done, and it tells of 1",
    ),
    (
        "a history of other rounds",
        put("history.json", '{"rounds": [{"round": 3}, {"round": 4}]}'),
        "history.json does not fit the run",
    ),
    ("a list for it", put("history.json", "[]"), "history.json does not fit the run"),
    ("a history of brackets", put("history.json", "[" * 10**5), "(RecursionError"),
    (
        "rounds that tell nothing",
        put("history.json", '{"rounds": [{"round": 1}, {"round": 2}]}'),
        "rounds[0].sampled: Field required",
    ),
    (
        "a word for a loss",
        put("history.json", json.dumps(TOLD).replace("2.5", '"low"')),
        "rounds[1].train_loss: Input should be a valid number",
    ),
    (
        "a loss that is no number",
        put("history.json", json.dumps(TOLD).replace("2.5", "NaN")),
        "rounds[1].train_loss: Input should be a finite number",
    ),
    *(
        (
            f"an odd history: {name}",
            put("history.json", json.dumps({"rounds": [ENTRY, ENTRY | odd]})),
            "history.json does not fit the run",
        )
        for name, odd in {
            "clients": {"round": 2, "clients": "x"},
            "a client": {"round": 2, "clients": [{"partition": 0}]},
            "evaluated": {"round": 2, "eval_clients": [{"partition": 0}]},
            "a loss without end": {"round": 2, "test_loss": 10**400},
        }.items()
    ),
    (
        "clients that are none",
        put(
            "history.json",
            json.dumps({"rounds": [ENTRY | {"clients": 3}, ENTRY | {"round": 2}]}),
        ),
        "rounds[0].clients: Input should be a valid list",
    ),
    (
        "a client without a loss",
        put(
            "history.json",
            json.dumps({"rounds": [ENTRY | {"clients": [{}]}, ENTRY | {"round": 2}]}),
        ),
        "rounds[0].clients[0].num-examples: Field required",
    ),
    (
        "a base without a round",
        put("history.json", json.dumps({"before": {"test_loss": 1.0}} | TOLD)),
        "before.round: Field required",
    ),
    (
        "a word for what the base scores",
        put(
            "history.json",
            json.dumps({"before": {"round": 0, "test_loss": "low"}} | TOLD),
        ),
        "before.test_loss: Input should be a valid number",
    ),
    (
        "a base of no round",
        put("history.json", json.dumps({"before": {"round": 2}} | TOLD)),
        "before.round: Input should be 0",
    ),
    (
        "two halves of a checkpoint",
        both(
            halve(f"{NEWEST}/adapter.safetensors"),
            halve(f"{OLDER}/strategy.safetensors"),
        ),
        "can be read",
    ),
    (
        "checkpoints without notes",
        both(remove(f"{NEWEST}/about.json"), remove(f"{OLDER}/about.json")),
        "checkpoints/000002/about.json is missing",
    ),
    (
        "a checkpoint of another base",
        both(
            *(
                tensors(f"{NEWEST}/{name}.safetensors", first(lambda v: v[:, 1:] * 1))
                for name in ("adapter", "strategy")
            )
        ),
        "000002 does not fit the base: base_model",
    ),
    (
        "checkpoints that are no numbers",
        both(
            tensors(f"{NEWEST}/adapter.safetensors", first(lambda value: value / 0)),
            tensors(f"{OLDER}/strategy.safetensors", first(lambda value: value / 0)),
        ),
        "holds values that are not finite",
    ),
]

# What is wrong, what is done to the newest checkpoint, why the one before it is taken.
CHECKPOINTS = [
    (
        "an empty folder",
        both(remove(NEWEST), folder_named(NEWEST)),
        "about.json is missing",
    ),
    ("half an adapter", halve(f"{NEWEST}/adapter.safetensors"), "SafetensorError"),
    ("half a momentum", halve(f"{NEWEST}/strategy.safetensors"), "SafetensorError"),
    ("a broken note", put(f"{NEWEST}/about.json", "{"), "JSONDecodeError"),
    ("a note of brackets", put(f"{NEWEST}/about.json", "[" * 10**5), "RecursionError"),
    (
        "values that are no numbers",
        tensors(f"{NEWEST}/adapter.safetensors", first(lambda value: value / 0)),
        "holds values that are not finite",
    ),
    (
        "a momentum that is no number",
        tensors(f"{NEWEST}/strategy.safetensors", first(lambda value: value / 0)),
        "holds values that are not finite",
    ),
    (
        "a momentum of another shape",
        tensors(
            f"{NEWEST}/strategy.safetensors", first(lambda value: value[:, 1:] * 1)
        ),
        "the strategy's v_t is none of this adapter",
    ),
    (
        "a momentum of other tensors",
        tensors(
            f"{NEWEST}/strategy.safetensors",
            lambda kept: dict(sorted(kept.items())[1:]),
        ),
        "KeyError: 'v_t/",
    ),
    (
        "another precision",
        tensors(f"{NEWEST}/adapter.safetensors", first(lambda value: value.bfloat16())),
        "its adapter is not in float32",
    ),
    ("no end of time", change(f"{NEWEST}/about.json", seconds=1e999), "inf seconds"),
    ("a list for a note", put(f"{NEWEST}/about.json", "[]"), "TypeError"),
    ("another round", change(f"{NEWEST}/about.json", round=9), "is of round 9"),
    ("a word for a time", change(f"{NEWEST}/about.json", seconds="x"), "'x'"),
    (
        "tensors that are not there",
        change(f"{NEWEST}/about.json", adapter=["nothing"]),
        "KeyError: 'nothing'",
    ),
    (
        "an unknown momentum",
        change(f"{NEWEST}/about.json", memory=["pickle"]),
        "KeyError: 'pickle/",
    ),
    (
        "one of an earlier version",
        lacks(f"{NEWEST}/about.json", "memory"),
        "an earlier version of this program wrote it",
    ),
    ("a pickle", put(f"{NEWEST}/adapter.safetensors", PICKLE), "SafetensorError"),
]

# What is wrong, a node's own settings beside its data, a part of what its log says.
NODES = [
    ("an unknown key", {"data_path": "x"}, "data_path is unknown. Known: data-path"),
    ("data that is not there", {"data-path": "/no/file"}, "=/no/file does not exist"),
    ("no data", {"data-path": ""}, "data-path is empty"),
    ("data in the folder above", {"data-path": ".."}, "data-path"),
    ("a number for data", {"data-path": 3}, "data-path=3 must be text in quotes"),
    ("no folder of the base", {"model-path": "/no/folder"}, "does not exist"),
    ("no base", {"model-path": ""}, "model-path is empty"),
    ("a word for a number", {"cpus": "many"}, "cpus=many must be a whole number"),
    ("true for a number", {"cpus": True}, "cpus=True must be a whole number"),
    ("a fraction", {"processes": 1.5}, "processes=1.5 must be a whole number"),
    ("no CPU", {"cpus": 0}, "cpus must be 1 or more"),
    ("an unknown device", {"device": "gpu"}, "device=gpu: take cpu, cuda or cuda:0"),
    ("half a device", {"device": "cuda:"}, "device=cuda:: take cpu, cuda or cuda:0"),
    ("a device that is not here", {"device": "cuda:99"}, "device=cuda:99 is not here"),
    ("a column that is not there", {"column-output": "antwort"}, "no column 'antwort'"),
    ("no column of answers", {"column-output": ""}, "column-output is empty"),
]

# What is wrong, what main.py is given, a part of what it says.
COMMANDS = [
    ("an unknown key", "num_round=3", "Could not override 'num_round'"),
    ("a wrong number", "num_rounds=0", "num_rounds=0: it must be 1 or more"),
    (
        "an output folder in a file",
        "hydra.run.dir={tmp}/file/run",
        "cannot be written (Not a directory)",
    ),
    ("null for a group", "tracking=null", "tracking is one of mlflow, none,"),
    ("a value without a name", "=5", "the name of a setting is missing"),
    ("no run", "resume={tmp}", "no run to go on with is here"),
    ("fewer rounds", "resume={run} num_rounds=1", "2 rounds are done, and num"),
]

# What is wrong, what test.py is given, a part of what it says.
ASKED = [
    ("no adapter given", "", "--peft-path"),
    ("a file", "--peft-path={tmp}/file", "there is no such folder"),
    (
        "a folder above",
        "--peft-path={tmp}",
        "is missing. Did you mean {tmp}/peft",
    ),
    ("no answer", "--peft-path=x --max-new-tokens=0", "must be 1 or more"),
    ("a cold adapter", "--peft-path=x --temperature=-1", "must be 0 or more"),
    ("an endless heat", "--peft-path=x --temperature=inf", "must be 0 or more"),
    ("no device", "--peft-path=x --device=meta", "must be cpu, cuda or cuda:1"),
    (
        "an input alone",
        "--peft-path=x --input=y",
        "--input goes with --question",
    ),
    (
        "a file and a question",
        "--peft-path=x --file=y --question=z",
        "--file takes neither --question nor --temperature",
    ),
    (
        "columns of no file",
        "--peft-path=x --columns=instruction=y",
        "--columns, --choices and --out go with --file",
    ),
    (
        "pickled weights",
        "--peft-path={tmp}/pickled --question=x",
        "adapter_model.safetensors is missing",
    ),
]


# --- and the test of every row ------------------------------------------------------------------


def table(rows: list[tuple[str, Any, str]]) -> Any:
    return pytest.mark.parametrize(
        ("made", "message"), [pytest.param(*row[1:], id=row[0]) for row in rows]
    )


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path_factory, monkeypatch):
    """No pickle is unpickled and no code of a folder is run, whatever a user says to it."""
    here = tmp_path_factory.mktemp("working_directory")
    monkeypatch.chdir(here)
    monkeypatch.setattr("builtins.input", lambda question: "y")
    yield
    assert list(here.iterdir()) == []


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A good adapter of random weights."""
    cfg = preflight.check(compose(QUICK))
    frame = model.skeleton(cfg["model"], cfg["peft"])
    about = {"round": 7, "template": "alpaca", "model": cfg["model"]}
    tokenizer = model.load_tokenizer(cfg["model"]["name"])
    folder = tmp_path_factory.mktemp("adapter") / "peft_7"
    model.save_adapter(frame, random_state(frame), tokenizer, about, folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What a run of FedAdam has left after two rounds."""
    overrides = [*QUICK.split(), "strategy=fedadam"]
    config = compose(" ".join(overrides))
    folder = tmp_path_factory.mktemp("run")
    record(config, overrides, folder)
    cfg = preflight.check(config)
    state = random_state(model.skeleton(cfg["model"], cfg["peft"]))
    for done in (1, 2):
        checkpoint.save(folder, done, state, {"v_t": state}, 1.0)
    write_json(folder / "history.json", TOLD)
    return folder


def random_state(frame: torch.nn.Module) -> dict[str, torch.Tensor]:
    parameters = frame.named_parameters()
    return {n: torch.randn(p.shape) * 0.01 for n, p in parameters if p.requires_grad}


def test_the_trap_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(PICKLE).close()
    assert (tmp_path / "ran").exists()


@table(SETTINGS)
def test_settings(made, message):
    # Either is printed without a traceback: Hydra's own, or ours, which is a kind of it.
    with pytest.raises(CompactHydraException) as told:
        preflight.check(compose(f"{QUICK} {made}"))
    assert message in str(told.value)


@pytest.fixture(scope="module")
def local() -> dict[str, Any]:
    return resolve(compose(f"{QUICK} dataset=local dataset.path=x num_clients=1"))


@table(DATA)
def test_data(made, message, local, tmp_path):
    made(tmp_path)
    [path] = tmp_path.glob("data*")
    with pytest.raises(UserError) as told:
        dataset.check(local | {"dataset": local.dataset | {"path": str(path)}})
    assert message in str(told.value)
    assert str(path) in str(told.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of what it overlooks
@table(ADAPTERS)
def test_adapter(made, message, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "peft_7")
    made(folder)
    before = content(folder)
    with pytest.raises(UserError) as told:
        model.open_adapter(str(folder), model.read_about(str(folder)), CPU)
    assert message in str(told.value)
    assert str(folder) in str(told.value)
    assert content(folder) == before


@table(BASES)
def test_base(made, message, tmp_path):
    folder = shutil.copytree(PROJECT / "assets/tiny_llama", tmp_path / "base")
    made(folder)
    model.load_tokenizer.cache_clear()
    config = compose(f"{QUICK} model.name={folder}")

    def use() -> None:
        preflight.check(config)
        model.load_base(str(folder), None, CPU)

    with pytest.raises(UserError) as told:
        use()
    assert message in str(told.value)
    assert str(folder) in str(told.value)


@pytest.mark.slow
@table(RUNS)
def test_run_to_go_on_with(made, message, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    overrides = made(folder) or ""
    before = content(tmp_path)

    def use() -> None:
        config, _ = resumed(str(folder), overrides.split())
        preflight.check_progress(resolve(config), folder)

    with pytest.raises(UserError) as told:
        use()
    assert message in str(told.value)
    assert content(tmp_path) == before


@table(CHECKPOINTS)
def test_newest_checkpoint(made, message, run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    good = checkpoint.read(folder / OLDER)[0]
    made(folder)
    newest = checkpoint.newest(folder)
    assert newest == folder / OLDER
    server = aggregate.build({"_target_": "flwr.serverapp.strategy.FedAdam"})
    state, done, _ = checkpoint.load(newest, server)
    assert done == 1
    assert server.strategy.v_t.keys() == good.keys()
    assert all(state[name].equal(good[name]) for name in good)
    said = capsys.readouterr().out
    assert f"{folder / NEWEST} cannot be read (" in said
    assert message in said
    # It would stand in the way of its round, when that is done again.
    assert not (folder / NEWEST).exists()


# --- and damage that nobody has thought of -------------------------------------------------------

SETTINGS_FILES = [".hydra/config.yaml", ".hydra/overrides.yaml"]
PROGRESS_FILES = [
    "history.json",
    *(
        f"{place}/{name}"
        for place in (NEWEST, OLDER)
        for name in ("about.json", "adapter.safetensors", "strategy.safetensors")
    ),
]
ODD = [None, True, -1, 1.5, 1e999, 10**30, "", "x", "\ud800", "${a}", [], {}, [[1]]]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each place of a JSON value that holds another: what it is in, and its key there."""
    if not isinstance(value, (dict, list)):
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    return [place for key in keys for place in ((value, key), *places(value[key]))]


@st.composite
def damages(draw: Any, files: list[str]) -> Made:
    """One file cut short, with other bytes in it, or with a JSON value of another kind."""
    name, place = draw(st.sampled_from(files)), draw(st.floats(0, 1))
    how = draw(st.sampled_from(["cut", "bytes", "value", "key"]))
    odd, more = draw(st.sampled_from(ODD)), draw(st.binary(max_size=9))

    def made(folder: Path) -> None:
        old = (folder / name).read_bytes()
        at = int(place * len(old))
        if how in ("cut", "bytes") or not name.endswith(".json"):
            tail = b"" if how == "cut" else more + old[at + len(more) :]
            (folder / name).write_bytes(old[:at] + tail)
            return
        content = json.loads(old)
        found = places(content)
        inside, key = found[int(place * (len(found) - 1))]
        if how == "key":
            del inside[key]
        else:
            inside[key] = odd
        (folder / name).write_text(json.dumps(content))

    return made


def go_on_in(folder: Path, cfg: dict[str, Any]) -> None:
    """What becomes of a run's folder when it is gone on with, but for the training."""
    preflight.check_progress(cfg, folder)
    server = aggregate.build(cfg["strategy"])
    if (newest := checkpoint.newest(folder)) is None:
        return
    state, done, _ = checkpoint.load(newest, server)
    told = journal.Journal(cfg, model.skeleton(cfg["model"], cfg["peft"]), folder)
    told.go_on(done)
    told.track()
    server.begin(state, 3)
    update = {name: torch.ones_like(value) for name, value in state.items()}
    server.add(Contribution(0, state, update, weight=1, loss=1.0))
    told.write_round(ENTRY | {"round": done + 1}, server.apply(server.gathered()))
    told.write_summary({})


@pytest.fixture
def identity(loopback) -> None:
    """What Flower's runtime sets before Messages may be made."""
    loopback(resolve(compose(QUICK)))


@pytest.mark.slow
@hypothesis.settings(max_examples=30, deadline=None, suppress_health_check=EVERY)
@given(made=damages(PROGRESS_FILES))
def test_any_damage_to_progress_is_answered_or_does_no_harm(made, run, identity):
    cfg = resolve(compose(f"{QUICK} strategy=fedadam"))
    with tempfile.TemporaryDirectory() as name:
        folder = shutil.copytree(run, Path(name) / "run")
        made(folder)
        with contextlib.suppress(UserError):
            go_on_in(folder, cfg)


@pytest.mark.slow
@hypothesis.settings(max_examples=40, deadline=None, suppress_health_check=EVERY)
@given(made=damages(SETTINGS_FILES))
def test_any_damage_to_settings_is_answered_or_does_no_harm(made, run):
    with tempfile.TemporaryDirectory() as name:
        folder = shutil.copytree(run, Path(name) / "run")
        made(folder)
        with contextlib.suppress(CompactHydraException):
            schema.validated(resolve(resumed(str(folder), [])[0]))


@table(NODES)
def test_node(made, message, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "notes.jsonl").write_text(LINES)
    own = {"data-path": str(tmp_path / "notes.jsonl"), "cpus": 1} | made
    with pytest.raises(Refusal) as refusal:
        permit.settle({"overrides": QUICK, "run": "first"}, own)
    assert message in str(refusal.value.__cause__)  # for the node's log
    # All that the server hears of it.
    told = "its settings or data are at fault: see its log"
    assert str(refusal.value) == told


def test_a_link_out_of_the_bundle_is_refused(tmp_path, monkeypatch):
    bundle, elsewhere = tmp_path / "bundle", tmp_path / "elsewhere.jsonl"
    put("data/a.jsonl", LINES)(bundle)
    monkeypatch.setattr(permit, "PROJECT", bundle)
    assert permit.in_bundle("data") == bundle / "data"
    elsewhere.write_text(LINES)
    (bundle / "data/b.jsonl").symlink_to(elsewhere)
    (bundle / "out").symlink_to(tmp_path)
    for path in ("data", "data/b.jsonl", "out", "out/elsewhere.jsonl", "data/../.."):
        assert permit.in_bundle(path) is None


def test_links_within_data_of_ones_own_are_followed(local, tmp_path):
    put("elsewhere.jsonl", LINES)(tmp_path)
    both(folder_named("data"), link("data/a.jsonl", "../elsewhere.jsonl"))(tmp_path)
    dataset.check(local | {"dataset": local.dataset | {"path": f"{tmp_path}/data"}})


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.csv"])
def test_a_byte_order_mark_is_no_fault(name, local, tmp_path):
    text = {"data.json": ARRAY, "data.jsonl": LINES, "data.csv": CSV}[name]
    put(name, text.encode("utf-8-sig"))(tmp_path)
    dataset.check(local | {"dataset": local.dataset | {"path": f"{tmp_path}/{name}"}})


@pytest.mark.slow
def test_a_run_goes_on_without_its_newest_checkpoint(configure, loopback, tmp_path):
    cfg = configure("strategy=fedadam")
    rounds.run(cfg, loopback(cfg, folder=tmp_path), tmp_path)
    whole = (tmp_path / f"peft_2/{WEIGHTS}").read_bytes()
    halve(f"{NEWEST}/adapter.safetensors")(tmp_path)
    put("peft_best/mine.txt")(tmp_path)  # a folder of the user's is no adapter of ours
    again = cfg | {"resume": str(tmp_path)}
    rounds.run(again, loopback(again, folder=tmp_path), tmp_path)
    assert (tmp_path / f"peft_2/{WEIGHTS}").read_bytes() == whole
    assert checkpoint.newest(tmp_path) == tmp_path / NEWEST
    assert (tmp_path / "peft_best/mine.txt").exists()


def test_a_run_may_be_measured_otherwise_when_it_goes_on(configure, tmp_path):
    cfg = configure("evaluate.every_round=1")
    frame = model.skeleton(cfg["model"], cfg["peft"])
    told = journal.Journal(cfg, frame, tmp_path)
    told.track()
    told.rounds = [ENTRY | {"eval_loss": 1.0, "best": True}]
    told.write_round(ENTRY | {"round": 2, "test_loss": 3.0}, random_state(frame))
    assert told.best()["round"] == 2


@pytest.fixture
def folders(adapter, tmp_path) -> Path:
    """A folder with what the commands below are given."""
    shutil.copytree(adapter, tmp_path / "peft_7")
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    both(remove(WEIGHTS), put("adapter_model.bin", PICKLE))(pickled)
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.slow
@table(COMMANDS)
def test_command(made, message, folders, run):
    before = content(folders)
    own = ["experiment=quickstart", f"hydra.run.dir={folders}/run"]
    done = subprocess.run(
        [
            *(sys.executable, PROJECT / "main.py", *own),
            *made.format(tmp=folders, run=run).split(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert {k: v for k, v in content(folders).items() if k in before} == before
    assert not list(folders.glob("**/history.json"))


@table(ASKED)
def test_question(made, message, folders, monkeypatch, capsys):
    """In this process, which has the libraries: another would load them for each row."""
    before = content(folders)
    words = made.format(tmp=folders).split()
    monkeypatch.setattr(sys, "argv", ["test.py", *words])
    with pytest.raises(SystemExit) as ended:
        ask.main()
    said = "".join(capsys.readouterr())
    assert ended.value.code in (1, 2)
    assert message.format(tmp=folders) in said
    assert "Traceback" not in said
    assert content(folders) == before
