"""Ask a trained adapter questions.

python test.py --peft-path=outputs/.../peft_100 --question="What is the capital of France?"
python test.py --peft-path=outputs/.../peft_100 --file=questions.jsonl --base
python test.py --peft-path=outputs/.../peft_100 --tasks=medical,gsm8k
python test.py --peft-path=outputs/.../peft_100 --full=<the base of its emulator>

Without any of them it is a chat. The base model, its quantisation and the prompt
template come from the adapter's folder.
"""

import argparse
import sys
from pathlib import Path

import utils
from evaluation import benchmarks


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Ask a trained adapter questions.",
        parents=[benchmarks.common()],
        epilog="Without --question or --file it is a chat over several turns; Ctrl-D ends "
        "it. Where the file has answers, the scores of a run's end are printed as well. "
        "--tasks puts benchmarks to the adapter, and has options of its own: --tasks= --help.",
    )
    parser.add_argument(
        "--question", action="append", default=[], help="may be given several times"
    )
    parser.add_argument(
        "--input", default="", help="the text that the questions are about, if any"
    )
    parser.add_argument(
        "--system",
        default="",
        help="what a system message says before the conversation",
    )
    parser.add_argument(
        "--file", help="records to ask: json, jsonl, csv or parquet, a file or a folder"
    )
    parser.add_argument(
        "--columns",
        help="of the file: instruction=question,input=context,output=answer, or messages=talk "
        "(default: as in training)",
    )
    parser.add_argument("--choices", help="the file's column of answers to choose from")
    parser.add_argument(
        "--max-new-tokens",
        type=utils.positive,
        help="(default: 256; with --file as the run had)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) answers greedily"
    )
    options = parser.parse_args(arguments)
    if options.input and not options.question:
        parser.error("--input goes with --question")
    if options.file and (options.question or options.temperature):
        parser.error("--file takes neither --question nor --temperature")
    if options.system and (options.file or options.input):
        parser.error("--system goes with --question, or with a chat")
    if not options.file and (options.columns or options.choices or options.out):
        parser.error("--columns, --choices and --out go with --file")
    if not 0 <= options.temperature < float("inf"):
        parser.error("--temperature must be 0 or more")
    return options


def main() -> None:
    if any(word.startswith("--tasks") for word in sys.argv[1:]):
        return benchmarks.main()
    options = parse()
    with utils.as_command():
        # Imported here, so that --help and a mistyped option answer at once.
        import model

        device = model.chosen_device(options.device)
        if options.out and (out := Path(options.out)).is_dir() | (
            not out.parent.is_dir()
        ):
            raise utils.UserError(f"--out={out}: a file in a folder that is there.")
        with model.plugged(options.peft_path, options.full) as folder:
            about = model.read_about(folder)
            task = (model.EXAMINED | about)["task"]
            plain = task["model"] == "CAUSAL_LM" or options.file
            given = {f"--{n}": getattr(options, n) for n in ("system", "temperature")}
            given["a chat"] = not options.question
            if not plain and (odd := [name for name in given if given[name]]):
                raise utils.UserError(
                    f"{odd[0]}: {task['_target_']} answers one record at a time. Ask it with "
                    "--question and --input, or --file."
                )
            cfg = file_settings(about, options) if options.file else None
            net, tokenizer = model.open_adapter(folder, about, device)
        if cfg:
            examine_file((net, tokenizer), cfg, options)
            return
    options.max_new_tokens = options.max_new_tokens or 256
    if not plain:
        answer(net, tokenizer, about, options)
        return
    for question in options.question:
        print(f"Q: {question}")
        turn = begun(question, options.system) | {"input": options.input}
        ask(net, tokenizer, about["template"], [turn], options)
    if not options.question:
        chat(net, tokenizer, about["template"], options)


def begun(question: str, system: str) -> dict:
    """A question as a turn, with what the system says before it."""
    turn = {"instruction": question, "input": ""}
    if not system:
        return turn
    said = {"system": system, "user": question}.items()
    return turn | {"messages": [{"role": r, "content": words} for r, words in said]}


def answer(net, tokenizer, about: dict, options) -> None:
    """Print what a task without turns answers to each question, at once."""
    from contextlib import nullcontext

    import torch

    import model
    import tasks

    about = model.EXAMINED | about
    task = tasks.build(settings_of(about, {"template": about["template"]}, {}))
    asked = [{"instruction": q, "input": options.input} for q in options.question]
    given = {}
    for name in ("base", "tuned") if options.base else ("tuned",):
        adapter = net.disable_adapter() if name == "base" else nullcontext()
        with torch.no_grad(), model.autocast(net), adapter:
            answers = task.told(net, tokenizer, asked, options.max_new_tokens)
        given[name if options.base else "A"] = answers
    for place, question in enumerate(options.question):
        print(f"Q: {question}")
        for name, answers in given.items():
            print(f"{name}: {answers[place]}")


def ask(net, tokenizer, template: str, turns: list[dict], options) -> str:
    """Stream the answer to the last of `turns` to the terminal; return it."""
    from contextlib import nullcontext

    import torch
    from transformers import TextStreamer

    import model
    from records import templates
    from tasks import generation

    ids = torch.tensor(
        [templates.prompt(template, turns, tokenizer)], device=net.device
    )
    ends = templates.ends(template, tokenizer, net.generation_config)
    sampling = {"do_sample": False}
    if options.temperature:
        sampling = {"do_sample": True, "temperature": options.temperature}
    output = ids
    for name in ("base", "tuned") if options.base else ("tuned",):
        print(f"{name}: " if options.base else "A: ", end="", flush=True)
        adapter = net.disable_adapter() if name == "base" else nullcontext()
        with torch.no_grad(), model.autocast(net), adapter:
            output = net.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=options.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
                streamer=TextStreamer(
                    tokenizer, skip_prompt=True, skip_special_tokens=True
                ),
                **sampling,
            )
    added = generation.before_end(output[0, ids.shape[1] :].tolist(), ends)
    return tokenizer.decode(added, skip_special_tokens=True).strip()


def file_settings(about: dict, options) -> utils.Settings:
    """What `examine.Examination` takes of a configuration: the run's, on the file given.

    Raises `UserError` for a file that cannot be used.
    """
    import dataset
    import model

    if missing := [name for name in model.EXAMINED if name not in about]:
        print(f"Not in {model.ABOUT}, so taken from the defaults: {', '.join(missing)}")
    about = model.EXAMINED | about
    data = {
        "template": about["template"],
        "test_path": options.file,
        "columns": columns_of(options, about["columns"]),
    }
    evaluate = {
        "exact_match": True,
        "choices": options.choices,
        "max_new_tokens": options.max_new_tokens or about["max_new_tokens"],
    }
    cfg = settings_of(about, data, evaluate)
    dataset.load_test(cfg)  # a broken line is named before the base is loaded
    return cfg


def settings_of(about: dict, data: dict, evaluate: dict) -> utils.Settings:
    """The part of a run's configuration that an adapter's folder tells, on other `data`."""
    train = {
        "seq_length": about["seq_length"],
        "training_arguments": {"per_device_train_batch_size": about["batch_size"]},
    }
    data = data | {"labels": about["model"].get("labels")}
    told = {"task": about["task"], "dataset": data, "evaluate": evaluate}
    return utils.Settings.of(told | {"train": train})


def examine_file(opened: tuple, cfg: utils.Settings, options) -> None:
    """Answer a file's records and score the answers that it knows; print it, or `--out`.

    By the code and the settings of the run, whose own figures come out for its test file.
    """
    from evaluation import examine

    examination = examine.Examination(cfg, opened)
    results = {"base": examination.base()} if options.base else {}
    results["tuned"] = examination.tuned()
    answers = [
        record | dict(zip(results, given, strict=True))
        for record, *given in zip(
            examination.records, *(given for _, given in results.values()), strict=True
        )
    ]
    for record in answers if not options.out else ():
        print(f"Q: {record['instruction']} {record['input']}".rstrip())
        for name in results:
            print(f"{name if options.base else 'A'}: {record[name]}")
    scores = {name: scores for name, (scores, _) in results.items()}
    told = {"answers": answers}
    if examination.answers_known:
        left_out = examination.left_out
        counted = len(examination.examples)
        told = {"questions": counted, "left_out": left_out, "scores": scores} | told
        title = f"On {len(answers)} questions"
        print(examine.table(title, scores, examination.task.per))
        if left_out:
            print(
                f"Left out of all of this, {left_out} of {left_out + counted} records: no "
                f"answer, or none left by a length of {examination.seq_length} tokens."
            )
    if options.out:
        utils.write_json(Path(options.out), told)


def columns_of(options, trained: dict) -> dict:
    """The file's columns by their names here; None for input or output that it lacks.

    Those of `--columns`, of the run, or instruction, input and output; these as well where
    the file holds conversations, from which they are made.
    """
    import dataset
    from records import conversations, files

    here = files.names(options.file, "--file")
    if not here:
        raise utils.UserError(f"--file={options.file}: no records here.")
    trained = {"messages": None} | trained  # older adapters do not tell it
    plain = {name: None if name in dataset.ELSEWHERE else name for name in trained}
    known = {trained["instruction"], trained["messages"]} & set(here)
    wanted = trained if known else plain
    if options.columns:
        pairs = [pair.partition("=")[::2] for pair in options.columns.split(",")]
        pairs = [(name.strip(), column) for name, column in pairs]
        names = [name for name, _ in pairs]
        wanted = dict.fromkeys(trained) | dict(pairs)
        odd = [name for name in names if name not in trained or names.count(name) > 1]
        odd += [column for column in wanted.values() if column and column not in here]
        if odd:
            raise utils.UserError(
                f"--columns={options.columns}: {odd[0]!r} is unknown, or there twice. Give "
                f"instruction=...,input=...,output=... and columns of {options.file}: "
                f"{', '.join(here)}."
            )
    columns = {n: c if c in here else None for n, c in wanted.items()}
    text = options.columns or columns["instruction"]
    if columns["messages"] or (not text and conversations.find(plain, here)):
        return plain | {"messages": columns["messages"]}
    if columns["instruction"] is None:
        raise utils.UserError(
            f"--file={options.file}: which column is the question? It has: "
            f"{', '.join(here)}. Say it: --columns=instruction=...,output=..."
        )
    return columns


def chat(net, tokenizer, template: str, options) -> None:
    """Ask and answer until the end of the input; earlier turns stay in the prompt."""
    turns: list[dict] = []
    while True:
        try:
            question = input("Q: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not sys.stdin.isatty():  # nobody has typed it here
            print(question)
        if question:
            turns.append(begun(question, "" if turns else options.system))
            turns[-1]["output"] = ask(net, tokenizer, template, turns, options)


if __name__ == "__main__":
    main()
