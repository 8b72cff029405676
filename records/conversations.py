"""Conversations as people keep them, made records: what is said before an answer, and the answer.

`messages` of role and content (OpenAI, TRL), ShareGPT's `conversations` of from and value, and
TRL's `prompt` and `completion`, in text or in messages.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise, takewhile
from typing import Any

Message = dict[
    str, Any
]  # role, content; a weight of 0 for an answer not to be trained on

# Under which a column of conversations is found by itself, the first that is there.
FOUND = ("messages", "conversations", "conversation")

PAIR = ("prompt", "completion")

# Answers that somebody has judged, as TRL names them: the better and the worse one of two,
# or a `completion`, with whether it is a good one in `LABEL`.
CHOSEN, REJECTED = "chosen", "rejected"
LABEL = "label"

# The column of what is said before an answer, as JSON; no data of anybody's has it.
TURNS = "turns before the answer"

# Likewise, by their names in a record: the worse answer, and "true" or "false" of a single one.
JUDGED = {
    "rejected": "the answer that was not chosen",
    "desirable": "whether the answer is desirable",
}

TRUTH = {"true": "true", "1": "true", "1.0": "true"}
TRUTH |= {"false": "false", "0": "false", "0.0": "false"}

# Ours, by each that is in use: OpenAI's, ShareGPT's, and LLaMA-Factory's for calls of tools
# and for what these return.
ROLES = {
    name: role
    for role, names in {
        "system": "system developer",
        "user": "user human",
        "assistant": "assistant gpt chatgpt model function_call",
        "tool": "tool observation function",
    }.items()
    for name in names.split()
}

# Who may speak after whom; None is before the first.
NEXT = {
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"tool", "assistant"},
}


class Unfit(ValueError):
    """A value or a text that no record can hold."""


def find(columns: dict[str, str | None], names: Iterable[str]) -> tuple[str, ...]:
    """Which of a dataset's columns hold its conversations, if it has any.

    `columns`: `dataset.columns`. The column that `messages` names in it; without, and where
    none of the columns of question and answer is there, one of `FOUND`, or both of `PAIR`. Of
    answers that somebody has judged, those of `judged`.
    """
    names = set(names)
    if answers := judged(columns, names):
        return (*_asked(columns, names), *answers.values())
    if named := columns.get("messages"):
        return (named,)
    if names & {columns["instruction"], columns.get("output")}:
        return ()
    if found := [name for name in FOUND if name in names]:
        return (found[0],)
    return PAIR if names.issuperset(PAIR) else ()


def row(
    values: dict[str, Any], sources: Sequence[str], columns: dict[str, str | None]
) -> dict[str, str]:
    """A record in the columns of question and answer, with `TURNS` beside them.

    `values`: a row of the data; `sources`: the columns that `find` has found. The question is
    what the user said last. `TURNS` is empty where nothing was said before it: the record is
    then what an instruction and its output are. All are empty where there is nothing to be
    trained on: no answer, or turns out of order. What follows the last answer is left out. Of
    answers that somebody has judged, with the columns of `JUDGED` that there are.
    Raises `Unfit` for what is no conversation of texts.
    """
    if answers := judged(columns, set(sources)):
        return _judged_row(values, sources[: -len(answers)], answers, columns)
    given = [values[source] for source in sources]
    if tuple(sources) == PAIR and all(isinstance(value, str) for value in given):
        asked, answer, turns = given[0], given[1], ""
    else:
        said = [parse(*pair) for pair in zip(sources, given, strict=True)]
        for message in said[0] if len(said) > 1 else ():
            if message["role"] == "assistant":
                message["weight"] = 0  # TRL trains on the completion
        asked, answer, turns = _split([message for part in said for message in part])
    made = {columns["instruction"]: asked, columns["output"]: answer, TURNS: turns}
    return made | ({columns["input"]: ""} if columns["input"] else {})


def judged(columns: dict[str, str | None], names: set[str]) -> dict[str, str]:
    """The columns of answers that somebody has judged: `output`, and one of `JUDGED`.

    Those that `columns` names, or else TRL's, where no other column of question and answer is
    there. None where nobody has.
    """
    for name in JUDGED:
        if (named := columns.get(name)) and (output := columns["output"]):
            return {"output": output, name: named}
    if names & {columns["instruction"], columns.get("output")}:
        return {}
    if names >= {CHOSEN, REJECTED}:
        return {"output": CHOSEN, "rejected": REJECTED}
    if names >= {*PAIR, LABEL}:
        return {"output": PAIR[1], "desirable": LABEL}
    return {}


def _asked(columns: dict[str, str | None], names: set[str]) -> list[str]:
    """The columns of what is answered; none where it stands before the answers themselves."""
    if named := columns.get("messages"):
        return [named]
    texts = [columns["instruction"], columns["input"]]
    if texts[0] not in names:
        texts = [PAIR[0]]
    return [name for name in texts if name in names]


def _judged_row(
    values: dict[str, Any],
    asked: Sequence[str],
    answers: dict[str, str],
    columns: dict[str, str | None],
) -> dict[str, str]:
    """`row` of judged answers, as texts or as messages.

    Messages may begin with what was asked: that is what the better and the worse have in
    common. Where one of them goes on by more than an answer, there is nothing to be trained on.
    """
    sources = [column for name, column in answers.items() if name != "desirable"]
    given = [values.get(column) for column in sources]
    turns: list[Message] = []
    if any(isinstance(value, list) for value in given):
        said = [parse(*pair) for pair in zip(sources, given, strict=True)]
        shared = max(min(map(len, said)) - 1, 0)
        alike = (one == said[0][i] for i, one in enumerate(said[-1][:shared]))
        shared = len([*takewhile(bool, alike)])
        turns = said[0][:shared]
        texts = [_only_answer(one[shared:]) for one in said]
    else:
        texts = [_text(*pair) for pair in zip(sources, given, strict=True)]
    question = ["", ""]
    if not turns and asked:
        value = values[asked[0]]
        if columns.get("messages") or isinstance(value, list):
            turns = parse(asked[0], value)
            for message in turns:
                if message["role"] == "assistant":
                    message["weight"] = 0  # TRL trains on the completion
            texts = texts if turns else [""]
        else:
            question = [_text(column, values.get(column)) for column in asked]
    elif not turns and isinstance(given[0], str):
        raise Unfit(
            f"{sources[0]!r} holds an answer, and no column what it answers "
            "(dataset.columns.instruction, dataset.columns.messages)."
        )
    told = ""
    if turns and all(text.strip() for text in texts):
        answer = {"role": "assistant", "content": texts[0]}
        question[0], texts[0], told = _split([*turns, answer])
    made = {columns["instruction"]: question[0]}
    if columns["input"]:
        made[columns["input"]] = question[1] if len(question) > 1 else ""
    whole = all(text.strip() for text in texts)
    made |= {columns["output"]: texts[0] if whole else "", TURNS: told if whole else ""}
    if "rejected" in answers:
        return made | {JUDGED["rejected"]: texts[-1] if whole else ""}
    label = answers["desirable"]
    word = _text(label, values[label]).lower()
    if word and word not in TRUTH and columns.get("desirable"):
        raise Unfit(
            f"{label!r} holds {word[:80]!r}, and has to be true or false, 1 or 0."
        )
    return made | {JUDGED["desirable"]: TRUTH.get(word, "")}


def _only_answer(messages: list[Message]) -> str:
    """The text of a single message of the assistant's; of anything else none."""
    alone = [message["role"] for message in messages] == ["assistant"]
    return messages[0]["content"] if alone else ""


def _text(column: str, value: Any) -> str:
    if isinstance(value, (dict, list, bytes)):
        kind = type(value).__name__
        raise Unfit(f"{column!r} holds a value of type {kind}; text is needed.")
    return "" if value is None or value != value else str(value)


def parse(column: str, value: Any) -> list[Message]:
    """A conversation's messages, none for an empty value. Raises `Unfit`."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "[]")
        except (ValueError, RecursionError):
            raise Unfit(f"{column!r} holds a text that is no list of turns.") from None
    if value is None or value != value:  # NaN, pandas' missing
        return []
    if not isinstance(value, list):
        kind = type(value).__name__
        raise Unfit(f"{column!r} holds a value of type {kind}, and no list of turns.")
    return [_message(f"{column!r}, turn {i}", turn) for i, turn in enumerate(value, 1)]


def _message(where: str, turn: Any) -> Message:
    keys = next(
        (
            keys
            for keys in (("role", "content"), ("from", "value"))
            if isinstance(turn, dict) and turn.keys() >= set(keys)
        ),
        None,
    )
    if not keys:
        raise Unfit(f"{where}: an object with role and content (or from and value).")
    role, content = (turn[key] for key in keys)
    if not isinstance(role, str) or role.lower() not in ROLES:
        told = repr(role)[:80]
        raise Unfit(f"{where}: the role {told} is unknown. Known: {', '.join(ROLES)}.")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise Unfit(f"{where}: it calls a tool. Write the call into its {keys[1]}.")
    if not isinstance(content, str | None):
        kind = type(content).__name__
        raise Unfit(f"{where}: its {keys[1]} is of type {kind}, and has to be text.")
    made: Message = {"role": ROLES[role.lower()], "content": content or ""}
    skipped = made["role"] == "assistant" and turn.get("weight") == 0
    return made | ({"weight": 0} if skipped else {})


def _split(messages: list[Message]) -> tuple[str, str, str]:
    """The last question, the last answer that is trained on, and all before it as JSON."""
    answers = [place for place, message in enumerate(messages) if is_trained(message)]
    turns = messages[: answers[-1]] if answers else []
    roles = [None, *(message["role"] for message in turns), "assistant"]
    if not turns or any(b not in NEXT[a] for a, b in pairwise(roles)):
        return "", "", ""
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    told = json.dumps(turns, ensure_ascii=False) if len(turns) > 1 else ""
    return asked[-1], messages[answers[-1]]["content"], told


def is_trained(message: Message) -> bool:
    """Whether a message is an answer of the assistant's to be trained on."""
    says = message["role"] == "assistant" and message["content"].strip()
    return bool(says) and message.get("weight") != 0
