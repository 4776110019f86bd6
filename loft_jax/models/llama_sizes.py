"""Well-known Llamas by name, for what needs a model's sizes and none of its weights."""

from collections.abc import Mapping

from loft_jax.models.llama_config import LlamaConfig


def _llama_2(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def _llama_3(hidden: int, mlp: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
    )


# As in the config.json that Meta published for each.
LLAMA_SIZES: Mapping[str, LlamaConfig] = {
    "llama-2-7b": _llama_2(4096, 11_008, 32, 32, 32),
    "llama-2-13b": _llama_2(5120, 13_824, 40, 40, 40),
    "llama-2-70b": _llama_2(8192, 28_672, 80, 64, 8),
    "llama-3-8b": _llama_3(4096, 14_336, 32, 32),
    "llama-3-70b": _llama_3(8192, 28_672, 80, 64),
}
