"""pytest tests/test_heads.py: heads of bases that tell labels apart, made and in an adapter."""

import contextlib
import re

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    XLNetConfig,
)

import model
from assets.testbed import bases
from assets.testbed.adapters import same
from compute import heads
from methods import sharing
from reporting import export
from utils import Settings, UserError

pytestmark = pytest.mark.usefixtures("in_float32")

CPU = torch.device("cpu")
LABELS = ["calm", "glad", "sad"]

# Of a base's head, what must be trained; BERT's pooler is not in a masked language model.
HEADS = {
    "bert": {"bert.pooler.dense", "classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "llama": {"score"},
    "gpt2": {"score"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Writes a base of an architecture, once; its path."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def write(name: str) -> str:
        made[name] = made.get(name) or bases.write(name, root / name)
        return made[name]

    return write


def settings(name, kind="SEQ_CLS", bits=None, **more) -> tuple[Settings, Settings]:
    """Those of a model and of LoRA on it."""
    labels = None if kind == "QUESTION_ANS" else LABELS
    about = {"name": name, "labels": labels, "quantization": bits}
    about |= {"gradient_checkpointing": False}
    lora = {"_target_": "peft.LoraConfig", "task_type": kind, "r": 4, "lora_alpha": 8}
    lora |= {"target_modules": "all-linear"} | more
    return Settings.of(about), Settings.of(lora)


def trained(net) -> dict[str, torch.Tensor]:
    return {n: p for n, p in net.named_parameters() if p.requires_grad}


def of_head(state) -> dict[str, torch.Tensor]:
    return {name: state[name] for name in state if ".lora_" not in name}


@pytest.mark.parametrize("name", bases.CONFIGS)
def test_all_of_a_head_is_trained_and_made_of_the_seed_alone(name, base, tmp_path):
    state = model.adapter_state(model.build(*settings(base(name)), 3, CPU))
    names = {key.rpartition(".")[0] for key in of_head(state)}
    plain = {n.replace(".modules_to_save.default", "") for n in names}
    assert plain == {f"base_model.model.{part}" for part in HEADS[name]}
    # What the server makes without weights, and what another base's weights give.
    seeded = model.seeded(*settings(base(name)), 3)
    assert same(seeded, state)
    folder = tmp_path / "with a head"
    kind = AutoModelForSequenceClassification
    kind.from_pretrained(base(name), num_labels=3).save_pretrained(folder)
    bases.tokenizer(name).save_pretrained(folder)
    other = model.adapter_state(model.build(*settings(str(folder)), 3, CPU))
    assert all(torch.equal(other[key], state[key]) for key in of_head(state))
    another = model.adapter_state(model.build(*settings(base(name)), 4, CPU))
    weights = [key for key in of_head(state) if key.endswith("weight")]
    assert not any(torch.equal(another[key], state[key]) for key in weights)


@pytest.mark.parametrize("kind", model.HEADED)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_frame_has_the_same_tensors_for_every_kind(name, kind, base):
    given = settings(base(name), kind)
    state = model.adapter_state(model.build(*given, 0, CPU))
    frame = trained(model.skeleton(*given))
    assert {k: v.shape for k, v in frame.items()} == {
        k: v.shape for k, v in state.items()
    }
    model.rehearse(*given, 0, 64)  # saved and opened again it gives the same


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "llama"])
def test_a_head_is_never_quantised(name, base):
    net = model.build(*settings(base(name), bits=8), 0, CPU)
    kinds = {n: type(m).__name__ for n, m in net.named_modules()}
    assert "Linear8bitLt" in kinds.values()
    for key, value in of_head(trained(net)).items():
        assert value.dtype == torch.float32
        assert kinds[key.rpartition(".")[0]] == "Linear"


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_lower_rank_keeps_the_head_whole(name, base):
    given = settings(base(name))
    net = model.build(*given, 0, CPU)
    before = model.adapter_state(net)
    model.set_rank(net, given[1], 2)
    after = model.adapter_state(net)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in of_head(before).items())
    assert {len(v) for k, v in after.items() if ".lora_A." in k} == {2}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, 2, 7])
def test_a_causal_models_logits_are_those_of_the_last_token(base, side, pad):
    # 7 is the last token of two texts, where transformers takes it for padding.
    net = model.build(*settings(base("llama")), 0, CPU).eval()
    net.config.pad_token_id = pad
    texts = [[5, 6, 7], [5, 7], [8, 9, 10, 11, 12, 0], [4]]
    rows, masks = [], []
    for ids in texts:
        free, own = 8 - len(ids), [1] * len(ids)
        left = side == "left"
        rows.append([pad] * free + ids if left else ids + [pad] * free)
        masks.append([0] * free + own if left else own + [0] * free)
    batch = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
    with torch.no_grad():
        together = heads.logits(net, batch)
        for ids, found in zip(texts, together, strict=True):
            states = net.get_base_model().model(torch.tensor([ids])).last_hidden_state
            own = net.get_base_model().score(states)[0, -1]
            torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)


def test_a_model_without_a_body_of_its_own_is_refused():
    net = torch.nn.Linear(2, 2)
    net.base_model = net
    with pytest.raises(UserError, match="Linear does not tell its head from the rest"):
        heads.parts(net)


@pytest.mark.parametrize("name", ["distilbert", "llama"])
def test_what_is_saved_is_peft_s_and_merges_with_its_labels(name, base, tmp_path):
    given, lora = settings(base(name))
    net = model.build(given, lora, 0, CPU).eval()
    generator = torch.Generator().manual_seed(0)
    state = {
        key: value + 0.1 * torch.randn(value.shape, generator=generator)
        for key, value in model.adapter_state(net).items()
    }
    model.set_adapter_state(net, state)
    about = {"round": 1, "seed": 0, "template": "alpaca", "model": dict(given)}
    about["task"] = {"_target_": "tasks.classification.X", "model": "SEQ_CLS"}
    frame, tokenizer = model.skeleton(given, lora), model.load_tokenizer(base(name))
    folder = tmp_path / "peft_1"
    model.save_adapter(frame, state, tokenizer, about, folder)
    inputs = {"input_ids": torch.arange(4, 12)[None]}
    wanted = net(**inputs).logits
    plain = AutoModelForSequenceClassification.from_pretrained(base(name), num_labels=3)
    if plain.config.pad_token_id is None:
        plain.config.pad_token_id = 0
    found = PeftModel.from_pretrained(plain, folder).eval()(**inputs).logits
    torch.testing.assert_close(found, wanted)
    opened, _ = model.open_adapter(str(folder), model.read_about(str(folder)), CPU)
    torch.testing.assert_close(opened(**inputs).logits, wanted)
    with net.disable_adapter(), opened.disable_adapter():
        torch.testing.assert_close(opened(**inputs).logits, net(**inputs).logits)
    model.merge(str(folder), model.read_about(str(folder)), CPU, tmp_path / "whole")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(
        whole.eval()(**inputs).logits, wanted, rtol=1e-3, atol=1e-4
    )
    assert [whole.config.id2label[i] for i in range(3)] == LABELS


@pytest.mark.parametrize("options", [[], ["--merge"]])
@pytest.mark.parametrize("kind", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_the_code_of_a_card_gives_what_was_trained(kind, options, base, tmp_path):
    given, lora = settings(base("distilbert"), kind)
    net = model.build(given, lora, 0, CPU).eval()
    state = {k: v + 0.1 for k, v in model.adapter_state(net).items()}
    model.set_adapter_state(net, state)
    about = {"round": 1, "seed": 0, "template": "alpaca", "model": dict(given)}
    about["task"] = {"_target_": "tasks.span.X", "model": kind}
    frame, tokenizer = model.skeleton(given, lora), model.load_tokenizer(given["name"])
    model.save_adapter(frame, state, tokenizer, about, tmp_path / "run/peft_1")
    told = [f"--peft-path={tmp_path}/run/peft_1", *options]
    folder = export.export(export.parse(told))
    card = (folder / "README.md").read_text()
    assert ("```text\ncalm\n" in card) == (kind != "QUESTION_ANS")
    assert "## Source" not in card
    [code] = re.findall("```python\n(.*?)```", card, re.S)
    # A folder of one machine is named by its last part.
    (folder.parent / "distilbert").symlink_to(given["name"])
    made: dict = {}
    with contextlib.chdir(folder.parent):
        exec(code.replace("bfloat16", "float32"), made)
    wanted, found = (m(input_ids=made["ids"]) for m in (net, made["model"]))
    for name in (name for name in wanted if name.endswith("logits")):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-3)


def test_each_method_says_of_a_head_what_it_says_of_the_rest(base):
    names = list(model.seeded(*settings(base("bert")), 0))
    head = [n for n in names if ".lora_" not in n]
    a = [n for n in names if ".lora_A." in n]
    b = [n for n in names if ".lora_B." in n]
    for number in (1, 2):
        assert {*sharing.FFA().trains(names, number)} == {*b, *head}
        half = b if number == 1 else a
        assert {*sharing.RoLoRA().trains(names, number)} == {*half, *head}
    personal = sharing.Adapter(["modules_to_save"])  # FedPer's, a head of one's own
    assert personal.own(names) == head


def test_a_base_that_reads_its_padding_is_refused(tmp_path):
    # XLNet's summary is of the last position, and its tokenizer pads in front.
    config = XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=2, d_inner=48)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    given = settings(str(tmp_path), target_modules=["layer_1"])
    with pytest.raises(UserError, match="makes something else of a text in a batch"):
        model.rehearse(*given, 0, 16)
