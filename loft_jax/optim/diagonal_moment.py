r"""Adam's second moment of the factor's own gradient: the simple form of LoFT's authors.

The projected gradient of A is `g̃ = G P (PᵀP)⁺`, of A's shape, and this keeps the moving average of
its squares and divides the calibrated first moment by its root, element by element:

.. math::
  v \leftarrow \beta_2 v + (1 - \beta_2) \tilde g^2, \qquad \Delta A = \frac{m}{\sqrt v + \epsilon}

v is not calibrated: squares of elements cannot follow a change of basis. So neither v nor the step
is that of the full weight: the step depends on how W is factorized and on s (an alpha to tune
again), and at full rank it is not AdamW. It is diagonal in the factor's coordinates, no more.

Tastan et al., LoFT, ICLR 2026 (arXiv 2505.21289), the simple variant.
"""

import jax
import jax.numpy as jnp

from loft_jax.optim.pairs import FactorBatch, Number
from loft_jax.optim.rounding import stochastic_round
from loft_jax.optim.second_moment import AdamStep, ProjectedGradient, SecondMomentState
from loft_jax.optim.tall import Tall


class DiagonalMoment:
    """One number for each of the factor's: cheap, and not invariant."""

    has_gram = False

    def width(self, rank: int) -> int:
        """A number for each of the row."""
        return rank

    def update(
        self,
        factors: FactorBatch,
        state: SecondMomentState,
        gradient: ProjectedGradient,
        b2: Number,
        key: jax.Array,
    ) -> SecondMomentState:
        """`v ← β₂ v + (1 - β₂) g̃²`."""
        x = gradient.x.array
        rows = b2 * factors.fold(state.rows).array.astype(x.dtype) + (1 - b2) * x * x
        rows = stochastic_round(rows.astype(x.dtype), state.rows[0].dtype, key)
        return state._replace(rows=factors.unfold(gradient.x.like(rows)))

    def direction(self, factors: FactorBatch, state: SecondMomentState, step: AdamStep) -> Tall:
        """`m / (√v + ε)` in the factor's coordinates, within Adam's bound."""
        x = step.basis.from_coordinates(step.mu)
        v = factors.fold(state.rows).array.astype(x.array.dtype) / step.correction
        root = jnp.sqrt(v) + step.eps
        return x.like(jnp.clip(x.array / jnp.where(root > 0, root, 1.0), -step.limit, step.limit))
