"""pytest tests/test_peft.py: methods that average exactly, and what their frame needs."""

import copy

import peft
import pytest
import torch
from transformers import AutoConfig, LlamaConfig

import model
from compute import patches, vram
from compute.loss import answer_loss
from node import permit
from settings import plan
from settings.compose import compose, resolve
from utils import PROJECT, Settings, construct

CPU = torch.device("cpu")
METHODS = sorted(
    {path.stem for path in (PROJECT / "conf/peft").glob("*.yaml")} - {"outer"}
)  # which needs an emulator as its base (tests/test_emulator.py)
# Classes without a file in conf/ that the table of `model.LINEAR` or of the docs names.
OTHERS = {
    "WAVEFT": {"n_frequency": 50},
    "TINYLORA": {},
    "VERA": {"r": 4},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "OFT": {"oft_block_size": 16, "r": 0},
}


def settings_of(name: str) -> dict:
    if name in METHODS:
        return resolve(compose(f"experiment=quickstart peft={name}")).peft
    made = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
    named = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return {"_target_": f"peft.{made.__name__}", **named, **OTHERS[name]}


def merged(net: peft.PeftModel, state: dict) -> dict[str, torch.Tensor]:
    """The base's weights with this adapter in them."""
    net = copy.deepcopy(net)
    model.set_adapter_state(net, state)
    return {k: v.double() for k, v in net.merge_and_unload().state_dict().items()}


CASES = [
    *((name, "") for name in [*METHODS, *OTHERS]),
    *((name, half) for name in ("lora", "rslora", "dora") for half in "AB"),
]


def error_of_the_mean(name: str, half: str, seed: int) -> tuple[bool, float | None]:
    """What is said of the mean of two clients' adapters, and how far it is off, relative.

    The mean of the merged weights against the merged weights of the mean, over how far the
    former has moved; both clients moved at random. None for what has no weights to merge.
    """
    base = model.stand_in(AutoConfig.from_pretrained("assets/tiny_llama"), whole=True)
    torch.manual_seed(seed)
    net = peft.get_peft_model(base, construct(Settings.of(settings_of(name)), "peft"))
    start = model.adapter_state(net)
    trained = [n for n in start if not half or f"lora_{half}." in n]
    said = model.averages_exactly(net.active_peft_config, trained)
    if not model.mergeable(net.active_peft_config.peft_type):
        return said, None
    # With a B that is not 0: else a round of A alone would do nothing.
    start = {k: v + 0.1 * torch.randn(v.shape) for k, v in start.items()}
    one, other = (
        start | {n: start[n] + 0.1 * torch.randn(start[n].shape) for n in trained}
        for _ in range(2)
    )
    mean = {k: (one[k].double() + other[k].double()).float() / 2 for k in one}
    first, second = merged(net, one), merged(net, other)
    wanted = {k: (first[k] + second[k]) / 2 for k in first}
    found, before = merged(net, mean), merged(net, start)
    wrong, moved = (
        sum((wanted[k] - against[k]).square().sum() for k in wanted).sqrt().item()
        for against in (found, before)
    )
    return said, wrong / moved


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "half"), CASES)
def test_a_mean_is_exact_where_it_is_said_to_be(name, half):
    said, error = error_of_the_mean(name, half, seed=0)
    if error is None:
        assert not said
    else:
        assert error < 1e-5 if said else error > 1e-3, error


def test_bat_of_miss_multiplies_the_weight():
    settings = peft.MissConfig(init_weights="bat")
    assert not model.averages_exactly(settings, ["layer.miss_block.default"])


@pytest.mark.parametrize(
    ("overrides", "exact"),
    [("", False), ("peft=fourierft", True), ("peft=ia3", True), ("peft=prefix", False)],
)
def test_the_plan_says_whether_the_mean_is_exact(overrides, exact):
    cfg = resolve(compose(f"experiment=quickstart {overrides}"))
    row = dict(plan.plan(cfg))["the mean"]
    assert row.startswith("exact") == exact


def test_a_plan_without_a_mean_says_nothing_of_it():
    cfg = resolve(compose("experiment=quickstart strategy=krum"))
    assert "the mean" not in dict(plan.plan(cfg))


# --- where the base computes in bfloat16 ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", METHODS)
def test_each_method_trains_in_bfloat16(name, monkeypatch):
    """As a GPU does; this machine's CPU may compute in float32 alone."""
    monkeypatch.setattr(model, "compute_dtype", lambda device: torch.bfloat16)
    cfg = resolve(compose(f"experiment=quickstart peft={name}"))
    net = model.build(cfg.model, cfg.peft, 0, CPU).train()
    ids = torch.arange(4, 20).view(2, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with model.autocast(net):
        answer_loss(net, batch).backward()
    gradients = [p.grad for p in net.parameters() if p.requires_grad]
    assert any(gradient.any() for gradient in gradients)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


class Layer(torch.nn.Module):
    """One frozen layer in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4),
        peft.MissConfig(r=4),
        peft.FourierFTConfig(n_frequency=50),
        peft.C3AConfig(block_size=32),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_the_estimate_counts_what_a_layer_keeps_for_its_backward(config):
    config.target_modules = {"layer"}
    net = peft.get_peft_model(Layer(), config, autocast_adapter_dtype=True).train()
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(1000, 64, dtype=torch.bfloat16, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, patches.inputs_as_they_come(net), torch.autocast("cpu", torch.bfloat16):
        net(x)
    found = sum(s.nbytes() for place, s in kept.items() if place not in weights)
    token, fixed = vram._adapter_bytes(net)
    # Beside the trained tensors in bfloat16, which are counted elsewhere.
    assert found == pytest.approx(1000 * token + fixed, abs=1500)


# --- what the seed fixes ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["fourierft", "shira"])
def test_where_the_trained_values_stand_follows_from_the_seed_alone(name):
    """On the server's frame and on every client, whatever the process has drawn before."""

    def places(seed: int) -> list[torch.Tensor]:
        cfg = resolve(compose(f"experiment=quickstart peft={name} seed={seed}"))
        torch.rand(7)
        net = model.build(cfg.model, cfg.peft, seed, CPU)
        frame = model.skeleton(cfg.model, cfg.peft)
        found = [
            [
                getattr(module, attribute)["default"]
                for module in one.modules()
                for attribute in ("indices", "shira_indices")
                if isinstance(getattr(module, attribute, None), dict)
            ]
            for one in (net, frame)
        ]
        assert len(found[0]) == len(found[1]) > 0
        for mine, servers in zip(*found, strict=True):
            assert torch.equal(mine, servers)
        return found[0]

    first, again, other = places(1), places(1), places(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_masks_are_those_that_shira_draws():
    base = model.stand_in(AutoConfig.from_pretrained("assets/tiny_llama"))
    settings = {
        "_target_": "peft.ShiraConfig",
        "r": 4,
        "random_seed": 3,
        "target_modules": "all-linear",
    }
    plain = peft.get_peft_model(base, construct(Settings.of(settings), "peft"))
    cfg = Settings.of({"name": "assets/tiny_llama", "gradient_checkpointing": False})
    frame = model.skeleton(cfg, Settings.of(settings))
    ours = dict(frame.named_modules())
    masks = [
        (module.shira_indices["default"], ours[name].shira_indices["default"])
        for name, module in plain.named_modules()
        if hasattr(module, "shira_indices")
    ]
    assert len(masks) == 28
    assert all(torch.equal(a, b) for a, b in masks)


@pytest.mark.slow
def test_seeds_and_factors_are_no_sizes_for_a_nodes_ceiling():
    for name in ("fourierft", "shira"):
        peft_cfg = settings_of(name) | {"scaling": 1e6}
        peft_cfg |= {k: 2**31 for k in peft_cfg if k.startswith("random_")}
        sizes = [v for k, v in peft_cfg.items() if k not in permit.NO_SIZE]
        assert all(v <= 1024 for v in sizes if isinstance(v, int | float))


# --- the sizes that conf/ has ----------------------------------------------------------------

# Hidden size, MLP, heads, key-value heads: of the bases in conf/model with published shapes.
BASES = {
    "openllama_3b_v2": (3200, 8640, 32, 32),
    "openllama_7b_v2": (4096, 11008, 32, 32),
    "llama2_7b": (4096, 11008, 32, 32),
    "llama3_1b": (2048, 8192, 32, 8),
    "llama3_8b": (4096, 14336, 32, 8),
    "mistral_7b": (4096, 14336, 32, 8),
    "tiny": (192, 512, 4, 4),
}


@pytest.mark.parametrize("base", BASES)
def test_c3a_s_blocks_divide_the_layers_of_every_base(base, tmp_path):
    hidden, inner, heads, groups = BASES[base]
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=100,
    ).save_pretrained(tmp_path)
    cfg = resolve(compose(f"model={base} peft=c3a"))
    cfg = cfg.model | {"name": str(tmp_path), "gradient_checkpointing": False}
    peft_cfg = settings_of("c3a") | {"target_modules": "all-linear"}
    frame = model.skeleton(cfg, peft_cfg)
    kernels = [p for p in frame.parameters() if p.requires_grad]
    assert len(kernels) == 7
    assert all(kernel.shape[-1] == 64 for kernel in kernels)


@pytest.mark.slow
def test_the_linear_methods_begin_as_the_base():
    for name in ("miss", "fourierft", "c3a", "shira"):
        cfg = resolve(compose(f"experiment=quickstart peft={name}"))
        first = model.seeded(cfg.model, cfg.peft, 0)
        assert first
        assert not any(tensor.any() for tensor in first.values())
