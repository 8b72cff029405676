"""pytest tests/test_templates.py: any text, in any template, with many kinds of tokenizer.

Hypothesis writes the records, with what could be mistaken for the template among it. Where
an answer ends in a chat is held against transformers' own mask of what the assistant says.
"""

import copy
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import model
from assets.testbed.families import FRAMES, NAMES, STYLES, chatting, family, framed
from records import templates
from utils import IGNORED, PROJECT, UserError

SPECIAL = ["<s>", "</s>", "<|start|>", "<|end|>", "<|eot|>"]
# In the manner of Llama 3: trims what it is given, and its special tokens are not among
# those that a tokenizer has a name for.
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n"
    "{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
MISTAKABLE = [
    *SPECIAL,
    *("<|st", "art|>", "<", "/s>", templates.MARK),
    *("### Response:\n", "ASSISTANT:", "{{ bos_token }}", "\n\n", " "),
]
PIECE = st.one_of(st.text(max_size=20), st.sampled_from(MISTAKABLE))
TEXT = st.lists(PIECE, max_size=6).map("".join)
RECORDS = st.fixed_dictionaries({"instruction": TEXT, "input": TEXT, "output": TEXT})
# Of what spells no special token: a server takes it for one, and training does not.
WORDING = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from([p for p in MISTAKABLE if not set("<>\ufdd0") & set(p)]),
    ),
    max_size=6,
).map("".join)
SAID = st.fixed_dictionaries(dict.fromkeys(("instruction", "input", "output"), WORDING))
PLAIN = {"instruction": "a", "input": "b", "output": "c"}


def byte_level() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([CHAT, "\n\n\n\n", "</s>"] * 9, trainer)
    bpe.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-fallback": model.load_tokenizer("assets/tiny_llama"),
}


def specials(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    added = tokenizer.added_tokens_decoder
    return [i for i in ids if i in added and added[i].special]


@pytest.mark.parametrize("template", templates.TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(record=RECORDS, seq_length=st.integers(1, 400))
@example(PLAIN | {"output": "an HTML tag: <s>old</s>"}, 400)
@example(PLAIN | {"input": "</s>\n\nUSER: <|start|>", "output": "</s>"}, 400)
@example(PLAIN | {"output": "\x00"}, 400)
def test_any_text_is_an_example_or_a_skip(kind, template, record, seq_length):
    tokenizer = TOKENIZERS[kind]
    question = {"instruction": record["instruction"], "input": record["input"]}
    before = templates.prompt(template, [question], tokenizer)
    made = templates.encode(record, template, tokenizer, seq_length)
    if made is None:
        assert not record["output"].strip() or len(before) >= seq_length
        return

    ids, labels = made["input_ids"], made["labels"]
    assert len(ids) == len(labels) <= seq_length
    assert ids[: len(before)] == before
    assert labels == [IGNORED] * len(before) + ids[len(before) :]
    assert len(ids) > len(before)

    # What the record says is never a special token: those are the template's, and the end.
    plain = {"instruction": "a", "input": "b" if question["input"] else ""}
    expected = specials(templates.prompt(template, [plain], tokenizer), tokenizer)
    assert specials(before, tokenizer) == expected
    # CHAT, of byte-level, ends an answer with a token of its own.
    own = kind == "byte-level" and template == "chat"
    end = tokenizer.convert_tokens_to_ids("<|eot|>" if own else "</s>")
    whole = ids[-1] == end
    answer = ids[len(before) : len(ids) - whole]
    assert specials(answer, tokenizer) == []
    assert whole or len(ids) == seq_length

    # The labels are the answer, to the letter; a cut one is its beginning.
    text = tokenizer.decode(answer)
    wanted = record["output"]
    if kind == "byte-fallback":  # its space is ▁, and the first one is its own
        text, wanted = text.strip(), wanted.replace("▁", " ").strip()
    elif template != "alpaca":  # the space after ASSISTANT:, or what the template trims
        text, wanted = text.strip(), wanted.strip()
    if whole:
        assert text == wanted
    else:
        assert wanted.startswith(text.rstrip("\ufffd"))


@pytest.mark.parametrize("template", ["alpaca", "vicuna"])
def test_what_spells_a_special_token_is_text_in_every_turn(template):
    tokenizer = TOKENIZERS["byte-level"]
    turns = [
        {"instruction": "</s>", "input": "<s>", "output": "<|eot|>"},
        {"instruction": "<|end|>", "input": ""},
    ]
    ids = templates.prompt(template, turns, tokenizer)
    text = templates.text(template, turns, tokenizer)
    assert tokenizer.decode(ids) == f"<s>{text}"
    assert tokenizer.convert_ids_to_tokens(specials(ids, tokenizer)) == ["<s>", "</s>"]


# --- what a tokenizer adds -----------------------------------------------------------------


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("name", ["byte-level", "metaspace", "unigram", "wordpiece"])
def test_what_a_tokenizer_puts_behind_a_text_is_not_in_a_prompt(name, frame):
    raw = family(name)
    plain = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    tokenizer = framed(raw, frame)
    begun = [0] * frame.split("$A")[0].count("<s>")
    for template in ("alpaca", "vicuna"):
        asked = templates.question(PLAIN)
        text = templates.text(template, [asked], tokenizer)
        expected = begun + plain(text, add_special_tokens=False)["input_ids"]
        assert templates.prompt(template, [asked], tokenizer) == expected
        made = templates.encode(PLAIN, template, tokenizer, 400)
        assert made["input_ids"][: len(expected)] == expected
        assert made["input_ids"].count(1) == 1  # the end, and it is last
        assert made["labels"][-1] == 1
        turns = [PLAIN, asked]
        two = templates.prompt(template, turns, tokenizer)
        assert two[: len(begun)] == begun
        assert two.count(1) == 1  # of the first turn's answer


# --- the templates against the words that they were written in before they were files ---------


def in_python(template: str, turns: list[templates.Record], end: str) -> str:
    """Alpaca's and Vicuna's texts, built without jinja."""
    text = "" if template == "alpaca" else VICUNA
    for turn in turns:
        if template == "vicuna":
            asked = "\n".join(filter(None, (turn["instruction"], turn["input"])))
            text += f"USER: {asked} ASSISTANT:"
            text += f" {turn['output']}{end}" if "output" in turn else ""
            continue
        text += "Below is an instruction that describes a task"
        if turn["input"]:
            text += ", paired with an input that provides further context"
        text += ". Write a response that appropriately completes the request.\n\n"
        text += f"### Instruction:\n{turn['instruction']}\n\n"
        if turn["input"]:
            text += f"### Input:\n{turn['input']}\n\n"
        text += "### Response:\n"
        text += f"{turn['output']}{end}\n\n" if "output" in turn else ""
    return text


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@pytest.mark.parametrize("template", ["alpaca", "vicuna"])
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(earlier=st.lists(RECORDS, max_size=2), last=RECORDS)
@example([], {"instruction": "", "input": "", "output": ""})
@example([PLAIN], {"instruction": "", "input": "b", "output": " c"})
@example([], {"instruction": "{% endif %}{{ eos_token }}", "input": "", "output": "{#"})
def test_a_template_says_to_the_letter_what_it_said(template, earlier, last):
    tokenizer = TOKENIZERS["byte-fallback"]
    turns = [*earlier, templates.question(last)]
    assert templates.text(template, turns, tokenizer) == in_python(
        template, turns, "</s>"
    )
    assert templates.around(template, tokenizer)[0] == (
        " " if template == "vicuna" else ""
    )
    assert templates.end(template, tokenizer) == ("", tokenizer.eos_token_id)


# SHA-256 of all examples of the shipped training data, as they were before the templates were
# files.
RECORDED = {
    "alpaca": "b5d974fa5a663ca1a668dbbcfaafd7c9ffa7e84463ac7d07c3eafe7407005a6c",
    "vicuna": "06a614271c7603086140b22fd18bba4bfaf29bae9a346fde1b5247e383260d71",
    "chat": "4e630a80ce06e08c17abecc7f7cdb2e8695551107199ddcf1e8d54f4718aea7c",
}


@pytest.mark.parametrize("template", RECORDED)
def test_the_shipped_data_has_the_recorded_token_ids(template):
    lines = (PROJECT / "assets/tiny_qa/train.jsonl").read_text().splitlines()
    made = [
        templates.encode(json.loads(line), template, TOKENIZERS["byte-fallback"], 512)
        for line in lines[::10]
    ]
    found = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    assert found == RECORDED[template]


# --- what is saved with an adapter -------------------------------------------------------------


def saved(tokenizer: PreTrainedTokenizerBase, template: str, folder: Path):
    """The tokenizer of an adapter's folder, opened as others open it."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = templates.chat_template(template, tokenizer)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """As saved, by kind and template."""
    return {
        (kind, template): saved(tokenizer, template, tmp_path_factory.mktemp("saved"))
        for kind, tokenizer in TOKENIZERS.items()
        for template in templates.TEMPLATES
    }


@pytest.mark.parametrize("template", templates.TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(earlier=st.lists(SAID, max_size=2), last=SAID)
@example([], {"instruction": "a", "input": "", "output": ""})
@example([PLAIN, PLAIN | {"input": ""}], PLAIN)
def test_a_server_asks_in_the_tokens_of_training(served, kind, template, earlier, last):
    tokenizer = TOKENIZERS[kind]
    turns = [*earlier, templates.question(last)]
    asked = served[kind, template].apply_chat_template(
        templates.messages(template, turns),
        add_generation_prompt=True,
        return_dict=False,
    )
    assert asked == templates.prompt(template, turns, tokenizer)


@pytest.mark.parametrize("frame", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("name", ["byte-level", "metaspace", "unigram", "wordpiece"])
def test_a_server_asks_so_with_every_family_of_tokenizers(
    name, frame, tmp_path, caplog
):
    tokenizer = framed(family(name), FRAMES[frame])
    for template in ("alpaca", "vicuna"):
        opened = saved(tokenizer, template, tmp_path / template)
        for turns in (
            [templates.question(PLAIN)],
            [PLAIN, PLAIN, {**PLAIN, "input": ""}],
        ):
            turns = [*turns[:-1], templates.question(turns[-1])]
            asked = opened.apply_chat_template(
                templates.messages(template, turns),
                add_generation_prompt=True,
                return_dict=False,
            )
            assert asked == templates.prompt(template, turns, tokenizer)
    assert not caplog.records


def test_saving_leaves_the_tokenizer_of_training_as_it_is():
    tokenizer = byte_level()
    templates.chat_template("alpaca", tokenizer)
    assert tokenizer.chat_template == CHAT
    assert templates.chat_template("chat", tokenizer) == CHAT


# --- how a chat template ends an answer ------------------------------------------------------

CHATTING = {
    special: {style: chatting(special) for style in STYLES} for special in (False, True)
}
# Of what spells no special token, as for servers above: hypothesis knows the names by now.
WORDS = st.text(max_size=30).map(str.strip).filter(bool)
WORDS = WORDS.filter(lambda words: not any(name in words for name in NAMES))


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(asked=WORDS, said=WORDS)
@example("What is it?", "It is so.")
@example("Two\n\n\n\nparts", "Two\n\nparts")
def test_labels_are_what_transformers_says_the_assistant_said(
    style, special, asked, said
):
    tokenizer = CHATTING[special][style]
    tokenizer.chat_template, end = STYLES[style]
    assume(templates.MARK not in asked + said)
    turns = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": said},
    ]
    theirs = tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = theirs["input_ids"], theirs["assistant_masks"]
    last = len(mask) - mask[::-1].index(1)  # what comes after it nobody answers

    record = {"instruction": asked, "input": "", "output": said}
    made = templates.encode(record, "chat", tokenizer, 10_000)
    assert made["input_ids"] == ids[:last]
    assert made["labels"] == [
        token if said else IGNORED
        for token, said in zip(ids[:last], mask[:last], strict=True)
    ]
    assert made["labels"][-1] == tokenizer.convert_tokens_to_ids(end)
    assert not templates.is_cut(made, "chat", tokenizer)
    cut = templates.encode(record, "chat", tokenizer, last - 1)
    assert cut is None or templates.is_cut(cut, "chat", tokenizer)


@pytest.mark.parametrize("own", [None, 0, [0], [0, 2]])
@pytest.mark.parametrize("style", STYLES)
def test_an_answer_is_over_at_the_templates_end_the_tokenizers_and_the_bases(
    style, own
):
    tokenizer = CHATTING[True][style]
    tokenizer.chat_template, end = STYLES[style]
    base = GenerationConfig(eos_token_id=own)
    eos, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", end])
    bases = {own} if isinstance(own, int) else set(own or ())
    assert set(templates.ends("chat", tokenizer, base)) == {eos, turn} | bases
    assert set(templates.ends("alpaca", tokenizer, base)) == {eos} | bases
    assert templates.end("vicuna", tokenizer) == ("", eos)


# --- chat templates that cannot be used --------------------------------------------------------

GOOD = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
# What is wrong, the template, a part of the message.
UNFIT = {
    "wants a system message": (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system needed') }}"
        "{% endif %}" + GOOD,
        "fails (TemplateError: system needed)",
    ),
    "no end": ("{{ ", "fails (TemplateSyntaxError"),
    "a name that is not there": ("{{ nothing.at.all }}", "fails (UndefinedError"),
    "a filter that is not there": ("{{ messages | nothing }}", "No filter named"),
    "reaches out": (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}" + GOOD,
        "fails (SecurityError",
    ),
    "another type": ("{{ messages + 1 }}", "fails (TypeError"),
    "a division by zero": ("{{ 1 / 0 }}", "fails (ZeroDivisionError"),
    "a range without end": (
        "{% for i in range(10 ** 12) %}{% endfor %}",
        "OverflowErr",
    ),
    "calls itself": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "RecursionError",
    ),
    "a long cause": (
        "{{ raise_exception('no ' * 10000) }}",
        "fails (TemplateError: no",
    ),
    "wants parts": (
        "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
        "{% endfor %}",
        "loses the question or the answer",
    ),
    "says nothing": ("{{ bos_token }}", "loses the question"),
    "only the last": ("{{ messages[-1]['content'] }}", "loses the question"),
    "only the user": (
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
        "loses the question or the answer",
    ),
    "the other way round": (
        "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}",
        "loses the question or the answer",
    ),
    "half of it": (
        "{% for m in messages %}{{ m['content'][:8] }}{% endfor %}",
        "loses the question or the answer",
    ),
    "as HTML": (
        "{% for m in messages %}{{ m['content'] | e }}{% endfor %}",
        "loses the question or the answer",
    ),
    "as JSON": (
        "{% for m in messages %}{{ m['content'] | tojson }}{% endfor %}",
        "loses the question or the answer",
    ),
    "in one line": (
        "{% for m in messages %}{{ m['content'].split() | join(' ') }}{% endfor %}",
        "loses the question or the answer",
    ),
    "in capitals": (
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "loses the question or the answer",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_chat_template_that_cannot_be_used_is_refused(case):
    tokenizer = byte_level()
    tokenizer.chat_template, message = UNFIT[case]
    with pytest.raises(UserError) as told:
        templates.check_template("chat", tokenizer)
    assert message in str(told.value)
    assert len(str(told.value)) < 300
    assert "\n" not in str(told.value)
    templates.check_template("alpaca", tokenizer)


@pytest.mark.parametrize(
    "template", [GOOD, CHAT, *(text for text, _ in STYLES.values())]
)
def test_a_chat_template_that_says_all_is_taken(template):
    tokenizer = CHATTING[True]["chatml"]
    tokenizer.chat_template = template
    templates.check_template("chat", tokenizer)
