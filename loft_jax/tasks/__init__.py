"""Tasks, one file each: inputs from rows, the loss, the evaluation."""

from loft_jax.tasks.causal_lm import CausalLM, Perplexity, perplexity
from loft_jax.tasks.choice import Choice, ChoiceScores, score_choices
from loft_jax.tasks.classification import Classification, Regression
from loft_jax.tasks.registry import TASKS, infer_task, make_task
from loft_jax.tasks.task import Evaluation, Measured, Task, TaskName

__all__ = [
    "TASKS",
    "CausalLM",
    "Choice",
    "ChoiceScores",
    "Classification",
    "Evaluation",
    "Measured",
    "Perplexity",
    "Regression",
    "Task",
    "TaskName",
    "infer_task",
    "make_task",
    "perplexity",
    "score_choices",
]
