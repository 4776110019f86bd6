"""Scalings of rotary frequencies for long contexts, one class for each `rope_type`.

Fields have Hugging Face's names and, where there is one, transformers' default.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from loft_jax.errors import InputError


@dataclass(frozen=True)
class RopeScaling:
    """A scaling of rotary frequencies for contexts longer than those of pretraining.

    Attributes:
        rope_type: Hugging Face's name.
        by_length: Whether frequencies depend on the length of a text.
    """

    rope_type: ClassVar[str]
    by_length: ClassVar[bool] = False

    def scaled(
        self, frequencies: np.ndarray, theta: float, lengths: jax.Array | None
    ) -> np.ndarray | jax.Array:
        """Scales frequencies.

        Args:
            frequencies: `(dim / 2,)` float32, those without scaling.
            theta: Their base.
            lengths: `(b, t)` integers, the length of each token's text, for scalings that depend on
                it; None is the context of pretraining.

        Returns:
            `(dim / 2,)` float32; `(b, t, dim / 2)` where they depend on lengths.
        """
        raise NotImplementedError

    @property
    def attention_scaling(self) -> float:
        """The factor of queries and keys after their rotation."""
        return 1.0

    def check(self, dim: int, theta: float) -> None:
        """Checks the scaling against the model that it is for.

        Args:
            dim: Number of rotated dimensions of a head.
            theta: The base of the frequencies.

        Raises:
            InputError: They do not fit.
        """


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Divides every frequency by `factor`.

    Source:
        Chen et al., https://arxiv.org/abs/2306.15595.
    """

    rope_type = "linear"
    factor: float

    def scaled(
        self, frequencies: np.ndarray, theta: float, lengths: jax.Array | None
    ) -> np.ndarray:
        """Scales frequencies; see `RopeScaling.scaled`."""
        return frequencies / np.float32(self.factor)


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Divides low frequencies by `factor`, keeps high ones, and blends between the two.

    Args:
        factor: Factor of the scaling.
        low_freq_factor: Below so many rotations per context, a frequency counts as low.
        high_freq_factor: Above so many, it counts as high.
        original_max_position_embeddings: Context length of pretraining, in tokens.

    Source:
        Grattafiori et al., https://arxiv.org/abs/2407.21783; the formula is that of the published
        models.
    """

    rope_type = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scaled(
        self, frequencies: np.ndarray, theta: float, lengths: jax.Array | None
    ) -> np.ndarray:
        """Scales frequencies; see `RopeScaling.scaled`."""
        turns = self.original_max_position_embeddings * frequencies / (2 * np.pi)  # per context
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0 at low frequencies, 1 at high
        return (frequencies * (kept + (1.0 - kept) / self.factor)).astype(np.float32)

    def check(self, dim: int, theta: float) -> None:
        """Checks the scaling; see `RopeScaling.check`."""
        if self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f"config: low_freq_factor is {self.low_freq_factor}, expected less than "
                f"high_freq_factor, {self.high_freq_factor}"
            )


@dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """Raises the base with the length of a text that is longer than the context of pretraining.

    For a text of `n > max_position_embeddings` tokens, the base is multiplied by
    `(1 + factor (n / max_position_embeddings - 1)) ** (dim / (dim - 2))`.

    Args:
        factor: Factor of the scaling.
        max_position_embeddings: The model's field of that name.

    Source:
        Peng et al., https://arxiv.org/abs/2309.00071, section 3.3.
    """

    rope_type = "dynamic"
    by_length = True
    factor: float
    max_position_embeddings: int

    def scaled(
        self, frequencies: np.ndarray, theta: float, lengths: jax.Array | None
    ) -> np.ndarray | jax.Array:
        """Scales frequencies; see `RopeScaling.scaled`."""
        if lengths is None:
            return frequencies
        dim = 2 * len(frequencies)
        beyond = jnp.maximum(lengths - self.max_position_embeddings, 0).astype(jnp.float32)
        stretch = 1.0 + self.factor / self.max_position_embeddings * beyond  # (b, t)
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim - 2)
        return frequencies * stretch[..., None] ** -exponents

    def check(self, dim: int, theta: float) -> None:
        """Checks the scaling; see `RopeScaling.check`."""
        if dim <= 2:
            raise InputError(
                f"config: rope_type is 'dynamic' and {dim} dimensions of a head rotate, expected "
                "more than 2"
            )


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """Divides low frequencies by `factor`, keeps high ones, with a ramp over the dimensions.

    Queries and keys are multiplied by `attention_factor`, or else by `m(mscale) /
    m(mscale_all_dim)` where both are set, or by `m(1)`, with `m(x) = 0.1 x log(factor) + 1`.

    Args:
        factor: Factor of the scaling.
        original_max_position_embeddings: Context length of pretraining, in tokens.
        attention_factor: Factor of queries and keys.
        beta_fast: Rotations per context at the start of the ramp.
        beta_slow: Rotations per context at its end.
        mscale: Weight in the numerator of the attention factor.
        mscale_all_dim: Weight in its denominator.
        truncate: Whether the ramp starts and ends at whole dimensions.

    Source:
        Peng et al., https://arxiv.org/abs/2309.00071, section 3.4.
    """

    rope_type = "yarn"
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def scaled(
        self, frequencies: np.ndarray, theta: float, lengths: jax.Array | None
    ) -> np.ndarray:
        """Scales frequencies; see `RopeScaling.scaled`."""
        dim = 2 * len(frequencies)

        def dimension(turns: float) -> float:  # which makes so many turns per context
            context = self.original_max_position_embeddings / (2 * math.pi)
            return dim * math.log(context / turns) / (2 * math.log(theta))

        start, end = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            start, end = math.floor(start), math.ceil(end)
        start, end = max(start, 0), min(end, dim - 1)
        ramp = (np.arange(dim // 2, dtype=np.float32) - start) / (end - start or 0.001)
        low = np.clip(ramp, 0.0, 1.0)
        return (frequencies / self.factor * low + frequencies * (1.0 - low)).astype(np.float32)

    @property
    def attention_scaling(self) -> float:
        """The factor of queries and keys after their rotation."""
        if self.attention_factor is not None:
            return self.attention_factor
        log = 0.1 * math.log(max(self.factor, 1.0))
        if self.mscale is not None and self.mscale_all_dim is not None:
            return (self.mscale * log + 1.0) / (self.mscale_all_dim * log + 1.0)
        return log + 1.0

    def check(self, dim: int, theta: float) -> None:
        """Checks the scaling; see `RopeScaling.check`."""
        if theta <= 1.0:
            raise InputError(
                f"config: rope_type is 'yarn' and rope_theta is {theta}, expected more than 1"
            )
        if self.beta_slow > self.beta_fast:
            raise InputError(
                f"config: beta_slow is {self.beta_slow}, expected at most beta_fast, "
                f"{self.beta_fast}"
            )


@dataclass(frozen=True)
class LongRopeScaling(RopeScaling):
    """Divides each frequency by a factor of its own.

    The factors are `long_factor` in a text longer than `original_max_position_embeddings`, and
    `short_factor` in others. Queries and keys are multiplied by `attention_factor`, or else by
    `sqrt(1 + log(f) / log(original_max_position_embeddings))` for `f > 1`, where `f` is `factor`,
    or else `max_position_embeddings / original_max_position_embeddings`.

    Args:
        short_factor: One factor for each pair of dimensions.
        long_factor: The same.
        original_max_position_embeddings: Context length of pretraining, in tokens.
        max_position_embeddings: The model's field of that name.
        factor: Factor of the scaling.
        attention_factor: Factor of queries and keys.

    Source:
        Ding et al., https://arxiv.org/abs/2402.13753; the attention factor is that of Abdin et al.,
        https://arxiv.org/abs/2404.14219, and its published models.
    """

    rope_type = "longrope"
    by_length = True
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None

    def scaled(
        self, frequencies: np.ndarray, theta: float, lengths: jax.Array | None
    ) -> np.ndarray | jax.Array:
        """Scales frequencies; see `RopeScaling.scaled`."""
        short = frequencies / np.asarray(self.short_factor, np.float32)
        if lengths is None or self.short_factor == self.long_factor:
            return short
        long = frequencies / np.asarray(self.long_factor, np.float32)
        return jnp.where((lengths > self.original_max_position_embeddings)[..., None], long, short)

    @property
    def attention_scaling(self) -> float:
        """The factor of queries and keys after their rotation."""
        if self.attention_factor is not None:
            return self.attention_factor
        original = self.original_max_position_embeddings
        factor = self.max_position_embeddings / original if self.factor is None else self.factor
        if factor <= 1.0:
            return 1.0
        return math.sqrt(1.0 + math.log(factor) / math.log(original))

    def check(self, dim: int, theta: float) -> None:
        """Checks the scaling; see `RopeScaling.check`."""
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != dim // 2:
                raise InputError(
                    f"config: {name} has {len(getattr(self, name))} numbers, expected {dim // 2}, "
                    f"one for each pair of the {dim} dimensions of a head that rotate"
                )
        if self.original_max_position_embeddings <= 1:
            raise InputError(
                "config: original_max_position_embeddings is "
                f"{self.original_max_position_embeddings}, expected more than 1"
            )
