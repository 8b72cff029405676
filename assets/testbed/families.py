"""Tokenizers of the families that bases have, little trained, and chat templates as theirs."""

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

KINDS = ["byte-level", "metaspace", "unigram", "wordpiece"]


def family(name: str) -> Tokenizer:
    """An untrained or little trained tokenizer of each of the families that bases have."""
    texts = ["Below is an instruction. USER: What? ASSISTANT: It is so.\n\n"] * 9
    special = {"special_tokens": ["<s>", "</s>", "<unk>"], "show_progress": False}
    if name == "byte-level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **special)
    elif name == "metaspace":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        trainer = trainers.BpeTrainer(**special)
    elif name == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **special)
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**special)
    made.train_from_iterator(texts, trainer)
    return made


# What is put before and behind a text: BERT has both, and `add_eos_token` is the last.
FRAMES = ["$A", "<s> $A", "<s> $A </s>", "<s> <s> $A </s> </s>", "$A </s>"]


def framed(raw: Tokenizer, frame: str) -> PreTrainedTokenizerFast:
    raw.post_processor = TemplateProcessing(
        single=frame, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", unk_token="<unk>"
    )


# As well-known models write a conversation, and the token that ends an answer there. What
# the assistant says is marked as transformers has it, for its own mask.
STYLES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}"
        "<|end_header_id|>\n\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] | trim }}<|eot_id|>{% endgeneration %}{% else %}"
        "{{ m['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        "{% endif %}",
        "<|eot_id|>",
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "<start_of_turn>model\n{% generation %}{{ m['content'] | trim }}<end_of_turn>"
        "{% endgeneration %}{% else %}<start_of_turn>user\n{{ m['content'] | trim }}"
        "<end_of_turn>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "phi 3": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>\n"
        "{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}{{ '\n' }}"
        "{% else %}<|user|>\n{{ m['content'] }}<|end|>{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% else %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}",
        "<|endoftext|>",
    ),
    "llama 2": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
        "{% endgeneration %}{% else %}"
        "{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}{% endif %}"
        "{% endfor %}",
        "<|endoftext|>",
    ),
    "zephyr": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>\n"
        "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}"
        "<|user|>\n{{ m['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|endoftext|>",
    ),
    "deepseek": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "<|Assistant|>{% generation %}{{ m['content'] }}<|end_of_sentence|>"
        "{% endgeneration %}{% else %}<|User|>{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|>{% endif %}",
        "<|end_of_sentence|>",
    ),
}
TURNS = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>"),
    *("<|end|>", "<|User|>", "<|Assistant|>", "<|end_of_sentence|>"),
]
ENDS = ["<|bos|>", "<|endoftext|>"]
# All that a text may spell.
NAMES = [*TURNS, *ENDS, "<s>", "</s>", "<unk>"]


def chatting(special: bool, kind: str = "byte-level") -> PreTrainedTokenizerFast:
    """A tokenizer whose end of sequence is not what ends a turn; `special`: the turns' are."""
    raw = family(kind)
    # As Llama 3's: line breaks by themselves, so that an answer's first word after them
    # changes no token of the prompt.
    breaks = pre_tokenizers.Split(Regex(r"[\r\n]+"), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([breaks, raw.pre_tokenizer])
    raw.add_special_tokens(ENDS)
    # As Gemma's, it has tokens of line breaks as well.
    raw.add_tokens(["\n\n\n"])
    raw.add_tokens([AddedToken(token, special=special) for token in TURNS])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|bos|>", eos_token="<|endoftext|>"
    )
