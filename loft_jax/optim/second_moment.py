"""What a rule for the second moment keeps, is given, and gives."""

from typing import NamedTuple, Protocol

import jax

from loft_jax.optim.pairs import FactorBatch, Number
from loft_jax.optim.subspace import Basis
from loft_jax.optim.tall import Tall


class SecondMomentState(NamedTuple):
    """What is kept for the factors of a batch, a leaf each.

    Attributes:
      rows: Numbers for each row: the layout of the factor, with the rule's width as its rank.
      gram: (*stack, r, r), a matrix shared by all rows; empty for rules that have none.
    """

    rows: list[jax.Array]
    gram: list[jax.Array]


class ProjectedGradient(NamedTuple):
    """The projected gradient `X Pᵀ = c Qᵀ` of a batch of factors.

    Attributes:
      x: (batch, stack, m, r), in the coordinates of the factor.
      c: (batch, stack, m, r), in the orthonormal basis Q of its partner P.
      change: (batch, stack, r, r), the change C to this basis from that of the last step.
    """

    x: Tall
    c: Tall
    change: jax.Array


class AdamStep(NamedTuple):
    """All that Adam's direction is made of, but for the second moment.

    Attributes:
      mu: (batch, stack, m, r), first moments in coordinates of the basis, bias-corrected.
      basis: Of the partner.
      correction: The bias correction of the second moment.
      eps: Adam's epsilon.
      limit: Adam's bound on an element of its direction.
    """

    mu: Tall
    basis: Basis
    correction: Number
    eps: Number
    limit: Number


class SecondMomentRule(Protocol):
    """A second moment of the projected full gradient."""

    has_gram: bool

    def width(self, rank: int) -> int:
        """Numbers kept for each row of a factor."""

    def update(
        self,
        factors: FactorBatch,
        state: SecondMomentState,
        gradient: ProjectedGradient,
        b2: Number,
        key: jax.Array,
    ) -> SecondMomentState:
        """The state after one more gradient; the key is for rounding to a state in bfloat16."""

    def direction(self, factors: FactorBatch, state: SecondMomentState, step: AdamStep) -> Tall:
        """The X (batch, stack, m, r) with `X Pᵀ = D proj(P)`, D being Adam's direction."""
