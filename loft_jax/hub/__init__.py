"""Reads and writes weights, tokenizers and adapters in the formats of other libraries."""

from loft_jax.hub.peft_factors import load_peft_factors
from loft_jax.hub.peft_load import load_peft_adapter
from loft_jax.hub.peft_save import save_peft_adapter
from loft_jax.hub.pretrained import (
    load_model_config,
    load_pretrained,
    load_processor,
    load_tokenizer,
    save_pretrained,
)

__all__ = [
    "load_model_config",
    "load_peft_adapter",
    "load_peft_factors",
    "load_pretrained",
    "load_processor",
    "load_tokenizer",
    "save_peft_adapter",
    "save_pretrained",
]
