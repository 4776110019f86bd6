"""Model families in Flax NNX, one file each, and what the library needs to know of them."""

from loft_jax.models.family import Head, Remat
from loft_jax.models.quantized import Quantization

__all__ = ["Head", "Quantization", "Remat"]
