"""pytest tests/test_start.py: model.adapter, an adapter that clients begin with."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import model
from assets.testbed.adapters import same
from node import permit
from server.rounds import Server, run
from settings.preflight import check_adapter
from utils import PROJECT, UserError

METHODS = sorted(
    {path.stem for path in (PROJECT / "conf/peft").glob("*.yaml")} - {"outer"}
)  # which needs an emulator as its base (tests/test_emulator.py)


def made(cfg, folder):
    """An adapter of the run's kind with values of its own, as a folder and by name."""
    generator = torch.Generator().manual_seed(1)
    frame = model.skeleton(cfg.model, cfg.peft)
    state = {
        name: torch.randn(p.shape, generator=generator)
        for name, p in frame.named_parameters()
        if p.requires_grad
    }
    model._write(frame, state, cfg.model.name, folder)
    return state


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_first_adapter_is_the_folders(name, configure, loopback, tmp_path):
    state = made(configure(f"peft={name}"), tmp_path)
    overrides = f"peft={name}", f"model.adapter={tmp_path}", "comm.dtype=float32"
    # SHiRA's indices are in the file too, and may be others; P-tuning's network is not.
    if name in ("shira", "ptuning"):
        with pytest.raises(UserError, match="not what this run trains"):
            configure(*overrides)
        return
    cfg = configure(*overrides)
    first = Server(cfg, loopback(cfg)).initial_adapter()
    assert same(first, state)


@pytest.mark.slow
def test_training_goes_on_from_it_whatever_stays(configure, loopback, tmp_path):
    """What a client is not sent, A of FFA, it has from the same folder."""
    state = made(configure(), tmp_path / "start")
    cfg = configure(
        "sharing=ffa", f"model.adapter={tmp_path / 'start'}", "num_rounds=1"
    )
    (tmp_path / "run").mkdir()
    run(cfg, loopback(cfg), tmp_path / "run")
    entry = json.loads((tmp_path / "run/history.json").read_text())["rounds"][0]
    assert entry["failures"] == []
    after = load_file(tmp_path / "run/peft_1/adapter_model.safetensors")
    halves = {name: [] for name in ("lora_A", "lora_B")}
    for key, tensor in after.items():
        before = state[key.replace(".weight", ".default.weight")]
        part = "lora_A" if "lora_A" in key else "lora_B"
        halves[part].append(torch.equal(tensor, before))
    assert all(halves["lora_A"])
    assert not any(halves["lora_B"])


@pytest.mark.slow
def test_a_folder_of_pefts_own_will_do(configure, tmp_path):
    cfg = configure()
    net = model.build(cfg.model, cfg.peft, 5, torch.device("cpu"))
    net.save_pretrained(tmp_path)
    cfg = configure(f"model.adapter={tmp_path}")
    found, wanted = model.saved(cfg.model, cfg.peft), model.adapter_state(net)
    assert same(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("model.lora.peft_lora_r=8", "r is 16 in it, and 8 in this run"),
        ("model.lora.peft_lora_alpha=8", "lora_alpha is 32.* in it, and 8"),
        ("model.lora.target_modules=[q_proj]", "target_modules is "),
        ("peft=rslora", "use_rslora is false in it, and true"),
        ("peft=dora", "use_dora is false in it, and true"),
        ("peft=ia3", "it is LORA, not IA3"),
        ("+peft.init_lora_weights=pissa", "init_lora_weights is true in it, and pissa"),
        ("+peft.bias=all", "bias is none in it, and all"),
    ],
)
def test_another_kind_of_adapter_is_refused(other, told, configure, tmp_path):
    made(configure(), tmp_path)
    cfg = configure()
    changed = configure(other) if "pissa" not in other else cfg
    if "pissa" in other:
        changed = cfg | {"peft": cfg.peft | {"init_lora_weights": "pissa"}}
    changed = changed | {"model": changed.model | {"adapter": str(tmp_path)}}
    with pytest.raises(UserError, match=rf"model.adapter=.*cannot be gone on.*{told}"):
        model.saved(changed.model, changed.peft)


@pytest.mark.slow
def test_dropout_may_differ(configure, tmp_path):
    made(configure("model.lora.peft_lora_dropout=0.3"), tmp_path)
    cfg = configure(f"model.adapter={tmp_path}", "model.lora.peft_lora_dropout=0")
    assert cfg.model.adapter == str(tmp_path)


@pytest.mark.slow
def test_what_is_broken_is_told(configure, tmp_path):
    cfg = configure()
    cfg = cfg | {"model": cfg.model | {"adapter": str(tmp_path)}}
    with pytest.raises(UserError, match=r"no adapter_config\.json is there"):
        model.saved(cfg.model, cfg.peft)
    made(cfg, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    key = next(iter(whole))
    for broken, told in (
        (whole | {key: whole[key] * float("nan")}, "not finite"),
        (whole | {key: whole[key][:-1].clone()}, "has shape"),
        ({k: v for k, v in whole.items() if k != key}, "missing or unknown"),
        ({k.replace("q_proj", "x_proj"): v for k, v in whole.items()}, "unknown"),
    ):
        save_file(broken, file)
        with pytest.raises(UserError, match=told):
            model.saved(cfg.model, cfg.peft)
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be gone on with"):
        model.saved(cfg.model, cfg.peft)


@pytest.mark.slow
def test_in_a_federation_it_is_the_servers_alone(configure, tmp_path):
    """Nodes look into no folder that a server names; what stays there would begin otherwise."""
    made(configure(), tmp_path)
    told = {"overrides": f"experiment=quickstart model.adapter={tmp_path}", "run": "a"}
    own = {
        "partition-id": 0,
        "num-partitions": 20,
        "cache-path": str(tmp_path / "cache"),
    }
    cfg, _ = permit.settle(told, own)
    assert cfg.model.adapter is None
    check_adapter(configure(f"model.adapter={tmp_path}"), deployed=True)
    for sharing in ("ffa", "rolora", "fedsa"):
        cfg = configure(f"model.adapter={tmp_path}", f"sharing={sharing}")
        with pytest.raises(UserError, match="nodes make what they are not sent"):
            check_adapter(cfg, deployed=True)


@pytest.mark.slow
def test_its_weights_are_no_pickle(configure, tmp_path):
    made(configure(), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"model.adapter=.*safetensors"):
        configure(f"model.adapter={tmp_path}")
    assert peft.PeftConfig.from_pretrained(tmp_path).peft_type == "LORA"


@pytest.mark.slow
def test_another_base_is_told(configure, tmp_path, capsys):
    """No fault by itself: the same base may be a folder here and a name there."""
    made(configure(), tmp_path)
    file = tmp_path / "adapter_config.json"
    about = json.loads(file.read_text())
    configure(f"model.adapter={tmp_path}")
    assert "was trained on" not in capsys.readouterr().out
    file.write_text(json.dumps(about | {"base_model_name_or_path": "some/other"}))
    configure(f"model.adapter={tmp_path}")
    assert "was trained on some/other; here it goes on with" in capsys.readouterr().out
