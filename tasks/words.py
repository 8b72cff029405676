"""How well an answer in words fits the wanted one."""

import re
from collections import Counter


def exact_match(given: str, wanted: str) -> float:
    """1 where the answer is the wanted one to the letter, else 0."""
    return float(given == wanted.strip())


def f1(given: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of the words, in [0, 1] (SQuAD's F1)."""
    ours, theirs = words(given), words(wanted)
    return _harmonic((Counter(ours) & Counter(theirs)).total(), ours, theirs)


def rouge_l(given: str, wanted: str) -> float:
    """The same of the longest common subsequence of words (ROUGE-L, Lin 2004), in [0, 1]."""
    ours, theirs = words(given), words(wanted)
    lengths = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0  # the cell up and to the left
        for i, other in enumerate(theirs, start=1):
            here = before + 1 if word == other else max(lengths[i], lengths[i - 1])
            before, lengths[i] = lengths[i], here
    return _harmonic(lengths[-1], ours, theirs)


def words(text: str) -> list[str]:
    """Lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def _harmonic(common: int, ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * common / (len(ours) + len(theirs))


METRICS = {"exact_match": exact_match, "f1": f1, "rouge_l": rouge_l}
