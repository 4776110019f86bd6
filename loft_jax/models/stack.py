"""Layers of one kind, stacked along the first axis of their parameters, and run by a scan.

The parameters of a stack are those of one layer with a leading axis, and so are variables that are
added to it (LoRA factors, dropout streams).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from loft_jax.lora import with_full_stacks
from loft_jax.models.activations import laid_out
from loft_jax.models.attention import KVCache
from loft_jax.models.family import Remat

Layer = TypeVar("Layer", bound=nnx.Module)

_LOW_RANK = 8  # a matrix whose rank is this many times less than its outputs is of low rank


def stack_layers(count: int, make: Callable[[nnx.Rngs], Layer], rngs: nnx.Rngs) -> Layer:
    """Makes a stack of layers that differ only in their random numbers.

    Args:
        count: Number of layers.
        make: Makes one layer.
        rngs: For their initial parameters.

    Returns:
        One module, whose parameters have the shape `(count, ...)`.
    """
    return nnx.split_rngs(splits=count)(nnx.vmap(in_axes=0, out_axes=0)(make))(rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerLayer:
    """A shared argument of a stack that has one of several values in each layer; a pytree.

    Layers of several kinds, such as attention over a window and over everything, then still run in
    one scan: each layer is given its own value only.

    Attributes:
        values: Arrays of one shape and dtype, one for each kind of layer.
        kinds: `(layers,)` int32, the number of each layer's value.
    """

    values: tuple[jax.Array, ...]
    kinds: jax.Array

    @classmethod
    def of(cls, kinds: Sequence[int], *values: jax.Array) -> "PerLayer":
        """Makes an argument from the number of each layer's value, and the values.

        Example:
            >>> mask = PerLayer.of([0, 0, 1], jnp.zeros(2), jnp.ones(2))
            >>> [mask.at(layer).tolist() for layer in range(3)]
            [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
        """
        return cls(values, jnp.asarray(kinds, jnp.int32))

    def at(self, layer: jax.Array | int) -> jax.Array:
        """Gives the value of a layer."""
        return lax.select_n(self.kinds[layer], *self.values)


def run_layers(
    layers: nnx.Module,
    x: jax.Array,
    *shared: Any,
    cache: KVCache | None = None,
    remat: Remat,
) -> tuple[jax.Array, KVCache | None]:
    """Runs the layers of a stack, one after another.

    Args:
        layers: From `stack_layers`. Each layer is called as `layer(x, *shared, cache, index)` and
            returns the next x and the cache. Random streams that it uses are updated in place.
        x: `(b, t, hidden)`.
        *shared: Arguments of every layer; of a `PerLayer`, each layer is given its own value.
        cache: Cache of earlier tokens, or None.
        remat: What the backward pass recomputes.

    Returns:
        `(b, t, hidden)`, and the cache with the keys and values of every layer.
    """
    graphdef, state = nnx.split(layers)
    state = with_full_stacks(layers, state)
    params, rest = nnx.split_state(state, nnx.Param, ...)
    x, cache, rest = _scan(graphdef, remat, params, rest, x, shared, cache)
    nnx.update(layers, rest)  # dropout streams that were used
    return x, cache


# Compiled on its own so that a model called outside jit does not compile its scan at every call.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan(
    graphdef: nnx.GraphDef[Any],
    remat: Remat,
    params: nnx.State[Any, Any],
    rest: nnx.State[Any, Any],
    x: jax.Array,
    shared: tuple[Any, ...],
    cache: KVCache | None,
) -> tuple[jax.Array, KVCache | None, nnx.State[Any, Any]]:
    """Runs every layer; `rest` is all state but the parameters, and changed state is returned."""

    def body(carry: Any, scanned: Any) -> tuple[Any, nnx.State[Any, Any]]:
        x, cache = carry
        params, rest, index = scanned
        before = {path: variable.get_value() for path, variable in nnx.to_flat_state(rest)}
        layer = nnx.merge(graphdef, params, rest)
        own = (given.at(index) if isinstance(given, PerLayer) else given for given in shared)
        x, cache = layer(x, *own, cache, index)
        # Only changed state is returned: NNX does not allow setting outer variables within a trace.
        changed = [
            (path, variable)
            for path, variable in nnx.to_flat_state(nnx.state(layer, nnx.Not(nnx.Param)))
            if variable.get_value() is not before[path]
        ]
        return (laid_out(x), cache), nnx.from_flat_state(changed)

    policies = jax.checkpoint_policies
    keep = {
        "full": policies.nothing_saveable,
        "dots": _is_kept,
        "none": policies.everything_saveable,
    }[remat]
    body = jax.checkpoint(body, prevent_cse=False, policy=keep)
    count = jax.tree.leaves(params)[0].shape[0]
    (x, cache), rest = lax.scan(body, (x, cache), (params, rest, jnp.arange(count)))
    return x, cache, rest


def _is_kept(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """Whether the backward pass gets a result, by default: those of products with whole weights.

    Everything else costs less to compute again than to write and to read, and so does the product
    of `x A` with a factor B, which would be kept beside the product with the weight it is added to.
    """
    products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    if not products(primitive, *operands, **parameters):
        return False
    (_, axes), _ = parameters["dimension_numbers"]
    _, weight = operands
    terms = math.prod(weight.shape[axis] for axis in axes)
    return _LOW_RANK * terms > weight.size // terms
