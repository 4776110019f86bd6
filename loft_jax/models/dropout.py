"""Dropout of base models, as set in their configuration."""

from collections.abc import Callable

import jax
from flax import nnx


def dropout(rate: float, rngs: nnx.Rngs) -> nnx.Dropout | None:
    """Makes a dropout layer.

    Args:
        rate: Probability of dropping a value.
        rngs: Source of its random stream.

    Returns:
        The layer; None for a rate of 0, so that a model without dropout has no random state.
    """
    return nnx.Dropout(rate, rngs=rngs) if rate else None


def dropped(layer: Callable[[jax.Array], jax.Array] | None, x: jax.Array) -> jax.Array:
    """Applies a dropout layer, if there is one, to an array of any shape."""
    return x if layer is None else layer(x)
