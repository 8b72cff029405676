"""A model of your own before training, alone, federated and pooled, on held-out records.

    python benchmarks/real_model.py --model /srv/models/smollm2 --data records.jsonl
    python benchmarks/real_model.py --model ... --data ... --test questions.jsonl num_rounds=20

Any causal LM in a folder, and records as `dataset=local` reads them. Without `--test` a tenth of
the records (100 at most) is held out for it. Three runs of the app on one core a client
(`experiment=laptop`), all of the same initial adapter, clients and number of steps: each client
alone (mode=local; the mean of their adapters' scores), federated, and everybody's records in one
place (mode=centralized). Prints a Markdown table: loss in nats a token, exact match and F1 of
words on the held-out records, seconds of the whole run and of its rounds, and the most memory of
a client and of the server. More overrides of `main.py` may follow. With `--out`, runs that are
done are not run again.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from assets.testbed.runs import run
from records import files
from utils import UserError, read_json, table, write_json

MODES = {"alone": "local", "federated": "federated", "pooled": "centralized"}

HEAD = [
    *("", "loss", "exact match", "F1", "whole run, s", "rounds, s"),
    *("client, GiB", "server, GiB"),
]

MOST = 100  # records that are held out


def apart(data: Path, folder: Path) -> tuple[Path, Path]:
    """A file to train on and one to test on, of the records in `data`.

    Raises `UserError` for too few of them, and where `folder` has those of other data.
    """
    names = tuple(files.names(str(data), "--data"))
    rows = [
        # Lists may be conversations; all else is text in the end, dates of parquet too.
        {k: v if isinstance(v, dict | list) else files.text(v) for k, v in row.items()}
        for file in files.find(str(data), "--data")
        for _, row, _ in files.READERS[file.suffix.lower()](file, names)
    ]
    random.Random(0).shuffle(rows)
    if not (held := min(len(rows) // 10, MOST)):
        raise UserError(
            f"--data={data}: a tenth of {len(rows)} records is none to test on. Give 10 or "
            "more, or name others with --test."
        )
    parts = {
        folder / "train.json": rows[held:],
        folder / "test.json": rows[:held],
    }
    for path, part in parts.items():
        if path.exists() and read_json(path) != part:
            raise UserError(f"{path} is of other records. Name another folder: --out")
        write_json(path, part)
    return tuple(parts)


def scores(summary: dict[str, Any], when: str) -> list[str]:
    return [
        f"{summary[f'test_loss_{when}']:.3f}",
        f"{summary[f'exact_match_{when}']:.1%}",
        f"{summary[f'f1_{when}']:.1%}",
    ]


def costs(summary: dict[str, Any], folder: Path) -> list[str]:
    rounds = read_json(folder / "history.json")["rounds"]
    return [
        f"{summary['seconds']:.0f}",
        f"{sum(one['seconds'] for one in rounds):.0f}",
        f"{summary['peak_memory_client'] / 2**30:.2f}",
        f"{summary['peak_memory_server'] / 2**30:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="its folder")
    parser.add_argument("--data", type=Path, required=True, help="records")
    parser.add_argument("--test", type=Path, help="records to test on")
    parser.add_argument("--out", type=Path, help="where the runs are kept")
    parser.add_argument("overrides", nargs="*", help="more overrides for main.py")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = (options.out or Path(temporary)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        data, test = options.data.resolve(), options.test and options.test.resolve()
        try:
            data, test = (data, test) if test else apart(data, out)
        except UserError as error:
            parser.error(str(error))
        settings = [
            *("experiment=laptop", "partitioner=clusters"),
            *(f"model.name={options.model.resolve()}", f"dataset.path={data}"),
            f"dataset.test_path={test}",
            "strategy.fraction_evaluate=0",  # the held-out records are to tell
            *options.overrides,
            "evaluate.exact_match=true",  # which the table shows
        ]
        rows = []
        for name, mode in MODES.items():
            folder = out / mode
            summary = run(folder, *settings, f"mode={mode}")
            if not rows:
                asked = summary["test_questions"]
                print(
                    f"{options.model.resolve().name}, {asked} held-out records\n",
                    flush=True,
                )
                rows.append(["base", *scores(summary, "before"), *["-"] * 4])
            rows.append([name, *scores(summary, "after"), *costs(summary, folder)])
        print(table(HEAD, rows))


if __name__ == "__main__":
    main()
