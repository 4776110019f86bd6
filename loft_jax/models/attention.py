"""Attention, its masks, and the cache of keys and values."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, in buffers of fixed length; a pytree.

    Attributes:
        keys: `(layers, b, kv_heads, s, head_dim)`.
        values: `(layers, b, kv_heads, s, head_dim)`.
        segment_ids: `(b, s)` int32, 0 for empty slots and padding.
        length: `()` int32, number of written slots, the same for every row.
    """

    keys: jax.Array
    values: jax.Array
    segment_ids: jax.Array
    length: jax.Array

    @classmethod
    def empty(
        cls,
        *,
        layers: int,
        batch: int,
        length: int,
        kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
    ) -> "KVCache":
        """Makes an empty cache for `length` tokens in each row."""
        shape = (layers, batch, kv_heads, length, head_dim)
        return cls(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            segment_ids=jnp.zeros((batch, length), jnp.int32),
            length=jnp.zeros((), jnp.int32),
        )

    def written(
        self, layer: jax.Array, keys: jax.Array, values: jax.Array
    ) -> tuple["KVCache", jax.Array, jax.Array]:
        """Writes the keys and values of new tokens after those that a layer has.

        Args:
            layer: Number of the layer.
            keys: `(b, kv_heads, t, head_dim)`.
            values: `(b, kv_heads, t, head_dim)`.

        Returns:
            The cache, and all keys and values of the layer, `(b, kv_heads, s, head_dim)`.
        """
        start = (layer, 0, 0, self.length, 0)
        cache = dataclasses.replace(
            self,
            keys=lax.dynamic_update_slice(self.keys, keys[None].astype(self.keys.dtype), start),
            values=lax.dynamic_update_slice(
                self.values, values[None].astype(self.values.dtype), start
            ),
        )
        return cache, cache.keys[layer], cache.values[layer]


def visibility(
    batch: int,
    length: int,
    segment_ids: jax.Array | None,
    cache: KVCache | None,
    branch_ids: jax.Array | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Makes the mask of attention: keys that are not later, of the same segment, and not padding.

    Args:
        batch: Number of rows, `b`.
        length: Number of new tokens in each row, `t`.
        segment_ids: `(b, t)`, 0 for padding; None if every row is one unpadded text.
        cache: Cache of earlier tokens; its segment ids are extended by the new ones.
        branch_ids: `(b, t)`, 0 for the common part of all branches; branches do not see each other.
            None if there are no branches.

    Returns:
        Mask `(b or 1, t, s)`, where `s` is `t` without a cache, and the cache's length with one;
        and the cache with extended segment ids (its `length` is unchanged).
    """
    if cache is None:
        visible = jnp.tril(jnp.ones((length, length), bool))[None]  # (1, t, t)
        if segment_ids is not None:
            same = segment_ids[:, :, None] == segment_ids[:, None, :]  # (b, t, t)
            visible = visible & same & (segment_ids != 0)[:, None, :]
        if branch_ids is not None:
            own = branch_ids[:, :, None] == branch_ids[:, None, :]  # (b, t, t)
            visible = visible & (own | (branch_ids == 0)[:, None, :])
        return visible, None
    if branch_ids is not None:
        raise ValueError("branch_ids are given with a cache, which keeps none; expected either")
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    seen = lax.dynamic_update_slice(
        cache.segment_ids, segment_ids.astype(jnp.int32), (0, cache.length)
    )  # (b, s)
    slots = cache.length + jnp.arange(length)
    causal = jnp.arange(seen.shape[1])[None, :] <= slots[:, None]  # (t, s)
    same = segment_ids[:, :, None] == seen[:, None, :]  # (b, t, s)
    visible = causal[None] & same & (seen != 0)[:, None, :]
    return visible, dataclasses.replace(cache, segment_ids=seen)


def positions_from(visible: jax.Array) -> jax.Array:
    """Computes positions as the number of earlier tokens that each token sees.

    This rule holds for packed examples, padding on either side, and continued texts.

    Args:
        visible: Mask `(b, t, s)`.

    Returns:
        `(b, t)` int32; 0 for padding.
    """
    return jnp.maximum(visible.sum(-1, dtype=jnp.int32) - 1, 0)


def windowed(visible: jax.Array, window: int | None) -> jax.Array:
    """Restricts a mask to the last `window` keys that each query sees, its own included.

    Keys are counted as `positions_from` counts them, so this rule too holds for packed examples,
    padding on either side, branches and continued texts. Positions come from the mask without the
    window.

    Args:
        visible: Mask `(b, t, s)`, from `visibility`.
        window: Number of keys, 1 or more; None restricts nothing.

    Returns:
        Mask `(b, t, s)`.

    Example:
        >>> visible, _ = visibility(1, 4, None, None)
        >>> windowed(visible, 2)[0].astype(int).tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]

    Source:
        Beltagy et al., Longformer, https://arxiv.org/abs/2004.05150, section 3.1.
    """
    if window is None or visible.shape[-1] <= window:
        return visible
    back = lax.cumsum(visible.astype(jnp.int32), axis=2, reverse=True)  # (b, t, s), 1: the query's
    return visible & (back <= window)


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    visible: jax.Array,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Computes grouped-query attention, with the softmax in float32.

    Args:
        queries: `(b, t, heads, head_dim)`; heads `g·i … g·i+g-1` share key head `i`.
        keys: `(b, kv_heads, s, head_dim)`.
        values: `(b, kv_heads, s, head_dim)`.
        visible: `(b or 1, t or 1, s)` bool. A query that sees nothing (padding) gets a finite
            mean.
        dropout: Dropout on the weights, or None.
        scale: What the products of queries and keys are multiplied by; by default
            `head_dim ** -0.5`.
        softcap: Bound of the scores, as for `softcapped`; None if they have none.

    Returns:
        `(b, t, heads, head_dim)` in the dtype of `queries`.
    """
    batch, length, heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4)  # (b, kv_heads, g, t, head_dim)
    scores = jnp.einsum("bkgtd,bksd->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    scores = softcapped(scores * (head_dim**-0.5 if scale is None else scale), softcap)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)  # (b, kv_heads, g, t, s)
    if dropout is not None:
        weights = dropout(weights)
    mixed = jnp.einsum("bkgts,bksd->bkgtd", weights, values)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def softcapped(x: jax.Array, cap: float | None) -> jax.Array:
    """Bounds values smoothly: `cap tanh(x / cap)`.

    Args:
        x: Any array.
        cap: The bound; None leaves the values as they are.

    Returns:
        The same shape, within -cap and cap.

    Example:
        >>> softcapped(jnp.array([0.0, 1e3]), 30.0).tolist()
        [0.0, 30.0]

    Source:
        Gemma 2, https://arxiv.org/abs/2408.00118, section 2.
    """
    return x if cap is None else cap * jnp.tanh(x / cap)
