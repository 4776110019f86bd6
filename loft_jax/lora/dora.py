"""DoRA's arithmetic: norms of the columns of an adapted weight, and what they are scaled by."""

import jax
import jax.numpy as jnp
from jax import lax


def column_norms(
    weight: jax.Array, a: jax.Array, b: jax.Array, scaling: jax.Array | float
) -> jax.Array:
    """Norms of the columns of `W + s A B`, which is not made for it.

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
    # Where the update takes a column away, rounding may leave a little less than nothing of it.
    return jnp.sqrt(jnp.maximum(squares, 0))


def weight_norms(weight: jax.Array) -> jax.Array:
    """Norms of the columns of a weight: the magnitudes as they start.

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
    """What a column is multiplied by to have its magnitude: `m / ‖w‖`.

    A column of zeros stays one, whatever it is multiplied by; here by something finite.

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
