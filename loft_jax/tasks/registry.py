"""The tasks that the library has, one line each, and the choice of one for rows and a model."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from loft_jax.data.presets import find_preset
from loft_jax.data.row_formats import column_names
from loft_jax.errors import InputError, shown
from loft_jax.models.family import Family
from loft_jax.tasks.causal_lm import CausalLM
from loft_jax.tasks.choice import Choice
from loft_jax.tasks.classification import Classification, Regression
from loft_jax.tasks.image_classification import ImageClassification
from loft_jax.tasks.task import Given, Task

_log = logging.getLogger(__name__)

_TASKS: tuple[type[Task], ...] = (
    CausalLM,
    Choice,
    Classification,
    Regression,
    ImageClassification,
)

TASKS: Mapping[str, type[Task]] = {task.name: task for task in _TASKS}
"""By name."""

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[("auto", *TASKS)]
    """The name of a task, or "auto" for the one that fits."""


def find_task(name: TaskName, family: Family, given: Given) -> type[Task]:
    """Finds a task by its name, or the one that fits rows and a family.

    Args:
        name: Of the task, or "auto". Rows of a preset have the task of the preset.
        family: Of the model.
        given: What is known. Without rows, "auto" is the first task of the family.

    Returns:
        The task, to make from what is given.

    Raises:
        InputError: No task that the family has a model for fits, or several do; the family has no
            model for the one that is named; the preset is for another task; or rows lack a field
            that is named.

    Example:
        >>> from loft_jax.data import DataConfig
        >>> from loft_jax.models.registry import FAMILIES
        >>> rows = [{"text": "a joy", "label": "good"}]
        >>> find_task("auto", FAMILIES["bert"], Given(DataConfig("rows"), rows)).name
        'classification'
    """
    if given.data.preset is not None:
        of_preset = find_preset(given.data.preset).task
        if name not in ("auto", of_preset):
            raise InputError(
                f"task is {shown(name)}, but preset {given.data.preset} is for {of_preset}"
            )
        name = of_preset
    if name != "auto":
        family.model(TASKS[name].head)  # refuses a family that has none
        return _checked(TASKS[name], given)
    possible = [task for task in _TASKS if task.head in family.models]
    if given.rows is None:
        return possible[0]
    fitting = [task for task in possible if task.fits(given)]
    if not fitting:
        settings = dict.fromkeys(setting for task in possible for setting in task.fields)
        fields = " and ".join(repr(getattr(given.data, setting)) for setting in settings)
        flags = " and ".join(f"--data.{setting.replace('_', '-')}" for setting in settings)
        raise InputError(
            f"rows have the fields {shown(sorted(column_names(given.rows)))}, which fit no task of "
            f"model_type {family.model_type!r}; expected those of "
            f"{' or '.join(task.name for task in possible)}: {fields}, or others that {flags} name"
        )
    if len(fitting) > 1:
        names = " or ".join(task.name for task in fitting)
        raise InputError(f"task is 'auto', and rows fit {names}; expected one of them")
    if fitting[0] is Regression:
        _log.info(
            "labels are decimal numbers, so the task is regression; for classification, write them "
            "as texts or as whole numbers"
        )
    return _checked(fitting[0], given)


def _checked(task: type[Task], given: Given) -> type[Task]:
    if given.rows is not None:
        task.check_fields(given)
    return task
