"""Federated fine-tuning of a language model in Flower's simulation engine.

    python main.py                          the published default: one GPU, hub access
    python main.py experiment=quickstart    one minute on a laptop: no GPU, no network

Every setting is in `conf/`; any of them can be given here: `num_rounds=50`.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import utils
from checks import check, check_choices, check_nodes, check_values, resolve, resumed


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    check_values(resolve(config))  # every key that is used below is there
    folder = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    # Not resolved: one may refer to another setting.
    task = HydraConfig.get().overrides.task
    overrides = OmegaConf.to_container(task, resolve=False)
    if config.resume:
        folder = Path(config.resume)
        config, overrides = resumed(config.resume, overrides)
    if not config.verbose:
        utils.quiet()
    if not (utils.local_path(str(config.model.name)) and config.dataset.get("path")):
        utils.offline_if_unreachable()
    cfg = check(config)
    if cfg["dry_run"]:
        import plan

        utils.say(plan.show(cfg, folder))
        return
    # Imported here, so that a mistake is answered without waiting for them.
    import journal
    from strategy import Stopped

    utils.say(f"{journal.describe(cfg)}\nResults: {folder}")
    if note := journal.quantised_on_cpu(cfg):
        utils.say(f"Note: {note}.")
    if cfg["resume"]:
        utils.record(config, overrides, folder)
    try:
        simulate(cfg, folder)
    except Stopped as error:
        utils.say(str(error))
        raise SystemExit(utils.INTERRUPTED) from error
    journal.report(cfg, folder)


def simulate(cfg: dict[str, Any], folder: Path) -> None:
    from flwr.simulation import run_simulation

    from app import make_client_app, make_server_app
    from strategy import STOP

    with start_ray(cfg):
        utils.on_interrupt(STOP.set)  # Ray has just put a handler of its own there
        run_simulation(
            server_app=make_server_app(cfg, folder),
            client_app=make_client_app(cfg, folder),
            num_supernodes=cfg["num_clients"],
            # Passed on to Ray: a worker that is killed comes back for later rounds.
            backend_config={
                "client_resources": {**cfg["client_resources"], "max_restarts": -1}
            },
        )


# What the libraries read when they are imported. On a cluster, workers inherit it from the
# machine they are on: without HF_HUB_OFFLINE, one behind a firewall would wait for the hub.
PASSED_ON = (
    "FLWR_",
    "HF_DATASETS_",
    "HF_HUB_",
    "TOKENIZERS_",
    "TQDM_",
    "TRANSFORMERS_",
)


@contextmanager
def start_ray(cfg: dict[str, Any]) -> Iterator[None]:
    """Start Ray here or join a cluster, as `simulation.init_args` say, until the end.

    Flower takes up the connection that it finds. Raises `UserError` where Ray refuses or
    no machine has room for a client.
    """
    import ray

    passed_on = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}
    if not cfg["client_resources"]["num_gpus"]:
        passed_on["CUDA_VISIBLE_DEVICES"] = ""  # a worker would take one that it sees
    try:
        connection = ray.init(
            **cfg["simulation"]["init_args"],
            log_to_driver=cfg["verbose"],
            logging_level=logging.INFO if cfg["verbose"] else logging.ERROR,
            runtime_env={"env_vars": passed_on},
        )
    except Exception as error:
        hint = ". Is this machine one of its nodes?" * isinstance(error, OSError)
        raise utils.UserError(f"simulation.init_args: {error}{hint}") from error
    with connection:
        check_nodes(cfg["client_resources"], ray.nodes())
        yield


if __name__ == "__main__":
    try:
        check_choices(sys.argv[1:])
    except utils.UserError as error:
        sys.exit(str(error))
    main()
