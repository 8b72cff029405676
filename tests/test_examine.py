"""pytest tests/test_examine.py: scores of answers and of adapters, against ones by hand."""

import json
import math

import pytest
import torch

import dataset
import model
from evaluation import examine
from records import templates
from tasks import generation, words
from utils import IGNORED, UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "wanted", "exact", "f1", "rouge"),
    [
        ("Paris", " Paris\n", 1, 1, 1),
        ("paris.", "Paris", 0, 1, 1),
        ("the capital is Paris", "Paris", 0, 2 / 5, 2 / 5),
        ("b a", "a b", 0, 1, 1 / 2),  # the same words in another order
        ("a a b", "a b b", 0, 2 / 3, 2 / 3),  # a word counts as often as in both
        ("x a y b z c", "a b c", 0, 6 / 9, 6 / 9),
        ("", "Paris", 0, 0, 0),
        ("...", "!", 0, 1, 1),  # no words on either side
    ],
)
def test_answers_are_scored_as_by_hand(given, wanted, exact, f1, rouge):
    assert words.exact_match(given, wanted) == exact
    assert words.f1(given, wanted) == pytest.approx(f1)
    assert words.rouge_l(given, wanted) == pytest.approx(rouge)


@pytest.fixture
def exam(configure, tmp_path):
    """An examination of six questions, each with three choices."""
    records = [
        {"q": f"What is {i}?", "a": name, "c": ["one", "two", "a much longer answer"]}
        for i, name in enumerate(["one", "two", "a much longer answer"] * 2)
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    cfg = configure(
        "evaluate.every_round=1",
        "evaluate.exact_match=true",
        "evaluate.max_new_tokens=2",
    )
    columns = {"instruction": "q", "input": None, "output": "a"}
    cfg |= {
        "dataset": cfg.dataset | {"test_path": str(path), "columns": columns},
        "evaluate": cfg.evaluate | {"choices": "c"},
    }
    return cfg, examine.Examination(cfg), path


def plain_nats(exam: examine.Examination, record: dict) -> tuple[float, int, int]:
    """Summed nats, tokens foretold and tokens of an answer, example by example."""
    example = templates.encode(record, "alpaca", exam.tokenizer, 128)
    labels = torch.tensor(example["labels"])
    with torch.no_grad(), model.autocast(exam.net):
        logits = exam.net(input_ids=torch.tensor([example["input_ids"]])).logits[0]
    likely = logits[:-1].float().log_softmax(-1)
    kept = labels[1:] != IGNORED
    nats = -likely[kept].gather(1, labels[1:][kept, None]).sum().item()
    right = (likely[kept].argmax(-1) == labels[1:][kept]).sum().item()
    return nats, right, int(kept.sum())


@pytest.mark.slow
def test_loss_accuracy_and_choice_equal_the_plain_computation(exam):
    _, exam, _ = exam
    with exam.net.disable_adapter():
        each = [plain_nats(exam, record) for record in exam.records]
        chosen = 0
        for record, choices in zip(exam.records, exam.choices, strict=True):
            nats = [plain_nats(exam, {**record, "output": c})[0] for c in choices]
            chosen += choices[nats.index(min(nats))] == record["output"]
    scores, answers = exam.base()
    nats, right, tokens = (sum(column) for column in zip(*each, strict=True))
    # A batch's padding changes the rounding of bfloat16.
    assert scores["test_loss"] == pytest.approx(nats / tokens, rel=0.02)
    assert scores["test_accuracy"] == pytest.approx(right / tokens, abs=2 / tokens)
    assert scores["choice_accuracy"] == pytest.approx(chosen / 6)
    # The same of each question, in the order of the test file.
    found = zip(
        *(scores.questions[x] for x in ("nats", "right", "tokens")), strict=True
    )
    for (ours, hits, count), (theirs, likely, tokens) in zip(found, each, strict=True):
        assert count == tokens
        assert ours == pytest.approx(theirs, rel=0.05)
        assert abs(hits - likely) <= 1
    assert sum(scores.questions["choice_accuracy"]) == chosen
    assert len(answers) == 6
    assert scores["exact_match"] == 0


@pytest.mark.slow
def test_the_adapter_is_what_is_examined(exam):
    _, exam, _ = exam
    before, _ = exam.base()
    state = model.adapter_state(exam.net)
    # A fresh LoRA adapter changes nothing, and one with another B does.
    assert exam.tuned(state)[0] == before
    moved = {k: v + 0.1 if "lora_B" in k else v for k, v in state.items()}
    after, _ = exam.tuned(moved)
    assert after["test_loss"] != before["test_loss"]
    assert exam.measure(moved)["test_loss"] == after["test_loss"]
    assert exam.base()[0] == before


@pytest.mark.slow
@pytest.mark.parametrize("value", ["two", 5, None, [], ["three"], {"a": "two"}])
def test_choices_that_are_none_are_named(exam, value):
    cfg, _, path = exam
    path.write_text(json.dumps({"q": "?", "a": "two", "c": value}))
    with pytest.raises(UserError, match=r"evaluate.choices=c: a list of answers is"):
        dataset.load_test(cfg)


@pytest.mark.slow
def test_only_what_can_be_scored_is_examined(exam):
    cfg, _, path = exam
    lines = path.read_text().splitlines()
    good = [json.loads(line) for line in lines]
    odd = [
        good[0] | {"a": "", "c": ["", "two"]},
        good[0] | {"q": "word " * 200},
        good[0] | {"c": ["one", "word " * 200]},  # a choice that would be cut
    ]
    path.write_text("\n".join(map(json.dumps, [*odd, *good])))
    found = examine.Examination(cfg)
    assert found.left_out == 3
    assert [record["instruction"] for record in found.records] == [r["q"] for r in good]
    assert len(found.records) == len(found.choices) == len(found.examples) == 6
    scores, answers = found.base()
    assert len(answers) == 6
    assert all(math.isfinite(score) for score in scores.values())


@pytest.mark.slow
def test_an_answer_stops_where_the_base_itself_stops(exam):
    _, exam, _ = exam
    net, tokenizer = exam.net, exam.tokenizer
    asked = {"instruction": "Which city is the capital of France?", "input": ""}
    prompts = [templates.prompt("alpaca", [asked], tokenizer)]
    own = templates.ends("alpaca", tokenizer, net.generation_config)
    assert own == [tokenizer.eos_token_id]
    ids = torch.tensor(prompts)
    with torch.no_grad(), model.autocast(net):
        whole = net.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )[0, ids.shape[1] :].tolist()
    places = [i for i in range(1, len(whole)) if whole[i] not in whole[:i]]
    stop = places[0]
    assert whole[stop] != tokenizer.eos_token_id
    net.generation_config.eos_token_id = [whole[stop], 2]
    ends = templates.ends("alpaca", tokenizer, net.generation_config)
    assert set(ends) == {whole[stop], 2}
    answers = generation.generate(net, tokenizer, prompts, 8, ends)
    # The token is no special one, and is no part of the answer all the same.
    assert answers == [tokenizer.decode(whole[:stop]).strip()]


@pytest.mark.slow
def test_the_server_examines_with_all_cores_and_gives_them_back(exam, monkeypatch):
    _, exam, _ = exam
    monkeypatch.setattr(model, "CORES", 3)
    seen = []
    score = examine.score
    monkeypatch.setattr(
        examine, "score", lambda *a: seen.append(torch.get_num_threads()) or score(*a)
    )
    before = torch.get_num_threads()
    state = model.adapter_state(exam.net)
    exam.base(), exam.measure(state), exam.tuned(state, exam.measure(state))
    assert set(seen) == {3}
    assert torch.get_num_threads() == before != 3
