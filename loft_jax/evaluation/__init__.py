"""Evaluation that belongs to no task: of generated answers, and of published sets of questions."""

from loft_jax.evaluation.generated_answers import AnswerScores, Prediction, generated_answers
from loft_jax.evaluation.question_sets import QuestionScores, mean_of, question_sets, sampled

__all__ = [
    "AnswerScores",
    "Prediction",
    "QuestionScores",
    "generated_answers",
    "mean_of",
    "question_sets",
    "sampled",
]
