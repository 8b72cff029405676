"""What a sweep's runs say of each other, in plain words."""

from reporting.runs import Section
from reporting.scores import ROWS, Estimate, count, lower_is_better, scale, show
from utils import FEW


def answer(section: Section) -> str:
    """What came out, in plain words; every figure of it is in the section's tables."""
    name, rows = section.headline, section.scores.get(section.headline, {})
    if not rows.get("federated"):
        return "There is no score of a federated run, so nothing can be compared."
    percent, points = (" %", " points") if scale(name) == 100 else ("", "")
    said = {
        row: show(name, section.score(name, row)) + percent for row in ROWS if rows[row]
    }
    seeds = len(rows["federated"])
    title = section.named(name).removesuffix(", %").removesuffix(", on own records")
    title += f"; {section.basis(name)}, {count(seeds, 'seed')}"
    title += "; lower is better" * lower_is_better(name)
    text = f"The federated adapter scores {said['federated']} ({title})."
    others = {
        "local": "a client alone {} on average",
        "worst": "the worst client alone {}",
        "centralized": "pooled data {}",
        "base": "the base before tuning {}",
    }
    beside = [words.format(said[row]) for row, words in others.items() if row in said]
    text += f" Beside it: {', '.join(beside)}." if beside else ""
    for row, whom in (("local", "a client alone"), ("centralized", "pooled data")):
        if gain := section.less(name, "federated", row):
            text += f" {verdict(name, gain, whom, seeds)} ("
            text += f"{show(name, gain, '+')}{points}"
            text += f", over {gain.unit})." if gain.known else ")."
    text += closed(section) + on_own_records(section)
    if seeds == 1:
        text += (
            " With one seed, an interval is over the test questions: it tells of these "
            "adapters, not of what another seed would give."
        )
    return text


def verdict(name: str, gain: Estimate, whom: str, seeds: int) -> str:
    """Better, worse, or neither, as far as the interval of this difference allows."""
    if not gain.known:
        why = "All seeds agree" if seeds > 1 else "One run of each"
        return (
            f"{why}, without scores of single questions: whether it is better or worse than "
            f"{whom} cannot be told"
        )
    if not gain.apart():
        return f"It is not told apart from {whom}"
    wins = (gain.value < 0) == lower_is_better(name)
    return f"It is {'better' if wins else 'worse'} than {whom}"


def closed(section: Section) -> str:
    """How much of the gap between local and centralised is closed, if there is a gap."""
    name = section.headline
    gap, share = section.less(name, "centralized", "local"), section.closed(name)
    if gap is None or share is None or not gap.known:
        return ""
    if not gap.apart() or (gap.value < 0) != lower_is_better(name):
        return " Pooling is not measurably better than a client alone: no gap to close."
    if not share.known:
        return ""
    return (
        f" Federation closes {share.value:.0%} [{share.low:.0%}, {share.high:.0%}] of the "
        "gap between alone and pooled."
    )


def on_own_records(section: Section) -> str:
    federated = section.clients("eval_loss", "federated", few=False)
    pairs = [
        (federated[seed][client], loss)
        for seed, losses in section.clients("eval_loss", "local", few=False).items()
        for client, loss in losses.items()
        if client in federated.get(seed, {})
    ]
    if not pairs:
        return ""
    wins = sum(together < alone for together, alone in pairs)
    others = ", the client's own adapter in the others" * (wins < len(pairs))
    return (
        " On the records that each client held back of its own, the federated adapter has "
        f"the lower loss in {wins} of {len(pairs)} cases (each client with each seed){others}."
        f"{left_out(section)}"
    )


def left_out(section: Section) -> str:
    """Who held back too little to be compared."""
    held = [n for run in section.of("local") for n in run.held().values()]
    few = [n for n in held if n < FEW]
    if not few:
        return ""
    return (
        f" {len(few)} of {len(held)} are left out of this and of the worst client: they held "
        f"back fewer than {FEW} records."
    )


def budget(section: Section) -> str:
    """What each mode was given to train with."""
    cfg, train = section.runs[0].cfg, section.runs[0].cfg.train.training_arguments
    clients, rounds, steps = cfg.num_clients, cfg.num_rounds, train.max_steps
    federated = section.of("federated")
    if not federated or steps < 1:
        return f"Every mode has {rounds} rounds."
    cohort = federated[0].rounds[0]["sampled"]
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
    return (
        f"Every mode has {rounds} rounds of {steps} steps with {batch} examples. Federated: "
        f"{cohort} of {clients} clients a round, so {rounds * cohort * steps} steps in all. "
        f"Centralised: the same {cohort * steps} steps a round, one after the other, on "
        f"everybody's records. Local: each client takes {steps} steps a round on its own "
        f"records, {rounds * steps} in all, as deep as the federated adapter goes; over all "
        f"clients that is {rounds * clients * steps} steps, {clients / cohort:.3g} times "
        "the federated work."
    )
