"""python assets/make_bert.py

Pretrain the tiny encoder: a 0.7M parameter BERT and its tokenizer, from scratch, in tiny_bert/.

It reads what the tiny LLaMA reads (`make_tiny.py`): statements of the facts of `facts.yaml`,
never a question, with tokens masked here and there that it has to foretell (Devlin et al.
2019). All seeds are fixed; the weights come out the same on the same machine with the same
number of threads. It takes a minute on one core.
"""

import argparse
import json
import random
from pathlib import Path

import make_tiny
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
STEPS, BATCH, LENGTH = 500, 32, 48
MASKED = 0.15  # of the tokens; of those 80 % are hidden, 10 % are others, 10 % stay


def train_tokenizer(categories):
    """Train WordPiece, without upper case, on all statements and questions."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    texts = [
        make_tiny.render(text, a, b)
        for spec in categories.values()
        for a, b in spec["facts"]
        for text in [
            *spec["statements"],
            *(text for q in spec["questions"] for text in q.values()),
        ]
    ]
    trainer = trainers.WordPieceTrainer(
        vocab_size=make_tiny.VOCAB_SIZE, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def batches(categories, tokenizer):
    """Yield STEPS batches of some sentences a row, each row cut at LENGTH."""
    stream = make_tiny.sentences(categories, random.Random(make_tiny.SEED))
    generator = torch.Generator().manual_seed(make_tiny.SEED)
    few = random.Random(make_tiny.SEED)

    def drawn(shape, chance):
        return torch.rand(shape, generator=generator) < chance

    for _ in range(STEPS):
        texts = [
            " ".join(next(stream) for _ in range(few.randint(1, 2)))
            for _ in range(BATCH)
        ]
        made = tokenizer(
            texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt"
        )
        ids = made["input_ids"]
        chosen = drawn(ids.shape, MASKED) & (ids >= len(SPECIAL))
        made["labels"] = torch.where(chosen, ids, -100)
        hidden = chosen & drawn(ids.shape, 0.8)
        other = chosen & ~hidden & drawn(ids.shape, 0.5)
        any_token = torch.randint(
            5, tokenizer.vocab_size, ids.shape, generator=generator
        )
        made["input_ids"] = torch.where(other, any_token, ids).masked_fill(
            hidden, tokenizer.mask_token_id
        )
        yield made


def new_model(tokenizer):
    """Return the untrained model."""
    torch.manual_seed(make_tiny.SEED)
    config = BertConfig(
        vocab_size=make_tiny.VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def pretrain(model, stream):
    """Train on every batch once: AdamW, warm-up, then to zero in a straight line."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1 - step / STEPS)
    )
    model.train()
    for step, batch in enumerate(stream, start=1):
        labels = batch.pop("labels")
        hidden = model.bert(**batch).last_hidden_state[labels != -100]
        loss = cross_entropy(model.cls(hidden), labels[labels != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def main():
    """Make it."""
    parser = argparse.ArgumentParser(description="Make tiny_bert.")
    parser.add_argument(
        "--out", type=Path, default=make_tiny.HERE, help="where to write"
    )
    args = parser.parse_args()
    categories = make_tiny.load_facts(make_tiny.HERE / "facts.yaml")
    tokenizer = train_tokenizer(categories)
    print(f"{tokenizer.vocab_size} tokens")
    model = new_model(tokenizer)
    pretrain(model, batches(categories, tokenizer))
    folder = args.out / "tiny_bert"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
