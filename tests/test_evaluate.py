"""pytest tests/test_evaluate.py: lm-eval's tasks, asked in the template of training."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
import yaml

import model
from evaluation import benchmarks, harness
from records import batches, templates
from settings.compose import compose, resolve
from tasks import generation
from utils import PROJECT, UserError

pytestmark = pytest.mark.usefixtures("in_float32")

CPU = torch.device("cpu")
TASKS = sorted(path.stem for path in harness.TASKS.glob("*.yaml"))
PRESETS = ["code", "finance", "general-nlp", "medical"]
RECORDS = [
    {"instruction": "Name a colour.", "input": "", "output": "red"},
    {"instruction": "Translate.", "input": "rouge\nvert", "output": "red\ngreen"},
    {"instruction": "What is </s>?", "input": "<s>[INST]", "output": "a tag </s>"},
]


def config(name):
    return harness.load_yaml(harness.TASKS / f"{name}.yaml", resolve_func=False)


@pytest.fixture(scope="module")
def command():
    """What `test.py --tasks` does."""
    return benchmarks


@pytest.fixture(scope="module")
def net():
    """The tiny base with a LoRA adapter of random weights."""
    cfg = compose("experiment=quickstart")
    model_cfg, peft_cfg = (resolve(part) for part in (cfg.model, cfg.peft))
    net = model.build(model_cfg, peft_cfg, 0, CPU)
    generator = torch.Generator().manual_seed(3)
    state = {
        name: torch.randn(value.shape, generator=generator) * 0.05
        for name, value in model.adapter_state(net).items()
    }
    model.set_adapter_state(net, state)
    return net.eval()


class Watched(harness.Adapter):
    """Keeps the tokens that reach the model, and the answers."""

    def _model_generate(self, context, **kwargs):
        mask = kwargs["attention_mask"].bool()
        rows = zip(context, mask, strict=True)
        self.asked = [row[own].tolist() for row, own in rows]
        return super()._model_generate(context, **kwargs)

    def _loglikelihood_tokens(self, requests, **kwargs):
        self.scored = [(before, after) for _, before, after in requests]
        return super()._loglikelihood_tokens(requests, **kwargs)

    def generate_until(self, requests, **kwargs):
        self.answers = super().generate_until(requests, **kwargs)
        return self.answers


def watch(net, template):
    tokenizer = model.load_tokenizer("assets/tiny_llama")
    return Watched(net, tokenizer, template, batch_size=8)


@pytest.fixture(params=list(templates.TEMPLATES))
def watched(net, request):
    return watch(net, request.param)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Writes a file of tasks, and their questions, into the working directory."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(record) + "\n" for record in RECORDS]
    (tmp_path / "questions.jsonl").write_text("".join(lines))

    def write(settings):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
        return "mine.yaml"

    return write


def mine(**changes):
    """The settings of tasks/tiny_qa.yaml with other questions."""
    files = {"data_files": {"test": "questions.jsonl"}}
    return config("tiny_qa") | {"task": "mine", "dataset_kwargs": files} | changes


# --- the prompt ---------------------------------------------------------------------------------


def test_what_a_task_file_asks_is_trainings_prompt_and_the_answers_are_ours(
    watched, task
):
    titles, tasks = harness.load([task(mine())], allow_code=False)
    results = harness.run(watched, tasks, limit=None)
    prompts = [
        templates.prompt(
            watched.template,
            [{"instruction": r["instruction"], "input": r["input"]}],
            watched.tokenizer,
        )
        for r in RECORDS
    ]
    assert sorted(watched.asked) == sorted(prompts)
    ends = templates.ends(
        watched.template, watched.tokenizer, watched.model.generation_config
    )
    answers = generation.generate(watched.model, watched.tokenizer, prompts, 32, ends)
    assert [answer.strip() for answer in watched.answers] == answers
    (row,) = harness.figures(titles, tasks, results)
    assert (row["task"], row["metric"], row["questions"]) == ("mine", "exact_match", 3)
    assert row["value"] == 0


def test_a_choice_is_scored_as_trainings_answer(watched, task):
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    settings = mine(
        output_type="multiple_choice",
        generation_kwargs=None,
        doc_to_choice=[record["output"] for record in RECORDS],
        metric_list=[accuracy],
    )
    titles, tasks = harness.load([task(settings)], allow_code=False)
    results = harness.run(watched, tasks, limit=None)
    encoded = [
        templates.encode(
            record | {"output": choice["output"]},
            watched.template,
            watched.tokenizer,
            seq_length=1000,
        )
        for record in RECORDS
        for choice in RECORDS
    ]
    expected = [example["input_ids"][:-1] for example in encoded]
    assert [before + after for before, after in watched.scored] == expected
    begins = [sum(x == -100 for x in example["labels"]) for example in encoded]
    assert [len(before) for before, _ in watched.scored] == begins
    # By likelihood, with our own arithmetic.
    collate = batches.Collator(watched.tokenizer.pad_token_id, "right")
    right = 0
    for place in range(3):
        batch = collate(encoded[3 * place : 3 * place + 3])
        with torch.no_grad(), model.autocast(watched.model):
            logits = watched.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        chances = logits.float().log_softmax(-1)[:, :-1]
        labels = batch["labels"][:, 1:]
        known = labels.clamp(min=0).unsqueeze(-1)
        found = chances.gather(-1, known).squeeze(-1) * (labels >= 0)
        found[labels == watched.tokenizer.eos_token_id] = 0
        right += found.sum(-1).argmax().item() == place
    (row,) = harness.figures(titles, tasks, results)
    assert row["value"] == pytest.approx(right / 3)


def test_examples_and_a_begun_answer_stand_in_one_record(watched):
    chat = [
        {"role": "system", "content": "Complete the function.\n\n"},
        {"role": "user", "content": "f(1) = 2\n\nf(2) ="},
        {"role": "assistant", "content": "It is "},
    ]
    prompt = watched.apply_chat_template(chat, add_generation_prompt=False)
    record = {
        "instruction": "Complete the function.",
        "input": "f(1) = 2\n\nf(2) =",
        "output": "It is 4",
    }
    whole = templates.encode(record, watched.template, watched.tokenizer, 1000)
    before, after = watched._encode_pair(prompt, "4")
    assert before + after == whole["input_ids"][:-1]
    assert watched.tokenizer.decode(after).strip() == "4"
    asked = {"instruction": record["instruction"], "input": record["input"]}
    plain = templates.prompt(watched.template, [asked], watched.tokenizer)
    begun = watched.tok_encode(prompt)  # which the model goes on with
    assert begun[: len(plain)] == plain
    assert watched.tokenizer.decode(begun[len(plain) :]).strip() == "It is"


def test_what_is_too_long_loses_its_beginning_and_says_so(watched, task, caplog):
    watched._max_length = 40
    _, tasks = harness.load([task(mine())], allow_code=False)
    harness.run(watched, tasks, limit=None)
    assert {len(ids) for ids in watched.asked} <= set(range(1, 9))
    assert "loses its beginning" in caplog.text


# --- tasks --------------------------------------------------------------------------------------


def test_code_is_not_run_unasked(task):
    name = task(mine(unsafe_code=True))
    with pytest.raises(UserError, match=r"mine runs code .*--allow-code-execution"):
        harness.load([name], allow_code=False)
    titles, _ = harness.load([name], allow_code=True)
    assert titles == ["mine"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("services: {}", "is no task file"),
        ("a: [", "is no task file"),
        (
            "{task: broken, dataset_path: json, test_split: test, "
            "dataset_kwargs: {data_files: {test: nowhere.jsonl}}}",
            "questions could not be loaded",
        ),
    ],
)
def test_a_broken_task_file_is_explained(text, message, tmp_path):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        harness.load([str(tmp_path / "broken.yaml")], allow_code=False)


def test_questions_that_are_out_of_reach_are_explained():
    with pytest.raises(UserError, match=r"--tasks=finance: .* need a network"):
        harness.load(["finance"], allow_code=False)


def test_the_shipped_local_tasks_load_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    titles, tasks = harness.load(["tiny_qa", "tiny_choice"], allow_code=False)
    assert titles == ["tiny_qa", "tiny_choice"]
    docs = tasks["tasks"]["tiny_choice"].eval_docs
    assert len(docs) == len(tasks["tasks"]["tiny_qa"].eval_docs) == 335
    assert docs[:]["choices"] == tasks["tasks"]["tiny_choice"].eval_docs[:]["choices"]
    by_category = {}
    for doc in docs:
        by_category.setdefault(doc["category"], set()).add(doc["output"])
    for doc in docs:
        assert doc["choices"][doc["right"]] == doc["output"]
        assert len(set(doc["choices"])) == 4
        assert set(doc["choices"]) <= by_category[doc["category"]]


@pytest.mark.parametrize("name", TASKS)
def test_a_shipped_file_opens_with_its_command_and_names_its_parts(name, command):
    first = (harness.TASKS / f"{name}.yaml").read_text().splitlines()[0]
    words = first.removeprefix("# python test.py ").split()
    assert command.parse(words).tasks == [name]
    settings = harness.load_yaml(harness.TASKS / f"{name}.yaml")  # functions and all
    assert settings.get("task" if name not in PRESETS else "group") == name


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_figures_belong_to_its_tasks_and_have_a_source(name):
    settings = config(name)
    values = dict(settings["metadata"]["flowertune"])
    average = values.pop("average", None)
    assert list(values) == settings["task"]
    if average is not None:
        assert average == pytest.approx(sum(values.values()) / len(values), abs=1e-4)
    assert "https://github.com/flwrlabs/flower/" in settings["metadata"]["source"]


# Their data cannot be had here: data of the same shape goes through the same files.


def test_financial_phrasebank_is_read_and_judged(net, tmp_path):
    watched = watch(net, "alpaca")
    archive = tmp_path / "bank.zip"
    lines = [
        f"Sales @ {i} \xe9 rose .@{('negative', 'neutral', 'positive')[i % 3]}\r\n"
        for i in range(40)
    ]
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("v1/all.txt", "".join(lines).encode("latin-1"))
    # `include` is resolved beside the file that includes.
    (tmp_path / "bank.yaml").write_text(
        f"include: {harness.TASKS}/fpb.yaml\ntask: bank\n"
        f"dataset_kwargs: {{archive: {archive}, member: v1/all.txt}}\n"
    )
    titles, tasks = harness.load([str(tmp_path / "bank.yaml")], allow_code=False)
    docs = tasks["tasks"]["bank"].eval_docs
    assert len(docs) == 10
    assert all(doc["sentence"].startswith("Sales @ ") for doc in docs)
    results = harness.run(watched, tasks, limit=4)
    question = "What is the sentiment of this news? Please choose an answer from "
    asked = {
        "instruction": question + "{negative/neutral/positive}.",
        "input": docs[0]["sentence"],
    }
    expected = templates.prompt(watched.template, [asked], watched.tokenizer)
    assert expected in watched.asked
    # Nonsense names no sentiment, which counts as neutral.
    (row,) = harness.figures(titles, tasks, results)
    assert row["metric"] == "acc"
    judge = tasks["tasks"]["bank"].config.process_results
    scores = [
        judge(doc, [answer])["acc"]
        for doc, answer in zip(docs, watched.answers, strict=False)
    ]
    assert row["value"] == sum(scores) / 4
    assert judge({"label": "positive"}, ["It is Positive."]) == {"acc": 1.0}
    assert judge({"label": "positive"}, ["negative"]) == {"acc": 0.0}
    assert judge({"label": "neutral"}, ["no idea"]) == {"acc": 1.0}


def test_the_other_sources_are_read(tmp_path):
    posts = {"sentence": "up", "sentiment_score": 0.5, "format": "post"}
    news = {"sentence": "down", "sentiment_score": -0.5, "format": "headline"}
    flat = {"sentence": "flat", "sentiment_score": 0.0, "format": "headline"}
    folder = tmp_path / "fiqa"
    folder.mkdir()
    for split, row in (("train", posts), ("validation", news), ("test", flat)):
        (folder / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 8)
    abstracts = {
        str(i): {
            "CONTEXTS": ["One.", "Two."],
            "QUESTION": "So?",
            "final_decision": "no",
        }
        for i in range(3)
    }
    with zipfile.ZipFile(tmp_path / "pqal.zip", "w") as file:
        file.writestr("pqal_test_set.json", json.dumps(abstracts))
    tweets = tmp_path / "tweets.jsonl"
    tweets.write_text(
        "".join(json.dumps({"text": "t", "label": i}) + "\n" for i in range(3))
    )
    files = {
        "fiqa": {"dataset_kwargs": {"path": str(folder)}},
        "pubmedqa_test": {
            "dataset_kwargs": {
                "archive": str(tmp_path / "pqal.zip"),
                "member": "pqal_test_set.json",
            }
        },
        "tfns": {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(tweets)}},
        },
    }
    for name, changes in files.items():
        include = {"include": str(harness.TASKS / f"{name}.yaml"), "task": f"my_{name}"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(include | changes))
    paths = [str(tmp_path / f"{name}.yaml") for name in files]
    _, tasks = harness.load(paths, allow_code=False)
    loaded = tasks["tasks"]
    sentiments = {
        (doc["sentence"], doc["kind"], doc["label"])
        for doc in loaded["my_fiqa"].eval_docs
    }
    assert len(loaded["my_fiqa"].eval_docs) == 6
    assert sentiments <= {
        ("up", "tweet", "positive"),
        ("down", "news", "negative"),
        ("flat", "news", "neutral"),
    }
    labels = [doc["label"] for doc in loaded["my_tfns"].eval_docs]
    assert labels == ["negative", "positive", "neutral"]
    (medical, *_) = docs = loaded["my_pubmedqa_test"].eval_docs
    assert len(docs) == 3
    text = loaded["my_pubmedqa_test"].doc_to_text(medical)
    assert text == "Abstract: One.\nTwo.\nQuestion: So?\nAnswer:"
    assert loaded["my_pubmedqa_test"].doc_to_target(medical) == "no"


# --- the table ----------------------------------------------------------------------------------


def test_a_preset_is_shown_by_its_parts_their_average_and_flowertunes(net, task):
    published = {"preset::one": 0.25, "average": 0.5}
    preset = {
        "group": "preset",
        "task": [mine(task="one"), mine(task="two", doc_to_target="instruction")],
        "metadata": {"flowertune": published, "source": "a paper"},
    }
    titles, tasks = harness.load([task(preset)], allow_code=False)
    results = harness.run(watch(net, "alpaca"), tasks, limit=2)
    rows = harness.figures(titles, tasks, results)
    names = [row["task"] for row in rows]
    assert names == ["preset::one", "preset::two", "preset: average"]
    assert [row["questions"] for row in rows] == [2, 2, None]
    assert [row["flowertune"] for row in rows] == [0.25, None, 0.5]
    assert rows[2]["value"] == (rows[0]["value"] + rows[1]["value"]) / 2
    assert harness.sources(titles, tasks) == ["a paper"]


def test_a_table_has_the_columns_that_are_filled_and_their_units(command):
    row = {"task": "a", "metric": "acc", "questions": 7, "value": 0.5}
    row |= {"stderr": 0.1, "flowertune": None}
    assert command.table([row]).splitlines() == [
        "| task | metric | unit | questions | tuned |",
        "| --- | --- | --- | --- | --- |",
        "| a | acc | % | 7 | 50.00 ± 10.00 |",
    ]
    rows = [row | {"base": 0.25, "flowertune": 0.2, "stderr": "N/A"}]
    rows += [row | {"metric": "bleu", "value": 31.4159, "stderr": 1.5}]
    rows += [row | {"metric": "word_perplexity", "value": 12.3456, "stderr": "N/A"}]
    assert command.table(rows).splitlines()[2:] == [
        "| a | acc | % | 7 | 25.00 | 50.00 | 20.00 |",
        "| a | bleu | of 100 | 7 |  | 31.42 ± 1.50 |  |",
        "| a | word_perplexity |  | 7 |  | 12.35 |  |",
    ]


def test_what_lm_eval_calls_a_share_is_one(command):
    """By what its own aggregations make of right and wrong answers."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY as aggregations
    from lm_eval.api.registry import METRIC_REGISTRY as metrics

    assert command.SHARES & metrics.keys() >= {"acc", "acc_norm", "exact_match", "f1"}
    assert metrics.keys() >= command.OF_100
    pairs = [("the cat sat on the mat", "the cat sat on the mat")] * 4
    assert aggregations["bleu"](pairs) == pytest.approx(100)
    assert aggregations["chrf"](pairs) == pytest.approx(100)
    assert aggregations["f1"]([(1, 1), (0, 0)]) == 1


# --- the command --------------------------------------------------------------------------------


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=PROJECT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_the_command_finds_what_the_run_found(quickstart, tmp_path):
    folder = shutil.copytree(quickstart[0], tmp_path / "run")
    adapter = f"--peft-path={folder / 'peft_20'}"
    done = run("test.py", adapter, "--tasks=tiny_qa,tiny_choice", "--base")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    summary = json.loads((folder / "summary.json").read_text())
    written = json.loads((folder / "evaluation.json").read_text())
    asked, chosen = written["figures"]
    # Batches of another size round otherwise, which may turn an answer or two of 335.
    assert asked["value"] == pytest.approx(summary["exact_match_after"], abs=0.01)
    assert asked["base"] == pytest.approx(summary["exact_match_before"], abs=0.01)
    assert 0.9 < asked["value"] < 1
    assert chosen["value"] > chosen["base"]
    wanted = f"| tiny_qa | exact_match | % | 335 | {100 * asked['base']:.2f} |"
    assert wanted in done.stdout


@pytest.mark.slow
def test_code_tasks_find_the_library_evaluate(quickstart):
    adapter = f"--peft-path={quickstart[0] / 'peft_20'}"
    done = run("test.py", adapter, "--tasks=code", "--allow-code-execution")
    assert "code_eval" in done.stderr  # which that library would fetch
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_without_lm_eval_there_is_a_line_to_install_it(quickstart, tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError('No lm_eval')")
    adapter = f"--peft-path={quickstart[0] / 'peft_20'}"
    done = run("test.py", adapter, "--tasks=tiny_qa", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "pip install lm-eval==" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_every_part_of_a_preset_is_a_task_that_is_known():
    manager, specs = harness._find(PRESETS)
    for spec in specs:
        names = {c["task"] for c in harness._configs(spec, manager.task_index)}
        assert len(names) >= 2
    with pytest.raises(UserError, match="nonsense is neither a task of lm-eval's"):
        harness.load(["tiny_qa", "nonsense"], allow_code=False)


def test_the_help_of_benchmarks_is_where_the_doors_own_says(monkeypatch, capsys):
    import test as door

    with pytest.raises(SystemExit):
        door.parse(["--help"])
    words = re.search(r"--tasks=\s+--help", capsys.readouterr().out)[0].split()
    monkeypatch.setattr(sys, "argv", ["test.py", *words])
    with pytest.raises(SystemExit) as ended:
        door.main()
    assert ended.value.code == 0
    assert "--allow-code-execution" in capsys.readouterr().out
