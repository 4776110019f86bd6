"""The text models of the Gemma 3 family.

Each is a Gemma 2 without soft caps that normalizes each query and each key, and that rotates with
another base in the layers whose attention has a window.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax

from loft_jax.errors import InputError, shown
from loft_jax.models import config_checks, gemma2, llama
from loft_jax.models.config_checks import LAYER_TYPES
from loft_jax.models.decoder_config import DecoderConfig
from loft_jax.models.family import Family, ParameterTable
from loft_jax.models.gemma2 import Gemma2, Gemma2Config, RMSNorm
from loft_jax.models.parts import Parts
from loft_jax.models.rope import rotation
from loft_jax.models.stack import PerLayer


@dataclasses.dataclass(frozen=True)
class Gemma3TextConfig(Gemma2Config):
    """Sizes and constants of a Gemma 3, under the names of Hugging Face's `config.json`.

    `rope_theta` and `rope_scaling` are for layers of full attention, `rope_local_base_freq` is the
    base in layers with a window.

    Example:
        >>> config = Gemma3TextConfig.from_hf(dict(model_type="gemma3_text", num_hidden_layers=12))
        >>> config.kinds
        [1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]
    """

    model_type: ClassVar[str] = "gemma3_text"
    architecture: ClassVar[str] = "Gemma3ForCausalLM"
    others: ClassVar[tuple[str, ...]] = ("Gemma3TextModel",)
    # transformers' Gemma 3 does not apply a cap of the scores that its configuration sets.
    only: ClassVar[Mapping[str, Any]] = {**Gemma2Config.only, "attn_logit_softcapping": None}
    defaults: ClassVar[Mapping[str, Any]] = {
        **Gemma2Config.defaults,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }

    rope_theta: float = 1_000_000.0
    rope_local_base_freq: float = 10_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        config_checks.check_values(self, sizes={}, positive=("rope_local_base_freq",))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of a Hugging Face `config.json`; see `FamilyConfig.from_hf`.

        In `rope_parameters`, each type of layer has its own.
        """
        config = {"sliding_window_pattern": 6, **config}
        if config.get("layer_types") is None:
            period = config_checks.required(config, "sliding_window_pattern")
            config["layer_types"] = gemma2.alternating(config, period=period)
        by_type = config.get("rope_parameters") or {}
        if not isinstance(by_type, Mapping) or not all(
            name in LAYER_TYPES and isinstance(value, (Mapping, type(None)))
            for name, value in by_type.items()
        ):
            raise InputError(
                f"config: rope_parameters is {shown(by_type)}, expected an object for each of "
                f"{', '.join(map(repr, LAYER_TYPES))}"
            )
        full, local = (dict(by_type.get(name) or {}) for name in LAYER_TYPES)
        if "rope_theta" in local:
            config["rope_local_base_freq"] = local.pop("rope_theta")
        if local.pop("rope_type", "default") != "default" or local:
            raise InputError(
                "config: rope_parameters.sliding_attention is "
                f"{shown(by_type['sliding_attention'])}, only rope_type 'default' is supported"
            )
        if config.get("rope_theta") is None:
            config["rope_theta"] = cls.rope_theta
        return super().from_hf({**config, "rope_parameters": full})


class SelfAttention(gemma2.SelfAttention):
    """The attention of a Gemma 2, with a norm of each query and of each key."""

    def __init__(self, config: DecoderConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, param_dtype=parts.param_dtype)
            for _ in range(2)
        )

    def normalized(self, queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Normalizes queries and keys `(b, t, heads, head_dim)` over the features of a head."""
        return self.q_norm(queries), self.k_norm(keys)


class DecoderLayer(gemma2.DecoderLayer):
    """The layer of a Gemma 2, with the attention of a Gemma 3."""

    attention = SelfAttention


class Gemma3(Gemma2):
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
        Gemma Team, Gemma 3, https://arxiv.org/abs/2503.19786, section 2.
    """

    architecture = Gemma3TextConfig.architecture
    layer = DecoderLayer

    def rotations(
        self, positions: jax.Array, segment_ids: jax.Array | None
    ) -> tuple[PerLayer, PerLayer]:
        """Gives cosines and sines as `rotation` does, with the base and the scaling of a layer."""
        config = self.config
        settings = (
            (config.rope_theta, config.rope_scaling),
            (config.rope_local_base_freq, None),
        )
        full, local = (
            rotation(positions, segment_ids, dim=config.head_dim, theta=theta, scaling=scaling)
            for theta, scaling in settings
        )
        cos, sin = (PerLayer.of(config.kinds, *pair) for pair in zip(full, local, strict=True))
        return cos, sin

    @staticmethod
    def parameter_table(config: DecoderConfig) -> ParameterTable:
        """Makes the parameter table of a model of this configuration."""
        names = ("self_attn.q_norm", "self_attn.k_norm")
        return llama.with_norms(Gemma2.parameter_table(config), names)


def _gemma3(layers: int, **sizes: Any) -> Gemma3TextConfig:
    return Gemma3TextConfig.from_hf(
        {"model_type": "gemma3_text", "num_hidden_layers": layers, **sizes}
    )


_TEXT_ONLY: Mapping[str, Any] = {
    "vocab_size": 262_144,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32_768,
    "sliding_window": 512,
}
_WITH_IMAGES: Mapping[str, Any] = {
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}

# As in the config.json that was published with each; from 4b on, in its text_config.
_WELL_KNOWN: Mapping[str, Gemma3TextConfig] = {
    "gemma-3-270m": _gemma3(18, hidden_size=640, intermediate_size=2048, **_TEXT_ONLY),
    "gemma-3-1b": _gemma3(26, hidden_size=1152, intermediate_size=6912, **_TEXT_ONLY),
    "gemma-3-4b": _gemma3(34, hidden_size=2560, intermediate_size=10_240, **_WITH_IMAGES),
    "gemma-3-12b": _gemma3(
        48,
        hidden_size=3840,
        intermediate_size=15_360,
        num_attention_heads=16,
        num_key_value_heads=8,
        **_WITH_IMAGES,
    ),
    "gemma-3-27b": _gemma3(
        62,
        hidden_size=5376,
        intermediate_size=21_504,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=168,
        **_WITH_IMAGES,
    ),
}

FAMILY = Family(
    model_type=Gemma3TextConfig.model_type,
    config=Gemma3TextConfig,
    models={"causal-lm": Gemma3},
    prefix="model.",
    sizes=_WELL_KNOWN,
)
