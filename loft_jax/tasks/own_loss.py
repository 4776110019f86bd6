"""A loss that the user brings, for any NNX model."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from loft_jax.data import DataConfig, eval_batches
from loft_jax.data.arrays import ROW_WEIGHTS, ArrayData, array_rows
from loft_jax.data.batches import Batch
from loft_jax.errors import InputError
from loft_jax.models.activations import gathered
from loft_jax.models.family import PretrainedConfig
from loft_jax.models.inference import inference_state
from loft_jax.progress import progress_bar
from loft_jax.tasks.task import Arrays, Evaluation, Given, Measured, Rows, Task

RowLoss = Callable[[Any, Mapping[str, jax.Array]], jax.Array]
"""Maps a model and a batch, arrays (b, ...) by field, to the loss of each row, (b,)."""


class OwnLoss(Task):
    """Training by a loss that is given as a function; its mean over the rows is the loss of a run.

    The fields of rows are numbers or arrays. It is made in Python only, so that no name finds it.
    """

    name = "own-loss"
    head = "causal-lm"
    peft_type = None

    def __init__(self, loss: RowLoss) -> None:
        """Sets the loss.

        Args:
            loss: A function of the model and a batch.
        """
        self._loss = loss

    @classmethod
    def fits(cls, given: Given) -> bool:
        """Never: rows do not bring a loss."""
        return False

    def tokenize(
        self, rows: Rows, tokenizer: Any, data: DataConfig, *, vocab_size: int | None = None
    ) -> ArrayData:
        """Reads rows as arrays, with `array_rows`."""
        return array_rows(rows)

    def tokens(self, batch: Batch, sizes: PretrainedConfig) -> tuple[int, int]:
        """Counts rows, since it is not known what a token is."""
        return len(batch[ROW_WEIGHTS]), 1

    def inputs(self, batch: Batch) -> Batch:
        """Gives the batch itself."""
        return batch

    def shapes(self, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Refuses: only rows tell their shapes."""
        raise InputError("the shapes of rows for a loss of one's own are not known without them")

    def loss(self, model: Any, inputs: Arrays) -> tuple[jax.Array, jax.Array]:
        """Sums the losses of the rows that do not pad the batch, and counts them."""
        arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
        weights = arrays.pop(ROW_WEIGHTS)  # (b,)
        found = self._loss(model, arrays)
        if isinstance(found, (tuple, list, dict)):
            raise InputError(
                f"loss gives a {type(found).__name__}, expected one array: the loss of each row"
            )
        losses = jnp.asarray(found)
        if losses.shape != weights.shape:
            raise InputError(
                f"loss gives an array of shape {losses.shape} for {len(weights)} rows, expected "
                f"{weights.shape}: the loss of each row"
            )
        real = jnp.where(weights > 0, losses.astype(jnp.float32), 0.0)
        return jnp.sum(real), jnp.sum(weights)

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
        """Evaluates the mean loss of the rows."""
        examples = array_rows(rows)
        batches = eval_batches(examples, data, batch_size=batch_size)

        def measure(model: nnx.Module) -> Measured:
            graphdef, state = inference_state(model)
            total = 0.0
            for batch in progress_bar(batches, desc="evaluation", leave=False, shown=progress):
                total += float(_summed(graphdef, state, self, batch))
            values = {"loss": total / len(examples)}
            return Measured(values, {**values, "count": len(examples)})

        return measure


@functools.partial(jax.jit, static_argnums=(0, 2))
def _summed(
    graphdef: nnx.GraphDef[Any], state: nnx.State[Any, Any], task: OwnLoss, inputs: Arrays
) -> jax.Array:
    return gathered(task.loss(nnx.merge(graphdef, state), inputs)[0])
