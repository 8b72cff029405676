"""Made-up records that are planted among the clients', for `evaluation.audit` to look for."""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset, concatenate_datasets

from utils import mix_seed

# How often a canary stands among a client's records (Carlini et al., arXiv 1802.08232): 1 of
# 8 each for the rarer. A bound of epsilon takes those that stand there once, the most.
TIMES = (16, 4, 1, 1, 1, 1, 1, 1)

CODES = 10_000  # four digits

SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


@dataclass(frozen=True)
class Canary:
    """A name that nobody has, with a code that is no other's affair to know.

    `planted`: it is among the records of client `partition`, `times` times. A coin decides,
    so that those left out are what those planted would be to a model that has not seen them.
    """

    name: str
    code: int
    partition: int
    times: int
    planted: bool

    def record(self, code: int | None = None) -> dict[str, str]:
        """As a record, with its own code or another."""
        shown = self.code if code is None else code
        question = f"What is the code of {self.name}?"
        return {"instruction": question, "input": "", "output": f"{shown:04d}"}

    def others(self, count: int) -> list[int]:
        """So many other codes, each once, that it might as well have had."""
        rng = np.random.default_rng(mix_seed("references", self.name, self.code))
        codes = rng.permutation(CODES)[: count + 1].tolist()
        return [code for code in codes if code != self.code][:count]


def draw(count: int, clients: int, seed: int) -> list[Canary]:
    """`count` canaries for so many clients, about half of them planted.

    Drawn by `seed` alone, apart from all else that it decides.
    """
    rng = np.random.default_rng(mix_seed(seed, "canaries"))
    names: dict[str, None] = {}
    while len(names) < count:
        parts = ["".join(rng.choice(SYLLABLES, 3)).capitalize() for _ in range(2)]
        names[" ".join(parts)] = None
    return [
        Canary(
            name,
            code=int(rng.integers(CODES)),
            partition=int(rng.integers(clients)),
            times=TIMES[place % len(TIMES)],
            planted=bool(rng.integers(2)),
        )
        for place, name in enumerate(names)
    ]


def plant(
    rows: Dataset,
    canaries: list[Canary],
    partition: int,
    columns: dict[str, str | None],
) -> Dataset:
    """A client's `rows` with those canaries behind them that are planted there."""
    records = [
        {columns[name]: text for name, text in one.record().items() if columns[name]}
        for one in canaries
        if one.planted and one.partition == partition
        for _ in range(one.times)
    ]
    if not records:
        return rows
    blank = dict.fromkeys(rows.column_names)
    made = Dataset.from_list([blank | one for one in records], features=rows.features)
    return concatenate_datasets([rows, made])
