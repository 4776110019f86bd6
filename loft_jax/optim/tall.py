"""Tall matrices in the layout of their factor, so that none is ever transposed in memory.

The mathematics sees both factors alike, as tall matrices: A as (m, r), B as its transpose (n, r).
A stays (m, r) in memory and B stays (r, n), which costs nothing and keeps the long axis where a
mesh may have split it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

# TPUs and newer GPUs multiply float32 in fewer bits by default; a basis needs all of them.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def transpose(x: jax.Array) -> jax.Array:
    """Swaps the last two axes."""
    return jnp.swapaxes(x, -1, -2)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["rank_last"]
)
@dataclasses.dataclass(frozen=True)
class Tall:
    """A batch of tall matrices (n, k), by rows or by columns.

    Attributes:
      array: (..., n, k) if rank_last, else (..., k, n).
      rank_last: Which of the two.
    """

    array: jax.Array
    rank_last: bool = True

    @property
    def rank_axis(self) -> int:
        """Position of k among the axes of the array."""
        return -1 if self.rank_last else -2

    @property
    def long_axis(self) -> int:
        """Position of n."""
        return -2 if self.rank_last else -1

    @property
    def rank(self) -> int:
        """The k."""
        return self.array.shape[self.rank_axis]

    @property
    def length(self) -> int:
        """The n."""
        return self.array.shape[self.long_axis]

    def like(self, array: jax.Array) -> "Tall":
        """Another one in this layout."""
        return Tall(array, self.rank_last)

    def times(self, t: jax.Array) -> "Tall":
        """The product with t (..., k, l) from the right."""
        if self.rank_last:
            return self.like(matmul(self.array, t))
        return self.like(matmul(transpose(t), self.array))

    def inner(self, other: "Tall") -> jax.Array:
        """The (..., k, l) inner products of the columns with those of another, of this layout."""
        if self.rank_last:
            return matmul(transpose(self.array), other.array)
        return matmul(self.array, transpose(other.array))

    def scaled(self, columns: jax.Array) -> "Tall":
        """Each column multiplied by its number, (..., k)."""
        return self.like(self.array * jnp.expand_dims(columns, self.long_axis))

    def tall(self) -> jax.Array:
        """(..., n, k)."""
        return self.array if self.rank_last else transpose(self.array)

    def wide(self) -> jax.Array:
        """(..., k, n)."""
        return transpose(self.array) if self.rank_last else self.array
