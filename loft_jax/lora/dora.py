"""DoRA's arithmetic: norms of the columns of an adapted weight, and their scales."""

import jax
import jax.numpy as jnp
from jax import lax


def column_norms(
    weight: jax.Array, a: jax.Array, b: jax.Array, scaling: jax.Array | float
) -> jax.Array:
    """Computes the norms of the columns of `W + s A B`, without materializing it.

    `‖w_j + s A b_j‖² = ‖w_j‖² + 2 s (Wᵀ A)_j b_j + s² b_jᵀ (Aᵀ A) b_j`, in float32 (float64 for
    float64 weights) at the highest precision.

    Args:
        weight: `(in, out)`.
        a: `(in, r)`.
        b: `(r, out)`.
        scaling: The `s`.

    Returns:
        `(out,)`.

    Example:
        >>> w, a, b = jnp.eye(2), jnp.ones((2, 1)), jnp.array([[0.0, 3.0]])
        >>> print(column_norms(w, a, b, 1.0))  # of the columns (1, 0) and (3, 4)
        [1. 5.]

    Source:
        Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.
    """
    dtype = jnp.promote_types(weight.dtype, jnp.float32)
    weight, a, b = (x.astype(dtype) for x in (weight, a, b))
    highest = lax.Precision.HIGHEST
    cross = jnp.einsum("ir,io->ro", a, weight, precision=highest)
    gram = jnp.einsum("iq,ir->qr", a, a, precision=highest)
    step = 2 * cross + scaling * jnp.einsum("qr,ro->qo", gram, b, precision=highest)  # (r, out)
    squares = jnp.sum(jnp.square(weight), axis=0) + scaling * jnp.sum(b * step, axis=0)
    # If the update cancels a column, rounding may make its square slightly negative.
    return jnp.sqrt(jnp.maximum(squares, 0))


def weight_norms(weight: jax.Array) -> jax.Array:
    """Computes the norms of the columns of a weight, which are the initial magnitudes.

    Args:
        weight: `(in, out)`.

    Returns:
        `(out,)`, float32 or wider.

    Example:
        >>> weight_norms(jnp.array([[3.0, 0.0], [4.0, 2.0]])).tolist()
        [5.0, 2.0]
    """
    dtype = jnp.promote_types(weight.dtype, jnp.float32)
    return jnp.sqrt(jnp.sum(jnp.square(weight.astype(dtype)), axis=0))


def magnitude_scale(magnitude: jax.Array, norms: jax.Array) -> jax.Array:
    """Computes the scale that gives each column its magnitude: `m / ‖w‖`.

    A column of zeros remains zero; its scale is finite.

    Args:
        magnitude: `(out,)`.
        norms: `(out,)`.

    Returns:
        `(out,)`.

    Example:
        >>> magnitude_scale(jnp.array([10.0, 7.0]), jnp.array([5.0, 0.0])).tolist()
        [2.0, 7.0]
    """
    return magnitude.astype(norms.dtype) / jnp.where(norms > 0, norms, 1)
