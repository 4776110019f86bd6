"""What a task is: how rows become inputs, the loss, and what evaluation reports.

Training, evaluation and plans know no model and no loss but by this.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import numpy as np

from loft_jax.data import DataConfig, TokenizedData
from loft_jax.data.batches import Batch
from loft_jax.models.family import Head, PretrainedConfig, PretrainedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TaskName = Literal["causal-lm", "choice", "classification", "regression"]

Rows = "Dataset | Sequence[Mapping[str, Any]]"
Arrays = Mapping[str, jax.Array | np.ndarray]


@dataclass(frozen=True)
class Measured:
    """What a model does on held-out examples.

    Attributes:
        values: What a run logs, by name; `loss` is among them.
        report: What the command `evaluate` prints.
        right: Of each accuracy among the values, whether each row is right.
    """

    values: dict[str, float]
    report: dict[str, float]
    right: dict[str, tuple[bool, ...]] = field(default_factory=dict)


Evaluation = Callable[[Any], Measured]
"""Measures a model on the examples that it was made with."""


class Task(ABC):
    """One kind of fine-tuning.

    Attributes:
        name: Of the task.
        head: What its model gives.
        peft_type: PEFT's name of it.
        trains_head: Whether the head is new, and trained and exported whole beside the adapters.
        labels: Names of the logits that the head is made with; None for another kind of head.
    """

    name: ClassVar[TaskName]
    head: ClassVar[Head]
    peft_type: ClassVar[str]
    trains_head: ClassVar[bool] = False
    labels: tuple[str, ...] | None = None

    @abstractmethod
    def tokenize(
        self,
        rows: Any,
        tokenizer: "PreTrainedTokenizerBase",
        data: DataConfig,
        *,
        vocab_size: int | None = None,
    ) -> TokenizedData:
        """Turns examples into tokens, and what is learned of them.

        Args:
            rows: As `load_examples` gives them or as plain dicts.
            tokenizer: Of the model.
            data: Names of fields, and `max_length`.
            vocab_size: The tokens that the model has weights for; None if no model is at hand.

        Returns:
            The examples that have something to learn.

        Raises:
            InputError: Rows are not of this task, or the tokenizer is not of the model.
        """

    @abstractmethod
    def inputs(self, batch: Batch) -> Batch:
        """What `loss` needs of a batch, made on the host.

        Args:
            batch: From a stream or from `eval_batches`.

        Returns:
            Arrays whose first axis is that of the batch.
        """

    @abstractmethod
    def shapes(self, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The largest that `inputs` gives for a batch of a size.

        Args:
            rows: Of the batch.
            length: Tokens of a row.

        Returns:
            Shapes and dtypes by name.
        """

    @abstractmethod
    def loss(self, model: Any, inputs: Arrays) -> tuple[jax.Array, jax.Array]:
        """The loss of a batch, as a sum and its weight: the one of training and of evaluation.

        Sums, not means, so that parts of a batch add up to the mean over the whole.

        Args:
            model: Of the family, with the head of this task.
            inputs: From `inputs`.

        Returns:
            Two float32 scalars: the summed loss, and what it is divided by.
        """

    @abstractmethod
    def evaluation(
        self,
        rows: Any,
        tokenizer: "PreTrainedTokenizerBase",
        data: DataConfig,
        *,
        batch_size: int,
        vocab_size: int | None = None,
        progress: bool = True,
    ) -> Evaluation:
        """Prepares held-out examples, so that what is wrong with them is known before training.

        Args:
            rows: As for `tokenize`.
            tokenizer: Of the model.
            data: As for `tokenize`.
            batch_size: Rows computed at once.
            vocab_size: As for `tokenize`.
            progress: Show bars.

        Returns:
            A function of a model.

        Raises:
            InputError: As for `tokenize`.
        """

    def score(self, values: Mapping[str, float]) -> float:
        """What the best of several evaluations has least of.

        Args:
            values: Of a `Measured`.

        Returns:
            The loss, unless a task says otherwise.
        """
        return values["loss"]

    def head_modules(self, model: PretrainedModel) -> tuple[str, ...]:
        """Paths of the modules that train beside the adapters."""
        return model.output_modules if self.trains_head else ()


def within(data: DataConfig, model: PretrainedConfig) -> DataConfig:
    """The data of a model that has weights for so many positions only.

    Args:
        data: As it is asked for.
        model: Of the model.

    Returns:
        The same, with a `max_length` that the model has positions for.
    """
    if model.max_length is None or data.max_length <= model.max_length:
        return data
    return dataclasses.replace(data, max_length=model.max_length)
