"""LoRA subclasses of the Flax NNX layers; an instance of a layer changes its class in place.

Every class computes `base(x) + s dropout(x) A B`; with DoRA the result is scaled so that the
columns of the adapted weight have their magnitudes. The low-rank branch is computed in the dtype of
its layer, independent of the dtype of the stored factors.
"""

import copyreg
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import auto_axes

from loft_jax.errors import InputError
from loft_jax.lora.axes import (
    WeightAxes,
    einsum_axes,
    einsum_parts,
    general_axes,
    matrix_axes,
)
from loft_jax.lora.config import product_scaling
from loft_jax.lora.dora import column_norms, magnitude_scale


class LoRAStart(nnx.Variable[Any]):
    """An initial factor, kept if the initial product is not zero; never trained."""


class LoRAMask(nnx.Variable[Any]):
    """Which layers of a stack have an adapter; never trained."""


# A module, not a plain mixin: to change its class, an instance needs the layout of the base class.
class LoRALayer(nnx.Module):
    """The common part of all LoRA layers, beside their base classes.

    If only some layers of a stack have an adapter, the arrays have an axis of these in place of
    that of the stack, and `with_full_stacks` gives those that a scan over the stack needs.

    Attributes:
        lora_a: `(*stack, *in, rank)`.
        lora_b: `(*stack, rank, *out)`.
        lora_rank: Rank of the factors.
        lora_alpha: Numerator of the scaling.
        lora_rslora: Whether the scaling is `alpha / sqrt(rank)`.
        lora_start_a: Initial A; None if the product starts at zero.
        lora_start_b: Initial B; None if the product starts at zero.
        lora_magnitude: DoRA's magnitude `(*stack, out)`, or None.
        lora_dropout: Dropout on the input of the branch; None if its rate is zero.
        lora_numbers: Numbers of the layers of a stack that have an adapter, ascending; None if all
            have one.
        lora_mask: With DoRA and `lora_numbers`, whether each layer of the stack has an adapter,
            `(stack,)`; else None.
        lora_base: The class without LoRA.
        lora_weight: Name of the parameter that the factors adapt.
    """

    lora_a: nnx.LoRAParam[jax.Array]
    lora_b: nnx.LoRAParam[jax.Array]
    lora_rank: int
    lora_alpha: float
    lora_rslora: bool = False
    lora_start_a: LoRAStart | None = None
    lora_start_b: LoRAStart | None = None
    lora_magnitude: nnx.LoRAParam[jax.Array] | None = None
    lora_dropout: nnx.Dropout | None = None
    lora_numbers: tuple[int, ...] | None = None
    lora_mask: LoRAMask | None = None
    lora_base: ClassVar[type[nnx.Module]]
    lora_weight: ClassVar[str] = "kernel"

    @property
    def lora_scaling(self) -> float:
        """The scaling of the low-rank product, `alpha / rank` or `alpha / sqrt(rank)`."""
        return product_scaling(self.lora_rank, self.lora_alpha, self.lora_rslora)

    @staticmethod
    def lora_axes(layer: Any) -> WeightAxes:
        """Gives the roles of the axes of the weight, for a layer with or without LoRA."""
        raise NotImplementedError

    def lora_factors(self) -> tuple[jax.Array, jax.Array]:
        """Gives the two factors whose product, times the scaling, is added to the weight.

        These are A and B; if the initial product A0 B0 is not zero, they are concatenated along the
        rank: `A B - A0 B0 = (A - A0) B + A0 (B - B0)`. This is exactly zero at the start, and
        differences are computed before anything is rounded to the dtype of the layer.

        Returns:
            `(*stack, *in, r)` and `(*stack, r, *out)`, or with 2r in place of r.
        """
        a, b = self.lora_a[...], self.lora_b[...]
        if self.lora_start_a is None or self.lora_start_b is None:
            return a, b
        start_a, start_b = self.lora_start_a[...], self.lora_start_b[...]
        rank_axis = -1 - len(self.lora_axes(self).outs)
        return (
            jnp.concatenate([a - start_a, start_a], axis=-1),
            jnp.concatenate([b, b - start_b], axis=rank_axis),
        )

    def _factors(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        a, b = self.lora_factors()
        return a.astype(dtype), b.astype(dtype)

    def _dropped(self, x: jax.Array) -> jax.Array:
        return x if self.lora_dropout is None else self.lora_dropout(x)


class LoRALinear(LoRALayer, nnx.Linear):
    """`nnx.Linear` with factors A `(*stack, in, r)` and B `(*stack, r, out)`.

    With DoRA, `y = x W0 + bias + (c - 1) x' W0 + c s x' A B`, where c is the ratio of magnitude and
    norm of a column, and x' is the input after dropout, in both terms as in PEFT.
    """

    lora_base = nnx.Linear

    @staticmethod
    def lora_axes(layer: nnx.Linear) -> WeightAxes:
        """Gives the roles of the kernel's axes."""
        return matrix_axes(layer.kernel.shape, layer.in_features, layer.out_features)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to `(..., in)`, giving `(..., out)`."""
        y = super().__call__(inputs, out_sharding=out_sharding)
        x = self._dropped(_computed(self, inputs))

        def branch(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            # As a matrix, so that the gradients of A and B are plain products; several row axes
            # would cost transposed copies of the largest activations.
            rows = x.reshape(-1, x.shape[-1])
            down = jnp.dot(rows, a, precision=self.precision) * self.lora_scaling
            up = jnp.dot(
                down,
                b,
                precision=self.precision,
                preferred_element_type=self.preferred_element_type,
            )
            return up.astype(y.dtype).reshape(y.shape)

        if self.lora_magnitude is None:
            return y + _sharded(branch, out_sharding)(x, *self._factors(x.dtype))
        dropped = self.lora_dropout is not None and not self.lora_dropout.deterministic

        def rescaled(
            x: jax.Array,
            y: jax.Array,
            a: jax.Array,
            b: jax.Array,
            kernel: jax.Array,
            bias: jax.Array | None,
            magnitude: jax.Array,
            mask: jax.Array | None,
        ) -> jax.Array:
            norms = lax.stop_gradient(column_norms(kernel, a, b, self.lora_scaling))
            scale = magnitude_scale(magnitude, norms)  # (out,)
            if mask is not None:
                scale = jnp.where(mask, scale, 1)
            if dropped:
                base = jnp.dot(
                    x,
                    kernel.astype(x.dtype),
                    precision=self.precision,
                    preferred_element_type=self.preferred_element_type,
                )
            else:
                base = y if bias is None else y - bias.astype(y.dtype)
            up = branch(x, a.astype(x.dtype), b.astype(x.dtype))
            return (y + (scale - 1) * base + scale * up).astype(y.dtype)

        return _sharded(rescaled, out_sharding)(
            x,
            y,
            *self.lora_factors(),
            self.kernel[...],
            None if self.bias is None else self.bias[...],
            self.lora_magnitude[...],
            None if self.lora_mask is None else self.lora_mask[...],
        )


class LoRALinearGeneral(LoRALayer, nnx.LinearGeneral):
    """`nnx.LinearGeneral` with factors A `(*stack, *in, r)` and B `(*stack, r, *out)`.

    With a `batch_axis`, its axes follow those of the stack, with one pair for each index.
    """

    lora_base = nnx.LinearGeneral

    @staticmethod
    def lora_axes(layer: nnx.LinearGeneral) -> WeightAxes:
        """Gives the roles of the kernel's axes."""
        return general_axes(layer)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer along `axis`, giving `(..., *out)`."""
        y = super().__call__(inputs, out_sharding=out_sharding)
        x = self._dropped(_computed(self, inputs))
        # The base layer contracts the axes in ascending order, independent of their given order.
        contract, batch = (
            tuple(sorted(axis % x.ndim for axis in axes)) for axes in (self.axis, self.batch_axis)
        )
        leading = tuple(range(len(batch)))
        ins = tuple(range(len(batch), len(batch) + len(contract)))

        def branch(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            down = lax.dot_general(
                x, a, ((contract, ins), (batch, leading)), precision=self.precision
            )  # (*batch, ..., r)
            return lax.dot_general(
                down * self.lora_scaling,
                b,
                (((down.ndim - 1,), (len(batch),)), (leading, leading)),
                precision=self.precision,
                preferred_element_type=self.preferred_element_type,
            ).astype(y.dtype)

        return y + _sharded(branch, out_sharding)(x, *self._factors(x.dtype))


class LoRAEinsum(LoRALayer, nnx.Einsum):
    """`nnx.Einsum` with factors A `(*stack, *in, r)` and B `(*stack, r, *out)`."""

    lora_base = nnx.Einsum

    @staticmethod
    def lora_axes(layer: nnx.Einsum) -> WeightAxes:
        """Gives the roles of the kernel's axes."""
        return einsum_axes(layer)

    def __call__(
        self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> jax.Array:
        """Applies the equation given here or, by default, at construction."""
        parts = einsum_parts(einsum_str or self.einsum_str)
        if parts[:3] != einsum_parts(self.einsum_str)[:3]:
            raise InputError(
                f"einsum {einsum_str!r} uses the kernel otherwise than {self.einsum_str!r}, "
                f"which its LoRA factors were made for"
            )
        y = super().__call__(inputs, einsum_str, out_sharding=out_sharding)
        x = self._dropped(_computed(self, inputs))

        def branch(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            down = jnp.einsum(parts.down, x, a, precision=self.precision)  # (..., r)
            return jnp.einsum(
                parts.up,
                down * self.lora_scaling,
                b,
                precision=self.precision,
                preferred_element_type=self.preferred_element_type,
            ).astype(y.dtype)

        return y + _sharded(branch, out_sharding)(x, *self._factors(x.dtype))


class LoRAEmbed(LoRALayer, nnx.Embed):
    """`nnx.Embed` with factors A `(*stack, num_embeddings, r)` and B `(*stack, r, features)`.

    `attend` goes through the same adapted embedding.
    """

    lora_base = nnx.Embed
    lora_weight = "embedding"

    @staticmethod
    def lora_axes(layer: nnx.Embed) -> WeightAxes:
        """Gives the roles of the embedding's axes: each token is a row, as for a one-hot input."""
        return matrix_axes(layer.embedding.shape, layer.num_embeddings, layer.features)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Looks up `(...)` integers, giving `(..., features)`."""
        y = super().__call__(inputs, out_sharding=out_sharding)

        def branch(a: jax.Array, b: jax.Array, inputs: jax.Array) -> jax.Array:
            if self.num_embeddings == 1:  # the base layer then ignores the indices
                inputs = jnp.zeros_like(inputs)
            down = jnp.take(a, inputs, axis=0)  # (..., r)
            return (down * self.lora_scaling) @ b

        return y + _sharded(branch, out_sharding)(*self._factors(y.dtype), inputs)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Multiplies `(..., features)` by every embedding, giving `(..., num_embeddings)`."""
        y = super().attend(query, out_sharding=out_sharding)
        query, _ = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)

        def branch(query: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            down = query @ b.T  # (..., r)
            return (down * self.lora_scaling) @ a.T

        return y + _sharded(branch, out_sharding)(query, *self._factors(query.dtype))


# By the class without LoRA. `register_lora_layer` adds to it.
LORA_CLASSES: dict[type[nnx.Module], type[LoRALayer]] = {
    nnx.Linear: LoRALinear,
    nnx.LinearGeneral: LoRALinearGeneral,
    nnx.Einsum: LoRAEinsum,
    nnx.Embed: LoRAEmbed,
}


class CombinedMeta(type(nnx.Linear)):  # type: ignore[misc]  # Flax does not name its metaclass
    """Metaclass of the classes made from a layer's class, with which pickle makes them again."""


def lora_class(base: type[nnx.Module]) -> type[LoRALayer]:
    """Gives the LoRA class of a layer's class.

    For a subclass of a Flax layer it is a new class in which `super()` of the subclass is the LoRA
    layer, so that its changes to inputs and outputs apply to the adapted layer.

    Args:
        base: `nnx.Linear`, `LinearGeneral`, `Einsum`, `Embed`, a class given to
            `register_lora_layer`, or a subclass of one.

    Returns:
        A subclass of `base` and of `LoRALayer`.

    Raises:
        InputError: It is none of these; or the subclass computes its output without `super()`, so
            that factors would have no effect.

    Example:
        >>> lora_class(nnx.Linear).__name__
        'LoRALinear'
    """
    return LORA_CLASSES[base] if base in LORA_CLASSES else _class_of_subclass(base)


@functools.cache
def _class_of_subclass(base: type[nnx.Module]) -> type[LoRALayer]:
    parent = next((cls for cls in base.__mro__ if cls in LORA_CLASSES), None)
    if parent is None:
        raise InputError(f"{base.__qualname__} is not supported, or not registered yet")
    with_lora = LORA_CLASSES[parent]
    ours = [vars(cls) for cls in with_lora.__mro__ if issubclass(cls, LoRALayer)]
    for cls in base.__mro__[: base.__mro__.index(parent)]:
        for method in {"__call__", "attend"} & set(vars(cls)) & set().union(*ours):
            code = getattr(inspect.unwrap(vars(cls)[method]), "__code__", None)
            if code is None or "super" not in code.co_names:
                raise InputError(
                    f"{cls.__qualname__}.{method} replaces {parent.__name__}'s without calling "
                    f"super().{method}, so LoRA factors would have no effect; exclude the layer"
                )
    return combined_class(base, base, with_lora, __doc__=with_lora.__doc__)


def combined_class(
    base: type[nnx.Module], *parents: type[nnx.Module], **namespace: Any
) -> type[LoRALayer]:
    """Makes the LoRA class of a class, which pickle finds by the class without LoRA."""
    namespace = {"lora_base": base, "__module__": base.__module__, **namespace}
    return cast("type[LoRALayer]", CombinedMeta(f"LoRA{base.__name__}", parents, namespace))


def weight_axes(layer: nnx.Module) -> WeightAxes:
    """Gives the roles of the axes of a layer's weight, with or without LoRA.

    Args:
        layer: An instance of a class that LoRA supports.

    Returns:
        Sizes by role.

    Raises:
        InputError: LoRA cannot be added to this layer.

    Example:
        >>> axes = weight_axes(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
        >>> axes.a_shape(2), axes.b_shape(2)
        ((4, 2), (2, 6))
    """
    cls = type(layer) if isinstance(layer, LoRALayer) else lora_class(type(layer))
    return cls.lora_axes(layer)


def _pickled(cls: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return lora_class, (cls.lora_base,)


copyreg.pickle(CombinedMeta, _pickled)


def _computed(layer: Any, inputs: jax.Array) -> jax.Array:
    """Casts inputs to the dtype of the base layer's computation."""
    bias = None if layer.bias is None else layer.bias[...]
    cast_inputs: jax.Array
    cast_inputs, *_ = layer.promote_dtype((inputs, layer.kernel[...], bias), dtype=layer.dtype)
    return cast_inputs


def _sharded(branch: Callable[..., jax.Array], out_sharding: Any) -> Callable[..., jax.Array]:
    """Gives the output of the branch the base layer's sharding, in JAX's explicit sharding mode."""
    return branch if out_sharding is None else auto_axes(branch, out_sharding=out_sharding)
