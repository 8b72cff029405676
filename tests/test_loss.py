"""pytest tests/test_loss.py: the chunked loss against the model's own, in float32."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

import utils
from compute import loss
from utils import PROJECT

PEFT = {
    "lora": {"target_modules": "all-linear", "init_lora_weights": False},
    "head": {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False},
    "prompt": {"num_virtual_tokens": 5},
}


def make(kind: str) -> torch.nn.Module:
    """The shipped base in float32 with a random adapter of a kind."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(
        PROJECT / "assets/tiny_llama", dtype=torch.float32
    ).requires_grad_(False)
    config = peft.PromptTuningConfig if kind == "prompt" else peft.LoraConfig
    return peft.get_peft_model(
        base, config(task_type="CAUSAL_LM", **PEFT[kind])
    ).train()


def make_batch(side: str) -> dict[str, torch.Tensor]:
    """Three padded examples whose answers begin and end in different places."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 2000, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    labels = torch.full_like(ids, utils.IGNORED)
    for row, (prompt, length) in enumerate([(3, 12), (7, 9), (2, 5)]):
        start = 12 - length if side == "left" else 0
        mask[row] = 0
        mask[row, start : start + length] = 1
        answer = slice(start + prompt, start + length)
        labels[row, answer] = ids[row, answer]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(net: torch.nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    net.zero_grad()
    value.backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [4, 1024, "whole"])
@pytest.mark.parametrize("kind", PEFT)
def test_loss_and_gradients_equal_the_plain_computation(kind, chunk, side, monkeypatch):
    # A sharded base's head has to take the answers as a whole.
    monkeypatch.setattr(loss, "_sharded", lambda base: chunk == "whole")
    if chunk != "whole":
        monkeypatch.setattr(loss, "CHUNK", chunk)
    net, batch = make(kind), make_batch(side)
    ours, plain = loss.answer_loss(net, batch), net(**batch).loss
    assert torch.allclose(ours, plain, rtol=1e-5)
    found, expected = gradients(net, ours), gradients(net, plain)
    for name in expected:
        scale = expected[name].abs().max()
        assert scale > 0
        assert torch.allclose(found[name], expected[name], atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_batch_without_answers_adds_nothing(sharded, monkeypatch):
    # What a process gets where the records do not suffice for all of them.
    monkeypatch.setattr(loss, "_sharded", lambda base: sharded)
    net, blank = make("lora"), torch.zeros(2, 1, dtype=torch.int64)
    batch = {
        "input_ids": blank,
        "attention_mask": blank + 1,
        "labels": blank + utils.IGNORED,
    }
    value = loss.answer_loss(net, batch, num_items=7)
    assert value.item() == 0
    assert all(not g.any() for g in gradients(net, value).values())


def test_a_share_of_an_accumulated_batch(monkeypatch):
    net, batch = make("lora"), make_batch("left")
    labelled = int((batch["labels"] != utils.IGNORED).sum())
    whole = loss.answer_loss(net, batch)
    share = loss.answer_loss(net, batch, num_items=4 * labelled)
    assert share.item() == pytest.approx(whole.item() / 4)


def test_no_more_logits_than_a_chunk_exist_at_a_time(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 4)
    net, batch = make("lora"), make_batch("left")
    loss.answer_loss(net, batch)  # finds out how the head may be called
    seen = []
    head = net.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda m, i, out: seen.append(out.shape[:-1].numel()))
    loss.answer_loss(net, batch).backward()
    labelled = int((batch["labels"] != utils.IGNORED).sum())
    assert max(seen) <= 4
    assert sum(seen) == labelled


def test_without_gradients_none_are_made():
    net, batch = make("lora"), make_batch("left")
    with torch.no_grad():
        value = loss.answer_loss(net, batch)
    assert not value.requires_grad
    assert torch.allclose(value, net(**batch).loss, rtol=1e-5)


def test_logits_that_a_model_adjusts_are_left_to_it():
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(
        Gemma2Config(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=2048,
            final_logit_softcapping=0.1,  # hard on logits about 0.1
        )
    )
    batch = make_batch("right")
    assert torch.allclose(loss.answer_loss(net, batch), net(**batch).loss, rtol=1e-5)
    seen = []
    net.lm_head.register_forward_hook(lambda m, i, out: seen.append(out.shape[1]))
    loss.answer_loss(net, batch)
    assert seen == [int((batch["labels"] != utils.IGNORED).sum())]


@pytest.mark.parametrize("oddity", ["no head", "mixes positions", "other logits"])
def test_a_head_of_another_kind_is_not_relied_on(oddity, monkeypatch):
    net, batch = make("lora"), make_batch("left")
    base = net.get_base_model()
    if oddity == "no head":
        monkeypatch.setattr(base, "get_output_embeddings", lambda: None)
    else:
        plainly = base.forward

        def forward(*args, **kwargs):
            result = plainly(*args, **{**kwargs, "labels": None})
            logits = result.logits
            if oddity == "other logits":
                result.logits = logits * 1.01
            else:
                result.logits = logits + logits.roll(1, dims=1)
            return result

        monkeypatch.setattr(base, "forward", forward)
    wanted = net(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    kept = batch["labels"][:, 1:] != utils.IGNORED
    wanted = torch.nn.functional.cross_entropy(
        wanted[kept], batch["labels"][:, 1:][kept]
    )
    assert torch.allclose(loss.answer_loss(net, batch), wanted, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [4, 1024, "whole"])
@pytest.mark.parametrize("kind", PEFT)
def test_scores_of_each_example_equal_the_plain_computation(
    kind, chunk, side, monkeypatch
):
    monkeypatch.setattr(loss, "_sharded", lambda base: chunk == "whole")
    if chunk != "whole":
        monkeypatch.setattr(loss, "CHUNK", chunk)
    net, batch = make(kind).eval(), make_batch(side)
    scores = loss.answer_scores(net, batch)
    with torch.no_grad():
        logits = net(**{k: v for k, v in batch.items() if k != "labels"}).logits
    for row, labels in enumerate(batch["labels"]):
        # Prompt tuning's own tokens come first.
        row_logits = logits[row, logits.shape[1] - len(labels) :][:-1]
        kept = labels[1:] != utils.IGNORED
        likely = row_logits[kept].float().log_softmax(-1)
        nats = -likely.gather(1, labels[1:][kept, None]).sum()
        right = (likely.argmax(-1) == labels[1:][kept]).sum()
        expected = torch.stack([nats, right, kept.sum()]).double()
        assert torch.allclose(scores[row], expected, atol=1e-4)
    assert scores[:, 2].tolist() == [9, 2, 3]
