"""pytest tests/test_seq2seq.py: a text from another, on encoder and decoder."""

import json
import re
import shutil
import sys
from functools import lru_cache
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import client
import dataset
import model
import tasks
import test as ask
from compute import loss as losses
from compute.loss import decoding
from evaluation import audit, benchmarks
from node import permit
from reporting import export
from server import rounds
from server.cohort import cohort_size
from settings import plan, preflight
from settings.compose import compose, record, resolve
from utils import IGNORED, PROJECT, Settings, UserError

pytestmark = pytest.mark.usefixtures("in_float32")

CPU = torch.device("cpu")
RECORD = {"instruction": "We all know that the plural of ox is oxen.", "input": ""}
RECORD |= {"output": "ox: oxen"}

VOCABULARY = 64
ALL = {"vocab_size": VOCABULARY, "d_model": 32, "pad_token_id": 0, "eos_token_id": 1}
T5 = {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
BART = {
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    "bos_token_id": 2,
    "dropout": 0.0,
}
# By transformers' name; the way in which the labels' logits are come by.
BASES = {
    "T5": (T5, "hidden"),
    "MT5": (T5 | {"feed_forward_proj": "gated-gelu"}, "hidden"),
    "Bart": (BART, "narrowed"),
    "MBart": (BART, "narrowed"),
    "Pegasus": (BART, "narrowed"),
    "Marian": (BART | {"decoder_vocab_size": VOCABULARY}, "narrowed"),
    "M2M100": (BART, "hidden"),
    "Blenderbot": (BART, "narrowed"),
}


def base(name: str, **more) -> torch.nn.Module:
    """A base of random weights; where it adds a bias to its logits, one that is not 0."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**ALL, **BASES[name][0], **more)
    net = AutoModelForSeq2SeqLM.from_config(config).eval()
    if hasattr(net, "final_logits_bias"):
        net.final_logits_bias += torch.randn_like(net.final_logits_bias)
    return net


def some() -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Three examples of other lengths, and the same as people pad them for transformers."""
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> list[int]:
        return torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()

    examples = [
        {"input_ids": [*draw(n), 1], "labels": [*draw(m), 1]}
        for n, m in ((9, 2), (4, 6), (12, 1))
    ]

    def padded(name: str, value: int) -> torch.Tensor:
        rows = [torch.tensor(one[name]) for one in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, True, value)

    ids = padded("input_ids", 0)
    labels = padded("labels", IGNORED)
    return examples, {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": labels,
    }


def task_of(length: int = 64, **more) -> tasks.Task:
    node = {"_target_": "tasks.seq2seq.Seq2Seq", "model": "SEQ_2_SEQ_LM", **more}
    told = {"dataset": {"template": "alpaca"}, "train": {"seq_length": length}}
    return tasks.build(Settings.of({"task": node, **told}))


class Pad:
    pad_token_id = 0


# --- the loss ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_loss_gradient_and_scores_are_transformers_own(name):
    net, task = base(name), task_of()
    examples, plain = some()
    own = net(**plain)
    own.loss.backward()
    wanted = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    batch = task.collator(Pad, "left")(examples)
    loss = task.loss(net, batch)
    loss.backward()
    assert losses._WAYS[net].__name__ == f"_{BASES[name][1]}"
    assert loss.item() == pytest.approx(own.loss.item(), rel=1e-5)
    found = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5)
    labels = plain["labels"]
    count = (labels != IGNORED).sum()
    assert task.loss(net, batch, 2 * count).item() == pytest.approx(loss.item() / 2)
    each = cross_entropy(own.logits.transpose(1, 2), labels, reduction="none")
    right = (own.logits.argmax(-1) == labels).sum(1)
    table = torch.stack([each.sum(1), right, (labels != IGNORED).sum(1)], dim=1)
    scores = task.score(net, batch)
    torch.testing.assert_close(scores, table.double(), rtol=1e-4, atol=1e-4)
    told = task.metrics(scores)
    assert told["loss"] == pytest.approx(own.loss.item(), rel=1e-5)
    assert told["accuracy"] == pytest.approx(right.sum().item() / count.item())


@pytest.mark.parametrize("name", ["T5", "Bart", "MBart"])
def test_a_blank_example_adds_nothing(name):
    net, task = base(name), task_of()
    examples, _ = some()
    collate = task.collator(Pad, "right")
    alone = task.score(net, collate(examples))
    filled = task.score(net, collate([*examples, task.blank()]))
    torch.testing.assert_close(filled[:3], alone, rtol=1e-5, atol=1e-5)
    assert filled[3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", BASES)
def test_the_decoder_reads_the_models_own_shift(name):
    """And one label more than that, so that a last token has a place as well."""
    net = base(name)
    examples, plain = some()
    taken = []
    decoder = net.get_decoder()
    handle = decoder.register_forward_pre_hook(
        lambda _, __, given: taken.append(given["input_ids"]), with_kwargs=True
    )
    net(**plain)
    handle.remove()
    [own] = taken
    ours = decoding(net, task_of().collator(Pad, "right")(examples))
    for row, one in enumerate(examples):  # beyond is padding
        length = len(one["labels"])
        found = ours["decoder_input_ids"][row, :length]
        assert found.tolist() == own[row, :length].tolist()


# --- records -----------------------------------------------------------------------------


def test_source_and_target_are_the_tokenizers_own():
    tokenizer, task = model.load_tokenizer("assets/tiny_t5"), task_of()
    example = task.encode(RECORD, tokenizer)
    assert example == {
        "input_ids": tokenizer(RECORD["instruction"])["input_ids"],
        "labels": tokenizer(text_target=RECORD["output"])["input_ids"],
    }
    assert example["labels"][-1] == tokenizer.eos_token_id
    assert not task.is_cut(example, tokenizer)
    assert task.length(example) == sum(map(len, example.values()))
    assert task.encode(RECORD | {"output": " \n"}, tokenizer) is None

    def read(task, **more):
        ids = task.encode(RECORD | more, tokenizer)["input_ids"]
        return tokenizer.decode(ids, skip_special_tokens=True)

    assert read(task, input="In Latin.") == f"{RECORD['instruction']}\nIn Latin."
    assert read(task_of(prefix="shorten: ")) == f"shorten: {RECORD['instruction']}"
    said = [{"role": "user", "content": "Hot?"}, {"role": "assistant", "content": "No"}]
    assert read(task, messages=said) == "Hot?\nNo"


def test_what_is_too_long_keeps_its_end_token_and_is_told():
    tokenizer, task = model.load_tokenizer("assets/tiny_t5"), task_of(length=8)
    whole = tokenizer(RECORD["instruction"])["input_ids"]
    assert len(whole) > 8
    example = task.encode(RECORD, tokenizer)
    assert example["input_ids"] == [*whole[:7], tokenizer.eos_token_id]
    assert task.is_cut(example, tokenizer)
    long = task.encode(RECORD | {"instruction": "q", "output": "red " * 20}, tokenizer)
    assert len(long["labels"]) == 8
    assert task.is_cut(long, tokenizer)
    assert set(task.collator(tokenizer, "left")([long])) == {
        *("input_ids", "attention_mask", "labels"),
    }


def test_a_record_that_spells_an_end_does_not_end_there():
    tokenizer, task = model.load_tokenizer("assets/tiny_t5"), task_of()
    spelt = RECORD | {"instruction": "<s>red</s> is a colour", "output": "red</s>"}
    for ids in task.encode(spelt, tokenizer).values():
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1


def test_a_tokenizer_that_ends_no_text_is_refused():
    tokenizer = model.load_tokenizer("assets/tiny_llama")
    with pytest.raises(UserError, match="ends no text with </s>"):
        task_of().check_tokenizer(tokenizer)
    task_of().check_tokenizer(model.load_tokenizer("assets/tiny_t5"))


# --- answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["T5", "Bart", "MBart"])
def test_answers_are_what_generate_gives_each_record_alone(name):
    tokenizer, task = model.load_tokenizer("assets/tiny_t5"), task_of()
    torch.manual_seed(3)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": 2}
    ids["vocab_size"] = len(tokenizer)
    start = {"decoder_start_token_id": 2 if name != "T5" else tokenizer.pad_token_id}
    kind = getattr(transformers, f"{name}Config")
    more = {"init_std": 0.5} if name != "T5" else {}
    config = kind(**{**ALL, **BASES[name][0], **ids, **start, **more})
    net = AutoModelForSeq2SeqLM.from_config(config).eval()
    records = [
        RECORD,
        RECORD | {"instruction": "Snow is white, of course."},
        RECORD | {"instruction": "In school we learn that 3 plus 4 is 7."},
    ]
    given = task.answers(net, tokenizer, records, limit=7)
    for asked, answer in zip(records, given, strict=True):
        inputs = tokenizer(asked["instruction"], return_tensors="pt")
        inputs.pop("token_type_ids", None)
        output = net.generate(**inputs, max_new_tokens=7, do_sample=False)[0, 1:]
        assert len(output) <= 7
        text = tokenizer.decode(output, skip_special_tokens=True)
        assert answer == text.strip()
    assert any(given)


def test_an_answer_ends_where_the_decoder_ends_it():
    """BART begins with the token that it ends with."""
    tokenizer, task = model.load_tokenizer("assets/tiny_t5"), task_of()
    red, end = tokenizer("red")["input_ids"]

    class Net:
        device = CPU
        config = transformers.BartConfig()
        generation_config = transformers.GenerationConfig(eos_token_id=end)

        def generate(self, **given):
            assert given["eos_token_id"] == [end]
            return torch.tensor([[end, red, end, red]])

    assert task.answers(Net(), tokenizer, [RECORD], 4) == ["red"]


# --- runs --------------------------------------------------------------------------------

SHORT = (
    "experiment=seq2seq num_clients=4 num_rounds=2 strategy.fraction_fit=0.5 "
    "evaluate.exact_match=false train.training_arguments.max_steps=2 "
    "train.training_arguments.per_device_train_batch_size=4"
)


def configure(*overrides: str) -> Settings:
    return preflight.check(compose(" ".join([SHORT, *overrides])))


@pytest.fixture(scope="module")
def bart(tmp_path_factory) -> str:
    """An override: a BART of random weights, with the tiny T5's tokenizer."""
    folder = tmp_path_factory.mktemp("bart")
    tokenizer = model.load_tokenizer("assets/tiny_t5")
    own = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    own |= {"eos_token_id": tokenizer.eos_token_id, "init_std": 0.2}
    start = {"decoder_start_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = transformers.BartConfig(**{**ALL, **BART, **own, **start, "d_model": 64})
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"model.name={folder} train.seq_length=48"


METHODS = sorted(
    {path.stem for path in (PROJECT / "conf/peft").glob("*.yaml")} - {"outer"}
)  # which needs an emulator as its base (tests/test_emulator.py)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_peft_method_trains_and_lowers_the_loss(method):
    rate = {"ia3": 5e-2, "c3a": 3e-2, "fourierft": 3e-2, "prompt": 3e-2, "prefix": 3e-2}
    steps = "train.training_arguments.max_steps=6"
    rate = f"train.learning_rate_max={rate.get(method, 3e-3)}"
    cfg = configure(f"peft={method}", steps, rate)
    start = client.initial_adapter(cfg)
    before = client.evaluate(cfg, start, 0)
    state, told = client.train(cfg, start, 0, server_round=1)
    assert all(not torch.equal(state[name], start[name]) for name in start)
    assert client.evaluate(cfg, state, 0)["eval_loss"] < before["eval_loss"]
    assert told["num-examples"] == 24
    assert told["dropped"] == told["truncated"] == 0
    assert told["tokens"] > 24 * 10


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["4", "8", "null", "true"])
def test_bart_trains_quantised_or_checkpointed(setting, bart):
    key = "gradient_checkpointing" if setting == "true" else "quantization"
    cfg = configure(bart, f"model.{key}={setting}")
    start = client.initial_adapter(cfg)
    net = model.build_once(cfg["model"], cfg["peft"], cfg["seed"], CPU)
    frozen = {n: p.clone() for n, p in net.named_parameters() if not p.requires_grad}
    state, told = client.train(cfg, start, 0, server_round=1)
    after = dict(net.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())
    assert all(not torch.equal(state[name], start[name]) for name in start)
    assert 0 < told["train_loss"] < 20


@pytest.mark.slow
def test_checkpointing_changes_no_gradient():
    found, tokenizer = [], model.load_tokenizer("assets/tiny_t5")
    for setting in ("true", "false"):
        cfg = configure(f"model.gradient_checkpointing={setting}")
        net, task = model.build(cfg.model, cfg.peft, 0, CPU).train(), tasks.build(cfg)
        batch = task.collator(tokenizer, "left")([task.encode(RECORD, tokenizer)])
        task.loss(net, batch).backward()
        found.append({n: p.grad for n, p in net.named_parameters() if p.requires_grad})
        assert net.get_base_model().is_gradient_checkpointing == (setting == "true")
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)


def test_two_layers_of_each_side_are_tried():
    config = transformers.BartConfig(encoder_layers=6, decoder_layers=5)
    shorter = model._shortened(config)
    assert (shorter.encoder_layers, shorter.decoder_layers) == (2, 2)
    shorter = model._shortened(transformers.T5Config(num_decoder_layers=4))
    assert (shorter.num_layers, shorter.num_decoder_layers) == (2, 2)


TOGETHER = [
    "strategy=svd strategy.fraction_fit=0.5",
    "strategy=fedadam strategy.fraction_fit=0.5",
    "strategy=scaffold strategy.fraction_fit=0.5",
    "comm.dtype=int8",
    "sharing=ffa",
    "sharing=rolora",
    "sharing=fedsa strategy.fraction_fit=1",
    "personal=ditto strategy.fraction_evaluate=1",
    "privacy=record privacy.epsilon=8 strategy.fraction_evaluate=0",
    "partitioner=clusters partitioner.num_clusters=4",
    "mode=centralized",
    "mode=local",
    "evaluate.every_round=1 evaluate.exact_match=true evaluate.max_new_tokens=3 few",
]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", TOGETHER)
def test_what_goes_with_instructions_goes_with_it(overrides, loopback, tmp_path):
    few = tmp_path / "few.jsonl"
    lines = (PROJECT / "assets/tiny_seq2seq/test.jsonl").read_text().splitlines()
    few.write_text("\n".join(lines[:4]))
    cfg = configure(overrides.replace(" few", f" dataset.test_path={few}"))
    rounds.run(cfg, loopback(cfg, folder=tmp_path), tmp_path)
    told = json.loads((tmp_path / "history.json").read_text())["rounds"]
    assert all(entry["failures"] == [] for entry in told)
    assert all(0 <= entry["train_loss"] < 20 for entry in told)
    if "few" in overrides:
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert {"rouge_l_before", "rouge_l_after", "test_perplexity_after"} <= {
            *summary
        }


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_adapter(loopback, tmp_path):
    cfg = configure("strategy=fedadam strategy.fraction_fit=0.5 comm.dtype=int8")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    rounds.run(cfg, loopback(cfg, folder=whole), whole)
    first = cfg | {"num_rounds": 1}
    rounds.run(first, loopback(first, folder=parts), parts)
    again = cfg | {"resume": str(parts)}
    rounds.run(again, loopback(again, folder=parts), parts)
    files = [path / "peft_2/adapter_model.safetensors" for path in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_a_node_trains_on_texts_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    rows = [{"bericht": f"Note {i}: all is well.", "kurz": "well"} for i in range(20)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    node = {"data-path": str(tmp_path / "own.jsonl"), "cpus": 1}
    node |= {"column-instruction": "bericht", "column-output": "kurz"}
    node |= {"column-input": "", "cache-path": str(tmp_path / "cache")}
    told = {"overrides": f"{SHORT} 'task.prefix=\"shorten: \"'", "run": "first"}
    cfg, partition = permit.settle(told, node)
    assert cfg.task.prefix == "shorten: "
    _, metrics = client.train(cfg, client.initial_adapter(cfg), partition, 1)
    assert metrics["records"] == 20


# --- what it is saved as -----------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    @lru_cache
    def make(overrides: str = "") -> Path:
        """An adapter of random weights."""
        cfg = configure("'task.prefix=\"shorten: \"'", overrides)
        net = model.build(cfg.model, cfg.peft, 0, CPU)
        draw = torch.Generator().manual_seed(3)
        state = {
            name: value + torch.randn(value.shape, generator=draw) * 0.02
            for name, value in model.adapter_state(net).items()
        }
        folder = tmp_path_factory.mktemp("run") / "peft_2"
        client.save(cfg, state, folder, done=2)
        return folder

    return make


def plainly(folder: Path, text: str, limit: int = 12) -> str:
    """The answer in plain transformers and PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / "adapter_config.json").exists():
        config = peft.PeftConfig.from_pretrained(folder)
        name = str(PROJECT / config.base_model_name_or_path)
        net = AutoModelForSeq2SeqLM.from_pretrained(name, dtype=torch.float32)
        net = peft.PeftModel.from_pretrained(net, folder)
    else:
        net = AutoModelForSeq2SeqLM.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    output = net.float().eval().generate(**inputs, max_new_tokens=limit)
    return tokenizer.decode(output[0], skip_special_tokens=True).strip()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_a_saved_adapter_answers_a_question_as_plain_peft_does(
    method, saved, monkeypatch, capsys
):
    monkeypatch.setattr(model, "compute_dtype", lambda device: torch.float32)
    folder, text = saved(f"peft={method}"), RECORD["instruction"]
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    wanted = plainly(folder, f"shorten: {text}")
    options = [f"--peft-path={folder}", f"--question={text}", "--max-new-tokens=12"]
    monkeypatch.setattr(sys, "argv", ["test.py", *options, "--device=cpu"])
    ask.main()
    assert capsys.readouterr().out == f"Q: {text}\nA: {wanted}\n"


@pytest.mark.slow
def test_a_file_is_examined_as_in_the_run(saved, tmp_path, monkeypatch, capsys):
    folder = saved()
    rows = [{"text": RECORD["instruction"], "title": RECORD["output"]}] * 2
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "told.json"
    options = [f"--file={tmp_path}/some.jsonl", f"--out={out}", "--base"]
    monkeypatch.setattr(sys, "argv", ["test.py", f"--peft-path={folder}", *options])
    ask.main()
    told = json.loads(out.read_text())
    assert told["questions"] == 2
    assert {"test_loss", "test_perplexity", "exact_match", "rouge_l"} <= {
        *told["scores"]["tuned"]
    }
    assert "exact match" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [[], ["--system=x", "--question=y"], ["--temperature=1", "--question=y"]]
)
def test_a_chat_and_what_belongs_to_it_is_refused(options, saved, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["test.py", f"--peft-path={saved()}", *options])
    with pytest.raises(SystemExit) as ended:
        ask.main()
    assert ended.value.code == 1
    assert "answers one record at a time" in capsys.readouterr().err


def test_benchmarks_and_audits_are_refused(saved, tmp_path, loopback):
    options = benchmarks.parse([f"--peft-path={saved()}", "--tasks=medical"])
    with pytest.raises(UserError, match="an adapter of a SEQ_2_SEQ_LM"):
        benchmarks.evaluate(options)
    config = compose(SHORT)
    record(config, [SHORT], tmp_path)
    with pytest.raises(UserError, match="this run trained a SEQ_2_SEQ_LM"):
        audit.Run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--merge"]])
def test_the_code_of_a_card_writes_what_plain_transformers_writes(
    options, saved, tmp_path, monkeypatch, capsys
):
    source = Path(shutil.copytree(saved(), tmp_path / "run/peft_2"))
    folder = export.export(export.parse([f"--peft-path={source}", *options]))
    card = (folder / "README.md").read_text()
    [code] = re.findall("```python\n(.*?)```", card, re.S)
    assert "AutoModelForSeq2SeqLM" in code
    assert "vllm" not in card
    assert "## Prompt" not in card
    (folder.parent / "assets").symlink_to(PROJECT / "assets")
    monkeypatch.chdir(folder.parent)
    told: dict = {}
    capsys.readouterr()
    exec(code.replace("bfloat16", "float32"), told)
    assert told["prompt"].startswith("shorten: ")
    assert f"```text\n{told['prompt']}\n```" in card
    printed = capsys.readouterr().out.strip()
    assert printed == plainly(folder, told["prompt"], limit=64)
    assert printed == plainly(source, told["prompt"], limit=64)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4", "null"])
def test_bart_merges_into_a_plain_model(bits, bart, saved, tmp_path):
    folder = saved(f"{bart} model.quantization={bits}")
    about = model.read_about(str(folder))
    model.merge(str(folder), about, CPU, tmp_path / "merged")
    net, _ = model.open_adapter(str(folder), about, CPU)
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    _, plain = some()
    with torch.no_grad():
        found, wanted = merged.eval()(**plain).logits, net(**plain).logits.float()
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


# --- what is known before ----------------------------------------------------------------


@pytest.mark.slow
def test_what_a_step_takes_is_not_made_up():
    for overrides in ("", "client_resources.num_gpus=1"):
        rows = dict(plan.plan(resolve(compose(f"experiment=seq2seq {overrides}"))))
        [name] = [name for name in rows if name in ("memory a client", "VRAM a client")]
        assert rows[name].startswith("not known: t5")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("audit.canaries=3", "audit.canaries=3 with task._target_=tasks.seq2seq"),
        ("model=tiny", "model.name=assets/tiny_llama: "),
        ("task=generation", "model.name=assets/tiny_t5: "),
        ("task.prefix=3", "task.prefix=3: text is needed"),
        (
            "peft=prefix model.gradient_checkpointing=true",
            "PREFIX_TUNING does not work with gradient checkpointing",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(overrides, message):
    with pytest.raises(UserError) as error:
        configure(overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_more_than_the_positions_of_bart_is_refused(bart):
    with pytest.raises(UserError, match=r"train\.seq_length=100: too long"):
        configure(bart, "train.seq_length=100")


def test_the_subset_of_a_dataset_is_what_is_loaded(tmp_path):
    """A folder with configurations, as a dataset of the hub has them."""
    names = {"1.0.0": "old", "3.0.0": "new"}
    parts = [
        {
            "config_name": name,
            "data_files": [
                {"split": part, "path": f"{name}/{part}.jsonl"}
                for part in ("train", "test")
            ],
        }
        for name in names
    ]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(parts)}\n---\n")
    for name, word in names.items():
        (tmp_path / name).mkdir()
        rows = [{"article": f"{word} {i}", "highlights": word} for i in range(20)]
        for part in ("train", "test"):
            file = tmp_path / name / f"{part}.jsonl"
            file.write_text("\n".join(map(json.dumps, rows)))
    cfg = resolve(
        compose(
            f"{SHORT} dataset=cnn_dailymail dataset.name={tmp_path} num_clients=2 "
            "partitioner=iid"
        )
    )
    assert cfg.dataset.subset == "3.0.0"
    assert {*dataset.load_partition(cfg, 1)["highlights"]} == {"new"}
    assert {one["output"] for one in dataset.load_test(cfg)[0]} == {"new"}


def test_fednlps_setting_is_composed():
    cfg = resolve(compose("experiment=fednlp_cnndm"))
    assert (cfg.model.name, cfg.dataset.name) == (
        "facebook/bart-base",
        "abisee/cnn_dailymail",
    )
    assert (cfg.num_clients, cfg.num_rounds) == (100, 50)
    assert cohort_size(cfg.num_clients, cfg.strategy.fraction_fit) == 4
    assert cfg.partitioner.alpha == 0.1
    assert cfg.peft.task_type == cfg.task.model == "SEQ_2_SEQ_LM"


# --- what ships --------------------------------------------------------------------------


def test_the_tiny_t5_is_small_and_writes_a_sentence_again():
    folder = PROJECT / "assets/tiny_t5"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6 * 2**20
    text = "The day after Monday is called Tuesday."
    assert plainly(folder, text, limit=40) == text


def test_no_sentence_is_tested_that_is_trained_on():
    def read(side):
        path = PROJECT / f"assets/tiny_seq2seq/{side}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    train, test = read("train"), read("test")
    assert (len(train), len(test)) == (862, 228)
    for one in [*train, *test]:
        assert one["title"].startswith(one["category"].replace("_", " ") + ": ")
    assert not {x["text"] for x in train} & {x["text"] for x in test}


@pytest.mark.slow
def test_titles_are_found_for_facts_that_nobody_trained_on(loopback, tmp_path):
    cfg = preflight.check(compose("experiment=seq2seq"))
    rounds.run(cfg, loopback(cfg, folder=tmp_path), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["exact_match_before"] < 0.05
    assert summary["exact_match_after"] >= 0.95
