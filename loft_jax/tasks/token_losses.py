"""Cross entropies of tokens, from the input of a model's head."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from loft_jax.models.activations import row_shards
from loft_jax.models.family import LanguageModel

_LOGITS_AT_ONCE = 2**25  # of a device, 128 MiB in float32


def token_losses(
    model: LanguageModel, hidden: jax.Array, places: jax.Array, targets: jax.Array
) -> jax.Array:
    """Computes `-log p(target | tokens up to its place)`.

    Args:
        model: Its head is applied.
        hidden: `(b, t, hidden)`, from its `hidden_states`.
        places: `(b, k)` int32, positions to predict the next token of.
        targets: `(b, k)` int32, these tokens.

    Returns:
        `(b, k)` float32, in nats.
    """
    logits = model.logits(jnp.take_along_axis(hidden, places[..., None], axis=1))  # (b, k, vocab)
    losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), targets
    )
    return losses


def token_losses_in_parts(
    model: LanguageModel, hidden: jax.Array, places: jax.Array, targets: jax.Array
) -> jax.Array:
    """Computes what `token_losses` does without all logits at once, for evaluation.

    A gradient would keep the logits of all parts.

    Args:
        model: As for `token_losses`, and the other arguments.
        hidden: `(b, t, hidden)`.
        places: `(b, k)` int32.
        targets: `(b, k)` int32.

    Returns:
        `(b, k)` float32, in nats.
    """
    rows, count = places.shape
    vocabulary = jax.eval_shape(model.logits, hidden[:, :1]).shape[-1]
    width = max(1, min(count, _LOGITS_AT_ONCE * row_shards() // (rows * vocabulary)))
    parts = -(-count // width)

    def divided(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, parts * width - count)))
        return x.reshape(rows, parts, width).swapaxes(0, 1)

    found = lax.map(
        lambda part: token_losses(model, hidden, *part), (divided(places), divided(targets))
    )  # (parts, b, width)
    return found.swapaxes(0, 1).reshape(rows, -1)[:, :count]
