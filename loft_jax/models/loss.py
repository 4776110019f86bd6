"""The loss of a language model: cross entropy of the next token."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

Arrays = Mapping[str, jax.Array | np.ndarray]


def token_losses(logits: jax.Array, batch: Arrays) -> jax.Array:
    """`-log p(token | what stands before it)` of every token that carries the loss, else 0.

    `loss[i, j] = logsumexp(logits[i, j]) - logits[i, j, tokens[i, j + 1]]`, in float32.

    Args:
        logits: (b, t, vocab); position j speaks of token j + 1.
        batch: `tokens` (b, t) int32 and `loss_mask` (b, t); token 0 is never predicted.

    Returns:
        (b, t) float32, in nats; entry j is of token j + 1, and the last is 0.
    """
    # The targets are moved, not the logits: a slice of those would cost a copy each way.
    targets, learned = (_moved(jnp.asarray(batch[key])) for key in ("tokens", "loss_mask"))
    scores = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return jnp.where(learned > 0, jax.nn.logsumexp(scores, axis=-1) - chosen, 0.0)


def summed_loss(logits: jax.Array, batch: Arrays) -> tuple[jax.Array, jax.Array]:
    """The sum of `token_losses` and the number of tokens in it.

    Sums, not means, so that batches and micro-batches add up to the mean over all their tokens.

    Args:
        logits: (b, t, vocab).
        batch: As for `token_losses`.

    Returns:
        Two float32 scalars: the sum in nats, and the number of tokens.
    """
    count = jnp.sum(batch["loss_mask"][:, 1:] > 0, dtype=jnp.float32)
    return token_losses(logits, batch).sum(), count


def _moved(array: jax.Array) -> jax.Array:
    """(b, t) one place to the left, with a zero at the end."""
    return jnp.pad(array[:, 1:], ((0, 0), (0, 1)))
