"""Evaluation that no task has: of the answers that a model generates."""

from loft_jax.evaluation.generated_answers import AnswerScores, Prediction, generated_answers

__all__ = ["AnswerScores", "Prediction", "generated_answers"]
