"""Model families in Flax NNX, one file each, and the interface that they implement."""

from loft_jax.models.family import Head, Remat
from loft_jax.models.llama import Llama, LlamaConfig
from loft_jax.models.quantized import Quantization
from loft_jax.models.rope import RopeScaling

__all__ = ["Head", "Llama", "LlamaConfig", "Quantization", "Remat", "RopeScaling"]
