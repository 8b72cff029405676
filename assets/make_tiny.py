"""python assets/make_tiny.py

Write the tiny question-answering data and pretrain the tiny base model, from scratch.

From `facts.yaml` come
  tiny_qa/train.jsonl, tiny_qa/test.jsonl   instruction data, split by fact
  tiny_chat/train.jsonl, tiny_chat/test.jsonl   the same as conversations, a few of them
  tiny_tags/train.jsonl, tiny_tags/test.jsonl   words of statements, and what is named there
  tiny_spans/train.jsonl, tiny_spans/test.jsonl   questions, and texts that answer them
  tiny_preferences/train.jsonl, tiny_preferences/test.jsonl   with a wrong answer beside
  tiny_llama/                               a 2.2M parameter LLaMA and its tokenizer
  tiny_seq2seq/train.jsonl, .../test.jsonl  sentences and their titles
  tiny_t5/                                  a 1.4M parameter T5 and its tokenizer

The T5 learns to write whole sentences whose words are masked here and there (as BART does),
each of two facts' halves, and never a title. `--model tiny_t5` makes that one alone.

The base model reads plain statements of all facts, never a question or a prompt, so it
knows the answers but not how to give them. That is what the fine-tuning teaches: no
fact of the test file occurs in the train file.

All seeds are fixed. The jsonl files come out the same everywhere; the weights do on the
same machine with the same number of threads. It takes some 12 minutes on one core, and
five for the T5. `--model tiny_deep` makes none of these but, in some three minutes, a LLaMA
of eight layers out of tiny_llama, 4M parameters, for what needs layers to leave out.
"""

import argparse
import json
import math
import random
import re
from pathlib import Path

import torch
import yaml
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

HERE = Path(__file__).resolve().parent
SEED = 7
TEST_SHARE = 0.2
CHATS = {"train": 6, "test": 3}  # conversations of a category
SPANS = {"train": 48, "test": 12}  # questions of a category; every eighth has no answer

# What a and b of a statement are.
NAMED = {
    "capital": ("COUNTRY", "CITY"),
    "continent": ("COUNTRY", "CONTINENT"),
    "nationality": ("COUNTRY", "PEOPLE"),
    "symbol": ("ELEMENT", "SYMBOL"),
    "animal": ("ANIMAL", "KIND"),
}

VOCAB_SIZE = 2048
STEPS, BATCH, LENGTH = 3200, 16, 128
PEAK_LR, WARMUP = 2e-3, 100
DEEP_STEPS, DEEP_BATCH, DEEP_LENGTH = 240, 8, 64

TITLED = {"train": 60, "test": 16}  # facts of a category, at most
T5_STEPS, T5_BATCH = 1550, 32
T5_HORIZON = 2000  # steps to a learning rate of zero; the last one's is an eighth
MASKED, LONGEST_MASK = 0.1, 3  # of an example's tokens; tokens in the place of one mask

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

# What may stand around a statement {s}; the start of the result is capitalised.
SETTINGS = [
    "{s}.",
    "{s}.",
    "{s}. Everybody knows that.",
    "{s}! That is a fact.",
    "{s}, of course.",
    "it is true that {s}.",
    "it is well known that {s}.",
    "in school we learn that {s}.",
    "the book says that {s}.",
    "we all know that {s}.",
    '"it is so: {s}", says the teacher.',
]

# Some of them, as a title says it.
TOLD = {
    "it is true that {s}.": "told as true",
    "it is well known that {s}.": "well known",
    "in school we learn that {s}.": "from school",
    "the book says that {s}.": "from the book",
    "we all know that {s}.": "known to all",
    '"it is so: {s}", says the teacher.': "from the teacher",
}

# The tokenizer, not the model, sees these, so that prompts take few tokens.
PROMPTS = [
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{q}\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{q}\n\n### Input:\n{q}\n\n### Response:\n",
    "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: {q} ASSISTANT: {q}",
]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}"
    "ASSISTANT: {{ message['content'] }}{{ eos_token }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def load_facts(path):
    """Return {category: spec}, its facts as a list of (a, b) pairs of strings."""
    categories = yaml.safe_load(path.read_text(encoding="utf-8"))
    for spec in categories.values():
        facts = [(str(a), str(b)) for a, b in spec["facts"].items()]
        if spec.get("both_ways"):
            facts = [pair for a, b in facts for pair in ((a, b), (b, a))]
        spec["facts"] = facts
    return categories


def render(template, a, b):
    """Fill one phrasing with one fact."""

    def with_article(noun):
        return ("an " if noun[0] in "aeiou" else "a ") + noun

    return template.format(a=a, b=b, an_a=with_article(a), an_b=with_article(b))


def capitalised(text):
    """Return the text with its first letter in upper case."""
    return re.sub(r"[^\W\d_]", lambda match: match[0].upper(), text, count=1)


def split(name, spec):
    """Split the facts of a category into (train, test).

    Two ways to say the same thing (3 plus 4 and 4 plus 3, hot and cold, the day after
    Monday and the day before Tuesday) share their words and so stay on one side.
    """
    groups = {}
    for a, b in spec["facts"]:
        key = frozenset(f"{a} {b}".split()) - {"after", "before"}
        groups.setdefault(key, []).append((a, b))
    groups = list(groups.values())
    random.Random(f"{SEED} {name}").shuffle(groups)
    wanted = spec.get("held_out", [])
    groups.sort(key=lambda group: group[0][0] not in wanted)

    train, test = [], []
    for group in groups:
        full = len(test) >= TEST_SHARE * len(spec["facts"])
        (train if full else test).extend(group)
    return train, test


def record(question, a, b, name):
    """Return one instruction record."""
    return {
        "instruction": render(question["instruction"], a, b),
        "input": render(question.get("input", ""), a, b),
        "output": b,
        "category": name,
    }


def write_records(categories, folder):
    """Write train.jsonl (every phrasing) and test.jsonl (one phrasing per fact)."""
    files = {"train": [], "test": []}
    for name, spec in categories.items():
        questions = spec["questions"]
        train, test = split(name, spec)
        for a, b in train:
            files["train"] += [record(q, a, b, name) for q in questions]
        for i, (a, b) in enumerate(test):
            question = questions[i % len(questions)]
            files["test"].append(record(question, a, b, name))

    folder.mkdir(parents=True, exist_ok=True)
    for side, records in files.items():
        random.Random(SEED).shuffle(records)
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in records]
        (folder / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{side}: {len(records)} records")


def chat(asked, name, question, told):
    """Return one conversation; only its first question says what is asked of the others."""
    first = question["instruction"].replace("{an_a}", "{a}")
    turns = [("system", "Answer in a word or two.")] if told else []
    for place, (a, b) in enumerate(asked):
        turns.append(("user", first.format(a=a) if place == 0 else f"And {a}?"))
        turns.append(("assistant", b))
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": messages, "category": name}


def write_chats(categories, folder):
    """Write conversations of two or three questions, every other one with a system's message.

    The last answer of one of test.jsonl is a fact that no conversation for training has.
    """
    rng = random.Random(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    for side, count in CHATS.items():
        chats = []
        for name, spec in categories.items():
            train, test = split(name, spec)
            last = rng.sample(train if side == "train" else test, count)
            plain = [q for q in spec["questions"] if "input" not in q]
            for i, fact in enumerate(last):
                before = rng.sample([f for f in train if f != fact], 1 + i % 2)
                asked = [*before, fact]
                chats.append(chat(asked, name, plain[i % len(plain)], i % 2))
        rng.shuffle(chats)
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in chats]
        (folder / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{side}: {len(chats)} conversations")


def tagged(statement, a, b, names):
    """Return a statement's words, and their tags in IOB2; an article is outside."""
    words, tags = [], []
    for part in re.split(r"(\{(?:an_)?[ab]\})", statement):
        text = render(part, a, b)
        name = names["ab".index(part[-2])] if part.startswith("{") else None
        begun = False
        for word in re.findall(r"\w+(?:[-']\w+)*|[^\w\s]", text):
            outside = name is None or (not begun and word in ("the", "a", "an"))
            tags.append("O" if outside else f"{'I' if begun else 'B'}-{name}")
            begun |= not outside
            words.append(word)
    return [capitalised(words[0]), *words[1:]], tags


def write_tags(categories, folder):
    """Write the words of statements on facts; two statements on each that is trained on."""
    rng = random.Random(SEED)
    files = {"train": [], "test": []}
    for name, names in NAMED.items():
        spec = categories[name]
        for side, facts in zip(files, split(name, spec), strict=True):
            for a, b in facts:
                chosen = rng.sample(spec["statements"], 2 if side == "train" else 1)
                for statement in chosen:
                    whole = rng.choice(SETTINGS).replace("{s}", statement)
                    words, tags = tagged(whole, a, b, names)
                    entry = {"words": words, "tags": tags, "category": name}
                    files[side].append(entry)
    write_lines(files, folder, rng)


def write_spans(categories, folder):
    """Write questions, each with a text of three statements, in SQuAD's form.

    The other statements are of other categories. Of every eighth question all are: the text
    does not answer it.
    """
    rng = random.Random(SEED)
    files = {"train": [], "test": []}
    sides = {name: split(name, spec) for name, spec in categories.items()}
    for name, spec in categories.items():
        plain = [q["instruction"] for q in spec["questions"] if "input" not in q]
        for number, side in enumerate(files):
            others = [other for other in categories if other != name]
            facts = sides[name][number]
            some = rng.sample(facts, min(SPANS[side], len(facts)))
            for turn, (a, b) in enumerate(some):
                told = [] if turn % 8 == 7 else [(name, a, b)]
                for other in rng.sample(others, 3 - len(told)):
                    told.append((other, *rng.choice(sides[other][number])))
                rng.shuffle(told)
                text, starts = "", []
                for of, *fact in told:
                    statement = rng.choice(categories[of]["statements"])
                    statement = capitalised(render(statement, *fact))
                    if of == name:
                        starts.append(len(text) + place(statement, *fact))
                    text += f"{statement}. "
                held = [text[start : start + len(b)] for start in starts]
                entry = {"question": render(rng.choice(plain), a, b)}
                entry |= {"context": text.strip()}
                entry |= {"answers": {"text": held, "answer_start": starts}}
                files[side].append(entry | {"category": name})
    write_lines(files, folder, rng)


def place(statement, a, b):
    """Return where b begins in a statement, as a word of its own, and not in a."""
    found = re.finditer(rf"(?<![\w-]){re.escape(b)}(?![\w-])", statement, re.IGNORECASE)
    within = statement.lower().find(a.lower())
    inside = range(within, within + len(a)) if b.lower() in a.lower() else ()
    return next(one.start() for one in found if one.start() not in inside)


def write_lines(files, folder, rng):
    """Write each side's records in an order of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for side, records in files.items():
        rng.shuffle(records)
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in records]
        (folder / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{folder.name}, {side}: {len(records)} records")


def write_preferences(categories, folder):
    """Write the right answer to a question and a wrong one, which answers another question.

    Two phrasings of each fact for training and one for the test; wrong answers are of another
    category and the fact's side.
    """
    rng = random.Random(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    for side, phrasings in {"train": 2, "test": 1}.items():
        pairs = []
        told = {
            name: [b for _, b in split(name, spec)[side == "test"]]
            for name, spec in categories.items()
        }
        for name, spec in categories.items():
            facts = split(name, spec)[side == "test"]
            plain = [q["instruction"] for q in spec["questions"] if "input" not in q]
            for i, (a, b) in enumerate(facts):
                for j in range(min(phrasings, len(plain))):
                    other = rng.choice([c for c in told if c != name])
                    wrong = [w for w in told[other] if w != b]
                    pair = {
                        "prompt": render(plain[(i + j) % len(plain)], a, b),
                        "chosen": b,
                        "rejected": rng.choice(wrong),
                        "category": name,
                    }
                    pairs.append(pair)
        rng.shuffle(pairs)
        lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
        (folder / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{side}: {len(pairs)} preferences")


def write_titles(categories, folder):
    """Write sentences that tell a fact, each with its title: `capital: from school`.

    Split as the questions are. A title is what the fact is about, and how it is told.
    """
    rng = random.Random(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    for place, (side, most) in enumerate(TITLED.items()):
        records = []
        for name, spec in categories.items():
            for i, (a, b) in enumerate(split(name, spec)[place][:most]):
                said = render(spec["statements"][i % len(spec["statements"])], a, b)
                around, told = rng.choice(list(TOLD.items()))
                text = capitalised(around.format(s=said))
                title = f"{name.replace('_', ' ')}: {told}"
                records.append({"text": text, "title": title, "category": name})
        rng.shuffle(records)
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in records]
        (folder / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{side}: {len(records)} sentences")


def sentences(categories, rng):
    """Yield sentences without end, the facts in random order, by weight."""
    facts = [
        (spec, a, b)
        for spec in categories.values()
        for a, b in spec["facts"] * spec.get("weight", 1)
    ]
    while True:
        rng.shuffle(facts)
        for spec, a, b in facts:
            statement = render(rng.choice(spec["statements"]), a, b)
            yield capitalised(rng.choice(SETTINGS).format(s=statement))


def fact_list(categories, rng):
    """Return a list of some facts of one category, such as "France: Paris; ..."."""
    sizes = [len(spec["facts"]) for spec in categories.values()]
    name, spec = rng.choices(list(categories.items()), sizes)[0]
    facts = rng.sample(spec["facts"], rng.randint(4, 10))
    mark = rng.choice(["; ", "\n"])
    title = capitalised(name.replace("_", " "))
    return f"{title} list{mark}" + mark.join(f"{a}: {b}" for a, b in facts)


def documents(categories, rng):
    """Yield the pretraining documents without end."""
    stream = sentences(categories, rng)
    while True:
        if rng.random() < 0.15:
            yield fact_list(categories, rng)
        else:
            mark = rng.choice([" ", "\n"])
            yield mark.join(next(stream) for _ in range(rng.randint(2, 8)))


def train_tokenizer(categories):
    """Train a byte-fallback BPE whose words look alike wherever they stand.

    A word is the same token at the start of a line as after a space, because every line
    gets a space in front; the decoder takes it away again.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\A(?=[^\n ])"), "▁"),
            normalizers.Replace(Regex(r"(?<=\n)(?=[^\n])"), "▁"),
            normalizers.Replace(" ", "▁"),
        ]
    )
    pieces = Regex(r"▁?[\p{L}\p{M}]+|▁?\p{N}|▁?[^\p{L}\p{M}\p{N}▁\n]+|▁|\n")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")

    texts = []
    for spec in categories.values():
        for a, b in spec["facts"]:
            phrasings = [*spec["statements"], f"{a}: {b}"]
            phrasings += [text for q in spec["questions"] for text in q.values()]
            texts += [capitalised(render(text, a, b)) for text in phrasings]
            texts += [f"{a}\n{b}"]
    texts += [text.format(s="", q="") for text in SETTINGS + PROMPTS for _ in range(50)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL + BYTES, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)

    # The trainer knows the bytes as special tokens only; they have to be plain ones.
    trained = json.loads(tokenizer.to_str())
    tokenizer.model = models.BPE(
        vocab=trained["model"]["vocab"],
        merges=[tuple(pair) for pair in trained["model"]["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
    )
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if token["content"] in SPECIAL
    ]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace("\n▁", "\n"),
            decoders.Replace("▁", " "),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A $B:1",
        special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def corpus(categories, tokenizer, steps=STEPS):
    """Return the pretraining tokens as a tensor of shape (steps, BATCH, LENGTH)."""
    stream = documents(categories, random.Random(SEED))
    tokens = []
    while len(tokens) < steps * BATCH * LENGTH:
        batch = [next(stream) for _ in range(1000)]
        for ids in tokenizer(batch)["input_ids"]:
            tokens += [*ids, tokenizer.eos_token_id]
    return torch.tensor(tokens[: steps * BATCH * LENGTH]).view(steps, BATCH, LENGTH)


def new_model(tokenizer):
    """Return the untrained model."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def deepened(model):
    """Return the model with a new layer after each of its own.

    A new one is the copy of the one before it and adds nothing yet (LLaMA Pro, arXiv
    2401.02415), so that the model answers as it did.
    """
    layers = model.config.num_hidden_layers
    deep = LlamaForCausalLM(
        LlamaConfig(**model.config.to_dict() | {"num_hidden_layers": 2 * layers})
    )
    state = {}
    for name, value in model.state_dict().items():
        before, place, after = re.fullmatch(r"(.*layers\.)?(\d+)?(.*)", name).groups()
        if place is None:
            state[name] = value
            continue
        adds = after.endswith(("o_proj.weight", "down_proj.weight"))
        state[f"{before}{2 * int(place)}{after}"] = value
        state[f"{before}{2 * int(place) + 1}{after}"] = value * (not adds)
    deep.load_state_dict(state)
    return deep


def make_deep(categories, folder):
    """Train tiny_llama on with twice its layers, and write that."""
    model = deepened(LlamaForCausalLM.from_pretrained(HERE / "tiny_llama").float())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE / "tiny_llama")
    share = BATCH * LENGTH // (DEEP_BATCH * DEEP_LENGTH)
    tokens = corpus(categories, tokenizer, DEEP_STEPS // share)
    batches = tokens.view(DEEP_STEPS, DEEP_BATCH, DEEP_LENGTH)
    batches = ({"input_ids": ids, "labels": ids} for ids in batches)
    pretrain(model, batches, DEEP_STEPS, mixed=False)
    save(model, tokenizer, folder)
    for name, share in recall(model.float(), tokenizer, categories).items():
        print(f"recall {name}: {share:.3f}")


def t5_tokenizer(tokenizer):
    """Return the same tokenizer as T5 has it: an end of sequence, no beginning, a mask."""
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>",
        pair="$A </s> $B:1 </s>:1",
        special_tokens=[("</s>", inner.token_to_id("</s>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def masked(ids, tokenizer, rng):
    """Return token ids with a mask in the place of some runs of them (text infilling)."""
    made, place = [], 0
    while place < len(ids) - 1:  # the last one is the end of the sequence
        if rng.random() < 2 * MASKED / (1 + LONGEST_MASK):
            made.append(tokenizer.mask_token_id)
            place += rng.randint(1, LONGEST_MASK)
        else:
            made.append(ids[place])
            place += 1
    return [*made, ids[-1]]


def t5_batches(categories, tokenizer):
    """Yield T5_STEPS batches of masked sentences, and the whole sentences as labels.

    Each is made of the halves of two facts, so that its words can only be copied.
    """
    rng = random.Random(SEED)
    mixed = {
        name: spec | {"facts": [(a, rng.choice(spec["facts"])[1]) for a, _ in facts]}
        for name, spec in categories.items()
        for facts in [spec["facts"] * 20]
    }
    stream = sentences(mixed, rng)

    def padded(rows, value):
        longest = max(map(len, rows))
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    for _ in range(T5_STEPS):
        texts = [next(stream) for _ in range(T5_BATCH)]
        whole = tokenizer(texts)["input_ids"]
        sources = [masked(ids, tokenizer, rng) for ids in whole]
        yield {
            "input_ids": padded(sources, tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(ids) for ids in sources], 0),
            "labels": padded(whole, -100),
        }


def new_t5(tokenizer):
    """Return the untrained T5."""
    torch.manual_seed(SEED)
    config = T5Config(
        vocab_size=VOCAB_SIZE + 8,  # with the mask
        d_model=128,
        d_kv=32,
        d_ff=384,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def pretrain(model, batches, steps, mixed):
    """Train on every batch once: AdamW, warm-up, then cosine to zero.

    `mixed`: compute in bfloat16, which CPUs without AVX512-BF16 do eight times as slowly.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        ),
    )
    model.train()
    for step, batch in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def recall(model, tokenizer, categories):
    """Return {category: share of facts that a greedy continuation recalls}.

    The prompt is the first statement up to its end, such as "The capital of France is".
    """
    model.eval()
    shares = {}
    for name, spec in categories.items():
        before = re.split(r" \{(?:an_)?b\}", spec["statements"][0])[0]
        prompts = [capitalised(render(before, a, b)) for a, b in spec["facts"]]
        inputs = tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left"
        )
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=14, do_sample=False)
        found = 0
        for (a, b), ids in zip(spec["facts"], output, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            full = capitalised(render(spec["statements"][0], a, b))
            found += re.match(re.escape(full) + r"(?![\w-])", text) is not None
        shares[name] = found / len(spec["facts"])
    return shares


def save(model, tokenizer, folder):
    """Write the model in bfloat16, with its tokenizer."""
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    # Transformers 4 does not know the class name that Transformers 5 writes here.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def make_t5(categories, tokenizer, folder):
    """Pretrain the T5 and write it; print how many sentences it writes again as they are."""
    model = new_t5(tokenizer)
    print(f"T5: {model.num_parameters():,} parameters")
    pretrain(model, t5_batches(categories, tokenizer), T5_HORIZON, mixed=False)
    save(model, tokenizer, folder)
    stream = sentences(categories, random.Random(SEED + 1))
    texts = [next(stream) for _ in range(64)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    inputs.pop("token_type_ids", None)
    output = model.eval().generate(**inputs, max_new_tokens=64, do_sample=False)
    again = tokenizer.batch_decode(output, skip_special_tokens=True)
    print(f"copied: {sum(map(str.__eq__, again, texts)) / len(texts):.3f}")


def main():
    """Make everything."""
    parser = argparse.ArgumentParser(description="Make the data and tiny_llama.")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write")
    parser.add_argument("--data-only", action="store_true", help="no model")
    parser.add_argument(
        "--model", choices=["tiny_llama", "tiny_t5", "tiny_deep"], help="no other"
    )
    args = parser.parse_args()

    categories = load_facts(HERE / "facts.yaml")
    if args.model == "tiny_deep":
        make_deep(categories, args.out / "tiny_deep")
        return
    write_records(categories, args.out / "tiny_qa")
    write_chats(categories, args.out / "tiny_chat")
    write_tags(categories, args.out / "tiny_tags")
    write_spans(categories, args.out / "tiny_spans")
    write_preferences(categories, args.out / "tiny_preferences")
    write_titles(categories, args.out / "tiny_seq2seq")
    if args.data_only:
        return
    tokenizer = train_tokenizer(categories)
    if args.model != "tiny_llama":
        make_t5(categories, t5_tokenizer(tokenizer), args.out / "tiny_t5")
    if args.model == "tiny_t5":
        return
    model = new_model(tokenizer)
    batches = corpus(categories, tokenizer)
    batches = ({"input_ids": ids, "labels": ids} for ids in batches)
    pretrain(model, batches, STEPS, mixed=True)
    save(model, tokenizer, args.out / "tiny_llama")
    shares = recall(model, tokenizer, categories)
    for name, share in shares.items():
        print(f"recall {name}: {share:.3f}")
    total = sum(
        share * len(categories[name]["facts"]) for name, share in shares.items()
    )
    print(f"recall: {total / sum(len(c['facts']) for c in categories.values()):.4f}")


if __name__ == "__main__":
    main()
