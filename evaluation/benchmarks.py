"""Put the field's benchmarks to a trained adapter, with lm-eval.

python test.py --peft-path=outputs/.../peft_100 --tasks=medical,gsm8k

The base model, its quantisation and the prompt template come from the adapter's folder.
"""

import argparse
import contextlib
import io
import os
from pathlib import Path
from typing import Any

import utils


def common() -> argparse.ArgumentParser:
    """The options of every command that asks an adapter."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--peft-path", required=True, help="an adapter: .../peft_100")
    parser.add_argument(
        "--base", action="store_true", help="ask the base model beside it"
    )
    parser.add_argument(
        "--full",
        help="of an adapter of an emulator (methods.emulator): the base to plug it into",
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ... (default: the GPU, if any)"
    )
    parser.add_argument(
        "--out",
        help="write answers and scores here, as JSON (with --tasks, by default to "
        "evaluation.json beside the adapter)",
    )
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Put the field's benchmarks to a trained adapter, with lm-eval.",
        parents=[common()],
    )
    parser.add_argument(
        "--tasks",
        required=True,
        help="separated by commas: a preset or task of evaluation/tasks/ (general-nlp, finance, "
        "medical, code, ...), any task of lm-eval's, or the path of a task file of yours",
    )
    parser.add_argument(
        "--limit",
        type=utils.positive,
        help="no more than the first so many questions of each task",
    )
    parser.add_argument("--batch-size", type=utils.positive, default=16)
    parser.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="run what the model writes for code tasks, as this user, on this machine",
    )
    options = parser.parse_args(arguments)
    options.tasks = list(dict.fromkeys(filter(None, options.tasks.split(","))))
    if not options.tasks:
        parser.error("--tasks names none")
    return options


def main() -> None:
    options = parse()
    with utils.as_command():
        evaluate(options)


def evaluate(options: argparse.Namespace) -> None:
    """Print the table of an adapter's figures and write them to a file."""
    # Imported here, so that --help and a mistyped option answer at once.
    import model

    with model.plugged(options.peft_path, options.full) as folder:
        _evaluate(options, folder)


def _evaluate(options: argparse.Namespace, folder: str) -> None:
    """Likewise, of the adapter as it is in `folder`."""
    import model

    about = model.EXAMINED | model.read_about(folder)
    if (kind := about["task"]["model"]) != "CAUSAL_LM":
        raise utils.UserError(
            f"--tasks={','.join(options.tasks)}: benchmarks are for models that go from left "
            f"to right, and this is an adapter of a {kind}. Ask it with --question or --file."
        )
    out = Path(
        options.out or Path(options.peft_path).resolve().parent / "evaluation.json"
    )
    if not os.access(out.parent, os.W_OK):
        raise utils.UserError(f"--out={out}: its folder cannot be written to.")
    device = model.chosen_device(options.device)
    try:
        from evaluation import harness
    except ModuleNotFoundError as error:
        raise utils.UserError(
            f"lm-eval is not installed ({error}): pip install {requirement()}"
        ) from error
    titles, tasks = harness.load(options.tasks, options.allow_code_execution)
    net, tokenizer = model.open_adapter(folder, about, device)
    lm = harness.Adapter(net, tokenizer, about["template"], options.batch_size)
    # lm-eval prints what it is bootstrapping; its progress is on stderr.
    silent = contextlib.redirect_stdout(io.StringIO())
    with silent:
        results = harness.run(lm, tasks, options.limit)
    rows = harness.figures(titles, tasks, results)
    if options.base:
        with net.disable_adapter(), silent:
            results = harness.run(lm, tasks, options.limit)
        for row, base in zip(
            rows, harness.figures(titles, tasks, results), strict=True
        ):
            row["base"] = base["value"]
    print(table(rows))
    for source in harness.sources(titles, tasks):
        print(f"FlowerTune: {source}")
    utils.write_json(
        out,
        {
            "adapter": str(Path(options.peft_path).resolve()),
            "model": about["model"]["name"],
            "template": about["template"],
            "limit": options.limit,
            "figures": rows,
        },
    )
    print(f"Written to {out}")


def requirement() -> str:
    """The line of `requirements.txt` that names lm-eval."""
    lines = (utils.PROJECT / "requirements.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("lm-eval"))


# Metrics of lm-eval's that are shares, from 0 to 1, and those that are of 100 already. Others
# are shown as they are.
SHARES = {
    *(
        "acc",
        "acc_norm",
        "acc_mutual_info",
        "exact_match",
        "em",
        "f1",
        "pass@1",
        "pass_at_1",
    ),
    *(
        "mcc",
        "likelihood_diff",
        "brier_score",
        "rouge1",
        "rouge2",
        "rougeL",
        "rougeLsum",
    ),
}

OF_100 = {"bleu", "chrf", "ter"}


def table(rows: list[dict[str, Any]]) -> str:
    """Figures as a table in Markdown, without the columns in which nothing would stand.

    What is a share is in percent, and says so, as does every other unit that is known.
    """
    columns: dict[str, list[str]] = {
        "task": [row["task"] for row in rows],
        "metric": [row["metric"] for row in rows],
        "unit": [unit(row["metric"]) for row in rows],
        "questions": [str(row["questions"] or "") for row in rows],
        "base": [number(row, "base") for row in rows],
        "tuned": [number(row, "value", row["stderr"]) for row in rows],
        "FlowerTune": [number(row, "flowertune") for row in rows],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    return utils.table(list(filled), zip(*filled.values(), strict=True), numbers=False)


def unit(metric: str) -> str:
    """Of a metric by lm-eval's name, of which a filter may be part."""
    name = metric.partition(" ")[0]
    return "%" if name in SHARES else "of 100" if name in OF_100 else ""


def number(row: dict[str, Any], key: str, error: Any = None) -> str:
    """A value, with the standard error if there is one; lm-eval's may be N/A."""
    if (value := row.get(key)) is None:
        return ""
    scale, form = {"%": (100, ".2f"), "of 100": (1, ".2f")}.get(
        unit(row["metric"]), (1, ".4g")
    )
    text = f"{scale * value:{form}}"
    return text + (f" ± {scale * error:{form}}" if isinstance(error, float) else "")
