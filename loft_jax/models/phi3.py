"""The Phi-3 family: a Llama whose projections are fused, which may rotate a part of each head.

`qkv_proj` and `gate_up_proj` stay one layer each, as PEFT adapts them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from loft_jax.errors import InputError, shown
from loft_jax.models import config_checks, llama
from loft_jax.models.activations import laid_out
from loft_jax.models.decoder_config import DecoderConfig
from loft_jax.models.family import Family, ParameterTable, linear
from loft_jax.models.llama import Llama
from loft_jax.models.parts import Parts
from loft_jax.models.rope_scaling import LongRopeScaling


@dataclasses.dataclass(frozen=True)
class Phi3Config(DecoderConfig):
    """Sizes and constants of a Phi-3, under the names of Hugging Face's `config.json`.

    A token sees the last `sliding_window` tokens, itself included; None: all of them. The first
    `partial_rotary_factor` of the dimensions of a head rotate.

    Example:
        >>> config = Phi3Config.from_hf(
        ...     dict(model_type="phi3", vocab_size=64, hidden_size=32, intermediate_size=48,
        ...          num_hidden_layers=2, num_attention_heads=4, partial_rotary_factor=0.75)
        ... )
        >>> config.head_dim, config.rotary_dim
        (8, 6)
    """

    model_type: ClassVar[str] = "phi3"
    architecture: ClassVar[str] = "Phi3ForCausalLM"
    only: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "is_causal": True,
        "quantization_config": None,
    }

    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    partial_rotary_factor: float = 1.0
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        part, name = self.partial_rotary_factor, "original_max_position_embeddings"
        if not config_checks.is_positive(part) or part > 1:
            raise InputError(
                f"config: partial_rotary_factor is {shown(part)}, expected a number in (0, 1]"
            )
        config_checks.check_values(self, sizes={name: config_checks.MOST_POSITIONS})
        super().__post_init__()
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise InputError(
                f"config: partial_rotary_factor is {part} and head_dim is {self.head_dim}, so that "
                f"{self.rotary_dim} dimensions rotate, expected an even number"
            )
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, LongRopeScaling):
            raise InputError(
                f"config: rope_type is {self.rope_scaling.rope_type!r}, only 'default' and "
                "'longrope' are supported"
            )

    @property
    def rotary_dim(self) -> int:
        """The number of dimensions of a head that rotate."""
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of a Hugging Face `config.json`; see `FamilyConfig.from_hf`."""
        config = {"bos_token_id": 1, "eos_token_id": 32_000, "pad_token_id": 32_000, **config}
        for name in ("max_position_embeddings", "original_max_position_embeddings"):
            if config.get(name) is None:
                config[name] = 4096
        for key in ("rope_scaling", "rope_parameters"):
            if isinstance(config.get(key), Mapping):
                rope = config[key] = dict(config[key])
                part = rope.pop("partial_rotary_factor", None)
                if part is not None:
                    config["partial_rotary_factor"] = part
                for name in ("type", "rope_type"):
                    if rope.get(name) in ("su", "yarn"):  # names of longrope in early releases
                        rope[name] = "longrope"
        return super().from_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers loads."""
        config = super().to_hf()
        if rope := config["rope_scaling"]:
            # Earlier releases refuse other fields than these.
            del rope["original_max_position_embeddings"]
            config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
        return config


class SelfAttention(llama.SelfAttention):
    """Rotary grouped-query self-attention, with one projection for queries, keys and values."""

    def __init__(self, config: DecoderConfig, parts: Parts) -> None:
        self.head_dim = config.head_dim
        width, kv_width = (
            heads * config.head_dim
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.ends = (width, width + kv_width)
        self.qkv_proj = parts.linear(config.hidden_size, width + 2 * kv_width, use_bias=False)
        self.o_proj = parts.linear(width, config.hidden_size, use_bias=False)

    def projected(self, x: jax.Array) -> list[jax.Array]:
        """Gives queries, keys and values `(b, t, heads * head_dim)` of `x (b, t, hidden)`."""
        return jnp.split(laid_out(self.qkv_proj(x)), self.ends, axis=-1)


class MLP(llama.MLP):
    """SwiGLU: `down(silu(gate) * up)`, with one projection for gate and up."""

    def __init__(self, config: DecoderConfig, parts: Parts) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = parts.linear(width, 2 * inner, use_bias=False)
        self.down_proj = parts.linear(inner, width, use_bias=False)

    def projected(self, x: jax.Array) -> list[jax.Array]:
        """Gives the gate and what it multiplies, `(b, t, inner)`, of `x (b, t, hidden)`."""
        return jnp.split(laid_out(self.gate_up_proj(x), features=2), 2, axis=-1)


class DecoderLayer(llama.DecoderLayer):
    """The layer of a Llama, with fused projections."""

    attention = SelfAttention
    feed_forward = MLP


class Phi3(Llama):
    """A decoder-only language model of the Phi-3 family, without a mixture of experts.

    Args:
        config: Sizes and constants.
        dtype: What it computes in. Norms, rotations, softmax and logits are float32 whatever it is.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again.
        rngs: For the initial parameters.

    Example:
        >>> from flax import nnx
        >>> config = Phi3Config(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                     num_hidden_layers=2, num_attention_heads=4,
        ...                     num_key_value_heads=2, head_dim=8, sliding_window=3)
        >>> Phi3(config, rngs=nnx.Rngs(0))(jnp.zeros((1, 5), jnp.int32)).shape
        (1, 5, 64)

    Source:
        Abdin et al., Phi-3 Technical Report, https://arxiv.org/abs/2404.14219, section 2.
    """

    architecture = Phi3Config.architecture
    layer = DecoderLayer

    @staticmethod
    def parameter_table(config: DecoderConfig) -> ParameterTable:
        """Makes the parameter table of a model of this configuration."""
        table = Llama.parameter_table(config)
        apart = r".*\.(q|k|v|gate|up)_proj\..*"
        tensors = {
            **{path: row for path, row in table.tensors.items() if not re.fullmatch(apart, path)},
            # Queries, keys and values of all heads side by side: no even parts are whole heads.
            **linear(
                "layers.self_attn.qkv_proj",
                "model.layers.{}.self_attn.qkv_proj",
                ("embed", None),
            ),
            **linear(
                "layers.mlp.gate_up_proj", "model.layers.{}.mlp.gate_up_proj", ("embed", "mlp")
            ),
        }
        return dataclasses.replace(table, tensors=tensors)


def _phi_3(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> Phi3Config:
    return Phi3Config(
        vocab_size=32_064,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        sliding_window=2047,
        bos_token_id=1,
        eos_token_id=32_000,
        pad_token_id=32_000,
    )


FAMILY = Family(
    model_type=Phi3Config.model_type,
    config=Phi3Config,
    models={"causal-lm": Phi3},
    prefix="model.",
    # As in the config.json that was published with each.
    sizes={
        "phi-3-mini-4k": _phi_3(3072, 8192, 32, 32, 32),
        "phi-3-medium-4k": _phi_3(5120, 17_920, 40, 40, 10),
    },
)
