"""Makes the layers that models are made of, as Hugging Face initializes them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self, TypeVar

import jax
from flax import nnx
from jax.typing import DTypeLike

from loft_jax.models.stack import stack_layers

Layer = TypeVar("Layer", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Makes the layers of one model, of its dtypes and with its random numbers.

    Attributes:
        config: Of the model: `initializer_range`, and `rms_norm_eps` where it has such norms.
        dtype: Of computations.
        param_dtype: Of parameters.
        rngs: Random numbers.
    """

    config: Any
    dtype: DTypeLike
    param_dtype: DTypeLike
    rngs: nnx.Rngs

    @property
    def draw(self) -> Callable[..., jax.Array]:
        """The initializer of weights."""
        return nnx.initializers.normal(self.config.initializer_range)

    @property
    def own(self) -> dict[str, Any]:
        """The arguments that all layers have."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": self.rngs}

    def linear(self, inputs: int, outputs: int, **rest: Any) -> nnx.Linear:
        """Makes a linear layer."""
        return nnx.Linear(inputs, outputs, kernel_init=self.draw, **self.own, **rest)

    def embed(self, count: int, width: int) -> nnx.Embed:
        """Makes an embedding."""
        return nnx.Embed(count, width, embedding_init=self.draw, **self.own)

    def layer_norm(self, width: int, epsilon: float) -> nnx.LayerNorm:
        """Makes a norm with a mean."""
        return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, **self.own)

    def rms_norm(self, width: int) -> nnx.RMSNorm:
        """Makes a norm without a mean."""
        return nnx.RMSNorm(width, epsilon=self.config.rms_norm_eps, **self.own)

    def stack(self, count: int, make: Callable[[Self], Layer]) -> Layer:
        """Makes a stack of layers that differ only in their random numbers."""
        return stack_layers(
            count, lambda rngs: make(dataclasses.replace(self, rngs=rngs)), self.rngs
        )
