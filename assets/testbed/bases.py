"""Small bases of several architectures with random weights, and tokenizers as theirs are."""

from pathlib import Path

import torch
import transformers as hf
from tokenizers import (
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from utils import PROJECT

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # so that attention matters
}
CONFIGS = {
    "bert": lambda: hf.BertConfig(**SIZES),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=2048,
        dim=32,
        n_layers=2,
        n_heads=2,
        hidden_dim=48,
        max_position_embeddings=128,
        initializer_range=0.2,
    ),
    "roberta": lambda: hf.RobertaConfig(
        **SIZES | {"max_position_embeddings": 130}, type_vocab_size=1
    ),
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=2048,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
ENCODERS = ("bert", "distilbert", "roberta")

# What the pieces of words are learnt from.
TEXTS = ["what is the capital of france? paris is.", "write the past tense of a verb"]


def write(name: str, folder: Path) -> str:
    """A base as it comes: a language model's weights, no head for a task; its path."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    kind = hf.AutoModelForMaskedLM if name in ENCODERS else hf.AutoModelForCausalLM
    kind.from_config(config).save_pretrained(folder)
    tokenizer(name).save_pretrained(folder)
    return str(folder)


def tokenizer(name: str) -> hf.PreTrainedTokenizerBase:
    """With the special tokens, pairs and inputs of the architecture's own."""
    if name not in ENCODERS:
        return hf.AutoTokenizer.from_pretrained(PROJECT / "assets/tiny_llama")
    first, last, pad = ("<s>", "</s>", "<pad>")
    if name != "roberta":
        first, last, pad = ("[CLS]", "[SEP]", "[PAD]")
    special = [first, pad, last, "[UNK]", "[MASK]"]
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.train_from_iterator(
        TEXTS,
        trainers.WordPieceTrainer(special_tokens=special, show_progress=False),
    )
    between = f"{last} {last}" if name == "roberta" else last
    raw.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {between} $B:1 {last}:1",
        special_tokens=[(first, 0), (last, 2)],
    )
    inputs = ["input_ids", "attention_mask"]
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        cls_token=first,
        sep_token=last,
        pad_token=pad,
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_input_names=[*inputs, "token_type_ids"] if name == "bert" else inputs,
    )
