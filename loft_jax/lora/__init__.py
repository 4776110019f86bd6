"""LoRA on Flax NNX models: low-rank factors beside frozen weights, added and merged in place."""

from loft_jax.lora.config import LoRAConfig
from loft_jax.lora.inject import add_lora, lora_layers, merge_lora, remove_lora
from loft_jax.lora.layers import LoRALayer, LoRAStart

__all__ = [
    "LoRAConfig",
    "LoRALayer",
    "LoRAStart",
    "add_lora",
    "lora_layers",
    "merge_lora",
    "remove_lora",
]
