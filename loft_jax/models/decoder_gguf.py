"""GGUF files of Llama and the families made of its modules: names, metadata and configuration."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from loft_jax.errors import InputError, shown
from loft_jax.models import config_checks
from loft_jax.models.decoder_config import DecoderConfig
from loft_jax.models.rope import inverse_frequencies
from loft_jax.models.rope_scaling import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
)


class DecoderGGUF:
    """Maps Llama and the families made of its modules to GGUF files, in both directions.

    Attributes:
        architecture: GGUF's name of the family.
        constants: Names of tensors that belong to the configuration.
        config_class: Class of its configurations.
        in_layer: Hugging Face's names of modules in a layer by those of GGUF.
    """

    architecture: str
    config_class: type[DecoderConfig]
    constants: Collection[str] = ("rope_freqs.weight",)

    _top: Mapping[str, str] = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    }
    in_layer: Mapping[str, str] = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }

    def name(self, name: str) -> str:
        """Gives Hugging Face's name of a tensor; a tensor without one keeps its own."""
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
            layer, module, parameter = match.groups()
            if module in self.in_layer:
                return f"model.layers.{layer}.{self.in_layer[module]}.{parameter}"
        module, _, parameter = name.rpartition(".")
        return f"{self._top[module]}.{parameter}" if module in self._top else name

    def stored_name(self, name: str) -> str:
        """Gives GGUF's name of a tensor of Hugging Face's name; the inverse of `name`."""
        module, _, parameter = name.rpartition(".")
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
            layer, within = match.groups()
            return f"blk.{layer}.{_key_of(within, self.in_layer)}.{parameter}"
        return f"{_key_of(module, self._top)}.{parameter}"

    def stored_rows(self, name: str, rows: np.ndarray, config: Any) -> np.ndarray:
        """Gives the stored positions of rows: here, their own."""
        return rows

    def contents(self, config: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Gives the metadata and the constants of a configuration; the inverse of `config`.

        A configuration that a file cannot hold is another one when it is read again.
        """
        own, scaling = self.architecture, config.rope_scaling
        metadata = {
            f"{own}.vocab_size": config.vocab_size,
            f"{own}.context_length": config.max_position_embeddings,
            f"{own}.embedding_length": config.hidden_size,
            f"{own}.block_count": config.num_hidden_layers,
            f"{own}.feed_forward_length": config.intermediate_size,
            f"{own}.attention.head_count": config.num_attention_heads,
            f"{own}.attention.head_count_kv": config.num_key_value_heads,
            f"{own}.attention.key_length": config.head_dim,
            f"{own}.attention.value_length": config.head_dim,
            f"{own}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            f"{own}.rope.dimension_count": config.head_dim,
            f"{own}.rope.freq_base": float(config.rope_theta),
        }
        if isinstance(scaling, LinearScaling):
            metadata[f"{own}.rope.scaling.type"] = "linear"
            metadata[f"{own}.rope.scaling.factor"] = float(scaling.factor)
        if isinstance(scaling, Llama3Scaling):
            plain = np.asarray(inverse_frequencies(config.head_dim, config.rope_theta, None))
            divisors = plain / scaling.scaled(plain, config.rope_theta, None)
            return metadata, {"rope_freqs.weight": divisors.astype(np.float32)}
        if isinstance(scaling, LongRopeScaling):  # as they are read
            return metadata, {"rope_freqs.weight": np.array(scaling.short_factor, np.float32)}
        return metadata, {}

    def config(
        self,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        constants: Mapping[str, np.ndarray],
    ) -> DecoderConfig:
        """Makes the configuration.

        Args:
            metadata: Of the file.
            shapes: Shapes of the parameters, by Hugging Face's names.
            constants: Values of those `constants` that the file has, float32.

        Returns:
            The configuration.

        Raises:
            InputError: Something is missing, or not supported.
        """
        return self.config_class(**self.fields(metadata, shapes, constants))

    def fields(
        self,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        constants: Mapping[str, np.ndarray],
    ) -> dict[str, Any]:
        """Gives the fields of the configuration; arguments are those of `config`."""
        own = self.architecture
        for key in (f"{own}.expert_count", f"{own}.attention.sliding_window"):
            if metadata.get(key):
                raise InputError(f"{key} is {shown(metadata[key])}, which is not supported")
        if not metadata.get(causal := f"{own}.attention.causal", True):
            raise InputError(f"{causal} is {shown(metadata[causal])}, only true is supported")
        hidden_size = _field(metadata, f"{own}.embedding_length")
        heads = _field(metadata, f"{own}.attention.head_count")
        if type(heads) is not int or heads < 1:
            raise InputError(
                f"{own}.attention.head_count is {shown(heads)}, expected an integer of 1 or more"
            )
        head_dim = metadata.get(f"{own}.attention.key_length", hidden_size // heads)
        for key in (f"{own}.attention.value_length", f"{own}.rope.dimension_count"):
            if metadata.get(key, head_dim) != head_dim:
                raise InputError(
                    f"{key} is {shown(metadata[key])}, expected the head size, {shown(head_dim)}"
                )
        context = _field(metadata, f"{own}.context_length")
        theta = _shortest(metadata.get(f"{own}.rope.freq_base", 10_000.0))
        if (divisors := constants.get("rope_freqs.weight")) is None:
            scaling = self._rope_scaling(metadata)
        else:
            scaling = self._scaling_by(divisors, metadata, head_dim, theta, context)
        return {
            "vocab_size": shapes.get("model.embed_tokens.weight", (0,))[0],
            "hidden_size": hidden_size,
            "intermediate_size": _field(metadata, f"{own}.feed_forward_length"),
            "num_hidden_layers": _field(metadata, f"{own}.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.get(f"{own}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": context,
            # float32 in the file: the shortest decimal that is the same float32 was meant
            "rms_norm_eps": _shortest(_field(metadata, f"{own}.attention.layer_norm_rms_epsilon")),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": "lm_head.weight" not in shapes,
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        }

    def _scaling_by(
        self,
        divisors: np.ndarray,
        metadata: Mapping[str, Any],
        head_dim: int,
        theta: float,
        context: int,
    ) -> RopeScaling:
        """Gives the scaling of a file with a divisor of each frequency, as those of Llama 3.x."""
        own = self.architecture
        kind, _ = self._named_scaling(metadata)
        if kind != "none":
            raise InputError(
                f"{own}.rope.scaling is {shown(kind)} beside the tensor 'rope_freqs.weight', "
                "expected one of them"
            )
        if divisors.shape != (head_dim // 2,) or not all(
            map(config_checks.is_positive, divisors.tolist())
        ):
            raise InputError(
                f"tensor 'rope_freqs.weight' of shape {divisors.shape} is "
                f"{shown(divisors.tolist())}, expected {head_dim // 2} positive numbers"
            )
        # The constants that all published models have.
        llama3 = Llama3Scaling(_shortest(divisors.max()), 1.0, 4.0, 8192)
        plain = np.asarray(inverse_frequencies(head_dim, theta, None))
        if np.allclose(plain / divisors, llama3.scaled(plain, theta, None), rtol=1e-5, atol=0):
            return llama3
        each = tuple(map(_shortest, divisors))
        return LongRopeScaling(each, each, context, context, attention_factor=1.0)

    def _rope_scaling(self, metadata: Mapping[str, Any]) -> RopeScaling | None:
        own = f"{self.architecture}.rope.scaling"
        kind, factor = self._named_scaling(metadata)
        if kind not in ("none", "linear"):
            raise InputError(f"{own}.type is {shown(kind)}, only 'none' and 'linear' are supported")
        if kind == "none":
            return None
        if factor is None:
            raise InputError(f"field '{own}.factor' is missing")
        return LinearScaling(_shortest(factor))

    def _named_scaling(self, metadata: Mapping[str, Any]) -> tuple[Any, Any]:
        """Gives the kind and the factor of a scaling: without a kind, a factor is a linear one's.

        As in llama.cpp, which also reads a factor's older name.
        """
        own = f"{self.architecture}.rope"
        if (attention := metadata.get(f"{own}.scaling.attn_factor", 1.0)) != 1.0:
            raise InputError(
                f"{own}.scaling.attn_factor is {shown(attention)}, only 1.0 is supported"
            )
        factor = metadata.get(f"{own}.scaling.factor", metadata.get(f"{own}.scale_linear"))
        return metadata.get(f"{own}.scaling.type", "none" if factor is None else "linear"), factor


def _key_of(value: str, names: Mapping[str, str]) -> str:
    return next(key for key, name in names.items() if name == value)


def _field(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise InputError(f"field {key!r} is missing")
    return metadata[key]


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))
