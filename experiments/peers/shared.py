"""What several of these methods need: pairs apart from other leaves, and small matrices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from loft_jax.optim.pairs import FactorGroup, FactorNames, FactorSpec, paired_leaves


def apart(
    pairs: optax.GradientTransformation,
    others: optax.GradientTransformation,
    factors: FactorNames | None,
) -> optax.GradientTransformationExtraArgs:
    """One transformation for the factor pairs, and another for all other leaves.

    Args:
        pairs: Sees a tree of pairs alone.
        others: Sees the rest.
        factors: Names of the factors; see `find_pairs`.

    Returns:
        The partition.
    """

    def labels(params: optax.Params) -> Any:
        return jax.tree.map(
            lambda paired: "pairs" if paired else "others",
            paired_leaves(params, FactorSpec(factors)),
        )

    return optax.partition({"pairs": pairs, "others": others}, labels)


def small_matrices(leaves: Sequence[jax.Array], factors: FactorGroup) -> jax.Array:
    """Leaves (*stack, r, r) of a batch of factors as one array (batch, stack, r, r)."""
    return jnp.stack([leaves[i].reshape(-1, *leaves[i].shape[-2:]) for i in factors.indices])


def finite(x: jax.Array) -> jax.Array:
    """Zeros in the place of matrices with a NaN: it shows elsewhere, and must not spoil others."""
    return jnp.where(jnp.all(jnp.isfinite(x), axis=(-2, -1), keepdims=True), x, 0)
