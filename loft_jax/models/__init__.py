"""Model families in Flax NNX, one file each, and what the library needs to know of them."""

from loft_jax.models.family import Head, Remat
from loft_jax.models.llama import Llama, LlamaConfig
from loft_jax.models.quantized import Quantization
from loft_jax.models.rope import RopeScaling

__all__ = ["Head", "Llama", "LlamaConfig", "Quantization", "Remat", "RopeScaling"]
