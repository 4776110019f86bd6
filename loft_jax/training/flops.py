"""Floating-point operations of a step, and of the chips that compute it."""

import math
from dataclasses import dataclass

import jax
from flax import nnx

from loft_jax.models.family import PretrainedModel, flat_parameters

# Dense bfloat16 operations a second, by JAX's name of the device: Google's and NVIDIA's figures.
_PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


@dataclass(frozen=True)
class ModelFlops:
    """Model FLOPs of one trained token: 2 a weight and pass, and those of the attention scores.

    There are three passes: forward, the gradient of activations, and the gradient of weights. The
    last one is left out where the base is frozen; adapters are not counted, nor is what is
    computed again, nor a head that reads one token of a row.

    Attributes:
        weights: Elements of the weights that every token is multiplied with.
        width: Of the heads of all layers together.

    Source:
        Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.
    """

    weights: int
    width: int

    @classmethod
    def of(cls, model: PretrainedModel) -> "ModelFlops":
        """Counts the weights of a model by its table of parameters.

        Args:
            model: Shapes are enough; adapters are passed over.

        Returns:
            What its tokens meet: kernels of the layers, a head of the vocabulary, tied or not.

        Example:
            >>> from loft_jax.models.registry import WELL_KNOWN
            >>> family, config = WELL_KNOWN["llama-2-7b"]
            >>> make = family.model("causal-lm")
            >>> flops = ModelFlops.of(nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0))))
            >>> f"{flops.per_token(4096, full=True):.3g}"
            '4.61e+10'
        """
        weights = width = 0
        table = model.table
        for path, parameter in flat_parameters(model, nnx.Param).items():
            if path.rpartition(".")[2] not in ("kernel", "embedding"):
                continue
            tensor = table.tensor(path)
            if tensor.tied or tensor.axes[-1] == "vocab" or tensor.stacked:
                weights += math.prod(parameter.shape)
            if tensor.stacked and tensor.axes[0] == "heads":
                width += parameter.shape[0] * parameter.shape[1]  # (layers, heads, embed)
        return cls(weights, width)

    def per_token(self, length: int, *, full: bool) -> float:
        """Multiplications and additions.

        Args:
            length: Tokens of a row, which a token attends to; masked ones count, as is the custom.
            full: Whether all weights are trained.

        Returns:
            FLOPs of one token.
        """
        passes = 3 if full else 2
        return float(passes * 2 * self.weights + 3 * 4 * self.width * length)


def peak_flops(device: jax.Device) -> float | None:
    """FLOPs a second that a device is sold with, in bfloat16; None for one that is not known."""
    return _PEAK.get(device.device_kind)
