"""pytest tests/test_model.py: quantisation, adapters in memory and on disk."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import architectures
import model
from compute import loss
from methods import wire
from records import templates
from settings.compose import compose, resolve
from utils import PROJECT, UserError

CPU = torch.device("cpu")
METHODS = sorted(
    {path.stem for path in (PROJECT / "conf/peft").glob("*.yaml")} - {"outer"}
)  # which needs an emulator as its base (tests/test_emulator.py)


def parts(*overrides: str) -> tuple:
    cfg = compose(" ".join(["experiment=quickstart", *overrides]))
    return cfg.model, cfg.peft


def plain(model_cfg, peft_cfg) -> tuple[dict, dict]:

    return tuple(resolve(c) for c in (model_cfg, peft_cfg))


def weight(base: torch.nn.Module) -> torch.Tensor:
    return base.model.layers[0].self_attn.q_proj.weight.detach()


def test_four_bits_are_nf4_doubly_quantised_and_computed_on_once_unpacked():
    base = model.load_base("assets/tiny_llama", 4, CPU)
    original = weight(model.load_base("assets/tiny_llama", None, CPU))
    packed, state = quantize_4bit(original, quant_type="nf4", compress_statistics=True)
    by_hand = dequantize_4bit(packed, state)
    assert not torch.equal(weight(base), original)
    assert torch.equal(weight(base), by_hand.to(weight(base).dtype))
    assert type(base.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_eight_bits_stay_packed():
    base = model.load_base("assets/tiny_llama", 8, CPU)
    assert weight(base).dtype == torch.int8


@pytest.mark.parametrize("bits", [4, 8, None])
def test_the_base_is_frozen(bits):
    base = model.load_base("assets/tiny_llama", bits, CPU)
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_quantisation_settings():
    settings = model.quantization_config(4, torch.bfloat16)
    assert settings.load_in_4bit
    assert settings.bnb_4bit_quant_type == "nf4"
    assert settings.bnb_4bit_use_double_quant
    assert settings.bnb_4bit_compute_dtype == torch.bfloat16
    assert model.quantization_config(8, torch.bfloat16).load_in_8bit
    assert model.quantization_config(None, torch.bfloat16) is None


def test_unknown_bits_are_refused():
    with pytest.raises(ValueError, match="5 bits"):
        model.quantization_config(5, torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_skeleton_has_the_names_and_shapes_of_the_real_adapter(method):
    model_cfg, peft_cfg = plain(*parts(f"peft={method}"))
    real = model.build(model_cfg, peft_cfg, 0, CPU)
    frame = model.skeleton(model_cfg, peft_cfg)
    shapes = [
        {n: tuple(p.shape) for n, p in net.named_parameters() if p.requires_grad}
        for net in (real, frame)
    ]
    assert shapes[0] == shapes[1]
    base = [p for p in frame.parameters() if not p.requires_grad]
    # SHiRA's is on the CPU, of weights that are one value each.
    storages = {p.untyped_storage().data_ptr(): p for p in base if not p.is_meta}
    held = sum(p.untyped_storage().nbytes() for p in storages.values())
    assert held < 0.01 * sum(p.nbytes for p in base)


def test_initial_adapter_depends_on_the_seed_alone():
    model_cfg, peft_cfg = plain(*parts())
    torch.manual_seed(99)
    one = model.adapter_state(model.build(model_cfg, peft_cfg, 1, CPU))
    torch.rand(7)
    same = model.adapter_state(model.build(model_cfg, peft_cfg, 1, CPU))
    other = model.adapter_state(model.build(model_cfg, peft_cfg, 2, CPU))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A LoRA adapter of random weights, saved, with the live model that has them too."""
    model_cfg, peft_cfg = plain(*parts())
    net = model.build(model_cfg, peft_cfg, 0, CPU)
    generator = torch.Generator().manual_seed(3)
    state = {
        name: torch.randn(value.shape, generator=generator) * 0.05
        for name, value in model.adapter_state(net).items()
    }
    model.set_adapter_state(net, state)
    folder = tmp_path_factory.mktemp("run") / "peft_7"
    about = {"round": 7, "template": "alpaca", "model": model_cfg}
    frame = model.skeleton(model_cfg, peft_cfg)
    tokenizer = model.load_tokenizer(model_cfg["name"])
    model.save_adapter(frame, state, tokenizer, about, folder)
    return folder, net.eval(), state


def test_plain_peft_loads_what_was_saved(saved):
    folder, net, state = saved
    base = model.load_base("assets/tiny_llama", 4, CPU)
    loaded = peft.PeftModel.from_pretrained(base, folder).eval()
    ids = torch.tensor([[1, 300, 400, 500]])
    with torch.no_grad():
        assert torch.equal(net(input_ids=ids).logits, loaded(input_ids=ids).logits)
    on_disk = load_file(folder / "adapter_model.safetensors")
    assert len(on_disk) == len(state)
    assert all(tensor.dtype == torch.float32 for tensor in on_disk.values())
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "tokenizer.json", model.ABOUT} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "assets/tiny_llama"


def test_the_saved_tokenizer_asks_in_the_words_of_training(saved):
    tokenizer = AutoTokenizer.from_pretrained(saved[0])
    training = model.load_tokenizer("assets/tiny_llama")
    question = {"instruction": "Name the young of the animal.", "input": "cow"}
    turns = [question | {"output": "calf"}, question]
    asked = tokenizer.apply_chat_template(
        templates.messages("alpaca", turns),
        add_generation_prompt=True,
        return_dict=False,
    )
    assert asked == templates.prompt("alpaca", turns, training)
    assert training.chat_template != tokenizer.chat_template


def test_an_adapter_folder_says_how_to_ask_it(saved):
    folder, net, _ = saved
    about = model.read_about(str(folder))
    assert about["template"] == "alpaca"
    assert about["model"]["quantization"] == 4
    opened, tokenizer = model.open_adapter(str(folder), about, CPU)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(opened(**ids).logits, net(**ids).logits)


def test_a_folder_that_holds_an_adapter_is_answered_with_it(saved):
    folder, _, _ = saved
    with pytest.raises(UserError, match=r"Did you mean .*peft_7"):
        model.read_about(str(folder.parent))
    with pytest.raises(UserError, match="no such folder"):
        model.read_about(str(folder / "nowhere"))


def test_mismatch_names_what_is_wrong():
    expected = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    good = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    assert wire.mismatch(good, expected) is None
    assert "b among them" in wire.mismatch({"a": good["a"]}, expected)
    assert "(3, 2)" in wire.mismatch({**good, "a": torch.ones(3, 2)}, expected)
    for value in (float("nan"), float("inf")):
        bad = {**good, "b": torch.tensor([1.0, value, 1.0, 1.0])}
        assert wire.mismatch(bad, expected) == "b holds values that are not finite"


# --- every PEFT method, there and back ------------------------------------------------------

CLASSES = {kind.value: made for kind, made in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
# What a class wants besides the layers; several entries are several tries.
WANTED: dict[str, list[dict[str, Any]]] = {
    "LORA": [
        {},
        *({"init_lora_weights": x} for x in ("pissa", "pissa_niter_4", "olora", "eva")),
        *({"init_lora_weights": x} for x in ("gaussian", "orthogonal", "corda")),
        {"use_dora": True},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5, 6]},
        {"layers_to_transform": [3]},
        {"bias": "all"},
        {"task_type": None},
    ],
    "ADALORA": [{"total_step": 100}],
    "ADAPTION_PROMPT": [{"adapter_len": 4, "adapter_layers": 1}],
    "C3A": [{"block_size": 16}],
    "IA3": [{"feedforward_modules": []}],
    "ROAD": [{"group_size": 16}],
    "SHIRA": [{"r": 4}, {"r": 4, "random_seed": 1}],
    "TRAINABLE_TOKENS": [{"token_indices": [5, 6], "target_modules": None}],
    "VBLORA": [{"vector_length": 16, "num_vectors": 8, "r": 2}],
    "VERA": [{}, {"save_projection": False}, {"target_modules": "all-linear"}],
    "WAVEFT": [{"n_frequency": 100}],
}
QUICK = ("LORA-{}", "VERA-{}", "TINYLORA-{}", "CPT-{}", "MISS-{}")
TRIES = [
    pytest.param(
        name,
        more,
        id=(label := f"{name}-{more}"),
        marks=() if label in QUICK else pytest.mark.slow,
    )
    for name in CLASSES
    for more in WANTED.get(name, [{}])
]
# Starts that are drawn at random, or want data.
DRAWN = ("pissa_niter_4", "corda")
# Among those that a run takes.
TAKEN = {
    *(
        "LORA",
        "ADALORA",
        "IA3",
        "LOHA",
        "LOKR",
        "OFT",
        "BOFT",
        "HRA",
        "VERA",
        "RANDLORA",
    ),
    *("SHIRA", "MISS", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "LN_TUNING"),
    *("FOURIERFT", "VBLORA", "ROAD", "C3A", "TRAINABLE_TOKENS"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return architectures.save(
        "llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4
    )


def there_and_back(model_cfg: dict, peft_cfg: dict, folder: Path) -> bool:
    """Whether an adapter, trained a step and saved, gives the same when PEFT opens it."""
    net = model.build(model_cfg, peft_cfg, 3, CPU)
    frame = model.skeleton(model_cfg, peft_cfg)
    ids = torch.randint(5, 2000, (2, 8), generator=torch.Generator().manual_seed(1))
    trained = [p for p in net.parameters() if p.requires_grad]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    loss.answer_loss(net.train(), batch).backward()
    torch.optim.SGD(trained, lr=1.0).step()
    state = model.adapter_state(net)
    about = {"round": 7, "template": "alpaca", "model": model_cfg}
    tokenizer = model.load_tokenizer("assets/tiny_llama")
    model.save_adapter(frame, state, tokenizer, about, folder)
    opened, _ = model.open_adapter(str(folder), about, CPU)
    # A client or a server that goes on from what travels, with a fresh model of its own.
    other = model.build(model_cfg, peft_cfg, 3, CPU)
    model.set_adapter_state(other, state)
    with torch.no_grad():
        expected = net.eval()(input_ids=ids).logits[:, -8:]
        return all(
            torch.allclose(
                one.eval()(input_ids=ids).logits[:, -8:], expected, atol=1e-4
            )
            for one in (opened, other)
        )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "more"), TRIES)
def test_a_method_is_refused_or_comes_back_as_it_was_trained(
    name, more, tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(model, "compute_dtype", lambda device: torch.float32)
    made = CLASSES[name]
    model_cfg = {
        "name": str(tiny),
        "quantization": None,
        "gradient_checkpointing": False,
    }
    peft_cfg = {"_target_": f"peft.{made.__name__}", "task_type": "CAUSAL_LM"}
    fields = made.__dataclass_fields__
    if "target_modules" in fields:
        peft_cfg["target_modules"] = ["q_proj", "v_proj"]
    if "num_virtual_tokens" in fields:
        peft_cfg["num_virtual_tokens"] = 4
    peft_cfg |= more
    try:
        model.rehearse(model_cfg, peft_cfg, 3, 64)
    except UserError:
        assert name not in TAKEN or more.get("init_lora_weights") in DRAWN
        return
    assert there_and_back(model_cfg, peft_cfg, tmp_path / "peft_7")


# --- merging --------------------------------------------------------------------------------


def merges() -> list[Any]:
    """Architectures with and without tied heads and Conv1D, by bits and by targets."""
    quick = {
        *(("gpt2", bits, "all-linear") for bits in (4, 8)),
        *(("gpt2", 4, part) for part in ("head", "embedding")),
        ("openai-gpt", 4, "all-linear"),
        ("qwen2", None, "head"),
    }
    return [
        pytest.param(*one, marks=() if one in quick else pytest.mark.slow)
        for one in (
            (name, bits, part)
            for name in ("gpt2", "openai-gpt", "qwen2", "mixtral")
            for bits in (4, 8, None)
            for part in ("all-linear", "head", "embedding")
            if part == "all-linear" or name in ("gpt2", "qwen2")
        )
    ]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "bits", "part"), merges())
def test_a_merged_model_gives_what_its_adapter_gives(
    name, bits, part, tmp_path, monkeypatch
):
    monkeypatch.setattr(model, "compute_dtype", lambda device: torch.float32)
    tied = {"tie_word_embeddings": True} if name == "qwen2" else {}
    folder = architectures.save(name, tmp_path / "base", **tied)
    base = AutoModelForCausalLM.from_pretrained(folder)
    was_tied = base.config.tie_word_embeddings
    places = {id(module): path for path, module in base.named_modules()}
    ends = {
        "head": base.get_output_embeddings(),
        "embedding": base.get_input_embeddings(),
    }
    targets = [places[id(ends[part])].split(".")[-1]] if part in ends else part
    model_cfg = {
        "name": str(folder),
        "quantization": bits,
        "gradient_checkpointing": False,
    }
    peft_cfg = {"_target_": "peft.LoraConfig", "target_modules": targets}
    frame = model.skeleton(model_cfg, peft_cfg)
    generator = torch.Generator().manual_seed(3)
    state = {
        n: torch.randn(p.shape, generator=generator) * 0.1
        for n, p in frame.named_parameters()
        if p.requires_grad
    }
    about = {"round": 7, "template": "alpaca", "model": model_cfg}
    tokenizer = model.load_tokenizer("assets/tiny_llama")
    adapter = tmp_path / "peft_7"
    model.save_adapter(frame, state, tokenizer, about, adapter)
    model.merge(str(adapter), about, CPU, tmp_path / "merged")
    ids = torch.randint(5, 2000, (2, 8), generator=generator)
    net, _ = model.open_adapter(str(adapter), about, CPU)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = net(input_ids=ids).logits
        found = merged(input_ids=ids).logits
        with net.disable_adapter():
            change = (net(input_ids=ids).logits - expected).abs().max()
    # In 8 bits the base rounds its inputs as well, which a plain model does not.
    assert (found - expected).abs().max() < (0.3 if bits == 8 else 1e-3) * change
    assert merged.config.tie_word_embeddings == (was_tied and part == "all-linear")


def test_what_is_written_and_gives_something_else_is_refused(
    saved, tmp_path, monkeypatch
):
    folder, _, _ = saved
    about = model.read_about(str(folder))
    # As if a head that an adapter has changed went to the embedding.
    monkeypatch.setattr(
        peft.tuners.tuners_utils.BaseTuner,
        "merge_and_unload",
        lambda tuner: tuner.unload(),
    )
    with pytest.raises(UserError, match="gives another model when it is merged"):
        model.merge(str(folder), about, CPU, tmp_path / "merged")
