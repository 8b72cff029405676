"""What privacy costs in exact match, by epsilon and by what is trained.

    python benchmarks/privacy.py --settings ffa-2 --epsilons none 8 --out privacy/
    python benchmarks/privacy.py --level record --settings ffa-2 --epsilons none 8 --out privacy-record/
    python benchmarks/privacy.py --out privacy/   # all, a night on two cores
    python benchmarks/privacy.py --size 0.06 --rounds 2 --settings ffa-2 --epsilons 8   # a try, in a minute

`experiment=private`: the 3409 questions that the project ships, and what each is about. At the level of
clients they are dealt out to a thousand virtual ones or more, who are all asked in each round; at
that of records to 16, who take all their records in each round's one step. Each setting is trained
without privacy, with the updates clipped and counted alike but next to no noise (`clipped`: what
the clipping alone costs), and with the noise that each epsilon takes. Prints a Markdown table: of
each run the exact match, what it has spent, and at the level of clients how long the noise on a
round's mean is over the bound. `--size` scales the number of clients. With `--out`, runs that are
done are not run again, and `privacy.png` is drawn.
"""

import argparse
import itertools
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from assets.testbed.runs import run

# What is trained, by name.
SETTINGS = {
    "ffa-2": [],
    "lora-2": ["sharing=all"],
    "lora-16": ["sharing=all", "model.lora.peft_lora_r=16"],
    "miss-2": ["sharing=all", "peft=miss"],
    "fourierft": ["sharing=all", "peft=fourierft"],
    "ia3": ["sharing=all", "peft=ia3"],
}

# Of each level the clients, and what else differs from the experiment.
BATCH = "train.training_arguments.per_device_train_batch_size"
LEVELS = {
    "client": (1000, {}),
    # All of a client's 213 or 214 records in a step.
    "record": (16, {"num_rounds": 120, BATCH: 256}),
}

HEAD = ["trained", "values", "clients a round", "epsilon", "seed"]
HEAD += ["exact match, %", "epsilon spent", "noise over clip_norm"]


def common(options: argparse.Namespace) -> list[str]:
    clients, others = LEVELS[options.level]
    clients = max(2, round((options.clients or clients) * options.size))
    given = {"num_rounds": options.rounds, "strategy.fraction_fit": options.fraction}
    others = others | {key: value for key, value in given.items() if value}
    told = [f"{key}={value}" for key, value in others.items()]
    return ["experiment=private", f"num_clients={clients}", *told]


def budget(level: str, epsilon: str, clip: float) -> list[str]:
    """The overrides of a cell: `none`, `clipped`, or an epsilon."""
    if epsilon == "none":
        return ["privacy=none"]
    if epsilon == "clipped":
        spent = ["privacy.epsilon=null", "privacy.noise_multiplier=1e-6"]
    else:
        spent = [f"privacy.epsilon={epsilon}"]
    return [f"privacy={level}", *spent, f"privacy.clip_norm={clip}"]


def noise(overrides: list[str]) -> tuple[int, int, float]:
    """The values that clients send, how many clients do, and the noise over the bound."""
    import model
    from settings.compose import compose
    from settings.preflight import check_privacy, loudness, resolve

    cfg = check_privacy(resolve(compose(" ".join(overrides))))
    length, size, cohort = loudness(cfg, model.skeleton(cfg.model, cfg.peft))
    return size, cohort, length


def draw(rows: list[list[str]], path: Path) -> None:
    """Exact match over epsilon, a line for each setting: the mean over the seeds."""
    from reporting.figures import COLOURS, figure

    with figure(path) as (axes,):
        names = dict.fromkeys(row[0] for row in rows)
        for name, colour in zip(names, itertools.cycle(COLOURS)):
            found: dict[str, list[float]] = {}
            for row in rows:
                if row[0] == name:
                    found.setdefault(row[3], []).append(float(row[5]))
            means = {key: sum(each) / len(each) for key, each in found.items()}
            curve = sorted((float(k), v) for k, v in means.items() if k[0].isdigit())
            axes.plot(*zip(*curve, strict=True), label=name, color=colour)
            if "none" in means:
                axes.axhline(means["none"], color=colour, ls=":", lw=1, marker="")
        axes.set_xlabel("epsilon (dotted: no privacy)")
        axes.set_ylabel("exact match, %")
        axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", choices=LEVELS, default="client")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--size", type=float, default=1.0, help="of --clients")
    parser.add_argument("--fraction", type=float, help="of them a round")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--clip", type=float, default=1.0, help="privacy.clip_norm")
    parser.add_argument(
        "--epsilons", nargs="+", default=["none", "clipped", "8", "4", "2"]
    )
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS], metavar="NAME"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, help="where the runs are kept")
    parser.add_argument("overrides", nargs="*", help="more overrides for the app")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        out = (options.out or Path(temporary)).resolve()
        print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
        for name, epsilon, seed in itertools.product(
            options.settings, options.epsilons, options.seeds
        ):
            chosen = [*common(options), *SETTINGS[name], *options.overrides]
            chosen += [*budget(options.level, epsilon, options.clip), f"seed={seed}"]
            summary = run(out / f"{name}-{epsilon}-{seed}", *chosen)
            size, cohort, length = noise(chosen)
            told = summary.get("epsilon", math.inf)
            rows.append(
                [
                    *(name, f"{size:,}", f"{cohort}", epsilon, f"{seed}"),
                    f"{100 * summary['exact_match_after']:.1f}",
                    *(f"{told:.3g}", f"{length:.3g}"),
                ]
            )
            print(f"| {' | '.join(rows[-1])} |", flush=True)
        if options.out and any(epsilon[0].isdigit() for epsilon in options.epsilons):
            draw(rows, out / "privacy.png")


if __name__ == "__main__":
    main()
