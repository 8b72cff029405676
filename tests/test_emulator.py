"""pytest tests/test_emulator.py: a base that clients do not get, and what they train instead."""

import copy
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import client
import model
import test as ask
from methods import emulator
from reporting import export
from server import rounds
from settings import preflight
from settings.compose import compose
from utils import PROJECT, UserError

pytestmark = pytest.mark.usefixtures("in_float32")

CPU = torch.device("cpu")
IDS = torch.arange(4, 68).view(2, 32)

CONFIGS = {
    "llama": hf.LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=2,
        initializer_range=0.1,
    ),
    "gpt2": hf.GPT2Config(
        vocab_size=2048, n_embd=32, n_layer=6, n_head=2, initializer_range=0.1
    ),
    "neox": hf.GPTNeoXConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=2,
        initializer_range=0.1,
    ),
    "opt": hf.OPTConfig(
        vocab_size=2048,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=6,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        init_std=0.1,
    ),
    # Every other layer sees a window alone: one entry a layer in its configuration.
    "gemma3": hf.Gemma3TextConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 3,
        initializer_range=0.1,
    ),
}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The folders of bases with random weights, and of what their clients get."""
    root = tmp_path_factory.mktemp("bases")

    def write(name: str, seed: int = 0) -> Path:
        folder = root / f"{name}-{seed}"
        if not folder.exists():
            torch.manual_seed(seed)
            net = hf.AutoModelForCausalLM.from_config(CONFIGS[name])
            net.save_pretrained(folder)
            tokenizer = hf.AutoTokenizer.from_pretrained(PROJECT / "assets/tiny_llama")
            tokenizer.save_pretrained(folder)
        return folder

    return write


def made(base: Path, out: Path, *options: str) -> dict:
    return emulator.make(emulator.parse([str(out), f"--base={base}", *options]))


@pytest.fixture(scope="module")
def small(full, tmp_path_factory):
    """The folder of an emulator of the LLaMA, its layers 0, 1, 2, 5, 6, 7."""
    out = tmp_path_factory.mktemp("small") / "emulator"
    made(full("llama"), out)
    return out


def loaded(folder: Path) -> torch.nn.Module:
    return hf.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("layers", "keep", "drop", "places"),
    [
        (8, 2, 0.5, [0, 1, 2, 5, 6, 7]),
        (12, 2, 0.5, [0, 1, 2, 4, 7, 9, 10, 11]),
        (32, 2, 0.8, [0, 1, 2, 7, 13, 18, 24, 29, 30, 31]),
        (5, 1, 0.6, [0, 2, 4]),
    ],
)
def test_layers_are_dropped_evenly(layers, keep, drop, places):
    assert emulator.chosen(layers, keep, drop) == places


@pytest.mark.parametrize(("keep", "drop"), [(4, 0.5), (1, 0.01), (2, 0.9), (5, 0.5)])
def test_all_or_nothing_of_the_middle_is_refused(keep, drop):
    with pytest.raises(UserError, match=f"--keep={keep} --drop={drop}: of 8 layers"):
        emulator.chosen(8, keep, drop)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_base_with_layers_left_out(name, full, tmp_path):
    """Whatever the architecture calls its layers: by hand, in the base itself."""
    told = made(full(name), tmp_path / "made", "--keep=1", "--drop=0.5")
    short, whole = loaded(tmp_path / "made"), loaded(full(name))
    of = {**told["outer"], **told["emulated"]}
    path = min(of.values()).rpartition(".")[0]
    keep = [int(name.rpartition(".")[2]) for name in of.values()]
    layers = whole.get_submodule(path)
    assert 2 < len(keep) < len(layers)
    for place, layer in enumerate(layers):
        if place not in keep:  # it hands on what comes in
            layer.forward = lambda hidden_states, *_, **__: hidden_states
    torch.testing.assert_close(
        short(IDS, use_cache=False).logits, whole(IDS, use_cache=False).logits
    )


def test_a_layer_whose_place_decides_what_it_does_is_refused(tmp_path):
    config = copy.deepcopy(CONFIGS["gpt2"])
    config.scale_attn_by_inverse_layer_idx = True
    torch.manual_seed(0)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tokenizer = hf.AutoTokenizer.from_pretrained(PROJECT / "assets/tiny_llama")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="another one in another place"):
        made(tmp_path / "base", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_the_folder_holds_no_weight_of_a_layer_that_was_dropped(full, small):
    """And of the others all, as they were."""
    whole = load_file(full("llama") / "model.safetensors")
    there = load_file(small / "model.safetensors")
    told = json.loads((small / "config.json").read_text())["emulator"]
    names = [*told["outer"].values(), *told["emulated"].values()]
    assert names == [f"model.layers.{i}" for i in (0, 1, 6, 7, 2, 5)]
    matrices = {n: t for n, t in whole.items() if t.ndim == 2}
    found = {
        name
        for name, tensor in matrices.items()
        if any(
            o.shape == tensor.shape and torch.equal(o, tensor) for o in there.values()
        )
    }
    dropped = ("model.layers.3.", "model.layers.4.")
    assert {n for n in matrices if n not in found} == {
        n for n in matrices if n.startswith(dropped)
    }
    files = {path.name for path in small.iterdir()}
    assert files <= {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        "special_tokens_map.json",
    }


@pytest.mark.parametrize("half", [False, True])
def test_distilling_brings_the_hidden_states_nearer_and_leaves_the_rest(
    half, full, small, tmp_path
):
    base = Path(shutil.copytree(full("llama"), tmp_path / "base"))
    if half:  # as most bases are stored
        loaded(base).to(torch.bfloat16).save_pretrained(base)
        small = tmp_path / "small"
        made(base, small)
    lines = (PROJECT / "assets/tiny_qa/train.jsonl").read_text().splitlines()[:300]
    (data := tmp_path / "data.jsonl").write_text("\n".join(lines))
    options = ("--steps=40", "--learning-rate=1e-2", "--seq-length=32")
    made(base, tmp_path / "made", f"--distil={data}", *options)
    one, other, whole = (
        loaded(folder).float() for folder in (small, tmp_path / "made", base)
    )

    def leaves(net: torch.nn.Module) -> torch.Tensor:
        entry = emulator.Entry(net.model.layers[-2])
        with torch.no_grad():
            net(IDS)
        return entry.states

    wanted = leaves(whole)
    before, after = ((leaves(net) - wanted).square().mean() for net in (one, other))
    assert after < 0.8 * before
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (small, tmp_path / "made")
    )
    middle = ("model.layers.2.", "model.layers.3.")
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {name for name in ours if name.startswith(middle)}


def test_a_rate_at_which_it_diverges_is_named(full, tmp_path):
    """And no other fault of the base, and no folder of numbers that are none."""
    data = PROJECT / "assets/tiny_qa/train.jsonl"
    options = ("--steps=5", "--learning-rate=1e30", "--seq-length=32")
    with pytest.raises(UserError, match=r"lower --learning-rate than 1e\+30"):
        made(full("llama"), tmp_path / "made", f"--distil={data}", *options)
    assert not (tmp_path / "made").exists()


def test_texts_longer_than_the_base_has_places_for_are_refused(full, tmp_path):
    data = PROJECT / "assets/tiny_qa/train.jsonl"
    base = full("llama")
    places = loaded(base).config.max_position_embeddings
    with pytest.raises(
        UserError, match=f"--seq-length={places + 1}: .* {places} tokens"
    ):
        made(base, tmp_path / "x", f"--distil={data}", f"--seq-length={places + 1}")


# --- a run on it, and its adapter in the base -------------------------------------------------


def settings(folder: Path, *overrides: str):
    given = (
        f"experiment=quickstart peft=outer model.name={folder} num_clients=4 num_rounds=1 "
        "strategy.fraction_fit=0.5 evaluate.exact_match=false model.quantization=null "
        "train.training_arguments.max_steps=2 "
        "train.training_arguments.per_device_train_batch_size=4"
    )
    return preflight.check(compose(" ".join([given, *overrides])))


def adapter(cfg, out: Path) -> Path:
    """An adapter's folder with random values, as a run writes it."""
    draw = torch.Generator().manual_seed(3)
    state = {
        name: torch.randn(value.shape, generator=draw) * 0.1
        for name, value in model.seeded(cfg.model, cfg.peft, 0).items()
    }
    client.save(cfg, state, out, done=7)
    return out


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    return adapter(settings(small), tmp_path_factory.mktemp("run") / "peft_7")


def test_what_travels_is_for_the_outer_layers_alone(small, loopback):
    cfg = settings(small)
    grid = loopback(cfg)
    server = rounds.Server(cfg, grid)
    state = server.initial_adapter()
    state, _ = server.train_round(1, state)
    down = [name for m in grid.sent for name in m.content["arrays"]]
    assert {*down} == {*state}
    layers = {name.split(".layers.")[1].split(".")[0] for name in state}
    assert layers == {"0", "1", "4", "5"}
    assert all(".lora_" in name for name in state)
    assert len(state) == 2 * 7 * 4  # all-linear


def test_plugged_in_it_does_to_each_layer_by_name_what_it_did(full, small, trained):
    """Each layer's own change of its weights, and none of any other, as PEFT merges them."""

    def changes(folder: str, base: Path) -> dict[str, torch.Tensor]:
        net = peft.PeftModel.from_pretrained(loaded(base), folder)
        with torch.no_grad():
            after = net.merge_and_unload().state_dict()
        before = loaded(base).state_dict()
        return {n: after[n] - t for n, t in before.items() if (after[n] != t).any()}

    on_emulator = changes(str(trained), small)
    with model.plugged(str(trained), str(full("llama"))) as folder:
        about = model.read_about(folder)
        assert about["model"]["name"] == str(full("llama"))
        net, _ = model.open_adapter(folder, about, CPU)
        in_full = changes(folder, full("llama"))
    moved = {"0": "0", "1": "1", "4": "6", "5": "7"}
    renamed = {}
    for name, change in on_emulator.items():
        place = name.split(".")[2]
        renamed[name.replace(f".{place}.", f".{moved[place]}.", 1)] = change
    assert len(renamed) == 7 * 4
    assert in_full.keys() == renamed.keys()
    for name, change in renamed.items():
        torch.testing.assert_close(in_full[name], change, rtol=1e-4, atol=1e-6)
    assert not (Path(folder)).exists()
    assert net.peft_config["default"].exclude_modules


@pytest.mark.parametrize(
    "overrides",
    [
        "peft=ia3 +peft.exclude_modules=emulated",
        "model.lora.target_modules=[q_proj,v_proj]",
        "+peft.modules_to_save=[model.norm]",
    ],
)
def test_other_adapters_are_plugged_in(overrides, full, small, tmp_path):
    folder = adapter(settings(small, overrides), tmp_path / "peft_7")
    with model.plugged(str(folder), str(full("llama"))) as made_of:
        model.open_adapter(made_of, model.read_about(made_of), CPU)
        before = load_file(folder / "adapter_model.safetensors")
        after = load_file(Path(made_of) / "adapter_model.safetensors")
    layers = {n.split(".layers.")[1].split(".")[0] for n in after if ".layers." in n}
    assert layers == {"0", "1", "6", "7"}
    assert len(after) == len(before)
    for name, tensor in before.items():
        name = name.replace(".layers.5.", ".layers.7.").replace(
            ".layers.4.", ".layers.6."
        )
        assert torch.equal(after[name], tensor)


def test_the_commands_plug_it_in(full, small, trained, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run / "peft_7")
    here = f"--peft-path={run / 'peft_7'}"
    options = [here, f"--full={full('llama')}", "--device=cpu"]
    folder = export.export(export.parse([*options, "--merge"]))
    plain = loaded(folder)
    assert plain.config.num_hidden_layers == 8
    with model.plugged(str(trained), str(full("llama"))) as made_of:
        net, _ = model.open_adapter(made_of, model.read_about(made_of), CPU)
        torch.testing.assert_close(
            plain(IDS).logits, net(input_ids=IDS).logits.float(), rtol=0, atol=2e-2
        )
    assert "an emulator of the base" in (folder / "README.md").read_text()
    shared = export.export(export.parse(options))
    told = json.loads((shared / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "llama-0"
    assert "(0|1|6|7)" in told["exclude_modules"]
    asked = [
        *options,
        "--question=What is the capital of France?",
        "--max-new-tokens=3",
    ]
    monkeypatch.setattr("sys.argv", ["test.py", *asked])
    ask.main()
    assert "Q: What is the capital" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_told(trained, tmp_path):
    told = "/nowhere/base is neither a folder here nor reachable on the hub"
    with pytest.raises(UserError, match=told):
        made(Path("/nowhere/base"), tmp_path / "made")
    with (
        pytest.raises(UserError, match=f"--full=/nowhere/base: {told}"),
        model.plugged(str(trained), "/nowhere/base"),
    ):
        raise AssertionError("it was plugged in")


def test_a_base_without_a_map_is_refused_in_a_line():
    with pytest.raises(UserError, match="the base is no emulator") as told:
        settings(Path("assets/tiny_llama"))
    assert "\n" not in str(told.value)


def test_another_base_than_the_maps_is_refused(full, small, trained, tmp_path):
    with (
        pytest.raises(UserError, match="made of another base than"),
        model.plugged(str(trained), str(full("llama", seed=1))),
    ):
        pass
    # Nor may it be put on the base by position, where layers 4 and 5 would take it.
    shutil.copytree(trained, tmp_path / "peft_7")
    path = tmp_path / "peft_7" / model.ABOUT
    about = json.loads(path.read_text())
    about["model"]["name"] = str(full("llama"))
    path.write_text(json.dumps(about))
    with pytest.raises(UserError, match="plug it in with --full"):
        model.open_adapter(
            str(tmp_path / "peft_7"), model.read_about(str(tmp_path / "peft_7")), CPU
        )


@pytest.mark.parametrize(
    "more", ["peft=lora", "+peft.modules_to_save=[input_layernorm]"]
)
def test_one_on_more_than_whole_layers_is_not_plugged_in(more, full, small, tmp_path):
    folder = adapter(settings(small, more), tmp_path / "peft_7")
    with (
        pytest.raises(UserError, match="take peft=outer"),
        model.plugged(str(folder), str(full("llama"))),
    ):
        pass


def test_one_of_a_whole_base_is_not_plugged_in(full, tmp_path):
    folder = adapter(settings(full("llama"), "peft=lora"), tmp_path / "peft_7")
    with (
        pytest.raises(UserError, match="trained on a whole base"),
        model.plugged(str(folder), str(full("llama"))),
    ):
        pass


def test_the_digest_is_of_the_weights_and_not_of_the_files(full, tmp_path):
    weights = load_file(full("llama") / "model.safetensors")
    names = sorted(weights)
    for number, part in enumerate((names[:9], names[9:])):
        save_file({n: weights[n] for n in part}, tmp_path / f"{number}.safetensors")
    assert emulator.digest(tmp_path) == emulator.digest(full("llama"))
    weights[names[0]][0, 0] += 1
    save_file(weights, tmp_path / "0.safetensors")
    assert emulator.digest(tmp_path) != emulator.digest(full("llama"))


@pytest.mark.parametrize(
    "told",
    [
        "text",
        {"of": "0" * 64, "outer": {"a.0": "a.0"}},
        {"of": "0" * 64, "outer": {"a.0": "a.x"}, "emulated": {"a.1": "a.1"}},
        {"of": "0" * 64, "outer": {"a.0": "a.0"}, "emulated": {}},
        {
            "of": "0" * 64,
            "outer": {"a.0": "a.1", "a.2": "a.1"},
            "emulated": {"a.1": "a.3"},
        },
    ],
)
def test_a_broken_map_is_refused(told):
    with pytest.raises(ValueError, match="map"):
        emulator.read(told)


def test_layers_that_are_not_all_of_one_kind_are_refused(full, tmp_path):
    net = loaded(full("llama"))
    net.model.layers[3] = torch.nn.Identity()
    with pytest.raises(UserError, match="no plain list of 8 layers"):
        emulator.list_of(net)
