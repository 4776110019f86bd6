r"""Symmetric matrices as packed halves, so that their inner products are those of vectors.

A symmetric (r, r) matrix has `q = r (r + 1) / 2` numbers. Packed with √2 on the off-diagonal ones,
the inner product of two packed matrices is that of the matrices. So, for rows of packed matrices p
`(m, q)`:

- the outer products `g_i g_iᵀ`, packed: `symmetric_squares(g)`;
- all of `⟨p_i, Q_j Q_jᵀ⟩ = Q_jᵀ p_i Q_j`: `p · symmetric_squares(Q)ᵀ`, `(m, q) x (q, n)`;
- all of `Cᵀ p_i C`: `congruence(C)(p)`, for small r a product with one matrix, (m, q) x (q, q).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from loft_jax.optim.linear_algebra import FactorMatrix, matmul, transpose

# From this rank on, two products of (r, r) matrices a row take less time than one with (q, q).
_MANY = 48


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

    Example:
      >>> x, y = jnp.array([1.0, 2.0]), jnp.array([3.0, 5.0])
      >>> [round(value.item(), 3) for value in symmetric_product(x, y)]  # of [[3, 5.5], [5.5, 10]]
      [3.0, 7.778, 10.0]
    """
    rows, columns = _upper_half(x.shape[axis])
    weight = jnp.where(rows == columns, 0.5, math.sqrt(0.5)).astype(x.dtype)

    def take(x: jax.Array, which: jax.Array) -> jax.Array:
        return jnp.take(x, which, axis=axis)

    products = take(x, rows) * take(y, columns) + take(x, columns) * take(y, rows)
    return _along(weight, axis, products.ndim) * products


def _along(x: jax.Array, axis: int, ndim: int) -> jax.Array:
    """Lays x (k,) along one of ndim axes."""
    return jnp.expand_dims(x, [i for i in range(ndim) if i != axis % ndim])


def symmetric_squares(x: FactorMatrix) -> FactorMatrix:
    """Packs `x_i x_iᵀ` of every row: (..., n, r) to (..., n, q)."""
    return x.like(symmetric_product(x.array, x.array, x.rank_axis))


def congruence(c: jax.Array) -> Callable[[FactorMatrix], FactorMatrix]:
    """Gives the map from packed symmetric matrices p_i to those of `Cᵀ p_i C`.

    Args:
      c: (..., r, r).

    Returns:
      A function of (..., n, q).

    Example:
      >>> squares = symmetric_squares(FactorMatrix(jnp.array([[1.0, 2.0]]), rank_last=True))
      >>> found = congruence(jnp.diag(jnp.array([2.0, 3.0])))(squares).array[0]
      >>> [round(value.item(), 3) for value in found]  # the square of (2, 6)
      [4.0, 16.971, 36.0]
    """
    rank = c.shape[-1]
    if rank >= _MANY:
        return functools.partial(_congruent, c=c)
    # Row (a, b) is the packed image of the packed basis matrix (a, b).
    rows, columns = _upper_half(rank)
    weight = jnp.where(rows == columns, 1.0, math.sqrt(2.0)).astype(c.dtype)
    images = symmetric_product(c[..., rows, :], c[..., columns, :])
    matrix = _along(weight, -2, images.ndim) * images
    return lambda p: p.times(matrix)


def _congruent(p: FactorMatrix, c: jax.Array) -> FactorMatrix:
    """`Cᵀ p_i C` by two products of whole matrices."""
    r = c.shape[-1]
    rows, columns = _upper_half(r)
    axis, last = p.rank_axis, p.rank_last
    places = jnp.arange(len(rows), dtype=jnp.int32)
    which = jnp.zeros((r, r), jnp.int32).at[rows, columns].set(places)
    weight = jnp.where(rows == columns, 1.0, math.sqrt(2.0)).astype(c.dtype)
    weight = _along(weight, axis, p.array.ndim)
    # Whole symmetric matrices, then Y = P C and Cᵀ P C = Yᵀ C; with P = Pᵀ nothing else turns.
    x = jnp.take(p.array / weight, jnp.maximum(which, which.T).ravel(), axis=axis)
    for _ in range(2):
        *front, y, z = x.shape
        if last:  # (..., n, r, r): transposed, times (r, r)
            x = jnp.swapaxes(x.reshape(*front, y, r, r), -2, -1)
            x = matmul(x.reshape(*front, y * r, r), c).reshape(*front, y, z)
        else:  # (r, r) times the transposed (..., r, r, n)
            x = jnp.swapaxes(x.reshape(*front, r, r, z), -3, -2)
            x = matmul(transpose(c), x.reshape(*front, r, r * z)).reshape(*front, y, z)
    return p.like(jnp.take(x, rows * r + columns, axis=axis) * weight)


def _upper_half(r: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of each packed element, (q,) each."""
    pairs = jnp.asarray([(row, column) for row in range(r) for column in range(row, r)])
    return pairs[:, 0], pairs[:, 1]
