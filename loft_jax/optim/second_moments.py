r"""Second moments of the projected full gradient: what a rule is, and the two that keep little.

Row i of the projected gradient is `c_i Qᵀ`, in an orthonormal basis Q of what the partner spans,
which changes at each step by `C = Q_oldᵀ Q`. A rule keeps something of `Σ c_i c_iᵀ` for each row,
follows the change of basis, and makes Adam's direction of it. The exact rule is in
`loft_jax.optim.full_moment`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from loft_jax.optim.arguments import Number
from loft_jax.optim.linear_algebra import Basis, FactorMatrix, matmul, transpose
from loft_jax.optim.pairs import FactorGroup
from loft_jax.optim.stacking import unstack


class SecondMomentState(NamedTuple):
    """What a rule keeps for a group of factors, one leaf each.

    Attributes:
      rows: Numbers for each row: laid out as the factor, with the rule's width in the place of r.
      gram: (*stack, r, r), a matrix shared by all rows; empty for rules that have none.
    """

    rows: list[jax.Array]
    gram: list[jax.Array]


class ProjectedGradient(NamedTuple):
    """The projected gradient `X Pᵀ = c Qᵀ` of a group of factors.

    Attributes:
      x: (group, stack, m, r), in the coordinates of the factor.
      c: (group, stack, m, r), in the orthonormal basis Q of its partner P.
      change: (group, stack, r, r), the change C to this basis from that of the last step.
    """

    x: FactorMatrix
    c: FactorMatrix
    change: jax.Array


class AdamStep(NamedTuple):
    """Everything that Adam's direction is made of, except the second moment.

    Attributes:
      mu: (group, stack, m, r), first moments in coordinates of the basis, bias-corrected.
      basis: Of the partner.
      correction: The bias correction of the second moment.
      eps: Adam's epsilon.
      limit: Adam's bound on an element of its direction.
    """

    mu: FactorMatrix
    basis: Basis
    correction: Number
    eps: Number
    limit: Number


class SecondMomentRule(Protocol):
    """A second moment of the projected full gradient."""

    has_gram: bool

    def width(self, rank: int) -> int:
        """Numbers kept for each row of a factor, 1 or more: checkpoints hold no empty arrays."""

    def update(
        self,
        factor: FactorGroup,
        state: SecondMomentState,
        gradient: ProjectedGradient,
        b2: Number,
        key: jax.Array,
    ) -> SecondMomentState:
        """Adds a gradient to the state; the key is for rounding to a state in bfloat16."""

    def direction(
        self, factor: FactorGroup, state: SecondMomentState, step: AdamStep
    ) -> FactorMatrix:
        """The X (group, stack, m, r) with `X Pᵀ = D proj(P)`, D being Adam's direction."""


def stochastic_round(x: jax.Array, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16 up or down, with probabilities that make the mean exact.

    A slow average such as `β₂ p + (1 - β₂) g²` changes by less than half a unit of bfloat16 a
    step: rounded to the nearest, it would never change.

    Args:
      x: float32 or float64, to become bfloat16; to another dtype it is rounded to the nearest.
      dtype: The dtype to round to.
      key: Random key.

    Returns:
      x in that dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.full(10_000, 1.001)  # its neighbours in bfloat16 are 1 and 1.0078
      >>> rounded = stochastic_round(x, jnp.bfloat16, jax.random.key(0))
      >>> round(float(rounded.astype(float).mean()), 4)
      1.001
    """
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    x = x.astype(jnp.float32)
    # A bfloat16 is the upper half of a float32. What is added to the lower half carries over.
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # NaN and infinity have all bits of the exponent set, and must not be carried over.
    rounded = jnp.where(jnp.isfinite(x), bits + noise, bits) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(rounded, jnp.float32).astype(dtype)


class DiagonalMoment:
    r"""Adam's second moment of the factor's own gradient: the simple form of LoFT's authors.

    The projected gradient of A is `g̃ = G P (PᵀP)⁻¹`, of A's shape. This rule keeps the moving
    average of its squares, and divides the calibrated first moment by its root:

    .. math::
      v \leftarrow \beta_2 v + (1 - \beta_2) \tilde g^2, \qquad
      \Delta A = \frac{m}{\sqrt v + \epsilon}

    v is not calibrated: squares of elements cannot follow a change of basis. So neither v nor the
    step is that of the full weight: the step depends on how W is factorized and on s (an alpha to
    tune again), and at full rank it is not AdamW.

    References:
      Tastan et al., LoFT, ICLR 2026 (arXiv 2505.21289), the simple variant.
    """

    has_gram = False

    def width(self, rank: int) -> int:
        """One number for each element of the row."""
        return rank

    def update(
        self,
        factor: FactorGroup,
        state: SecondMomentState,
        gradient: ProjectedGradient,
        b2: Number,
        key: jax.Array,
    ) -> SecondMomentState:
        """`v ← β₂ v + (1 - β₂) g̃²`."""
        x = gradient.x.array
        rows = b2 * factor.fold(state.rows).array.astype(x.dtype) + (1 - b2) * x * x
        rows = stochastic_round(rows.astype(x.dtype), state.rows[0].dtype, key)
        return state._replace(rows=factor.unfold(gradient.x.like(rows)))

    def direction(
        self, factor: FactorGroup, state: SecondMomentState, step: AdamStep
    ) -> FactorMatrix:
        """`m / (√v + ε)` in the factor's coordinates, within Adam's bound."""
        x = step.basis.from_coordinates(step.mu)
        v = factor.fold(state.rows).array.astype(x.array.dtype) / step.correction
        root = jnp.sqrt(v) + step.eps
        return x.like(jnp.clip(x.array / jnp.where(root > 0, root, 1.0), -step.limit, step.limit))


class FactoredMoment:
    r"""Adafactor's second moment in the projected space: row weights and one (r, r) matrix.

    Adafactor keeps the sums of v over each row and over each column, and takes
    `v_ij = R_i C_j / Σ R` (the matrix of rank one with those sums). With `v_ij = Q_jᵀ p_i Q_j` and
    orthonormal Q these are

    .. math::
      R_i = \sum_j v_{ij} = \mathrm{tr}\, p_i =: w_i, \qquad
      C_j = \sum_i v_{ij} = Q_j^T S Q_j, \quad S = \sum_i p_i, \qquad \sum_i w_i = \mathrm{tr}\, S

    so that `p_i ≈ w_i S / tr S`, and all there is to keep is w (m) and S (r, r). Under a change of
    basis S becomes `Cᵀ S C`, and every w_i shrinks as the trace of its matrix does, by
    `tr(Cᵀ S C) / tr S`. Q only ever meets S and `m_i` in inner products, so nothing here depends on
    the basis, nor on how W is factorized.

    The direction needs no (m, n) matrix either. Let `κ_j = n C_j / tr S`, which is 1 on average,
    and `a_i = √(w_i / n)`, the root mean square of row i. With Adam's epsilon added to a_i,

    .. math::
      D_{ij} = \frac{m_i^T Q_j}{(a_i + \epsilon) \sqrt{\kappa_j}}, \qquad
      D Q = \mathrm{diag}\Big(\frac{1}{a_i + \epsilon}\Big) \, m
        \sum_j \frac{Q_j Q_j^T}{\sqrt{\kappa_j}}

    in which the sum is one (r, r) matrix. That of `Q_j Q_jᵀ / κ_j` gives the norm of each row of D,
    and Adam's bound on an element, times √n, bounds it.

    References:
      Shazeer, Stern, Adafactor, ICML 2018 (arXiv 1804.04235).
    """

    has_gram = True

    def width(self, rank: int) -> int:
        """The weight of the row."""
        return 1

    def update(
        self,
        factor: FactorGroup,
        state: SecondMomentState,
        gradient: ProjectedGradient,
        b2: Number,
        key: jax.Array,
    ) -> SecondMomentState:
        """`S ← β₂ Cᵀ S C + (1 - β₂) Σ c_i c_iᵀ`, and w with it."""
        c, change = gradient.c, gradient.change
        old = _gram(state.gram)  # (group, stack, r, r)
        moved = matmul(matmul(transpose(change), old), change)
        kept = jnp.where(_trace(old) > 0, _trace(moved) / _positive(_trace(old)), 0.0)
        weights = factor.fold(state.rows).array.astype(c.array.dtype)  # (group, stack, m, 1)
        squares = jnp.sum(jnp.square(c.array), axis=c.rank_axis, keepdims=True)
        weights = (b2 * kept * weights + (1 - b2) * squares).astype(c.array.dtype)
        weights = stochastic_round(weights, state.rows[0].dtype, key)
        gram = (b2 * moved + (1 - b2) * c.inner(c)).astype(state.gram[0].dtype)
        return SecondMomentState(
            factor.unfold(c.like(weights)),
            [x.reshape(leaf.shape) for x, leaf in zip(unstack(gram), state.gram, strict=True)],
        )

    def direction(
        self, factor: FactorGroup, state: SecondMomentState, step: AdamStep
    ) -> FactorMatrix:
        """Adam's direction with `p_i = w_i S / tr S`, projected."""
        mu, q = step.mu, step.basis.q
        n = q.length
        gram = _gram(state.gram)
        forms = jnp.sum(q.times(gram).array * q.array, axis=q.rank_axis, keepdims=True)
        column = n * forms / _positive(_trace(gram))
        # Of a quadratic form that should vanish, rounding leaves about this much.
        length = jnp.sum(jnp.square(q.array), axis=q.rank_axis, keepdims=True)
        column = jnp.maximum(column, 8 * n * float(jnp.finfo(column.dtype).eps) * length)
        column = jnp.where(column > 0, column, 1.0)  # of a column without gradient, Q_j = 0
        smoothing = q.inner(q.like(q.array / jnp.sqrt(column)))  # (group, stack, r, r)
        squares = q.inner(q.like(q.array / column))

        weights = factor.fold(state.rows).array.astype(column.dtype) / step.correction
        root = jnp.sqrt(weights / n) + step.eps  # one a row
        scaled = mu.like(mu.array / jnp.where(root > 0, root, 1.0))
        products = scaled.times(squares).array * scaled.array
        norm = jnp.sqrt(jnp.sum(products, axis=mu.rank_axis, keepdims=True))
        most = step.limit * math.sqrt(n)
        bounded = scaled.array * jnp.where(norm > most, most / _positive(norm), 1.0)
        return step.basis.from_coordinates(mu.like(bounded).times(smoothing))


def _gram(leaves: Sequence[jax.Array]) -> jax.Array:
    r = leaves[0].shape[-1]
    return jnp.stack([leaf.reshape(-1, r, r) for leaf in leaves])


def _trace(x: jax.Array) -> jax.Array:
    return jnp.trace(x, axis1=2, axis2=3)[:, :, None, None]


def _positive(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1.0)
