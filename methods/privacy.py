"""What an adapter may tell of the clients and the records that it was trained on."""

import math
from pathlib import Path
from typing import Any

from methods import dpsgd, personal
from methods.base import Step
from utils import Refusal, Settings, cohort_size, construct, say


def build(node: dict[str, Any]) -> "Privacy":
    """What `conf/privacy` names. Raises `UserError` for what is no such class."""
    return construct(node, __name__, Privacy)


def planned(cfg: Settings) -> int:
    """In how many rounds a client trains at most, by the plan: in every second where half of
    them are asked, as they take turns; in any, as far as is known, where they are drawn."""
    if cfg.strategy.sampling != "epoch":
        return cfg.num_rounds
    cohort = cohort_size(cfg.num_clients, cfg.strategy.fraction_fit)
    return math.ceil(cfg.num_rounds * cohort / cfg.num_clients)


class Privacy:
    """None but that records stay where they are."""

    records = False  # whether what leaves a client is bounded in what it tells of each
    adjacency = ""  # what its epsilon is about
    epsilon: float | None = None
    delta: float | None = None

    def __init__(self, secure_aggregation: bool) -> None:
        self.secure_aggregation = secure_aggregation

    def step(self) -> Step:
        """What is done to updates on their way, before `strategy` gathers them."""
        return Step()

    def fault(self, cfg: Settings, made: Any) -> str | None:
        """Why it guarantees nothing with these settings, and what to do; or None.

        `made`: the `Aggregation`.
        """
        return None

    def answers(self, kind: str) -> None:
        """Raises `Refusal` where a client is not to send this beside its update."""

    def begin(
        self, cfg: Settings, partition: int, records: int
    ) -> dpsgd.Mechanism | None:
        """On a client, before it trains for a round on so many records: what is to be done
        to its gradients, if anything. Raises `Refusal` where it is not to train."""
        return None


class Record(Privacy):
    """DP-SGD on each client: what it sends tells little of any one of its records.

    To whoever sees it, the server among them. Either `noise_multiplier` is given, or the
    least is found with which all rounds that the client is asked in cost `epsilon`; no round
    is trained that would pass that.
    """

    records = True
    adjacency = "one record added or removed"

    def __init__(
        self,
        secure_aggregation: bool,
        clip_norm: float,
        noise_multiplier: float | None,
        epsilon: float | None,
        delta: float,
    ) -> None:
        super().__init__(secure_aggregation)
        if not (clip_norm and delta and (noise_multiplier or epsilon)):
            raise ValueError(
                "privacy.clip_norm, privacy.delta and one of privacy.epsilon and "
                "privacy.noise_multiplier are needed"
            )
        self.clip_norm, self.noise = clip_norm, noise_multiplier
        self.epsilon, self.delta = epsilon, delta

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
                personal.build(cfg.personal).trainings > 1
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
        noise = self.noise or dpsgd.noise_for(
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
        ledger.charge(dpsgd.Use(run, noise, rate, steps), limits)
        uses = ledger.uses()
        own = dpsgd.spent(uses, self.delta, run)
        whole = dpsgd.spent(uses, self.delta)
        say(
            f"privacy: epsilon {own:.3f} of each record in this run, {whole:.3f} in all, at "
            f"delta {self.delta:g} ({self.adjacency}): noise {noise:.3f} x "
            f"{self.clip_norm:g}, rate {rate:.4g}, {steps} steps a round"
        )
        told = {"num-examples": batch * steps}  # expected, and the same for all
        if cfg.get("tell_epsilon", True):
            told["epsilon"] = own
        return dpsgd.Mechanism(records, rate, steps, self.clip_norm, noise, told)
