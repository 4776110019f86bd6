"""Attention and MLP of the small Llama, with the names and the shapes of MaxText's.

Kernels are `(embed, heads, head_dim)`, `(heads, head_dim, embed)` and `(embed, mlp)`, and that of
the queries holds the 1 / sqrt(head_dim) of attention.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

EMBED, MLP, HEADS, KV_HEADS, HEAD_DIM = 16, 24, 2, 1, 8


def dense(
    features: int | tuple[int, ...], name: str, axis: int | tuple[int, ...] = -1
) -> nn.Module:
    """A projection, for MaxText's `DenseGeneral`."""
    return nn.DenseGeneral(features, axis=axis, use_bias=False, name=name)


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions of `(batch, length, heads, head_dim)`."""
    frequencies = 1e4 ** (-jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = jnp.tile(jnp.arange(x.shape[1])[:, None] * frequencies, 2)[:, None]
    first, second = jnp.split(x, 2, -1)
    return x * jnp.cos(angles) + jnp.concatenate([-second, first], -1) * jnp.sin(angles)


class Attention(nn.Module):
    """Causal attention with grouped keys and values."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(batch, length, embed)` to the same."""
        q = rotated(dense((HEADS, HEAD_DIM), "query")(x))
        k, v = (dense((KV_HEADS, HEAD_DIM), name)(x) for name in ("key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(rotated(k), HEADS // KV_HEADS, 2))
        scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
        v = jnp.repeat(v, HEADS // KV_HEADS, 2)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return dense(EMBED, "out", axis=(-2, -1))(mixed)


class Mlp(nn.Module):
    """A gated MLP."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(batch, length, embed)` to the same."""
        return dense(EMBED, "wo")(nn.silu(dense(MLP, "wi_0")(x)) * dense(MLP, "wi_1")(x))
