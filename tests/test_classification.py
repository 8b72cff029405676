"""pytest tests/test_classification.py: labels of texts and pairs, against plain transformers."""

import json
import math

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from flwr.app import MessageType
from sklearn import metrics
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

import client
import dataset
import model
import tasks
from assets.testbed import bases
from compute import heads
from node import permit
from server import exchange, rounds
from settings import preflight
from settings.compose import compose, resolve
from settings.schema import validated
from tasks.base import Unsuited
from utils import IGNORED, PROJECT, Refusal, Settings, UserError

pytestmark = pytest.mark.usefixtures("in_float32")

CPU = torch.device("cpu")
LABELS = ["calm", "glad", "sad"]
RECORDS = [
    {"instruction": "What is the capital?", "input": "", "output": "sad"},
    {"instruction": "the capital of France is a verb", "input": "", "output": "calm"},
    {"instruction": "Write", "input": "is the past tense of a verb", "output": "glad"},
    {"instruction": "a verb is the capital", "input": "of what", "output": "sad"},
    {"instruction": "What is what?", "input": "is", "output": "glad"},
]


def made(target="Classification", labels=LABELS, length=64, **more):
    """A task, by the settings that it looks at."""
    return tasks.build(
        Settings.of(
            {
                "task": {
                    "_target_": f"tasks.classification.{target}",
                    "model": "SEQ_CLS",
                }
                | more,
                "dataset": {"template": "alpaca", "labels": labels},
                "train": {"seq_length": length},
            }
        )
    )


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A base with a fresh adapter, its tokenizer, and the same base as transformers has it."""
    root, kept = tmp_path_factory.mktemp("bases"), {}

    def build(name):
        if name not in kept:
            path = bases.write(name, root / name)
            about = {"name": path, "labels": LABELS, "quantization": None}
            lora = {"_target_": "peft.LoraConfig", "task_type": "SEQ_CLS", "r": 4}
            lora |= {"target_modules": "all-linear"}
            given = Settings.of(about | {"gradient_checkpointing": False})
            net = model.build(given, Settings.of(lora), 3, CPU).eval()
            plain = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=len(LABELS)
            )
            head = {
                key.replace(".modules_to_save.default", ""): value
                for key, value in net.get_base_model().state_dict().items()
                if ".modules_to_save." in key
            }
            assert not plain.load_state_dict(head, strict=False).unexpected_keys
            kept[name] = net, model.load_tokenizer(path), plain.eval()
        return kept[name]

    return build


def plainly(tokenizer, record, plain):
    """What transformers says of one record, alone."""
    texts = [text for text in (record["instruction"], record["input"]) if text]
    inputs = tokenizer(*texts, return_tensors="pt")
    if (getattr(plain.config, "type_vocab_size", None) or 0) < 2:
        inputs.pop("token_type_ids", None)
    return inputs


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", bases.CONFIGS)
def test_logits_and_loss_are_those_of_transformers(name, side, opened):
    net, tokenizer, plain = opened(name)
    task = made()
    examples = [task.encode(record, tokenizer) for record in RECORDS]
    assert len({len(example["input_ids"]) for example in examples}) > 2
    batch = task.collator(tokenizer, side)(examples)
    inputs = [plainly(tokenizer, record, plain) for record in RECORDS]
    with torch.no_grad():
        wanted = [
            plain(**one, labels=torch.tensor([LABELS.index(record["output"])]))
            for one, record in zip(inputs, RECORDS, strict=True)
        ]
        found, loss = task._logits(net, batch), task.loss(net, batch)
    logits = torch.cat([one.logits for one in wanted])
    assert logits.std(0).min() > 0.01  # they are not all the same
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, torch.stack([one.loss for one in wanted]).mean())
    scores = task.score(net, batch)
    numbers = [LABELS.index(record["output"]) for record in RECORDS]
    assert scores[:, 3].tolist() == numbers
    assert scores[:, 4].tolist() == logits.argmax(-1).tolist()
    assert scores[:, 1].tolist() == (scores[:, 3] == scores[:, 4]).tolist()
    assert math.isclose(scores[:, 0].mean(), loss, rel_tol=1e-5)
    answers = task.answers(net, tokenizer, RECORDS, 8)
    assert answers == [LABELS[i] for i in logits.argmax(-1)]
    told = task.told(net, tokenizer, RECORDS[:1], 8)[0]
    chance = logits[0].softmax(-1).max()
    assert told.startswith(f"{answers[0]}   ({answers[0]} {chance:.2f}, ")


def test_segments_reach_a_base_that_has_them(opened):
    net, tokenizer, _ = opened("bert")
    task = made()
    example = task.encode(RECORDS[2], tokenizer)
    assert {0, 1} == {*example["token_type_ids"]}
    batch = task.collator(tokenizer, "right")([example])
    other = batch | {"token_type_ids": torch.zeros_like(batch["token_type_ids"])}
    with torch.no_grad():
        one, two = task._logits(net, batch), task._logits(net, other)
    assert not torch.allclose(one, two, atol=1e-3)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_several_labels_are_told_as_transformers_does(name, opened):
    net, tokenizer, plain = opened(name)
    task = made("Multilabel")
    outputs = [
        '["sad", "glad"]',
        "[]",
        '["calm"]',
        '["calm", "glad", "sad"]',
        '["glad"]',
    ]
    rows = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 1, 0]])
    records = [r | {"output": o} for r, o in zip(RECORDS, outputs, strict=True)]
    examples = [task.encode(record, tokenizer) for record in records]
    assert [example["labels"] for example in examples] == rows.tolist()
    plain.config.problem_type = "multi_label_classification"
    with torch.no_grad():
        each = [
            plain(**plainly(tokenizer, record, plain), labels=row[None].float())
            for record, row in zip(records, rows, strict=True)
        ]
        batch = task.collator(tokenizer, "right")(examples)
        loss, scores = task.loss(net, batch), task.score(net, batch)
    plain.config.problem_type = None
    torch.testing.assert_close(loss, torch.stack([one.loss for one in each]).mean())
    given = torch.cat([one.logits for one in each]) >= 0
    told = task.metrics(scores)
    assert told["accuracy"] == pytest.approx((given == rows).double().mean().item())
    assert told["macro_f1"] == pytest.approx(
        metrics.f1_score(rows, given, average="macro", zero_division=0)
    )
    answers = task.answers(net, tokenizer, records, 8)
    assert [task.target(answer) for answer in answers] == given.long().tolist()
    judged = task.judge(['["sad", "glad"]', "[]"], ['["glad", "sad"]', '["sad"]'])
    assert judged == {"exact_match": [1.0, 0.0]}


def test_a_step_counts_what_has_a_label_and_blanks_change_nothing(opened):
    net, tokenizer, _ = opened("bert")
    for target, outputs in ("Classification", LABELS), ("Multilabel", ['["sad"]'] * 3):
        task = made(target)
        records = [
            record | {"output": output}
            for record, output in zip(RECORDS, outputs, strict=False)
        ]
        examples = [task.encode(record, tokenizer) for record in records]
        collate = task.collator(tokenizer, "right")
        batch, filled = collate(examples), collate([*examples, task.blank()])
        counted = (batch["labels"] != IGNORED).sum()  # as transformers.Trainer does
        assert counted == (filled["labels"] != IGNORED).sum()
        loss = task.loss(net, batch, counted)
        torch.testing.assert_close(task.loss(net, filled, counted), loss)
        torch.testing.assert_close(task.loss(net, batch), loss)


def test_weights_change_what_an_example_counts_for(opened):
    net, tokenizer, _ = opened("bert")
    weights = [0.5, 2.0, 4.0]
    task, plain = made(class_weights=weights), made()
    collate = task.collator(tokenizer, "right")
    batch = collate([task.encode(record, tokenizer) for record in RECORDS])
    with torch.no_grad():
        logits = heads.logits(net, {k: v for k, v in batch.items() if k != "labels"})
        total = cross_entropy(
            logits, batch["labels"][:, 0], torch.tensor(weights), reduction="sum"
        )
        torch.testing.assert_close(task.loss(net, batch), total / len(RECORDS))
        assert torch.equal(task.score(net, batch), plain.score(net, batch))


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_scikit_learn(seed):
    generator = torch.Generator().manual_seed(seed)
    task = made(labels=[*"abcdef"])
    wanted, given = torch.randint(0, 2 + seed, (2, 40), generator=generator)
    given = torch.where(torch.rand(40, generator=generator) < 0.5, wanted, given)
    nats, right = torch.rand(40, generator=generator), wanted == given
    columns = [nats, right, torch.ones(40), wanted, given]
    scores = torch.stack([column.double() for column in columns], dim=1)
    told = task.metrics(scores)
    assert told["loss"] == pytest.approx(nats.double().mean().item())
    assert told["accuracy"] == metrics.accuracy_score(wanted, given)
    macro = metrics.f1_score(wanted, given, average="macro", zero_division=0)
    assert told["macro_f1"] == pytest.approx(macro)
    assert told["mcc"] == pytest.approx(metrics.matthews_corrcoef(wanted, given))
    each = metrics.precision_recall_fscore_support(
        wanted, given, labels=range(6), zero_division=0
    )
    found = task.by_label(scores)
    assert [one["label"] for one in found] == task.labels
    for name, values in zip(
        ("precision", "recall", "f1", "support"), each, strict=True
    ):
        assert [one[name] for one in found] == pytest.approx(values.tolist())


def test_labels_that_differ_are_told_to_their_owner_alone():
    task = made()
    task.check_records(RECORDS, "here")
    odd = [*RECORDS, RECORDS[0] | {"output": "angry"}, RECORDS[0] | {"output": "bored"}]
    with pytest.raises(Unsuited) as caught:
        task.check_records(odd, "notes.jsonl")
    said = "notes.jsonl: not in dataset.labels are angry, bored."
    assert str(caught.value) == said
    assert caught.value.told == "2 of its labels are not in dataset.labels"
    with pytest.raises(Unsuited, match="angry is not in"):
        task.encode(odd[-2], None)
    with pytest.raises(Unsuited) as caught:
        made(labels=None).check_records(odd, "notes.jsonl")
    line = """'dataset.labels=["angry","bored","calm","glad","sad"]'"""
    assert str(caught.value).endswith(f"those of notes.jsonl, {line}")
    with pytest.raises(Unsuited, match="record 1: a list of labels is needed, and sad"):
        made("Multilabel").check_records(RECORDS, "notes.jsonl")


def test_what_is_left_out_and_what_is_cut(opened):
    _, tokenizer, _ = opened("bert")
    task = made(length=8)
    empty = {"instruction": " ", "input": "", "output": "sad"}
    assert task.encode(empty, tokenizer) is None
    assert task.encode(RECORDS[0] | {"output": " "}, tokenizer) is None
    short = task.encode(RECORDS[4], tokenizer)
    assert not task.is_cut(short, tokenizer)
    long = {"instruction": "is a verb " * 9, "input": "what is " * 9, "output": "sad"}
    cut = task.encode(long, tokenizer)
    assert task.is_cut(cut, tokenizer)
    assert len(cut["input_ids"]) == 8
    both = tokenizer("is a", "what is")["input_ids"]
    assert cut["input_ids"][0] == both[0]
    assert cut["input_ids"].count(tokenizer.sep_token_id) == 2


def test_the_shipped_encoder_is_small_and_has_seen_no_label():
    folder = PROJECT / "assets/tiny_bert"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6 * 2**20
    about = json.loads((folder / "config.json").read_text())
    assert about["architectures"] == ["BertForMaskedLM"]
    assert about["vocab_size"] == 2048
    assert len(model.load_tokenizer("assets/tiny_bert")) == 2048


# --- in a run ---------------------------------------------------------------------------------


@pytest.fixture
def classified():
    """The shipped experiment, made short."""

    def build(*overrides):
        return preflight.check(
            compose(
                " ".join(
                    [
                        "experiment=classification num_rounds=2 evaluate.exact_match=false "
                        "train.training_arguments.max_steps=2 "
                        "train.training_arguments.per_device_train_batch_size=4",
                        *overrides,
                    ]
                )
            )
        )

    return build


@pytest.mark.slow
def test_a_client_trains_its_head_and_tells_how_its_labels_are_told(classified):
    cfg = classified()
    start = client.initial_adapter(cfg)
    assert start.keys() == model.seeded(cfg.model, cfg.peft, cfg.seed).keys()
    state, told = client.train(cfg, start, 0, server_round=1)
    assert all(not torch.equal(state[name], start[name]) for name in state)
    assert told["num-examples"] == 8
    assert told["dropped"] == told["truncated"] == 0
    before = client.evaluate(cfg, start, 0, base=True)
    assert before == client.evaluate(cfg, start, 0)
    after = client.evaluate(cfg, state, 0)
    figures = exchange.read_figures(MessageType.EVALUATE, after)
    assert {"eval_loss", "eval_accuracy", "eval_macro_f1", "eval_mcc"} <= figures.keys()
    assert after != before


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ("dataset.labels=null", "dataset.labels is missing, one list for all clients"),
        ("dataset.labels=[animal,sum]", "not in dataset.labels are calendar, capital"),
        ("dataset.labels=[sum]", "2 labels or more are needed"),
        ("dataset.labels=[sum,sum]", "a label stands there twice"),
        ("model.labels=[sum,animal]", "model.labels=.*: they are dataset.labels"),
        ("task.class_weights=[1,2]", "task.class_weights=.*16 weights are needed"),
        ("task.class_weights=[0]", "a number above 0 for each of dataset.labels"),
        ("dataset.labels=[0,1]", "A number takes quotes"),
        ("evaluate.choices=options", "the choices are dataset.labels"),
        ("audit.canaries=4", "a canary has no label"),
        ("launch=fsdp", "a head is trained whole"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides, fault, classified):
    with pytest.raises(UserError, match=fault):
        classified(overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        "sharing=ffa comm.dtype=int8",
        "sharing=rolora",
        "sharing=fedsa",
        "strategy=svd strategy.ranks=[2,8]",
        "strategy=scaffold",
        "privacy=record privacy.clip_norm=1 privacy.noise_multiplier=0.5 "
        "strategy.fraction_evaluate=0",
        "privacy.secure_aggregation=true strategy.fraction_evaluate=0 "
        "strategy.fraction_fit=0.5",
        "peft=prompt",
    ],
)
@pytest.mark.slow
def test_each_method_has_the_head_in_its_adapter(
    overrides, classified, loopback, tmp_path
):
    cfg = classified("num_rounds=1 strategy.fraction_fit=0.5", overrides)
    rounds.run(cfg, loopback(cfg, folder=tmp_path / "clients"), tmp_path)
    folder = tmp_path / "peft_1"
    about = model.read_about(str(folder))
    net, tokenizer = model.open_adapter(str(folder), about, CPU)
    first = model.seeded(cfg.model, cfg.peft, cfg.seed)
    head = {n: p for n, p in net.named_parameters() if ".modules_to_save." in n}
    assert {name.partition(".modules_to_save")[0].split(".")[-1] for name in head} == {
        "pooler",
        "classifier",
    }
    assert all(not torch.equal(p, first[name]) for name, p in head.items())
    records = [{"instruction": "What is 3 plus 4?", "input": ""}]
    assert tasks.build(cfg).answers(net, tokenizer, records, 1)[0] in cfg.dataset.labels


def test_a_node_whose_labels_differ_is_refused_and_the_server_not_told_which(tmp_path):
    labels = ["calm", "glad", "wrathful"] * 10
    records = [{"note": f"It is {i}.", "mood": mood} for i, mood in enumerate(labels)]
    (file := tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, records)))
    own = {
        "data-path": str(file),
        "column-instruction": "note",
        "column-input": "",
        "column-output": "mood",
        "cache-path": str(tmp_path / "cache"),
        "cpus": 1,
    }
    run = "experiment=classification dataset.labels=[calm,glad,{}]"
    told = {"overrides": run.format("sad"), "run": "first"}
    with pytest.raises(Refusal) as caught:
        permit.settle(told, own)
    assert str(caught.value) == "1 of its labels are not in dataset.labels"
    assert "not in dataset.labels are wrathful" in str(caught.value.__cause__)
    cfg, _ = permit.settle(told | {"overrides": run.format("wrathful,sad")}, own)
    assert cfg.records == 30


def test_numbers_of_labels_become_their_names(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=LABELS)})
    rows = Dataset.from_dict({"text": [*"abc"], "label": [2, 0, -1]}, features)
    columns = {
        "instruction": "text",
        "input": None,
        "output": "label",
        "messages": None,
    }
    made = dataset.as_records(rows, Settings.of({"name": "x", "columns": columns}))
    records = [dataset.to_record(row, columns) for row in made]
    assert [record["output"] for record in records] == ["sad", "calm", ""]


@pytest.mark.parametrize(
    ("name", "labels"), [("20news", 20), ("agnews", 4), ("sst2", 2)]
)
def test_fednlp_s_settings_are_there_by_name(name, labels):
    cfg = validated(resolve(compose(f"experiment=fednlp_{name}")))
    assert cfg.model.name == "distilbert/distilbert-base-uncased"
    assert len(cfg.dataset.labels) == labels
    assert (cfg.num_clients, cfg.num_rounds, cfg.partitioner.alpha) == (100, 30, 1.0)
    assert cfg.partitioner.partition_by == cfg.dataset.columns.output
    assert cfg.task._target_ == "tasks.classification.Classification"
