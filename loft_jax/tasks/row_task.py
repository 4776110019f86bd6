"""The common part of tasks whose rows have one label or number each: the loss, the evaluation."""

import functools
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loft_jax.data import DataConfig, eval_batches
from loft_jax.errors import shown
from loft_jax.models.activations import gathered
from loft_jax.models.family import PretrainedModel
from loft_jax.models.inference import inference_state
from loft_jax.progress import progress_bar
from loft_jax.tasks.task import Arrays, Evaluation, Measured, Rows, Task

_log = logging.getLogger(__name__)


class RowTask(Task):
    """A task whose rows have one label or number each.

    Attributes:
        label_dtype: Dtype of the labels.
        reported_loss: Name of the loss in the report.
    """

    trains_head = True
    label_dtype: ClassVar[Any]
    reported_loss: ClassVar[str]

    @abstractmethod
    def label(self, value: object, where: str) -> float:
        """Converts the label of a row for the loss.

        Args:
            value: The value in the row.
            where: The row and the field, for messages.

        Raises:
            InputError: It is not a label.
        """

    @abstractmethod
    def losses(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Computes the loss of each row.

        Args:
            logits: (b, labels) float32.
            labels: (b,).

        Returns:
            (b,) float32.
        """

    @abstractmethod
    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> Measured:
        """Computes the metrics of an evaluation, without the loss.

        Args:
            logits: (n, labels) float64.
            labels: (n,).

        Returns:
            The metrics, and whether each row is right.
        """

    def reader(self, rows: Rows, field: str) -> Callable[[Mapping[str, Any], int], float]:
        """Makes the function that reads the label of a row for the loss.

        Args:
            rows: All rows. Where these name their numbers, and the names are those of the task in
                whatever order and case, a number stands for its name.
            field: With the label.

        Returns:
            A function of a row, which may hold this field alone, and its index.
        """
        names = names_of_numbers(rows, field)
        if not same_names(names, self.labels or ()):
            if names:
                _log.warning(
                    "the data has the labels %s and the model %s; numbers of the data are taken as "
                    "those of the model",
                    *(shown(list(names)), shown(list(self.labels or ()))),
                )
            names = ()

        def label_of(row: Mapping[str, Any], index: int) -> float:
            value = plain(row.get(field))
            if type(value) is int and 0 <= value < len(names):
                value = names[value]
            return self.label(value, f"row {index}: field {field!r}")

        return label_of

    @abstractmethod
    def logits(self, model: Any, inputs: Arrays) -> jax.Array:
        """Computes the logits of a batch.

        Args:
            model: With the head of the task.
            inputs: From `inputs`; `labels` and `weights` are among them.

        Returns:
            (b, labels) float32.
        """

    def weights(self, labels: jax.Array) -> jax.Array:
        """Gives the weights of rows in the loss of training, by their labels."""
        return jnp.ones(labels.shape, jnp.float32)

    def loss(self, model: Any, inputs: Arrays) -> tuple[jax.Array, jax.Array]:
        """Sums the losses of the rows by their weights, and sums the weights."""
        labels = jnp.asarray(inputs["labels"])
        losses = self.losses(self.logits(model, inputs), labels)
        weights = jnp.asarray(inputs["weights"]) * self.weights(labels)
        return jnp.sum(losses * weights), jnp.sum(weights)

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
        """Evaluates the mean loss of the rows, all of weight 1, and the metrics."""
        examples: Any = self.tokenize(rows, tokenizer, data, vocab_size=vocab_size)
        batches = eval_batches(examples, data, batch_size=batch_size)

        def measure(model: PretrainedModel) -> Measured:
            graphdef, state = inference_state(model)
            logits, labels, total = [], [], 0.0
            for batch in progress_bar(batches, desc=self.name, leave=False, shown=progress):
                inputs = self.inputs(batch)
                loss, found = _loss_and_logits(graphdef, state, self, inputs)
                real = inputs["weights"] > 0
                total += float(loss)
                logits.append(np.asarray(found, np.float64)[real])
                labels.append(inputs["labels"][real])
            found = self.metrics(np.concatenate(logits), np.concatenate(labels))
            count = sum(map(len, labels))
            values = {"loss": total / count, **found.values}
            report = {**found.values, self.reported_loss: total / count}
            return Measured(values, {**report, "count": count}, _by_row(found.right, batches.order))

        return measure


def _by_row(right: Mapping[str, Sequence[bool]], order: np.ndarray) -> dict[str, tuple[bool, ...]]:
    """Reorders values from the order of the batches to that of the rows."""
    places = np.argsort(order)
    return {name: tuple(np.asarray(values)[places].tolist()) for name, values in right.items()}


@functools.partial(jax.jit, static_argnums=(0, 2))
def _loss_and_logits(
    graphdef: nnx.GraphDef[Any], state: nnx.State[Any, Any], task: RowTask, inputs: Arrays
) -> tuple[jax.Array, jax.Array]:
    logits = task.logits(nnx.merge(graphdef, state), inputs)
    losses = task.losses(logits, jnp.asarray(inputs["labels"]))
    return gathered(jnp.sum(losses * jnp.asarray(inputs["weights"]))), gathered(logits)


def plain(value: object) -> Any:
    """Gives a scalar of NumPy, as arrays and data frames hold them, as the value of Python."""
    return value.item() if isinstance(value, np.generic) else value


def same_names(some: Sequence[str], others: Sequence[str]) -> bool:
    """Whether names are the same ones, in any order and case."""
    return sorted(map(str.casefold, some)) == sorted(map(str.casefold, others))


def names_of_numbers(rows: Rows, field: str) -> tuple[str, ...]:
    """The names that a dataset has for the numbers of a field; empty if it has none."""
    features = getattr(rows, "features", None) or {}
    return tuple(getattr(features.get(field), "names", None) or ())
