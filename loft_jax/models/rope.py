"""Rotary position embedding."""

import jax
import jax.numpy as jnp
import numpy as np

from loft_jax.models.rope_scaling import RopeScaling


def inverse_frequencies(
    dim: int, theta: float, scaling: RopeScaling | None, lengths: jax.Array | None = None
) -> np.ndarray | jax.Array:
    """Computes the angle per position of each pair of rotated dimensions.

    `theta ** (-2 i / dim)` for `i < dim / 2`, modified by the scaling.

    Args:
        dim: Even number of rotated dimensions of a head.
        theta: The base.
        scaling: The scaling, or None.
        lengths: `(b, t)` integers, for scalings that depend on them: the length of each token's
            text; None is the context of pretraining.

    Returns:
        `(dim / 2,)` float32, in radians per token; `(b, t, dim / 2)` where it depends on lengths.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    return frequencies if scaling is None else scaling.scaled(frequencies, theta, lengths)


def rotation(
    positions: jax.Array,
    segment_ids: jax.Array | None,
    *,
    dim: int,
    theta: float,
    scaling: RopeScaling | None,
) -> tuple[jax.Array, jax.Array]:
    """Computes cosines and sines of the angles of all positions.

    The length of a text, on which some scalings depend, is one more than the largest position in
    its segment. So packed and padded texts give what they give alone; branches of a text have the
    length of the longest. With a cache it is the length so far, and keys in the cache keep the
    rotation that they were given.

    Args:
        positions: `(b, t)` integers.
        segment_ids: `(b, t)` integers, equal numbers for tokens of one text; None if every row is
            one text.
        dim: Even number of rotated dimensions of a head.
        theta: The base of the frequencies.
        scaling: Their scaling, or None.

    Returns:
        Two `(b, t, 1, dim / 2)` float32 arrays, times the factor of the scaling; the axis of 1 is
        for heads.

    Example:
        >>> cos, sin = rotation(jnp.arange(3)[None], None, dim=4, theta=100.0, scaling=None)
        >>> jnp.arctan2(sin, cos)[0, :, 0].round(3).tolist()
        [[0.0, 0.0], [1.0, 0.1...], [2.0, 0.2...]]
    """
    lengths, factor = None, 1.0
    if scaling is not None:
        factor = scaling.attention_scaling
        lengths = _text_lengths(positions, segment_ids) if scaling.by_length else None
    frequencies = inverse_frequencies(dim, theta, scaling, lengths)
    angles = (positions[..., None].astype(jnp.float32) * frequencies)[:, :, None]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _text_lengths(positions: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Gives the length of each token's text, `(b, t)`, or `(b, 1)` if every row is one text."""
    if segment_ids is None:
        return positions.max(-1, keepdims=True) + 1
    same = segment_ids[:, :, None] == segment_ids[:, None, :]  # (b, t, t)
    return jnp.where(same, positions[:, None, :], 0).max(-1) + 1


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates dimensions `i` and `i + dim / 2` together, in float32, and keeps those from `dim` on.

    Args:
        x: `(b, t, heads, head_dim)`.
        cos: `(b, t, 1, dim / 2)`.
        sin: `(b, t, 1, dim / 2)`.

    Returns:
        The rotated `x`, in its dtype.

    Source:
        Su et al., RoFormer, https://arxiv.org/abs/2104.09864; halves as in Hugging Face's models.
    """
    half = cos.shape[-1]
    first, second, kept = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin, kept)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
