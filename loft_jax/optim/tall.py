"""Tall matrices in the layout of their factor, so that none is ever transposed in memory.

The mathematics sees both factors alike, as tall matrices: A as (m, r), B as its transpose (n, r).
A stays (m, r) in memory and B stays (r, n), which costs nothing and keeps the long axis where a
mesh may have split it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

# Above this, a matrix is long: it is no (r, r) one.
_LONG = 256


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product in all bits of float32.

    TPUs and newer GPUs multiply in fewer bits by default; a basis needs all of them. And for TPUs a
    product of many layers would be compiled as so many, of a megabyte each in the memory of the
    chip: there, products of long matrices are made layer by layer.

    Args:
      x: (..., stack, n, k).
      y: (..., stack, k, l).

    Returns:
      (..., stack, n, l).
    """
    stacked = x.ndim > 3 and x.shape[-3] > 1
    if stacked and max(*x.shape[-2:], y.shape[-1]) >= _LONG:
        return jax.lax.platform_dependent(x, y, tpu=_layer_by_layer, default=_matmul)
    return _matmul(x, y)


_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _layer_by_layer(x: jax.Array, y: jax.Array) -> jax.Array:
    def body(t: jax.Array, out: jax.Array) -> jax.Array:
        layers = (jax.lax.dynamic_index_in_dim(z, t, z.ndim - 3, keepdims=False) for z in (x, y))
        return jax.lax.dynamic_update_index_in_dim(out, _matmul(*layers), t, out.ndim - 3)

    out = jnp.zeros((*x.shape[:-1], y.shape[-1]), jnp.result_type(x, y))
    return jax.lax.fori_loop(0, x.shape[-3], body, out)


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
