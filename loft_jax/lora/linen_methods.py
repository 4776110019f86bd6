"""How low-rank factors enter the methods of Flax's Linen layers."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from loft_jax.lora.axes import WeightAxes, einsum_parts, plain_axes


class Branch(NamedTuple):
    """What a low-rank branch is computed from."""

    module: Any
    weight: jax.Array
    a: jax.Array
    b: jax.Array
    scaling: float
    dropout: float

    def promoted(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Casts input and factors to the dtype of the layer's computation, and drops inputs."""
        x, _ = self.module.promote_dtype(x, self.weight, dtype=self.module.dtype)
        if self.dropout:
            keep = 1 - self.dropout
            mask = jax.random.bernoulli(self.module.make_rng("dropout"), keep, x.shape)
            x = jnp.where(mask, x / keep, 0).astype(x.dtype)
        return x, self.a.astype(x.dtype), self.b.astype(x.dtype)


class Method(NamedTuple):
    """How factors enter a method of a Flax layer."""

    weight: str
    axes: Callable[..., WeightAxes]
    branch: Callable[..., jax.Array]
    drops: bool = True


def _dense_axes(module: nn.Dense, inputs: jax.Array) -> WeightAxes:
    return WeightAxes((), (), (inputs.shape[-1],), (module.features,), "ir,ro->io")


def _dense(branch: Branch, inputs: jax.Array) -> jax.Array:
    x, a, b = branch.promoted(inputs)
    # As a matrix, so that the gradients of A and B are plain products.
    down = jnp.dot(x.reshape(-1, x.shape[-1]), a, precision=branch.module.precision)
    up = jnp.dot(down * branch.scaling, b, precision=branch.module.precision)
    return up.reshape(*x.shape[:-1], b.shape[-1])


def _general_numbers(module: nn.DenseGeneral, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Gives the contracted and the batch axes of the input, ascending as the layer has them."""
    both = ((x,) if isinstance(x, int) else tuple(x) for x in (module.axis, module.batch_dims))
    contract, batch = (tuple(sorted(axis % ndim for axis in axes)) for axes in both)
    return contract, batch


def _general_axes(module: nn.DenseGeneral, inputs: jax.Array) -> WeightAxes:
    contract, batch = _general_numbers(module, inputs.ndim)
    outs = (module.features,) if isinstance(module.features, int) else tuple(module.features)
    sides, ins = (tuple(inputs.shape[axis] for axis in axes) for axes in (batch, contract))
    return plain_axes((), sides, ins, outs)


def _general(branch: Branch, inputs: jax.Array) -> jax.Array:
    x, a, b = branch.promoted(inputs)
    contract, batch = _general_numbers(branch.module, x.ndim)
    leading = tuple(range(len(batch)))
    ins = tuple(range(len(batch), len(batch) + len(contract)))
    precision = branch.module.precision
    down = lax.dot_general(x, a, ((contract, ins), (batch, leading)), precision=precision)
    return lax.dot_general(  # (*batch, ..., r) and (*batch, r, *out)
        down * branch.scaling,
        b,
        (((down.ndim - 1,), (len(batch),)), (leading, leading)),
        precision=precision,
    )


def _equation(module: nn.Einsum, einsum_str: str | None) -> str:
    return str(nn.merge_param("einsum_str", module.einsum_str, einsum_str))


def _einsum_axes(module: nn.Einsum, inputs: jax.Array, einsum_str: str | None = None) -> WeightAxes:
    return einsum_parts(_equation(module, einsum_str)).axes((), tuple(module.shape))


def _einsum(branch: Branch, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
    x, a, b = branch.promoted(inputs)
    module = branch.module
    parts = einsum_parts(_equation(module, einsum_str))
    down = jnp.einsum(parts.down, x, a, precision=module.precision)
    return jnp.einsum(
        parts.up,
        down * branch.scaling,
        b,
        precision=module.precision,
        preferred_element_type=module.preferred_element_type,
    )


def _embed_axes(module: nn.Embed, inputs: jax.Array) -> WeightAxes:
    return WeightAxes((), (), (module.num_embeddings,), (module.features,), "ir,ro->io")


def _embed(branch: Branch, inputs: jax.Array) -> jax.Array:
    dtype = branch.module.dtype or branch.weight.dtype
    if branch.module.num_embeddings == 1:  # the layer then ignores the indices
        inputs = jnp.zeros_like(inputs)
    down = jnp.take(branch.a.astype(dtype), inputs, axis=0)  # (..., r)
    return (down * branch.scaling) @ branch.b.astype(dtype)


def _attend(branch: Branch, query: jax.Array) -> jax.Array:
    x, a, b = branch.promoted(query)
    return ((x @ b.T) * branch.scaling) @ a.T


# By the function that Flax runs, and not by class: a subclass that changes inputs and outputs
# around `super()` then changes those of the adapted layer.
METHODS: dict[Any, Method] = {
    inspect.unwrap(nn.Dense.__call__): Method("kernel", _dense_axes, _dense),
    inspect.unwrap(nn.DenseGeneral.__call__): Method("kernel", _general_axes, _general),
    inspect.unwrap(nn.Einsum.__call__): Method("kernel", _einsum_axes, _einsum),
    inspect.unwrap(nn.Embed.__call__): Method("embedding", _embed_axes, _embed, drops=False),
    inspect.unwrap(nn.Embed.attend): Method("embedding", _embed_axes, _attend, drops=False),
}
