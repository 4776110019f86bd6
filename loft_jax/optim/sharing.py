"""The bases of an update, computed once for all links of a chain."""

from typing import Any

import optax

from loft_jax.optim.pairs import FactorNames, Scaling
from loft_jax.optim.tree import FactorTree


def share_bases(
    inner: optax.GradientTransformation,
    *,
    scaling: Scaling = 1.0,
    factors: FactorNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives the links of a chain the bases that each of them would compute for itself.

    The links take them as an extra argument of their update, `bases`. The result is the same
    without, but for time.

    Args:
      inner: A chain of this package's links, and of others.
      scaling: As the links have it.
      factors: As the links have it.

    Returns:
      The same transformation, with the same state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from loft_jax import calibrate_moments, project_gradients, project_updates, share_bases
      >>> chain = optax.chain(project_gradients(), calibrate_moments(), project_updates())
      >>> params = {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 4))}
      >>> tx = share_bases(chain)
      >>> once, _ = tx.update(params, tx.init(params), params)
      >>> each, _ = chain.update(params, chain.init(params), params)
      >>> bool(jnp.array_equal(once["lora_b"], each["lora_b"]))
      True
    """
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        tree = FactorTree(updates, params, factors)
        bases = {
            batch.key: (
                tree.basis(batch, batch.b, scaling),
                tree.basis(batch, batch.a, scaling),
            )
            for batch in tree.batches
        }
        # Around a chain that has shared bases of its own, each level shares those of its scaling.
        return inner.update(updates, state, params, **(extra | {"bases": bases}))

    return optax.GradientTransformationExtraArgs(inner.init, update)
