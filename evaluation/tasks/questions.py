"""What the tasks of this folder do that lm-eval's YAML cannot: fetch, choose, judge."""

import json
import random
from typing import Any

import fsspec
from datasets import Dataset, concatenate_datasets, load_dataset

Doc = dict[str, Any]


def choices(docs: Dataset) -> Dataset:
    """Each question with its answer among four of its category, shuffled the same each time."""
    answers: dict[str, set[str]] = {}
    for doc in docs:
        answers.setdefault(doc["category"], set()).add(doc["output"])

    def choose(doc: Doc, place: int) -> Doc:
        fixed = random.Random(place)
        others = sorted(answers[doc["category"]] - {doc["output"]})
        four = [doc["output"], *fixed.sample(others, min(3, len(others)))]
        fixed.shuffle(four)
        return {"choices": four, "right": four.index(doc["output"])}

    return docs.map(choose, with_indices=True)


# --- finance: the data, questions and judgement of FlowerTune's evaluation ------------------


def fpb(archive: str, member: str, **_: Any) -> dict[str, Dataset]:
    """A quarter of the Financial PhraseBank, whose archive has lines of sentence@label."""
    with fsspec.open(f"zip://{member}::{archive}", "rt", encoding="latin-1") as file:
        pairs = [line.rsplit("@", 1) for line in file if line.strip()]
    rows = [
        {"sentence": sentence.strip(), "label": label.strip(), "kind": "news"}
        for sentence, label in pairs
    ]
    return {"test": _quarter(Dataset.from_list(rows))}


def fiqa(path: str, **_: Any) -> dict[str, Dataset]:
    """A quarter of FiQA 2018's three splits together; a score becomes one of three labels."""
    splits = load_dataset(path)
    rows = concatenate_datasets([splits[s] for s in ("train", "validation", "test")])

    def label(doc: Doc) -> Doc:
        score = doc["sentiment_score"]
        word = "negative" if score < -0.1 else "neutral" if score < 0.1 else "positive"
        return {"label": word, "kind": "tweet" if doc["format"] == "post" else "news"}

    return {"test": _quarter(rows.map(label))}


def tfns(docs: Dataset) -> Dataset:
    """Tweets, with words for the labels 0, 1 and 2."""
    words = ("negative", "positive", "neutral")
    return Dataset.from_list(
        [
            {"sentence": d["text"], "label": words[d["label"]], "kind": "tweet"}
            for d in docs
        ]
    )


def _quarter(rows: Dataset) -> Dataset:
    return rows.train_test_split(0.25, seed=42)["test"]


def sentiment(doc: Doc, answers: list[str]) -> dict[str, float]:
    """Right or wrong: the word that stands in an answer, and neutral where there is none."""
    said = answers[0].lower()
    found = [word for word in ("positive", "negative") if word in said]
    return {"acc": float(doc["label"] == (found or ["neutral"])[0])}


# --- medicine --------------------------------------------------------------------------------


def pubmedqa(archive: str, member: str, **_: Any) -> dict[str, Dataset]:
    """The 500 test questions, from the archive beside the loader that no longer runs."""
    with fsspec.open(f"zip://{member}::{archive}", "rt", encoding="utf-8") as file:
        rows = json.load(file).values()
    return {
        "test": Dataset.from_list(
            [
                {
                    "abstract": "\n".join(row["CONTEXTS"]),
                    "question": row["QUESTION"],
                    "answer": row["final_decision"],
                }
                for row in rows
            ]
        )
    }
