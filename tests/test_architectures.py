"""pytest tests/test_architectures.py: every causal LM of transformers against itself.

The app's own path (how it loads a base, attends on a CPU and takes the loss) has to give
what plain transformers gives. A few architectures that differ are tried always, all of them
with `-m slow`.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import architectures
import model
import utils
from compute import cpu, loss
from settings import plan
from settings.compose import compose, needs_checkpointing, resolve
from utils import UserError

CPU = torch.device("cpu")

# Attention without the interface, a soft cap, sinks, values of another size, a mixture of
# experts, states instead of attention, logits scaled or capped, Conv1D, learned positions.
QUICK = (
    *("llama", "gpt2", "bloom", "falcon", "gptj", "gpt_neo", "gemma2", "gpt_oss"),
    *("deepseek_v3", "falcon_h1", "bert", "xlnet"),
)
MADE = [name for name in architectures.NAMES if name not in architectures.UNMADE]

# What cannot be trained to foretell text, and the word of `model.rehearse` for it.
REFUSED = {
    "cpmant": "see what comes after it",
    "xlm": "see what comes after it",
    "xlnet": "see what comes after it",
    "reformer": "does not run on text alone",  # lengths of one kind only
}
# Where `all-linear` takes in what PEFT or the model cannot do with.
TARGETS = {
    "deepseek_v4": ["q_a_proj", "q_b_proj"],
    "falcon_h1": ["in_proj", "q_proj"],
    "falcon_mamba": ["in_proj"],
    "inkling2_text": ["q_proj", "o_proj"],
    "laguna": ["q_proj", "v_proj"],
    "llama4": ["q_proj", "v_proj"],
    "llama4_text": ["q_proj", "v_proj"],
    "mamba": ["in_proj"],
    "mamba2": ["in_proj"],
    "nemotron_h": ["in_proj", "q_proj"],
    "phimoe": ["q_proj", "v_proj"],
}
# Decoders of translators: their own loss expects labels that are shifted already.
UNSHIFTED = {
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "git", "marian"),
    *("mbart", "mvp", "pegasus", "plbart", "prophetnet", "trocr", "whisper"),
}


def each(quick: tuple[str, ...] = QUICK) -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(n, marks=() if n in quick else slow) for n in MADE]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """In float32 on every processor, and in more than one block."""
    monkeypatch.setattr(model, "compute_dtype", lambda device: torch.float32)
    monkeypatch.setattr(cpu, "BLOCK", 5)


def make_batch() -> dict[str, torch.Tensor]:
    """Three examples: whole, padded on the left, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 2000, (3, 12), generator=generator)
    mask, labels = torch.ones_like(ids), torch.full_like(ids, utils.IGNORED)
    mask[1, :5] = mask[2, 7:] = 0
    for row, answer in enumerate((slice(4, 12), slice(8, 12), slice(3, 7))):
        labels[row, answer] = ids[row, answer]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def adapted(base: torch.nn.Module, name: str) -> peft.PeftModel:
    """`base` with a random LoRA on all that can take one."""
    torch.manual_seed(5)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=TARGETS.get(name, "all-linear"),
        init_lora_weights=False,
    )
    return peft.get_peft_model(base, settings)


def settings(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    model_cfg = {
        "name": str(folder),
        "quantization": None,
        "gradient_checkpointing": False,
    }
    peft_cfg = {
        "_target_": "peft.LoraConfig",
        "r": 4,
        "task_type": "CAUSAL_LM",
        "target_modules": TARGETS.get(name, "all-linear"),
    }
    return model_cfg, peft_cfg


def test_as_many_architectures_are_covered_as_there_were():
    assert len(MADE) >= 179
    assert set(architectures.UNMADE) <= set(architectures.NAMES)


@pytest.mark.parametrize("name", each())
def test_training_and_evaluation_are_those_of_transformers(name, tmp_path):
    architectures.save(name, tmp_path)
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            model.rehearse(*settings(name, tmp_path), 0, 64)
        return
    model.rehearse(*settings(name, tmp_path), 0, 64)
    net = adapted(model.load_base(str(tmp_path), None, CPU), name).train()
    batch = make_batch()
    inputs = {key: value for key, value in batch.items() if key != "labels"}

    # As transformers computes it, from all logits of all positions.
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    reference = adapted(base.requires_grad_(False), name).train()
    with architectures.plain_attention():
        reference(**inputs, use_cache=False)  # Big Bird rebuilds itself for short texts
        torch.manual_seed(0)  # for dropout
        result = reference(**inputs, use_cache=False)
        labels = batch["labels"][:, 1:]
        kept = labels != utils.IGNORED
        logits = result.logits[:, :-1][kept]
        expected = torch.nn.functional.cross_entropy(logits, labels[kept])
        expected.backward()
        if name not in UNSHIFTED:
            torch.manual_seed(0)
            own = reference(**batch, use_cache=False).loss
            assert own.item() == pytest.approx(expected.item(), rel=1e-4)

    loss.answer_loss(net, batch)  # finds out how to take it
    torch.manual_seed(0)
    found = loss.answer_loss(net, batch)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    pairs = [
        (ours.grad, theirs.grad)
        for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True)
        if theirs.grad is not None
    ]
    assert sum(theirs.abs().max() > 0 for _, theirs in pairs) >= 2
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()

    with torch.no_grad(), architectures.plain_attention():
        logits = reference.eval()(**inputs, use_cache=False).logits
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1][kept], labels[kept], reduction="sum"
    )
    scores = loss.answer_scores(net.eval(), batch).sum(0)
    assert scores[0].item() == pytest.approx(nats.item(), rel=1e-4)
    assert scores[2] == kept.sum()

    # What comes later may not be seen, in training either.
    other = batch["input_ids"][:1].clone()
    other[:, -1] = 7
    both = torch.cat([batch["input_ids"][:1], other])
    states = []
    for ids in both:
        torch.manual_seed(0)
        one = ids[None]
        given = {"input_ids": one, "attention_mask": torch.ones_like(one)}
        states.append(net.train()(**given, use_cache=False).logits[:, :-1].detach())
    assert (states[0] - states[1]).abs().max() <= 1e-4 * states[0].abs().max()


LEARNED = [n for n in MADE if not hasattr(architectures.config(n), "rope_parameters")]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=() if n in ("gpt2", "opt", "roberta") else pytest.mark.slow
        )
        for n in LEARNED
        if n not in REFUSED
    ],
)
def test_a_length_is_refused_that_the_base_has_no_positions_for(name, tmp_path):
    architectures.save(name, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for length in (120, 127, 129, 140):  # of 128
        try:
            with torch.no_grad():
                base(input_ids=torch.full((1, length), 7), use_cache=False)
        except Exception:
            with pytest.raises(UserError, match=f"train.seq_length={length}"):
                model.rehearse(*settings(name, tmp_path), 0, length)
        else:
            model.rehearse(*settings(name, tmp_path), 0, length)


def test_the_tokens_of_prompt_methods_count_as_well(tmp_path):
    architectures.save("gpt2", tmp_path)
    model_cfg, _ = settings("gpt2", tmp_path)
    peft_cfg = {"_target_": "peft.PromptTuningConfig", "num_virtual_tokens": 20}
    model.rehearse(model_cfg, peft_cfg, 0, 108)
    told = r"seq_length=109 and peft\.num_virtual_tokens=20"
    with pytest.raises(UserError, match=told):
        model.rehearse(model_cfg, peft_cfg, 0, 109)


@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
def test_an_encoder_is_told_from_a_decoder(name, tmp_path):
    architectures.save(name, tmp_path, is_decoder=False)
    with pytest.raises(UserError, match="is_decoder: true"):
        model.rehearse(*settings(name, tmp_path), 0, 64)


@pytest.mark.parametrize("name", each(("llama", "rwkv", "mamba")))
def test_what_a_step_takes_is_known_or_said_not_to_be(name, tmp_path):
    architectures.config(name).save_pretrained(tmp_path)
    model_cfg, peft_cfg = settings(name, tmp_path)
    cfg = resolve(compose("experiment=quickstart"))
    cfg = cfg | {"model": cfg.model | model_cfg, "peft": peft_cfg}
    needed = needs_checkpointing(cfg)
    estimate = plan.estimate(cfg, model.skeleton(model_cfg, peft_cfg))
    if isinstance(estimate, dict):
        assert not needed  # of this size
        return
    try:
        model.skeleton({**model_cfg, "gradient_checkpointing": True}, peft_cfg)
    except UserError:
        assert not needed
    else:
        assert needed


def test_what_is_not_known_is_said_in_the_plan(tmp_path):
    architectures.config("mamba").save_pretrained(tmp_path)
    model_cfg, peft_cfg = settings("mamba", tmp_path)
    cfg = resolve(compose("experiment=quickstart"))
    cfg = cfg | {"model": cfg.model | model_cfg, "peft": peft_cfg}
    assert dict(plan.plan(cfg))["memory a client"].startswith("not known: ")
