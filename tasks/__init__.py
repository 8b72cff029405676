"""What a run learns: `conf/task`, a class each."""

import re

from tasks.base import Task
from utils import Settings, UserError, construct


def build(cfg: Settings) -> Task:
    """The task that `cfg.task` names, of a run's records. Raises `UserError` for none of ours."""
    target = cfg.task._target_
    if not re.fullmatch(r"tasks\.[a-z]\w*\.\w+", target):
        raise UserError(f"_target_={target} is not a class of tasks.")
    return construct(cfg.task, target.rpartition(".")[0], Task, cfg=cfg)
