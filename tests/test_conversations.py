"""pytest tests/test_conversations.py: conversations read, masked, cut, trained on and asked.

What is trained on is held against transformers' own mask of what the assistant says, token by
token, in as many turns as there are.
"""

import copy
import json
import sys
from argparse import Namespace
from functools import lru_cache

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

import client
import dataset
import model
import tasks
import test as ask
from assets.testbed.families import (
    FRAMES,
    KINDS,
    NAMES,
    STYLES,
    chatting,
    family,
    framed,
)
from node import permit
from records import batches, conversations, files, templates
from records.clusters import ClusterPartitioner
from reporting import export
from server import rounds
from settings import heterogeneity, preflight
from settings.compose import compose, record
from utils import IGNORED, PROJECT, Refusal, Settings, UserError

COLUMNS = {
    "instruction": "instruction",
    "input": "input",
    "output": "output",
    "messages": None,
}
QUICK = settings(max_examples=25, deadline=None, derandomize=True, database=None)
# Of what spells no special token, which a server takes for one, and training does not.
WORDS = st.text(max_size=20).map(str.strip).filter(bool)
WORDS = WORDS.filter(lambda words: not any(name in words for name in NAMES))


CHATML = STYLES["chatml"][0]
CHATTING = {
    (special, kind): chatting(special, kind)
    for special in (True, False)
    for kind in KINDS
}


@lru_cache
def talking(template=CHATML, special=True, kind="byte-level"):
    """A tokenizer with this chat template."""
    made = copy.copy(CHATTING[special, kind])
    made.chat_template = template
    return made


def says(role, content):
    return {"role": role, "content": content}


@st.composite
def talks(draw, words=WORDS, most=4):
    """A conversation of up to `most` questions, with or without a system's message."""
    told = [says("system", draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, most))):
        told += [says("user", draw(words)), says("assistant", draw(words))]
    return told


LONG = [
    says("system", "Be short."),
    says("user", "What is it?"),
    says("assistant", "It is so."),
    says("user", "Two\n\n\n\nparts"),
    says("assistant", "Two\n\nparts"),
    says("user", "Is it < 6?"),
    says("assistant", "Yes"),
]


def record_of(messages, source="messages", **more):
    row = conversations.row({source: messages} | more, (source, *more), COLUMNS)
    return dataset.to_record(row, COLUMNS)


def encoded(messages, template, tokenizer, length=100_000, every=True):
    return templates.encode(record_of(messages), template, tokenizer, length, every)


def runs(example):
    """The labelled token ids of an example, answer by answer."""
    found, before = [], IGNORED
    for label in example["labels"]:
        if label != IGNORED:
            if before == IGNORED:
                found.append([])
            found[-1].append(label)
        before = label
    return found


# --- what is trained on, token by token -----------------------------------------------------


# Where an answer begins with a space, which WordPiece drops, transformers' mask is empty.
SPACED = {("mistral", "wordpiece"), ("llama 2", "wordpiece")}
WAYS = sorted({(style, kind) for style in STYLES for kind in KINDS} - SPACED)


def masked(tokenizer, messages):
    """transformers' token ids and labels up to the last answer's end."""
    theirs = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = theirs["assistant_masks"]
    last = len(mask) - mask[::-1].index(1)
    ids = theirs["input_ids"][:last]
    return ids, [i if m else IGNORED for i, m in zip(ids, mask[:last], strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
@pytest.mark.parametrize(("style", "kind"), WAYS)
@settings(QUICK, max_examples=10)
@given(talk=talks())
@example(talk=LONG)
def test_labels_are_all_that_the_assistant_said(style, kind, special, talk):
    template, end = STYLES[style]
    tokenizer = talking(template, special, kind)
    ids, labels = masked(tokenizer, talk)
    made = encoded(talk, "chat", tokenizer)
    assert made == {"input_ids": ids, "labels": labels}
    ends = [run[-1] for run in runs(made)]
    answers = sum(one["role"] == "assistant" for one in talk)
    assert ends == [tokenizer.convert_tokens_to_ids(end)] * answers
    # The last alone: of the same ids, and what a record's answer is.
    one = encoded(talk, "chat", tokenizer, every=False)
    assert one["input_ids"] == ids
    assert runs(one) == runs(made)[-1:]


THINKING = CHATML.replace(
    "{{ m['content'] }}<|im_end|>{% endgeneration %}",
    "{% if loop.last %}{{ m['content'] }}{% else %}"
    "{{ m['content'].split('</think>')[-1] | trim }}{% endif %}<|im_end|>"
    "{% endgeneration %}",
)
TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
@QUICK
@given(talk=talks(), thought=WORDS)
@example(talk=LONG, thought="So, two.")
def test_thinking_that_a_template_strips_from_earlier_turns_is_trained_on(
    special, talk, thought
):
    tokenizer = talking(THINKING, special)
    thoughts = {"assistant": f"<think>\n{thought}\n</think>\n\n"}
    talk = [
        says(one["role"], thoughts.get(one["role"], "") + one["content"])
        for one in talk
    ]
    # As a template has it that strips nothing.
    ids, labels = masked(talking(CHATML, special), talk)
    assert encoded(talk, "chat", tokenizer) == {"input_ids": ids, "labels": labels}
    # The last alone is asked as a server asks: without the earlier thinking.
    last = encoded(talk, "chat", tokenizer, every=False)
    asked = tokenizer.apply_chat_template(
        talk[:-1], add_generation_prompt=True, return_dict=False
    )
    assert last["input_ids"][: len(asked)] == asked
    assert runs(last)[0] == last["input_ids"][len(asked) :]


@QUICK
@given(talk=talks(), space=st.sampled_from([" ", "\n", "  \n\n"]))
def test_what_a_template_trims_is_trimmed_in_training(talk, space):
    tokenizer = talking(TRIMMING)
    bare = encoded(talk, "chat", tokenizer)
    spaced = [one | {"content": space + one["content"] + space} for one in talk]
    assert encoded(spaced, "chat", tokenizer) == bare
    assert (bare["input_ids"], bare["labels"]) == masked(tokenizer, talk)


OF_A_KIND = {
    (kind, frame): framed(family(kind), FRAMES[frame])
    for kind in KINDS
    for frame in range(len(FRAMES))
}
OF_A_KIND["byte-fallback", 1] = model.load_tokenizer("assets/tiny_llama")


@pytest.mark.parametrize("template", ["alpaca", "vicuna"])
@pytest.mark.parametrize("key", OF_A_KIND, ids=lambda key: f"{key[0]}-{key[1]}")
@settings(QUICK, max_examples=8)
@given(talk=talks(st.text("abc ?.ä<\n", max_size=12).map(str.strip).filter(bool), 3))
@example(talk=LONG)
def test_a_server_reads_a_conversation_in_the_tokens_of_training(template, key, talk):
    tokenizer = OF_A_KIND[key]
    served = copy.copy(tokenizer)
    served.chat_template = templates.chat_template(template, tokenizer)
    told = templates.messages(template, [record_of(talk)])

    def tokens(messages, asking):
        return served.apply_chat_template(
            messages, add_generation_prompt=asking, return_dict=False
        )

    made = encoded(talk, template, tokenizer)
    ids, whole = made["input_ids"], tokens(told, False)
    expected = [IGNORED] * len(ids)
    for place, one in enumerate(told):
        if one["role"] != "assistant":
            continue
        start = len(tokens(told[:place], True))
        stop = ids.index(tokenizer.eos_token_id, start) + 1
        expected[start:stop] = ids[start:stop]
    assert made["labels"] == expected
    # But for the line breaks that follow the last answer.
    assert ids == whole[: len(ids)]
    assert tokenizer.eos_token_id not in whole[len(ids) :]


@QUICK
@given(talk=talks())
@example(talk=LONG)
def test_ids_decode_to_the_conversation(talk):
    tokenizer = talking()
    made = encoded(talk, "chat", tokenizer)
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    assert tokenizer.decode(made["input_ids"]) + "\n" == text
    said = [f"{o['content']}<|im_end|>" for o in talk if o["role"] == "assistant"]
    assert [tokenizer.decode(run) for run in runs(made)] == said


def test_an_end_that_is_also_the_padding_is_trained_on_and_padding_is_not():
    tokenizer = framed(family("byte-level"), "$A")
    tokenizer.pad_token = tokenizer.eos_token
    examples = [encoded(talk, "alpaca", tokenizer) for talk in (LONG, LONG[:3])]
    collate = batches.Collator(tokenizer.pad_token_id, "right")
    labels = collate(examples)["labels"]
    assert (labels == tokenizer.eos_token_id).sum(1).tolist() == [3, 1]


@pytest.mark.parametrize("template", templates.TEMPLATES)
@QUICK
@given(talk=talks(st.text(min_size=1, max_size=9).filter(str.strip), 1))
def test_a_conversation_of_one_question_is_an_instruction(template, talk):
    tokenizer = model.load_tokenizer("assets/tiny_llama")
    asked, answer = [one["content"] for one in talk[-2:]]
    plain = {"instruction": asked, "input": "", "output": answer}
    assert record_of(talk[-2:]) == plain
    for every in (True, False):
        made = encoded(talk[-2:], template, tokenizer, every=every)
        assert made == templates.encode(plain, template, tokenizer, 100_000)
    # Alpaca and Vicuna tell an instruction as the system's, and its input as the user's.
    if len(talk) == 3 and template != "chat":
        plain = {"instruction": talk[0]["content"], "input": asked, "output": answer}
        made = templates.encode(plain, template, tokenizer, 100_000)
        assert encoded(talk, template, tokenizer) == made


@pytest.mark.parametrize("template", templates.TEMPLATES)
def test_what_spells_a_special_token_is_text_in_every_turn(template):
    tokenizer = talking()
    talk = [one | {"content": f"a<|im_end|>{one['content']}<|bos|>"} for one in LONG]
    made = encoded(talk, template, tokenizer)
    end = "<|im_end|>" if template == "chat" else "<|endoftext|>"
    said = [one["content"] + end for one in talk if one["role"] == "assistant"]
    found = [tokenizer.decode(run).lstrip() for run in runs(made)]
    assert found == said
    # The ends are the template's alone: 7 messages, or the answers.
    count = made["input_ids"].count(tokenizer.convert_tokens_to_ids(end))
    assert count == (7 if template == "chat" else 3)


# --- a template that lacks a role -------------------------------------------------------------

TOOLS = [
    says("system", "Be short."),
    says("user", "What is the time?"),
    says("assistant", "clock()"),
    says("tool", "12:00"),
    says("tool", "noon"),
    says("assistant", "It is noon."),
    says("user", "Thanks."),
    says("assistant", "Welcome."),
]
# As Gemma's and Mistral's: no system, and turns in their order.
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}<start_of_turn>model\n"
    "{% generation %}{{ m['content'] | trim }}<end_of_turn>{% endgeneration %}"
    "{% else %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>"
    "{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Loses what it has no words for, without a word.
DEAF = CHATML.replace(
    "in messages %}", "in messages if m['role'] in ('user', 'assistant') %}"
)


@pytest.mark.parametrize("template", [STRICT, DEAF], ids=["strict", "deaf"])
def test_a_role_that_a_template_lacks_is_told_by_the_user(template):
    tokenizer = talking(template)
    folded = [
        says("user", "Be short.\n\nWhat is the time?"),
        TOOLS[2],
        says("user", "12:00\n\nnoon"),
        *TOOLS[5:],
    ]
    ids, labels = masked(tokenizer, folded)
    assert encoded(TOOLS, "chat", tokenizer) == {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("template", templates.TEMPLATES)
def test_a_tools_words_are_never_trained_on_and_a_systems_are_kept(template):
    tokenizer = talking()
    made = encoded(TOOLS, template, tokenizer)
    ends = "<|im_end|>" if template == "chat" else tokenizer.eos_token
    said = [tokenizer.decode(run).strip() for run in runs(made)]
    assert said == [f"{a}{ends}" for a in ("clock()", "It is noon.", "Welcome.")]
    text = tokenizer.decode(made["input_ids"])
    places = [text.index(one["content"]) for one in TOOLS]
    assert places == sorted(places)


# --- too long ----------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["alpaca", "chat"])
@pytest.mark.parametrize("every", [True, False])
@settings(QUICK, max_examples=60)
@given(talk=talks(), length=st.integers(5, 300))
@example(talk=LONG, length=40)
@example(talk=LONG, length=60)
def test_a_long_conversation_loses_its_first_turns(template, every, talk, length):
    tokenizer = talking()
    system = [one for one in talk if one["role"] == "system"]
    pairs = talk[len(system) :]
    # What may be left, from all of it to the last question alone.
    left = [system + pairs[place:] for place in range(0, len(pairs), 2)]
    left += [pairs[-2:]] if system else []
    whole = [encoded(one, template, tokenizer, every=every) for one in left]
    fit = [one for one in whole if len(one["input_ids"]) <= length]
    made = encoded(talk, template, tokenizer, length, every)
    if fit:
        assert made["input_ids"] == fit[0]["input_ids"]
        assert made["labels"] == fit[0]["labels"]
        # The last answer is there to its end.
        assert runs(made)[-1] == runs(whole[-1])[-1]
    else:  # the last alone, cut as an instruction's record is
        plain = record_of(pairs[-2:])
        alone = templates.encode(plain, template, tokenizer, length)
        assert (made is None) == (alone is None)
        for name in alone or ():
            assert made[name] == alone[name]
    cut = made is not None and made["input_ids"] != whole[0]["input_ids"]
    assert made is None or templates.is_cut(made, template, tokenizer) == cut


def test_a_long_conversation_is_counted_as_truncated(configure, tmp_path):
    talk = LONG[:1] + 6 * LONG[1:3]
    rows = [{"messages": talk}, {"messages": LONG[:3]}, {"messages": LONG[1:2]}]
    put(rows * 4, tmp_path / "talks.jsonl")
    cfg = local(configure, tmp_path / "talks.jsonl", "train.seq_length=128")
    tokenizer = model.load_tokenizer("assets/tiny_llama")
    examples, dropped = dataset.draw(
        dataset.training_rows(cfg, 0),
        lambda row: client._encode(cfg, tasks.build(cfg), tokenizer, row),
        0,
        None,
    )
    assert (len(examples), dropped) == (8, 4)
    task = tasks.build(cfg)
    assert sum(task.is_cut(example, tokenizer) for example in examples) == 4
    assert all(len(one["input_ids"]) <= 128 for one in examples)


# --- the forms that people keep them in --------------------------------------------------------


def put(rows, path):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def local(configure, path, *overrides):
    """The checked configuration of one client with these records."""
    own = ["dataset=local", f"dataset.path={path}", "num_clients=1"]
    return configure(*own, "train.training_arguments.max_steps=1", *overrides)


SHARE = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
SHARED = [{"from": SHARE[m["role"]], "value": m["content"]} for m in TOOLS]
HELD = {
    "instruction": "Thanks.",
    "input": "",
    "output": "Welcome.",
    "messages": TOOLS[:-1],
}
# A row of the data, what names its column, the record.
FORMS = {
    "messages": ({"messages": TOOLS}, None, HELD),
    "beside other columns": (
        {"prompt": "What is it?", "messages": TOOLS, "id": 1},
        None,
        HELD,
    ),
    "ShareGPT": ({"conversations": SHARED}, None, HELD),
    "one": ({"conversation": TOOLS}, None, HELD),
    "named": ({"talk": SHARED, "output": "x"}, "talk", HELD),
    "as JSON": ({"messages": json.dumps(TOOLS)}, None, HELD),
    "what follows the last answer": (
        {"messages": [*TOOLS, says("user", "And?")]},
        None,
        HELD,
    ),
    "a weight of 0": (
        {
            "messages": [
                *TOOLS,
                says("user", "?"),
                says("assistant", "!") | {"weight": 0},
            ]
        },
        None,
        HELD,
    ),
    "TRL's text": (
        {"prompt": "What is it?", "completion": "So."},
        None,
        {"instruction": "What is it?", "input": "", "output": "So."},
    ),
    "TRL's messages": (
        {"prompt": TOOLS[:-1], "completion": TOOLS[-1:]},
        None,
        HELD
        | {
            "messages": [
                one | ({"weight": 0} if one["role"] == "assistant" else {})
                for one in TOOLS[:-1]
            ]
        },
    ),
    "text, where its columns are there": (
        {"instruction": "q", "input": "i", "output": "a", "messages": TOOLS},
        None,
        {"instruction": "q", "input": "i", "output": "a"},
    ),
}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_conversations_are_found_in_every_form(form, suffix, tmp_path):
    row, named, expected = FORMS[form]
    path = tmp_path / f"talks.{suffix}"
    put([row | {"category": "a"}] * 3, path)
    wanted = {"path": str(path), "label": "category"}
    cfg = Settings.of(wanted | {"columns": COLUMNS | {"messages": named}})
    rows = dataset._load(cfg, cfg.path, "dataset.path", label=True)
    assert rows["category"][:] == ["a"] * 3
    assert [dataset.to_record(r, cfg.columns) for r in rows] == [expected] * 3


def test_of_trls_messages_the_completion_alone_is_trained_on():
    tokenizer = model.load_tokenizer("assets/tiny_llama")
    record = record_of(LONG[:5], "prompt", completion=LONG[5:])
    assert record["output"] == "Yes"
    record = record_of(LONG[:3], "prompt", completion=LONG[3:])
    made = templates.encode(record, "chat", tokenizer, 1000, every=True)
    said = [tokenizer.decode(run).strip() for run in runs(made)]
    assert said == ["Two\n\nparts</s>", "Yes</s>"]


@pytest.mark.parametrize(
    "talk",
    [
        [],
        None,
        LONG[:2],
        [says("assistant", "Hello.")],
        [says("assistant", "Hello."), *LONG[1:3]],
        [*LONG[1:2], *LONG[1:3]],
        [*LONG[1:3], says("assistant", "And so.")],
        [*LONG[1:3], says("system", "Be long."), *LONG[3:5]],
        [says("user", "q"), says("assistant", " ")],
        [says("user", "q"), says("tool", "x"), says("assistant", "a")],
        [says("user", "q"), says("assistant", "a") | {"weight": 0}],
    ],
    ids=str,
)
def test_what_cannot_be_trained_on_is_dropped_and_counted(talk, configure, tmp_path):
    assert record_of(talk) == {"instruction": "", "input": "", "output": ""}
    put([{"messages": talk}] * 2 + [{"messages": LONG}] * 3, tmp_path / "talks.jsonl")
    rows = files.load(
        str(tmp_path / "talks.jsonl"), "dataset.path", [], None, (), COLUMNS
    )
    tokenizer = model.load_tokenizer("assets/tiny_llama")

    def encode(row):
        record = dataset.to_record(row, COLUMNS)
        return templates.encode(record, "alpaca", tokenizer, 200)

    examples, dropped = dataset.draw(rows, encode, 0, None)
    assert (len(examples), dropped) == (3, 2)


FAULTS = {
    "a role of nobody's": (
        [says("user", "q"), says("bot", "a")],
        "'messages', turn 2: the role 'bot' is unknown. Known: system, developer, user, human",
    ),
    "a role that is a number": ([says(1, "q")], "turn 1: the role 1 is unknown"),
    "content in parts": (
        [says("user", [{"type": "text", "text": "q"}]), LONG[2]],
        "'messages', turn 1: its content is of type list, and has to be text",
    ),
    "a number": (
        [LONG[1], says("assistant", 5)],
        "turn 2: its content is of type int, and has to be text",
    ),
    "ShareGPT's value": (
        [{"from": "human", "value": {"a": "q"}}],
        "turn 1: its value is of type dict",
    ),
    "other keys": (
        [{"speaker": "user", "text": "q"}],
        "turn 1: an object with role and content (or from and value)",
    ),
    "a text for a turn": (["q"], "turn 1: an object with role and content"),
    "a text": ("What is it?", "'messages' holds a text that is no list of turns"),
    "an object": ({"role": "user"}, "'messages' holds a value of type dict"),
    "a call of a tool": (
        [LONG[1], says("assistant", None) | {"tool_calls": [{"id": "1"}]}],
        "turn 2: it calls a tool. Write the call into its content",
    ),
    "half a character": ([LONG[1], says("assistant", "\ud800")], "half a character"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_no_conversation_is_named_with_its_line(case, tmp_path):
    value, message = FAULTS[case]
    path = tmp_path / "talks.jsonl"
    put([{"messages": LONG}, {"messages": value}], path)
    with pytest.raises(UserError) as told:
        files.load(str(path), "dataset.path", [], None, (), COLUMNS)
    assert f"{path}, line 2: " in str(told.value)
    assert message in str(told.value)
    assert len(str(told.value)) < 400


def test_a_text_column_that_holds_conversations_says_what_to_set(tmp_path):
    path = tmp_path / "talks.jsonl"
    put([{"talk": LONG}], path)
    with pytest.raises(UserError, match=r"columns\.messages=talk"):
        files.load(str(path), "dataset.path", ["output"], None, (), COLUMNS)
    named = COLUMNS | {"messages": "talks"}
    with pytest.raises(UserError, match=r"columns\.messages=talk"):
        files.load(str(path), "dataset.path", [], None, (), named)


def test_a_file_without_an_answer_is_refused(configure, tmp_path):
    put([{"messages": LONG[:2]}] * 3, tmp_path / "talks.jsonl")
    with pytest.raises(UserError, match="no conversation has an answer"):
        local(configure, tmp_path / "talks.jsonl")


# --- a dataset of the hub, nodes, held-out records ---------------------------------------------


def hub(folder, train, test):
    """A folder as a dataset of the hub is one, its parts named as UltraChat's."""
    folder.mkdir()
    for name, rows in (("train_sft", train), ("test_sft", test)):
        put(rows, folder / f"{name}.parquet")
    parts = "".join(
        f"  - split: {name}\n    path: {name}.parquet\n"
        for name in ("train_sft", "test_sft")
    )
    head = f"---\nconfigs:\n- config_name: default\n  data_files:\n{parts}---\n"
    (folder / "README.md").write_text(head)


def test_a_dataset_of_the_hub_is_read_in_the_split_that_is_named(configure, tmp_path):
    rows = [
        {"prompt": f"{i}?", "messages": [says("user", f"{i}?"), *LONG[2:]], "id": i}
        for i in range(9)
    ]
    hub(tmp_path / "chats", rows[:7], rows[7:])
    cfg = configure(
        "dataset=ultrachat",
        f"dataset.name={tmp_path}/chats",
        "evaluate.exact_match=true num_clients=2 dataset.template=chat",
    )
    parts = [dataset.load_partition(cfg, i) for i in range(2)]
    found = [dataset.to_record(row, cfg.dataset.columns) for p in parts for row in p]
    assert sorted(one["messages"][0]["content"] for one in found) == [
        f"{i}?" for i in range(7)
    ]
    assert {one["output"] for one in found} == {"Yes"}
    asked, _ = dataset.load_test(cfg)
    assert [one["messages"][0]["content"] for one in asked] == ["7?", "8?"]


def test_a_row_of_the_hub_that_is_no_conversation_is_named(configure, tmp_path):
    rows = [{"messages": LONG}, {"messages": [says("nobody", "a")]}]
    hub(tmp_path / "strange", rows * 3, rows)
    with pytest.raises(UserError, match=r"strange: .*'nobody' is unknown"):
        configure(
            "dataset=ultrachat", f"dataset.name={tmp_path}/strange", "num_clients=1"
        )


def test_a_node_names_its_column_of_conversations(tmp_path, monkeypatch):
    put([{"gespraech": SHARED}] * 12, tmp_path / "talks.jsonl")
    node = {"data-path": str(tmp_path / "talks.jsonl"), "cpus": 1}
    told = {"overrides": "experiment=quickstart num_clients=2", "run": "1"}
    monkeypatch.chdir(tmp_path)
    cfg, partition = permit.settle(told, node | {"column-messages": "gespraech"})
    row = dataset.load_partition(cfg, partition)[0]
    assert dataset.to_record(row, cfg.dataset.columns) == HELD
    with pytest.raises(Refusal):
        permit.settle(told, node)


def test_conversations_that_begin_alike_and_ask_otherwise_are_told_apart():
    same, other = LONG[:5], [*LONG[:3], *LONG[5:]]
    rows = [conversations.row({"m": t}, ("m",), COLUMNS) for t in [same, other] * 3]
    cfg = Settings.of(
        {"dataset": {"columns": COLUMNS}, "evaluate": {"holdout": 0.5}, "seed": 0}
    )
    train, held = dataset.split(cfg, Dataset.from_list(rows))
    assert (len(train), len(held)) == (3, 3)
    assert set(train[conversations.TURNS]).isdisjoint(held[conversations.TURNS])


def test_questions_that_are_trained_on_are_found_among_conversations(
    configure, tmp_path, capsys
):
    put([{"messages": t} for t in (LONG, LONG[1:3], TOOLS)], tmp_path / "train.jsonl")
    put([{"messages": t} for t in (LONG, LONG[1:5])], tmp_path / "test.jsonl")
    local(
        configure,
        tmp_path / "train.jsonl",
        f"dataset.test_path={tmp_path}/test.jsonl evaluate.exact_match=true",
    )
    said = capsys.readouterr().out
    assert "1 of 2 test questions also stand in the training data" in said


def test_a_test_conversation_may_have_answers_to_choose_from(configure, tmp_path):
    for name, right in (("train", "Aye"), ("test", "Yes")):
        talk = [*LONG[:-1], says("assistant", right)]
        row = {"messages": talk, "choices": ["No", right]}
        put([row] * 2, tmp_path / f"{name}.jsonl")
    cfg = local(
        configure,
        tmp_path / "train.jsonl",
        f"dataset.test_path={tmp_path}/test.jsonl train.seq_length=256",
    )
    cfg["evaluate"] = cfg.evaluate | {"choices": "choices"}
    kept, out = dataset.scorable(cfg, model.load_tokenizer("assets/tiny_llama"))
    assert out == 0
    assert [(record["output"], offered) for record, offered, _ in kept] == [
        ("Yes", ["No", "Yes"])
    ] * 2
    # Scored on the last answer alone.
    assert [len(runs(example)) for *_, example in kept] == [1, 1]


def test_a_plan_tells_the_lengths_of_conversations(configure):
    told = heterogeneity.describe(configure("dataset=tiny_chat"))
    shortest, longest = told["summary"]["median_tokens"]
    assert 50 < shortest <= longest < 200
    assert sum(client["records"] for client in told["clients"]) == 96


def test_conversations_are_clustered_by_what_is_asked_and_answered():
    words = ["cat dog horse", "sum plus three"]
    rows = [
        conversations.row(
            {"m": [says("user", w), says("assistant", w)]}, ("m",), COLUMNS
        )
        for w in words * 6
    ]
    dealer = ClusterPartitioner(2, COLUMNS | {"messages": "m"}, 2, 1.0, 1)
    dealer.dataset = Dataset.from_list(rows)
    parts = [dealer.load_partition(i) for i in range(2)]
    pairs = {(row["cluster"], row["instruction"]) for part in parts for row in part}
    assert len(pairs) == 2


# --- asking -------------------------------------------------------------------------------------


def test_a_chat_begins_with_what_the_system_says():
    tokenizer = model.load_tokenizer("assets/tiny_llama")
    turns = [ask.begun("q", "Be short.") | {"output": "a"}, ask.begun("r", "")]
    talk = [says("system", "Be short."), says("user", "q"), says("assistant", "a")]
    for template in templates.TEMPLATES:
        told = templates.messages(template, turns)
        assert told == [*talk, says("user", "r")]
        made = encoded([*told, says("assistant", "b")], template, tokenizer)
        ids = templates.prompt(template, turns, tokenizer)
        assert made["input_ids"][: len(ids)] == ids
    assert ask.begun("q", "") == {"instruction": "q", "input": ""}


@pytest.mark.parametrize(
    "words", ["--file=a --system=b", "--question=a --input=b --system=c"]
)
def test_a_system_message_goes_before_a_chat_alone(words, capsys):
    with pytest.raises(SystemExit):
        ask.parse(["--peft-path=x", *words.split()])
    assert "--system goes with" in capsys.readouterr().err


TEXTS = {"instruction": "q", "input": "i", "output": "a"}


@pytest.mark.parametrize(
    ("row", "trained", "columns", "expected"),
    [
        ({"messages": LONG}, {}, None, COLUMNS),
        ({"messages": LONG}, TEXTS, None, COLUMNS),
        ({"talk": LONG}, {"messages": "talk"}, None, COLUMNS | {"messages": "talk"}),
        ({"talk": LONG}, {}, "messages=talk", COLUMNS | {"messages": "talk"}),
        ({"prompt": "q", "completion": "a"}, {}, None, COLUMNS),
        (TEXTS, {"messages": "talk"}, None, COLUMNS),
        (
            {"q": "x", "a": "y", "messages": LONG},
            TEXTS,
            None,
            TEXTS | {"input": None, "messages": None},
        ),
        (
            {"q": "x", "messages": LONG},
            {},
            "instruction=q",
            {"instruction": "q", "input": None, "output": None, "messages": None},
        ),
    ],
)
def test_a_file_of_questions_may_be_conversations(
    row, trained, columns, expected, tmp_path
):
    path = tmp_path / "asked.json"
    put([row], path)
    plain = {name: name for name in TEXTS}  # as an older adapter has them
    options = Namespace(file=str(path), columns=columns)
    assert ask.columns_of(options, plain | trained) == expected


# --- end to end ----------------------------------------------------------------------------------


def test_both_ways_of_training_on_turns_are_settings(configure):
    row = {"messages": json.dumps(LONG)}
    tokenizer = model.load_tokenizer("assets/tiny_llama")
    rows = conversations.row(row, ("messages",), COLUMNS)
    for turns, count in (("all", 3), ("last", 1)):
        cfg = configure(
            "dataset=tiny_chat dataset.template=chat train.seq_length=256",
            f"train.assistant_turns={turns}",
        )
        assert (
            len(runs(client._encode(cfg, tasks.build(cfg), tokenizer, rows))) == count
        )
    with pytest.raises(UserError, match="take all or last"):
        configure("train.assistant_turns=first")


@pytest.mark.slow
def test_a_run_on_conversations_trains_evaluates_answers_and_is_exported(
    loopback, tmp_path, monkeypatch, capsys
):
    words = (
        "experiment=quickstart dataset=tiny_chat dataset.template=chat num_clients=4 "
        "num_rounds=2 strategy.fraction_fit=1 strategy.fraction_evaluate=1 "
        "train.training_arguments.max_steps=4"
    )

    def said(command, *words: str) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["command", *words])
        command()
        return capsys.readouterr().out

    record(config := compose(words), words.split(), run := tmp_path / "run")
    cfg = preflight.check(config)
    rounds.run(cfg, loopback(cfg, folder=run), run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test_loss_after"] < summary["test_loss_before"]
    history = json.loads((run / "history.json").read_text())["rounds"]
    assert history[-1]["eval_loss"] > 0
    folder = f"--peft-path={run}/peft_2"
    test = f"--file={PROJECT}/assets/tiny_chat/test.jsonl"
    said(ask.main, folder, test, f"--out={tmp_path}/answers.json")
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert answers["questions"] == 48
    assert answers["scores"]["tuned"]["test_loss"] == summary["test_loss_after"]
    question = "--question=What is 1 plus 1?"
    told = said(ask.main, folder, question, "--system=Be short.")
    assert told.startswith("Q: What is 1 plus 1?\nA: ")
    said(export.main, folder, f"--out={tmp_path}/made")
    tokenizer = model.load_tokenizer(str(tmp_path / "made"))
    ids = tokenizer.apply_chat_template(LONG, return_dict=False)
    made = encoded(LONG, "chat", model.load_tokenizer("assets/tiny_llama"))
    assert ids[: len(made["input_ids"])] == made["input_ids"]
