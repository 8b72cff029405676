"""What an adapter may tell of the clients and the records that it was trained on."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from methods import accounting, dpsgd, personal
from methods.base import Contribution, State, Step, clipped, norm
from methods.noise import noise
from utils import Refusal, Settings, UserError, cohort_size, construct, say

# Of the bound that adapts (arXiv 1905.03871): what it nears is the median of the updates'
# norms, at this rate, from counts with noise of a twentieth of the cohort on them.
QUANTILE, RATE, BITS = 0.5, 0.2, 1 / 20

INSIDE = ":inside"  # no parameter's name holds a colon


def build(node: dict[str, Any]) -> "Privacy":
    """What `conf/privacy` names. Raises `UserError` for what is no such class."""
    return construct(node, __name__, Privacy)


def settled(cfg: Settings) -> Settings:
    """`cfg` with the noise that `privacy.epsilon` takes, where that is to be found.

    Raises `UserError`.
    """
    level = build(cfg.privacy)
    found = level.noise_found(planned(cfg), secret_rate(cfg))
    return cfg if found is None else cfg | {"privacy": {**cfg.privacy, **found}}


def checked(cfg: Settings, made: Any) -> Settings:
    """`settled`, where the level holds with the rest. Raises `UserError` where it does not.

    `made`: the `Aggregation`.
    """
    cfg = settled(cfg)
    if fault := build(cfg.privacy).fault(cfg, made):
        raise UserError(fault)
    return cfg


def planned(cfg: Settings) -> int:
    """In how many releases a client is at most, by the plan: in every second where half of
    them are asked, as they take turns; in any, as far as is known, where they are drawn."""
    if cfg.strategy.sampling != "epoch":
        return cfg.num_rounds
    cohort = cohort_size(cfg.num_clients, cfg.strategy.fraction_fit)
    return math.ceil(cfg.num_rounds * cohort / cfg.num_clients)


def secret_rate(cfg: Settings) -> float | None:
    """The chance of a client to be in a round, where who is in it stays secret."""
    secret = cfg.strategy.sampling == "poisson"
    return cfg.strategy.fraction_fit if secret else None


def noisy(update: State, std: float) -> State:
    """The update in float32, with `noise` on every value."""
    return {k: (v + noise(v.shape, std)).float() for k, v in update.items()}


class Privacy:
    """None but that records stay where they are."""

    # What is neither told nor written down of single clients; what it is about; when a
    # client's update is released: once it is asked, once it is summed, or never.
    hides = False
    records = False  # whether it is about each of a client's records
    # Whether what is in a client's records decides over no answer to the server, a refusal either.
    discreet = False
    adjacency = ""
    released = ""
    epsilon: float | None = None
    delta: float | None = None

    def __init__(self, secure_aggregation: bool) -> None:
        self.secure_aggregation = secure_aggregation

    def step(self, cohort: int) -> Step:
        """What is done to updates on their way, before `strategy` gathers them.

        `cohort`: how many are asked in a round, as it was planned.
        """
        return Step()

    # --- on the server -----------------------------------------------------------------------

    def noise_found(self, times: int, rate: float | None) -> dict[str, float] | None:
        """The settings that `epsilon` takes for so many releases, if they are to be found."""
        return None

    def fault(self, cfg: Settings, made: Any) -> str | None:
        """Why it guarantees nothing with these settings, and what to do; or None.

        `made`: the `Aggregation`.
        """
        return None

    def release(self) -> dict[str, float]:
        """What a release is made with, for the ledger."""
        return {}

    def spent(self, noises: list[float], rate: float | None = None) -> float:
        """The epsilon of a client that was in releases of these noise multipliers."""
        return 0.0

    def loudness(self, size: int, cohort: int) -> float:
        """How long the noise on a round's mean of `size` values is, over `clip_norm`."""
        return 0.0

    def memory(self) -> dict[str, float]:
        """What the next round needs to know, for its entry in the history."""
        return {}

    def recall(self, entry: dict[str, Any]) -> None:
        """Go on after the round of this entry."""

    # --- on a client -------------------------------------------------------------------------

    def counts(self, weight: int) -> int:
        """With secure aggregation, what a client of this weight counts for."""
        return weight

    def share(self, update: State, least: int) -> State:
        """With secure aggregation, on a client: the update with this client's part of the
        noise, where `least` clients' parts at least come together."""
        return update

    def answers(self, kind: str) -> None:
        """Raises `Refusal` where a client is not to send this beside its update."""

    def begin(
        self, cfg: Settings, partition: int, records: int
    ) -> dpsgd.Mechanism | None:
        """Before it trains for a round on so many records: what is to be done to its
        gradients, if anything. Raises `Refusal` where it is not to train."""
        return None

    def tells(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """What a client says of its round, of what there is to say."""
        return metrics


class Budgeted(Privacy):
    """What levels have in common that clip, add noise, and count what it comes to."""

    def __init__(
        self,
        secure_aggregation: bool,
        clip_norm: float,
        noise_multiplier: float | None,
        epsilon: float | None,
        delta: float,
    ) -> None:
        super().__init__(secure_aggregation)
        if not (clip_norm and delta):
            raise ValueError("privacy.clip_norm and privacy.delta are needed")
        if epsilon is None and noise_multiplier is None:
            raise ValueError(
                "give one of privacy.epsilon and privacy.noise_multiplier: "
                "privacy.noise_multiplier is needed, or privacy.epsilon, for which it is found"
            )
        self.clip_norm, self.noise_multiplier = clip_norm, noise_multiplier
        self.epsilon, self.delta = epsilon, delta


class Noisy(Budgeted):
    """What levels have in common that clip an update and put noise on it.

    `noise_multiplier`: the noise's standard deviation over `clip_norm`; None: the least that
    keeps a client within `epsilon` in as many rounds as are planned for it. With both, the run
    stops where the next release would pass `epsilon`.
    """

    hides = True
    reach = 1.0  # how far a client moves what is released at most, in `clip_norm`s

    def noise_found(self, times: int, rate: float | None) -> dict[str, float] | None:
        if self.noise_multiplier is not None:
            return None
        least = accounting.noise_for(self.epsilon, self.delta, times, rate)
        return {"noise_multiplier": self.reach * least}

    def fault(self, cfg: Settings, made: Any) -> str | None:
        name = f"privacy={type(self).__name__.lower()}"
        if cfg.baseline:
            return f"{name} with mode={cfg.mode}: there is no sum of clients. Take mode=federated."
        if cfg.strategy.fraction_evaluate:
            return (
                f"{name} with strategy.fraction_evaluate={cfg.strategy.fraction_evaluate}: what "
                "clients measure of their records is in no budget. Set "
                "strategy.fraction_evaluate=0; the server asks dataset.test_path's questions."
            )
        if cfg.strategy.weighted_by != "examples":
            return (
                f"{name} with strategy.weighted_by={cfg.strategy.weighted_by}: all clients count "
                "the same, and what they have is theirs. Leave strategy.weighted_by out."
            )
        if personal.build(cfg.personal).makes:
            return (
                f"{name} with personal._target_={cfg.personal._target_}: a client chooses its own "
                "adapter by what it measures, which is in no budget. Take personal=none."
            )
        if made.corrects:
            return (
                f"{name} with strategy._target_={cfg.strategy._target_}: control variates come "
                "without noise. Take strategy=fedavg."
            )
        least = self.spent([self.noise_multiplier], secret_rate(cfg))
        if self.epsilon is not None and least > self.epsilon * (1 + 1e-6):
            return (
                f"privacy.epsilon={self.epsilon} with privacy.noise_multiplier="
                f"{self.noise_multiplier}: one release is epsilon {least:.4g} already, so "
                "nothing could be trained. Set privacy.noise_multiplier=null, which finds it."
            )
        if self.delta * cfg.num_clients >= 1:
            return (
                f"privacy.delta={self.delta} with num_clients={cfg.num_clients}: that allows to "
                f"publish one of them whole. Set privacy.delta below {1 / cfg.num_clients:g}."
            )
        return None

    def release(self) -> dict[str, float]:
        return {"noise_multiplier": self.noise_multiplier, "clip_norm": self.clip_norm}

    def spent(self, noises: list[float], rate: float | None = None) -> float:
        each = [z / self.reach for z in noises]
        return accounting.spent(each, self.delta, rate)

    def counts(self, weight: int) -> int:
        return 1

    def silent(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """What a reply must have, the same from everybody. A rank is a node's setting."""
        same = {"num-examples": 1, "train_loss": 0.0, "peak_memory": 0, "tokens": 0}
        return same | {k: v for k, v in metrics.items() if k == "rank"}


class Client(Noisy):
    """Nobody who gets the adapters can tell whether any one client's updates are in them.

    DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963): each update clipped to `clip_norm` as it
    arrives, all of them counted alike, their sum divided by the planned cohort, whoever
    answers, and Gaussian noise on it. The server sees the updates, and is trusted with them.

    `adaptive`: the bound follows the median of the updates' norms (Andrew et al. 2021, arXiv
    1905.03871), from counts that are noisy as well. Half of a client's bit is its reach in
    them, and the noise on the sum is raised so that both together are `noise_multiplier`'s.

    With secure aggregation each client clips, and adds a part of the noise; the server knows
    the noisy sum alone, and whoever is asked counts as in it.
    """

    adjacency = "one client's updates added or removed"

    def __init__(self, adaptive: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.adaptive = adaptive
        self.released = "asked" if self.secure_aggregation else "summed"

    def share(self, update: State, least: int) -> State:
        std = self.noise_multiplier * self.clip_norm / math.sqrt(least)
        return noisy(clipped(update, self.clip_norm), std)

    def tells(self, metrics: dict[str, Any]) -> dict[str, Any]:
        return self.silent(metrics) if self.secure_aggregation else metrics

    def step(self, cohort: int) -> Step:
        return (Adaptive if self.adaptive else Summed)(self, cohort)

    def fault(self, cfg: Settings, made: Any) -> str | None:
        if told := super().fault(cfg, made):
            return told
        node = cfg.strategy
        if not made.linear:
            return (
                f"privacy=client with strategy._target_={node._target_}: noise is for a mean of "
                "clipped updates, and that makes none. Take strategy=fedavg, fedprox, fedavgm, "
                "fedadam, fedyogi or fedadagrad."
            )
        if key := next((k for k in ("clip_norm", "clip_weights") if node[k]), None):
            return (
                f"privacy=client with strategy.{key}={node[key]}: privacy.clip_norm bounds the "
                f"updates. Set strategy.{key}=null."
            )
        if self.adaptive and self.secure_aggregation:
            return (
                "privacy.adaptive=true with privacy.secure_aggregation=true: the server counts no "
                "updates within the bound that it does not see. Set privacy.adaptive=false."
            )
        cohort = cohort_size(cfg.num_clients, node.fraction_fit)
        least = self.noise_multiplier / 2 / BITS
        if self.adaptive and cohort <= least:
            return (
                f"privacy.adaptive=true with {cohort} clients a round: how many are within the "
                f"bound would need more noise than that. Take more than {least:.0f} clients a "
                "round, or privacy.adaptive=false."
            )
        return None

    def loudness(self, size: int, cohort: int) -> float:
        return self.noise_multiplier * math.sqrt(size) / cohort

    def memory(self) -> dict[str, float]:
        return {"clip_norm": self.clip_norm} if self.adaptive else {}

    def recall(self, entry: dict[str, Any]) -> None:
        self.clip_norm = entry.get("clip_norm", self.clip_norm)


class Summed(Step):
    """Updates clipped and counted alike; noise on their sum over the planned `cohort`."""

    def __init__(self, level: Client, cohort: int) -> None:
        self.level, self.cohort = level, cohort
        # In a sum of updates that nobody sees it is there already.
        self.noise_multiplier = (
            0.0 if level.secure_aggregation else level.noise_multiplier
        )

    def arrive(self, one: Contribution) -> Contribution:
        return replace(one, update=clipped(one.update, self.level.clip_norm), weight=1)

    def total(self, mean: State, count: int) -> State:
        std = self.noise_multiplier * self.level.clip_norm / self.cohort
        share = count / self.cohort  # who is absent counts as 0
        return {k: share * v + noise(v.shape, std) for k, v in mean.items()}


class Adaptive(Summed):
    """Likewise, with a bound that follows the updates: one more value of each update says
    on which side of the bound it is, +1/2 or -1/2, and is summed as all others are."""

    def __init__(self, level: Client, cohort: int) -> None:
        super().__init__(level, cohort)
        self.bits = BITS * cohort  # standard deviation, of a sum
        left = self.noise_multiplier**-2 - (2 * self.bits) ** -2
        self.noise_multiplier = left**-0.5

    def arrive(self, one: Contribution) -> Contribution:
        inside = norm(one.update) <= self.level.clip_norm
        one = super().arrive(one)
        return replace(one, update=one.update | {INSIDE: torch.tensor(inside - 0.5)})

    def total(self, mean: State, count: int) -> State:
        bit = mean[INSIDE] * count / self.cohort
        bit = float(bit + noise(bit.shape, self.bits / self.cohort))
        made = super().total({k: v for k, v in mean.items() if k != INSIDE}, count)
        self.level.clip_norm *= math.exp(-RATE * (bit + 0.5 - QUANTILE))
        return made


class Local(Noisy):
    """Each client clips its update and puts noise on it before it leaves.

    So nobody needs to be trusted, the server neither: what leaves is about as likely whatever
    records the client has. Any two updates are 2 `clip_norm` apart at most. The server gets no
    figures of training, and no other kind of answer; the client keeps account on its own disk
    of all that has left, rounds that are repeated too, and ends it at `epsilon`.
    """

    discreet = True
    adjacency = "one client's records replaced by any others"
    released = "asked"
    reach = 2.0

    def noise_found(self, times: int, rate: float | None) -> dict[str, float] | None:
        return super().noise_found(times, None)  # the server knows who is asked

    def step(self, cohort: int) -> Step:
        return Leaving(self)

    def loudness(self, size: int, cohort: int) -> float:
        return self.noise_multiplier * math.sqrt(size / cohort)

    def answers(self, kind: str) -> None:
        raise Refusal(f"with privacy=local it sends noisy updates, and no {kind}")

    def tells(self, metrics: dict[str, Any]) -> dict[str, Any]:
        return self.silent(metrics)


class Leaving(Step):
    """An update clipped, with noise on it, and written down before it leaves."""

    def __init__(self, level: Local) -> None:
        self.level = level

    def leave(self, update: State, kept: Any) -> State:
        level = self.level
        noises = [*kept.listed("releases"), level.noise_multiplier]
        most = level.epsilon
        if most is not None and level.spent(noises) > most * (1 + 1e-6):
            raise Refusal("its privacy.epsilon is spent")
        kept.enlist("releases", level.noise_multiplier)
        std = level.noise_multiplier * level.clip_norm
        return noisy(clipped(update, level.clip_norm), std)

    def arrive(self, one: Contribution) -> Contribution:
        return replace(one, weight=1)


class Record(Budgeted):
    """DP-SGD on each client: what it sends tells little of any one of its records.

    To whoever sees it, the server among them. Either `noise_multiplier` is given, or the
    least is found with which all rounds that the client is asked in cost `epsilon`; no round
    is trained that would pass that.
    """

    records = True
    discreet = True
    adjacency = "one record added or removed"

    def fault(self, cfg: Settings, made: Any) -> str | None:
        arguments, strategy = cfg.train.training_arguments, cfg.strategy
        norm, processes = arguments.get("max_grad_norm"), cfg.launch.processes
        wrong = {
            "train.training_arguments.max_steps=-1: a step draws each record by chance, so "
            "there are no epochs. Set train.training_arguments.max_steps=10": (
                arguments.max_steps < 1
            ),
            f"train.training_arguments.max_grad_norm={norm}: each record is clipped by "
            "itself, to privacy.clip_norm. Leave it out": bool(norm),
            f"strategy.fraction_evaluate={strategy.fraction_evaluate}: losses on records "
            "held back have no noise, and which are held back hangs on all of them. Set "
            "strategy.fraction_evaluate=0; evaluate.* asks test questions": (
                strategy.fraction_evaluate > 0
            ),
            "strategy.weighted_by=records: how many there are is not told. Set "
            "strategy.weighted_by=examples": strategy.weighted_by == "records",
            f"launch.processes={processes}: a client clips record by record in one process. "
            "Take launch=single": processes > 1,
            f"personal._target_={cfg.personal._target_}: it would train on the records a "
            "second time, and choose on some held back. Take personal=none": (
                personal.build(cfg.personal).makes
            ),
            f"mode={cfg.mode}: everybody's records are in one place, and no client's to "
            "account for. Take mode=federated": bool(
                cfg.baseline and cfg.baseline.records == "all"
            ),
        }
        fault = next((text for text, is_so in wrong.items() if is_so), None)
        return fault and f"privacy={type(self).__name__.lower()} with {fault}."

    def answers(self, kind: str) -> None:
        if kind != "control variates":  # which are means of noisy gradients
            raise Refusal(f"with privacy=record it sends noisy updates, and no {kind}")

    def begin(self, cfg: Settings, partition: int, records: int) -> dpsgd.Mechanism:
        """Charges the client's ledger with the round, and logs what is spent.

        The number of records is taken to be known: the rate, and so epsilon, follow from it.
        """
        arguments = cfg.train.training_arguments
        batch = (
            arguments.per_device_train_batch_size
            * arguments.gradient_accumulation_steps
        )
        rate, steps = min(1.0, batch / records), arguments.max_steps
        z = self.noise_multiplier or dpsgd.noise_for(
            self.epsilon, self.delta, rate, planned(cfg) * steps
        )
        run = Path(cfg.residuals).name
        limits = []
        if self.epsilon:
            limits.append(
                dpsgd.Limit("the run's privacy.epsilon", self.epsilon, self.delta, run)
            )
        if ceiling := cfg.get("ceiling"):
            limits.append(dpsgd.Limit("its own epsilon", **ceiling))
        folder = Path(cfg.get("ledger", cfg.residuals))
        ledger = dpsgd.Ledger(folder / f"{partition}-privacy.json")
        ledger.charge(dpsgd.Use(run, z, rate, steps), limits)
        uses = ledger.uses()
        own = dpsgd.spent(uses, self.delta, run)
        whole = dpsgd.spent(uses, self.delta)
        say(
            f"privacy: epsilon {own:.3f} of each record in this run, {whole:.3f} in all, at "
            f"delta {self.delta:g} ({self.adjacency}): noise {z:.3f} x "
            f"{self.clip_norm:g}, rate {rate:.4g}, {steps} steps a round"
        )
        told = {"num-examples": batch * steps}  # expected, and the same for all
        if cfg.get("tell_epsilon", True):
            told["epsilon"] = own
        return dpsgd.Mechanism(records, rate, steps, self.clip_norm, z, told)
