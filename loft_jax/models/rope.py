"""Rotary position embedding."""

import jax
import jax.numpy as jnp
import numpy as np

from loft_jax.models.llama_config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Gives the angle each pair of head dimensions turns per position.

    ``theta ** (-2 i / head_dim)`` for ``i < head_dim / 2``, stretched by ``config.rope_scaling``.

    Returns:
        ``(head_dim / 2,)`` float32, in radians per token.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor)
    assert scaling.low_freq_factor is not None
    assert scaling.high_freq_factor is not None
    assert scaling.original_max_position_embeddings is not None
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)  # per context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0 at low frequencies, 1 at high
    return (frequencies * (kept + (1.0 - kept) / scaling.factor)).astype(np.float32)


def rotation(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every position's angles.

    Args:
        config: The model's configuration.
        positions: ``(b, t)`` integers.

    Returns:
        Two ``(b, t, 1, head_dim / 2)`` float32 arrays; the axis of 1 is for heads.
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns dimension ``i`` together with ``i + head_dim / 2``, in float32.

    Args:
        x: ``(b, t, heads, head_dim)``.
        cos: ``(b, t, 1, head_dim / 2)``.
        sin: ``(b, t, 1, head_dim / 2)``.

    Returns:
        ``x`` turned, in its own dtype.

    Source:
        Su et al., RoFormer, https://arxiv.org/abs/2104.09864; halves as in Hugging Face's Llama.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
