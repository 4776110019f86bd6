"""The Qwen3 family: a Qwen2 that normalizes each query and each key, and has no biases."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax

from loft_jax.models import llama
from loft_jax.models.decoder_config import DecoderConfig
from loft_jax.models.decoder_gguf import DecoderGGUF
from loft_jax.models.family import Family, ParameterTable
from loft_jax.models.parts import Parts
from loft_jax.models.qwen2 import Qwen2, Qwen2Config


@dataclasses.dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """Sizes and constants of a Qwen3, under the names of Hugging Face's `config.json`.

    The window is that of `Qwen2Config`. The size of a head does not depend on the number of heads.

    Example:
        >>> config = Qwen3Config.from_hf(
        ...     dict(model_type="qwen3", vocab_size=64, hidden_size=32, intermediate_size=48,
        ...          num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
        ... )
        >>> config.head_dim
        128
    """

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"

    attention_bias: bool = False

    @property
    def qkv_bias(self) -> bool:
        """As `attention_bias` says."""
        return self.attention_bias

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of a Hugging Face `config.json`; see `FamilyConfig.from_hf`."""
        return super().from_hf({"head_dim": 128, **config})


class SelfAttention(llama.SelfAttention):
    """Rotary grouped-query self-attention, with a norm of each query and of each key."""

    def __init__(self, config: DecoderConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.q_norm, self.k_norm = (parts.rms_norm(config.head_dim) for _ in range(2))

    def normalized(self, queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Normalizes queries and keys `(b, t, heads, head_dim)` over the features of a head."""
        return self.q_norm(queries), self.k_norm(keys)


class DecoderLayer(llama.DecoderLayer):
    """The layer of a Llama, with the attention of a Qwen3."""

    attention = SelfAttention


class Qwen3(Qwen2):
    """A decoder-only language model of the Qwen3 family, without a mixture of experts.

    Args:
        config: Sizes and constants.
        dtype: What it computes in. Norms, rotations, softmax and logits are float32 whatever it is.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again.
        rngs: For the initial parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                      num_hidden_layers=2, num_attention_heads=4,
        ...                      num_key_value_heads=2, head_dim=16)
        >>> Qwen3(config, rngs=nnx.Rngs(0))(jnp.zeros((1, 5), jnp.int32)).shape
        (1, 5, 64)

    Source:
        Yang et al., Qwen3 Technical Report, https://arxiv.org/abs/2505.09388, section 2.
    """

    architecture = Qwen3Config.architecture
    layer = DecoderLayer

    @staticmethod
    def parameter_table(config: DecoderConfig) -> ParameterTable:
        """Makes the parameter table of a model of this configuration."""
        names = ("self_attn.q_norm", "self_attn.k_norm")
        return llama.with_norms(Qwen2.parameter_table(config), names)


class _GGUF(DecoderGGUF):
    """GGUF files of the architecture "qwen3"."""

    architecture = "qwen3"
    config_class = Qwen3Config
    in_layer: Mapping[str, str] = {
        **DecoderGGUF.in_layer,
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    }


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, *, tied: bool = False) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rope_theta=1e6,
        tie_word_embeddings=tied,
    )


# As in the config.json that was published with each.
_WELL_KNOWN: Mapping[str, Qwen3Config] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17_408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64),
}

FAMILY = Family(
    model_type=Qwen3Config.model_type,
    config=Qwen3Config,
    models={"causal-lm": Qwen3},
    prefix="model.",
    sizes=_WELL_KNOWN,
    gguf=_GGUF(),
)
