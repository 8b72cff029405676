"""pytest tests/test_dataset.py: templates, label masks, truncation, draws, partitions."""

import csv
import json
import math
import re
import tempfile
from collections import Counter
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import dataset
import model
from records import batches, files, templates
from utils import Refusal, UserError

QUESTION = {"instruction": "Name the young of the animal.", "input": "cow"}
ALONE = {"instruction": "Which city is the capital of France?", "input": ""}
ANSWER = "A calf, of course."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
# template, question, the prompt's text, what stands between it and the answer
CASES = {
    "alpaca": (
        "alpaca",
        ALONE,
        "Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n"
        "### Instruction:\nWhich city is the capital of France?\n\n### Response:\n",
        "",
    ),
    "alpaca_with_input": (
        "alpaca",
        QUESTION,
        "Below is an instruction that describes a task, paired with an input that "
        "provides further context. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nName the young of the animal.\n\n"
        "### Input:\ncow\n\n### Response:\n",
        "",
    ),
    "vicuna": (
        "vicuna",
        ALONE,
        VICUNA + "USER: Which city is the capital of France? ASSISTANT:",
        " ",
    ),
    "vicuna_with_input": (
        "vicuna",
        QUESTION,
        VICUNA + "USER: Name the young of the animal.\ncow ASSISTANT:",
        " ",
    ),
    # The shipped tokenizer's own template, beginning of sequence included.
    "chat": (
        "chat",
        QUESTION,
        "<s>USER: Name the young of the animal.\ncow\nASSISTANT:",
        " ",
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    return model.load_tokenizer("assets/tiny_llama")


def rows(n):
    return Dataset.from_list([{"id": i} for i in range(n)])


def as_example(row):
    return {"input_ids": [row["id"]], "labels": [row["id"]]}


def drawn_ids(*args, **kwargs):
    examples, _ = dataset.draw(*args, **kwargs)
    return [example["input_ids"][0] for example in examples]


# --- templates and label masks ---------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_only_the_answer_and_its_end_are_labelled(case, tokenizer):
    template, question, text, between = CASES[case]
    special = template != "chat"
    before = tokenizer(text, add_special_tokens=special)["input_ids"]
    whole = tokenizer(text + between + ANSWER, add_special_tokens=special)["input_ids"]
    answer = [*whole[len(before) :], tokenizer.eos_token_id]

    assert templates.text(template, [question], tokenizer) == text
    assert templates.prompt(template, [question], tokenizer) == before
    assert before.count(tokenizer.bos_token_id) == 1
    example = templates.encode(question | {"output": ANSWER}, template, tokenizer, 512)
    assert example["input_ids"] == before + answer
    assert example["labels"] == [-100] * len(before) + answer
    labelled = [label for label in example["labels"] if label != -100]
    assert tokenizer.decode(labelled) == ANSWER + "</s>"


def test_earlier_turns_stand_before_the_question_with_their_answers(tokenizer):
    turns = [QUESTION | {"output": "calf"}, ALONE]
    text = (
        VICUNA + "USER: Name the young of the animal.\ncow ASSISTANT: calf</s>"
        "USER: Which city is the capital of France? ASSISTANT:"
    )
    ids = templates.prompt("vicuna", turns, tokenizer)
    assert ids == tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1


def test_answer_that_would_merge_into_the_prompt_leaves_the_prompt_alone():
    # A byte-level BPE that has a token for two line breaks, as Pythia's and Llama 3's do.
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["\n\n\n\n\n"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    before = templates.prompt("alpaca", [ALONE], tokenizer)
    text, output = CASES["alpaca"][2], "\n\n- Paris"
    assert tokenizer(text + output)["input_ids"][: len(before)] != before  # it merges

    example = templates.encode(ALONE | {"output": output}, "alpaca", tokenizer, 512)
    labelled = example["input_ids"][len(before) :]
    assert example["input_ids"][: len(before)] == before
    assert example["labels"] == [-100] * len(before) + labelled
    assert tokenizer.decode(labelled) == output + "</s>"


# --- truncation and what falls out -----------------------------------------------------


def test_too_long_an_example_keeps_its_prompt_and_loses_the_answers_end(tokenizer):
    record = QUESTION | {"output": ANSWER}
    length = len(templates.prompt("alpaca", [QUESTION], tokenizer))
    whole = templates.encode(record, "alpaca", tokenizer, 512)["input_ids"]
    assert len(whole) > length + 2
    for seq_length in range(length + 1, len(whole) + 2):
        example = templates.encode(record, "alpaca", tokenizer, seq_length)
        assert example["input_ids"] == whole[:seq_length]
        assert example["labels"] == [-100] * length + whole[length:seq_length]
        ended = example["labels"][-1] == tokenizer.eos_token_id
        assert ended == (seq_length >= len(whole))


def test_prompt_that_fills_seq_length_is_left_out(tokenizer):
    record = QUESTION | {"output": ANSWER}
    length = len(templates.prompt("alpaca", [QUESTION], tokenizer))
    assert templates.encode(record, "alpaca", tokenizer, length) is None
    assert templates.encode(record, "alpaca", tokenizer, length - 1) is None
    assert templates.encode(record, "alpaca", tokenizer, length + 1) is not None


@pytest.mark.parametrize("output", ["", " ", "\n\t "])
def test_record_without_an_answer_is_left_out(output, tokenizer):
    record = QUESTION | {"output": output}
    assert templates.encode(record, "alpaca", tokenizer, 512) is None


def test_draw_counts_the_rows_that_fell_out():
    def odd_only(row):
        return as_example(row) if row["id"] % 2 else None

    examples, dropped = dataset.draw(rows(10), odd_only, seed=0)
    assert sorted(e["input_ids"][0] for e in examples) == [1, 3, 5, 7, 9]
    assert dropped == 5
    examples, dropped = dataset.draw(rows(10), odd_only, seed=0, examples=10)
    assert Counter(e["input_ids"][0] for e in examples) == dict.fromkeys(
        [1, 3, 5, 7, 9], 2
    )
    assert 5 <= dropped <= 10  # the second pass ends with its last usable row


@pytest.mark.parametrize("examples", [None, 4])
def test_draw_refuses_rows_of_which_none_is_usable(examples):
    with pytest.raises(Refusal, match="can be trained on"):
        dataset.draw(rows(3), lambda row: None, seed=0, examples=examples)


class NoRows:
    """An empty partition that does not let itself be gone over for ever."""

    looks = 0

    def __len__(self):
        self.looks += 1
        assert self.looks < 100, "draw does not end"
        return 0


@pytest.mark.parametrize("examples", [None, 4])
def test_draw_refuses_a_client_without_rows(examples):
    with pytest.raises(Refusal, match="no records to train on"):
        dataset.draw(NoRows(), as_example, seed=0, examples=examples)


# --- the order of a draw ---------------------------------------------------------------


def test_seed_alone_decides_the_order():
    first = drawn_ids(rows(50), as_example, seed=1)
    assert drawn_ids(rows(50), as_example, seed=1) == first
    assert drawn_ids(rows(50), as_example, seed=2) != first
    assert first != sorted(first)


def test_a_pass_visits_each_row_once():
    assert sorted(drawn_ids(rows(50), as_example, seed=0)) == list(range(50))
    twice = drawn_ids(rows(50), as_example, seed=0, passes=2.0)
    assert Counter(twice) == dict.fromkeys(range(50), 2)
    half = drawn_ids(rows(50), as_example, seed=0, passes=0.5)
    assert len(half) == len(set(half)) == 25


def test_examples_beyond_the_rows_go_round_again_in_another_order():
    ids = drawn_ids(rows(20), as_example, seed=0, examples=50)
    first, second, rest = ids[:20], ids[20:40], ids[40:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert len(rest) == len(set(rest)) == 10


def test_only_drawn_rows_are_tokenised():
    seen = []

    def encode(row):
        seen.append(row["id"])
        return as_example(row)

    ids = drawn_ids(rows(1000), encode, seed=0, examples=7)
    assert seen == ids
    assert len(ids) == 7


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    asked=st.lists(st.integers(0, 12), min_size=2, max_size=40), seed=st.integers(0, 9)
)
@example([0] * 5, 0)
def test_hold_out_keeps_equal_questions_on_one_side(asked, seed):
    whole = Dataset.from_dict({"q": asked, "id": list(range(len(asked)))})
    train, held = dataset.hold_out(whole, 0.3, seed, ["q"])
    assert sorted([*train["id"], *held["id"]]) == list(range(len(asked)))
    wanted = max(1, int(0.3 * len(asked)))
    assert 1 <= len(held) <= max(wanted, len(asked) // 2)
    if len(set(asked)) > 1:
        assert set(train["q"]).isdisjoint(held["q"])
    if len(set(asked)) == len(asked):  # and where all differ it changes nothing
        plain = dataset.hold_out(whole, 0.3, seed)
        assert (train["id"][:], held["id"][:]) == (plain[0]["id"][:], plain[1]["id"][:])


def test_hold_out_takes_another_writing_of_a_question_for_the_same():
    texts = [text for i in range(6) for text in (f"Is it {i}?", f"is  it {i}? ")]
    train, held = dataset.hold_out(Dataset.from_dict({"q": texts}), 0.4, 0, ["q"])
    plain = [{files.plain(text) for text in part["q"]} for part in (train, held)]
    assert plain[0].isdisjoint(plain[1])
    assert len(held) == 4


def test_hold_out_is_disjoint_complete_and_deterministic():
    train, held = dataset.hold_out(rows(30), 0.1, seed=0)
    assert (len(train), len(held)) == (27, 3)
    assert sorted([*train["id"], *held["id"]]) == list(range(30))
    assert dataset.hold_out(rows(30), 0.1, seed=0)[1]["id"][:] == held["id"][:]
    assert dataset.hold_out(rows(30), 0.1, seed=1)[1]["id"][:] != held["id"][:]
    assert len(dataset.hold_out(rows(5), 0.1, seed=0)[1]) == 1


# --- batches ---------------------------------------------------------------------------


def test_collator_pads_on_either_side():
    examples = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8], "labels": [8]},
    ]
    left = batches.Collator(pad_token_id=3, padding_side="left")(examples)
    right = batches.Collator(pad_token_id=3, padding_side="right")(examples)
    pad, unseen, ignored = [3] * 5, [0] * 5, [-100] * 5  # up to eight
    expected_left = {
        "input_ids": [[*pad, 5, 6, 7], [*pad, 3, 3, 8]],
        "attention_mask": [[*unseen, 1, 1, 1], [*unseen, 0, 0, 1]],
        "labels": [[*ignored, -100, 6, 7], [*ignored, -100, -100, 8]],
    }
    expected_right = {
        "input_ids": [[5, 6, 7, *pad], [8, 3, 3, *pad]],
        "attention_mask": [[1, 1, 1, *unseen], [1, 0, 0, *unseen]],
        "labels": [[-100, 6, 7, *ignored], [8, -100, -100, *ignored]],
    }
    for batch, expected in ((left, expected_left), (right, expected_right)):
        assert batch.keys() == expected.keys()
        for name, tensor in batch.items():
            assert tensor.dtype == torch.int64
            assert torch.equal(tensor, torch.tensor(expected[name]))


# --- local files -----------------------------------------------------------------------


def write(records, path):
    """Write records in the format of the path's suffix; without one, as two jsonl files."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0].keys())
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".parquet":
        Dataset.from_list(records).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.mkdir()
        (path / "README.md").write_text("no data")
        write(records[::2], path / "one.jsonl")
        write(records[1::2], path / "two.jsonl")


def read(path, configure, columns):
    """All records that one client gets of `path`, in an order of their own."""
    cfg = configure(
        "dataset=local",
        f"dataset.path={path}",
        *(f"dataset.columns.{name}={column}" for name, column in columns.items()),
        "num_clients=1",
    )
    found = dataset.load_partition(cfg, 0)
    records = [dataset.to_record(row, cfg["dataset"]["columns"]) for row in found]
    return sorted(records, key=lambda record: record["instruction"])


FORMATS = ["data.json", "data.jsonl", "data.csv", "data.parquet", "folder"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_all_formats_give_the_same_records(name, configure, tmp_path):
    stored = [
        {"ask": "a", "with": "x, y", "reply": 7, "sort": "n"},
        {"ask": "b", "with": None, "reply": 8, "sort": "n"},
        {"ask": "c", "with": 'é "q"\nz', "reply": 9, "sort": "m"},
    ]
    write(stored, tmp_path / name)
    columns = {"instruction": "ask", "input": "with", "output": "reply"}
    expected = [
        {"instruction": "a", "input": "x, y", "output": "7"},
        {"instruction": "b", "input": "", "output": "8"},
        {"instruction": "c", "input": 'é "q"\nz', "output": "9"},
    ]
    assert read(tmp_path / name, configure, columns) == expected
    columns["input"] = "null"
    expected = [record | {"input": ""} for record in expected]
    assert read(tmp_path / name, configure, columns) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "answers",
    [["007", "010"], ["2020-01-31", "2021-02-28"], ["None", "n/a"], ["1.50", "2.0"]],
    ids=["zeros", "dates", "words", "decimals"],
)
def test_text_stays_as_it_was_written(answers, name, configure, tmp_path):
    stored = [
        {"instruction": f"q{i}", "output": text} for i, text in enumerate(answers)
    ]
    write(stored, tmp_path / name)
    found = read(tmp_path / name, configure, {"input": "null"})
    assert [record["output"] for record in found] == answers


@pytest.mark.parametrize("indent", [None, 2])
def test_one_record_is_a_record(indent, tmp_path):
    record = {"instruction": "a", "input": None, "output": 2}
    (tmp_path / "one.json").write_text(json.dumps(record, indent=indent))
    names = list(record)
    found = files.load(str(tmp_path / "one.json"), "dataset.path", names)
    assert list(found) == [{"instruction": "a", "input": "", "output": "2"}]


MISSING = [None, math.nan, np.float64("nan"), np.float32("nan"), pandas.NaT]


@pytest.mark.parametrize("value", [*MISSING, Decimal("nan"), np.datetime64("nat")])
def test_a_missing_value_is_no_text(value):
    assert files.text(value) == ""
    found = dataset.to_record({"q": value}, {"instruction": "q", "input": None})
    assert found == {"instruction": "", "input": ""}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.parquet"])
def test_pandas_nothing_is_nothing_in_whatever_column(name, configure, tmp_path):
    # What pandas leaves where a cell is empty, in its columns of numbers and of dates.
    frame = pandas.DataFrame(
        {
            "q": [1.5, None, 2.5, 3.5],
            "i": pandas.to_datetime(["2020-01-31", None, None, None]),
            "a": ["yes", None, math.nan, "nan"],
        }
    )
    path = tmp_path / name
    if name == "data.parquet":
        frame.to_parquet(path)
    else:  # in json's own words: NaN
        frame["i"] = frame["i"].astype(str).replace("NaT", math.nan)
        stored = frame.to_dict("records")
        path.write_text(
            json.dumps(stored)
            if name == "data.json"
            else "\n".join(json.dumps(row) for row in stored)
        )
        assert "NaN" in path.read_text()
    found = read(path, configure, {"instruction": "q", "input": "i", "output": "a"})
    day = found[1]["input"]
    assert day.startswith("2020-01-31")
    assert found == [
        {"instruction": "", "input": "", "output": ""},
        {"instruction": "1.5", "input": day, "output": "yes"},
        {"instruction": "2.5", "input": "", "output": ""},
        {
            "instruction": "3.5",
            "input": "",
            "output": "nan",
        },  # a word, as it was written
    ]


def test_what_was_read_by_other_code_is_read_anew(configure, tmp_path, monkeypatch):
    write([{"instruction": "q", "input": "", "output": "a"}], tmp_path / "data.jsonl")
    path = str(tmp_path / "data.jsonl")
    columns = ["instruction", "output"]
    first = files.load(path, "dataset.path", columns).cache_files
    assert files.load(path, "dataset.path", columns).cache_files == first
    monkeypatch.setattr(files, "CODE", "another")
    assert files.load(path, "dataset.path", columns).cache_files != first


# --- what stands beside them -------------------------------------------------------------


def find(folder):
    return [file.name for file in files.find(str(folder), "dataset.path")]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(suffix=st.from_regex(r"[.][A-Za-z0-9]{1,8}", fullmatch=True))
@example(".JSONL")
@example(".ndjson")
@example(".gz")
@example(".tsv")
@example(".xlsx")
@example(".arrow")
@example(".md")
def test_no_file_of_a_folder_is_left_out_without_a_word(suffix):
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.jsonl", f"b{suffix}", ".hidden.jsonl", f"._b{suffix}"):
            (Path(folder) / name).touch()
        kind = suffix.lower()
        if kind in (".jsonl", ".ndjson"):
            assert find(folder) == ["a.jsonl", f"b{suffix}"]
        elif kind in files.DOCUMENTS:
            assert find(folder) == ["a.jsonl"]
        else:
            odd = "files of several formats" if kind in files.READERS else "b" + suffix
            with pytest.raises(UserError, match=re.escape(odd)):
                find(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DATA.CSV", "d.Jsonl", "d.PARQUET", "d.Json"])
def test_a_suffix_may_be_in_capitals(name, configure, tmp_path):
    stored = [{"instruction": f"q{i}", "output": "a"} for i in range(3)]
    write(stored, tmp_path / name.lower())
    (tmp_path / name.lower()).rename(tmp_path / name)
    assert len(read(tmp_path / name, configure, {"input": "null"})) == 3


@pytest.mark.parametrize(
    ("names", "held"),
    [
        (("train.jsonl", "test.jsonl"), "test.jsonl"),
        (("qa_train.csv", "qa_validation.csv"), "qa_validation.csv"),
        (("data-train-0.parquet", "data-dev-0.parquet"), "data-dev-0.parquet"),
        (("a.jsonl", "Eval.jsonl", "b.jsonl"), "Eval.jsonl"),
    ],
)
def test_a_folder_of_several_parts_of_a_dataset_is_refused(names, held, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{held} has the name of what is kept from"):
        find(tmp_path)
    (tmp_path / held).unlink()
    assert len(find(tmp_path)) == len(names) - 1


def test_records_in_a_folder_below_are_not_left_out_without_a_word(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "notes/readme.txt").touch()
    assert find(tmp_path) == ["a.jsonl"]
    (tmp_path / "notes/b.parquet").touch()
    with pytest.raises(UserError, match="notes may hold records, and would not be"):
        find(tmp_path)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_number_of_the_hub_is_refused(value):
    found = Dataset.from_dict({"q": ["a", "b", "c"], "n": [1.5, None, value]})
    dataset._check_columns(found, ["q", None], "x")
    with pytest.raises(UserError, match="x: 'n' holds numbers that are infinite"):
        dataset._check_columns(found, ["q", "n"], "x")
    dataset._check_columns(found.select([0, 1]), ["q", "n"], "x")


@pytest.mark.parametrize(
    "value",
    [["a"], {"a": 1}, [{"role": "user", "content": "q"}]],
    ids=["list", "object", "messages"],
)
def test_a_column_of_the_hub_that_holds_no_text_is_refused(value):
    found = Dataset.from_dict({"q": [value]})
    with pytest.raises(UserError, match="'q' holds values of type "):
        dataset._check_columns(found, ["q"], "x")


def test_what_datasets_and_the_hub_leave_is_told_from_data(tmp_path):
    rows(3).save_to_disk(tmp_path / "saved")
    DatasetDict({"train": rows(3)}).save_to_disk(tmp_path / "split")
    for name in ("saved", "split"):
        with pytest.raises(UserError, match=r"what datasets\.save_to_disk writes"):
            find(tmp_path / name)
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    for name in ("README.md", "dataset_infos.json", "data/train-0.parquet"):
        (clone / name).touch()
    with pytest.raises(UserError, match=re.escape(f"did you mean {clone}/data")):
        find(clone)
    assert find(clone / "data") == ["train-0.parquet"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "instruction,input,output,,\nq,i,a,,\n",  # Excel's empty columns
        "sep=,\ninstruction,input,output\nq,i,a\n",  # what it writes for itself
        "sep=;\r\ninstruction;input;output\r\nq;i;a\r\n",
        "sep=\t\ninstruction\tinput\toutput\nq\ti\ta\n",
        "instruction,input,output,note,note\nq,i,a,x,y\n",  # nobody asked for these
        ",instruction,input,output\n0,q,i,a\n",  # pandas' index
        "\n\ninstruction,input,output\n\nq,i,a\n\n",
    ],
)
def test_csv_as_spreadsheets_write_it(text, configure, tmp_path):
    (tmp_path / "data.csv").write_text(text, newline="")
    found = read(tmp_path / "data.csv", configure, {})
    assert found == [{"instruction": "q", "input": "i", "output": "a"}]


@pytest.mark.slow
def test_columns_that_nobody_asked_for_are_not_decoded(configure, tmp_path):
    table = pyarrow.table(
        {
            "instruction": ["q"],
            "date": pyarrow.array([10**6 * 365], pyarrow.date32()),  # after 9999
            "output": ["a"],
        }
    )
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(table, path)
    found = read(path, configure, {"input": "null"})
    assert found == [{"instruction": "q", "input": "", "output": "a"}]
    with pytest.raises(
        UserError, match=r"data\.parquet: broken parquet, after record 0"
    ):
        read(path, configure, {"input": "date"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "folder"])
def test_input_may_be_missing_from_some_records(name, configure, tmp_path):
    stored = [
        {"instruction": "a", "input": "i", "output": "x"},
        {"instruction": "b", "output": "y"},
        {"instruction": "c", "output": "z"},
    ]
    write(stored, tmp_path / name)
    found = read(tmp_path / name, configure, {})
    assert [record["input"] for record in found] == ["i", "", ""]
    write(stored[1:], tmp_path / f"all_{name}")
    with pytest.raises(
        UserError, match=r"no column 'input' .*columns.input=null where"
    ):
        read(tmp_path / f"all_{name}", configure, {})


def test_to_record_makes_text_of_any_value():
    columns = {"instruction": "q", "input": "i", "output": "a"}
    found = dataset.to_record({"q": 1.5, "i": None, "a": True, "more": 0}, columns)
    assert found == {"instruction": "1.5", "input": "", "output": "True"}


@pytest.mark.parametrize("group", ["local", "alpaca_gpt4"])
def test_test_records_come_from_test_path(group, configure, tmp_path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    stored = [{"instruction": f"q{i}", "input": "", "output": "a"} for i in range(9)]
    write(stored[:6], train)
    write(stored[6:], test)
    paths = f"dataset.path={train} dataset.test_path={test}"
    cfg = configure(f"dataset={group}", paths)
    assert dataset.load_test(cfg) == (stored[6:], [])


def asked(configure, tmp_path, train, test, *overrides):
    """A configuration of these records, in parquet for its types, not yet checked."""
    for name, stored in (("train", train), ("test", test)):
        table = pyarrow.Table.from_pylist([{"input": None, **row} for row in stored])
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    cfg = configure("num_clients=1", *overrides)
    cfg["dataset"] |= {
        "path": f"{tmp_path}/train.parquet",
        "test_path": f"{tmp_path}/test.parquet",
    }
    cfg["evaluate"]["exact_match"] = True
    dataset.forget()
    return cfg


TRAIN = [{"instruction": f"What is {i}?", "output": "x", "category": "a"} for i in "ab"]


@pytest.mark.slow
@pytest.mark.parametrize("written", ["what is a?", "What  is\na? ", "WHAT IS A?"])
def test_a_test_question_written_otherwise_is_still_one_of_the_training(
    written, configure, tmp_path
):
    test = [{"instruction": text, "output": "x"} for text in (written, "What is c?")]
    cfg = asked(configure, tmp_path, TRAIN, test)
    assert dataset.check(cfg) == [
        "1 of 2 test questions also stand in the training data."
    ]
    cfg = asked(configure, tmp_path, TRAIN, test[:1])
    with pytest.raises(UserError, match="All 1 test questions also stand"):
        dataset.check(cfg)


@pytest.mark.slow
def test_records_without_a_label_are_told(configure, tmp_path):
    train = [*TRAIN, TRAIN[0] | {"category": None}]
    cfg = asked(configure, tmp_path, train, [{"instruction": "c", "output": "x"}])
    cfg["num_clients"] = 2
    cfg["partitioner"] = {
        "_target_": "flwr_datasets.partitioner.NaturalIdPartitioner",
        "partition_by": "category",
    }
    [note] = dataset.check(cfg)
    assert note.startswith("1 of 3 records have nothing in 'category'")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("offered", "right", "choices"),
    [
        ([Decimal("1.50"), Decimal("2.00")], Decimal("1.50"), ["1.50", "2.00"]),
        ([date(2020, 1, 31)], date(2020, 1, 31), ["2020-01-31"]),
        ([True, False], True, ["True", "False"]),
        ([1.5, None], 1.5, ["1.5", ""]),
        ('["a", "b"]', "a", ["a", "b"]),
        ('"yes"', "y", None),  # its letters are no choices
        ({"a": "x", "b": "y"}, "a", None),  # nor are its keys
    ],
)
def test_choices_are_a_list_of_whatever_an_answer_may_be(
    offered, right, choices, configure, tmp_path
):
    test = [{"instruction": "c", "output": right, "offered": offered}]
    cfg = asked(configure, tmp_path, TRAIN, test)
    cfg["evaluate"]["choices"] = "offered"
    if choices:
        assert dataset.load_test(cfg)[1] == [choices]
    else:
        with pytest.raises(UserError, match="a list of answers is needed"):
            dataset.load_test(cfg)


# --- partitioners ----------------------------------------------------------------------


@pytest.fixture
def parts(configure, tmp_path):
    """Deal 403 records of four unequally common labels out; return each client's rows."""
    labels = "aaaabbbccd"
    stored = [
        {"instruction": str(i), "output": "x", "label": labels[i % 10]}
        for i in range(403)
    ]
    write(stored, tmp_path / "data.jsonl")

    def deal(*overrides):
        # The process keeps the last division; each call is to make its own.
        dataset.forget()
        cfg = configure(
            f"dataset=local dataset.path={tmp_path}/data.jsonl dataset.label=label "
            "dataset.columns.input=null",
            *overrides,
        )
        clients = range(dataset._partitioner(cfg).num_partitions)
        return [list(dataset.load_partition(cfg, client)) for client in clients]

    return deal


def ids(part):
    return [row["instruction"] for row in part]


def unevenness(parts):
    """The mean over clients of their commonest label's share."""
    counts = [Counter(row["label"] for row in part) for part in parts]
    return sum(max(c.values()) / c.total() for c in counts) / len(counts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        "partitioner=iid",
        "partitioner=dirichlet",
        "partitioner=natural",
        "partitioner=size",
    ],
)
def test_partitions_are_disjoint_complete_and_decided_by_the_seed(overrides, parts):
    dealt = parts(overrides)
    assert len(dealt) == 4
    everything = [name for part in dealt for name in ids(part)]
    assert sorted(everything, key=int) == [str(i) for i in range(403)]
    assert parts(overrides) == dealt
    assert parts(overrides, "seed=1") != dealt


@pytest.mark.slow
def test_iid_deals_equal_shares_of_everything(parts):
    dealt = parts("partitioner=iid")
    assert [len(part) for part in dealt] == [101, 101, 101, 100]
    assert all({row["label"] for row in part} == set("abcd") for part in dealt)


@pytest.mark.slow
def test_dirichlet_is_less_even_for_a_small_alpha(parts):
    uneven = parts("partitioner=dirichlet partitioner.alpha=0.1")
    even = parts("partitioner=dirichlet partitioner.alpha=1000")
    assert unevenness(uneven) > unevenness(even) + 0.1
    assert unevenness(even) == pytest.approx(0.4, abs=0.05)  # as in the whole
    assert min(len(part) for part in uneven) >= 10


@pytest.mark.slow
def test_natural_gives_each_client_one_label(parts):
    dealt = parts("partitioner=natural")
    labels = [{row["label"] for row in part} for part in dealt]
    assert sorted(labels, key=min) == [{"a"}, {"b"}, {"c"}, {"d"}]


@pytest.mark.slow
def test_size_grows_linearly(parts):
    sizes = [len(part) for part in parts("partitioner=size")]
    assert sizes == [40, 80, 120, 163]  # the last one takes what is left over
