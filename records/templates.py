"""A record as text and as tokens: the prompt templates, and the mask of an answer.

The templates live here alone. Training, evaluation and `test.py` all ask `prompt` for the
text before an answer, so that a model is asked in the words that it was trained with.
"""

import re
import sys
from collections.abc import Callable
from functools import lru_cache

from transformers import GenerationConfig, PreTrainedTokenizerBase

from utils import IGNORED, UserError

Record = dict[str, str]  # instruction, input (may be empty), output

# A record by which it is found out what a chat template does with one.
# Of more lines than one and with what HTML and JSON write otherwise, as templates may.
PROBE = {
    "instruction": 'What is 2 + 3?\nIs it < 6 & "odd"?',
    "input": "In words.\nIn two.",
    "output": 'It\'s five.\nIt is < 6 & "odd".',
}

Example = dict[str, list[int]]  # input_ids and labels, equally long

# --- templates ------------------------------------------------------------------------------


def _alpaca(turns: list[Record], tokenizer: PreTrainedTokenizerBase) -> str:
    """Stanford Alpaca's prompt, with and without input; earlier turns come before it."""
    text = ""
    for turn in turns:
        text += "Below is an instruction that describes a task"
        if turn["input"]:
            text += ", paired with an input that provides further context"
        text += ". Write a response that appropriately completes the request.\n\n"
        text += f"### Instruction:\n{turn['instruction']}\n\n"
        if turn["input"]:
            text += f"### Input:\n{turn['input']}\n\n"
        text += "### Response:\n"
        if "output" in turn:
            text += f"{turn['output']}{tokenizer.eos_token}\n\n"
    return text


def _vicuna(turns: list[Record], tokenizer: PreTrainedTokenizerBase) -> str:
    """Vicuna v1.1's conversation."""
    text = (
        "A chat between a curious user and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    for turn in turns:
        text += f"USER: {_question(turn)} ASSISTANT:"
        if "output" in turn:
            text += f" {turn['output']}{tokenizer.eos_token}"
    return text


def _chat(turns: list[Record], tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template that came with the tokenizer."""
    return _render(turns, tokenizer, asking=True)


def _render(
    turns: list[Record], tokenizer: PreTrainedTokenizerBase, asking: bool
) -> str:
    """What the tokenizer's chat template makes of turns; `asking`: up to the next answer.

    The template is a program of somebody else's: whatever it raises becomes `UserError`.
    """
    if tokenizer.chat_template is None:
        raise UserError("this model's tokenizer has no chat template.")
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": _question(turn)})
        if "output" in turn:
            messages.append({"role": "assistant", "content": turn["output"]})
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asking
        )
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"this model's chat template fails ({cause}).") from error


def spaced(
    template: str, question: Record, answer: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The answer with the space that the template puts before it, trimmed as it does."""
    before = TEMPLATES[template]([question], tokenizer)
    if template == "chat":
        whole = _render([question | {"output": answer}], tokenizer, asking=False)
        if answer not in whole[len(before) :]:  # some templates trim a message
            answer = answer.strip()
        start = whole.find(answer, len(before))
        space = whole[len(before) : start] if whole.startswith(before) else ""
        return space + answer if start > 0 and not space.strip() else answer
    return " " + answer if template == "vicuna" else answer


def end(template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """What the template ends an answer with: a text, mostly empty, and then a token.

    The tokenizer's end of sequence, or with `chat` the first token of its own (an added
    one: `<|im_end|>`, `<end_of_turn>`) that the chat template writes after an answer.
    """
    return _chat_end(tokenizer) if template == "chat" else ("", tokenizer.eos_token_id)


@lru_cache(maxsize=4)
def _chat_end(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    after = _render([PROBE], tokenizer, asking=False).rpartition(PROBE["output"])[2]
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    # Some tokenizers have tokens of line breaks among them.
    names = sorted(filter(str.strip, added), key=len, reverse=True)
    found = re.search("|".join(map(re.escape, names)), after) if names else None
    if not found:
        return "", tokenizer.eos_token_id
    return after[: found.start()], tokenizer.convert_tokens_to_ids(found[0])


def ends(
    template: str, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig
) -> list[int]:
    """The tokens at which an answer is over: the template's, the tokenizer's, the base's."""
    own = generation.eos_token_id
    ids = [end(template, tokenizer)[1], tokenizer.eos_token_id]
    ids += own if isinstance(own, list) else [own]
    return [i for i in dict.fromkeys(ids) if i is not None]


def check_template(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` for a template that fails, or loses what is asked or answered."""
    whole = TEMPLATES[template]([question(PROBE)], tokenizer)
    if template == "chat":
        asked, whole = whole, _render([PROBE], tokenizer, asking=False)
        said = list(PROBE.values())
        if not (_holds(asked, said[:2]) and _holds(whole, said)):
            raise UserError(
                "this model's chat template loses the question or the answer; it may want "
                "messages of another form than text."
            )
    encode(PROBE, template, tokenizer, sys.maxsize)


def _holds(text: str, parts: list[str]) -> bool:
    """Whether the parts stand in the text, one after the other."""
    return re.search(".*".join(map(re.escape, parts)), text, re.DOTALL) is not None


def _question(turn: Record) -> str:
    return "\n".join(filter(None, (turn["instruction"], turn["input"])))


TEMPLATES: dict[str, Callable[[list[Record], PreTrainedTokenizerBase], str]] = {
    "alpaca": _alpaca,
    "vicuna": _vicuna,
    "chat": _chat,
}


def prompt(
    template: str, turns: list[Record], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Token ids of a conversation up to where the model is to answer.

    Every turn but the last carries its `output`. Begins with the tokenizer's
    beginning-of-sequence token, where it has one.
    """
    spelt = [_spell(turn, tokenizer) for turn in turns]
    text = TEMPLATES[template](spelt, tokenizer)
    # A chat template writes its own beginning of sequence.
    return _tokenise(text, tokenizer, begin=template != "chat")


def encode(
    record: Record, template: str, tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> Example | None:
    """Tokenise one record; labels are the answer and the token that ends it only.

    Longer than `seq_length` tokens, the answer loses its end (and with it that token).
    None where the prompt leaves no room for an answer, or there is no answer.
    """
    closing, last = end(template, tokenizer)
    before, after = answered(record, template, tokenizer, closing)
    if not record["output"].strip() or not after or len(before) >= seq_length:
        return None
    ids = (before + after + [last])[:seq_length]
    return {
        "input_ids": ids,
        "labels": [IGNORED] * len(before) + ids[len(before) :],
    }


def is_cut(example: Example, template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `encode` had to leave out the answer's end."""
    return example["labels"][-1] != end(template, tokenizer)[1]


def answered(
    record: Record,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    closing: str = "",
) -> tuple[list[int], list[int]]:
    """Token ids of a record's prompt, and of its answer with the text `closing` behind it."""
    before = prompt(template, [question(record)], tokenizer)
    spelt = _spell(record, tokenizer)
    answer = spelt.pop("output")
    text = TEMPLATES[template]([spelt], tokenizer)
    answer = spaced(template, spelt, answer, tokenizer) + closing
    whole = _tokenise(text + answer, tokenizer, begin=template != "chat")
    # The prompt must have the same tokens as when the model is asked; where the answer's
    # first letters would merge into them, the answer is tokenised by itself.
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    return before, _tokenise(answer, tokenizer, begin=False)


# A record may hold the text of a special token: `</s>` ends an HTML tag, and is no end of
# sequence there. This, which no character is (Unicode keeps it for such use), breaks it up
# until the template's own special tokens have been found.
MARK = "\ufdd0"


def _spell(record: Record, tokenizer: PreTrainedTokenizerBase) -> Record:
    """The record with a mark inside whatever spells a special token."""

    def spell(text: str) -> str:
        text = text.replace(MARK, 2 * MARK)
        for token in _special_tokens(tokenizer):
            text = text.replace(token, token[0] + MARK + token[1:])
        return text

    return {name: spell(text) for name, text in record.items()}


def _tokenise(text: str, tokenizer: PreTrainedTokenizerBase, begin: bool) -> list[int]:
    """Token ids of a template's text; only what the template wrote is a special token.

    `begin`: with whatever the tokenizer puts before a text. What it puts behind one, an
    end of sequence for the most part, is `encode`'s to add.
    """
    special = "|".join(map(re.escape, _special_tokens(tokenizer)))
    pieces = re.split(f"({special})", text) if special else [text]
    ids = list(_beginning(tokenizer)) if begin else []
    if len(pieces) > 1 and MARK not in text:
        return ids + tokenizer(text, add_special_tokens=False)["input_ids"]
    for place, piece in enumerate(pieces):
        if place % 2:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        elif piece:
            plain = re.sub(f"{MARK}({MARK}?)", r"\1", piece)
            ids += tokenizer(
                plain, add_special_tokens=False, split_special_tokens=True
            )["input_ids"]
    return ids


@lru_cache(maxsize=4)
def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    places = range(len(whole) - len(plain) + 1)
    return next((whole[:i] for i in places if whole[i : i + len(plain)] == plain), [])


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    # The longest first, where one begins another.
    return sorted((token.content for token in added if token.special), key=len)[::-1]


def question(record: Record) -> Record:
    """What is asked: the record without its output."""
    return {"instruction": record["instruction"], "input": record["input"]}
