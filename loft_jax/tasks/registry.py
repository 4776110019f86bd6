"""The tasks by name, and the choice of a task for rows and a model."""

from collections.abc import Mapping, Sequence
from typing import Any

from loft_jax.data import DataConfig
from loft_jax.data.encode import column_names
from loft_jax.errors import InputError
from loft_jax.models.family import Family
from loft_jax.tasks.causal_lm import CausalLM
from loft_jax.tasks.choice import Choice, bring_choices
from loft_jax.tasks.classification import Classification, Regression, labels_of
from loft_jax.tasks.task import Task, TaskName

TASKS: Mapping[TaskName, type[Task]] = {
    task.name: task for task in (CausalLM, Choice, Classification, Regression)
}
"""By name."""


def infer_task(
    family: Family,
    rows: Any,
    held_out: Any,
    data: DataConfig,
    *,
    choices: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> TaskName:
    """Finds the task that fits the rows, among those that the family has a model for.

    Args:
        family: Of the model.
        rows: Examples to train on or to evaluate.
        held_out: Held-out examples of a training run, or None.
        data: Names of fields.
        choices: Answers of all rows.
        labels: Names of labels.

    Returns:
        The name of the task.

    Raises:
        InputError: Several tasks fit.

    Example:
        >>> from loft_jax.models.registry import FAMILIES
        >>> infer_task(FAMILIES["llama"], [{"text": "a", "label": 1}], None, DataConfig("rows"))
        'causal-lm'
    """
    columns = set(column_names(rows))
    asks = choices or any(bring_choices(some) for some in (rows, held_out) if some is not None)
    labelled = labels or {data.text_field, data.label_field} <= columns
    possible: list[TaskName] = []
    if "causal-lm" in family.models:
        possible.append("choice" if asks else "causal-lm")
    if "sequence-classification" in family.models and (labelled or not possible):
        regression = not labels and labelled and labels_of(rows, data.label_field) is None
        possible.append("regression" if regression else "classification")
    if len(possible) > 1:
        raise InputError(f"task is not given, and could be {' or '.join(possible)}; name one")
    return possible[0]


def make_task(
    name: TaskName,
    rows: Any,
    data: DataConfig,
    *,
    choices: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> Task:
    """Makes a task.

    Args:
        name: Name of the task.
        rows: Training examples, whose labels are used if none are given; or None.
        data: Names of fields.
        choices: For task "choice", the answers of all rows; empty if rows have their own.
        labels: For task "classification", names of labels in the order of the logits.

    Returns:
        The task.

    Raises:
        InputError: Choices or labels are given for another task, or labels are not known.
    """
    for given, what, whose in (
        (choices, "choices", "choice"),
        (labels, "labels", "classification"),
    ):
        if given and name != whose:
            raise InputError(f"{what} are given, but only task {whose} has them, not {name}")
    match name:
        case "choice":
            return Choice(choices)
        case "classification":
            found = tuple(labels) or (None if rows is None else labels_of(rows, data.label_field))
            if found is None:
                raise InputError(
                    f"field {data.label_field!r} holds decimal numbers; expected labels, or task "
                    "regression"
                )
            return Classification(found)
        case _:
            return TASKS[name]()
