"""Perplexity: how surprised a model is by texts it did not see."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from flax import nnx
from tqdm import tqdm

from loft_jax.data import Batch
from loft_jax.errors import InputError
from loft_jax.evaluation._inference import batch_logits, inference_state
from loft_jax.models.activations import gathered
from loft_jax.models.loss import Arrays, summed_loss


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` found.

    Args:
        nll: Mean negative log-likelihood, nats a token.
        tokens: The number of tokens it is the mean of.
    """

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """`exp(nll)`; infinite where that overflows."""
        return math.inf if self.nll >= 700 else math.exp(self.nll)


def perplexity(model: nnx.Module, batches: Sequence[Batch], *, progress: bool = True) -> Perplexity:
    """Mean negative log-likelihood of the tokens that carry the loss, all weighing the same.

    Args:
        model: `model(tokens, positions=, segment_ids=)` gives logits (b, t, vocab).
        batches: From `loft_jax.data.eval_batches`.
        progress: Show a bar.

    Returns:
        The mean over all tokens of all batches.

    Raises:
        InputError: No token carries the loss.

    Example:
        >>> perplexity(model, eval_batches(data, config, batch_size=8)).nll  # doctest: +SKIP
        3.91
    """
    graphdef, state = inference_state(model)
    total = weight = 0.0  # float64: float32 sums of one batch each
    for batch in tqdm(batches, desc="perplexity", leave=False, disable=not progress):
        loss, count = _sums(graphdef, state, batch)
        total += float(loss)
        weight += float(count)
    if weight == 0:
        raise InputError("the evaluation batches hold no token to predict; expected some")
    return Perplexity(nll=total / weight, tokens=int(weight))


@functools.partial(jax.jit, static_argnums=0)
def _sums(graphdef: nnx.GraphDef, state: nnx.State, batch: Arrays) -> tuple[jax.Array, jax.Array]:
    loss, count = summed_loss(batch_logits(graphdef, state, batch), batch)
    return gathered(loss), gathered(count)
