"""How well the factors of each pair are conditioned: what rounding does to them is told by it."""

import jax
import optax

from loft_jax.optim.pairs import FactorNames, find_pairs
from loft_jax.optim.tall import Tall
from loft_jax.optim.tree import compute_dtype


def factor_grams(
    params: optax.Params, *, factors: FactorNames | None = None
) -> dict[str, jax.Array]:
    """The Gram matrix of each factor: `AᵀA` of a factor A, `B Bᵀ` of a factor B.

    Their condition numbers are the squares of the factors'.

    Args:
      params: With pairs, as for `loft`.
      factors: Names of the factors; see `find_pairs`.

    Returns:
      Arrays (stack, r, r), of float32 at least, by path of the factor.

    Raises:
      ValueError: As `find_pairs`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.zeros((1, 3))}
      >>> {path: gram.tolist() for path, gram in factor_grams(params).items()}
      {'lora_a': [[[4.0]]], 'lora_b': [[[0.0]]]}
    """
    leaves = jax.tree.leaves(params)
    grams = {}
    for pair in find_pairs(params, factors):
        for factor in (pair.a, pair.b):
            leaf = leaves[factor.index]
            folded = factor.fold(leaf.astype(compute_dtype(leaf)))
            tall = Tall(folded[None], factor.rank_last)
            grams[factor.path] = tall.inner(tall)[0]
    return grams
