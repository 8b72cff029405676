"""pytest tests/test_tagging.py: a tag for each word, against transformers and seqeval."""

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from seqeval.metrics import f1_score
from transformers import AutoModelForTokenClassification

import client
import dataset
import model
import tasks
import test as ask
from assets.testbed import bases, families
from node import permit
from server import journal, rounds
from settings import preflight
from settings.compose import compose, resolve
from settings.schema import validated
from tasks import pieces
from tasks.base import Unsuited
from tasks.tagging import Tagging
from utils import IGNORED, PROJECT, Refusal, Settings, UserError, cohort_size

pytestmark = pytest.mark.usefixtures("in_float32")

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
WORDS = ["Ada", "Lovelace", "lived", "in", "Port-au-Prince", ",", "Haiti", "."]
TAGS = ["B-PER", "I-PER", "O", "O", "B-LOC", "O", "B-LOC", "O"]


def task(every: str = "first", length: int = 64, labels=LABELS) -> Tagging:
    return Tagging(
        Settings.of(
            {
                "dataset": {"template": "alpaca", "labels": labels},
                "train": {"seq_length": length},
            }
        ),
        "TOKEN_CLS",
        every,
    )


def record(words, tags) -> dict[str, str]:
    return {"instruction": json.dumps(words), "input": "", "output": json.dumps(tags)}


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(1)
    config = bases.CONFIGS[name]()
    config.num_labels = len(LABELS)
    return AutoModelForTokenClassification.from_config(config).eval()


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("most", [64, 9])
def test_pieces_are_those_of_words_as_transformers_has_them(name, most):
    tokenizer = bases.tokenizer(name)
    theirs = tokenizer(
        WORDS, is_split_into_words=True, truncation=True, max_length=most
    )
    ids, owners = pieces.owners(WORDS, tokenizer, most)
    assert ids == theirs["input_ids"]
    assert owners == [-1 if i is None else i for i in theirs.word_ids()]


@pytest.mark.parametrize("frame", families.FRAMES)
@pytest.mark.parametrize("kind", families.KINDS)
def test_a_token_is_of_the_word_that_it_stands_in(kind, frame):
    tokenizer = families.framed(families.family(kind), frame)
    words = ["Below", "is", "überall", "an", "日本", "instruction", "U.S.", "  ", "x y"]
    ids, owners = pieces.owners(words, tokenizer, 200)
    places = tokenizer(" ".join(words), return_offsets_mapping=True)["offset_mapping"]
    assert len(ids) == len(owners) == len(places)
    assert owners.count(-1) >= frame.count("s>")
    starts = [len(" ".join([*words[:i], ""])) for i in range(len(words))]
    for (start, end), word in zip(places, owners, strict=True):
        text = " ".join(words)[start:end].strip()
        if word >= 0:
            assert text
            assert text in words[word]
            assert start >= starts[word] - 1
        else:
            assert text == ""
    # Of blanks there is nothing to be seen; of all other words there is.
    assert {*range(len(words))} - {*owners} == {7}
    kept = [word for word in owners if word >= 0]
    assert kept == sorted(kept)


def test_first_pieces_or_all_are_labelled():
    tokenizer = bases.tokenizer("bert")
    words, tags = ["capitals", "verbs", "of"], ["B-LOC", "I-LOC", "O"]
    split = [tokenizer.tokenize(word) for word in words]
    assert split == [["capital", "##s"], ["verb", "##s"], ["of"]]
    first = task().encode(record(words, tags), tokenizer)
    assert first["labels"] == [IGNORED, 3, IGNORED, 4, IGNORED, 0, IGNORED]
    assert first["starts"] == [0, 1, 0, 1, 0, 1, 0]
    every = task("all").encode(record(words, tags), tokenizer)
    assert every["labels"] == [IGNORED, 3, 4, 4, 4, 0, IGNORED]
    assert every["starts"] == first["starts"]
    # By number as by name, as the hub has them.
    assert task().encode(record(words, [3, 4, 0]), tokenizer) == first
    assert "lost" not in first
    assert task().encode(record(words, tags) | {"output": ""}, tokenizer) is None


def test_words_without_room_are_counted_and_answered_outside():
    tokenizer, made = bases.tokenizer("bert"), task(length=6)
    cut = made.encode(record(WORDS, TAGS), tokenizer)
    assert len(cut["input_ids"]) == 6
    assert made.is_cut(cut, tokenizer)
    kept = sum(cut["starts"])
    assert cut["lost"] == [len(WORDS) - kept]
    net = network("bert")
    net.classifier.bias.data[1] = 100.0
    [given] = made.answers(net, tokenizer, [record(WORDS, TAGS)], 1)
    assert json.loads(given) == ["B-PER"] * kept + ["O"] * (len(WORDS) - kept)


@pytest.mark.parametrize("name", bases.CONFIGS)
def test_loss_and_gradient_are_transformers_own(name):
    tokenizer, made, net = bases.tokenizer(name), task("all"), network(name)
    examples = [
        made.encode(record(WORDS, TAGS), tokenizer),
        made.encode(record(WORDS[:3], TAGS[:3]), tokenizer),
        made.blank(),
    ]
    batch = made.collator(tokenizer, "left")(examples)
    assert batch["input_ids"].shape[1] % 8 == 0
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    wanted = net(**inputs, labels=batch["labels"]).loss
    wanted.backward()
    theirs = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    found = made.loss(net, batch)
    found.backward()
    ours = [p.grad for p in net.parameters() if p.grad is not None]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ours, theirs)
    count = (batch["labels"] != IGNORED).sum()
    torch.testing.assert_close(made.loss(net, batch, 4 * count), wanted / 4)
    scores = made.score(net, batch)
    torch.testing.assert_close(
        scores[:, 0].sum() / scores[:, 2].sum(), wanted.double(), check_dtype=False
    )


def test_entities_are_counted_as_seqeval_counts_them():
    tokenizer, made = bases.tokenizer("bert"), task()
    net = network("bert")
    records = [record(WORDS[i:], TAGS[i:]) for i in range(6)]
    batch = made.collator(tokenizer, "right")(
        [made.encode(one, tokenizer) for one in records]
    )
    told = made.metrics(made.score(net, batch))
    given = made.answers(net, tokenizer, records, 1)
    named = [json.loads(one) for one in given]
    assert any(tag != "O" for tags in named for tag in tags)
    wanted = [TAGS[i:] for i in range(6)]
    assert told["entity_f1"] == pytest.approx(f1_score(wanted, named))
    pairs = [
        (a, b)
        for x, y in zip(wanted, named, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    right = sum(a == b for a, b in pairs)
    assert told["accuracy"] == pytest.approx(right / len(pairs))
    first = " ".join(f"{w}/{t}" for w, t in zip(WORDS, named[0], strict=True))
    assert made.told(net, tokenizer, records[:1], 1) == [first]
    plain = record([], []) | {"instruction": " ".join(WORDS)}
    assert made.told(net, tokenizer, [plain], 1) == [first]
    # A sentence by itself and one among others, padded, have the same tags.
    alone = [made.answers(net, tokenizer, [one], 1)[0] for one in records]
    assert alone == given


# From seqeval's own documentation, and by hand: whole entities count, of the right type.
CASES = [
    (["O", "B-LOC", "I-LOC"], ["O", "B-LOC", "I-LOC"], 1.0),
    (["B-LOC", "I-LOC", "I-LOC", "O", "B-PER"], ["O", "B-LOC", "I-LOC", "O", "B-PER"], 0.5),
    (["B-LOC", "O", "B-PER"], ["B-PER", "O", "B-PER"], 0.5),
    (["B-PER", "I-PER"], ["B-PER", "B-PER"], 0.0),
    (["B-PER", "O"], ["B-PER", "B-LOC"], 2 / 3),
    (["O", "O"], ["O", "O"], 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "given", "f1"), CASES)
def test_whole_entities_count(wanted, given, f1):
    """With a network that says what it is to say."""
    made, tokenizer = task(), bases.tokenizer("bert")
    words = ["paris"] * len(wanted)
    batch = made.collator(tokenizer, "left")(
        [made.encode(record(words, wanted), tokenizer)]
    )
    logits = torch.zeros(*batch["input_ids"].shape, len(LABELS))
    for place, tag in enumerate(given, start=1):
        logits[0, place, LABELS.index(tag)] = 9.0

    def net(**_):
        return type("Out", (), {"logits": logits})

    told = made.metrics(made.score(net, batch))
    assert told["entity_f1"] == pytest.approx(f1)
    assert f1 == pytest.approx(f1_score([wanted], [given], zero_division=0))


def settings(labels=LABELS) -> Settings:
    return Settings.of(
        {
            "task": {"_target_": "tasks.tagging.Tagging"},
            "dataset": {"labels": labels},
            "model": {"labels": labels},
            "evaluate": {"choices": None},
            "audit": {"canaries": 0},
        }
    )


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (None, "needs all tags"),
        (["O", "O"], "stands there twice"),
        (["B-PER", "I-PER"], "O is missing"),
        (["O", "PER"], "PER is no tag of IOB2"),
        (["O", "B-PER", "I-LOC"], "I-LOC is no tag of IOB2"),
    ],
)
def test_a_list_of_tags_that_is_none_is_refused(labels, said):
    cfg = settings(labels)
    with pytest.raises(UserError, match=said):
        task(labels=labels).check(cfg)
    task().check(settings())
    with pytest.raises(UserError, match="first or all"):
        task("last").check(settings())
    for bad in ({"evaluate": {"choices": "c"}}, {"audit": {"canaries": 3}}):
        with pytest.raises(
            UserError, match=r"tagging\.Tagging.*Set \w+\.\w+=(null|0)\."
        ):
            task().check(Settings.of(settings() | bad))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"instruction": "Ada lived"}, "a list of words is needed, and Ada lived is none"),
        ({"instruction": json.dumps([1, 2])}, "a list of words is needed"),
        ({"output": "B-PER O"}, "a list of tags is needed"),
        ({"output": json.dumps(TAGS[1:])}, "it has 8 words and 7 tags"),
        ({"output": json.dumps(["B-ORG", *TAGS[1:]])}, "B-ORG is not in dataset.labels"),
        ({"output": json.dumps([9] * 8)}, "a list of tags is needed"),
    ],
)  # fmt: skip
def test_a_record_of_another_kind_is_refused(bad, said):
    assert said in task().fault(record(WORDS, TAGS) | bad)
    with pytest.raises(Unsuited, match=said.replace("[", ".")):
        task().encode(record(WORDS, TAGS) | bad, bases.tokenizer("bert"))
    assert task().fault(record(WORDS, TAGS)) is None
    assert task().fault(record(WORDS, TAGS) | {"output": " "}) is None


def test_lists_of_a_hub_dataset_are_read_by_name():
    kinds = {
        "id": Value("string"),
        "tokens": List(Value("string")),
        "ner_tags": List(ClassLabel(names=LABELS)),
    }
    rows = Dataset.from_dict(
        {"id": ["0"], "tokens": [["Ada", "ä"]], "ner_tags": [[1, 0]]},
        features=Features(kinds),
    )
    columns = {"instruction": "tokens", "input": None, "output": "ner_tags"}
    about = Settings.of({"name": "a/b", "columns": columns | {"messages": None}})
    made = dataset.as_records(rows, about, ["tokens", "ner_tags"])
    told = {"instruction": '["Ada", "ä"]', "input": "", "output": '["B-PER", "O"]'}
    assert dataset.to_record(made[0], about.columns) == told
    assert made[0]["id"] == "0"


@pytest.fixture
def tagged(tmp_path):
    """Writes records of words and tags; the overrides of a run on them."""

    def write(*records) -> str:
        lines = [json.dumps({"tokens": w, "tags": t}) for w, t in records]
        (tmp_path / "tags.jsonl").write_text("\n".join(lines))
        labels = ",".join(LABELS)
        return (
            f"task=tagging dataset=local dataset.path={tmp_path}/tags.jsonl "
            "dataset.columns.instruction=tokens dataset.columns.input=null num_clients=1 "
            f"dataset.columns.output=tags dataset.labels=[{labels}]"
        )

    return write


def test_the_line_of_a_bad_record_is_told_before_the_base_is_loaded(configure, tagged):
    bad = tagged(*[(WORDS, TAGS)] * 2, (WORDS, ["B-ORG", *TAGS[1:]]), (WORDS, TAGS))
    with pytest.raises(UserError, match=r"tags.jsonl, record 3: its tag B-ORG is not"):
        configure(bad)


@pytest.mark.slow
def test_the_task_is_built_of_its_file(configure, tagged):
    cfg = configure(tagged(*[(WORDS, TAGS)] * 4))
    assert cfg.peft.task_type == "TOKEN_CLS"
    assert cfg.model.labels == LABELS
    assert tasks.build(cfg).pieces == "first"
    row = dataset.load_partition(cfg, 0)[0]
    told = dataset.to_record(row, cfg.dataset.columns)
    assert told == record(WORDS, TAGS)


def test_a_node_whose_tags_are_others_takes_no_part(tmp_path):
    lines = [json.dumps({"tokens": WORDS, "tags": TAGS})] * 12
    (tmp_path / "tags.jsonl").write_text("\n".join(lines))
    own = {
        "data-path": str(tmp_path / "tags.jsonl"),
        "column-instruction": "tokens",
        "column-input": "",
        "column-output": "tags",
        "cache-path": str(tmp_path / "cache"),
        "cpus": 1,
    }
    told = {"overrides": "experiment=tagging", "run": "first"}
    with pytest.raises(Refusal) as caught:
        permit.settle(told, own)
    assert str(caught.value) == "a record of its own does not fit the task"
    assert "record 1: its tag B-PER is not in" in str(caught.value.__cause__)
    labels = ",".join(LABELS)
    told["overrides"] += f" dataset.labels=[{labels}]"
    cfg, _ = permit.settle(told, own)
    assert cfg.records == 12


def test_fednlp_s_setting_is_there_by_name():
    cfg = validated(resolve(compose("experiment=fednlp_wikiner")))
    assert cfg.model.name.endswith("distilbert-base-uncased")
    assert (cfg.num_clients, cfg.num_rounds, cfg.partitioner.alpha) == (100, 30, 5.0)
    assert cohort_size(cfg.num_clients, cfg.strategy.fraction_fit) == 10
    tasks.build(cfg).check(cfg)


@pytest.mark.slow
def test_a_client_learns_to_name_things_and_its_adapter_says_them(
    tmp_path, capsys, monkeypatch
):
    cfg = preflight.check(
        compose(
            "experiment=tagging num_clients=2 strategy.fraction_fit=0.5 "
            "strategy.fraction_evaluate=1 train.training_arguments.max_steps=60"
        )
    )
    start = client.initial_adapter(cfg)
    before = client.evaluate(cfg, start, 0)
    state, _ = client.train(cfg, start, 0, 1)
    after = client.evaluate(cfg, state, 0)
    assert before["eval_entity_f1"] < 0.2
    assert after["eval_entity_f1"] > 0.4
    assert after["eval_loss"] < before["eval_loss"] / 4
    client.save(cfg, state, tmp_path / "peft_1", 1)
    asked = "The capital of Jamaica is Kingston ."
    arguments = ["test.py", f"--peft-path={tmp_path}/peft_1", f"--question={asked}"]
    monkeypatch.setattr("sys.argv", [*arguments, "--device=cpu"])
    ask.main()
    said = capsys.readouterr().out
    net = model.build_once(cfg.model, cfg.peft, cfg.seed, torch.device("cpu")).eval()
    model.set_adapter_state(net, state)
    tokenizer = model.load_tokenizer(cfg.model.name)
    one = {"instruction": asked, "input": "", "output": ""}
    [told] = tasks.build(cfg).told(net, tokenizer, [one], 256)
    assert f"A: {told}\n" in said
    assert told.startswith("The/O capital/O of/O Jamaica/")


@pytest.mark.slow
def test_a_run_in_which_each_trains_alone_leaves_the_answers_of_one(
    loopback, tmp_path, capsys
):
    lines = (PROJECT / "assets/tiny_tags/test.jsonl").read_text().splitlines()[:6]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    cfg = preflight.check(
        compose(
            "experiment=tagging mode=local num_clients=3 num_rounds=1 "
            f"train.training_arguments.max_steps=8 dataset.test_path={tmp_path}/few.jsonl"
        )
    )
    rounds.run(cfg, loopback(cfg), tmp_path)
    told = json.loads((tmp_path / "summary.json").read_text())["clients"]
    losses = sorted(one["test_loss"] for one in told)
    middle = next(i for i, one in enumerate(told) if one["test_loss"] == losses[1])
    answers = json.loads((tmp_path / "answers.json").read_text())
    given, wanted = (
        [json.loads(a[key]) for a in answers] for key in ("tuned", "output")
    )
    assert told[middle]["test_entity_f1"] == pytest.approx(f1_score(wanted, given))
    assert len({one["test_entity_f1"] for one in told}) == 3
    journal.report(cfg, tmp_path)
    assert f"tuned: {answers[0]['tuned'][:20]}" in capsys.readouterr().out
