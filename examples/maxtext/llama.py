"""A Llama with the layout of MaxText's, small enough for a laptop: stands for your MaxText model.

All layers are one scan at `param_scan_axis`, 1 by default, and names are MaxText's: the kernel of
the queries is `(embed, layers, heads, head_dim)`.
"""

import jax
from flax import linen as nn

from examples.maxtext.layers import EMBED, Attention, Mlp, dense

VOCAB, LAYERS = 64, 2


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
