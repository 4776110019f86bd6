"""Orthonormal bases of what a factor spans, by matrix products alone.

The gradient of one factor, `G P`, sees the full gradient G only through the columns of the other,
its *partner* P `(n, r)`. The paper divides by the Gram matrix `PᵀP`, which squares the condition
number, and B starts at zero. Here `P = Q S` with orthonormal Q and triangular S: `G Q = (G P) S⁻¹`
is the full gradient in coordinates of P's column space, whose norm and products are those of the
projected gradient itself, and moving from one basis to the next is the contraction `Q_oldᵀ Q_new`,
which never amplifies.

Q comes from the Gram matrix after all, but in three passes, each a product over the long axis and a
factorization of an `(r, r)` matrix, so that a long axis sharded over devices is reduced and never
gathered:

1. Columns of unit length and a shifted Cholesky factorization: what is left has a condition number
   of at most `1 / √shift`, whatever that of P (Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa,
   Shifted Cholesky QR, SIAM J. Sci. Comput. 2020, arXiv 1809.11085).
2. An eigendecomposition, which now tells the rank to nearly the working precision, and drops the
   directions in which P has nothing but rounding.
3. A Cholesky factorization of what is within rounding of the identity.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# TPUs and newer GPUs multiply float32 in fewer bits by default; a basis needs all of them.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Basis(NamedTuple):
    """An orthonormal basis of the column space of P: `P = q s`.

    When P has a rank k below r, q is an orthonormal basis times a (k, r) matrix with orthonormal
    rows, so `q qᵀ` is the projector all the same; of P = 0, q is zero.

    Attributes:
      q: (..., n, r).
      s: (..., r, r).
      s_inv: (..., r, r), the inverse of s on the directions that are kept: `q = P s_inv`.
    """

    q: jax.Array
    s: jax.Array
    s_inv: jax.Array

    def coordinates(self, x: jax.Array) -> jax.Array:
        """`X Pᵀ Q` of an X (..., m, r) that stands for the full matrix `X Pᵀ`."""
        return matmul(x, jnp.swapaxes(self.s, -1, -2))

    def from_coordinates(self, c: jax.Array) -> jax.Array:
        """The X (..., m, r) with `X Pᵀ = c Qᵀ`; undoes `coordinates`."""
        return matmul(c, jnp.swapaxes(self.s_inv, -1, -2))

    def project(self, gp: jax.Array) -> jax.Array:
        """The X (..., m, r) with `X Pᵀ = G proj(P)`, given the product `G P` (..., m, r).

        This is `G P (PᵀP)⁺` without the Gram matrix.
        """
        return self.from_coordinates(matmul(gp, self.s_inv))


def orthonormal_basis(p: jax.Array) -> Basis:
    """Factorizes `P = Q S` with orthonormal Q, by products over the long axis.

    The scale of each column does not matter. With columns of unit length, directions whose singular
    value is under 4 √r ε are dropped: nothing moves along them.

    Args:
      p: (..., n, r) with n >= r, float32 or float64; leading axes are a batch.

    Returns:
      The basis, finite for every finite p.

    Example:
      >>> import jax.numpy as jnp
      >>> basis = orthonormal_basis(jnp.array([[3.0, 0.0], [4.0, 0.0], [0.0, 0.0]]))
      >>> print((100 * basis.q @ basis.q.T).round())  # 100 times the projector on (3, 4, 0)
      [[36. 48.  0.]
       [48. 64.  0.]
       [ 0.  0.  0.]]
    """
    r = p.shape[-1]
    eps = float(jnp.finfo(p.dtype).eps)
    tiny = float(jnp.finfo(p.dtype).tiny)
    eye = jnp.eye(r, dtype=p.dtype)
    shift = 2 * r * eps

    # Unit columns. By the largest element before the norm: squares of tiny ones would underflow.
    # A comparison that a NaN fails leaves it in: it must show in the result.
    largest = jnp.max(jnp.abs(p), axis=-2, keepdims=True)  # (..., 1, r)
    largest = jnp.where(largest < tiny, 1.0, largest)
    q = p / largest
    norm = jnp.sqrt(jnp.sum(q * q, axis=-2, keepdims=True))
    length = jnp.where(norm < tiny, 1.0, norm)
    q = q / length
    s, s_inv = eye * (largest * length), eye / (largest * length)

    upper = _upper_cholesky(_gram(q) + shift * eye)
    q, s, s_inv = _change(q, s, s_inv, upper, _inverse(upper))

    # A singular value σ of the unit columns is σ / √(σ² + shift) now.
    squares, vectors = jnp.linalg.eigh(_gram(q))  # (..., r), (..., r, r)
    drop = squares < 8 * eps
    root = jnp.where(drop, 0.0, jnp.sqrt(jnp.where(drop, 1.0, squares)))[..., None]  # (..., r, 1)
    keep = jnp.where(drop, 0.0, 1.0)[..., None, :]
    inverse_root = keep / jnp.where(drop[..., None, :], 1.0, jnp.swapaxes(root, -1, -2))
    q, s, s_inv = _change(q, s, s_inv, root * jnp.swapaxes(vectors, -1, -2), vectors * inverse_root)

    upper = _upper_cholesky(_gram(q) + eye * (1.0 - keep))
    q, s, s_inv = _change(q, s, s_inv, upper, _inverse(upper))

    # Any rotation of a basis is as good. The one that makes the first r rows triangular turns Q
    # into the identity when n = r, and then no quadratic form suffers from cancellation. The rows
    # are taken by a product: a slice of a sharded axis could be gathered.
    first_rows = matmul(jnp.eye(r, p.shape[-2], dtype=p.dtype), q)
    rotation = jnp.linalg.qr(jnp.swapaxes(first_rows, -1, -2))[0]
    return Basis(*_change(q, s, s_inv, jnp.swapaxes(rotation, -1, -2), rotation))


def _change(
    q: jax.Array, s: jax.Array, s_inv: jax.Array, forward: jax.Array, backward: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Goes on from `P = q s` to the basis `q backward`, forward being the inverse of backward."""
    return matmul(q, backward), matmul(forward, s), matmul(s_inv, backward)


def _gram(q: jax.Array) -> jax.Array:
    return matmul(jnp.swapaxes(q, -1, -2), q)


def _upper_cholesky(gram: jax.Array) -> jax.Array:
    return jnp.swapaxes(jnp.linalg.cholesky(gram), -1, -2)


def _inverse(upper: jax.Array) -> jax.Array:
    eye = jnp.broadcast_to(jnp.eye(upper.shape[-1], dtype=upper.dtype), upper.shape)
    return jax.lax.linalg.triangular_solve(upper, eye, left_side=True, lower=False)
