"""The second moment of the projected full gradient, held in r dimensions.

Row i of the projected gradient is `g_i Qᵀ`, with coordinates g_i (r). Adam's second moment of the
full matrix would be a sum of squares of its `(m, n)` elements; it is exactly the quadratic form
`v_ij = Q_jᵀ p_i Q_j` of one symmetric matrix a row, `p_i = Σ g_i g_iᵀ` `(r, r)`, in which a change
of basis C is `Cᵀ p_i C`.

A symmetric matrix has `q = r (r + 1) / 2` numbers. Packed with √2 on the off-diagonal ones, the
inner product of two packed matrices is that of the matrices, so that everything here is a matrix
product with packed symmetric products:

- an outer product, packed: `g ⊙ g`, written `symmetric_product(g, g)`;
- all of `v_ij = ⟨p_i, Q_j Q_jᵀ⟩`: `p · symmetric_product(Q, Q)ᵀ`, `(m, q) x (q, n)`;
- all of `Cᵀ p_i C`: `p · symmetric_square(C)`, `(m, q) x (q, q)`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from loft_jax.optim.subspace import matmul

# Elements of the full matrix that exist at one time: 1 MB in float32 fits a cache, and the products
# are still large ones.
_TILE_ELEMENTS = 1 << 18


def packed_size(rank: int) -> int:
    """Numbers in the packed half of a symmetric (rank, rank) matrix."""
    return rank * (rank + 1) // 2


def symmetric_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Packs `(x yᵀ + y xᵀ) / 2`: diagonal elements as they are, the others times √2.

    Args:
      x: (..., r).
      y: (..., r).

    Returns:
      (..., q) with q = r (r + 1) / 2, such that the dot product of two packed matrices is the
      sum of the elementwise products of the whole ones.
    """
    rows, columns = _upper_half(x.shape[-1])
    weight = jnp.where(rows == columns, 0.5, math.sqrt(0.5)).astype(x.dtype)
    return weight * (x[..., rows] * y[..., columns] + x[..., columns] * y[..., rows])


def symmetric_square(c: jax.Array) -> jax.Array:
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


def adam_direction(
    mu: jax.Array, nu: jax.Array, q: jax.Array, eps: jax.Array | float, limit: jax.Array | float
) -> jax.Array:
    r"""Adam's full direction, projected: coordinates of `D proj(Q)` without holding D.

    .. math::
      D_{ij} = \frac{\langle m_i, Q_j \rangle}{\sqrt{\langle p_i, Q_j Q_j^T \rangle} + \epsilon}
      \qquad |D_{ij}| \le \mathrm{limit}

    Rounding leaves the quadratic form at about 1e-7 tr(p_i) in float32 where it should vanish, and
    a small m over a wrongly tiny root would be a huge step. Adam's own bound on D holds for the
    true values, so it is enforced on the computed ones.

    Args:
      mu: (stack, m, r), first moments in coordinates of q, bias-corrected.
      nu: (stack, m, q), packed second moments, bias-corrected.
      q: (stack, n, r), orthonormal columns.
      eps: Adam's epsilon.
      limit: Adam's bound on an element of D.

    Returns:
      (stack, m, r), the coordinates `D Q`.
    """
    one = functools.partial(_direction_of_one, eps=eps, limit=limit)
    return jax.lax.map(lambda xs: one(*xs), (mu, nu, q))


def _direction_of_one(
    mu: jax.Array, nu: jax.Array, q: jax.Array, *, eps: jax.Array | float, limit: jax.Array | float
) -> jax.Array:
    m, n = mu.shape[0], q.shape[0]
    features = symmetric_product(q, q).T  # (q, n)

    def tile(moments: tuple[jax.Array, jax.Array]) -> jax.Array:
        mu_tile, nu_tile = moments  # (rows, r), (rows, q)
        v = jnp.maximum(matmul(nu_tile, features), 0.0)  # (rows, n)
        d = matmul(mu_tile, q.T) / (jnp.sqrt(v) + eps)
        return matmul(jnp.clip(d, -limit, limit), q)  # (rows, r)

    tiles = min(m, max(1, math.ceil(m * n / _TILE_ELEMENTS)))
    if tiles == 1:
        return tile((mu, nu))

    # Tile t is rows t, t + tiles, ...: rows sharded over devices are in every tile alike.
    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, -m % tiles), (0, 0)))
        return jnp.swapaxes(padded.reshape(-1, tiles, x.shape[-1]), 0, 1)

    out = jax.lax.map(tile, (split(mu), split(nu)))  # (tiles, rows, r)
    return jnp.swapaxes(out, 0, 1).reshape(-1, mu.shape[-1])[:m]
