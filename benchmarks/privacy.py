"""What client-level privacy costs in exact match, by epsilon and by what is trained.

    python benchmarks/privacy.py --settings lora-2 --epsilons none 8 --out privacy/
    python benchmarks/privacy.py --out privacy/   # all, hours on two cores
    python benchmarks/privacy.py --size 0.06 --rounds 2 --settings ffa-2 --epsilons 8   # a try, in a minute

`experiment=private`: the quickstart's 3409 records dealt out to a thousand virtual clients or
more, who are all asked in each round, and its test questions. Each setting is trained without privacy, with the updates
clipped and counted alike but next to no noise (`clipped`: what the clipping alone costs), and
with the noise that each epsilon takes. Prints a Markdown table: of each run the exact match, what
it has spent, and how long the noise on a round's mean is over the bound. `--size` scales the
number of clients. With `--out`, runs that are done are not run again, and `privacy.png` is drawn.
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
    "lora-2": [],
    "ffa-2": ["sharing=ffa"],
    "lora-16": ["model.lora.peft_lora_r=16"],
    "miss-2": ["peft=miss"],
    "fourierft": ["peft=fourierft"],
    "ia3": ["peft=ia3"],
}

HEAD = ["trained", "values", "clients a round", "epsilon", "seed"]
HEAD += ["exact match, %", "epsilon spent", "noise over clip_norm"]


def common(options: argparse.Namespace) -> list[str]:
    clients = max(2, round(options.clients * options.size))
    others = {"num_rounds": options.rounds, "strategy.fraction_fit": options.fraction}
    given = [f"{key}={value}" for key, value in others.items() if value is not None]
    return ["experiment=private", f"num_clients={clients}", *given]


def level(epsilon: str, clip: float) -> list[str]:
    """The overrides of a cell: `none`, `clipped`, or an epsilon."""
    if epsilon == "none":
        return ["privacy=none"]
    if epsilon == "clipped":
        budget = ["privacy.epsilon=null", "privacy.noise_multiplier=1e-6"]
    else:
        budget = [f"privacy.epsilon={epsilon}"]
    return [*budget, f"privacy.clip_norm={clip}"]


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
        axes.set_xscale("log")
        axes.set_xlabel("epsilon of the most exposed client (dotted: no privacy)")
        axes.set_ylabel("exact match, %")
        axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=1000)
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
            chosen += [*level(epsilon, options.clip), f"seed={seed}"]
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
