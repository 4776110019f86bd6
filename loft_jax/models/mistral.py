"""The Mistral family: a Llama whose attention may be limited to a window."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from loft_jax.models.decoder_config import DecoderConfig
from loft_jax.models.family import Family
from loft_jax.models.llama import FAMILY as LLAMA
from loft_jax.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class MistralConfig(DecoderConfig):
    """Sizes and constants of a Mistral, under the names of Hugging Face's `config.json`.

    A token sees the last `sliding_window` tokens, itself included; None: all of them.

    Example:
        >>> config = MistralConfig.from_hf(
        ...     dict(model_type="mistral", vocab_size=64, hidden_size=32, intermediate_size=48,
        ...          num_hidden_layers=2, num_attention_heads=16)
        ... )
        >>> config.num_key_value_heads, config.sliding_window
        (8, 4096)
    """

    model_type: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"
    only: ClassVar[Mapping[str, Any]] = {**DecoderConfig.only, "layer_types": None}

    max_position_embeddings: int = 131_072
    sliding_window: int | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of a Hugging Face `config.json`; see `FamilyConfig.from_hf`."""
        absent = {"num_key_value_heads": 8, "sliding_window": 4096}
        return super().from_hf({**absent, "bos_token_id": 1, "eos_token_id": 2, **config})


class Mistral(Llama):
    """A decoder-only language model of the Mistral family.

    Args:
        config: Sizes and constants.
        dtype: What it computes in. Norms, rotations, softmax and logits are float32 whatever it is.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again.
        rngs: For the initial parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> config = MistralConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                        num_hidden_layers=2, num_attention_heads=4,
        ...                        num_key_value_heads=2, head_dim=8, sliding_window=3)
        >>> Mistral(config, rngs=nnx.Rngs(0))(jnp.zeros((1, 5), jnp.int32)).shape
        (1, 5, 64)

    Source:
        Jiang et al., Mistral 7B, https://arxiv.org/abs/2310.06825, section 2.
    """

    architecture = MistralConfig.architecture


def _mistral_7b(**later: Any) -> MistralConfig:
    """The first release, or a later one that differs in some fields."""
    return MistralConfig(
        **{
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            **later,
        }
    )


FAMILY = Family(
    model_type=MistralConfig.model_type,
    config=MistralConfig,
    models={"causal-lm": Mistral},
    prefix=LLAMA.prefix,
    ignored=LLAMA.ignored,
    # As in the config.json that was published with each.
    sizes={
        "mistral-7b": _mistral_7b(),
        "mistral-7b-v0.3": _mistral_7b(vocab_size=32_768, rope_theta=1e6, sliding_window=None),
    },
)
