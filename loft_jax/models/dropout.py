"""Dropout of a base model, as its configuration asks for it."""

from collections.abc import Callable

import jax
from flax import nnx


def dropout(rate: float, rngs: nnx.Rngs) -> nnx.Dropout | None:
    """Makes a dropout layer.

    Args:
        rate: Share of the values that are dropped.
        rngs: For its random stream.

    Returns:
        The layer; None where nothing is dropped, so that a model without dropout has no random
        state.
    """
    return nnx.Dropout(rate, rngs=rngs) if rate else None


def dropped(layer: Callable[[jax.Array], jax.Array] | None, x: jax.Array) -> jax.Array:
    """Applies a dropout layer, if there is one, to an array of any shape."""
    return x if layer is None else layer(x)
