"""What keeps an update that is not jitted from compiling a program at every step."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax

from loft_jax.optim.arguments import Number

T = TypeVar("T")


@functools.partial(jax.jit, inline=True)
def power(base: Number, count: jax.Array) -> jax.Array:
    """Gives `base^count`: of a count that is known, JAX would compile a program for each value."""
    return base**count


def choose(which: jax.Array, one: Callable[[], T], other: Callable[[], T]) -> T:
    """Calls one function or the other, as `jax.lax.cond`, which compiles its branches.

    Args:
      which: (), whether the first; where it is known, only that function is called.
      one: Takes what it needs from where it was made.
      other: Gives the same types.

    Returns:
      What the function gives.
    """
    if isinstance(which, jax.core.Tracer):
        chosen: T = jax.lax.cond(which, one, other)
        return chosen
    return one() if which else other()
