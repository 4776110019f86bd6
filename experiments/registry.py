"""All tasks by name, and what makes the runs of one."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from experiments.log import Result, ResultLog, Setting
from experiments.matrix import MATRIX_METHODS, MATRIX_TASKS, MatrixRuns, MatrixTask
from experiments.methods import METHODS
from experiments.runs import PretrainedRuns
from experiments.summary import Summary, summarize
from experiments.tasks import BEFORE, PRETRAINED_TASKS, PretrainedTask, Task
from loft_jax.errors import InputError

TASKS: dict[str, Task] = {**MATRIX_TASKS, **PRETRAINED_TASKS}
"""Those of matrices first."""


def methods_of(task: Task) -> tuple[str, ...]:
    """Names of the methods that a task can be run with."""
    return MATRIX_METHODS if isinstance(task, MatrixTask) else (*METHODS, BEFORE)


def runs_of(task: Task, assets: Path) -> Callable[..., Result]:
    """What makes a run from a cell.

    Args:
        task: Of the cells.
        assets: Where models and data lie.
    """
    if isinstance(task, MatrixTask):
        return MatrixRuns(task)
    assert isinstance(task, PretrainedTask)
    return PretrainedRuns(task, assets)


def read_results(log: ResultLog, task: Task) -> list[Result]:
    """The runs of a task that are there.

    Args:
        log: Of the task.
        task: As it is now.

    Returns:
        The results; the steps of a run that has not arrived are infinite.

    Raises:
        InputError: Some are of the task as it was before, with other steps or data.
    """
    results = log.read()
    for result in results:
        if (digest := result.made_with.get("task")) != task.digest:
            raise InputError(
                f"{log.path}: has runs of another form of the task ({digest}, now {task.digest}); "
                "move it away"
            )
    return [
        replace(
            result,
            validation=_arrived(result.validation, task),
            test=_arrived(result.test, task),
        )
        for result in results
    ]


def _arrived(measures: Mapping[str, float], task: Task) -> Mapping[str, float]:
    """A run that was above its goal at every step, the start among them, has not come to it."""
    late = measures.get("steps", 0) > task.steps
    return {**measures, "steps": math.inf} if late else measures


def summaries_of(task: Task, results: Iterable[Result]) -> dict[Setting, Summary]:
    """Each method at its best learning rate, by what the task judges rates by.

    Of settings that are planned, rates that are not do not count: a method with more rates than the
    others would have more to choose from.

    Args:
        task: Of the results.
        results: All there are.

    Returns:
        By setting, in the order of the plan.
    """
    planned: dict[Setting, set[float]] = {}
    for cell in task.cells():
        planned.setdefault(cell.setting, set()).add(cell.learning_rate)
    by = task.measure if task.measure == "steps" else "loss"
    trained = [
        result
        for result in results
        if result.cell.method != BEFORE
        and result.cell.learning_rate
        in planned.get(result.cell.setting, {result.cell.learning_rate})
    ]
    found = summarize(trained, by=by, seeds=task.seeds)
    return {setting: found[setting] for setting in (*planned, *found) if setting in found}
