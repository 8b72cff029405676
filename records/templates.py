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
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from records.conversations import Message, is_trained
from utils import IGNORED, UserError

# instruction, input (may be empty) and output; of a conversation also `messages`, all that is
# said before the output, in the place of instruction and input.
Record = dict[str, Any]
# input_ids and labels, equally long; `lost`, how many messages at its beginning are not in it.
Example = dict[str, list[int]]
# The token ids before an answer, those that stand before them left out, and the answer's.
Part = tuple[list[int], list[int]]

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


def messages(template: str, turns: list[Record]) -> list[Message]:
    """Turns as the messages in which a server is asked; an answer is the assistant's.

    Where a record has an input, that is the user's message, and its instruction the system's
    before it; `chat` has both in one, as bases differ in what they make of the other roles.
    """
    told: list[Message] = []
    for turn in turns:
        if before := turn.get("messages"):
            answer = [turn["output"]] if "output" in turn else []
            told += before
            told += [{"role": "assistant", "content": words} for words in answer]
            continue
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
    """What the template makes of turns; `asking`: up to the next answer."""
    told = _fold(template, messages(template, turns), tokenizer)
    return _render(template, told, tokenizer, asking)


def _render(
    template: str,
    told: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    asking: bool = True,
) -> str:
    """What the template makes of messages.

    A tokenizer's own is a program of somebody else's, run in transformers' sandbox: whatever
    it raises becomes `UserError`.
    """
    if template == "chat" and tokenizer.chat_template is None:
        raise UserError("this model's tokenizer has no chat template.")
    try:
        return tokenizer.apply_chat_template(
            [{"role": one["role"], "content": one["content"]} for one in told],
            chat_template=TEMPLATES[template],
            tokenize=False,
            add_generation_prompt=asking,
        )
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"this model's chat template fails ({cause}).") from error


def _fold(
    template: str, told: list[Message], tokenizer: PreTrainedTokenizerBase
) -> list[Message]:
    """The messages with what the template has no role for told by the user, nothing lost.

    A system's is put before the user's own words; a tool's are the user's, in one message.
    """
    folded: list[Message] = []
    joins = False  # whether the next message of the user's goes on with the last one
    for one in told:
        role = one["role"]
        if role in ("system", "tool") and not _takes(template, role, tokenizer):
            one, joined = one | {"role": "user"}, True
        else:
            joined = False
        if joins and one["role"] == "user":
            before = folded.pop()["content"]
            one = one | {"content": f"{before}\n\n{one['content']}"}
        folded.append(one)
        joins = joined
    return folded


@lru_cache(maxsize=8)
def _takes(template: str, role: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a template says what a `system` or a `tool` says.

    Those of `prompts/` have a place for a system's words, none for a tool's.
    """
    if template != "chat":
        return role == "system"
    roles = ["user", "assistant", "tool", "assistant"]
    if role == "system":
        roles = ["system", "user", "assistant"]
    said = [*PROBE.values(), "So it is."][: len(roles)]
    told = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
    try:
        return _holds(_render(template, told, tokenizer, asking=False), said)
    except UserError:
        return False


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
    asked: list[Message],
    answer: str,
    before: str,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """The answer with the space that the template puts before it, trimmed as it does.

    `before`: the text of what is `asked`.
    """
    if template != "chat":
        return around(template, tokenizer)[0] + answer
    said = [*asked, {"role": "assistant", "content": answer}]
    whole = _render(template, said, tokenizer, asking=False)
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
    # A chat template writes its own beginning of sequence.
    asked = _render(template, _told(template, turns, tokenizer), tokenizer)
    return _tokenise(asked, tokenizer, begin=template != "chat")


def encode(
    record: Record,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    every: bool = False,
) -> Example | None:
    """Tokenise one record; labels are the answer and the token that ends it only.

    `every`: and those of the assistant's earlier answers in a conversation. Longer than
    `seq_length` tokens, a conversation loses its first turns (see `fit`), and then the answer
    its end (and with it that token). None where the last question leaves no room for an
    answer, or there is no answer.
    """
    if not record["output"].strip():
        return None
    kept, parts = record, _parts(record, template, tokenizer, every)
    if _length(parts) > seq_length:
        kept = fit(record, template, tokenizer, seq_length, every)
        parts = _parts(kept, template, tokenizer, every)
    ids = [token for part in parts for run in part for token in run]
    last = parts[-1][1]
    if len(last) < 2 or len(ids) - len(last) >= seq_length:  # its end alone, or no room
        return None
    labels = [
        label for before, after in parts for label in ([IGNORED] * len(before) + after)
    ]
    made = {"input_ids": ids[:seq_length], "labels": labels[:seq_length]}
    if kept is record:
        return made
    return made | {"lost": [len(record["messages"]) - len(kept["messages"])]}


def is_cut(example: Example, template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `encode` had to leave out the answer's end, or a conversation's beginning."""
    return "lost" in example or example["labels"][-1] != end(template, tokenizer)[1]


def fit(
    record: Record,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    every: bool = False,
) -> Record:
    """The record itself, or a conversation without its first turns if it is too long.

    What the user says, with all up to where the user speaks again, stays or goes as a whole;
    the last of them stays, and a system's message where it fits beside.
    """
    turns = record.get("messages")
    if not turns:
        return record
    system = turns[:1] if turns[0]["role"] == "system" else []
    starts = [place for place, one in enumerate(turns) if one["role"] == "user"]
    shorter = [turns, *(system + turns[place:] for place in starts[1:])]
    shorter += [turns[starts[-1] :]] if system else []

    def fits(messages: list[Message], every: bool = False) -> bool:
        parts = _parts(record | {"messages": messages}, template, tokenizer, every)
        return _length(parts) <= seq_length

    # By the last answer alone, which is one text to tokenise. Where turns are tokenised apart,
    # it may be a few tokens more with every one.
    first = bisect_left(shorter, True, key=fits)
    while every and first < len(shorter) and not fits(shorter[first], every):
        first += 1
    kept = shorter[min(first, len(shorter) - 1)]
    return record if kept is turns else record | {"messages": kept}


def _parts(
    record: Record, template: str, tokenizer: PreTrainedTokenizerBase, every: bool
) -> list[Part]:
    """A record's answers that are trained on, each with the token that ends it.

    Put together they are a prefix of what the model reads in the next turn, token for token.
    Where they are not, because the template writes an earlier answer otherwise than the last
    (without its thinking, say), or the tokenizer merges over a border, what stands between
    two answers is tokenised by itself, and the earlier answer stays as it was given.
    """
    closing, last = end(template, tokenizer)
    told = _told(template, [record], tokenizer)
    places = [len(told) - 1]
    if every:
        places = [i for i in range(places[0]) if is_trained(told[i])] + places
    parts: list[Part] = []
    ids: list[int] = []
    for number, place in enumerate(places):
        asked = _render(template, told[:place], tokenizer)
        answer = told[place]["content"]
        answer = _spaced(template, told[:place], answer, asked, tokenizer) + closing
        before, after = _follow(asked, answer, tokenizer, template != "chat")
        if before[: len(ids)] == ids:
            before = before[len(ids) :]
        else:
            ending = closing + tokenizer.convert_ids_to_tokens(last)
            asked = _between(template, told[:place], places[number - 1], tokenizer)
            asked = asked.removeprefix(ending)
            before, after = _follow(asked, answer, tokenizer, begin=False)
        parts.append((before, [*after, last]))
        ids += [*before, *after, last]
    return parts


def _length(parts: list[Part]) -> int:
    return sum(len(run) for part in parts for run in part)


def _between(
    template: str,
    told: list[Message],
    place: int,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """What the template writes after the answer at `place`, up to the next one."""
    stand_in = "\ufdd1"  # no character either, so that no text holds it but on purpose
    while any(stand_in in one["content"] for one in told):
        stand_in += "\ufdd1"
    stood = [*told[:place], {"role": "assistant", "content": stand_in}]
    text = _render(template, stood + told[place + 1 :], tokenizer)
    return text.rpartition(stand_in)[2]


def answered(
    record: Record,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    closing: str = "",
) -> Part:
    """Token ids of a record's prompt, and of its answer with the text `closing` behind it."""
    *asked, said = _told(template, [record], tokenizer)
    before = _render(template, asked, tokenizer)
    answer = _spaced(template, asked, said["content"], before, tokenizer) + closing
    return _follow(before, answer, tokenizer, template != "chat")


def _follow(
    asked: str, answer: str, tokenizer: PreTrainedTokenizerBase, begin: bool
) -> Part:
    """Token ids of a text, and of the answer to it."""
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


def _told(
    template: str, turns: list[Record], tokenizer: PreTrainedTokenizerBase
) -> list[Message]:
    """Turns as messages, with a mark inside whatever spells a special token."""

    def spell(text: str) -> str:
        text = text.replace(MARK, 2 * MARK)
        for token in _special_tokens(tokenizer):
            text = text.replace(token, token[0] + MARK + token[1:])
        return text

    told = _fold(template, messages(template, turns), tokenizer)
    return [one | {"content": spell(one["content"])} for one in told]


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
    asked = ("instruction", "input", "messages")
    return {name: record[name] for name in asked if name in record}
