"""What every link does first: leaves beside their pairs, and checks of the arguments."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from loft_jax.optim.pairs import (
    FactorBatch,
    FactorNames,
    Number,
    PairBatch,
    Scaling,
    batch_pairs,
    find_pairs,
)
from loft_jax.optim.subspace import Basis, orthonormal_basis
from loft_jax.optim.tall import Tall

Role = Literal["a", "b"]
Move = Literal["tangent", "alternate"]
Bases = Mapping[tuple[str, ...], tuple[Basis, Basis]]
"""Of what the factors B, and the factors A, of a batch span, by the batch's key."""


class FactorTree:
    """The leaves of an update tree, with the pairs of its parameters.

    Attributes:
      leaves: The updates, to be replaced in place.
      batches: Factor pairs by position in `leaves`.
      plain: Positions of the leaves that belong to no pair.
    """

    def __init__(
        self,
        updates: Any,
        params: Any,
        factors: FactorNames | None,
        bases: Bases | None = None,
        is_leaf: Callable[[Any], bool] | None = None,
    ) -> None:
        if params is None:
            raise ValueError(
                "the parameters are missing: call `update(updates, state, params)`, not "
                "`update(updates, state)`"
            )
        self._bases = bases or {}
        self.leaves, self._treedef = jax.tree.flatten(updates, is_leaf=is_leaf)
        self._params = jax.tree.leaves(params)
        if len(self.leaves) != len(self._params):
            raise ValueError(
                f"updates have {len(self.leaves)} leaves and the parameters {len(self._params)}: "
                "expected trees of one structure"
            )
        pairs = find_pairs(params, factors)
        self.batches = batch_pairs(pairs, self._params)
        self.paired = sorted(factor.index for pair in pairs for factor in (pair.a, pair.b))
        self.plain = sorted(set(range(len(self.leaves))) - set(self.paired))

    def folded(self, factors: FactorBatch) -> Tall:
        """The updates of some factors (batch, stack, m, r) in the dtype of the computation."""
        return _fold(factors, [self.leaves[index] for index in factors.indices])

    def param(self, factors: FactorBatch) -> Tall:
        """The factors themselves (batch, stack, m, r) in the dtype of the computation."""
        return _fold(factors, [self._params[index] for index in factors.indices])

    def reached(self, factors: FactorBatch) -> Tall:
        """The factors that the updates lead to."""
        now = self.param(factors)
        return now.like(now.array + self.folded(factors).array)

    def basis(self, batch: PairBatch, partners: FactorBatch, scaling: Scaling) -> Basis:
        """Bases of what partners span: q (batch, stack, n, r) of `P = s Bᵀ` or `P = s A`."""
        if found := self._bases.get(batch.key):
            return found[partners.rank_last]
        folded = self.param(partners)
        return orthonormal_basis(folded.like(folded.array * self.scalings(batch, scaling)))

    def scalings(self, batch: PairBatch, scaling: Scaling) -> jax.Array:
        """The s of each pair of a batch, (batch, 1, 1, 1)."""
        scalings = [pair.scaling(scaling) for pair in batch.pairs]
        for pair, s in zip(batch.pairs, scalings, strict=True):
            check_scaling(s, f"scaling of {pair.path!r}")
        dtype = compute_dtype(self._params[batch.pairs[0].a.index])
        return jnp.stack([jnp.asarray(s, dtype) for s in scalings])[:, None, None, None]

    def put(self, factors: FactorBatch, x: Tall) -> None:
        """Replaces the updates of some factors by x (batch, stack, m, r)."""
        for index, leaf in zip(factors.indices, factors.unfold(x), strict=True):
            self.leaves[index] = leaf

    def finish(self, index: int, update: jax.Array) -> None:
        """Replaces a leaf by its update, in its parameter's dtype, as Optax's wrappers expect."""
        self.leaves[index] = update.astype(self._params[index].dtype)

    def rebuilt(self) -> Any:
        """The tree of the leaves as they are now."""
        return jax.tree.unflatten(self._treedef, self.leaves)


def _fold(factors: FactorBatch, leaves: Sequence[jax.Array]) -> Tall:
    return factors.fold([x.astype(compute_dtype(x)) for x in leaves])


def compute_dtype(leaf: jax.Array) -> Any:
    """float32 at least: a basis in fewer bits is none."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def absolute_square(x: jax.Array) -> jax.Array:
    """|x|², real for complex numbers too."""
    return jnp.real(x * jnp.conj(x))


def has_turn(factors: FactorBatch, count: jax.Array, first: Role) -> jax.Array:
    """Whether it is the turn of these factors at the step after `count` updates."""
    return (count % 2 == 0) == ((first == "a") == factors.rank_last)


def keeps_overlap(
    batch: PairBatch, factors: FactorBatch, count: jax.Array, first: Role
) -> jax.Array | bool:
    """Whether factors of a batch keep the overlap at the step after `count` updates.

    The two take turns, unless the columns of one can span their whole side (r = in or r = out):
    its partner then moves W without any projection, and always keeps the overlap. Where both can,
    that is `first`: with "b", A spans its side from the start, though B is zero.
    """
    a_spans, b_spans = (batch.rank == math.prod(x.factors[0].features) for x in (batch.a, batch.b))
    if a_spans and b_spans:
        return factors.rank_last == (first == "a")
    if a_spans or b_spans:
        return factors.rank_last == b_spans
    return has_turn(factors, count, first)


def check_scaling(scaling: Scaling, name: str = "scaling") -> None:
    """Refuses a scaling of zero, which would erase the adapter."""
    if not callable(scaling):
        check(scaling, name, lambda x: x != 0 and math.isfinite(x), "a finite number, not 0")


def check_role(first: str) -> None:
    """Refuses a factor that is neither A nor B."""
    if first not in get_args(Role):
        raise ValueError(f"first is {first!r}, expected 'a' or 'b'")


def check_move(move: str) -> None:
    """Refuses a way of moving that does not exist."""
    if move not in get_args(Move):
        raise ValueError(f"move is {move!r}, expected one of {get_args(Move)}")


def check_adam(b1: Number, b2: Number, eps: Number, weight_decay: Number) -> None:
    """Refuses what is out of the range of AdamW's arguments."""
    for name, beta in (("b1", b1), ("b2", b2)):
        check(beta, name, lambda x: 0 <= x < 1, "a number in [0, 1)")
    for name, size in (("eps", eps), ("weight_decay", weight_decay)):
        check(size, name, lambda x: x >= 0, "a number >= 0")


def check_steps(count: Number, name: str, least: int) -> None:
    """Refuses what is no number of steps, or too small a one."""
    check(
        count,
        name,
        lambda x: x >= least and x == math.floor(x),
        f"a whole number of steps >= {least}",
    )


def check(value: Number, name: str, holds: Callable[[float], bool], expected: str) -> None:
    """Refuses a number that is known (not traced) and breaks a condition."""
    if not isinstance(value, jax.core.Tracer) and not holds(float(value)):
        raise ValueError(f"{name} is {float(value)!r}, expected {expected}")
