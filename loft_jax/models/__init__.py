"""Model families in Flax NNX, one file each, beside what the rest must know of them."""

from loft_jax.models.llama import Llama, Remat
from loft_jax.models.llama_config import LlamaConfig, RopeScaling
from loft_jax.models.quantized import Quantization

__all__ = ["Llama", "LlamaConfig", "Quantization", "Remat", "RopeScaling"]
