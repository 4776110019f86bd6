"""Small matrices of several sizes in one call of a function of matrices.

Behind the functions of `jnp.linalg` stand LAPACK's batched routines on CPUs. Two of them at one
time can wait for each other's threads for good, so that a program has to make one call for all.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def together(
    function: Callable[..., tuple[jax.Array, ...]],
    batches: Sequence[tuple[jax.Array, ...]],
    diagonal: float = 0.0,
) -> list[tuple[jax.Array, ...]]:
    """Applies a function of matrices to batches of several sizes, by one call for all.

    Smaller matrices become a block of the largest size. The function must keep such a block apart
    from what is added to it: a number times the identity.

    Args:
      function: Takes arrays (count, r, r) and gives a tuple of such.
      batches: What it takes, for each batch: arrays (batch, stack, r, r) of one r.
      diagonal: The number.

    Returns:
      What it gives for each batch, (batch, stack, r, r), in the dtype of the batch.

    Example:
      >>> import jax.numpy as jnp
      >>> batches = [(jnp.full((1, 1, 1, 1), 2.0),), (4 * jnp.ones((3, 1, 1, 1)) * jnp.eye(2),)]
      >>> [[x], [y]] = together(lambda m: (jnp.linalg.inv(m),), batches, diagonal=1.0)
      >>> x.tolist(), y.shape, y[0, 0].tolist()
      ([[[[0.5]]]], (3, 1, 2, 2), [[0.25, 0.0], [0.0, 0.25]])
    """
    if not batches:
        return []
    most = max(x.shape[-1] for x, *_ in batches)
    dtype = jnp.result_type(*(x for batch in batches for x in batch))

    def padded(x: jax.Array) -> jax.Array:
        r = x.shape[-1]
        x = jnp.pad(x.reshape(-1, r, r).astype(dtype), ((0, 0), (0, most - r), (0, most - r)))
        added = jnp.arange(r, most)
        return x.at[:, added, added].set(diagonal) if diagonal and r < most else x

    given = [jnp.concatenate([padded(x) for x in role]) for role in zip(*batches, strict=True)]
    results = function(*given)
    found, start = [], 0
    for x, *_ in batches:
        *batch, r, _ = x.shape
        part = slice(start, start := start + math.prod(batch))
        found.append(tuple(y[part, :r, :r].reshape(x.shape).astype(x.dtype) for y in results))
    return found
