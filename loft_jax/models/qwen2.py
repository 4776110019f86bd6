"""The Qwen2 family: a Llama with biases on queries, keys and values, and a window in some layers.

Qwen2.5 is of this family too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax

from loft_jax.errors import InputError, shown
from loft_jax.models import config_checks
from loft_jax.models.attention import windowed
from loft_jax.models.config_checks import FULL, SLIDING
from loft_jax.models.decoder_config import DecoderConfig
from loft_jax.models.decoder_gguf import DecoderGGUF
from loft_jax.models.family import Family
from loft_jax.models.llama import FAMILY as LLAMA
from loft_jax.models.llama import Llama
from loft_jax.models.stack import PerLayer


@dataclasses.dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """Sizes and constants of a Qwen2, under the names of Hugging Face's `config.json`.

    In layers whose type is "sliding_attention" a token sees the last `sliding_window` tokens,
    itself included; in those of "full_attention", all. Without a window both fields are None.

    Example:
        >>> config = Qwen2Config.from_hf(
        ...     dict(model_type="qwen2", vocab_size=64, hidden_size=128, intermediate_size=48,
        ...          num_hidden_layers=3, num_attention_heads=32, use_sliding_window=True,
        ...          sliding_window=16, max_window_layers=2)
        ... )
        >>> config.layer_types
        ('full_attention', 'full_attention', 'sliding_attention')
    """

    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"

    max_position_embeddings: int = 32_768
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.sliding_window is None) != (self.layer_types is None):
            raise InputError(
                f"config: sliding_window is {shown(self.sliding_window)} and layer_types is "
                f"{shown(self.layer_types)}, expected both or neither"
            )

    @property
    def qkv_bias(self) -> bool:
        """True for every model of the family."""
        return True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of a Hugging Face `config.json`; see `FamilyConfig.from_hf`."""
        return super().from_hf({"num_key_value_heads": 32, **config, **_window(config)})

    def to_hf(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers loads."""
        fields = super().to_hf()
        layer_types = fields.pop("layer_types")
        if layer_types is None:
            return {**fields, "use_sliding_window": False}
        return {
            **fields,
            "use_sliding_window": True,
            "layer_types": layer_types,
            # for releases that do not know layer_types; right where the last layers have the window
            "max_window_layers": layer_types.index(SLIDING),
        }


def _window(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the window, from any of the forms in which a `config.json` says them."""
    count = config_checks.required(config, "num_hidden_layers")
    types, used = config.get("layer_types"), config.get("use_sliding_window", False)
    if not isinstance(used, bool):
        raise InputError(f"config: use_sliding_window is {shown(used)}, expected true or false")
    window = config.get("sliding_window", 4096) if used else None
    if types is None:
        first = config.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise InputError(
                f"config: max_window_layers is {shown(first)}, expected an integer of 0 or more"
            )
        layers = range(min(count, config_checks.MOST_LAYERS))
        types = [SLIDING if window is not None and i >= first else FULL for i in layers]
    else:
        types = config_checks.layer_types(types, count)
    if SLIDING not in types:
        return {"sliding_window": None, "layer_types": None}
    if window is None:
        raise InputError(
            f"config: layer_types has {SLIDING!r}, expected use_sliding_window and sliding_window"
        )
    return {"sliding_window": window, "layer_types": tuple(types)}


class Qwen2(Llama):
    """A decoder-only language model of the Qwen2 and Qwen2.5 families.

    Args:
        config: Sizes and constants.
        dtype: What it computes in. Norms, rotations, softmax and logits are float32 whatever it is.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again.
        rngs: For the initial parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> config = Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                      num_hidden_layers=2, num_attention_heads=4,
        ...                      num_key_value_heads=2, head_dim=8)
        >>> Qwen2(config, rngs=nnx.Rngs(0))(jnp.zeros((1, 5), jnp.int32)).shape
        (1, 5, 64)

    Source:
        Yang et al., Qwen2 Technical Report, https://arxiv.org/abs/2407.10671, section 2.2; Qwen2.5
        Technical Report, https://arxiv.org/abs/2412.15115, section 2.
    """

    architecture = Qwen2Config.architecture

    def masks(self, visible: jax.Array) -> jax.Array | PerLayer:
        """Restricts the mask `(b, t, s)` to the window, in those layers that have it."""
        window, types = self.config.sliding_window, self.config.layer_types
        if window is None:
            return visible
        kinds = [int(kind == SLIDING) for kind in types]
        return PerLayer.of(kinds, visible, windowed(visible, window))


class _GGUF(DecoderGGUF):
    """GGUF files of the architecture "qwen2"."""

    architecture = "qwen2"
    config_class = Qwen2Config


def _qwen2(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, *, positions: int = 131_072
) -> Qwen2Config:
    """Models of up to 3B share the embedding with the head, and have fewer unused tokens."""
    small = hidden <= 2048
    return Qwen2Config(
        vocab_size=151_936 if small else 152_064,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-6 if hidden <= 3584 else 1e-5,
        rope_theta=1e6,
        tie_word_embeddings=small,
    )


# As in the config.json that was published with each.
_WELL_KNOWN: Mapping[str, Qwen2Config] = {
    "qwen2-0.5b": _qwen2(896, 4864, 24, 14, 2),
    "qwen2-1.5b": _qwen2(1536, 8960, 28, 12, 2),
    "qwen2-7b": _qwen2(3584, 18_944, 28, 28, 4),
    "qwen2-72b": _qwen2(8192, 29_568, 80, 64, 8),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, positions=32_768),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2),
    "qwen2.5-3b": _qwen2(2048, 11_008, 36, 16, 2, positions=32_768),
    "qwen2.5-7b": _qwen2(3584, 18_944, 28, 28, 4),
    "qwen2.5-14b": _qwen2(5120, 13_824, 48, 40, 8),
    "qwen2.5-32b": _qwen2(5120, 27_648, 64, 40, 8),
    "qwen2.5-72b": _qwen2(8192, 29_568, 80, 64, 8),
}

FAMILY = Family(
    model_type=Qwen2Config.model_type,
    config=Qwen2Config,
    models={"causal-lm": Qwen2},
    prefix=LLAMA.prefix,
    ignored=LLAMA.ignored,
    sizes=_WELL_KNOWN,
    gguf=_GGUF(),
)
