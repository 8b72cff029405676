"""pytest tests/test_preference.py: DPO, ORPO and KTO against TRL's, and their records."""

import copy
import json
import math

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import client
import dataset
import model
import tasks
from compute import loss
from evaluation.examine import Examination
from node import permit
from records import conversations, templates
from records.batches import Collator
from records.conversations import Unfit
from server import rounds
from tasks import preference
from utils import IGNORED, PROJECT, Refusal, Settings, UserError

COLUMNS = {
    **{name: name for name in ("instruction", "input", "output")},
    **dict.fromkeys(("messages", "rejected", "desirable")),
}
TASKS = ("dpo", "orpo", "kto")
ASKED = {"role": "user", "content": "Is 7 a prime?"}
EARLIER = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is 4 a prime?"},
    {"role": "assistant", "content": "No."},
]


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def put(rows: list[dict], path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int) -> list[dict[str, str]]:
    lines = (PROJECT / "assets/tiny_preferences/test.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:count]]


def made(task: str, configure, *more: str) -> tuple[Settings, tasks.Task, object]:
    cfg = configure(f"task={task} dataset=tiny_preferences", *more)
    return cfg, tasks.build(cfg), model.load_tokenizer("assets/tiny_llama")


def examples_of(task: tasks.Task, tokenizer, rows: list[dict]) -> list[dict]:
    """As `dataset` makes records of them."""
    found = []
    for row in rows:
        sources = conversations.find(COLUMNS, row)
        record = dataset.to_record(conversations.row(row, sources, COLUMNS), COLUMNS)
        found.append(task.encode(record, tokenizer, training=True))
    return found


def thumbs(count: int) -> list[dict]:
    """The pairs' answers, one of each, the good ones and the bad ones in no order."""
    return [
        {
            "prompt": pair["prompt"],
            "completion": pair["rejected" if i % 3 == 1 else "chosen"],
            "label": i % 3 != 1,
        }
        for i, pair in enumerate(pairs(count))
    ]


# --- the losses ---------------------------------------------------------------------------


def base() -> torch.nn.Module:
    """The shipped base in float32."""
    torch.manual_seed(0)
    path = PROJECT / "assets/tiny_llama"
    net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return net.requires_grad_(False)


LORA = peft.LoraConfig(
    task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False
)


def adapted(settings: peft.PeftConfig = LORA) -> peft.PeftModel:
    return peft.get_peft_model(base(), copy.deepcopy(settings)).train()


def gradients(net: torch.nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    net.zero_grad()
    value.backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.requires_grad}


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        scale = wanted.abs().max()
        assert scale > 0
        assert torch.allclose(ours[name], wanted, atol=2e-5 * scale, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", ["_hidden", "_narrowed", "_plain"])
@pytest.mark.parametrize("kind", ["lora", "head", "prompt"])
def test_sums_and_their_gradients_equal_those_of_plain_logits(
    kind, way, side, monkeypatch
):
    monkeypatch.setattr(loss, "CHUNK", 4)
    monkeypatch.setattr(loss, "_find_way", lambda *_: getattr(loss, way))
    settings = {
        "lora": LORA,
        "head": peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=["lm_head"], init_lora_weights=False
        ),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[kind]
    net = adapted(settings)
    ids = torch.randint(5, 2000, (3, 9), generator=torch.Generator().manual_seed(1))
    collate = Collator(3, side)
    labels = [[IGNORED] * n + row[n:] for n, row in enumerate(ids.tolist(), start=2)]
    rows = zip(ids.tolist(), labels, (9, 7, 5), strict=True)
    batch = collate(
        [{"input_ids": i[:n], "labels": one[:n]} for i, one, n in rows]
        + [{"input_ids": [7], "labels": [IGNORED]}]
    )
    logits = net(**batch).logits[:, -batch["labels"].shape[1] :]
    likely = logits[:, :-1].log_softmax(-1)
    wanted = batch["labels"][:, 1:]
    each = likely.gather(2, wanted.clamp(min=0)[..., None])[..., 0]
    plain = (each * wanted.ne(IGNORED)).sum(1)
    weights = torch.tensor([0.3, -2.0, 1.7, 5.0])
    theirs = gradients(net, (plain.square() * weights).sum())
    ours = loss.answer_sums(net, batch)
    assert ours[3] == 0
    assert torch.allclose(ours, plain, rtol=1e-5)
    assert_equal(gradients(net, (ours.square() * weights).sum()), theirs)


def trainer(kind: str, tmp_path, beta: float):
    """TRL's own, with an adapter of random values on the shipped base."""
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    classes = {
        "dpo": (DPOTrainer, DPOConfig, {}),
        "orpo": (ORPOTrainer, ORPOConfig, {"disable_dropout": True}),
        "kto": (
            *(KTOTrainer, KTOConfig),
            {"desirable_weight": 1.3, "undesirable_weight": 0.7},
        ),
    }
    made, config, more = classes[kind]
    arguments = config(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        beta=beta,
        **more,
    )
    rows = thumbs(4) if kind == "kto" else pairs(4)
    return made(
        model=base(),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=model.load_tokenizer("assets/tiny_llama"),
        peft_config=copy.deepcopy(LORA),
    )


def parts(example: dict) -> tuple[list[int], list[list[int]]]:
    """The prompt of an example, and its answers, as token ids."""
    rows = preference.rows_of(example)
    answers = [[i for i in row["labels"] if i != IGNORED] for row in rows]
    return rows[0]["input_ids"][: -len(answers[0])], answers


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_loss_and_gradients_equal_trls(kind, configure, tmp_path):
    weights = "task.desirable_weight=1.3 task.undesirable_weight=0.7"
    more = ["task.beta=0.25", *[weights] * (kind == "kto")]
    _, task, tokenizer = made(kind, configure, *more)
    theirs = trainer(kind, tmp_path, beta=0.25)  # the last to set accelerate's state
    examples = examples_of(task, tokenizer, thumbs(4) if kind == "kto" else pairs(4))
    net = adapted()
    values = dict(theirs.model.named_parameters())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(values[name])
    pad = Collator(tokenizer.pad_token_id, "right")
    with net.disable_adapter():
        task.refer(net, examples, pad, 4)
    batch = task.collator(tokenizer, "right")(examples)
    ours = task.loss(net, batch)
    theirs.model.train()
    split = [parts(example) for example in examples]
    if kind == "orpo":
        told = {}
        for place, name in enumerate(("chosen", "rejected")):
            rows = [preference.rows_of(example)[place] for example in examples]
            padded = pad(rows)
            told |= {f"{name}_{key}": tensor for key, tensor in padded.items()}
        likely, worse = theirs.concatenated_forward(theirs.model, told)[:2]
        # TRL's whole loss has the prompt's tokens as well, which nobody chose.
        wanted = -likely.mean() - theirs.odds_ratio_loss(likely, worse)[0].mean()
    elif kind == "dpo":
        rows = [
            {"prompt_ids": asked, "chosen_ids": good, "rejected_ids": bad}
            for asked, (good, bad) in split
        ]
        wanted = theirs._compute_loss(theirs.model, theirs.data_collator(rows), False)
    else:
        others = [answers[0] for _, answers in (split[-1], *split[:-1])]
        rows = [
            {
                "prompt_ids": asked,
                "completion_ids": answer,
                "KL_completion_ids": other,
                "label": row["label"],
            }
            for (asked, [answer]), other, row in zip(
                split, others, thumbs(4), strict=True
            )
        ]
        wanted = theirs._compute_loss(theirs.model, theirs.data_collator(rows), False)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert_equal(gradients(net, ours), gradients(theirs.model, wanted))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_blank_examples_and_the_size_of_a_batch_change_nothing(kind, configure):
    _, task, tokenizer = made(kind, configure)
    net, examples = adapted(), examples_of(task, tokenizer, pairs(4))
    with net.disable_adapter():
        task.refer(net, examples, Collator(tokenizer.pad_token_id, "left"), 2)
    collate = task.collator(tokenizer, "left")
    whole = collate(examples)
    counted = whole["shift_labels"].ne(IGNORED).sum()
    assert counted == (8 if kind == "kto" else 4)
    filled = collate([*examples, task.blank()])
    assert filled["shift_labels"].ne(IGNORED).sum() == counted
    once = gradients(net, task.loss(net, whole, counted))
    assert_equal(gradients(net, task.loss(net, filled, counted)), once)
    alone = task.loss(net, collate([task.blank()]), counted)
    assert alone == 0
    assert not any(one.any() for one in gradients(net, alone).values())
    scores = task.score(net, whole)
    assert task.metrics(scores)["loss"] == pytest.approx(
        task.loss(net, whole).item(), rel=1e-5
    )
    if kind != "kto":  # whose z is of a batch
        each = [task.score(net, collate([example])) for example in examples]
        assert torch.allclose(torch.cat(each), scores, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_kto_compares_with_the_answers_to_others_of_the_batch(configure):
    _, task, tokenizer = made("kto", configure)
    examples = examples_of(task, tokenizer, thumbs(5))
    with torch.no_grad():
        task.refer(adapted(), examples, Collator(tokenizer.pad_token_id, "left"), 2)
    split = [parts(example) for example in examples]
    # Of five in batches of two, the last one goes with the two before it.
    for i, before in enumerate([1, 0, 4, 2, 3]):
        [other] = examples[i]["others"]
        prompt, answer = split[i][0], split[before][1][0]
        assert other["input_ids"] == prompt + answer
        assert other["labels"] == [IGNORED] * len(prompt) + answer


@pytest.mark.slow
def test_scores_by_hand(configure):
    _, task, _ = made("dpo", configure)
    sums = torch.tensor([[-3.0, -5.0, -1.0], [-4.0, -4.0, -1.0]])
    reference = torch.tensor([[-4.0, -4.0, -2.0], [-4.0, -4.0, -2.0]])
    losses, rewards = task.compare(sums, torch.ones(2, 3), reference)
    assert torch.allclose(rewards, torch.tensor([[0.1, -0.1, 0.1], [0.0, 0.0, 0.1]]))
    by_hand = [math.log(1 + math.exp(-x)) for x in (0.1, -0.1, 0.0)]
    assert losses.tolist() == pytest.approx(by_hand)
    margins = rewards[0] - rewards[1]
    columns = losses, preference.positive(margins), torch.ones(3), margins
    told = task.metrics(torch.stack(columns, dim=1).double())
    assert told["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert told["margin"] == pytest.approx(0.0, abs=1e-6)
    _, kto, _ = made("kto", configure)
    scores = torch.tensor([[0.5, 1, 1, 0.3, 1, 0, 0], [0.6, 0, 2, 0.1, 1, 0.2, 1]])
    assert kto.metrics(scores.double())["margin"] == pytest.approx(0.2 - 0.2, abs=1e-6)
    assert "margin" not in kto.metrics(scores[:1].double())
    _, orpo, _ = made("orpo", configure)
    losses, rewards = orpo.compare(
        torch.tensor([[-2.0], [-9.0]]), torch.tensor([[2], [3]]), reference[:, :1]
    )
    odds = [math.exp(-m) / (1 - math.exp(-m)) for m in (1, 3)]
    by_hand = 1 + 0.1 * math.log(1 + odds[1] / odds[0])
    assert losses.tolist() == pytest.approx([by_hand])
    assert rewards.flatten().tolist() == pytest.approx([-0.1, -0.3])
    sure = torch.tensor([0.0], requires_grad=True)
    preference.log_odds(sure).sum().backward()
    assert sure.grad.isfinite().all()


# --- the reference ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("start", [False, True])
def test_the_reference_is_the_base_or_the_first_adapter(start, configure, tmp_path):
    cfg, task, tokenizer = made("dpo", configure, "model.quantization=null")
    state = client.initial_adapter(cfg)
    moved = {name: value + 0.02 for name, value in state.items()}
    if start:
        client.save(cfg, moved, tmp_path / "peft_1", 1)
        cfg.model["adapter"] = str(tmp_path / "peft_1")
    net = client._load(cfg, state)
    now = {name: value - 0.03 for name, value in state.items()}
    model.set_adapter_state(net, now)
    examples = examples_of(task, tokenizer, pairs(3))
    client._refer(cfg, net, task, examples, tokenizer)
    assert all(torch.equal(v, now[n]) for n, v in model.adapter_state(net).items())
    device = torch.device("cpu")
    plain = model.load_base(cfg.model.name, None, device).eval()
    if start:
        plain = peft.PeftModel.from_pretrained(plain, tmp_path / "peft_1").eval()
    for example in examples:
        for row, found in zip(
            preference.rows_of(example), example["reference"], strict=True
        ):
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad(), model.autocast(plain):
                logits = plain(ids).logits[0, :-1].float()
            likely = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            wanted = likely[torch.tensor(row["labels"][1:]) != IGNORED].sum()
            assert found == pytest.approx(wanted.item(), rel=2e-2)
    scores = Examination(cfg).measure(moved)
    assert (abs(scores["test_margin"]) < 1e-3) == start


# --- training -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_a_step_is_the_same_however_it_is_divided(kind, configure):
    after = []
    for size, times in ((4, 1), (2, 2), (1, 4)):
        cfg, *_ = made(
            kind,
            configure,
            "model.quantization=null +train.training_arguments.optim=sgd",
            "+train.training_arguments.max_grad_norm=0 train.learning_rate_max=1",
            "train.training_arguments.max_steps=1",
            f"train.training_arguments.per_device_train_batch_size={size}",
            f"train.training_arguments.gradient_accumulation_steps={times}",
        )
        start = client.initial_adapter(cfg)
        trained, told = client.train(cfg, start, 0, 1)
        assert told["num-examples"] == 4
        after.append({n: trained[n] - start[n] for n in start if "lora_B" in n})
    for other in after[1:]:
        for name, change in after[0].items():
            scale = change.abs().max()
            assert scale > 0
            assert torch.allclose(other[name], change, rtol=0, atol=0.03 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_a_federation_learns_what_is_preferred(kind, configure, loopback, tmp_path):
    answers = {"chosen": "the moon", "rejected": "a long river"}
    rows = [pair | answers for pair in pairs(60)]
    cfg = configure(
        f"task={kind} dataset=local dataset.path={put(rows[:44], tmp_path / 'a.jsonl')}",
        f"dataset.test_path={put(rows[44:], tmp_path / 'b.jsonl')} num_clients=2",
        "strategy.fraction_fit=1 strategy.fraction_evaluate=1 evaluate.every_round=2",
        "model.quantization=null train.training_arguments.max_steps=6",
    )
    rounds.run(cfg, loopback(cfg), tmp_path)
    history = json.loads((tmp_path / "history.json").read_text())
    before, last = history["before"], history["rounds"][-1]
    for whose in ("test", "eval"):
        if kind != "orpo":  # the base is the reference
            assert before[f"{whose}_accuracy"] == pytest.approx(0.5, abs=0.25)
            assert before[f"{whose}_margin"] == pytest.approx(0, abs=1e-3)
        assert last[f"{whose}_loss"] < before[f"{whose}_loss"]
        assert last[f"{whose}_margin"] > before[f"{whose}_margin"]
        assert last[f"{whose}_accuracy"] >= 0.9
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["eval_margin_after"] == last["eval_margin"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_pairs_are_records_of_differential_privacy(kind, configure, tmp_path):
    cfg, *_ = made(
        kind,
        configure,
        "privacy=record strategy.fraction_fit=1 privacy.noise_multiplier=1",
        "privacy.epsilon=null",
    )
    cfg["residuals"] = str(tmp_path)
    start = client.initial_adapter(cfg)
    state, told = client.train(cfg, start, 0, 1)
    assert told["train_loss"] >= 0
    assert any(not torch.equal(state[name], start[name]) for name in start)


# --- records ------------------------------------------------------------------------------

PLAIN = {"instruction": "Is 7 a prime?", "input": "", "output": "Yes."}
FORMS = {
    "text": {"prompt": "Is 7 a prime?", "chosen": "Yes.", "rejected": "No."},
    "messages after a prompt": {
        "prompt": [ASKED],
        "chosen": [says("Yes.")],
        "rejected": [says("No.")],
    },
    "whole conversations": {
        "chosen": [ASKED, says("Yes.")],
        "rejected": [ASKED, says("No.")],
    },
    "whole ones and a prompt, as UltraFeedback": {
        "prompt": "Is 7 a prime?",
        "messages": [ASKED, says("Yes.")],
        "chosen": [ASKED, says("Yes.")],
        "rejected": [ASKED, says("No.")],
        "score_chosen": 9.0,
    },
    "text after messages": {"prompt": [ASKED], "chosen": "Yes.", "rejected": "No."},
}


def recorded(row: dict, columns: dict = COLUMNS) -> dict:
    sources = conversations.find(columns, row)
    return dataset.to_record(conversations.row(row, sources, columns), columns)


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_is_one_record_in_all_its_forms(form):
    assert recorded(FORMS[form]) == PLAIN | {"rejected": "No."}


def test_earlier_turns_are_the_prompt_of_both():
    row = {
        "chosen": [*EARLIER, ASKED, says("Yes.")],
        "rejected": [*EARLIER, ASKED, says("No.")],
    }
    found = recorded(row)
    assert found["messages"] == [*EARLIER, ASKED]
    assert (found["output"], found["rejected"]) == ("Yes.", "No.")
    further = {"rejected": [*EARLIER, ASKED, says("No."), ASKED, says("Yes.")]}
    other = {"rejected": [*EARLIER[:2], says("Maybe."), ASKED, says("No.")]}
    empty = {"chosen": [*EARLIER, ASKED, says(" ")]}
    short = {"rejected": row["rejected"][:-1]}
    for odd in (further, other, empty, short, {"rejected": []}, {"chosen": None}):
        found = recorded(row | odd)
        assert (found["output"], found["rejected"]) == ("", "")


def test_columns_of_other_names():
    named = COLUMNS | {"instruction": "q", "output": "good", "rejected": "bad"}
    row = {"q": "Is 7 a prime?", "input": "Of the", "good": "Yes.", "bad": "No."}
    found = recorded(row, named)
    assert found == PLAIN | {"input": "Of the", "rejected": "No."}
    named = COLUMNS | {"instruction": "q", "output": "a", "desirable": "liked"}
    found = recorded({"q": "Is 7 a prime?", "a": "Yes.", "liked": 1}, named)
    assert found == PLAIN | {"desirable": "true"}
    with pytest.raises(Unfit, match="liked"):
        recorded({"q": "Is 7 a prime?", "a": "Yes.", "liked": "maybe"}, named)
    with pytest.raises(Unfit, match="no column what it answers"):
        recorded({"chosen": "Yes.", "rejected": "No."})


@pytest.mark.parametrize("label", [True, 1, "true", 1.0, False, 0, "False", None, ""])
def test_thumbs_up_and_down(label):
    told = {"True": "true", "1": "true", "1.0": "true", "true": "true"}
    wanted = told.get(str(label), "" if label in (None, "") else "false")
    for asked, answer in (
        ("Is 7 a prime?", "Yes."),
        ([ASKED], [says("Yes.")]),
    ):
        row = {"prompt": asked, "completion": answer, "label": label}
        assert recorded(row) == PLAIN | {"desirable": wanted}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "hub"])
@pytest.mark.parametrize("form", ["text", "whole conversations"])
def test_pairs_come_from_files_and_from_the_hub(form, suffix, configure, tmp_path):
    rows = [FORMS[form] | {"kind": str(i % 2)} for i in range(8)]
    if suffix == "hub":
        put(rows, tmp_path / "train.jsonl")
        source = f"dataset=alpaca_gpt4 dataset.name={tmp_path}"
    else:
        path = tmp_path / f"train.{suffix}"
        Dataset.from_list(rows).to_parquet(path) if suffix == "parquet" else put(
            rows, path
        )
        source = f"dataset=local dataset.path={path} evaluate.every_round=0"
    cfg = configure("task=dpo", source, "num_clients=2 dataset.label=kind")
    found = dataset.load_partition(cfg, 1)
    assert found["kind"]
    record = dataset.to_record(found[0], cfg.dataset.columns)
    assert record == PLAIN | {"rejected": "No."}


def test_a_node_names_its_columns(tmp_path, monkeypatch):
    rows = [{"instruction": "Is 7 a prime?", "output": "Yes.", "worse": "No."}] * 12
    put(rows, tmp_path / "pairs.jsonl")
    node = {"data-path": str(tmp_path / "pairs.jsonl"), "cpus": 1, "column-input": ""}
    told = {"overrides": "experiment=dpo num_clients=2", "run": "1"}
    monkeypatch.chdir(tmp_path)
    cfg, partition = permit.settle(told, node | {"column-rejected": "worse"})
    row = dataset.load_partition(cfg, partition)[0]
    assert dataset.to_record(row, cfg.dataset.columns)["rejected"] == "No."
    with pytest.raises(Refusal):
        permit.settle(told, node)


@pytest.mark.slow
def test_answers_are_encoded_as_they_are_generated(configure):
    _, task, tokenizer = made("dpo", configure)
    pair = pairs(1)[0]
    [example] = examples_of(task, tokenizer, [pair])
    rows = preference.rows_of(example)
    for row, answer in zip(rows, (pair["chosen"], pair["rejected"]), strict=True):
        record = {"instruction": pair["prompt"], "input": "", "output": answer}
        assert row == templates.encode(record, "alpaca", tokenizer, 128)
    assert not task.is_cut(example, tokenizer)


@pytest.mark.slow
def test_what_teaches_nothing_falls_out(configure):
    _, task, tokenizer = made("dpo", configure)
    pair = pairs(1)[0]
    odd = [
        {"rejected": pair["chosen"]},
        {"rejected": f" {pair['chosen']} "},
        {"rejected": " "},
        {"chosen": ""},
        {"prompt": "why " * 200},
        # Where both are cut, they are the same.
        {"chosen": "so " * 200 + "yes", "rejected": "so " * 200 + "no"},
    ]
    made_of = examples_of(task, tokenizer, [pair | one for one in odd])
    assert made_of == [None] * len(odd)
    [cut] = examples_of(task, tokenizer, [pair | {"rejected": "no " * 200}])
    assert task.is_cut(cut, tokenizer)
    assert cut["lengths"][1] == 128
    _, kto, _ = made("kto", configure)
    row = thumbs(1)[0] | {"label": None}
    assert examples_of(kto, tokenizer, [row]) == [None]


@pytest.mark.slow
def test_a_long_conversation_has_one_prompt_for_both_answers(configure):
    _, task, tokenizer = made("dpo", configure, "dataset.template=chat")
    before = [m for _ in range(12) for m in ({**ASKED}, says("Yes it is."))]
    row = {
        "chosen": [*EARLIER, *before, ASKED, says("Yes.")],
        "rejected": [*EARLIER, *before, ASKED, says("No, " * 20)],
    }
    [example] = examples_of(task, tokenizer, [row])
    prompts = [
        one["input_ids"][: one["labels"].count(IGNORED)]
        for one in preference.rows_of(example)
    ]
    assert prompts[0] == prompts[1]
    assert task.is_cut(example, tokenizer)
    assert max(example["lengths"]) <= 128


# --- what does not go together ------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ("task=dpo dataset=tiny_qa", "dataset.columns.rejected"),
        ("task=kto dataset=tiny_qa", "dataset.columns.desirable"),
        ("task=dpo audit.canaries=2", "audit.canaries"),
        ("task=orpo evaluate.choices=category", "evaluate.choices"),
        (
            "task=kto train.training_arguments.per_device_train_batch_size=1",
            "per_device_train_batch_size",
        ),
        ("task=kto privacy=record", "privacy=record"),
        ("task=dpo task.beta=0", "task.beta"),
        ("task=kto task.desirable_weight=-1", "task.desirable_weight"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides, key, configure):
    with pytest.raises(UserError, match=key.replace(".", r"\.")) as caught:
        configure(f"dataset=tiny_preferences {overrides}")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_nodes_do_not_have_a_first_adapter_to_compare_with(configure, tmp_path):
    from settings import preflight

    cfg, *_ = made("dpo", configure)
    client.save(cfg, client.initial_adapter(cfg), tmp_path / "peft_1", 1)
    cfg.model["adapter"] = str(tmp_path / "peft_1")
    preflight.check_adapter(cfg, deployed=False)
    with pytest.raises(UserError, match="--merge"):
        preflight.check_adapter(cfg, deployed=True)
