"""Rounding to fewer bits that is right on average."""

import jax
import jax.numpy as jnp


def stochastic_round(x: jax.Array, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16 up or down, with probabilities that make the mean exact.

    A slow average such as `β₂ p + (1 - β₂) g²` changes by less than half a unit of bfloat16 a
    step: rounded to the nearest, it would never change.

    Args:
      x: float32 or float64, to become bfloat16; to another dtype it is rounded to the nearest.
      dtype: The dtype to round to.
      key: Random key.

    Returns:
      x in that dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.full(10_000, 1.001)  # bfloat16 has 1 and 1.0078 beside it
      >>> rounded = stochastic_round(x, jnp.bfloat16, jax.random.key(0))
      >>> round(float(rounded.astype(float).mean()), 4)
      1.001
    """
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    x = x.astype(jnp.float32)
    # A bfloat16 is the upper half of a float32. What is added to the lower half carries over.
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # NaN and infinity have all bits of the exponent set, and must not be carried over.
    rounded = jnp.where(jnp.isfinite(x), bits + noise, bits) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(rounded, jnp.float32).astype(dtype)
