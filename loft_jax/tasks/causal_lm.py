"""Language modeling: prompts and completions, conversations, plain texts."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loft_jax.data import DataConfig, TokenizedData, eval_batches, tokenize
from loft_jax.data.batches import Batch
from loft_jax.data.row_formats import check_named, column_names
from loft_jax.errors import InputError
from loft_jax.models.activations import gathered
from loft_jax.models.family import LanguageModel
from loft_jax.models.inference import inference_state
from loft_jax.progress import progress_bar
from loft_jax.tasks.task import CHOICE_FIELDS, Arrays, Evaluation, Given, Measured, Rows, Task
from loft_jax.tasks.token_losses import token_losses, token_losses_in_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CausalLM(Task):
    """Next-token prediction; the loss is the mean cross entropy of the tokens to be learned."""

    name = "causal-lm"
    head = "causal-lm"
    peft_type = "CAUSAL_LM"

    @classmethod
    def fits(cls, given: Given) -> bool:
        """Whether no answers are to be compared."""
        return not given.asks_choices

    @classmethod
    def check_fields(cls, given: Given) -> None:
        """Refuses a named field that is neither in rows to train on nor in held-out ones.

        Rows with answers of their own to compare have few of the fields of training.
        """
        columns = column_names(given.rows)
        if not set(CHOICE_FIELDS).issubset(columns):
            held_out = [] if given.held_out is None else column_names(given.held_out)
            check_named({*columns, *held_out}, given.data)

    def tokenize(
        self,
        rows: Rows,
        tokenizer: "PreTrainedTokenizerBase",
        data: DataConfig,
        *,
        vocab_size: int | None = None,
    ) -> TokenizedData:
        """Encodes examples with `loft_jax.data.tokenize`."""
        return tokenize(rows, tokenizer, data, vocab_size=vocab_size)

    def inputs(self, batch: Batch) -> Batch:
        """Adds the tokens to predict with `predicted`."""
        return predicted(batch)

    def shapes(self, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Gives the shapes of a batch whose loss is on every token."""
        names = ("tokens", "positions", "segment_ids", "places", "targets")
        shapes = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}
        return {**shapes, "weights": jax.ShapeDtypeStruct((rows, length), jnp.float32)}

    def loss(self, model: LanguageModel, inputs: Arrays) -> tuple[jax.Array, jax.Array]:
        """Sums `-log p(token | tokens before it)`, and counts these tokens."""
        return _summed(model, inputs, token_losses)

    def evaluation(
        self,
        rows: Rows,
        tokenizer: "PreTrainedTokenizerBase",
        data: DataConfig,
        *,
        batch_size: int,
        vocab_size: int | None = None,
        progress: bool = True,
    ) -> Evaluation:
        """Evaluates the loss, and reports the perplexity."""
        tokens = tokenize(rows, tokenizer, data, vocab_size=vocab_size)
        batches = eval_batches(tokens, data, batch_size=batch_size)

        def measure(model: LanguageModel) -> Measured:
            found = perplexity(model, batches, progress=progress)
            report = {"nll": found.nll, "tokens": found.tokens, "perplexity": found.perplexity}
            return Measured({"loss": found.nll}, report)

        return measure


def predicted(batch: Batch) -> Batch:
    """Adds the tokens of a batch that are to be predicted, so that the head is applied only there.

    If the loss is on completions only, most positions do not contribute to it, and logits are the
    largest array of a step: (b, t, vocab) in float32.

    Args:
        batch: `tokens` and `loss_mask` (b, t), from `loft_jax.data`.

    Returns:
        The batch without `loss_mask`, and with `places` (b, k) int32, the positions whose next
        token is predicted, `targets` (b, k) int32, these next tokens, and `weights` (b, k) float32,
        0 if a row has fewer than k. k is a power of two or t, so that few shapes are compiled.
    """
    learned = batch["loss_mask"][:, 1:] > 0  # (b, t - 1)
    length = learned.shape[1] + 1
    most = max(1, int(np.max(learned.sum(axis=1))))
    k = min(length, 1 << (most - 1).bit_length())
    # A stable sort brings the learned positions to the front, in order.
    places = np.argsort(~learned, axis=1, kind="stable")[:, :k].astype(np.int32)
    places = np.pad(places, ((0, 0), (0, k - places.shape[1])))
    weights = np.arange(k) < learned.sum(axis=1, keepdims=True)
    targets = np.take_along_axis(batch["tokens"], np.minimum(places + 1, length - 1), axis=1)
    out = {key: batch[key] for key in ("tokens", "positions", "segment_ids")}
    return {**out, "places": places, "targets": targets, "weights": weights.astype(np.float32)}


@dataclass(frozen=True)
class Perplexity:
    """The result of `perplexity`.

    Args:
        nll: Mean negative log-likelihood, in nats per token.
        tokens: Number of tokens in the mean.
    """

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """`exp(nll)`; infinite if that overflows."""
        return math.inf if self.nll >= 700 else math.exp(self.nll)


def perplexity(
    model: LanguageModel, batches: Sequence[Batch], *, progress: bool = True
) -> Perplexity:
    """Computes the mean negative log-likelihood of the tokens with a loss, equally weighted.

    Args:
        model: A language model.
        batches: From `loft_jax.data.eval_batches`.
        progress: Show a bar.

    Returns:
        The mean over all tokens of all batches.

    Raises:
        InputError: No token has a loss.

    Example:
        >>> perplexity(model, eval_batches(data, config, batch_size=8)).nll  # doctest: +SKIP
        3.91
    """
    graphdef, state = inference_state(model)
    total = weight = 0.0  # float64: float32 sums of one batch each
    for batch in progress_bar(batches, desc="perplexity", leave=False, shown=progress):
        loss, count = _sums(graphdef, state, predicted(batch))
        total += float(loss)
        weight += float(count)
    if weight == 0:
        raise InputError("the evaluation batches hold no token to predict; expected some")
    return Perplexity(nll=total / weight, tokens=int(weight))


@functools.partial(jax.jit, static_argnums=0)
def _sums(
    graphdef: nnx.GraphDef[Any], state: nnx.State[Any, Any], inputs: Arrays
) -> tuple[jax.Array, jax.Array]:
    loss, count = _summed(nnx.merge(graphdef, state), inputs, token_losses_in_parts)
    return gathered(loss), gathered(count)


def _summed(
    model: LanguageModel, inputs: Arrays, losses_of: Callable[..., jax.Array]
) -> tuple[jax.Array, jax.Array]:
    arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
    hidden, _ = model.hidden_states(
        arrays["tokens"], positions=arrays["positions"], segment_ids=arrays["segment_ids"]
    )  # (b, t, hidden)
    losses = losses_of(model, hidden, arrays["places"], arrays["targets"])
    return jnp.sum(losses * arrays["weights"]), jnp.sum(arrays["weights"])
