"""Weights, tokenizers and adapters as other libraries keep them, in and out."""

from loft_jax.hub.peft_load import load_peft_adapter
from loft_jax.hub.peft_save import save_peft_adapter
from loft_jax.hub.pretrained import (
    load_model_config,
    load_pretrained,
    load_tokenizer,
    save_pretrained,
)

__all__ = [
    "load_model_config",
    "load_peft_adapter",
    "load_pretrained",
    "load_tokenizer",
    "save_peft_adapter",
    "save_pretrained",
]
