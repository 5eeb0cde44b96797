"""The tasks of an evaluation: found, loaded with their data sets, and set up for a run."""

import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from samoyeds_hf.errors import EvaluationError

# What loading raises for files, configs and data sets that are not as they should be.
LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)


def load_tasks(
    tasks: str | Sequence[str], include_path: str | Path | None, seed: int | None
) -> Any:
    """The harness's TaskDict: task objects with their data sets, and groups, by name.

    Raises EvaluationError for unknown tasks, data sets that do not load and code execution.
    """
    names = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise EvaluationError(
            f"tasks must name at least one task, got {tasks!r}: `lm_eval ls tasks` lists them"
        )
    if include_path is not None and not Path(include_path).is_dir():
        raise EvaluationError(
            f"--include-path must be a directory with task yamls, got {include_path}"
        )
    manager = _task_manager(names, include_path)
    matches = {name: manager.match_tasks([name]) for name in names}
    if unknown := [name for name, matched in matches.items() if not matched]:
        raise EvaluationError(
            f"tasks must be known to lm-eval, got {', '.join(unknown)}: `lm_eval ls tasks` lists "
            "what it brings, --include-path adds the task yamls of a local directory"
        )
    _seed_everything(seed)  # as lm-eval does: some tasks draw their samples while they load
    try:
        loaded = manager.load(list(dict.fromkeys(chain.from_iterable(matches.values()))))
    except LOAD_ERRORS as err:
        raise EvaluationError(
            f"tasks must load with their data sets, got {', '.join(names)}: "
            f"{type(err).__name__}: {first_line(err)}"
        ) from err
    found = loaded["tasks"].items()
    if unsafe := [name for name, task in found if getattr(task, "UNSAFE_CODE", False)]:
        raise EvaluationError(
            f"tasks must not execute code that a model wrote, got {', '.join(unsafe)}: run them "
            "in a sandbox by `lm_eval --confirm_run_unsafe_code`, which loads sparse models too"
        )
    return loaded


def _task_manager(names: list[str], include_path: str | Path | None) -> Any:
    """An index of local tasks if they suffice: reading lm-eval's own 14 000 takes seconds."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager()
    local = TaskManager(include_path=str(include_path), include_defaults=False)
    # A local group may refer to lm-eval's tasks, so only plain tasks are surely complete.
    if set(names) <= set(local.all_subtasks):
        return local
    return TaskManager(include_path=str(include_path))


def prepare_tasks(loaded: Any, num_fewshot: int | None, seed: int | None) -> None:
    """Few-shot settings and seeds as ``simple_evaluate`` makes them, before each model."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    _seed_everything(seed)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:  # 0 in a task's yaml means: never few-shot
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED if seed is None else seed)


def _seed_everything(seed: int | None) -> None:
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED if seed is None else seed)
    np.random.seed(DEFAULT_OTHER_SEED if seed is None else seed)
    torch.manual_seed(DEFAULT_OTHER_SEED if seed is None else seed)


def first_line(err: BaseException) -> str:
    """The sentence of an exception whose message goes on for paragraphs."""
    return next((line for line in str(err).splitlines() if line.strip()), repr(err))
