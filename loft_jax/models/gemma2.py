"""The Gemma 2 family: a Llama with soft caps, four norms a layer, and windows in every other layer.

Embeddings are scaled, and norms multiply by one more than their weight.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from loft_jax.models import config_checks, llama
from loft_jax.models.attention import KVCache, softcapped, windowed
from loft_jax.models.config_checks import LAYER_TYPES
from loft_jax.models.decoder_config import DecoderConfig
from loft_jax.models.family import Family, ParameterTable, Remat
from loft_jax.models.llama import Llama
from loft_jax.models.parts import Parts
from loft_jax.models.stack import PerLayer


@dataclasses.dataclass(frozen=True)
class Gemma2Config(DecoderConfig):
    """Sizes and constants of a Gemma 2, under the names of Hugging Face's `config.json`.

    In layers whose type is "sliding_attention" a token sees the last `sliding_window` tokens,
    itself included; in those of "full_attention", all. A soft cap of None is none.

    Example:
        >>> config = Gemma2Config.from_hf(dict(model_type="gemma2", num_hidden_layers=2))
        >>> config.layer_types, config.sliding_window
        (('sliding_attention', 'full_attention'), 4096)
    """

    model_type: ClassVar[str] = "gemma2"
    architecture: ClassVar[str] = "Gemma2ForCausalLM"
    others: ClassVar[tuple[str, ...]] = ("Gemma2Model",)
    only: ClassVar[Mapping[str, Any]] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
        "use_bidirectional_attention": False,
        "is_causal": True,
        "quantization_config": None,
    }
    # Those of transformers for absent fields; null is no cap, or no such token.
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }

    layer_types: tuple[str, ...] = ()
    sliding_window: int = 4096
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        config_checks.check_values(
            self,
            sizes={"sliding_window": config_checks.MOST_POSITIONS},
            positive=(
                "query_pre_attn_scalar",
                *(name for name in caps if getattr(self, name) is not None),
            ),
        )
        config_checks.layer_types(self.layer_types, self.num_hidden_layers)

    @property
    def kinds(self) -> list[int]:
        """The type of each layer: 0 for full attention, 1 for a window."""
        return [LAYER_TYPES.index(kind) for kind in self.layer_types]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of a Hugging Face `config.json`; see `FamilyConfig.from_hf`."""
        types = config.get("layer_types")
        if types is None:
            types = alternating(config, period=2)
        else:
            count = config_checks.required(config, "num_hidden_layers")
            types = config_checks.layer_types(types, count)
        return super().from_hf({**cls.defaults, **config, "layer_types": types})

    def to_hf(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers loads."""
        fields = super().to_hf()
        del fields["hidden_act"]
        return {**fields, "hidden_activation": "gelu_pytorch_tanh"}


def alternating(config: Mapping[str, Any], *, period: int) -> tuple[str, ...]:
    """Gives the types of the layers of a `config.json`: each `period`-th has full attention."""
    count = min(config_checks.required(config, "num_hidden_layers"), config_checks.MOST_LAYERS)
    return tuple(LAYER_TYPES[number % period != 0] for number in range(1, count + 1))


class RMSNorm(nnx.Module):
    """`x / rms(x) * (1 + scale)`, in float32."""

    def __init__(self, features: int, *, epsilon: float, param_dtype: DTypeLike) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.zeros(features, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(..., features)` to `(..., features)` in the dtype of x."""
        wide = x.astype(jnp.float32)
        square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * lax.rsqrt(square + self.epsilon)
        return (normed * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class SelfAttention(llama.SelfAttention):
    """Rotary grouped-query self-attention, with the scale and the soft cap of the configuration."""

    def __init__(self, config: DecoderConfig, parts: Parts) -> None:
        assert isinstance(config, Gemma2Config)
        super().__init__(config, parts)
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping


class MLP(llama.MLP):
    """GeGLU: `down(gelu(gate(x)) * up(x))`, with the tanh approximation of GELU."""

    def activated(self, gate: jax.Array) -> jax.Array:
        """Applies the activation, elementwise."""
        return nnx.gelu(gate, approximate=True)


class DecoderLayer(llama.DecoderLayer):
    """Attention, then the MLP, each between two norms and added to the residual stream."""

    attention = SelfAttention
    feed_forward = MLP

    def __init__(self, config: DecoderConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        norm = functools.partial(_norm, config, parts.param_dtype)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        visible: jax.Array,
        cache: KVCache | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache | None]:
        """Applies layer number `layer` to `x (b, t, hidden)`."""
        mixed, cache = self.self_attn(self.input_layernorm(x), cos, sin, visible, cache, layer)
        x = x + self.post_attention_layernorm(mixed)
        inner = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(inner), cache


class Gemma2(Llama):
    """A decoder-only language model of the Gemma 2 family.

    Args:
        config: Sizes and constants.
        dtype: What it computes in. Norms, rotations, softmax and logits are float32 whatever it is.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again.
        rngs: For the initial parameters, drawn as Hugging Face draws them.

    Example:
        >>> config = Gemma2Config.from_hf(
        ...     dict(model_type="gemma2", vocab_size=64, hidden_size=32, intermediate_size=48,
        ...          num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        ... )
        >>> Gemma2(config, rngs=nnx.Rngs(0))(jnp.zeros((1, 5), jnp.int32)).shape
        (1, 5, 64)

    Source:
        Gemma Team, Gemma 2, https://arxiv.org/abs/2408.00118, section 2.
    """

    architecture = Gemma2Config.architecture
    layer = DecoderLayer

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: Remat = "dots",
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, remat=remat, rngs=rngs)
        self.norm = _norm(config, param_dtype)

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """Gives the input of the first layer, `(b, t, hidden)`, of tokens `(b, t)`."""
        # The scale is rounded to the dtype of the computation, as in transformers.
        scale = jnp.float32(self.config.hidden_size**0.5).astype(self.dtype)
        return super().embedded(tokens) * scale

    def masks(self, visible: jax.Array) -> PerLayer:
        """Restricts the mask `(b, t, s)` to the window, in the layers that have it."""
        config = self.config
        return PerLayer.of(config.kinds, visible, windowed(visible, config.sliding_window))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Applies the head, and the soft cap of logits; see `LanguageModel.logits`."""
        return softcapped(super().logits(hidden), self.config.final_logit_softcapping)

    @staticmethod
    def parameter_table(config: DecoderConfig) -> ParameterTable:
        """Makes the parameter table of a model of this configuration."""
        return llama.with_norms(
            Llama.parameter_table(config),
            ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        )


def _norm(config: DecoderConfig, param_dtype: DTypeLike) -> RMSNorm:
    return RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=param_dtype)


def _gemma2(layers: int, **sizes: int) -> Gemma2Config:
    return Gemma2Config.from_hf({"model_type": "gemma2", "num_hidden_layers": layers, **sizes})


# As in the config.json that was published with each.
_WELL_KNOWN: Mapping[str, Gemma2Config] = {
    "gemma-2-2b": _gemma2(26),
    "gemma-2-9b": _gemma2(
        42,
        hidden_size=3584,
        intermediate_size=14_336,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "gemma-2-27b": _gemma2(
        46,
        hidden_size=4608,
        intermediate_size=36_864,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,
    ),
}

FAMILY = Family(
    model_type=Gemma2Config.model_type,
    config=Gemma2Config,
    models={"causal-lm": Gemma2},
    prefix="model.",
    sizes=_WELL_KNOWN,
)
