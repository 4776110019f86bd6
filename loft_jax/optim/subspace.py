"""Orthonormal bases of what a factor spans, by matrix products alone.

The gradient of one factor, `G P`, sees the full gradient G only through the columns of the other,
its *partner* P `(n, r)`. The paper divides by the Gram matrix `PᵀP`, which squares the condition
number, and B starts at zero. Here `P = Q S` with orthonormal Q and triangular S: `G Q = (G P) S⁻¹`
is the full gradient in coordinates of P's column space, whose norm and products are those of the
projected gradient itself, and moving from one basis to the next is the contraction `Q_oldᵀ Q_new`,
which never amplifies.

Q comes from the Gram matrix after all, but in three passes, each a product over the long axis and
an elimination in an `(r, r)` matrix, so that a long axis sharded over devices is reduced and never
gathered:

1. Columns of unit length and a shifted Cholesky factorization: what is left has a condition number
   of at most `1 / √shift`, whatever that of P (Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa,
   Shifted Cholesky QR, SIAM J. Sci. Comput. 2020, arXiv 1809.11085).
2. A pivoted Cholesky factorization, which now tells the rank to nearly the working precision, and
   drops the directions in which P has nothing but rounding.
3. A Cholesky factorization of what is within rounding of the identity.

The eliminations are written out: r steps over all matrices of a batch at once. (LAPACK's routines,
which JAX calls on CPUs, wait for threads of the pool that they run on: a program with more of them
than cores can stop for good.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from loft_jax.optim.tall import Tall, matmul, transpose


class Basis(NamedTuple):
    """An orthonormal basis of the column space of P: `P = q s`.

    When P has a rank k below r, q is an orthonormal basis times a (k, r) matrix with orthonormal
    rows, so `q qᵀ` is the projector all the same; of P = 0, q is zero.

    Attributes:
      q: (..., n, r).
      s: (..., r, r).
      s_inv: (..., r, r), the inverse of s on the directions that are kept: `q = P s_inv`.
    """

    q: Tall
    s: jax.Array
    s_inv: jax.Array

    def coordinates(self, x: Tall) -> Tall:
        """`X Pᵀ Q` of an X (..., m, r) that stands for the full matrix `X Pᵀ`."""
        return x.times(transpose(self.s))

    def from_coordinates(self, c: Tall) -> Tall:
        """The X (..., m, r) with `X Pᵀ = c Qᵀ`; undoes `coordinates`."""
        return c.times(transpose(self.s_inv))

    def project(self, gp: Tall) -> Tall:
        """The X (..., m, r) with `X Pᵀ = G proj(P)`, given the product `G P` (..., m, r).

        This is `G P (PᵀP)⁺` without the Gram matrix.
        """
        return self.from_coordinates(gp.times(self.s_inv))


def orthonormal_basis(p: Tall) -> Basis:
    """Factorizes `P = Q S` with orthonormal Q, by products over the long axis.

    The scale of each column does not matter. With columns of unit length, directions whose singular
    value is under 4 √r ε are dropped: nothing moves along them.

    Args:
      p: (..., n, r) with n >= r, float32 or float64; leading axes are a batch.

    Returns:
      The basis, finite for every finite p, in the layout of p.

    Example:
      >>> import jax.numpy as jnp
      >>> p = jnp.array([[3.0, 0.0], [4.0, 0.0], [0.0, 0.0]])
      >>> q = orthonormal_basis(Tall(p)).q.array
      >>> print((100 * q @ q.T).round())  # 100 times the projector on (3, 4, 0)
      [[36. 48.  0.]
       [48. 64.  0.]
       [ 0.  0.  0.]]
    """
    r, x = p.rank, p.array
    eps = float(jnp.finfo(x.dtype).eps)
    tiny = float(jnp.finfo(x.dtype).tiny)
    eye = jnp.eye(r, dtype=x.dtype)
    shift = 2 * r * eps

    # Unit columns. By the largest element before the norm: squares of tiny ones would underflow.
    # A comparison that a NaN fails leaves it in: it must show in the result.
    largest = jnp.max(jnp.abs(x), axis=p.long_axis)  # (..., r)
    largest = jnp.where(largest < tiny, 1.0, largest)
    norm = jnp.linalg.norm(p.scaled(1 / largest).array, axis=p.long_axis)
    length = largest * jnp.where(norm < tiny, 1.0, norm)
    q = p.scaled(1 / length)

    forward, backward = _eliminate(q.inner(q) + shift * eye, 0.0)
    basis = Basis(
        q.times(backward), forward * length[..., None, :], backward / length[..., :, None]
    )

    # A singular value σ of the unit columns is σ / √(σ² + shift) now.
    basis = _change(basis, *_eliminate(basis.q.inner(basis.q), 8 * eps))

    # Kept columns have length one but for rounding, dropped ones are zero.
    forward, backward = _eliminate(basis.q.inner(basis.q), 0.5)
    if p.length == r:
        # A square Q is turned to the identity: no quadratic form then suffers from cancellation.
        rotation = transpose(basis.q.times(backward).tall())
        forward, backward = matmul(transpose(rotation), forward), matmul(backward, rotation)
    return _change(basis, forward, backward)


def _change(basis: Basis, forward: jax.Array, backward: jax.Array) -> Basis:
    """Goes on from `P = q s` to the basis `q backward`, forward being the inverse of backward."""
    return Basis(basis.q.times(backward), matmul(forward, basis.s), matmul(basis.s_inv, backward))


def _eliminate(gram: jax.Array, drop: float) -> tuple[jax.Array, jax.Array]:
    """Factorizes Gram matrices G = FᵀF by pivoted Cholesky elimination, with F's inverse.

    Args:
      gram: (..., r, r), symmetric, positive semidefinite.
      drop: Pivots that are not above it, and what is left with them, count as zero.

    Returns:
      F and T (..., r, r) with `Tᵀ G T` the identity on the columns that are kept; those of T and
      rows of F that are dropped are zero.
    """
    r = gram.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(r, dtype=gram.dtype), gram.shape)

    def body(k: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        left, vectors, forward, backward = carry
        diagonal = jnp.diagonal(left, axis1=-2, axis2=-1)  # (..., r), zero where done
        # NaN is the largest to argmax: it is chosen, kept, and shows in the result.
        pivot = jax.nn.one_hot(jnp.argmax(diagonal, axis=-1), r, dtype=gram.dtype)
        size = jnp.sum(jnp.where(pivot > 0, diagonal, 0.0), axis=-1, keepdims=True)  # (..., 1)
        dropped = size <= drop
        root = jnp.where(dropped, jnp.inf, jnp.sqrt(jnp.where(dropped, 1.0, size)))
        row = jnp.sum(jnp.where(pivot[..., :, None] > 0, left, 0.0), axis=-2) / root
        vector = jnp.sum(jnp.where(pivot[..., None, :] > 0, vectors, 0.0), axis=-1) / root
        rest = jnp.where(pivot > 0, 0.0, row)
        left = left - row[..., :, None] * row[..., None, :]
        # What rounding leaves of the pivot's row and column is not to be chosen again.
        done = (pivot[..., :, None] > 0) | (pivot[..., None, :] > 0)
        left = jnp.where(done, 0.0, left)
        vectors = vectors - vector[..., :, None] * rest[..., None, :]
        at_k = jnp.arange(r) == k
        forward = jnp.where(at_k[:, None], row[..., None, :], forward)
        backward = jnp.where(at_k, vector[..., :, None], backward)
        return left, vectors, forward, backward

    # F and T begin with what is overwritten. A constant there would lie in memory from the start.
    _, _, forward, backward = jax.lax.fori_loop(0, r, body, (gram, eye, gram, gram))
    return forward, backward
