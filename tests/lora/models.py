"""Small models of every kind that LoRA is added to."""

import jax
from flax import nnx


class Block(nnx.Module):
    """A residual block; `dtype` is what it computes in."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype=None, param_dtype="float32"):
        self.up_proj = nnx.Linear(width, 2 * width, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.down_proj = nnx.Linear(
            2 * width, width, use_bias=False, rngs=rngs, dtype=dtype, param_dtype=param_dtype
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down_proj(nnx.tanh(self.up_proj(x)))


class Stacked(nnx.Module):
    """An embedding, three blocks made by vmap and run by scan, a head."""

    def __init__(self, width: int = 6, vocab: int = 11, *, rngs: nnx.Rngs, **kwargs):
        self.embed = nnx.Embed(vocab, width, rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Block(width, rngs=rngs, **kwargs)

        self.layers = stack(rngs)
        self.lm_head = nnx.Linear(width, vocab, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return self.lm_head(run(self.embed(tokens), self.layers))


class Doubled(nnx.Linear):
    """A user's layer whose output is made from the base layer's."""

    def __call__(self, inputs, out_sharding=None):
        return nnx.tanh(super().__call__(2.0 * inputs, out_sharding=out_sharding))


class Renamed(nnx.Linear):
    """A user's layer that changes nothing."""


class Opaque(nnx.Linear):
    """A user's layer that does not use the base layer's call."""

    def __call__(self, inputs, out_sharding=None):
        return inputs @ self.kernel[...]
