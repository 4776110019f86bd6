"""Model families in Flax NNX, one file each, and the interface that they implement."""

from loft_jax.models.family import Head, Remat
from loft_jax.models.quantized import Quantization

__all__ = ["Head", "Quantization", "Remat"]
