"""LoRA on Flax NNX models: low-rank factors beside frozen weights, added and merged in place.

`loft_jax.lora.linen` is for Linen models.
"""

from loft_jax.lora.average import average_adapters, sum_adapters
from loft_jax.lora.config import LoRAConfig
from loft_jax.lora.inject import add_lora, merge_lora, remove_lora
from loft_jax.lora.layers import LoRALayer, LoRAStart
from loft_jax.lora.register import register_lora_layer
from loft_jax.lora.stacks import with_full_stacks
from loft_jax.lora.targets import lora_layers, scaling_of, stack_axis_of

__all__ = [
    "LoRAConfig",
    "LoRALayer",
    "LoRAStart",
    "add_lora",
    "average_adapters",
    "lora_layers",
    "merge_lora",
    "register_lora_layer",
    "remove_lora",
    "scaling_of",
    "stack_axis_of",
    "sum_adapters",
    "with_full_stacks",
]
