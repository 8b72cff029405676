"""An adapter under EleutherAI's language model evaluation harness (lm-eval, `requirements.txt`).

lm-eval's tasks become records of ours, so that a model is asked in the words that it was
trained with: `records/templates.py` makes every token, as in training.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import PreTrainedTokenizerBase

import model
from records import templates
from records.batches import Collator
from utils import PROJECT, UserError, local_path

TASKS = PROJECT / "evaluation/tasks"

SEED = 1234  # lm-eval's own, by which few-shot examples are drawn


class Prompt(str):
    """A prompt as text, which is what lm-eval passes on, and the record that it came from."""

    record: templates.Record


class Adapter(HFLM):
    """A model for lm-eval's tasks that is asked in the template of its training.

    A task's `description` is the record's instruction and its question the input; without
    a description the question is the instruction. Few-shot examples stand in the question.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        batch_size: int,
    ) -> None:
        dtype = model.compute_dtype(net.device)
        with _hushed():
            super().__init__(
                pretrained=net,
                tokenizer=tokenizer,
                batch_size=batch_size,
                mixed_precision_dtype=None if dtype == torch.float32 else dtype,
                softmax_dtype=torch.float32,
            )
        self.template = template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> Prompt:
        """The prompt of at most one message of each role; an assistant's begins the answer."""
        said = {message["role"]: message["content"] for message in chat_history}
        question, answer = said["user"], said.get("assistant", "")
        if description := said.get("system", "").rstrip("\n"):
            record = {"instruction": description, "input": question, "output": answer}
        else:
            record = {"instruction": question, "input": "", "output": answer}
        asked = [templates.question(record)]
        text = templates.text(self.template, asked, self.tokenizer)
        prompt = Prompt(text + answer)
        prompt.record = record
        return prompt

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        if not isinstance(string, Prompt):
            return super().tok_encode(string, *args, **kwargs)
        return self._tokens(string.record)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self.tok_encode(string) for string in strings]
        longest = max(map(len, rows))
        if left_truncate_len and longest > left_truncate_len:
            logging.getLogger("lm_eval").warning(
                "A prompt of %d tokens loses its beginning: %d is what the model takes.",
                longest,
                left_truncate_len,
            )
            rows = [row[-left_truncate_len:] for row in rows]
        collate = Collator(self.tokenizer.pad_token_id, padding_side)
        batch = collate([{"input_ids": row, "labels": row} for row in rows])
        return batch["input_ids"], batch["attention_mask"]

    def _encode_pair(
        self, context: str, continuation: str
    ) -> tuple[list[int], list[int]]:
        if not isinstance(context, Prompt):
            return super()._encode_pair(context, continuation)
        # A space belongs to the word that follows it, as in training.
        begun = context.record["output"].rstrip()
        before = self._tokens(context.record | {"output": begun})
        answer = context.record["output"] + continuation
        whole = self._tokens(context.record | {"output": answer})
        return before, whole[len(before) :]

    def _tokens(self, record: templates.Record) -> list[int]:
        """The prompt, and the answer as far as there is one, without what ends it."""
        if not record["output"].strip():
            asked = [templates.question(record)]
            return templates.prompt(self.template, asked, self.tokenizer)
        before, after = templates.answered(record, self.template, self.tokenizer)
        return before + after

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=not sys.stderr.isatty())

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        answers = super().generate_until(requests, disable_tqdm=not sys.stderr.isatty())
        # The space before an answer (vicuna's, for one) is the template's.
        space = templates.around(self.template, self.tokenizer)[0]
        # What ends an answer may be no special token, which lm-eval would have left out.
        _, end = templates.end(self.template, self.tokenizer)
        end = self.tokenizer.convert_ids_to_tokens(end)
        answers = [answer.partition(end)[0] for answer in answers]
        return [
            answer if request.args[0].record["output"] else answer.removeprefix(space)
            for request, answer in zip(requests, answers, strict=True)
        ]

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        own = self.model.generation_config
        ends = templates.ends(self.template, self.tokenizer, own)
        return super()._model_generate(*args, eos_token_id=ends, **kwargs)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without lm-eval's remarks on how it is used; those on what it truncates are shown."""
    logger = logging.getLogger("lm_eval")
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(logging.NOTSET)


# --- tasks -----------------------------------------------------------------------------------


def load(names: list[str], allow_code: bool) -> tuple[list[str], dict[str, Any]]:
    """The names of tasks and groups, and both with their questions, as lm-eval takes them.

    `names`: lm-eval's, those of `evaluation/tasks/`, or paths of task files. Paths in a task file are
    relative to the working directory; in those of `evaluation/tasks/` to the project's folder. Raises
    `UserError` for an unknown name, for a task that runs generated code unless `allow_code`,
    and where the questions cannot be loaded.
    """
    manager, specs = _find(names)
    index = manager.task_index
    for spec in specs:
        for config in _configs(spec, index):
            if config.get("unsafe_code") and not allow_code:
                raise UserError(
                    f"--tasks: {config['task']} runs code that the model writes, on this "
                    "machine and as this user. Where that may be: --allow-code-execution"
                )
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    loaded: list[Any] = []
    for name, spec in zip(names, specs, strict=True):
        path = index[spec].yaml_path
        ours = path is not None and path.is_relative_to(TASKS)
        try:
            with _hushed(), contextlib.chdir(PROJECT if ours else "."):
                found = manager.load([spec])
        except Exception as error:  # whatever the libraries make of what is missing
            raise UserError(
                f"--tasks={name}: the questions could not be loaded. Those of the hub need "
                "a network; a task file of yours does not (evaluation/tasks/tiny_qa.yaml shows one). "
                f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            ) from error
        group = found["groups"].get(spec)
        loaded += [group] if group else found["tasks"].values()
    titles = [
        item.name if isinstance(item, Group) else item.task_name for item in loaded
    ]
    try:
        return titles, manager.load(loaded)
    except ValueError as error:  # a task named twice, by itself and in a group
        raise UserError(f"--tasks: {error}") from error


def _find(names: list[str]) -> tuple[TaskManager, list[str]]:
    """Where all tasks are known, and their names there.

    lm-eval's 14,000 take seconds to read, and are only where ours are not enough.
    """
    for defaults in (False, True):
        manager = TaskManager(include_path=TASKS, include_defaults=defaults)
        try:
            specs = [_register(name, manager.task_index) for name in names]
            for spec in specs:
                list(_configs(spec, manager.task_index))
        except KeyError as error:
            unknown = error.args[0]
        else:
            return manager, specs
    ours = ", ".join(path.stem for path in sorted(TASKS.glob("*.yaml")))
    raise UserError(
        f"--tasks: {unknown} is neither a task of lm-eval's, nor one of evaluation/tasks/ ({ours}), "
        "nor a task file that is here."
    )


def _register(name: str, index: dict[str, Any]) -> str:
    """The name in `index` of a task, or of a task file, which is entered there."""
    path = local_path(name) if name.endswith((".yaml", ".yml")) else None
    if path is None:
        return name
    found: dict[str, Any] = {}
    try:
        TaskIndex.process_cfg(load_yaml(path, resolve_func=False), path, found)
    except Exception as error:  # no YAML, or of another shape
        raise UserError(f"--tasks={name} is no task file: {error}") from error
    index |= found
    return next(iter(found))  # its tags come after


def _configs(node: Any, index: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings of every task under a name, or under an entry of a group's list.

    Raises `KeyError` for a name that is unknown.
    """
    if isinstance(node, str):
        entry = index[node]
        if entry.kind in (Kind.TASK, Kind.PY_TASK):
            yield entry.cfg
            return
        below = entry.tags if entry.kind is Kind.TAG else entry.cfg["task"]
        node = {"task": below}
    if "dataset_path" in node:  # a task that is written out in its group
        yield node
        return
    below = node.get("task", node.get("group"))
    for child in [below] if isinstance(below, str) else below:
        yield from _configs(child, index)


# --- results ---------------------------------------------------------------------------------


def run(lm: Adapter, tasks: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """lm-eval's results. `tasks`: of `load`, which was told what code may run."""
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(SEED)
    with model.autocast(lm.model):
        return evaluate(
            lm,
            tasks,
            limit=limit,
            log_samples=False,
            apply_chat_template=True,
            fewshot_as_multiturn=False,
            confirm_run_unsafe_code=True,
        )


def figures(
    titles: list[str], tasks: dict[str, Any], results: dict[str, Any]
) -> list[dict[str, Any]]:
    """What is in the results, in order: task, metric, questions, value and standard error.

    And FlowerTune's value, where a preset has one. A group that has no value of its own is
    shown by its parts, and the average of the first value of each if they are one metric.
    """
    rows = []
    for title in titles:
        group = tasks["groups"].get(title)
        published = (group.metadata or {}).get("flowertune", {}) if group else {}
        firsts, metrics = [], set()
        for part in _parts(title, tasks, results):
            found = results["results"][part]
            keys = _metrics(found)
            firsts.append(found[keys[0]])
            metrics.add(_title(keys[0]))
            for key in keys:
                rows.append(
                    {
                        "task": part,
                        "metric": _title(key),
                        "questions": found["sample_len"],
                        "value": found[key],
                        "stderr": found.get(key.replace(",", "_stderr,")),
                        "flowertune": published.get(part) if key == keys[0] else None,
                    }
                )
        if len(firsts) > 1 and len({name.partition(" ")[0] for name in metrics}) == 1:
            rows.append(
                {
                    "task": f"{title}: average",
                    "metric": metrics.pop(),
                    "questions": None,
                    "value": sum(firsts) / len(firsts),
                    "stderr": None,
                    "flowertune": published.get("average"),
                }
            )
    return rows


def _title(key: str) -> str:
    return key.removesuffix(",none").replace(",", " ")


def sources(titles: list[str], tasks: dict[str, Any]) -> list[str]:
    """Where the values of FlowerTune that stand in `figures` come from."""
    groups = [tasks["groups"][title] for title in titles if title in tasks["groups"]]
    found = [(group.metadata or {}).get("source") for group in groups]
    return list(dict.fromkeys(filter(None, found)))


def _parts(name: str, tasks: dict[str, Any], results: dict[str, Any]) -> list[str]:
    if _metrics(results["results"].get(name, {})):
        return [name]
    children = tasks["group_map"][name]
    return [part for child in children for part in _parts(child, tasks, results)]


def _metrics(found: dict[str, Any]) -> list[str]:
    """The keys of values, which are metric,filter; others are metric_stderr,filter or alias."""
    return [key for key in found if "," in key and "_stderr," not in key]
