"""The text models of the Gemma 3 family.

Their modules are Gemma 2's, with norms of queries and keys, and with other rotary frequencies in
the layers whose attention has a window.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
from jax.typing import DTypeLike

from loft_jax.errors import InputError, shown
from loft_jax.models import config_checks, gemma2
from loft_jax.models.family import Family, ParameterTable, norm
from loft_jax.models.rope import inverse_frequencies, read_rope, rotation
from loft_jax.models.stack import PerLayer


@dataclasses.dataclass(frozen=True)
class Gemma3TextConfig(gemma2.Gemma2Config):
    """Sizes and constants of a Gemma 3, under the names of Hugging Face's `config.json`.

    `rope_theta` and `rope_scaling` are for layers of full attention, `rope_local_base_freq` is the
    base in layers with a window.

    Example:
        >>> config = Gemma3TextConfig.from_hf(dict(model_type="gemma3_text", num_hidden_layers=12))
        >>> config.kinds
        [1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]
    """

    vocab_size: int = 262_208
    max_position_embeddings: int = 131_072
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    rope_theta: float = 1_000_000.0
    rope_local_base_freq: float = 10_000.0

    model_type: ClassVar[str] = "gemma3_text"
    architecture: ClassVar[str] = "Gemma3ForCausalLM"
    headless: ClassVar[str] = "Gemma3TextModel"
    # transformers' Gemma 3 does not apply a cap of the scores that its configuration sets.
    only: ClassVar[Mapping[str, Any]] = {**gemma2.ONLY, "attn_logit_softcapping": None}

    def __post_init__(self) -> None:
        super().__post_init__()
        config_checks.check_values(self, sizes={}, positive=("rope_local_base_freq",))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of a Hugging Face `config.json`.

        Absent fields take the defaults transformers gives them. Rotary settings are read under the
        older keys, or from `rope_parameters`, where each type of layer has its own.

        Args:
            config: The parsed JSON.

        Returns:
            The configuration.

        Raises:
            InputError: Another architecture, or a field whose value is not supported.
        """
        pattern = {"sliding_window_pattern": 6}
        pattern |= config_checks.present(config, pattern)
        period = config_checks.required(pattern, "sliding_window_pattern")
        fields = cls._fields(config, period=period)
        by_type = config.get("rope_parameters") or {}
        if not isinstance(by_type, Mapping) or not all(
            name in gemma2.LAYER_TYPES and isinstance(value, (Mapping, type(None)))
            for name, value in by_type.items()
        ):
            raise InputError(
                f"config: rope_parameters is {shown(by_type)}, expected an object for each of "
                f"{', '.join(map(repr, gemma2.LAYER_TYPES))}"
            )
        full, local = (dict(by_type.get(name) or {}) for name in gemma2.LAYER_TYPES)
        base = {"rope_theta": cls.rope_theta, **config_checks.present(config, ("rope_theta",))}
        theta, scaling = read_rope({**config, **base, "rope_parameters": full})
        if (local_theta := local.pop("rope_theta", config.get("rope_local_base_freq"))) is None:
            local_theta = cls.rope_local_base_freq
        if local.pop("rope_type", "default") != "default" or local:
            raise InputError(
                "config: rope_parameters.sliding_attention is "
                f"{shown(by_type['sliding_attention'])}, only rope_type 'default' is supported"
            )
        return cls(
            **fields, rope_theta=theta, rope_scaling=scaling, rope_local_base_freq=local_theta
        )


class SelfAttention(gemma2.SelfAttention):
    """Gemma 2's attention, with norms of queries and keys."""

    def __init__(
        self, config: gemma2.Gemma2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: Any
    ) -> None:
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.q_norm, self.k_norm = (
            gemma2.RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, param_dtype=param_dtype)
            for _ in range(2)
        )

    def projected(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gives queries, keys and values before the rotation, `(b, t, heads, head_dim)` each."""
        queries, keys, values = super().projected(x)
        return self.q_norm(queries), self.k_norm(keys), values


class DecoderLayer(gemma2.DecoderLayer):
    """Gemma 2's layer, with the attention of Gemma 3."""

    attention = SelfAttention


class Gemma3(gemma2.Gemma2):
    """A decoder-only language model of the Gemma 3 family.

    Args:
        config: Sizes and constants.
        dtype: What it computes in. Norms, rotations, softmax and logits are float32 whatever it is.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again.
        rngs: For the initial parameters, drawn as Hugging Face draws them.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> config = Gemma3TextConfig.from_hf(
        ...     dict(model_type="gemma3_text", vocab_size=64, hidden_size=32, intermediate_size=48,
        ...          num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        ... )
        >>> Gemma3(config, rngs=nnx.Rngs(0))(jnp.zeros((1, 5), jnp.int32)).shape
        (1, 5, 64)

    Source:
        Gemma Team, https://arxiv.org/abs/2503.19786, section 2.
    """

    architecture = Gemma3TextConfig.architecture
    decoder_layer = DecoderLayer

    def rotations(self, positions: jax.Array) -> tuple[Any, Any]:
        """Gives the cosines and sines of positions `(b, t)`, as `run_layers` takes them."""
        config: Gemma3TextConfig = self.config
        full = rotation(
            inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling), positions
        )
        local = rotation(
            inverse_frequencies(config.head_dim, config.rope_local_base_freq, None), positions
        )
        cos, sin = (PerLayer.of(config.kinds, *pair) for pair in zip(full, local, strict=True))
        return cos, sin

    @staticmethod
    def parameter_table(config: gemma2.Gemma2Config) -> ParameterTable:
        """Makes the parameter table of a Gemma 3."""
        common = gemma2.Gemma2.parameter_table(config)
        attention = "model.layers.{}.self_attn"
        norms = {
            **norm("layers.self_attn.q_norm", f"{attention}.q_norm"),
            **norm("layers.self_attn.k_norm", f"{attention}.k_norm"),
        }
        return dataclasses.replace(common, tensors={**common.tensors, **norms})


def _published(layers: int, **sizes: Any) -> Gemma3TextConfig:
    return Gemma3TextConfig.from_hf(
        {"model_type": "gemma3_text", "num_hidden_layers": layers, **sizes}
    )


_OF_IMAGES_TOO: Mapping[str, Any] = {
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}

FAMILY = Family(
    model_type="gemma3_text",
    config=Gemma3TextConfig,
    models={"causal-lm": Gemma3},
    prefix="model.",
    # As in the config.json that was published with each; from 4b on, its text_config.
    sizes={
        "gemma-3-270m": _published(
            18,
            vocab_size=262_144,
            hidden_size=640,
            intermediate_size=2048,
            num_attention_heads=4,
            num_key_value_heads=1,
            max_position_embeddings=32_768,
            sliding_window=512,
        ),
        "gemma-3-1b": _published(
            26,
            vocab_size=262_144,
            hidden_size=1152,
            intermediate_size=6912,
            num_attention_heads=4,
            num_key_value_heads=1,
            max_position_embeddings=32_768,
            sliding_window=512,
        ),
        "gemma-3-4b": _published(34, hidden_size=2560, intermediate_size=10_240, **_OF_IMAGES_TOO),
        "gemma-3-12b": _published(
            48,
            hidden_size=3840,
            intermediate_size=15_360,
            num_attention_heads=16,
            num_key_value_heads=8,
            **_OF_IMAGES_TOO,
        ),
        "gemma-3-27b": _published(
            62,
            hidden_size=5376,
            intermediate_size=21_504,
            num_attention_heads=32,
            num_key_value_heads=16,
            head_dim=128,
            query_pre_attn_scalar=168,
            **_OF_IMAGES_TOO,
        ),
    },
)
