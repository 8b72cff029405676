"""Federated fine-tuning of a language model in Flower's simulation engine.

    python main.py                          the published default: one GPU, hub access
    python main.py experiment=quickstart    one minute on a laptop: no GPU, no network

Every setting is in `conf/`; any of them can be given here: `num_rounds=50`.
"""

import json
import logging
import os
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import utils
from checks import check


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    if not config.verbose:
        utils.quiet()
    if not (utils.local_path(str(config.model.name)) and config.dataset.get("path")):
        utils.offline_if_unreachable()
    cfg = check(config)
    if cfg["dry_run"]:
        import plan

        utils.say(plan.show(cfg))
        return
    # Imported here, so that a mistake is answered without waiting for them.
    from flwr.simulation import run_simulation

    from app import make_client_app, make_server_app

    folder = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    utils.say(f"{describe(cfg)}\nResults: {folder}")
    run_simulation(
        server_app=make_server_app(cfg, folder),
        client_app=make_client_app(cfg),
        num_supernodes=cfg["num_clients"],
        backend_config={
            "init_args": {
                "log_to_driver": cfg["verbose"],
                "logging_level": logging.INFO if cfg["verbose"] else logging.ERROR,
            },
            # Passed on to Ray: a worker that is killed comes back for later rounds.
            "client_resources": {**cfg["client_resources"], "max_restarts": -1},
        },
    )
    report(folder)


def describe(cfg: dict) -> str:
    """One line on what is about to run."""
    strategy = cfg["strategy"]["_target_"].rpartition(".")[2]
    bits = cfg["model"]["quantization"]
    return (
        f"{cfg['model']['name']} ({f'{bits}-bit' if bits else 'not quantised'}), "
        f"{cfg['peft']['_target_'].rpartition('.')[2].removesuffix('Config')}, "
        f"{strategy}: {cfg['num_clients']} clients, "
        f"{cfg['strategy']['fraction_fit']:.0%} of them a round, {cfg['num_rounds']} rounds"
    )


def report(folder: Path) -> None:
    """Print a finished run's last word: losses, scores, sample answers, what to do next."""
    summary = json.loads((folder / "summary.json").read_text())
    utils.say(
        f"\nTraining loss {summary['train_loss_first']:.3f} -> "
        f"{summary['train_loss_last']:.3f} in {summary['rounds']} rounds, "
        f"{summary['seconds']:.0f} s."
    )
    adapter = folder / f"peft_{summary['rounds']}"
    question = "What is the ideal 1-day plan in London?"
    if "exact_match_after" in summary:
        answers = json.loads((folder / "answers.json").read_text())
        for record in answers[:: max(1, len(answers) // SHOWN)][:SHOWN]:
            utils.say(f"\n  {record['instruction']} {record['input']}".rstrip())
            for name in ("base", "tuned"):
                utils.say(f"    {name + ':':6} {' '.join(record[name].split())}")
        utils.say(
            f"\nExact match on {len(answers)} held-out questions: "
            f"{summary['exact_match_before']:.1%} -> {summary['exact_match_after']:.1%}"
        )
        question = answers[0]["instruction"]
    utils.say(f'\nAsk it: python test.py --peft-path={adapter} --question="{question}"')


SHOWN = 3  # sample questions printed after a run

if __name__ == "__main__":
    main()
