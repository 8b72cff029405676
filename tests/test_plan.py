"""pytest tests/test_plan.py: sizes against published ones, and the plan's arithmetic."""

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig

import model
import utils
from compute.vram import allocated, estimate_vram, occupied
from methods import wire
from settings import plan
from settings.compose import compose, resolve

MIB = 2**20


def llama(hidden: int, layers: int, intermediate: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=32,
        intermediate_size=intermediate,
        vocab_size=32000,
    )


def pythia(hidden: int, layers: int, heads: int, vocabulary: int) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        vocab_size=vocabulary,
    )


LLAMA_7B = llama(4096, 32, 11008)
LLAMA_3B = llama(3200, 26, 8640)


@pytest.fixture
def frame(tmp_path):
    """Make a skeleton with LoRA from a configuration alone."""

    def make(config, rank: int, targets: list[str]):
        config.save_pretrained(tmp_path)
        model_cfg = {"name": str(tmp_path), "gradient_checkpointing": True}
        lora = {"r": rank, "target_modules": targets, "lora_dropout": 0.075}
        peft_cfg = {"_target_": "peft.LoraConfig", "task_type": "CAUSAL_LM", **lora}
        return model.skeleton(model_cfg, peft_cfg)

    return make


def configuration(*overrides: str) -> dict:
    cfg = compose(" ".join(["experiment=quickstart", *overrides]))
    return resolve(cfg)


def trained(net) -> int:
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("config", "millions", "mebibytes"),
    [(LLAMA_7B, 16.78, 64.0), (LLAMA_3B, 10.65, 40.6)],
)
def test_published_lora_sizes_of_openllama(frame, config, millions, mebibytes):
    net = frame(config, 32, ["q_proj", "v_proj"])
    assert round(trained(net) / 1e6, 2) == millions
    assert round(plan.wire_bytes(net, "float32") / MIB, 1) == mebibytes


@pytest.mark.parametrize(
    ("config", "millions", "percent"),
    [
        (pythia(2560, 32, 32, 50304), 2.6, 0.09),
        (pythia(4096, 32, 32, 50432), 4.2, 0.06),
        (pythia(5120, 36, 40, 50688), 5.9, 0.05),
    ],
)
def test_published_lora_sizes_of_pythia(frame, config, millions, percent):
    net = frame(config, 8, ["query_key_value"])
    total = sum(p.numel() for p in net.parameters())
    assert round(trained(net) / 1e6, 1) == millions
    assert round(100 * trained(net) / total, 2) == percent


def test_bytes_on_the_wire_by_dtype(frame):
    net = frame(llama(64, 2, 128), 4, ["q_proj"])
    values = 2 * 2 * 4 * 64  # two layers, A of 4 rows and B of 64
    assert plan.wire_bytes(net, "float32") == 4 * values
    assert plan.wire_bytes(net, "float16") == 2 * values
    assert plan.wire_bytes(net, "int8") == values + 4 * 2 * (4 + 4)
    vector = torch.nn.Module()
    vector.scale = torch.nn.Parameter(torch.ones(10))
    assert plan.wire_bytes(vector, "int8") == 10 + 4


def test_plan_of_the_quickstart():
    rows = dict(plan.plan(configuration()))
    assert rows["clients a round"] == "2 of 20"
    assert rows["steps a round"] == "20 (10 a client, 16 x 1 examples each)"
    assert rows["tokens a round"] == f"at most {2 * 10 * 16 * 128:,}"
    net = model.skeleton(*(configuration()[key] for key in ("model", "peft")))
    total = sum(p.numel() for p in net.parameters())
    assert rows["trained"].startswith(f"{trained(net) / 1e3:.2f}k")
    assert rows["trained"].endswith(f"({trained(net) / total:.2%})")
    way = 2 * 2 * trained(net) / 2**10  # two clients, two bytes a value
    assert rows["bytes a round"] == f"{way:.1f} KiB down, {way:.1f} KiB up"
    assert rows["bytes in 20 rounds"].startswith(
        f"{2 * 20 * way / 2**10:.1f} MiB both ways"
    )
    assert "evaluation" not in rows


def test_the_plan_counts_the_evaluation_before_round_1():
    few = "num_rounds=5 evaluate.every_round=2 strategy.fraction_evaluate=0.05"
    cfg = configuration(few)
    net = model.skeleton(cfg["model"], cfg["peft"])
    down = plan.wire_bytes(
        net, "float16"
    )  # to one client; before, and after 2, 4 and 5
    assert dict(plan.plan(cfg))["evaluation"] == (
        f"{down / 2**10:.1f} KiB down each time, {4 * down / MIB:.1f} MiB in all"
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_wire_bytes_are_those_that_are_packed(dtype):
    cfg = configuration("peft=dora")  # matrices and vectors
    net = model.skeleton(cfg["model"], cfg["peft"])
    state = {
        name: torch.ones(parameter.shape)
        for name, parameter in net.named_parameters()
        if parameter.requires_grad
    }
    packed, _ = wire.pack(state, dtype)
    assert plan.wire_bytes(net, dtype) == sum(t.nbytes for t in packed.values())


@pytest.mark.slow
def test_without_a_gpu_the_plan_is_of_memory_and_cores(monkeypatch):
    monkeypatch.setattr(plan.os, "cpu_count", lambda: 8)
    text = plan.show(configuration())
    assert "VRAM" not in text
    assert "CUDA" not in text
    rows = dict(plan.plan(configuration()))
    # A 4-bit base is unpacked there: two bytes a weight.
    null = dict(plan.plan(configuration("model.quantization=null")))
    assert rows["  linear weights"] == null["  linear weights"]
    assert "runs 2 side by side, 1 of 8 cores each" in rows["this machine"]
    assert rows["this machine"].endswith("num_cpus=4 would use them all")
    four = dict(plan.plan(configuration("client_resources.num_cpus=4")))
    assert "would use" not in four["this machine"]


@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize("gpus", [0, 1])
def test_what_quantisation_costs_is_said_where_nothing_is_gained(bits, gpus):
    bits_ = "null" if bits is None else bits
    cfg = configuration(f"model.quantization={bits_} client_resources.num_gpus={gpus}")
    said = "quantisation" in dict(plan.plan(cfg))
    assert said == (bits is not None and gpus == 0)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_plan_says_whether_activations_are_kept(checkpointing):
    on = f"model.gradient_checkpointing={str(checkpointing).lower()}"
    said = dict(plan.plan(configuration(on)))["checkpointing"]
    assert said.startswith("on" if checkpointing else "off")


@pytest.mark.slow
def test_the_plan_tells_the_learning_rate():
    ends = "train.learning_rate_max=1e-3 train.learning_rate_min=0 num_rounds="
    assert dict(plan.plan(configuration(ends + "2")))["learning rate"] == (
        "0.001 -> 0.0005 over 2 rounds"
    )
    constant = "+train.training_arguments.learning_rate=2e-4"
    assert dict(plan.plan(configuration(constant)))["learning rate"] == (
        "0.0002 in 20 rounds"
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("", "the same for all"),
        ("train.training_arguments.max_steps=-1", "by its records"),
        ("strategy=krum", None),  # takes one adapter, whatever it weighs
    ],
)
def test_the_plan_tells_what_a_client_weighs(overrides, said):
    row = dict(plan.plan(configuration(overrides))).get("a client's weight")
    assert (row is None) if said is None else row.startswith(said)


def test_plan_by_epochs_takes_the_client_with_most_records():
    cfg = configuration(
        "num_clients=3 partitioner=size strategy.fraction_fit=1.0",
        "train.training_arguments.max_steps=-1",
        "train.training_arguments.gradient_accumulation_steps=2",
    )
    sizes = [len(plan.dataset.load_partition(cfg, i)) for i in range(3)]
    assert len(set(sizes)) > 1
    assert plan.steps_per_client(cfg) == -(-max(sizes) // 32)
    assert dict(plan.plan(cfg))["steps a round"].startswith("at most ")


@pytest.mark.slow
def test_every_peft_method_has_a_plan():
    methods = {path.stem for path in (utils.PROJECT / "conf/peft").glob("*.yaml")}
    for method in methods - {"outer"}:  # which needs an emulator as its base
        text = plan.show(configuration(f"peft={method} strategy.fraction_evaluate=1"))
        assert "memory a client" in text
        assert "evaluation" in text


def test_the_values_stand_in_one_column():
    cfg = configuration()
    rows = plan.plan(cfg)
    lines = plan.show(cfg).splitlines()
    assert (
        len({line.index(value) for line, (_, value) in zip(lines, rows, strict=True)})
        == 1
    )


@pytest.mark.slow
def test_clients_that_fit_each_gpu(monkeypatch):
    class Gpu:
        name = "Test GPU"
        total_memory = 3 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu)
    rows = dict(plan.plan(configuration("client_resources.num_gpus=0.1")))
    assert "GPUs" not in rows
    cfg = configuration()
    terms = estimate_vram(
        model.skeleton(cfg["model"], cfg["peft"]), 4, 16, 128, checkpointing=False
    )
    fit = Gpu.total_memory // occupied(terms)
    assert 1 < fit < 6  # the CUDA context alone is half a GiB
    assert rows["GPU 1"] == (
        f"Test GPU, 3.0 GiB: fits {fit} clients; client_resources.num_gpus=0.1 starts 10 "
        "(too many)"
    )


def test_quantised_weights_are_counted_with_their_scales(frame):
    net = frame(LLAMA_7B, 32, ["q_proj", "v_proj"])
    values = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    four = estimate_vram(net, 4, 16, 512, True)
    eight = estimate_vram(net, 8, 16, 512, True)
    none = estimate_vram(net, None, 16, 512, True)
    assert four["quantised weights"] == pytest.approx(
        values * (0.5 + 1 / 64 + 4 / 16384)
    )
    assert eight["quantised weights"] == values + 32 * 4 * (5 * 4096 + 2 * 11008)
    assert none["linear weights"] == 2 * values
    norms = (2 * 32 + 1) * 4096
    assert four["other weights"] == 2 * (2 * 32000 * 4096 + norms)
    assert four["AdamW states"] == 2 * four["adapter"] == 2 * 64 * MIB


def test_vram_grows_with_the_work_and_shrinks_with_checkpointing(frame):
    net = frame(LLAMA_3B, 32, ["q_proj", "v_proj"])
    small = allocated(estimate_vram(net, 4, 8, 512, True))
    usual = allocated(estimate_vram(net, 4, 16, 512, True))
    assert small < usual < allocated(estimate_vram(net, 8, 16, 512, True))
    assert usual < allocated(estimate_vram(net, 4, 16, 512, False))
    terms = estimate_vram(net, 4, 16, 512, True)
    assert occupied(terms) == usual + terms["CUDA context"]


def test_gated_and_plain_mlps_are_told_apart(frame):
    gated = frame(llama(64, 2, 256), 4, ["q_proj"])
    plain = frame(
        GPTNeoXConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=32,
            intermediate_size=256,
            vocab_size=32000,
        ),
        4,
        ["query_key_value"],
    )
    sizes = [estimate_vram(n, None, 2, 8, False)["activations"] for n in (gated, plain)]
    # Two layers of 16 tokens: gate, activated gate and up, of 256 in bfloat16, not one.
    assert sizes[0] - sizes[1] == 2 * 16 * 2 * 256 * 2
