"""What Optax types widely, typed as it is used here."""

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import jax
import optax

S = TypeVar("S", bound=optax.OptState)


class Update(Protocol[S]):
    """The update of a transformation whose state is an S."""

    def __call__(
        self, updates: optax.Updates, state: S, params: optax.Params | None = None
    ) -> tuple[optax.Updates, S]:
        """Returns the new updates and the new state."""
        ...


def transformation(
    init: Callable[[optax.Params], S], update: Update[S]
) -> optax.GradientTransformation:
    """Joins an `init` and an `update` with the same type of state.

    `optax.GradientTransformation` wants an update that takes every state, so that a type checker
    refuses one that knows its own.

    Args:
      init: Makes the state from the parameters.
      update: Makes new updates and a new state from those of a step.

    Returns:
      Both as one transformation.

    Example:
      >>> tx = transformation(lambda params: optax.EmptyState(), lambda updates, state, params=None:
      ...                     (updates, state))
      >>> tx.update(1.0, tx.init(2.0))
      (1.0, EmptyState())
    """
    return optax.GradientTransformation(
        cast(optax.TransformInitFn, init), cast(optax.TransformUpdateFn, update)
    )


def next_count(count: jax.Array) -> jax.Array:
    """`optax.safe_increment` of an array, which is an array.

    Example:
      >>> import jax.numpy as jnp
      >>> next_count(jnp.array(2)).item()
      3
    """
    return cast(jax.Array, optax.safe_increment(count))
