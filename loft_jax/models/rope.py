"""Rotary position embedding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from loft_jax.errors import InputError, cut, shown
from loft_jax.models.config_checks import is_positive


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies for contexts longer than those of pretraining.

    Args:
        rope_type: `"linear"` divides every frequency by `factor`; `"llama3"` divides the
            low ones, keeps the high ones, and blends between the two.
        factor: Factor of the scaling.
        low_freq_factor: Below `original_max_position_embeddings / low_freq_factor` rotations
            per context, a frequency counts as low. `"llama3"` only, as are the next two.
        high_freq_factor: The same for high frequencies.
        original_max_position_embeddings: Context length of pretraining, in tokens.
    """

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


def read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Reads base and scaling from a `config.json`, in either of the two formats.

    Args:
        config: Its contents.

    Returns:
        The base of the frequencies, and their scaling.

    Raises:
        InputError: The kind of scaling is not supported, or a value is out of its range.
    """
    both = [key for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    if len(both) > 1 and config[both[0]] != config[both[1]]:
        raise InputError("config: rope_scaling and rope_parameters differ, expected one of them")
    key = both[0] if both else "rope_scaling"
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise InputError(f"config: {key} is {shown(found)}, expected a mapping")
    rope = dict(found)
    if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise InputError(
            f"config: {key}.{cut(nested[0])} is an object, expected a number or a name"
        )
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0
    if not is_positive(theta):
        raise InputError(f"config: rope_theta is {shown(theta)}, expected a positive number")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"config: {key}.partial_rotary_factor is set, only 1.0 is supported")
    legacy_type = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", legacy_type)
    known: dict[Any, tuple[str, ...]] = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    names = known.get(rope_type) if isinstance(rope_type, str) else None
    if names is None:
        raise InputError(
            f"config: {key}.rope_type is {shown(rope_type)}, "
            "only 'default', 'linear' and 'llama3' are supported"
        )
    if rope_type == "llama3":
        rope.setdefault(
            "original_max_position_embeddings", config.get("max_position_embeddings", 2048)
        )
    for name in names:
        value = rope.get(name)
        if not is_positive(value):
            raise InputError(f"config: {key}.{name} is {shown(value)}, expected a positive number")
    if rope_type == "default":
        return float(theta), None
    if rope_type == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise InputError(
            f"config: {key}.low_freq_factor is {rope['low_freq_factor']}, expected less than "
            f"high_freq_factor, {rope['high_freq_factor']}"
        )
    return float(theta), RopeScaling(rope_type=rope_type, **{name: rope[name] for name in names})


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Computes the angle per position of each pair of head dimensions.

    `theta ** (-2 i / head_dim)` for `i < head_dim / 2`, modified by the scaling.

    Args:
        head_dim: Even number of dimensions of a head.
        theta: The base.
        scaling: The scaling, or None.

    Returns:
        `(head_dim / 2,)` float32, in radians per token.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
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


def rotation(frequencies: np.ndarray, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes cosines and sines of the angles of all positions.

    Args:
        frequencies: `(head_dim / 2,)`, from `inverse_frequencies`.
        positions: `(b, t)` integers.

    Returns:
        Two `(b, t, 1, head_dim / 2)` float32 arrays; the axis of 1 is for heads.
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates dimensions `i` and `i + head_dim / 2` together, in float32.

    Args:
        x: `(b, t, heads, head_dim)`.
        cos: `(b, t, 1, head_dim / 2)`.
        sin: `(b, t, 1, head_dim / 2)`.

    Returns:
        The rotated `x`, in its dtype.

    Source:
        Su et al., RoFormer, https://arxiv.org/abs/2104.09864; halves as in Hugging Face's models.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
