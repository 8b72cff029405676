"""pytest tests/test_each.py: gradients of each example of a batch are those of it alone."""

from typing import Any

import peft
import pytest
import test_architectures as causal
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import architectures
import client
import model
import tasks
from assets.testbed import bases
from assets.testbed.adapters import adapter
from compute import each, loss
from methods import dpsgd
from utils import IGNORED, Settings

CPU = torch.device("cpu")
# With LoRA on all that can take one: experts whose weights are no linear layer's, or layers that
# see all tokens of a batch as one row. Each record is computed alone.
FLAT = {
    *("afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe"),
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note_text"),
    *("ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite"),
    *("glm_moe_dsa", "hunyuan_v1_moe", "hy_v3", "hy_v4", "jetmoe", "kimi_linear"),
    *("longcat_flash", "mellum", "minicpm3", "minimax", "minimax_m2"),
    *("minimax_m3_vl_text", "mixtral", "olmoe", "opt", "prophetnet", "qwen2_moe"),
    *("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen4_exp"),
    *("qwen4_exp_text", "solar_open", "youtu"),
}


# --- bases ----------------------------------------------------------------------------------


def examples(rows: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels, (1, length), of several lengths."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in (7, 12, 4)[:rows]:
        ids = torch.randint(5, 2000, (1, length), generator=generator)
        labels = ids.clone()
        labels[0, : length // 2] = IGNORED
        made.append((ids, labels))
    return made


def padded(some: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One batch of them, padded on the right."""
    longest = max(ids.shape[1] for ids, _ in some)

    def filled(row: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(row, (0, longest - row.shape[1]), value=value)

    return {
        "input_ids": torch.cat([filled(ids, 0) for ids, _ in some]),
        "attention_mask": torch.cat([filled(torch.ones_like(i), 0) for i, _ in some]),
        "labels": torch.cat([filled(labels, IGNORED) for _, labels in some]),
    }


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("name", causal.each())
def test_of_every_causal_lm_they_are_those_of_transformers(name, tmp_path):
    if name in causal.REFUSED:
        pytest.skip("no base for this app")
    architectures.save(name, tmp_path)
    net = causal.adapted(model.load_base(str(tmp_path), None, CPU), name).eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    plain = causal.adapted(base.requires_grad_(False), name).eval()
    some, batch = examples(), padded(examples())
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}

    def losses() -> torch.Tensor:
        kept = (batch["labels"][:, 1:] != IGNORED).sum(1)
        return -loss.answer_sums(net, batch) / kept

    found = each.together(net, [*named.values()], losses, rows=len(some))
    assert (found is None) == (name in FLAT)
    if not found:
        return
    theirs = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    for row, (ids, labels) in enumerate(some):
        plain.zero_grad()
        with architectures.plain_attention():
            logits = plain(input_ids=ids, use_cache=False).logits[0, :-1]
            nats = cross_entropy(logits, labels[0, 1:])
            nats.backward()
        assert found[0][row].item() == pytest.approx(nats.item(), rel=1e-4)
        for (key, parameter), gradient in zip(theirs.items(), found[1], strict=True):
            if parameter.grad is None:
                assert gradient is None or not gradient[row].any(), key
                continue
            longest = parameter.grad.abs().max()
            assert (gradient[row] - parameter.grad).abs().max() <= 1e-3 * longest, key


# --- methods, tasks, bits -------------------------------------------------------------------

# Whether each kind of run computes its records together.
KINDS = {
    "experiment=quickstart": True,
    "experiment=quickstart model.quantization=4": True,
    "experiment=quickstart model.quantization=8": False,  # rows are not independent
    "experiment=quickstart model.gradient_checkpointing=true": True,
    "experiment=quickstart sharing=ffa": True,
    "experiment=quickstart peft=rslora": True,
    "experiment=quickstart peft=dora": False,  # A and B are used outside of their layers
    "experiment=quickstart peft=ia3": False,
    "experiment=quickstart peft=prompt": False,
    "experiment=quickstart peft=miss": False,
    "experiment=classification": True,
    "experiment=private": True,
    "experiment=span": True,
    "experiment=tagging": True,
    "experiment=seq2seq": True,
    "experiment=dpo": True,
    "experiment=dpo task=orpo": True,
}


def trainer(cfg: Settings, size: int) -> client.NoisyTrainer:
    """Of a net in which every weight has a gradient, without dropout."""
    net = client._load(cfg, start := adapter(cfg)).eval()
    model.set_adapter_state(net, start)
    task, tokenizer = tasks.build(cfg), client._tokenizer(cfg)
    return client.NoisyTrainer(
        model=net,
        args=client.training_arguments(cfg, 1, 0),
        task=task,
        data_collator=task.collator(tokenizer, "right"),
        mechanism=dpsgd.Mechanism(8, 1.0, 1, 1.0, 0.0, {}),
        size=size,
    )


def records(cfg: Settings, count: int) -> list[Any]:
    """Examples of the run's own data, as a client trains on them."""
    task, tokenizer = tasks.build(cfg), client._tokenizer(cfg)
    rows = client.dataset.load_partition(cfg, 0)
    made = [client._encode(cfg, task, tokenizer, row) for row in rows]
    made = [example for example in made if example][:count]
    client._refer(cfg, client._load(cfg, adapter(cfg)), task, made, tokenizer)
    return made


def assert_same(one: list[each.Found], other: list[each.Found]) -> None:
    """Losses, and gradients within a thousandth of the longest value of all."""
    losses, theirs = (torch.cat([found[0] for found in some]) for some in (one, other))
    torch.testing.assert_close(losses, theirs, rtol=1e-4, atol=1e-6)
    mine, alone = (
        torch.cat([torch.cat([g.flatten(1) for g in found[1]], 1) for found in some])
        for some in (one, other)
    )
    assert (mine - alone).abs().max() <= 1e-3 * alone.abs().max()


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("kind", KINDS)
def test_together_they_are_what_they_are_alone(kind, configure):
    cfg = configure(kind, "personal=none")
    some = records(cfg, 24)
    whole, single = trainer(cfg, size=4), trainer(cfg, size=1)
    found = [*whole._found(whole.model, some)]
    assert whole.size == (4 if KINDS[kind] else 1)
    assert max(len(losses) for losses, _ in found) == whole.size
    assert_same(found, [*single._found(single.model, some)])
    assert all(parameter.grad is None for parameter in whole.trained)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_record_changes_no_other_ones_gradient(base, side, configure, tmp_path):
    """Padding on the left moves GPT-2's positions: a longer record is in another batch."""
    cfg = configure(
        f"experiment=quickstart model.name={bases.write(base, tmp_path)}",
        f"model.quantization=null train.padding_side={side} dataset.template=alpaca",
    )
    made = trainer(cfg, size=8)
    some = sorted(records(cfg, 60), key=made.task.length)
    short, longer = some[:5], some[-3:]
    assert made.task.length(longer[0]) > made.task.length(short[-1]) + 8
    alone, beside = (
        [*made._found(made.model, given)] for given in (short, [*short, *longer])
    )
    both = [torch.cat([losses for losses, _ in some])[:5] for some in (alone, beside)]
    torch.testing.assert_close(*both)
    for parts in zip(
        *(zip(*(g for _, g in f), strict=True) for f in (alone, beside)), strict=True
    ):
        one, other = (torch.cat(part)[:5] for part in parts)
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
def test_a_longer_record_leaves_nothing_for_the_next(configure, tmp_path):
    bases.write("llama", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.max_position_embeddings = 16
    config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    config.save_pretrained(tmp_path)
    cfg = configure(
        f"experiment=quickstart model.name={tmp_path} model.quantization=null"
    )
    made = trainer(cfg, size=4)
    some = sorted(records(cfg, 40), key=made.task.length)
    assert made.task.length(some[-1]) > made.task.length(some[0]) > 16
    alone = [*made._found(made.model, some[:1])]
    *_, beside = made._found(made.model, [some[-1], some[0]])
    assert_same(alone, [beside])


@pytest.mark.slow
def test_what_dropout_draws_follows_from_no_seed(configure):
    """Else a record would move the places of all that come after it in what is drawn."""
    cfg = configure("experiment=quickstart model.lora.peft_lora_dropout=0.5")
    made, some = trainer(cfg, size=4), records(cfg, 4)
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        made.training_step(made.model, some)
        drawn.append(torch.cat([p.grad.flatten() for p in made.trained]))
    assert (drawn[0] - drawn[1]).abs().max() > 0.01 * drawn[0].abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("length", [8, 16])
@pytest.mark.parametrize("name", ["fsmt", "xlnet"])
def test_layers_that_see_the_length_first_are_found_out(name, length):
    """With as many rows as tokens too, when nothing in the shapes tells them apart."""
    torch.manual_seed(0)
    if name == "fsmt":
        config = transformers.FSMTConfig(
            **{"langs": ["en", "de"], "src_vocab_size": 90, "tgt_vocab_size": 90},
            **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
            **{"encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
        )
        base, targets = transformers.FSMTForConditionalGeneration(config), ["q_proj"]
    else:
        config = transformers.XLNetConfig(
            vocab_size=90, d_model=16, n_layer=1, n_head=2, d_inner=16
        )
        base, targets = transformers.XLNetForTokenClassification(config), ["layer_1"]
    net = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, r=2)).eval()
    ids = torch.randint(3, 90, (8, length))
    trained = [p for p in net.parameters() if p.requires_grad]
    more = {"decoder_input_ids": ids} if name == "fsmt" else {}
    found = each.together(
        net,
        trained,
        lambda: net(input_ids=ids, **more).logits.square().mean((1, 2)),
        rows=8,
    )
    assert found is None


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
def test_a_full_gpu_takes_fewer_at_a_time(configure, monkeypatch):
    cfg = configure("experiment=quickstart")
    some = records(cfg, 24)
    together = each.together

    def full(net: Any, parameters: Any, losses: Any, rows: int) -> Any:
        if rows > 2:
            raise torch.OutOfMemoryError
        return together(net, parameters, losses, rows)

    single = trainer(cfg, size=1)
    monkeypatch.setattr(each, "together", full)
    halved = trainer(cfg, size=8)
    found = [*halved._found(halved.model, some)]
    assert max(len(losses) for losses, _ in found) == halved.size == 2
    assert_same(found, [*single._found(single.model, some)])


def test_a_record_that_is_not_finite_leaves_the_others_as_they_are():
    layer = torch.nn.Linear(3, 1, bias=False)
    x = torch.tensor([[[1.0, 2.0, 3.0]], [[0.0, 1.0, 0.0]]])
    scale = torch.tensor([1.0, torch.inf])
    found = each.together(
        layer, [layer.weight], lambda: layer(x)[:, 0, 0] * scale, rows=2
    )
    total, nats = dpsgd.clipped_sum([layer.weight], [found], longest=100.0)
    assert torch.equal(total[0], x[0])
    assert nats == pytest.approx(min(layer(x)[0].item(), dpsgd.LARGEST_LOSS))


def test_a_weight_that_is_used_twice_is_counted_or_found_out():
    layer, x = torch.nn.Linear(2, 2), torch.randn(3, 4, 2)
    weights = [layer.weight, layer.bias]

    def twice() -> torch.Tensor:
        return layer(layer(x)).square().sum((1, 2))

    _, gradients = each.together(layer, weights, twice, rows=3)
    for row, want in enumerate(twice()):
        for found, wanted in zip(
            gradients,
            torch.autograd.grad(want, weights, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(found[row], wanted)

    def outside() -> torch.Tensor:
        return layer(x).sum((1, 2)) + layer.weight.sum()

    def flat() -> torch.Tensor:
        return layer(x.flatten(0, 1)).unflatten(0, (3, 4)).sum((1, 2))

    for losses in (outside, flat):
        assert each.together(layer, weights, losses, rows=3) is None
    assert "forward" not in vars(layer)


def test_an_expert_that_has_as_many_tokens_as_there_are_rows_is_found_out():
    """One token of the first row and two of the last: no row's own."""
    expert = torch.nn.ModuleList([torch.nn.Linear(2, 1, bias=False)])
    weights, x = [expert[0].weight], torch.randn(3, 4, 2)
    chosen = torch.tensor([0, 2, 2]), torch.tensor([1, 0, 3])

    def losses() -> torch.Tensor:
        return torch.zeros(3).index_add(0, chosen[0], expert[0](x[chosen])[:, 0])

    assert each.together(expert, weights, losses, rows=3) is None
