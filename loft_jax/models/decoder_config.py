"""The configuration that Llama and the families made of its modules share."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from loft_jax.errors import InputError, shown
from loft_jax.models import config_checks
from loft_jax.models.family_config import FamilyConfig
from loft_jax.models.rope_config import read_rope, rope_scaling_to_hf
from loft_jax.models.rope_scaling import RopeScaling

_SIZES: Mapping[str, int] = {
    "vocab_size": config_checks.MOST_TOKENS,
    "hidden_size": config_checks.MOST_HIDDEN,
    "intermediate_size": config_checks.MOST_FEATURES,
    "num_hidden_layers": config_checks.MOST_LAYERS,
    "num_attention_heads": config_checks.MOST_HEADS,
    "num_key_value_heads": config_checks.MOST_HEADS,
    "head_dim": config_checks.MOST_HEAD_DIM,
    "max_position_embeddings": config_checks.MOST_POSITIONS,
}
_WINDOW: Mapping[str, int] = {"sliding_window": config_checks.MOST_POSITIONS}


@dataclasses.dataclass(frozen=True)
class DecoderConfig(FamilyConfig):
    """The part of the configuration that Llama and the families made of its modules share."""

    only: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "partial_rotary_factor": 1.0,
        "is_causal": True,
        "quantization_config": None,
    }

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    # Without a type, these are no fields; a family that has biases makes them fields of its own.
    attention_bias = False
    mlp_bias = False

    def __post_init__(self) -> None:
        config_checks.check_values(
            self,
            sizes=_SIZES if self.sliding_window is None else {**_SIZES, **_WINDOW},
            positive=("rms_norm_eps", "rope_theta", "initializer_range"),
            flags=[field.name for field in dataclasses.fields(self) if field.type is bool],
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config: num_key_value_heads is {self.num_key_value_heads}, "
                f"expected a divisor of num_attention_heads ({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"config: head_dim is {self.head_dim}, expected an even number")
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.rotary_dim, self.rope_theta)

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return self.attention_bias

    @property
    def sliding_window(self) -> int | None:
        """The number of positions that attention looks back; None for all."""
        return None

    @property
    def rotary_dim(self) -> int:
        """The number of dimensions of a head that rotate."""
        return self.head_dim

    @property
    def max_length(self) -> None:
        """None, since positions are computed."""

    @classmethod
    def fields_from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the fields that the contents of a `config.json` of the family set.

        Takes the older keys (`rope_theta`, `rope_scaling`) as well as the newer one
        (`rope_parameters`).
        """
        fields = super().fields_from_hf(config)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        ):
            config_checks.required(config, name)
        width, heads = fields["hidden_size"], fields["num_attention_heads"]
        if "head_dim" not in fields:
            if width % heads:
                raise InputError(
                    f"config: hidden_size is {shown(width)}, expected a multiple of "
                    f"num_attention_heads ({heads})"
                )
            fields["head_dim"] = width // heads
        fields.setdefault("num_key_value_heads", heads)
        fields["rope_theta"], fields["rope_scaling"] = read_rope(config)
        return fields

    def fields_to_hf(self) -> dict[str, Any]:
        """Gives the fields as `config.json` has them.

        Rotary settings are written under the older keys, which every release reads.
        """
        fields = super().fields_to_hf()
        fields["rope_scaling"] = rope_scaling_to_hf(self.rope_scaling)
        return {"hidden_act": "silu", **fields}
