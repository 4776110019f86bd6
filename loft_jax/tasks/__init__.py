"""Tasks, one file each: rows to inputs, the loss, what evaluation reports."""

from loft_jax.tasks.causal_lm import CausalLM, Perplexity, perplexity
from loft_jax.tasks.choice import Choice, ChoiceScores, score_choices
from loft_jax.tasks.classification import Classification, Regression
from loft_jax.tasks.image_classification import ImageClassification
from loft_jax.tasks.registry import TASKS, find_task
from loft_jax.tasks.task import Evaluation, Given, Measured, Task

__all__ = [
    "TASKS",
    "CausalLM",
    "Choice",
    "ChoiceScores",
    "Classification",
    "Evaluation",
    "Given",
    "ImageClassification",
    "Measured",
    "Perplexity",
    "Regression",
    "Task",
    "find_task",
    "perplexity",
    "score_choices",
]
