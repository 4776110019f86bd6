"""What an optimizer's state costs, and how it lies on a mesh."""

import itertools
import math
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec


def state_bytes(tx: optax.GradientTransformation, params: optax.Params) -> int:
    """Bytes of an optimizer's state, exactly; nothing is allocated.

    Args:
      tx: Any Optax transformation.
      params: Arrays, or anything with a `shape` and a `dtype`.

    Returns:
      The sum over all arrays of the state, on all devices together if it is sharded.

    Example:
      >>> import jax.numpy as jnp
      >>> from loft_jax import loft, state_bytes
      >>> params = {"lora_a": jnp.ones((64, 4)), "lora_b": jnp.zeros((4, 32))}
      >>> rows, rank, scalars = 64 + 32, 4, 4
      >>> state_bytes(loft(1e-3), params) == 4 * (rows * (1 + 2 * rank) + 2 * rank**2 + scalars)
      True
    """
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def state_shardings(
    tx: optax.GradientTransformation, params: optax.Params, shardings: Any = None
) -> Any:
    """How the state of an optimizer lies on the mesh of its parameters.

    What the state keeps for a parameter is split along the axes that it shares with it, by position
    and size: moments and basis of a factor along its features and its stack. What belongs to no
    parameter is whole on every device. So is what stands in the place of the rank, unless its size
    is that of an axis of the parameter, at the same position, that is split.

    Args:
      tx: Any Optax transformation; `optax.tree.map_params` must see its parameters, as it does for
        all of Optax's.
      params: Arrays, or `jax.ShapeDtypeStruct`s, of the parameters.
      shardings: A `NamedSharding` for each parameter; by default the parameters' own.

    Returns:
      A `NamedSharding` for each array of the state: for `out_shardings` of a jitted `tx.init` or
      step, and for the targets that Orbax restores to.

    Raises:
      ValueError: A parameter has no `NamedSharding`; it is named.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from loft_jax import loft, state_shardings
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> params = {"lora_a": jnp.ones((64, 4)), "lora_b": jnp.zeros((4, 32))}
      >>> layout = {"lora_a": NamedSharding(mesh, P("data")), "lora_b": NamedSharding(mesh, P())}
      >>> tx = loft(1e-3)
      >>> state = jax.jit(tx.init, out_shardings=state_shardings(tx, params, layout))(params)
      >>> state[1].nu["lora_a"].shape, state[1].nu["lora_a"].sharding.spec
      ((64, 1), P('data', None))
    """
    if shardings is None:
        shardings = jax.tree.map(lambda param: getattr(param, "sharding", None), params)
    leaves = jax.tree_util.tree_leaves_with_path(shardings, is_leaf=lambda x: x is None)
    for path, leaf in leaves:
        if not isinstance(leaf, NamedSharding):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name!r} has sharding {leaf!r}, expected a NamedSharding")
    whole = NamedSharding(leaves[0][1].mesh, PartitionSpec()) if leaves else None

    def like(leaf: Any, sharding: Any, param: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        # Where the state has an array, the parameters may have Flax's box of one.
        [sharding], [param] = jax.tree.leaves(sharding), jax.tree.leaves(param)
        return shared_sharding(leaf, sharding, param)

    return optax.tree.map_params(
        tx,
        like,
        jax.eval_shape(tx.init, params),
        shardings,
        params,
        transform_non_params=lambda _: whole,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )


def shared_sharding(leaf: Any, sharding: NamedSharding, param: Any) -> NamedSharding:
    """How what is kept for a parameter lies: split along the axes that it shares with it.

    Args:
      leaf: An array, or anything with a `shape`.
      sharding: Of the parameter.
      param: The parameter.

    Returns:
      A sharding on the same mesh.
    """
    spec = (*sharding.spec, *[None] * (len(param.shape) - len(sharding.spec)))
    shared = [size == own for size, own in zip(leaf.shape, param.shape, strict=False)]
    if len(leaf.shape) != len(param.shape):
        # An (r, r) matrix of each layer of a stack: only leading axes can be the same ones.
        shared = list(itertools.takewhile(bool, shared))
    axes = [axis if same else None for axis, same in zip(spec, shared, strict=False)]
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def unboxed_structure(params: Any) -> Any:
    """The structure of parameters without the boxes that Flax puts around them.

    A box (`nnx.Variable`, `nn.Partitioned`) names the mesh axes of its parameter. In the place of
    the whole box goes what has other axes, for which those names would be wrong.
    """

    def is_box(x: Any) -> bool:
        return hasattr(x, "get_metadata") or hasattr(x, "replace_boxed")

    # A masked parameter is a box of nothing, and no leaf.
    return jax.tree.structure(params, is_leaf=lambda x: is_box(x) and len(jax.tree.leaves(x)) == 1)
