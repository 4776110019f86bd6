"""The interface of a task: inputs from rows, the loss, and the evaluation.

Training, evaluation and plans use models and losses only through this interface.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

import jax
import numpy as np

from loft_jax.data import DataConfig, TokenizedData
from loft_jax.data.arrays import ArrayData
from loft_jax.data.batches import Batch
from loft_jax.data.images import ImageData
from loft_jax.data.row_formats import column_names
from loft_jax.errors import InputError, shown
from loft_jax.models.family import Head, PretrainedConfig

if TYPE_CHECKING:
    from datasets import Dataset

CHOICE_FIELDS = ("choices", "answer")
"""Fields of rows that have answers of their own to compare."""

Rows: TypeAlias = "Dataset | Sequence[Mapping[str, Any]]"
"""Examples: of `load_examples`, or plain dicts."""

Arrays = Mapping[str, jax.Array | np.ndarray]


@dataclass(frozen=True)
class Measured:
    """The result of an evaluation.

    Attributes:
        values: Metrics that a run logs, by name; `loss` is one of them.
        report: Metrics that the command `evaluate` prints.
        right: For each accuracy in `values`, whether each row is right.
    """

    values: dict[str, float]
    report: dict[str, float]
    right: dict[str, tuple[bool, ...]] = field(default_factory=dict)


ClassWeights = Literal["balanced"] | tuple[float, ...]
"""Weights of labels in a loss, or those that scikit-learn calls balanced."""

Evaluation = Callable[[Any], Measured]
"""Evaluates a model on the examples that the function was made with."""


@dataclass(frozen=True)
class Given:
    """What is known of a run or an evaluation before it has a task.

    Attributes:
        data: Names of fields.
        rows: Examples to train on or to evaluate; None if there are none.
        held_out: Held-out examples of a training run; None if there are none.
        choices: Answers of all rows; empty if rows have their own, or none.
        labels: Names of labels in the order of the logits, as the user sets them.
        class_weights: Weights of the labels in the loss of training, or "balanced"; empty for none.
        known: The labels that the model or the adapter has.
    """

    data: DataConfig
    rows: "Rows | None" = None
    held_out: "Rows | None" = None
    choices: Sequence[str] = ()
    labels: Sequence[str] = ()
    class_weights: ClassWeights = ()
    known: Sequence[str] = ()

    @property
    def asks_choices(self) -> bool:
        """Whether answers are to be compared: those of all rows, or those that rows have."""
        some = [rows for rows in (self.rows, self.held_out) if rows is not None]
        own = any(set(CHOICE_FIELDS) <= set(column_names(rows)) for rows in some)
        return bool(self.choices) or own


class Task(ABC):
    """One kind of fine-tuning.

    Attributes:
        name: Name of the task.
        head: Head of its model.
        fields: Settings of `DataConfig` that name the fields which all rows have.
        peft_type: PEFT's name of the task; None if it has none.
        trains_head: Whether the head is new, and trained and exported whole beside the adapters.
        measures: Names of the metrics that evaluations log.
        best_metrics: Those whose mean decides which evaluation is the best.
        labels: Names of the logits of a new head; None for other heads.
    """

    name: ClassVar[str]
    head: ClassVar[Head]
    fields: ClassVar[tuple[str, ...]] = ()
    peft_type: ClassVar[str | None]
    trains_head: ClassVar[bool] = False
    measures: tuple[str, ...] = ("loss",)
    best_metrics: ClassVar[tuple[str, ...]] = ("loss",)
    labels: tuple[str, ...] | None = None

    @classmethod
    @abstractmethod
    def fits(cls, given: Given) -> bool:
        """Whether rows are examples of this task.

        Args:
            given: With rows.
        """

    @classmethod
    def check_fields(cls, given: Given) -> None:
        """Refuses fields that are named but not there, where rows may be read without them.

        Args:
            given: With rows.

        Raises:
            InputError: A field is named that is certainly missing.
        """
        del given  # all fields of most tasks are needed

    @classmethod
    def make(cls, given: Given) -> Self:
        """Makes the task.

        Args:
            given: What the task is made from.

        Returns:
            The task.

        Raises:
            InputError: Something is set that the task does not have, or something is missing.
        """
        cls.refuse(given, "choices", "labels", "class_weights")
        return cls()

    @classmethod
    def refuse(cls, given: Given, *names: str) -> None:
        """Refuses settings that the task does not have.

        Args:
            given: What the task is made from.
            names: Of the settings.

        Raises:
            InputError: One of them is set.
        """
        for name in names:
            if value := getattr(given, name):
                found = value if isinstance(value, str) else list(value)
                raise InputError(f"{name} are {shown(found)}, but task {cls.name} has none")

    def settings(self) -> dict[str, list[str]]:
        """Gives the fields of `Given` that make this task again, without rows."""
        return {}

    @abstractmethod
    def tokenize(
        self,
        rows: Rows,
        tokenizer: Any,
        data: DataConfig,
        *,
        vocab_size: int | None = None,
    ) -> TokenizedData | ImageData | ArrayData:
        """Checks examples, and encodes texts as tokens, with what is to be learned from them.

        Args:
            rows: From `load_examples`, or plain dicts.
            tokenizer: Of the model; for a task of images, its image processor.
            data: Its field names and `max_length` are used.
            vocab_size: Number of tokens that the model has weights for; None if it is not known.

        Returns:
            The examples that have something to learn.

        Raises:
            InputError: Rows do not fit this task, or the tokenizer does not fit the model.
        """

    def tokens(self, batch: Batch, sizes: PretrainedConfig) -> tuple[int, int]:
        """Counts the tokens of a batch, for the speed of a run.

        Args:
            batch: From a stream.
            sizes: Configuration of the model.

        Returns:
            The number of tokens that are no padding, and the number of tokens of a row.
        """
        return int((batch["segment_ids"] > 0).sum()), batch["tokens"].shape[1]

    @abstractmethod
    def inputs(self, batch: Batch) -> Batch:
        """Makes the inputs of `loss` from a batch, on the host.

        Args:
            batch: From a stream or from `eval_batches`.

        Returns:
            Arrays whose first axis is that of the batch.
        """

    @abstractmethod
    def shapes(self, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Gives the largest shapes of `inputs` for batches of a size.

        Args:
            rows: Number of rows of a batch.
            length: Number of tokens of a row; of images, the number of pixels of a side.

        Returns:
            Shapes and dtypes by name.
        """

    @abstractmethod
    def loss(self, model: Any, inputs: Arrays) -> tuple[jax.Array, jax.Array]:
        """Computes the loss of a batch, as a sum and its weight, for training and evaluation.

        Sums of parts of a batch add up, so that the mean over the whole batch is exact.

        Args:
            model: A model with the head of this task.
            inputs: From `inputs`.

        Returns:
            Two float32 scalars: the summed loss, and the weight to divide it by.
        """

    @abstractmethod
    def evaluation(
        self,
        rows: Rows,
        tokenizer: Any,
        data: DataConfig,
        *,
        batch_size: int,
        vocab_size: int | None = None,
        progress: bool = True,
    ) -> Evaluation:
        """Prepares held-out examples, so that errors in them are raised before training.

        Args:
            rows: As for `tokenize`.
            tokenizer: As for `tokenize`.
            data: As for `tokenize`.
            batch_size: Number of rows computed at once.
            vocab_size: As for `tokenize`.
            progress: Show progress bars.

        Returns:
            A function that evaluates a model.

        Raises:
            InputError: As for `tokenize`.
        """

    def check_metrics(self, names: Sequence[str]) -> None:
        """Refuses metrics that evaluations do not log.

        Args:
            names: Of metrics.

        Raises:
            InputError: One of them is none of this task.
        """
        for name in names:
            if name not in self.measures:
                raise InputError(
                    f"best_metric is {shown(name)}, expected some of {', '.join(self.measures)}, "
                    f"the metrics of task {self.name}"
                )

    def score(self, values: Mapping[str, float], by: Sequence[str] = ()) -> float:
        """Gives the number by which evaluations are compared; lower is better.

        Args:
            values: Of a `Measured`.
            by: Names of the metrics that decide; empty for `best_metrics`.

        Returns:
            The mean over these metrics of the loss, or of 1 minus the value of others.
        """
        names = by or self.best_metrics
        return fmean(values[name] if name == "loss" else 1.0 - values[name] for name in names)

    def head_modules(self, model: Any) -> tuple[str, ...]:
        """Gives the paths of the modules that are trained beside the adapters."""
        return model.output_modules if self.trains_head else ()


def within(data: DataConfig, model: PretrainedConfig) -> DataConfig:
    """Limits the length of rows to the positions that a model has weights for.

    Args:
        data: The configuration as it was requested.
        model: Configuration of the model.

    Returns:
        The same, with at most the `max_length` of the model.
    """
    if model.max_length is None or data.max_length <= model.max_length:
        return data
    most = model.max_length
    buckets = (*(size for size in data.buckets if size < most), most) if data.buckets else ()
    return dataclasses.replace(data, max_length=most, buckets=buckets)
