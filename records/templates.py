"""A record as text and as tokens: the prompt templates, and the mask of an answer.

The templates are the jinja files of `prompts/`, and `chat`, the one that came with the
tokenizer (Flower's bundles take no file whose name ends in .jinja). Training, evaluation and
`test.py` all ask `prompt` for the text before an answer, and a saved adapter's tokenizer
carries `chat_template`, so that a model is asked in the words that it was trained with.
"""

import copy
import json
import logging
import re
import sys
from functools import lru_cache
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from utils import IGNORED, UserError

Record = dict[str, str]  # instruction, input (may be empty), output
Example = dict[str, list[int]]  # input_ids and labels, equally long

# By name; None is the tokenizer's own.
TEMPLATES: dict[str, str | None] = {
    path.name.partition(".")[0]: path.read_text()
    for path in sorted(Path(__file__).parent.glob("prompts/*.jinja.md"))
} | {"chat": None}

# A record by which it is found out what a template does with one.
# Of more lines than one and with what HTML and JSON write otherwise, as templates may.
PROBE = {
    "instruction": 'What is 2 + 3?\nIs it < 6 & "odd"?',
    "input": "In words.\nIn two.",
    "output": 'It\'s five.\nIt is < 6 & "odd".',
}

# --- templates ------------------------------------------------------------------------------


def messages(template: str, turns: list[Record]) -> list[dict[str, str]]:
    """Turns as the messages in which a server is asked; an answer is the assistant's.

    Where a record has an input, that is the user's message, and its instruction the system's
    before it; `chat` has both in one, as bases differ in what they make of the other roles.
    """
    told = []
    for turn in turns:
        said = {"system": turn["instruction"], "user": turn["input"]}
        if template == "chat" or not turn["input"]:
            said = {"user": "\n".join(filter(None, said.values()))}
        if "output" in turn:
            said["assistant"] = turn["output"]
        told += [{"role": role, "content": words} for role, words in said.items()]
    return told


def text(
    template: str,
    turns: list[Record],
    tokenizer: PreTrainedTokenizerBase,
    asking: bool = True,
) -> str:
    """What the template makes of turns; `asking`: up to the next answer.

    A tokenizer's own is a program of somebody else's, run in transformers' sandbox: whatever
    it raises becomes `UserError`.
    """
    if template == "chat" and tokenizer.chat_template is None:
        raise UserError("this model's tokenizer has no chat template.")
    try:
        return tokenizer.apply_chat_template(
            messages(template, turns),
            chat_template=TEMPLATES[template],
            tokenize=False,
            add_generation_prompt=asking,
        )
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"this model's chat template fails ({cause}).") from error


def chat_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template for a tokenizer to carry as its own: `apply_chat_template` then gives the
    token ids of `prompt`, what the tokenizer puts before a text included.
    """
    if TEMPLATES[template] is None:
        return tokenizer.chat_template
    begin = "".join(tokenizer.convert_ids_to_tokens(_beginning(tokenizer)))
    asked, bearer = [question(PROBE)], copy.copy(tokenizer)
    # After a special token, some tokenizers no longer see the start of a text, and leave out
    # the space that they put there.
    for front in (begin, begin + " ") if begin else ("",):
        bearer.chat_template = TEMPLATES[template]
        if front:
            written = json.dumps(front, ensure_ascii=False)
            bearer.chat_template = f"{{{{ {written} }}}}{TEMPLATES[template]}"
        ids = bearer.apply_chat_template(
            messages(template, asked), add_generation_prompt=True, return_dict=False
        )
        if ids == prompt(template, asked, tokenizer):
            return bearer.chat_template
    logging.warning(
        "The chat template that is saved with the adapter begins with other tokens than in "
        "training. test.py asks in training's."
    )
    return bearer.chat_template


def _spaced(
    template: str,
    asked: Record,
    answer: str,
    before: str,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """The answer with the space that the template puts before it, trimmed as it does.

    `before`: the text of what is `asked`.
    """
    if template != "chat":
        return around(template, tokenizer)[0] + answer
    whole = text(template, [asked | {"output": answer}], tokenizer, asking=False)
    if answer not in whole[len(before) :]:  # some templates trim a message
        answer = answer.strip()
    start = whole.find(answer, len(before))
    own = whole[len(before) : start] if whole.startswith(before) else ""
    return own + answer if start > 0 and not own.strip() else answer


@lru_cache(maxsize=4)
def around(template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The space that the template puts before an answer, and the text that it puts after."""
    before = text(template, [question(PROBE)], tokenizer)
    whole = text(template, [PROBE], tokenizer, asking=False)
    head, _, after = whole.rpartition(PROBE["output"])
    own = head.removeprefix(before)
    return own if head.startswith(before) and not own.strip() else "", after


@lru_cache(maxsize=4)
def end(template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """What the template ends an answer with: a text, mostly empty, and then a token.

    The first added token (`</s>`, `<|im_end|>`, `<end_of_turn>`) that it writes after an
    answer, or else the tokenizer's end of sequence.
    """
    after = around(template, tokenizer)[1]
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
    if template == "chat":
        asked = text(template, [question(PROBE)], tokenizer)
        whole = text(template, [PROBE], tokenizer, asking=False)
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


def prompt(
    template: str, turns: list[Record], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Token ids of a conversation up to where the model is to answer.

    Every turn but the last carries its `output`. Begins with the tokenizer's
    beginning-of-sequence token, where it has one.
    """
    spelt = [_spell(turn, tokenizer) for turn in turns]
    # A chat template writes its own beginning of sequence.
    asked = text(template, spelt, tokenizer)
    return _tokenise(asked, tokenizer, begin=template != "chat")


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
    spelt = _spell(record, tokenizer)
    answer = spelt.pop("output")
    asked, begin = text(template, [spelt], tokenizer), template != "chat"
    answer = _spaced(template, spelt, answer, asked, tokenizer) + closing
    before = _tokenise(asked, tokenizer, begin)
    whole = _tokenise(asked + answer, tokenizer, begin)
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
