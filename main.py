"""Federated fine-tuning of a language model in Flower's simulation engine.

    python main.py                          the published default: one GPU, hub access
    python main.py experiment=quickstart    one minute on a laptop: no GPU, no network

Every setting is in `conf/`; any of them can be given here: `num_rounds=50`.
"""

import logging
import os
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import hydra
import psutil
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

import utils
from settings.compose import check_choices
from settings.preflight import check_nodes
from settings.start import start
from utils import Settings


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float:
    """A run in Flower's simulation; its `optimized_metric`, for a sweeper that optimises."""
    utils.on_interrupt()  # until there is something to be saved
    folder = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    # Not resolved: one may refer to another setting.
    task = HydraConfig.get().overrides.task
    overrides = OmegaConf.to_container(task, resolve=False)
    return start(config, overrides, folder, simulate)


def simulate(cfg: Settings, folder: Path, overrides: list[str]) -> None:
    """Run the app in Flower's simulation engine. Exits where the run was stopped.

    Raises `UserError`; what else goes wrong in there, Ray's death say, is one of those too,
    with the traceback in the log and how to go on in its text.
    """
    from flwr.simulation import run_simulation

    from app import make_client_app, make_server_app

    with start_ray(cfg), watched(folder):
        # Ray has just put a handler of its own there.
        utils.on_interrupt(utils.STOP.set)
        try:
            run_simulation(
                server_app=make_server_app(cfg, folder),
                client_app=make_client_app(cfg, folder),
                num_supernodes=cfg.num_clients,
                # Passed on to Ray: a worker that is killed comes back for later rounds.
                backend_config={
                    "client_resources": {**cfg.client_resources, "max_restarts": -1}
                },
            )
        except utils.Stopped as error:
            with suppress(OSError):  # it may have stopped because nobody listens
                print(error, file=sys.stderr)
            raise SystemExit(utils.INTERRUPTED) from error
        except HydraException:
            raise
        except Exception as error:
            logging.exception("The run has failed")
            raise utils.UserError(
                f"{type(error).__name__}: {error}. Where it comes from is in main.log of "
                f"the run's folder. {last_word(folder)}"
            ) from error


def last_word(folder: Path) -> str:
    """How to go on after the newest checkpoint of a run.

    It is not read for that, which takes longer than Ray may leave us (see `watched`).
    """
    from server import checkpoint
    from server.rounds import go_on

    last = checkpoint.found(folder)[-1:]
    return go_on(folder, int(last[0].name) if last else 0)


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """End the run with a word on how to go on when a process that Ray is made of is killed.

    Ray would end it half a minute later, from C++ and with a dump of its own log. Where the
    raylet was killed it may do so at its next call to it, before we can say our word.
    """
    import ray

    parts = ("gcs_server", "raylet")
    ours = [child for child in psutil.Process().children() if child.name() in parts]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            dead, _ = psutil.wait_procs(ours, timeout=0)
            # Not where it was shut down, nor where a scheduler's SIGTERM went to all of us:
            # the run is about to save its last adapter then.
            if dead and ray.is_initialized() and not utils.STOP.is_set():
                told = "Ray was killed, for want of memory perhaps."
                utils.end_at_once(f"{told} {last_word(folder)}", code=1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


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
def start_ray(cfg: Settings) -> Iterator[None]:
    """Start Ray here or join a cluster, as `simulation.init_args` say, until the end.

    Flower takes up the connection that it finds. Raises `UserError` where Ray refuses or
    no machine has room for a client.
    """
    local = cfg.simulation.init_args.address == "local"
    if local and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        # Ray listens on all interfaces, and runs the code of whoever reaches it. It reads
        # this when it is imported; one token serves all runs of a multirun.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ |= token
    import ray

    passed_on = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}
    if not cfg.client_resources.num_gpus:
        passed_on["CUDA_VISIBLE_DEVICES"] = ""  # a worker would take one that it sees
    try:
        connection = ray.init(
            **cfg.simulation.init_args,
            log_to_driver=cfg.verbose,
            logging_level=logging.INFO if cfg.verbose else logging.ERROR,
            runtime_env={"env_vars": passed_on},
        )
    except SystemExit:  # how Ray answers a SIGTERM while it starts
        utils.end_at_once("Stopped.", utils.INTERRUPTED)
    except Exception as error:
        hint = ". Is this machine one of its nodes?" * isinstance(error, OSError)
        raise utils.UserError(f"simulation.init_args: {error}{hint}") from error
    with connection:
        check_nodes(cfg, ray.nodes())
        yield


if __name__ == "__main__":
    utils.on_interrupt()
    try:
        check_choices(sys.argv[1:])
    except utils.UserError as error:
        sys.exit(str(error))
    main()
