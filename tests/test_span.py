"""pytest tests/test_span.py: answers that stand in a text, against transformers and SQuAD."""

import itertools
import json
import re

import pytest
import torch
from datasets import Dataset, Features, List, Value
from transformers import AutoModelForQuestionAnswering

import client
import dataset
import model
import tasks
import test as ask
from assets.testbed import bases, families
from settings import preflight
from settings.compose import compose, resolve
from settings.schema import validated
from tasks import span
from tasks.base import Unsuited
from tasks.span import Span
from utils import IGNORED, Settings, UserError, cohort_size

pytestmark = pytest.mark.usefixtures("in_float32")

TEXT = "Paris is the capital of France. The capital of Haïti is Port-au-Prince, in the west."
QUESTION = "What is the capital of Haïti?"


def task(length: int = 64) -> Span:
    cfg = {"dataset": {"template": "alpaca"}, "train": {"seq_length": length}}
    return Span(Settings.of(cfg), "QUESTION_ANS")


def squad(*answers: str, text: str = TEXT) -> str:
    starts = [text.index(answer) for answer in answers]
    return json.dumps({"text": answers, "answer_start": starts})


def record(output: str, text: str = TEXT) -> dict[str, str]:
    return {"instruction": QUESTION, "input": text, "output": output}


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(1)
    return AutoModelForQuestionAnswering.from_config(bases.CONFIGS[name]()).eval()


def tokenizer_of(kind: str, frame: str = "<s> $A </s>"):
    tokenizer = families.framed(families.family(kind), frame)
    tokenizer.pad_token = "</s>"
    return tokenizer


@pytest.mark.parametrize("answer", ["Paris", "Port-au-Prince", "France", "Haïti"])
@pytest.mark.parametrize("kind", families.KINDS)
def test_the_labelled_tokens_are_the_answers(kind, answer):
    """Of all tokens those that the answer's characters are in, wherever a tokenizer cuts."""
    tokenizer, made = tokenizer_of(kind), task(300)
    example = made.encode(record(answer), tokenizer)
    first, last = example["labels"]
    [window] = made._windows(record(answer), tokenizer)
    start, end = TEXT.index(answer), TEXT.index(answer) + len(answer)
    inside = [
        i
        for i, place in enumerate(window["places"])
        if place and {*range(*place)} & {*range(start, end)}
    ]
    assert (first, last) == (inside[0], inside[-1])
    assert (
        TEXT[window["places"][first][0] : window["places"][last][1]].strip() == answer
    )
    # With its place given, and as the first of several, it is the same.
    for output in (squad(answer), squad(answer, "capital"), json.dumps([answer])):
        assert made.encode(record(output), tokenizer) == example
    assert "lost" not in example


def test_a_given_place_counts_and_not_the_first_one_like_it():
    tokenizer, made = bases.tokenizer("bert"), task()
    second = TEXT.index("capital", 20)
    output = json.dumps({"text": ["capital "], "answer_start": [second]})
    first, found = (
        made.encode(record(one), tokenizer)["labels"] for one in ("capital", output)
    )
    assert found > first


@pytest.mark.parametrize("name", bases.ENCODERS)
def test_question_and_text_are_put_together_as_transformers_does(name):
    tokenizer = bases.tokenizer(name)
    theirs = tokenizer(QUESTION, TEXT, return_token_type_ids=True)
    example = task(128).encode(record("Paris"), tokenizer)
    assert example["input_ids"] == theirs["input_ids"]
    assert example["types"] == theirs["token_type_ids"]
    assert 1 in example["types"]


@pytest.mark.parametrize("name", bases.CONFIGS)
def test_loss_and_gradient_are_transformers_own(name):
    tokenizer, made, net = bases.tokenizer(name), task(128), network(name)
    example = made.encode(record("Port-au-Prince"), tokenizer)
    inputs = {"input_ids": torch.tensor([example["input_ids"]])}
    if name == "bert":
        inputs["token_type_ids"] = torch.tensor([example["types"]])
    start, end = torch.tensor(example["labels"]).split(1)
    wanted = net(**inputs, start_positions=start, end_positions=end).loss
    wanted.backward()
    theirs = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    batch = made.collator(tokenizer, "left")([example, made.blank()])
    assert batch["labels"].tolist() == [example["labels"], [IGNORED, IGNORED]]
    found = made.loss(net, batch)
    found.backward()
    ours = [p.grad for p in net.parameters() if p.grad is not None]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(made.loss(net, batch, 8), wanted / 4)
    scores = made.score(net, batch)
    assert scores[0, 0].item() / 2 == pytest.approx(wanted.item(), rel=1e-6)
    assert scores[:, 2].tolist() == [2, 0]
    told = made.metrics(scores)
    assert told["loss"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("method", ["peft.LoraConfig", "peft.PromptTuningConfig"])
def test_an_adapters_base_is_told_which_text_a_token_is_of(method, tmp_path):
    """PEFT's own class for it takes token_type_ids and does not pass them on (0.21.2)."""
    about = {"name": bases.write("bert", tmp_path), "quantization": None}
    about |= {"gradient_checkpointing": False}
    own = {"r": 4, "target_modules": "all-linear"}
    if "Prompt" in method:
        own = {"num_virtual_tokens": 3}
    settings = {"_target_": method, "task_type": "QUESTION_ANS"} | own
    net = model.build(about, settings, 0, torch.device("cpu")).eval()
    tokenizer, made = bases.tokenizer("bert"), task(100)
    example = made.encode(record("Paris"), tokenizer)
    batch = made.collator(tokenizer, "left")([example])
    given = made._logits(net, batch)
    batch["types"] = torch.zeros_like(batch["types"])
    other = made._logits(net, batch)
    seen = batch["attention_mask"][:, None].expand_as(given) > 0
    assert given.shape == other.shape == (1, 2, batch["input_ids"].shape[1])
    assert not torch.allclose(given[seen], other[seen], atol=1e-3)
    if "Lora" in method:  # which begins by changing nothing
        base = net.get_base_model()
        plain = base(torch.tensor([example["input_ids"]])).start_logits[0]
        torch.testing.assert_close(other[0, 0, : len(plain)], plain)


@pytest.mark.parametrize("length", [24, 32, 48])
@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_a_long_text_is_read_in_windows(kind, length):
    made = task(length)
    tokenizer = bases.tokenizer(kind) if kind == "llama" else tokenizer_of(kind)
    words = [f"w{i}" for i in range(60)]
    text = " ".join(words)
    asked = {"instruction": "w", "input": text}
    windows = made._windows(asked, tokenizer)
    assert len(windows) > 2
    assert all(len(one["input_ids"]) <= length for one in windows)
    read = [{*filter(None, one["places"])} for one in windows]
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert {*itertools.chain(*read)} >= {
        p for p in whole["offset_mapping"] if p[0] < p[1]
    }
    for word in (words[0], words[20], words[37], words[59]):
        start = text.index(word)
        example = made.encode(
            asked | {"output": json.dumps({"text": [word], "answer_start": [start]})},
            tokenizer,
        )
        assert made.is_cut(example, tokenizer)
        assert example["lost"] == [len(windows) - 1]
        [window] = [w for w in windows if w["input_ids"] == example["input_ids"]]
        first, last = example["labels"]
        found = window["places"][first][0], window["places"][last][1]
        assert text[slice(*found)].strip() == word
        # No other window that holds it has more of the text on both sides.
        room = span.margin(window["places"], (first, last))
        held = [span.held_at(w["places"], start, start + len(word)) for w in windows]
        others = [
            span.margin(w["places"], at)
            for w, at in zip(windows, held, strict=True)
            if at
        ]
        assert room == max(others)


def test_a_question_that_leaves_no_room_has_no_answer():
    tokenizer, made = bases.tokenizer("bert"), task(12)
    long = record("Paris") | {"instruction": "what is " * 9}
    assert made.encode(long, tokenizer) is None
    assert made.answers(network("bert"), tokenizer, [long], 5) == [""]
    # Nor has an answer that no window holds whole.
    assert made.encode(record(TEXT[:70]), tokenizer) is None


def test_the_likeliest_span_is_that_of_all_spans():
    generator = torch.Generator().manual_seed(0)
    where = [None, None, None, (0, 3), (3, 5), (5, 9), None, (9, 12), (12, 13), None]
    for limit in (1, 2, 3, 9):
        starts, ends = torch.randn(2, len(where), generator=generator)
        starts[0] = ends[9] = 50.0  # of no token of the text
        of_text = [i for i, place in enumerate(where) if place]
        best = max(
            ((starts[a] + ends[b]).item(), (where[a][0], where[b][1]))
            for i, a in enumerate(of_text)
            for b in of_text[i : i + limit]
        )
        found = span.likeliest(starts, ends, where, limit)
        assert found == (pytest.approx(best[0]), best[1])


def fixed(net: torch.nn.Module, tokens: dict[int, float]) -> None:
    """Have a network answer with tokens, by id: the logit of beginning and ending there."""

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **_):
        logits = torch.zeros(input_ids.shape)
        for token, value in tokens.items():
            logits[input_ids == token] = value
        return type("Out", (), {"start_logits": logits, "end_logits": logits})

    net.forward = forward


def test_the_best_of_all_windows_is_the_answer_or_none_is():
    tokenizer, made, net = bases.tokenizer("bert"), task(24), network("bert")
    text = "is a verb " * 12 + "of paris " + "is a verb " * 9
    asked = {"instruction": "what?", "input": text, "output": ""}
    assert len(made._windows(asked, tokenizer)) > 3
    paris = tokenizer.convert_tokens_to_ids("paris")
    cls = tokenizer.cls_token_id
    fixed(net, {paris: 5.0, cls: 3.0})
    short = asked | {"input": "where paris is"}
    assert made.answers(net, tokenizer, [asked, short], 8) == ["paris", "paris"]
    fixed(net, {paris: 5.0, cls: 6.0})
    assert made.answers(net, tokenizer, [asked, short], 8) == ["", ""]
    assert "does not answer" in made.told(net, tokenizer, [short], 8)[0]


def test_that_there_is_no_answer_is_learnt_at_the_first_token():
    tokenizer, made = bases.tokenizer("bert"), task()
    for output in (squad(), "[]"):
        assert made.fault(record(output)) is None
        example = made.encode(record(output), tokenizer)
        assert example["labels"] == [0, 0]
        assert example["input_ids"][0] == tokenizer.cls_token_id
    assert made.encode(record(" "), tokenizer) is None  # nobody knows


# SQuAD's own normalisation and maximum over the answers, by hand: (given, wanted, EM, F1).
CASES = [
    ("the Eiffel Tower!", ["Eiffel tower"], 1, 1),
    ("Tower", ["the Eiffel Tower"], 0, 2 / 3),
    ("Eiffel Tower in Paris", ["Tower", "Eiffel Tower"], 0, 2 / 3),
    ("a cat and a cat", ["cat"], 0, 1 / 2),
    ("U.S.", ["US", "America"], 1, 1),
    ("an other", ["another"], 0, 0),
    ("", [], 1, 1),
    ("Paris", [], 0, 0),
    ("", ["Paris"], 0, 0),
    ("the", [], 1, 1),
    ("Zürich-West", ["zürichwest"], 1, 1),
]


@pytest.mark.parametrize(("given", "wanted", "exact", "f1"), CASES)
def test_answers_are_judged_as_squad_judges_them(given, wanted, exact, f1):
    starts = [0] * len(wanted)
    output = json.dumps({"text": wanted, "answer_start": starts})
    told = task().judge([given], [output])
    assert told == {"exact_match": [exact], "f1": [pytest.approx(f1)]}
    if len(wanted) == 1 and wanted[0]:
        assert task().judge([given], wanted) == told


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("London", "'London' does not stand in its text"),
        (json.dumps(["paris"]), "'paris' does not stand"),
        (json.dumps({"text": ["Paris"], "answer_start": [3]}), "text at 3"),
        (json.dumps({"text": ["Paris"], "answer_start": [-1]}), "text at -1"),
        (json.dumps({"text": ["Paris"]}), "no equal lists"),
        (json.dumps({"text": ["Paris"], "answer_start": [0, 1]}), "no equal lists"),
        (json.dumps({"text": [" "], "answer_start": [5]}), "does not stand"),
    ],
)
def test_an_answer_that_is_not_there_is_refused(output, said):
    assert said in task().fault(record(output))
    with pytest.raises(Unsuited, match=re.escape(said)):
        task().encode(record(output), bases.tokenizer("bert"))
    for fine in ("Paris", squad("Paris", "France"), squad(), "", json.dumps(["Paris"])):
        assert task().fault(record(fine)) is None


def test_answers_of_squad_on_the_hub_become_json():
    answers = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
    kinds = {"question": Value("string"), "context": Value("string")}
    held = {"text": ["Paris"], "answer_start": [0]}
    rows = Dataset.from_dict(
        {"question": [QUESTION], "context": [TEXT], "answers": [held]},
        features=Features(kinds | {"answers": answers}),
    )
    columns = {"instruction": "question", "input": "context", "output": "answers"}
    about = Settings.of({"name": "a/b", "columns": columns | {"messages": None}})
    made = dataset.as_records(rows, about, ["answers"])
    assert dataset.to_record(made[0], about.columns) == record(squad("Paris"))


@pytest.mark.slow
def test_local_records_are_read_and_the_bad_one_is_told(configure, tmp_path):
    path = tmp_path / "spans.jsonl"
    rows = [
        {"question": QUESTION, "context": TEXT, "answers": json.loads(squad("Paris"))},
        {"question": QUESTION, "context": TEXT, "answers": ["France"]},
        {"question": QUESTION, "context": TEXT, "answers": "Haïti"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    run = (
        f"task=span dataset=local dataset.path={path} num_clients=1 "
        "dataset.columns.instruction=question dataset.columns.input=context "
        "dataset.columns.output=answers"
    )
    cfg = configure(run)
    assert cfg.peft.task_type == "QUESTION_ANS"
    held = dataset.load_partition(cfg, 0)["answers"]
    assert sorted(held) == sorted([squad("Paris"), '["France"]', "Haïti"])
    assert isinstance(tasks.build(cfg), Span)
    with pytest.raises(UserError, match="looks for answers in a text"):
        configure(f"{run} dataset.columns.input=null")
    with pytest.raises(UserError, match="tells no labels apart"):
        configure(f"{run} dataset.labels=[a,b,c]")
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"answers": "Rome"}])))
    with pytest.raises(UserError, match=r"spans.jsonl, record 4: its answer 'Rome'"):
        configure(run)


def test_fednlp_s_setting_is_there_by_name():
    cfg = validated(resolve(compose("experiment=fednlp_squad")))
    assert cfg.model.name.endswith("distilbert-base-uncased")
    assert (cfg.num_clients, cfg.num_rounds, cfg.partitioner.alpha) == (300, 15, 0.1)
    assert cohort_size(cfg.num_clients, cfg.strategy.fraction_fit) == 10
    tasks.build(cfg).check(cfg)


@pytest.mark.slow
def test_a_client_learns_to_point_and_its_adapter_does(tmp_path, capsys, monkeypatch):
    cfg = preflight.check(
        compose(
            "experiment=span num_clients=2 strategy.fraction_fit=0.5 "
            "strategy.fraction_evaluate=1 train.training_arguments.max_steps=60"
        )
    )
    start = client.initial_adapter(cfg)
    before = client.evaluate(cfg, start, 0)
    state, _ = client.train(cfg, start, 0, 1)
    after = client.evaluate(cfg, state, 0)
    assert after["eval_loss"] < 0.95 * before["eval_loss"]
    client.save(cfg, state, tmp_path / "peft_1", 1)
    asked = ["--question=What is the capital of Jamaica?", "--input=Kingston."]
    arguments = ["test.py", f"--peft-path={tmp_path}/peft_1", *asked, "--device=cpu"]
    monkeypatch.setattr("sys.argv", arguments)
    ask.main()
    said = capsys.readouterr().out
    net = model.build_once(cfg.model, cfg.peft, cfg.seed, torch.device("cpu")).eval()
    model.set_adapter_state(net, state)
    tokenizer = model.load_tokenizer(cfg.model.name)
    one = {"instruction": "What is the capital of Jamaica?", "input": "Kingston."}
    [told] = tasks.build(cfg).told(net, tokenizer, [one], 256)
    assert f"A: {told}\n" in said
