"""What every link does first: leaves beside their pairs, and checks of the arguments."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from loft_jax.optim.pairs import Factor, FactorNames, Pair, Scaling, find_pairs
from loft_jax.optim.subspace import Basis, orthonormal_basis

Role = Literal["a", "b"]
Number = float | jax.Array


class FactorTree:
    """The leaves of an update tree, with the pairs of its parameters.

    Attributes:
      leaves: The updates, to be replaced in place.
      pairs: Factor pairs by position in `leaves`.
      plain: Positions of the leaves that belong to no pair.
    """

    def __init__(
        self,
        updates: Any,
        params: Any,
        factors: FactorNames | None,
        is_leaf: Callable[[Any], bool] | None = None,
    ) -> None:
        if params is None:
            raise ValueError(
                "LoFT needs the parameters: call `update(updates, state, params)`, not "
                "`update(updates, state)`"
            )
        self.leaves, self._treedef = jax.tree.flatten(updates, is_leaf=is_leaf)
        self.pairs = find_pairs(params, factors)
        self._params = jax.tree.leaves(params)
        if len(self.leaves) != len(self._params):
            raise ValueError(
                f"updates have {len(self.leaves)} leaves and the parameters {len(self._params)}: "
                "expected trees of one structure"
            )
        paired = {factor.index for pair in self.pairs for factor in (pair.a, pair.b)}
        self.plain = [index for index in range(len(self.leaves)) if index not in paired]

    def folded(self, factor: Factor) -> jax.Array:
        """The update of a factor, (stack, m, r), in the dtype of the computation."""
        leaf = self.leaves[factor.index]
        return factor.fold(leaf.astype(compute_dtype(leaf)))

    def basis(self, pair: Pair, partner: Factor, scaling: Scaling) -> Basis:
        """The basis of what a partner spans: q (stack, n, r) of `P = s Bᵀ` or `P = s A`."""
        param = self._params[partner.index]
        folded = partner.fold(param.astype(compute_dtype(param)))
        s = pair.scaling(scaling)
        check_scaling(s, f"scaling of {pair.path!r}")
        return orthonormal_basis((folded * s).astype(folded.dtype))

    def finish(self, index: int, update: jax.Array) -> None:
        """Replaces a leaf by its update, in its parameter's dtype, as Optax's wrappers expect."""
        self.leaves[index] = update.astype(self._params[index].dtype)

    def rebuilt(self) -> Any:
        """The tree of the leaves as they are now."""
        return jax.tree.unflatten(self._treedef, self.leaves)


def compute_dtype(leaf: jax.Array) -> Any:
    """float32 at least: a basis in fewer bits is none."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def moves(factor: Factor, count: jax.Array, first: Role) -> jax.Array:
    """Whether a factor moves at the step after `count` updates."""
    return (count % 2 == 0) == ((first == "a") == factor.rank_last)


def check_scaling(scaling: Scaling, name: str = "scaling") -> None:
    """Refuses a scaling of zero, which would erase the adapter."""
    if not callable(scaling):
        check(scaling, name, lambda x: x != 0 and math.isfinite(x), "a finite number, not 0")


def check_role(first: str) -> None:
    """Refuses a factor that is neither A nor B."""
    if first not in get_args(Role):
        raise ValueError(f"first is {first!r}, expected 'a' or 'b'")


def check(value: Number, name: str, holds: Callable[[float], bool], expected: str) -> None:
    """Refuses a number that is known (not traced) and breaks a condition."""
    if not isinstance(value, jax.core.Tracer) and not holds(float(value)):
        raise ValueError(f"{name} is {float(value)!r}, expected {expected}")
