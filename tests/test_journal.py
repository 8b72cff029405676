"""pytest tests/test_journal.py: what a run says: its lines, its last word, and before and after."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
import typing
from typing import NotRequired

import pandas
import pytest
import torch
from peft import PeftModel
from typing_extensions import is_typeddict

import client
import dataset
import model
import tasks
import utils
from evaluation import examine
from records import batches, templates
from server import journal, rounds, runs
from utils import PROJECT, Progress, UserError

# What a shell, or a word of `--key=value`, could take for something else.
INPUT = 'It\'s "$HOME" `x`, a=b \\ and\na second line: which?'
COLUMNS = {"instruction": "task", "input": "question", "output": "answer"}


def script(name):
    """A script of the project, by its file: there is another module `test`."""
    spec = importlib.util.spec_from_file_location(
        f"{name}_script", PROJECT / f"{name}.py"
    )
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def finished(configure_once, loopback_once, tmp_path_factory):
    """A short run that measures all that can be measured: its configuration and folder."""
    folder = tmp_path_factory.mktemp("run")
    given = json.loads(
        (PROJECT / "assets/tiny_qa/test.jsonl").read_text().splitlines()[0]
    )
    asked = [INPUT, "What is the capital of France?", "", "Name a colour."]
    records = [
        {
            "task": "Answer this truthfully",
            "question": question,
            "answer": given["output"],
            "choices": ["no", given["output"]],
        }
        for question in asked
    ]
    test = folder / "test.jsonl"
    test.write_text("\n".join(map(json.dumps, records)))
    rows = [
        json.loads(line)
        for line in (PROJECT / "assets/tiny_qa/train.jsonl").read_text().splitlines()
    ]
    train = folder / "train.jsonl"
    train.write_text(
        "\n".join(
            json.dumps(
                {
                    "task": r["instruction"],
                    "question": r["input"],
                    "answer": r["output"],
                }
            )
            for r in rows[:120]
        )
    )
    cfg = configure_once(
        "dataset=local",
        f"dataset.path={train}",
        f"dataset.test_path={test}",
        *(f"dataset.columns.{name}={column}" for name, column in COLUMNS.items()),
        "strategy.fraction_evaluate=0.5",
        "evaluate.exact_match=true",
        "evaluate.max_new_tokens=3",
        "evaluate.every_round=1",
        "evaluate.choices=choices",
        "train.learning_rate_max=1e-2",
        "train.training_arguments.max_steps=1",
    )
    measured = []
    measure = examine.Examination._measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            examine.Examination,
            "_measure",
            lambda self: measured.append(1) or measure(self),
        )
        rounds.run(cfg, loopback_once(cfg, folder=folder), folder)
    return cfg, folder, len(measured)


def read(folder, name="summary"):
    return json.loads((folder / f"{name}.json").read_text())


# --- before and after ------------------------------------------------------------------------


@pytest.mark.slow
def test_what_the_base_scores_stands_before_the_rounds(finished):
    cfg, folder, _ = finished
    history = read(folder, "history")
    before, last = history["before"], history["rounds"][-1]
    assert before["round"] == 0
    assert [entry["round"] for entry in history["rounds"]] == [1, 2]
    summary = read(folder)
    # Each score that is told of the end is told of the beginning as well.
    after = {n.removesuffix("_after") for n in summary if n.endswith("_after")}
    assert after == {
        n.removesuffix("_before") for n in summary if n.endswith("_before")
    }
    assert len(after) >= 7 + 3
    for name in after:
        assert summary[f"{name}_before"] == before[name]
    for name in ("eval_loss", "test_loss"):
        assert summary[f"{name}_after"] == last[name] != before[name]
    # The same clients are asked in the end, so that the two can be compared.
    first, second = (
        [(c["partition"], c["num-examples"]) for c in entry["eval_clients"]]
        for entry in (before, last)
    )
    assert first == second
    state = client.initial_adapter(cfg)
    for each in before["eval_clients"]:
        own = client.evaluate(cfg, state, each["partition"], base=True)
        assert own["eval_loss"] == each["eval_loss"]


def test_nothing_is_measured_twice(finished):
    cfg, _, measured = finished
    assert measured == 1 + cfg["num_rounds"]  # the base, and each round's adapter


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # But for the one that needs an emulator as its base.
    sorted({p.stem for p in (PROJECT / "conf/peft").glob("*.yaml")} - {"outer"}),
)
def test_before_training_the_base_is_measured_whatever_the_method(name, configure):
    cfg = configure(
        f"peft={name}",
        "model.quantization=null",
        "strategy.fraction_evaluate=1",
        "evaluate.holdout=0.01",
    )
    state = {k: v + 0.1 for k, v in client.initial_adapter(cfg).items()}
    found = client.evaluate(cfg, state, partition=0, base=True)
    model.forget()
    # By the base alone, which has never seen PEFT.
    base = model.load_base(cfg["model"]["name"], None, torch.device("cpu")).eval()
    assert not isinstance(base, PeftModel)
    rows = dataset.load_partition(cfg, 0)
    _, held = dataset.hold_out(rows, cfg["evaluate"]["holdout"], cfg["seed"])
    tokenizer = model.load_tokenizer(cfg["model"]["name"])
    examples, _ = dataset.draw(
        held,
        lambda row: client._encode(cfg, tasks.build(cfg), tokenizer, row),
        cfg["seed"],
    )
    collate = batches.Collator(tokenizer.pad_token_id, "left")
    task = tasks.build(cfg)
    told = task.metrics(examine.score(base, task, examples, collate, 4))
    assert found["eval_loss"] == pytest.approx(told["loss"], rel=1e-3)
    assert found["eval_accuracy"] == pytest.approx(told["accuracy"], abs=0.02)


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_what_was_before(finished, loopback_once, tmp_path):
    cfg, folder, _ = finished
    shutil.copytree(folder, tmp_path / "longer")
    longer = cfg | {"resume": str(tmp_path / "longer"), "num_rounds": 3}
    rounds.run(longer, loopback_once(longer), tmp_path / "longer")
    history = read(tmp_path / "longer", "history")
    assert history["before"] == read(folder, "history")["before"]
    assert len(history["rounds"]) == 3
    assert (
        read(tmp_path / "longer")["eval_loss_before"] == history["before"]["eval_loss"]
    )


def test_a_history_from_before_that_was_written_down_is_taken(finished, tmp_path):
    history = read(finished[1], "history")
    utils.write_json(tmp_path / "history.json", {"rounds": history["rounds"]})
    assert "before" not in runs.read_history(tmp_path, 2)
    for broken in (
        [1],
        {"round": 3},
        {"round": 0, "eval_loss": "low"},
        {"test_loss": "low"},
        "none",
    ):
        utils.write_json(tmp_path / "history.json", history | {"before": broken})
        with pytest.raises(UserError, match=r"does not fit the run: .*: before"):
            runs.read_history(tmp_path, 2)


def test_all_that_a_run_writes_stands_in_its_types(finished):
    def unknown(value, kind) -> list[str]:
        if typing.get_origin(kind) is NotRequired:
            return unknown(value, *typing.get_args(kind))
        if typing.get_origin(kind) is list:
            return [k for each in value for k in unknown(each, *typing.get_args(kind))]
        if not is_typeddict(kind):
            return []
        known = kind.__annotations__
        inner = [k for k in known if k in value for k in unknown(value[k], known[k])]
        return [*(value.keys() - known.keys()), *inner]

    for name in ("history.json", "summary.json", "answers.json", "test_scores.json"):
        assert unknown(runs.read(finished[1], name), runs.FILES[name]) == []
    broken = {"rounds": [{"colour": 1, "clients": [{"size": 2}]}]}
    assert unknown(broken, runs.History) == ["colour", "size"]


# --- the last word ----------------------------------------------------------------------------


def test_the_last_word_tells_all_that_was_measured(finished, capsys):
    cfg, folder, _ = finished
    journal.report(cfg, folder)
    said = capsys.readouterr().out
    summary = read(folder)
    forms = {name: form for name, (_, form) in examine.SHOWN.items()}
    lines = [line.split() for line in said.splitlines()]
    for key in (name for name in summary if name.endswith("_after")):
        name = key.removesuffix("_after")
        form = forms[name if name in forms else name.partition("_")[2]]
        pair = [form.format(summary[f"{name}_{when}"]) for when in ("before", "after")]
        assert any(line[-2:] == pair for line in lines), name
    assert "On 4 test questions" in said
    held = read(folder, "history")["rounds"][-1]["eval_clients"]
    assert f"On {sum(c['num-examples'] for c in held):g} records of 2 clients" in said


def asked(said: str) -> list[str]:
    """The words of the command that a run ends with, as a shell takes them."""
    return shlex.split(said[said.index("Ask it: ") :].removeprefix("Ask it: "))


def test_the_last_command_asks_a_whole_record_of_the_test_file(finished, capsys):
    cfg, folder, _ = finished
    journal.report(cfg, folder)
    assert asked(capsys.readouterr().out) == [
        "python",
        "test.py",
        f"--peft-path={folder / 'peft_2'}",
        "--question=Answer this truthfully",
        f"--input={INPUT}",
    ]


def test_without_test_questions_no_record_is_shown(finished, tmp_path, capsys):
    cfg, folder, _ = finished
    own = shutil.copytree(folder, tmp_path / "a folder")
    quiet = {"exact_match": False, "every_round": 0, "choices": None}
    cfg = cfg | {"evaluate": cfg.evaluate | quiet}
    kept = ("_before", "_after")
    summary = {k: v for k, v in read(own).items() if not k.endswith(kept)}
    utils.write_json(own / "summary.json", summary)
    history = read(own, "history")
    for entry in history["rounds"]:
        del entry["eval_clients"]
    utils.write_json(own / "history.json", history)
    journal.report(cfg, own)
    said = capsys.readouterr().out
    assert "Nothing but the training loss was measured. strategy.fraction_eval" in said
    assert asked(said) == ["python", "test.py", f"--peft-path={own / 'peft_2'}"]


# --- the line of a round ------------------------------------------------------------------------


def test_the_line_of_a_round_tells_what_was_measured(capsys):
    progress = Progress(4)
    progress.begin({})
    assert capsys.readouterr().out == ""
    progress.begin({"round": 0, "test_loss": 9.5, "eval_loss": 8.5})
    said = capsys.readouterr().out
    assert said == "base without training  test 9.5000  own records 8.5000\n"
    entry = {"round": 2, "train_loss": 1.25, "seconds": 3.0, "replied": 2, "sampled": 3}
    progress.advance(entry)
    assert "loss 1.2500  3.0 s  2 of 3 clients" in capsys.readouterr().out
    more = {"test_loss": 2.5, "eval_loss": 3.5, "tokens_per_second": 1234.5}
    progress.advance(entry | more)
    said = capsys.readouterr().out
    assert "loss 1.2500  test 2.5000  own records 3.5000  1,234 tokens/s  3.0 s" in said


def test_what_clients_count_is_summed_where_all_of_them_tell():
    clients = [
        {"tokens": 100, "truncated": 1, "dropped": 0},
        {"tokens": 300, "truncated": 2},
    ]
    assert rounds.totals(clients, seconds=8.0) == {
        "tokens": 400,
        "truncated": 3,
        "tokens_per_second": 50.0,
    }


def test_records_that_are_cut_are_told_once(capsys):
    entries = [
        {
            "round": i,
            "truncated": n,
            "dropped": 0,
            "clients": [{"num-examples": 16}] * 2,
        }
        for i, n in enumerate([0, 5, 7], start=1)
    ]
    for i, entry in enumerate(entries):
        journal.report_lost(entry, entries[:i], 128)
    assert capsys.readouterr().out == (
        "round 2: 5 of 32 records were cut at train.seq_length=128: they lose their end, "
        "conversations their beginning\n"
    )


# --- a file of questions, afterwards -------------------------------------------------------------


@pytest.fixture
def ask(finished, monkeypatch, capsys, tmp_path):
    """Run test.py on the finished run's adapter; what it said, and what `--out` got."""

    def run(*options):
        out = tmp_path / "out.json"
        out.unlink(missing_ok=True)
        path = f"--peft-path={finished[1] / 'peft_2'}"
        monkeypatch.setattr(sys, "argv", ["test.py", path, *options])
        script("test").main()
        return capsys.readouterr().out, read(tmp_path, "out") if out.exists() else None

    return run


@pytest.mark.slow
def test_a_run_s_own_figures_come_out_for_its_test_file(finished, ask, tmp_path):
    _, folder, _ = finished
    test = f"--file={folder / 'test.jsonl'}"
    said, told = ask(test, "--base", "--choices=choices", f"--out={tmp_path}/out.json")
    summary = read(folder)
    for when, name in (("before", "base"), ("after", "tuned")):
        assert told["scores"][name] == {
            key.removesuffix(f"_{when}"): value
            for key, value in summary.items()
            if key.endswith(f"_{when}") and not key.startswith("eval_")
        }
    assert told["answers"] == read(folder, "answers")
    assert told["questions"] == 4
    assert "On 4 questions" in said


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_file_of_any_kind_with_columns_of_any_name(suffix, ask, tmp_path):
    rows = pandas.DataFrame(
        [{"q": "What is the capital of France?", "a": "Paris", "more": 1}] * 3
    )
    path = tmp_path / f"asked.{suffix}"
    if suffix == "csv":
        rows.to_csv(path, index=False)
    elif suffix == "parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, orient="records", lines=suffix == "jsonl")
    said, _ = ask(f"--file={path}", "--columns=instruction=q,output=a")
    assert said.count("Q: What is the capital of France?") == 3
    assert said.count("A: ") == 3
    assert "exact match" in said
    said, _ = ask(f"--file={path}", "--columns=instruction=q", "--base")
    assert said.count("base: ") == said.count("tuned: ") == 3
    assert "exact match" not in said  # nothing to compare the answers with


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"q": "?"}],
            [],
            "which column is the question. It has: q. Say it: --columns=",
        ),
        ([{"q": "?"}], ["--columns=instruction=z"], "'z' is unknown"),
        ([{"q": "?"}], ["--columns=colour=q"], "'colour' is unknown"),
        (
            [{"q": "?"}],
            ["--columns=instruction=q, instruction=q"],
            "'instruction' is unknown, or there twice",
        ),
        (
            [{"q": "?"}],
            ["--out=/no/folder/out.json"],
            "--out=/no/folder/out.json: a file",
        ),
        ([{"q": "?"}], ["--out=/"], "--out=/: a file in a folder that is there"),
        ([], [], "asked.jsonl: no records here"),
        (None, [], "there is no such file"),
    ],
)
def test_a_file_that_cannot_be_asked_is_named(
    rows, options, message, ask, tmp_path, capsys
):
    path = tmp_path / "asked.jsonl"
    if rows is not None:
        path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit) as ended:
        ask(f"--file={path}", *options)
    assert ended.value.code == 1
    assert re.search(message.replace("?", "."), capsys.readouterr().err)


def test_what_cannot_be_scored_is_told_as_missing_from_all(ask, tmp_path):
    rows = [{"q": "?", "a": "Paris"}, {"q": "?", "a": ""}, {"q": "? " * 900, "a": "x"}]
    path = tmp_path / "asked.json"
    path.write_text(json.dumps(rows))
    options = ["--columns=instruction=q, output=a", f"--out={tmp_path}/out.json"]
    said, told = ask(f"--file={path}", *options)
    assert (told["questions"], told["left_out"], len(told["answers"])) == (1, 2, 1)
    assert "On 1 questions" in said
    assert "Left out of all of this, 2 of 3 records" in said


def test_a_question_with_its_input_is_the_record_that_was_trained_on(
    finished, ask, monkeypatch
):
    seen = []
    prompt = templates.prompt
    monkeypatch.setattr(templates, "prompt", lambda *a: seen.append(a[1]) or prompt(*a))
    ask("--question=Answer this truthfully", f"--input={INPUT}", "--max-new-tokens=1")
    record = dataset.load_test(finished[0])[0][0]
    assert seen[-1] == [templates.question(record)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seq_length", "many"),
        ("seq_length", 0),
        ("batch_size", True),
        ("max_new_tokens", 2**40),
        ("columns", ["instruction"]),
        ("columns", {"instruction": "a"}),
        ("columns", COLUMNS | {"input": 3}),
    ],
)
def test_settings_of_an_adapter_folder_that_are_none_are_named(
    key, value, finished, tmp_path
):
    adapter = shutil.copytree(finished[1] / "peft_2", tmp_path / "peft_2")
    about = read(adapter, "flowertune")
    utils.write_json(adapter / "flowertune.json", about | {key: value})
    with pytest.raises(UserError, match=f"its {key} is "):
        model.read_about(str(adapter))


def test_an_older_adapter_folder_is_asked_with_the_defaults(finished, ask):
    file = finished[1] / "peft_2/flowertune.json"
    before = file.read_text()
    about = {k: v for k, v in json.loads(before).items() if k not in model.EXAMINED}
    file.write_text(json.dumps(about))
    try:
        columns = ",".join(f"{name}={column}" for name, column in COLUMNS.items())
        path = finished[1] / "test.jsonl"
        said, _ = ask(f"--file={path}", f"--columns={columns}", "--max-new-tokens=1")
    finally:
        file.write_text(before)
    assert "taken from the defaults: columns, seq_length, batch_size" in said
    assert "On 4 questions" in said
