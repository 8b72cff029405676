"""pytest tests/test_patches.py: what is changed in a library, or read of it in private, is there.

Each test fails when a new version has renamed what is reached for, where the patch itself
would only stop to have an effect.
"""

import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import datasets
import peft
import pytest
import torch
import transformers
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import other
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import client
import model
from compute import cpu, patches
from settings import heterogeneity
from utils import PROJECT

TINY = str(PROJECT / "assets/tiny_llama")
CPU = torch.device("cpu")


@pytest.fixture
def lora():
    config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1)
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), config)


def test_a_model_that_asks_for_sdpa_gets_attention_in_blocks(monkeypatch):
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is cpu.blocked_attention
    called = []
    real = cpu.blocked_attention

    def watch(*args, **kwargs):
        called.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(cpu, "blocked_attention", watch)
    patches.attend_in_blocks()
    try:
        base = AutoModelForCausalLM.from_pretrained(TINY)
        base(input_ids=torch.arange(4, 12)[None])
    finally:
        monkeypatch.undo()
        patches.attend_in_blocks()
    assert len(called) == base.config.num_hidden_layers


def test_attention_never_takes_cudnns_kernels():
    """Which make NaN on an H200 (tests/test_cuda.py); a process begins with them allowed."""
    script = """
import torch
assert torch.backends.cuda.cudnn_sdp_enabled()
import model
assert not torch.backends.cuda.cudnn_sdp_enabled()
"""
    subprocess.run([sys.executable, "-c", script], cwd=PROJECT, check=True)


def test_deepspeed_is_imported_where_it_is_used_alone():
    script = """
import sys, torch, model
from accelerate.utils import other
net = torch.nn.Linear(1, 1)
assert other.extract_model_from_parallel(net) is net
assert "deepspeed" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=PROJECT, check=True)
    source = inspect.getsource(other.extract_model_from_parallel)
    assert "is_deepspeed_available()" in source


def test_accelerate_can_be_told_of_the_processes():
    assert AcceleratorState._reset_state
    source = inspect.getsource(PartialState.__init__)
    assert 'original_backend = kwargs.pop("backend", None)' in source


def test_deepspeed_asks_which_kernels_it_can_build():
    found = importlib.util.find_spec("deepspeed") or pytest.skip("not installed")
    folder = Path(found.origin).parent
    asks = "deepspeed.ops.__compatible_ops__.get(builder.NAME"
    assert asks in (folder / "comm/torch.py").read_text()
    builder = (folder / "ops/op_builder/cpu/comm.py").read_text()
    assert 'NAME = "deepspeed_shm_comm"' in builder


def test_every_dropout_of_lora_is_replaced_and_is_what_its_layers_call(lora):
    patches.quicken_dropout(lora)
    kinds = [type(m) for m in lora.modules() if isinstance(m, torch.nn.Dropout)]
    assert kinds
    assert set(kinds) == {cpu.Dropout}
    called = []
    for module in lora.modules():
        if isinstance(module, cpu.Dropout):
            module.register_forward_hook(lambda *_: called.append(1))
    lora.train()(input_ids=torch.arange(4, 12)[None])
    assert len(called) == len(kinds)


def test_a_fresh_adapter_is_moved_as_it_was_made():
    def made(dtype):
        base = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype)
        settings = peft.AdaLoraConfig(
            target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM"
        )
        torch.manual_seed(0)
        with patches.adapters_as_made():
            net = peft.get_peft_model(base, settings)
            layer = next(m for m in net.modules() if isinstance(m, BaseTunerLayer))
            found = {n: p.clone() for n, p in net.named_parameters() if p.requires_grad}
            # To another device, the one there is beside the CPU.
            layer._move_adapter_to_device_of_base_layer("default", torch.device("meta"))
        assert layer.ranknum["default"].is_meta
        assert not layer.ranknum["default"].requires_grad
        return found

    ours, theirs = made(torch.float32), made(torch.bfloat16)
    assert list(ours) == list(theirs)
    assert all(map(torch.equal, ours.values(), theirs.values()))
    source = inspect.getsource(BaseTunerLayer._move_adapter_to_device_of_base_layer)
    assert "self._get_base_layer_device_and_dtype(base_layer)" in source


def test_layers_of_8_bits_hold_their_inputs_where_they_are_released():
    layer = bnb.nn.Linear8bitLt(16, 16, has_fp16_weights=False)
    layer.requires_grad_(False)
    output = layer(torch.randn(2, 16, requires_grad=True))
    assert type(layer).__name__ == "Linear8bitLt"
    assert output.grad_fn.A.shape == (2, 16)
    patches.release_inputs(layer)
    released = layer(torch.randn(2, 16, requires_grad=True))
    assert released.grad_fn.A is None
    released.sum().backward()  # which does not need it
    # On a GPU the same under another name, which a CPU can read only.
    on_gpu = bnb.autograd._functions.MatMul8bitLt
    assert "ctx.tensors = (CAt, subA, A)" in inspect.getsource(on_gpu.forward)


def test_a_layer_in_four_bits_works_on_the_bytes_that_were_gathered():
    layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32)
    layer = layer.requires_grad_(False).to("cpu")
    assert type(layer).__name__ == "Linear4bit"
    assert {"compress_statistics", "quant_type"} <= vars(layer.weight).keys()
    assert layer.support_avx512bf16_for_cpu in (True, False)
    layer.support_avx512bf16_for_cpu = False
    given = torch.randn(2, 64)
    wanted = layer(given)
    gathered = torch.from_numpy(layer.weight.detach().numpy().copy())
    assert gathered.dtype == torch.uint8
    layer.weight = torch.nn.Parameter(gathered, requires_grad=False)  # FSDP2's
    assert torch.equal(layer(given), wanted)
    for name in ("prepare_distribute_model", "maybe_distribute_model"):
        assert hasattr(transformers.PreTrainedModel, name)


def test_a_base_that_is_dequantised_no_longer_says_that_it_is_quantised():
    base = model.load_base(TINY, 8, CPU)
    assert base.is_loaded_in_8bit
    assert not model.unpack(base).is_loaded_in_8bit
    packed = model.load_base(TINY, 4, CPU)
    packed.is_loaded_in_4bit = True
    patches.forget_quantization(packed)
    assert not packed.is_loaded_in_4bit
    # PEFT chooses a layer's class by it.
    assert "is_loaded_in_4bit" in inspect.getsource(peft.tuners.lora.LoraModel)


def test_transformers_fills_buffers_and_leaves_the_weights():
    base = model.stand_in(AutoConfig.from_pretrained(TINY))
    before = [parameter.clone() for parameter in base.parameters()]
    real = AutoModelForCausalLM.from_pretrained(TINY)
    for name, buffer in base.named_buffers():
        buffer.zero_()
        assert real.get_buffer(name).any()
    patches.fill_buffers(base)
    for name, buffer in base.named_buffers():
        assert torch.equal(buffer, real.get_buffer(name))
    assert all(map(torch.equal, before, base.parameters()))


@pytest.mark.parametrize(("here", "used"), [(0, 0), (1, 1), (4, 1)])
def test_the_trainer_sees_one_gpu(here, used, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments._n_gpu = here
    assert arguments.n_gpu == here
    patches.use_one_gpu(arguments)
    assert arguments.n_gpu == used


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 128}
SMALL |= {"vocab_size": 200, "num_hidden_layers": 2, "intermediate_size": 48}
SMALL |= {"initializer_range": 0.2}  # so that attention matters
SPARSE = {"block_size": 4, "num_random_blocks": 1}
LEAVING = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SMALL | {"max_position_embeddings": 16}, rope_parameters=DYNAMIC
        )
    ),
    "gemma3_text": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SMALL | {"max_position_embeddings": 16},
            **{"head_dim": 16, "num_key_value_heads": 2},
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=dict.fromkeys(
                ("sliding_attention", "full_attention"), DYNAMIC
            ),
        )
    ),
    "big_bird": lambda: transformers.BigBirdForSequenceClassification(
        transformers.BigBirdConfig(**SMALL, **SPARSE, num_labels=2)
    ),
    "bigbird_pegasus": lambda: transformers.BigBirdPegasusForConditionalGeneration(
        transformers.BigBirdPegasusConfig(
            **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
            **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 200},
            **SPARSE | {"max_position_embeddings": 128, "init_std": 0.2},
        )
    ),
}
KINDS = {"big_bird": "SEQ_CLS", "bigbird_pegasus": "SEQ_2_SEQ_LM"}


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("name", LEAVING)
def test_no_pass_goes_by_what_came_in_an_earlier_one(name, tmp_path):
    """Each is that of transformers' model that has seen nothing else."""
    torch.manual_seed(0)
    plain = LEAVING[name]()
    plain.save_pretrained(tmp_path)
    kind = KINDS.get(name, "CAUSAL_LM")
    labels = ["a", "b"] if kind == "SEQ_CLS" else None
    base = model.load_base(str(tmp_path), None, CPU, kind=kind, labels=labels)
    base = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
    heard = []
    for length in (60, 80, 40, 12, 60):
        ids = torch.randint(5, 200, (1, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if kind == "SEQ_2_SEQ_LM":
            inputs["decoder_input_ids"] = ids[:, :4]
        fresh = type(plain).from_pretrained(tmp_path)
        with torch.no_grad():
            theirs, used = (net.eval()(**inputs).logits for net in (fresh, plain))
            torch.testing.assert_close(base.eval()(**inputs).logits, theirs)
        heard.append(torch.allclose(theirs, used, rtol=1e-4))
    assert not all(heard)  # transformers' own does


@pytest.mark.usefixtures("in_float32")
def test_what_was_evaluated_leaves_experts_their_room(tmp_path):
    torch.manual_seed(0)
    config = transformers.NllbMoeConfig(
        **{"d_model": 32, "vocab_size": 200, "num_experts": 4, "expert_capacity": 64},
        **{"encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 1},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
        **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0},
        **{"attention_dropout": 0.0, "activation_dropout": 0.0},
        **{"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "init_std": 0.2},
        **{
            "decoder_sparse_step": 1,
            "router_jitter_noise": 0.0,
            "moe_token_dropout": 0,
        },
    )
    plain = transformers.NllbMoeForConditionalGeneration(config)
    plain.save_pretrained(tmp_path)
    base = model.load_base(str(tmp_path), None, CPU, kind="SEQ_2_SEQ_LM")
    texts = [torch.randint(5, 200, (1, length)) for length in (6, 30)]
    wanted, found = [], []
    for net, told in ((plain, wanted), (base, found)):
        for trained in (True, False, True):
            ids = texts[trained]
            with torch.no_grad():
                made = net.train(trained)(input_ids=ids, decoder_input_ids=ids)
            told.append(made.logits)
    torch.testing.assert_close(found[0], wanted[0])
    assert torch.equal(found[2], found[0])
    assert not torch.allclose(wanted[2], wanted[0], rtol=1e-3)  # transformers' own


def test_torch_says_whether_the_cpu_has_bfloat16():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert patches.cpu_has_bfloat16() is ("avx512_bf16" in flags)


def test_inputs_of_lora_layers_are_not_cast_to_float32_under_autocast(
    lora, monkeypatch
):
    monkeypatch.setattr(model, "compute_dtype", lambda _: torch.bfloat16)
    layers = [m for m in lora.modules() if isinstance(m, BaseTunerLayer)]
    with model.autocast(lora):
        assert not any(layer.cast_input_dtype_enabled for layer in layers)
    assert layers
    assert all(layer.cast_input_dtype_enabled for layer in layers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["privacy=none", "privacy=record"])
def test_no_layer_casts_its_input_when_it_is_recomputed(
    kind, configure, monkeypatch, tmp_path
):
    """The backward pass of a checkpointed layer runs its forward again."""
    monkeypatch.setattr(model, "compute_dtype", lambda _: torch.bfloat16)
    cfg = configure(f"model.quantization=null model.gradient_checkpointing=true {kind}")
    cfg["residuals"] = str(tmp_path)
    state, seen = client.initial_adapter(cfg), []
    cast = BaseTunerLayer._cast_input_dtype

    def watch(layer, x, dtype):
        seen.append(cast(layer, x, dtype).dtype)
        return cast(layer, x, dtype)

    monkeypatch.setattr(BaseTunerLayer, "_cast_input_dtype", watch)
    model.forget()
    client.train(cfg, state, 0, 1)
    model.forget()
    assert {*seen} == {torch.bfloat16}


# --- private names that are read elsewhere -----------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lm_eval.tasks._index", "Kind"),
        ("lm_eval.tasks._index", "TaskIndex.process_cfg"),
        ("lm_eval.tasks._yaml_loader", "load_yaml"),
        ("lm_eval.models.huggingface", "HFLM._encode_pair"),
        ("lm_eval.models.huggingface", "HFLM._model_generate"),
        ("ray._private.services", "canonicalize_bootstrap_address"),
        ("hydra._internal.core_plugins.basic_sweeper", "BasicSweeper.split_arguments"),
    ],
)
def test_a_private_name_is_there(module, name):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)


def test_lm_eval_calls_what_the_adapter_overrides():
    base = importlib.import_module("lm_eval.models.huggingface").HFLM
    source = "".join(map(inspect.getsource, base.__mro__[:3]))
    for name in ("_encode_pair", "_model_generate", "tok_encode", "tok_batch_encode"):
        assert f"self.{name}(" in source


def test_hydra_keeps_what_a_failed_job_raised():
    from hydra.core.utils import JobReturn, JobStatus

    job = JobReturn()
    job.status, job.return_value = JobStatus.FAILED, ValueError("so")
    assert str(job._return_value) == "so"


def test_datasets_keeps_what_it_has_made_where_it_is_looked_for(tmp_path, monkeypatch):
    from datasets.naming import camelcase_to_snakecase

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    builder = datasets.load_dataset_builder(
        "json", data_files=str(PROJECT / "assets/tiny_qa/test.jsonl")
    )
    # As of a dataset of the hub, which no test can reach.
    builder.repo_id = "lucas/CodeAlpaca-20k"
    builder.dataset_name = camelcase_to_snakecase("CodeAlpaca-20k")
    folder = builder._relative_data_dir().partition("/")[0]
    assert not heterogeneity._is_here("lucas/CodeAlpaca-20k")
    (tmp_path / folder).mkdir(exist_ok=True)
    assert heterogeneity._is_here("lucas/CodeAlpaca-20k")


def test_layers_of_one_shape_share_a_mask_that_is_drawn_once(monkeypatch):
    drawn = []
    real = patches.shira.random_mask

    def watch(layer, *args):
        drawn.append((layer.in_features, layer.out_features))
        return real(layer, *args)

    monkeypatch.setattr(patches.shira, "random_mask", watch)
    with patches.equal_masks_drawn_once():
        settings = peft.ShiraConfig(r=4, random_seed=0, target_modules="all-linear")
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), settings)
    assert len(drawn) == len(set(drawn)) == 3
    assert patches.shira.random_mask is watch


def test_lora_casts_its_inputs_unless_it_is_told_not_to(lora):
    layers = [x for x in lora.modules() if hasattr(x, "cast_input_dtype_enabled")]
    assert {type(x) for x in layers} >= {peft.tuners.lora.Linear}
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    with patches.inputs_as_they_come(lora):
        assert layers[0]._cast_input_dtype(x, torch.float32).dtype == torch.bfloat16
    assert layers[0]._cast_input_dtype(x, torch.float32).dtype == torch.float32
