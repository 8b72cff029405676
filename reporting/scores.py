"""What a score is called, how sure the mean of several is, and how it is shown."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev

# The answer is about the first that was measured. `{per}`: what the task counts (a token, a pair).
SCORES = {
    "test_entity_f1": "entity F1, %",
    "exact_match": "exact match, %",
    "test_macro_f1": "macro-F1, %",
    "choice_accuracy": "choice accuracy, %",
    "f1": "F1, %",
    "rouge_l": "ROUGE-L, %",
    "test_mcc": "MCC",
    "test_accuracy": "{per} accuracy, %",
    "test_margin": "reward margin",
    "test_loss": "loss, nats",
    "test_perplexity": "perplexity",
    "eval_macro_f1": "macro-F1 on own records, %",
    "eval_entity_f1": "entity F1 on own records, %",
    "eval_mcc": "MCC on own records",
    "eval_accuracy": "{per} accuracy on own records, %",
    "eval_margin": "reward margin on own records",
    "eval_loss": "loss, nats, on own records",
}

MODES = {"local": "local", "federated": "federated", "centralized": "centralised"}

ROWS = {"base": "base", "local": "local", "worst": "local, worst client", **MODES}


@dataclass
class Estimate:
    """A figure and its 95 % confidence interval; without, its uncertainty is not known."""

    value: float
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""  # what the interval is over

    @property
    def known(self) -> bool:
        return bool(self.unit)

    def times(self, scale: int) -> tuple[float, float, float]:
        return scale * self.value, scale * self.low, scale * self.high

    def apart(self) -> bool:
        """Whether the interval leaves out zero. What has none is not told apart."""
        return self.low > 0 or self.high < 0


def interval(values: Iterable[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % confidence interval: t s / sqrt(n).

    t is the 0.975 quantile of Student's distribution (Student 1908) with n - 1 degrees of
    freedom, s the standard deviation of the sample. Of one value, or values that are all the
    same, the uncertainty is not known: None.
    """
    from scipy.stats import t

    values = list(values)
    finite = all(map(math.isfinite, values))
    spread = stdev(values) if finite and len(values) > 1 else 0.0
    if not finite or spread <= 1e-12 * max(map(abs, values)):
        return fmean(values), None
    quantile = float(t.ppf(0.975, len(values) - 1))
    return fmean(values), quantile * spread / math.sqrt(len(values))


def linear(above: Iterable[float], below: Iterable[float]) -> list[float]:
    """Values whose mean is sum(above) / sum(below), and whose spread is that ratio's.

    To the first order: the ratio, and what is above it in each pair (Cochran 1977, 6.3).
    """
    above, below = list(above), list(below)
    total = sum(below)
    if not total:
        return []
    ratio, size = sum(above) / total, total / len(below)
    return [ratio + (a - ratio * b) / size for a, b in zip(above, below, strict=True)]


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def lower_is_better(name: str) -> bool:
    return name.endswith(("loss", "perplexity"))


def scale(name: str) -> int:
    return 100 if SCORES[name].endswith("%") else 1


def show(name: str, found: Estimate | None, sign: str = "") -> str:
    """Figure and interval as `97.9 [96.7, 99.1]`: shares in percent, as `SCORES` says."""
    if found is None:
        return "-"
    value, low, high = found.times(scale(name))
    size = abs(value)
    form = (
        ".2e" if size >= 1e5 else ".1f" if size >= 100 or scale(name) == 100 else ".3f"
    )
    text = f"{value:{sign}{form}}"
    return f"{text} [{low:{sign}{form}}, {high:{sign}{form}}]" if found.known else text
