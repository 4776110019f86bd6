"""What a Llama is made of: its sizes and constants, from and to a Hugging Face ``config.json``."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeGuard

from loft_jax.errors import InputError, cut, shown

_ARCHITECTURES = ("llamaforcausallm",)

# Fields that change what a Llama computes, with the one value that is implemented.
_ONLY: Mapping[str, Any] = {
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "quantization_config": None,
    "sliding_window": None,
}


# What no model comes near: larger sizes are damage, or meant to take all memory.
_MOST: Mapping[str, int] = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**13,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**16,
    "max_position_embeddings": 2**31,
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context they were trained on.

    Args:
        rope_type: ``"linear"`` divides every frequency by ``factor``; ``"llama3"`` divides the
            low ones, keeps the high ones, and blends between the two.
        factor: The stretch.
        low_freq_factor: Below ``original_max_position_embeddings / low_freq_factor`` rotations
            per context, a frequency counts as low. ``"llama3"`` only, as are the next two.
        high_freq_factor: The same for high frequencies.
        original_max_position_embeddings: Context length of pretraining, in tokens.
    """

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a Llama, under the names of Hugging Face's ``config.json``.

    Example:
        >>> config = LlamaConfig.from_hf(
        ...     dict(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48,
        ...          num_hidden_layers=2, num_attention_heads=4)
        ... )
        >>> config.num_key_value_heads, config.head_dim
        (4, 8)
    """

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
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise InputError(
                    f"config: {name} is {shown(value)}, expected an integer from 1 to {most}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config: num_key_value_heads is {self.num_key_value_heads}, "
                f"expected a divisor of num_attention_heads ({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"config: head_dim is {self.head_dim}, expected an even number")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if not _is_positive(value):
                raise InputError(f"config: {name} is {shown(value)}, expected a positive number")
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InputError(f"config: {name} is {shown(value)}, expected true or false")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            tokens = value if isinstance(value, tuple) and name == "eos_token_id" else (value,)
            if not all(token is None or type(token) is int for token in tokens):
                raise InputError(f"config: {name} is {shown(value)}, expected a token's number")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the contents of a Hugging Face ``config.json``.

        Takes what Llama 1, 2 and 3.x, SmolLM2 and TinyLlama write, the older keys
        (``rope_theta``, ``rope_scaling``) as well as the newer one (``rope_parameters``). Absent
        fields take the defaults transformers gives them; fields that transformers' own Llama does
        not read either (a version, a cache switch) have no effect.

        Args:
            config: The parsed JSON.

        Returns:
            The configuration.

        Raises:
            InputError: Another architecture, or a field whose value is not supported.
        """
        model_type = config.get("model_type")
        if model_type != "llama":
            raise InputError(
                f"config: model_type is {shown(model_type)}, only 'llama' is supported"
            )
        architectures = config.get("architectures") or ()
        if not isinstance(architectures, (list, tuple)):
            raise InputError(f"config: architectures is {shown(architectures)}, expected a list")
        for name in architectures:
            if str(name).lower() not in _ARCHITECTURES:
                raise InputError(
                    f"config: architectures names {shown(name)}, only 'LlamaForCausalLM' is "
                    "supported"
                )
        for name, only in _ONLY.items():
            value = config.get(name, only)
            if value is not None and value != only:
                raise InputError(f"config: {name} is {shown(value)}, only {only!r} is supported")
        sizes: dict[str, Any] = {
            name: _required(config, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            )
        }
        heads = sizes["num_attention_heads"]
        head_dim = config.get("head_dim")
        if head_dim is None:
            if sizes["hidden_size"] % heads:
                raise InputError(
                    f"config: hidden_size is {shown(sizes['hidden_size'])}, expected a multiple of "
                    f"num_attention_heads ({heads})"
                )
            head_dim = sizes["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads")
        optional: dict[str, Any] = {
            name: config[name]
            for name in (
                "max_position_embeddings",
                "rms_norm_eps",
                "tie_word_embeddings",
                "attention_bias",
                "mlp_bias",
                "initializer_range",
                "bos_token_id",
                "pad_token_id",
            )
            if config.get(name) is not None
        }
        eos = config.get("eos_token_id")
        rope_theta, rope_scaling = _rope(config)
        return cls(
            **sizes,
            **optional,
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            eos_token_id=tuple(eos) if isinstance(eos, (list, tuple)) else eos,
        )

    def to_hf(self) -> dict[str, Any]:
        """Gives the contents of a ``config.json`` that transformers loads.

        Rotary settings are written under the older keys, which every release reads.
        """
        fields = dataclasses.asdict(self)
        if self.rope_scaling is not None:
            fields["rope_scaling"] = {
                name: value for name, value in fields["rope_scaling"].items() if value is not None
            }
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            **fields,
        }


def _is_positive(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float) and 0 < value <= _MOST_NUMBER


_MOST_NUMBER = 3e38  # of float32, in which it is computed


def _required(config: Mapping[str, Any], name: str) -> int:
    if config.get(name) is None:
        raise InputError(f"config: {name} is missing")
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config: {name} is {shown(value)}, expected an integer of 1 or more")
    return value


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from whichever of the two spellings the file has."""
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
    if not _is_positive(theta):
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
        if not _is_positive(value):
            raise InputError(f"config: {key}.{name} is {shown(value)}, expected a positive number")
    if rope_type == "default":
        return float(theta), None
    if rope_type == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise InputError(
            f"config: {key}.low_freq_factor is {rope['low_freq_factor']}, expected less than "
            f"high_freq_factor, {rope['high_freq_factor']}"
        )
    return float(theta), RopeScaling(rope_type=rope_type, **{name: rope[name] for name in names})
