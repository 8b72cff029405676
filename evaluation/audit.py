"""How much a finished run tells of its records, and whether its epsilon holds.

python -m evaluation.audit outputs/<date>/<time>
python -m evaluation.audit outputs/<date>/<time> --nonmembers=held_back.jsonl

Prints it, writes audit.json and audit.png into the run's folder, and exits with 1 where more
is proven than the run claims.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from scipy.special import logsumexp

import utils
from utils import Settings, UserError, mix_seed, say

DELTA = 1e-5  # where the run claims none

# Other codes that a canary's is ranked among: 6 bits of exposure at most.
REFERENCES = 63

SIZE = 20_000  # numbers in the update of a canary client

RECORD = "one record added or removed"  # what a canary is


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.audit",
        description="How much a finished run tells of its records, and whether its epsilon "
        "holds.",
        epilog="Exits with 1 where more is proven than the run claims, with 2 where it cannot "
        "be audited.",
    )
    parser.add_argument("run", type=Path, help="its folder: outputs/<date>/<time>")
    parser.add_argument(
        "--nonmembers",
        help="records like those trained on that were not: json, jsonl, csv or parquet "
        "(default: what the clients have held back)",
    )
    parser.add_argument(
        "--limit",
        type=utils.positive,
        default=5000,
        help="records of either kind that are looked at, drawn at random (default: 5000)",
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ... (default: the GPU, if any)"
    )
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    with utils.as_command(code=2):
        told = audit(options)
    sys.exit(int(any(row["verdict"] == BROKEN for row in told["claims"])))


def audit(options: argparse.Namespace) -> dict[str, Any]:
    """Audit a run; print, draw and write what was found, and return it.

    Raises `UserError` for a run that is not finished, or has nothing by which to tell.
    """
    import model

    run = Run(options.run)
    device = model.chosen_device(options.device)
    members, others = run.split()
    if options.nonmembers:
        known = {question(one) for part in members.values() for one in part}
        given = run.read(options.nonmembers)
        others = {None: [one for one in given if question(one) not in known]}
        if left := len(given) - len(others[None]):
            say(f"{left} of {options.nonmembers} are trained on as well: left out.")
    members, others = (
        some(part, options.limit, run.cfg.seed) for part in (members, others)
    )
    made = run.canaries()
    if not made and not any(others.values()) and not of_clients(run.summary):
        raise UserError(
            f"{run.folder}: there is nothing to compare its records with. Have clients hold "
            "some back (strategy.fraction_evaluate=1 in the run), name records like them with "
            "--nonmembers=..., or plant canaries (audit.canaries=200 in the run)."
        )
    examiner = Examiner(run, device)
    told: dict[str, Any] = {"adapter": run.adapter.name}
    curves: dict[str, Any] = {}
    say(f"{run.adapter}: {len(run.trained)} clients trained.")
    if any(others.values()):
        told["membership"], curves = membership(run, examiner, members, others)
    else:
        say(
            "Membership is not measured: the clients have held back nothing "
            "(strategy.fraction_evaluate), and --nonmembers names no records."
        )
    told["claims"] = []
    if made:
        told["canaries"] = canaries(run, examiner, made)
        told["claims"].append(claim(run.summary, told["canaries"]))
    if of_clients(run.summary):
        told["claims"].append(claim_of_release(run))
    show_claims(told["claims"])
    utils.write_json(run.folder / "audit.json", told)
    if curves or made:
        draw(told, curves, run.folder / "audit.png")
    say(
        f"\nWritten to {run.folder}: audit.json{' and audit.png' * bool(curves or made)}"
    )
    return told


# --- the run, and the model that came of it ----------------------------------------------------


class Run:
    """A finished run's folder: its settings, who trained, and on what."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cfg = Settings.of(OmegaConf.to_container(utils.read_config(folder)))
        if (kind := self.cfg.peft.get("task_type") or "CAUSAL_LM") != "CAUSAL_LM":
            raise UserError(
                f"{folder}: records are told apart by what models that go from left to right "
                f"make of them; this run trained a {kind}."
            )
        self.summary = utils.read_json(folder / "summary.json")
        self.rounds = utils.read_json(folder / "history.json")["rounds"]
        self.adapter = folder / f"peft_{self.summary['rounds']}"
        if not (self.adapter / "adapter_config.json").exists():
            raise UserError(
                f"{self.adapter}: no adapter that all clients share is here, and no other is "
                "audited."
            )
        known = {i for entry in self.rounds for i in asked(entry)}
        # Where it is secret who took part, anybody may have.
        self.trained = sorted(known or range(self.cfg.num_clients))

    def split(self) -> tuple[dict, dict]:
        """The records that each client trains on, and that it has held back for good.

        By partition.
        """
        import dataset

        members, others = {}, {}
        pooled = dataset.is_pooled(self.cfg)
        for partition in range(self.cfg.num_clients) if pooled else self.trained:
            rows, held = dataset.load_partition(self.cfg, partition), []
            if self.cfg.strategy.fraction_evaluate > 0:
                rows, held = dataset.split(self.cfg, rows)
            members[partition] = self._records(rows)
            others[partition] = self._records(held)
        return members, others

    def read(self, path: str) -> list[dict[str, str]]:
        """Records of a file with the columns of the run's."""
        import dataset

        own = {"partitioner": None, "dataset": self.cfg.dataset | {"path": path}}
        try:
            return self._records(dataset.load_partition(self.cfg | own, 0))
        except UserError as error:
            raise UserError(f"--nonmembers: {error}") from error

    def _records(self, rows: Any) -> list[dict[str, str]]:
        import dataset

        return [dataset.to_record(row, self.cfg.dataset.columns) for row in rows]

    def canaries(self) -> list[Any]:
        """Those that may be planted at clients that trained."""
        import dataset
        from records import canaries

        count = self.cfg.get("audit", {}).get("canaries", 0)
        made = canaries.draw(count, self.cfg.num_clients, self.cfg.seed)
        pooled = dataset.is_pooled(self.cfg)
        return [one for one in made if pooled or one.partition in self.trained]

    def draws(self) -> float | None:
        """How often a record was drawn on the mean, over the clients that tell it."""
        clients = [one for entry in self.rounds for one in entry.get("clients", [])]
        held = {one["partition"]: one.get("records", 0) for one in clients}
        if not sum(held.values()):
            return None
        return sum(one["num-examples"] for one in clients) / sum(held.values())


class Examiner:
    """The run's model, which gives records their likelihoods with the adapter and without."""

    def __init__(self, run: Run, device: Any) -> None:
        import model
        from records.batches import Collator

        self.about = model.read_about(str(run.adapter))
        opened = model.open_adapter(str(run.adapter), self.about, device)
        self.net, self.tokenizer = opened
        self.seq_length = run.cfg.train.seq_length
        side = run.cfg.train.padding_side
        self.collate = Collator(self.tokenizer.pad_token_id, side)

    def encode(self, records: list[dict[str, str]]) -> list[Any]:
        """As they were trained on; None for one that was not."""
        from records import templates

        template = self.about["template"]
        return [
            templates.encode(one, template, self.tokenizer, self.seq_length)
            for one in records
        ]

    def likelihoods(self, examples: list[Any]) -> list[np.ndarray]:
        """With the adapter (`membership.likelihoods`)."""
        from evaluation import membership

        size = 4 * self.about.get("batch_size", 16)  # no gradients are kept
        return membership.likelihoods(self.net, examples, self.collate, size)

    def scores(self, examples: list[Any]) -> dict[str, np.ndarray]:
        """`membership.scores` of tokenised records, (records,) each."""
        from evaluation import membership

        with self.net.disable_adapter():
            base = self.likelihoods(examples)
        answers = [
            self.tokenizer.decode([i for i in one["labels"] if i != utils.IGNORED])
            for one in examples
        ]
        return membership.scores(self.likelihoods(examples), base, answers)


def asked(entry: dict[str, Any]) -> list[int]:
    """The partitions that were told to train in a round."""
    return entry.get("asked") or [one["partition"] for one in entry["clients"]]


def some(parts: dict[Any, list[Any]], most: int, seed: int) -> dict[Any, list[Any]]:
    """At most so many of all records, as many of each part, drawn without order."""
    each = -(-most // len(parts))
    chosen = {}
    for key, rows in parts.items():
        order = np.random.default_rng(mix_seed(seed, "audit", str(key)))
        chosen[key] = [rows[i] for i in order.permutation(len(rows))[:each]]
    return chosen


def question(record: dict[str, str]) -> tuple[str, str]:
    from records import files

    return files.plain(record["instruction"]), files.plain(record["input"])


# --- membership ----------------------------------------------------------------------------------


def membership(
    run: Run, examiner: Examiner, members: dict, others: dict
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How well records trained on are told from others, and the curves of it."""
    from evaluation import bounds
    from evaluation.membership import CONTROL, SCORES

    sides, owners = [], []
    for part in (members, others):
        encoded = [(k, e) for k, v in part.items() for e in examiner.encode(v) if e]
        sides.append(examiner.scores([example for _, example in encoded]))
        owners.append(np.array([k for k, _ in encoded], dtype=object))
    ours, theirs = sides
    counts = [len(each) for each in owners]
    if not all(counts):
        raise UserError(
            f"{run.folder}: of {counts[0]} records trained on and {counts[1]} others that have "
            "an answer within train.seq_length there is nothing to compare."
        )
    where = "held back by the same clients" if None not in others else "given"
    drawn = run.draws()
    often = f", each drawn {drawn:.2g} times on the mean" if drawn else ""
    say(
        f"\nMembership: {counts[0]} records trained on{often}; {counts[1]} {where}."
        f"\n{'':20}{'AUC (0.5: a guess)':>24}{'found at 1 % false alarms':>30}"
    )
    told = {"members": counts[0], "others": counts[1], "draws": drawn, "scores": {}}
    for name in (*SCORES, CONTROL):
        area = bounds.auc(ours[name], theirs[name])
        hits = bounds.found(ours[name], theirs[name])
        told["scores"][name] = {"auc": area, "tpr": hits}
        say(f"  {name:18}{interval(area):>24}{interval(hits, percent=True):>30}")
    control = told["scores"][CONTROL]["auc"]
    told["alike"] = bool(control.low <= 0.5 <= control.high)
    if not told["alike"]:
        say(
            "The base alone, which has seen neither, tells the two kinds apart: they differ "
            "in more than the training. Of the scores only `base minus tuned` takes that into "
            "account, and not all of it."
        )
    # Settled beforehand: the best of five would be so by chance as well.
    best = told["by"] = "loss" if told["alike"] else "base minus tuned"
    told["clients"] = exposed(ours[best], theirs[best], *owners)
    if told["clients"]:
        first = told["clients"][0]
        say(
            f"Most exposed by {best}, of {len(told['clients'])} clients: client "
            f"{first['partition']}, AUC {interval(first['auc'])}; least: client "
            f"{told['clients'][-1]['partition']}, {interval(told['clients'][-1]['auc'])}. "
            "(95 % for all of them together.)"
        )
    return told, {name: (ours[name], theirs[name]) for name in (*SCORES, CONTROL)}


def exposed(
    ours: np.ndarray, theirs: np.ndarray, members: np.ndarray, others: np.ndarray
) -> list[dict[str, Any]]:
    """The AUC of each client with enough records on both sides, the highest first.

    Against what it has held back itself, or else against all that is given.
    """
    from evaluation import bounds

    pairs = {}
    for partition in dict.fromkeys(members):
        own = theirs[(others == partition) | np.equal(others, None)]
        if min(len(own), (members == partition).sum()) >= utils.FEW:
            pairs[partition] = ours[members == partition], own
    level = bounds.LEVEL / max(1, len(pairs))
    areas = {i: bounds.auc(*pair, level) for i, pair in pairs.items()}
    order = sorted(areas, key=lambda i: -areas[i].value)
    return [{"partition": i, "auc": areas[i]} for i in order]


def interval(found: Any, percent: bool = False) -> str:
    """An estimate with its interval, in words."""
    if percent:
        return f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%})"
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


# --- canaries -------------------------------------------------------------------------------------


def canaries(run: Run, examiner: Examiner, made: list[Any]) -> dict[str, Any]:
    """Which canaries are found again, how far their codes stand out, and what that proves."""
    from evaluation import bounds

    own, others = likelihoods_of_codes(examiner, made)
    # How much likelier the code is than another one, in nats: what the question or the
    # digits make likely, they make so for each.
    score = own - logsumexp(others, axis=1) + np.log(REFERENCES)
    bits = np.array([bounds.exposure(*pair) for pair in zip(own, others, strict=True)])
    planted = np.array([one.planted for one in made])
    times = np.array([one.times for one in made])
    told: dict[str, Any] = {"planted": int(planted.sum()), "of": len(made), "by": []}
    most = np.log2(REFERENCES + 1)
    say(
        f"\nCanaries: {told['planted']} of {len(made)} planted.\n"
        f"  {'':14}{'number':>8}{'AUC (0.5: a guess)':>26}"
        f"{f'exposure, of {most:g} bits: median':>34}{'most':>8}"
    )
    kinds = {"left out": ~planted}
    for count in sorted({*times.tolist()}):
        kinds["once" if count == 1 else f"{count} times"] = planted & (times == count)
    for name, here in kinds.items():
        if not here.any():
            continue
        ranks = bits[here].tolist()
        row = {"name": name, "number": len(ranks), "exposure": ranks}
        area = ""
        if name != "left out" and not planted.all():
            row["auc"] = bounds.auc(score[here], score[~planted])
            area = interval(row["auc"])
        told["by"].append(row)
        say(
            f"  {name:14}{row['number']:>8}{area:>26}"
            f"{np.median(ranks):>34.1f}{max(ranks):>8.1f}"
        )
    once = times == 1
    told["allowed"] = implied(run.summary)
    delta = told["allowed"]["delta"]
    told["one_run"] = bounds.one_run(score[once], planted[once], delta)
    return told


def likelihoods_of_codes(
    examiner: Examiner, made: list[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood of each canary's code, (canaries,), and of `REFERENCES` others, a row each."""
    records = [one.record(c) for one in made for c in (None, *one.others(REFERENCES))]
    found = examiner.likelihoods(examiner.encode(records))
    sums = np.array([tokens[:, 0].sum() for tokens in found]).reshape(len(made), -1)
    return sums[:, 0], sums[:, 1:]


# --- claims ---------------------------------------------------------------------------------------

BROKEN, HOLDS = "broken", "not refuted"


def implied(summary: dict[str, Any]) -> dict[str, Any]:
    """What a run's claim allows where one record comes or goes: epsilon (None: no claim), delta.

    A claim of clients added or removed covers a client whose records change in two steps: it
    goes, and comes with others (Vadhan 2017, lemma 2.2).
    """
    epsilon, delta = summary.get("epsilon"), summary.get("delta") or DELTA
    adjacency = summary.get("adjacency") or RECORD
    if of_clients(summary):
        delta = min(1.0, (1 + np.exp(min(epsilon, 700))) * delta)
        epsilon = 2 * epsilon
    return {"epsilon": epsilon, "delta": float(delta), "adjacency": adjacency}


def of_clients(summary: dict[str, Any]) -> bool:
    """Whether a run claims that a client may come or go, and so sums updates with noise."""
    adjacency = summary.get("adjacency") or RECORD
    return "client" in adjacency and "replaced" not in adjacency


def claim(summary: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: what is claimed, what that allows here, and what is proven."""
    allowed = found["allowed"]
    proof = found["one_run"]
    return {
        "what": "canaries among the records",
        "claimed": summary.get("epsilon"),
        "adjacency": allowed["adjacency"],
        "released": summary.get("released", "the adapter"),
        "delta": allowed["delta"],
        "allows": allowed["epsilon"],
        "proven": proof.get("epsilon", 0.0),
        "how": f"{proof.get('right', 0)} of {proof.get('guesses', 0)} guesses right",
        "verdict": verdict(allowed["epsilon"], proof.get("epsilon", 0.0)),
    }


def claim_of_release(run: Run) -> dict[str, Any]:
    """The same of one round's release, as the run's own code makes it, by canary clients."""
    from evaluation import canary_clients
    from methods import privacy

    level = privacy.build(privacy.settled(run.cfg).privacy)
    allowed = level.spent([level.noise_multiplier])
    proven = canary_clients.prove(release_of(level), SIZE, level.clip_norm, level.delta)
    return {
        "what": "canary clients, one release",
        "claimed": allowed,
        "adjacency": level.adjacency,
        "released": "a round's sum",
        "delta": level.delta,
        "allows": allowed,
        "proven": proven,
        "how": f"the cosines of {canary_clients.CANARIES} directions",
        "verdict": verdict(allowed, proven),
    }


def release_of(level: Any) -> Any:
    """What the server makes of a round's updates by its `methods.privacy` level: a
    `canary_clients.Release`."""
    import torch

    from methods.base import Contribution

    def release(updates: Sequence[np.ndarray], examples: Sequence[int]) -> np.ndarray:
        step, total, weights = level.step(len(updates)), {}, 0
        for number, (update, count) in enumerate(zip(updates, examples, strict=True)):
            sent = {"update": torch.from_numpy(update)}
            one = step.arrive(Contribution(number, {}, sent, count, 0.0))
            for name, value in one.update.items():
                total[name] = total.get(name, 0) + one.weight * value.double()
            weights += one.weight
        mean = {name: value / weights for name, value in total.items()}
        return step.total(mean, len(updates))["update"].numpy()

    return release


def verdict(allowed: float | None, proven: float) -> str:
    """On a claimed epsilon, None for none."""
    if allowed is None:
        return "nothing is claimed"
    return BROKEN if proven > allowed else HOLDS


def show_claims(rows: list[dict[str, Any]]) -> None:
    """The table of what is claimed and what is proven."""
    if not rows:
        return
    heads = ("claimed", "allows here", "proven at least")
    say(
        f"\n{'Epsilon (95 % sure)':30}{''.join(f'{head:>17}' for head in heads)}  verdict"
    )
    for row in rows:
        claimed = "none" if row["claimed"] is None else f"{row['claimed']:.3g}"
        allows = "any" if row["allows"] is None else f"{row['allows']:.3g}"
        cells = (claimed, allows, f"{row['proven']:.2f}")
        say(
            f"  {row['what']:28}{''.join(f'{cell:>17}' for cell in cells)}"
            f"  {row['verdict']}\n"
            f"    for {row['adjacency']}, delta {row['delta']:.2g}, releasing "
            f"{row['released']}; by {row['how']}"
        )


# --- the figure -----------------------------------------------------------------------------------


def draw(told: dict[str, Any], curves: dict[str, Any], path: Path) -> None:
    """The curves of membership, the clients, and the canaries' exposure, as far as known."""
    from reporting.figures import COLOURS, GREY, figure

    found = told.get("membership", {})
    clients = found.get("clients", [])
    canaries = told.get("canaries", {}).get("by", [])
    panels = sum(map(bool, (curves, clients, canaries)))
    rows = -(-panels // 2)
    with figure(path, rows, min(panels, 2), height=3.4 * rows) as axes:
        rest = iter(axes)
        if curves:
            one = next(rest)
            for (name, pair), colour in zip(curves.items(), COLOURS, strict=False):
                one.plot(*roc(*pair), color=colour, ls="-", marker="", label=name)
            least = 1 / min(len(each) for each in next(iter(curves.values())))
            one.plot([least, 1], [least, 1], color=GREY, ls=":", marker="")
            one.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1))
            for axis in (one.xaxis, one.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter("")
            one.set_xlabel("false alarms, share of others")
            one.set_ylabel("found, share of members")
            one.legend(fontsize="small")
        if clients:
            one = next(rest)
            areas = [client["auc"] for client in clients]
            middle = [area.value for area in areas]
            reach = [
                [a.value - a.low for a in areas],
                [a.high - a.value for a in areas],
            ]
            places = range(len(clients))
            step = -(-len(clients) // 20)  # that names have room
            one.errorbar(places, middle, reach, color=COLOURS[0], ls="", marker="o")
            one.axhline(0.5, color=GREY, ls=":", marker="")
            names = [client["partition"] for client in clients]
            one.set_xticks(places[::step], names[::step], fontsize="small")
            one.set_xlabel("client, the most exposed first")
            one.set_ylabel(f"AUC, {found['by']}")
        if canaries:
            one = next(rest)
            one.boxplot([row["exposure"] for row in canaries], whis=(0, 100))
            names = [row["name"] for row in canaries]
            one.set_xticks(range(1, len(names) + 1), names)
            one.set_xlabel("canaries, planted how often")
            one.set_ylabel("exposure, bits")
        for one in rest:
            one.set_visible(False)


def roc(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False alarms and finds, as shares, at each threshold, falling."""
    marks = np.unique(np.concatenate([members, others]))[::-1]
    ours = len(members) - np.searchsorted(np.sort(members), marks)
    theirs = len(others) - np.searchsorted(np.sort(others), marks)
    return theirs / len(others), ours / len(members)


if __name__ == "__main__":
    main()
