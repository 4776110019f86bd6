"""Symmetric matrices as packed halves, so that what is done to many of them is a matrix product.

A symmetric (r, r) matrix has `q = r (r + 1) / 2` numbers. Packed with √2 on the off-diagonal ones,
the inner product of two packed matrices is that of the matrices. So, for rows of packed matrices
p `(m, q)`:

- the outer products `g_i g_iᵀ`, packed: `symmetric_squares(g)`;
- all of `⟨p_i, Q_j Q_jᵀ⟩ = Q_jᵀ p_i Q_j`: `p · symmetric_squares(Q)ᵀ`, `(m, q) x (q, n)`;
- all of `Cᵀ p_i C`: `p · congruence(C)`, `(m, q) x (q, q)`.
"""

import math

import jax
import jax.numpy as jnp

from loft_jax.optim.tall import Tall


def packed_size(rank: int) -> int:
    """Numbers in the packed half of a symmetric (rank, rank) matrix."""
    return rank * (rank + 1) // 2


def symmetric_product(x: jax.Array, y: jax.Array, axis: int = -1) -> jax.Array:
    """Packs `(x yᵀ + y xᵀ) / 2`: diagonal elements as they are, the others times √2.

    Args:
      x: (..., r), vectors along the given axis.
      y: Of the same shape.
      axis: -1 or -2.

    Returns:
      Like x with q = r (r + 1) / 2 in the place of r, such that the dot product of two packed
      matrices is the sum of the elementwise products of the whole ones.
    """
    rows, columns = _upper_half(x.shape[axis])
    weight = jnp.where(rows == columns, 0.5, math.sqrt(0.5)).astype(x.dtype)

    def take(x: jax.Array, which: jax.Array) -> jax.Array:
        return jnp.take(x, which, axis=axis)

    products = take(x, rows) * take(y, columns) + take(x, columns) * take(y, rows)
    return (weight if axis == -1 else weight[:, None]) * products


def symmetric_squares(x: Tall) -> Tall:
    """Packs `x_i x_iᵀ` of every row: (..., n, r) to (..., n, q)."""
    return x.like(symmetric_product(x.array, x.array, x.rank_axis))


def congruence(c: jax.Array) -> jax.Array:
    """The matrix M (q, q) with `pack(P) M = pack(Cᵀ P C)` for every symmetric P.

    Args:
      c: (..., r, r).

    Returns:
      (..., q, q); row (a, b) is the packed image of the packed basis matrix (a, b).
    """
    rows, columns = _upper_half(c.shape[-1])
    weight = jnp.where(rows == columns, 1.0, math.sqrt(2.0)).astype(c.dtype)
    return weight[:, None] * symmetric_product(c[..., rows, :], c[..., columns, :])


def _upper_half(r: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of each packed element, (q,) each."""
    pairs = jnp.asarray([(row, column) for row in range(r) for column in range(row, r)])
    return pairs[:, 0], pairs[:, 1]
