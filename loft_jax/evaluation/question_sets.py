"""Evaluation on published sets of questions, by generated answers and by likelihood."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from loft_jax.data import DataConfig, load_examples
from loft_jax.data.presets import find_preset
from loft_jax.errors import InputError, shown
from loft_jax.evaluation.generated_answers import AnswerScores, generated_answers
from loft_jax.models.family import LanguageModel
from loft_jax.tasks.choice import Choice
from loft_jax.tasks.task import Measured

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_Rows = TypeVar("_Rows", "Dataset", list[Any])

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuestionScores:
    """The result for one set of questions.

    Args:
        generated: By generation.
        likelihood: By the likelihood of the answers that a question names.
    """

    generated: AnswerScores
    likelihood: Measured

    @property
    def report(self) -> dict[str, float]:
        """The number of questions, the share of their most frequent answer, and accuracies."""
        answers = Counter(one.expected for one in self.generated.predictions)
        return {
            "count": self.generated.count,
            "majority": max(answers.values()) / self.generated.count,
            "generated": self.generated.accuracy,
            "unanswered": self.generated.unanswered,
            "likelihood": self.likelihood.values["accuracy"],
        }


def question_sets(
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sample: int | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    vocab_size: int | None = None,
    progress: bool = True,
) -> Callable[[LanguageModel], dict[str, QuestionScores]]:
    """Prepares the questions of a preset to evaluate a model on them.

    Each question is put to the model twice: its answer is found in the text that the model
    generates, as in `generated_answers`; and the answers that the question names are compared by
    their likelihood, as in `score_choices`.

    Args:
        data: With a preset of questions, or of a collection of them, of which those are used that
            are in its folder. The split is that to evaluate on, by default.
        tokenizer: The model's.
        sample: Number of questions of each set, drawn as in `sampled`; None for all.
        max_new_tokens: Largest number of new tokens of an answer.
        batch_size: Number of questions computed at once.
        vocab_size: Number of tokens that the model has weights for; None if it is not known.
        progress: Show bars.

    Returns:
        A function that evaluates a model, and gives the result by the name of the set.

    Raises:
        InputError: Questions cannot be read, or as for `generated_answers` and `score_choices`.

    Example:
        >>> data = DataConfig("dataset", preset="commonsense")
        >>> scores = question_sets(data, tokenizer, sample=100)(model)  # doctest: +SKIP
        >>> scores["boolq"].report["likelihood"]  # doctest: +SKIP
        0.62
    """
    preset, folder = find_preset(data.preset or ""), Path(data.path).expanduser()
    sets = {preset.name: data}
    if preset.parts:
        sets = {
            part.name: dataclasses.replace(data, path=str(folder / part.folder), preset=part.name)
            for part in preset.parts_in(folder)
        }
    measures = {}
    for name, one in sets.items():
        rows: Dataset = sampled(load_examples(one.held_out()), sample)
        asked = generated_answers(
            rows.select_columns(["prompt", "completion"]),
            tokenizer,
            one,
            answer_pattern=find_preset(name).answer_pattern,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            vocab_size=vocab_size,
            progress=progress,
        )
        compared = Choice().evaluation(
            rows.select_columns(["prompt", "choices", "answer"]),
            tokenizer,
            one,
            batch_size=batch_size,
            vocab_size=vocab_size,
            progress=progress,
        )
        measures[name] = asked, compared

    def measure(model: LanguageModel) -> dict[str, QuestionScores]:
        scores = {}
        for name, (asked, compared) in measures.items():
            scores[name] = QuestionScores(asked(model), compared(model))
            _log.info(
                "%s: accuracy %.4f by generation and %.4f by likelihood",
                *(
                    name,
                    scores[name].generated.accuracy,
                    scores[name].likelihood.values["accuracy"],
                ),
            )
        return scores

    return measure


def mean_of(scores: Mapping[str, QuestionScores]) -> dict[str, float]:
    """Averages the reports of sets of questions, each with the same weight.

    Args:
        scores: Of at least one set.

    Returns:
        The mean of each number, and the count of all questions.
    """
    reports = [one.report for one in scores.values()]
    mean = {name: sum(one[name] for one in reports) / len(reports) for name in reports[0]}
    return {**mean, "count": sum(one["count"] for one in reports)}


def sampled(rows: _Rows, count: int | None) -> _Rows:
    """Draws rows at random, the same ones every time.

    Args:
        rows: From `load_examples`.
        count: Number of rows; None for all.

    Returns:
        That many rows in their order, or all if there are fewer.

    Raises:
        InputError: The number is not positive.

    Example:
        >>> from datasets import Dataset
        >>> sampled(Dataset.from_dict({"number": range(100)}), 3)["number"][:]
        [20, 36, 82]
    """
    if count is None:
        return rows
    if count < 1:
        raise InputError(f"sample is {shown(count)}; expected at least 1")
    order = np.random.default_rng(0).permutation(len(rows))
    some = np.sort(order[:count])
    return [rows[index] for index in some] if isinstance(rows, list) else rows.select(some)
