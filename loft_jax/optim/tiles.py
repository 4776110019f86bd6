"""Parts of what a state keeps for long factors, a tile at a time.

Of m rows in k tiles, tile t is rows t, t + k, t + 2k, ..., and so it is with the layers of a stack:
rows or layers that are sharded over devices are in every tile alike, so that taking a tile moves
nothing between devices.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from loft_jax.optim.pairs import FactorBatch
from loft_jax.optim.tall import Tall

T = TypeVar("T")


def for_each(count: int, body: Callable[[jax.Array | int, T], T], init: T) -> T:
    """Calls body(t, carry) for t = 0, 1, ..., one after the other."""
    return body(0, init) if count == 1 else jax.lax.fori_loop(0, count, body, init)


def part_count(size: int, most: float) -> int:
    """Into how many equal parts of at most so many to divide; of more if they could only be tiny.

    Of parts that are not much smaller than they may be, those are taken that the largest power of
    two divides, and so as many devices as can be.
    """
    if size <= most:
        return 1
    counts = [k for k in range(1, size + 1) if size % k == 0]
    fitting = [k for k in counts if most / 4 <= size // k <= most]
    larger = max(k for k in counts if size // k > most)
    return max(fitting, key=lambda k: (size // k & -(size // k), -k), default=larger)


class Tiling(NamedTuple):
    """How an array (..., stack, rows, k), or (..., stack, k, rows), falls into tiles.

    Attributes:
      layers: Parts of the stack.
      rows: Parts of the rows.
      rank_last: Whether the rows stand before k.
    """

    layers: int
    rows: int
    rank_last: bool

    @property
    def total(self) -> int:
        """Number of tiles."""
        return self.layers * self.rows

    def split(self, x: jax.Array) -> jax.Array:
        """(..., stack, layers, rows, parts, k) or (..., stack, layers, k, rows, parts)."""
        *front, stack, a, b = x.shape
        if self.rank_last:
            return x.reshape(*front, stack // self.layers, self.layers, -1, self.rows, b)
        return x.reshape(*front, stack // self.layers, self.layers, a, -1, self.rows)

    def join(self, split: jax.Array) -> jax.Array:
        """Undoes `split`."""
        *front, stack, layers, a, b, c = split.shape
        last = (a * b, c) if self.rank_last else (a, b * c)
        return split.reshape(*front, stack * layers, *last)

    def take(self, split: jax.Array, t: jax.Array | int) -> jax.Array:
        """Tile t of what `split` gives, (..., stack, rows, k) or (..., stack, k, rows)."""
        x = jax.lax.dynamic_index_in_dim(split, t // self.rows, split.ndim - 4, keepdims=False)
        axis = x.ndim - (2 if self.rank_last else 1)
        return jax.lax.dynamic_index_in_dim(x, t % self.rows, axis, keepdims=False)

    def put(self, split: jax.Array, t: jax.Array | int, tile: jax.Array) -> jax.Array:
        """What `split` gives, with another tile t."""
        layer, part = split.ndim - 4, split.ndim - (2 if self.rank_last else 1)
        start: list[jax.Array | int] = [0] * split.ndim
        start[layer], start[part] = t // self.rows, t % self.rows
        return jax.lax.dynamic_update_slice(split, jnp.expand_dims(tile, (layer, part)), start)


class LeafTiles(NamedTuple):
    """The same for the leaves of some factors, which are never brought together as a whole."""

    factors: FactorBatch
    tiling: Tiling

    def split(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """The leaves, split each for itself."""
        pairs = zip(self.factors.factors, leaves, strict=True)
        return [self.tiling.split(factor.fold(leaf)) for factor, leaf in pairs]

    def take(self, split: Sequence[jax.Array], t: jax.Array | int) -> Tall:
        """Tile t of all leaves, (batch, stack, rows, k)."""
        return Tall(jnp.stack([self.tiling.take(x, t) for x in split]), self.tiling.rank_last)

    def put(self, split: Sequence[jax.Array], t: jax.Array | int, x: Tall) -> list[jax.Array]:
        """The leaves with another tile t."""
        tiles = zip(split, x.array, strict=True)
        return [self.tiling.put(leaf, t, tile) for leaf, tile in tiles]

    def join(self, split: Sequence[jax.Array]) -> list[jax.Array]:
        """Undoes `split`."""
        pairs = zip(self.factors.factors, split, strict=True)
        return [factor.unfold(self.tiling.join(x)) for factor, x in pairs]
