"""Floating-point operations of a step, and the peak rates of chips."""

import math
from dataclasses import dataclass

import jax
from flax import nnx

from loft_jax.models.family import PretrainedModel, flat_parameters

# Dense bfloat16 operations per second by JAX's device kind, from Google's and NVIDIA's figures.
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
    """Model FLOPs of one trained token: 2 for each weight and pass, plus the attention scores.

    There are three passes: forward, the gradient of the activations, and the gradient of the
    weights. A frozen base has no third pass. Adapters, recomputation and a head that reads one
    token of a row are not counted.

    Attributes:
        weights: Number of elements of the weights that every token is multiplied with.
        width: Total width of the attention heads of all layers.

    Source:
        Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.
    """

    weights: int
    width: int

    @classmethod
    def of(cls, model: PretrainedModel) -> "ModelFlops":
        """Counts the weights of a model by its parameter table.

        Args:
            model: Shapes are enough; adapters are ignored.

        Returns:
            Counts of the kernels of the layers and of the head of the vocabulary, tied or not.

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
        """Computes the FLOPs of one token.

        Args:
            length: Number of tokens of a row; all of them count as attended to, as is the custom.
            full: Whether all weights are trained.

        Returns:
            FLOPs of one token.
        """
        passes = 3 if full else 2
        return float(passes * 2 * self.weights + 3 * 4 * self.width * length)


def peak_flops(device: jax.Device) -> float | None:
    """Gives the peak bfloat16 FLOPs per second of a device; None if it is not known."""
    return _PEAK.get(device.device_kind)
