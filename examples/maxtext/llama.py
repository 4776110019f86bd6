"""A Llama with the layout of MaxText's, small enough for a laptop: stands for your MaxText model.

All layers are one scan at `param_scan_axis`, 1 by default, and names are MaxText's. Kernels are
`(embed, layers, heads, head_dim)`, `(heads, layers, head_dim, embed)` and `(embed, layers, mlp)`,
and the kernel of the queries holds the 1 / sqrt(head_dim) of attention.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

VOCAB, EMBED, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 16, 24, 2, 1, 8, 2


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


class DecoderLayer(nn.Module):
    """One layer, the body of the scan."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps `(batch, length, embed)` to the same."""
        norm = nn.RMSNorm(1e-5, name="pre_self_attention_layer_norm")
        x = x + Attention(name="self_attention")(norm(x))
        norm = nn.RMSNorm(1e-5, name="post_self_attention_layer_norm")
        return x + Mlp(name="mlp")(norm(x)), None


class Decoder(nn.Module):
    """Layers by one scan, which puts their parameters at `param_scan_axis`."""

    param_scan_axis: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps embeddings to logits."""
        layers = nn.scan(
            nn.remat(DecoderLayer, prevent_cse=False),
            variable_axes={"params": self.param_scan_axis},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = layers(name="layers")(x, None)
        return dense(VOCAB, "logits_dense")(nn.RMSNorm(1e-5, name="decoder_norm")(x))


class Transformer(nn.Module):
    """The model."""

    param_scan_axis: int = 1

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Gives the logits of `(batch, length)` tokens."""
        x = nn.Embed(VOCAB, EMBED, name="token_embedder")(tokens)
        return Decoder(self.param_scan_axis, name="decoder")(x)
