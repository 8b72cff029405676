"""What protecting each record costs: exact match over epsilon, at record level (DP-SGD).

    python benchmarks/record_privacy.py --seeds 0 1 2 --out record-privacy/
    python benchmarks/record_privacy.py --epsilons 8 --seeds 0 --clip 0.3 1 3 --out record-privacy/   # choose a clip norm
    python benchmarks/record_privacy.py --seeds 0 --sharing ffa --out record-privacy/ model.lora.peft_lora_r=2

The quickstart's records, dealt out evenly to 16 clients that all train in each round. Each
client finds the noise with which the whole run costs its records `epsilon` (delta 1e-5, one
record added or removed); `none` is privacy=none with the same settings. Prints a Markdown
table; with `--out`, runs that are done are not run again. `--rounds 2` is for a look.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from assets.testbed.runs import run

HEAD = ["sharing", "epsilon", "clip norm", "rate", "seed", "told", "exact match, %"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--epsilons", nargs="+", default=["none", "16", "8", "4", "2", "1"]
    )
    parser.add_argument("--clip", type=float, nargs="+", default=[1.0])
    parser.add_argument("--rate", type=float, nargs="+", default=[1e-2])
    parser.add_argument("--sharing", nargs="+", default=["all", "ffa"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10, help="of a client in a round")
    parser.add_argument(
        "--batch", type=int, default=32, help="records of a step, expected"
    )
    parser.add_argument("--out", type=Path, help="where the runs are kept")
    parser.add_argument("overrides", nargs="*", help="more overrides for the app")
    options = parser.parse_args()
    arguments = "train.training_arguments"
    with tempfile.TemporaryDirectory() as temporary:
        out = (options.out or Path(temporary)).resolve()
        print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
        for sharing, epsilon, clip, rate, seed in itertools.product(
            options.sharing, options.epsilons, options.clip, options.rate, options.seeds
        ):
            level = ["privacy=record", f"privacy.epsilon={epsilon}"]
            level.append(f"privacy.clip_norm={clip}")
            settings = [
                *("experiment=quickstart", "model.quantization=null"),
                *("num_clients=16", "strategy.fraction_fit=1", f"seed={seed}"),
                *(f"sharing={sharing}", f"num_rounds={options.rounds}"),
                f"train.learning_rate_max={rate}",
                f"{arguments}.max_steps={options.steps}",
                f"{arguments}.per_device_train_batch_size={options.batch}",
                *(level if epsilon != "none" else []),
                *options.overrides,
            ]
            cell = [sharing, epsilon, f"{clip:g}", f"{rate:g}", f"{seed}"]
            shape = f"{options.rounds}-{options.steps}-{options.batch}"
            summary = run(out / "-".join([*cell, shape]), *settings)
            told = f"{summary['epsilon']:.2f}" if "epsilon" in summary else "-"
            match = f"{100 * summary['exact_match_after']:.1f}"
            print(f"| {' | '.join([*cell, told, match])} |", flush=True)


if __name__ == "__main__":
    main()
