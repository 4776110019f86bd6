"""All tasks by name, and what makes the runs of one."""

from collections.abc import Callable
from pathlib import Path

from comparison.matrix import MATRIX_TASKS, MatrixRuns, MatrixTask
from comparison.runs import LanguageRuns
from comparison.tasks import LANGUAGE_TASKS, LanguageTask, Task
from loft_jax.evaluation.comparison import Result

TASKS: dict[str, Task] = {**MATRIX_TASKS, **LANGUAGE_TASKS}
"""Those of matrices first."""


def runs_of(task: Task, assets: Path) -> Callable[..., Result]:
    """What makes a run from a cell.

    Args:
        task: Of the cells.
        assets: Where models and data lie.
    """
    if isinstance(task, MatrixTask):
        return MatrixRuns(task)
    assert isinstance(task, LanguageTask)
    return LanguageRuns(task, assets)
