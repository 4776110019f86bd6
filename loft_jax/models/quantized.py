"""Frozen weights in 8 or 4 bits, which layers use as if they were not quantized.

The format and the rounding to integers are Qwix's. NF4 is encoded and decoded here, with the same
result: Qwix flattens the array, which gathers it if it is split over devices, and makes 16 arrays
of its size.

Layers read a kernel as `kernel[...]`, which here gives the dequantized matrix; with stacked layers
under a scan, that of one layer at a time. So layers and LoRA need no changes.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Sharding

from loft_jax.errors import InputError, check_choice
from loft_jax.models.family import PretrainedModel

Quantization = Literal["none", "int8", "nf4"]
"""Storage of frozen kernels; see `quantize_kernels`."""

_TILE = 64  # inputs that share a scale, as in QLoRA
_SMALLEST_TILE = 16

# The values that the 16 codes of NF4 stand for (Dettmers et al., arXiv 2305.14314, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class QuantizedParam(nnx.Param[Any]):
    """A parameter that holds a `qwix.QArray`; indexing gives its dequantized values."""

    def __getitem__(self, key: Any) -> jax.Array:
        value = self.get_value()
        return (value if isinstance(value, jax.Array) else dequantize(value))[key]


def quantize_kernels(model: PretrainedModel, quantization: Quantization) -> None:
    """Quantizes the kernels of the linear layers in a model's stack of layers, in place.

    Embeddings, norms and heads are not quantized.

    Args:
        model: A model of a family; under `nnx.eval_shape`, with shapes only.
        quantization: "int8": integers with a scale for each output. "nf4": 4-bit NormalFloats with
            a scale for each output and 64 inputs. "none" does nothing.

    Raises:
        InputError: There is no such storage, Qwix is not installed, or the number of inputs of a
            kernel cannot be divided into tiles.

    Example:
        >>> from loft_jax.models.llama import Llama, LlamaConfig
        >>> model = Llama(LlamaConfig(64, 32, 48, 2, 4, 2, 8), rngs=nnx.Rngs(0))
        >>> quantize_kernels(model, "int8")
        >>> model.layers.mlp.up_proj.kernel.get_value().qvalue.dtype
        dtype('int8')

    Source:
        Dettmers et al., QLoRA, arXiv 2305.14314; https://github.com/google/qwix.
    """
    check_choice("quantization", quantization, get_args(Quantization))
    if quantization == "none":
        return
    tensors = model.table.tensors
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, (*path, "kernel")))
        if isinstance(module, nnx.Linear) and tensors[name].stacked:
            kernel = quantize(module.kernel[...], quantization, name=name)
            module.kernel = QuantizedParam(kernel)


def quantize(
    kernel: jax.Array,
    quantization: Quantization,
    *,
    name: str,
    placement: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> Any:
    """Rounds a kernel to fewer bits.

    Args:
        kernel: (layers, in, out).
        quantization: As for `quantize_kernels`; not "none".
        name: Dotted path of the kernel.
        placement: Gives the shardings of `name.qvalue` and `name.scale` by path and shape.

    Returns:
        A `qwix.QArray`.

    Raises:
        InputError: As `quantize_kernels`.
    """
    tile = math.gcd(_TILE, kernel.shape[1])
    if quantization == "nf4" and tile < _SMALLEST_TILE:
        raise InputError(
            f"{name}: has {kernel.shape[1]} inputs, expected a multiple of {_SMALLEST_TILE} for nf4"
        )
    rounded = functools.partial(_rounded, quantization=quantization, tile=tile)
    if placement is None:
        return rounded(kernel)
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, part: placement(
            f"{name}.{jax.tree_util.keystr(path, simple=True)}", part.shape
        ),
        jax.eval_shape(rounded, kernel),
    )
    return jax.jit(rounded, out_shardings=shardings)(kernel)


def _rounded(kernel: jax.Array, *, quantization: str, tile: int) -> Any:
    try:
        import qwix
    except ImportError as error:
        raise InputError(
            "qwix, which quantizes, is not installed; expected: pip install 'loft-jax[quantized]'"
        ) from error

    def to_int8(layer: jax.Array) -> Any:
        return qwix.quantize(layer, "int8", channelwise_axes=(1,))

    def to_nf4(layer: jax.Array) -> Any:
        tiles = layer.reshape(-1, tile, layer.shape[1])
        largest = jnp.max(jnp.abs(tiles), axis=1)  # (tiles, out)
        scale = jnp.where(largest == 0, 1, largest)
        relative = tiles.astype(jnp.float32) / scale[:, None].astype(jnp.float32)
        return qwix.QArray(_nf4_codes(relative).reshape(layer.shape), scale, qtype="nf4")

    return jax.lax.map(to_int8 if quantization == "int8" else to_nf4, kernel)


def dequantize(array: Any) -> jax.Array:
    """Dequantizes a `qwix.QArray`, in the dtype of its scale.

    Args:
        array: An array of any shape, tiled along its axis of inputs, the second last.

    Returns:
        An array of the same shape.
    """
    scale = array.scale
    codes = array.qvalue.astype(jnp.int32)
    values = _nf4_values(codes) if array.qtype == "nf4" else codes
    *stack, inputs, outputs = array.shape
    tiles = values.reshape(*stack, scale.shape[-2], inputs // scale.shape[-2], outputs)
    return (tiles.astype(scale.dtype) * scale[..., None, :]).reshape(array.shape)


def _nf4_codes(values: jax.Array) -> jax.Array:
    """Finds the nearest of the 16 values, by counting the midpoints below."""
    middles = [(low + high) / 2 for low, high in itertools.pairwise(_NF4)]
    below = [(values > middle).astype(jnp.uint8) for middle in middles]
    return functools.reduce(jnp.add, below).astype(jnp.uint4)


def _nf4_values(codes: jax.Array) -> jax.Array:
    """Decodes by a tree of selections, one level per bit; TPUs have no fast lookup of elements."""
    values: list[Any] = list(_NF4)
    bit = 1
    while len(values) > 1:
        odd = (codes & bit) > 0
        values = [jnp.where(odd, high, low) for low, high in zip(*[iter(values)] * 2, strict=True)]
        bit *= 2
    return values[0]
