"""Stacks of the leaves of separate pairs, in programs that compile fast.

Separate pairs of one shape are computed as one array: each link of a chain stacks their leaves, and
takes its results apart again. `remember_stacks` spares a chain what links only do for each other.
"""

import contextlib
import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

# Of fewer arrays than this, the loop in `unstack` takes as long to compile as it saves.
_MANY = 8


def unstack(x: jax.Array) -> list[jax.Array]:
    """Gives the arrays along the first axis: undoes `jnp.stack`.

    XLA for CPUs compiles a kernel for each place that it is told to slice, about 25 ms each, which
    adds up for the separate pairs of a whole model. In a program for CPUs the places come out of a
    loop: it knows none of them, and one kernel serves all arrays of a shape.

    Args:
      x: (n, ...).

    Returns:
      n arrays (...).

    Example:
      >>> [part.tolist() for part in unstack(jnp.arange(6.0).reshape(3, 2))]
      [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    """
    return _unstacked(x) if len(x) >= _MANY else list(x)


@jax.jit
def _unstacked(x: jax.Array) -> list[jax.Array]:
    known = tuple(jnp.array(i) for i in range(len(x)))

    def counted() -> tuple[jax.Array, ...]:
        def body(step: jax.Array, _: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            return tuple(jnp.minimum(step, i) for i in known)

        places: tuple[jax.Array, ...] = jax.lax.fori_loop(0, len(x), body, (known[0],) * len(x))
        return places

    def at(place: jax.Array) -> jax.Array:
        start, size = [place, *[known[0]] * (x.ndim - 1)], (1, *x.shape[1:])
        part = jax.lax.dynamic_slice(x, start, size, allow_negative_indices=False)
        return part.reshape(x.shape[1:])

    places = jax.lax.platform_dependent(cpu=counted, default=lambda: known)
    return [at(place) for place in places]


@dataclasses.dataclass(frozen=True, eq=False)
class Identity:
    """An array as a key: equal to itself only, and alive as long as the key is."""

    array: jax.Array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.array is other.array

    def __hash__(self) -> int:
        return id(self.array)


_stacks: ContextVar[dict[tuple[Hashable, ...], Any] | None] = ContextVar("stacks", default=None)


@contextlib.contextmanager
def remember_stacks() -> Iterator[None]:
    """Remembers, for its block and thread, which leaves a stack was taken apart to.

    Not which leaves a stack was made of: a branch of a condition may stack what was traced outside,
    and its stack is nothing for the other branch.
    """
    token = _stacks.set({})
    try:
        yield
    finally:
        _stacks.reset(token)


def remember_stack(kind: Hashable, leaves: Sequence[jax.Array], stack: Any) -> None:
    """Notes what was taken apart to these very arrays, where `remember_stacks` is at work.

    Args:
      kind: How they are stacked.
      leaves: The arrays.
      stack: Their stack.
    """
    if (stacks := _stacks.get()) is not None:
        stacks[kind, *map(Identity, leaves)] = stack


def remembered_stack(kind: Hashable, leaves: Sequence[jax.Array]) -> Any | None:
    """The stack of these very arrays, if it is known."""
    return (_stacks.get() or {}).get((kind, *map(Identity, leaves)))
