r"""The second moment as row weights and one r×r matrix: Adafactor's, in the projected space.

Adafactor keeps the sums of v over each row and over each column, and takes `v_ij = R_i C_j / Σ R`
(the matrix of rank one with those sums). With `v_ij = Q_jᵀ p_i Q_j` and orthonormal Q these are

.. math::
  R_i = \sum_j v_{ij} = \mathrm{tr}\, p_i =: w_i, \qquad
  C_j = \sum_i v_{ij} = Q_j^T S Q_j, \quad S = \sum_i p_i, \qquad \sum_i w_i = \mathrm{tr}\, S

so that `p_i ≈ w_i S / tr S`, and all there is to keep is w (m) and S (r, r). Under a change of
basis S becomes `Cᵀ S C`, and every w_i shrinks as the trace of its matrix does, by
`tr(Cᵀ S C) / tr S`. Q only ever meets S and `m_i` in inner products, so nothing here depends on
the basis, nor on how W is factorized.

The direction needs no (m, n) matrix either. Let `κ_j = n C_j / tr S`, which is 1 on average, and
`a_i = √(w_i / n)`, the root mean square of row i. With Adam's epsilon beside a_i,

.. math::
  D_{ij} = \frac{m_i^T Q_j}{(a_i + \epsilon) \sqrt{\kappa_j}}, \qquad
  D Q = \mathrm{diag}\Big(\frac{1}{a_i + \epsilon}\Big) \, m
    \sum_j \frac{Q_j Q_j^T}{\sqrt{\kappa_j}}

in which the sum is one (r, r) matrix. That of `Q_j Q_jᵀ / κ_j` gives the norm of each row of D,
and Adam's bound on an element, times √n, bounds it.

Shazeer, Stern, Adafactor, ICML 2018 (arXiv 1804.04235).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from loft_jax.optim.pairs import FactorBatch, Number
from loft_jax.optim.rounding import stochastic_round
from loft_jax.optim.second_moment import AdamStep, ProjectedGradient, SecondMomentState
from loft_jax.optim.tall import Tall, matmul, transpose


class FactoredMoment:
    """A weight a row and one (r, r) matrix a factor: no dense work, hardly any state."""

    has_gram = True

    def width(self, rank: int) -> int:
        """The weight of the row."""
        return 1

    def update(
        self,
        factors: FactorBatch,
        state: SecondMomentState,
        gradient: ProjectedGradient,
        b2: Number,
        key: jax.Array,
    ) -> SecondMomentState:
        """`S ← β₂ Cᵀ S C + (1 - β₂) Σ c_i c_iᵀ`, and w with it."""
        c, change = gradient.c, gradient.change
        old = _gram(factors, state.gram)  # (batch, stack, r, r)
        moved = matmul(matmul(transpose(change), old), change)
        kept = jnp.where(_trace(old) > 0, _trace(moved) / _positive(_trace(old)), 0.0)
        weights = factors.fold(state.rows).array.astype(c.array.dtype)  # (batch, stack, m, 1)
        squares = jnp.sum(jnp.square(c.array), axis=c.rank_axis, keepdims=True)
        weights = (b2 * kept * weights + (1 - b2) * squares).astype(c.array.dtype)
        weights = stochastic_round(weights, state.rows[0].dtype, key)
        gram = (b2 * moved + (1 - b2) * c.inner(c)).astype(moved.dtype)
        return SecondMomentState(
            factors.unfold(c.like(weights)),
            [gram[i].reshape(leaf.shape) for i, leaf in enumerate(state.gram)],
        )

    def direction(self, factors: FactorBatch, state: SecondMomentState, step: AdamStep) -> Tall:
        """Adam's direction with `p_i = w_i S / tr S`, projected."""
        mu, q = step.mu, step.basis.q
        n = q.length
        gram = _gram(factors, state.gram)
        forms = jnp.sum(q.times(gram).array * q.array, axis=q.rank_axis, keepdims=True)
        column = n * forms / _positive(_trace(gram))
        # Of a quadratic form that should vanish, rounding leaves about this much.
        length = jnp.sum(jnp.square(q.array), axis=q.rank_axis, keepdims=True)
        column = jnp.maximum(column, 8 * n * float(jnp.finfo(column.dtype).eps) * length)
        column = jnp.where(column > 0, column, 1.0)  # of a column without gradient, Q_j = 0
        smoothing = q.inner(q.like(q.array / jnp.sqrt(column)))  # (batch, stack, r, r)
        squares = q.inner(q.like(q.array / column))

        weights = factors.fold(state.rows).array.astype(column.dtype) / step.correction
        root = jnp.sqrt(weights / n) + step.eps  # one a row
        scaled = mu.like(mu.array / jnp.where(root > 0, root, 1.0))
        products = scaled.times(squares).array * scaled.array
        norm = jnp.sqrt(jnp.sum(products, axis=mu.rank_axis, keepdims=True))
        most = step.limit * math.sqrt(n)
        bounded = scaled.array * jnp.where(norm > most, most / _positive(norm), 1.0)
        return step.basis.from_coordinates(mu.like(bounded).times(smoothing))


def _gram(factors: FactorBatch, leaves: Sequence[jax.Array]) -> jax.Array:
    r = leaves[0].shape[-1]
    return jnp.stack([leaf.reshape(-1, r, r) for leaf in leaves])


def _trace(x: jax.Array) -> jax.Array:
    return jnp.trace(x, axis1=2, axis2=3)[:, :, None, None]


def _positive(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1.0)
