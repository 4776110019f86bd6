"""Transformations on meshes whose axes are explicit, as `jax.make_mesh` makes them.

On such a mesh the sharding of an array is part of its type, and an operation that could shard its
result in several ways is refused. The work on factor pairs is full of these: products over sharded
axes, stacks of leaves. So it is done with the axes automatic, where the compiler chooses, and what
comes out is sharded as AdamW's would be: updates like their parameters, the state as it was.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from loft_jax.optim.state import shared_sharding, state_shardings

P = ParamSpec("P")
T = TypeVar("T")
Tx = TypeVar("Tx", bound=optax.GradientTransformation)


def explicit_mesh(tree: Any) -> Mesh | AbstractMesh | None:
    """The mesh with explicit axes that arrays of a tree lie on, if there is one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> x = jax.device_put(jnp.ones(4), NamedSharding(mesh, PartitionSpec("data")))
      >>> explicit_mesh({"x": x}) == mesh, explicit_mesh({"x": jnp.ones(4)})
      (True, None)
    """
    found: Mesh | AbstractMesh | None = None
    for x in jax.tree.leaves(tree):
        if _is_explicit(x):
            if not isinstance(x, jax.core.Tracer):
                of_devices: Mesh = x.sharding.mesh  # which work outside jit needs
                return of_devices
            found = jax.typeof(x).sharding.mesh
    return found


def with_auto_axes(mesh: Mesh | AbstractMesh, work: Callable[P, T]) -> Callable[P, T]:
    """Calls a function with the explicit axes of a mesh made automatic.

    Args:
      mesh: From `explicit_mesh` of the arguments.
      work: The function. Arrays on the mesh must be arguments, not closed over.

    Returns:
      A function with the same results, whose types name no axis: `jax.sharding.reshard` them.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        abstract = mesh.abstract_mesh
        auto = abstract.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))
        with jax.sharding.use_abstract_mesh(auto):
            args, kwargs = jax.tree.map(in_context, (args, kwargs))
            return work(*args, **kwargs)

    return call


def varying_like(tree: T, *others: Any) -> T:
    """Marks arrays as ones that may differ between devices, as others do in a `jax.shard_map`.

    A loop or a `cond` that begins with a constant and ends with what is computed from sharded data
    has two types there.

    Args:
      tree: Arrays.
      others: Trees of the arrays that will be computed with.

    Returns:
      The same values.
    """
    if not (leaves := jax.tree.leaves(others)):
        return tree
    # A choice that hangs on the others is of their type. JAX's own function for this has another
    # name in each version. XLA removes a choice between a value and itself.
    some = [x[(slice(1),) * x.ndim] for x in leaves]
    either = functools.reduce(jnp.logical_or, [jnp.any(x != x) for x in some])
    marked: T = jax.tree.map(lambda x: jnp.where(either, x, x), tree)
    return marked


def in_context(x: Any) -> Any:
    """Moves an array with explicit axes to the mesh of the context; anything else passes."""
    return jax.sharding.reshard(x, PartitionSpec()) if _is_explicit(x) else x


def on_explicit_axes(
    factory: Callable[P, Tx],
) -> Callable[P, Tx]:
    """Makes a transformation work on meshes with explicit axes; elsewhere nothing changes.

    Arguments that are arrays, as with `optax.inject_hyperparams`, lie on the mesh too, and the
    transformation closes over them. There it is made anew, from arguments with automatic axes.

    Args:
      factory: Makes a transformation from numbers and other arguments.

    Returns:
      The factory of transformations whose updates are sharded like their parameters, and whose
      state is sharded as `state_shardings` says.
    """

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> Tx:
        tx = factory(*args, **kwargs)
        given, treedef = jax.tree.flatten((args, kwargs))

        def init(params: optax.Params) -> Any:
            mesh = explicit_mesh(params)
            if mesh is None:
                return tx.init(params)
            shardings = jax.tree.map(functools.partial(_sharding, mesh), params)
            layout = state_shardings(tx, params, shardings)
            return jax.tree.map(jax.sharding.reshard, tx.init(params), layout)

        def update(
            updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
        ) -> tuple[optax.Updates, Any]:
            mesh = explicit_mesh((updates, state, params, given))
            if mesh is None:
                return tx.update(updates, state, params, **extra)

            def work(
                given: list[Any], updates: Any, state: Any, params: Any, extra: dict[str, Any]
            ) -> tuple[optax.Updates, Any]:
                args, kwargs = jax.tree.unflatten(treedef, given)
                return factory(*args, **kwargs).update(updates, state, params, **extra)

            new_updates, new_state = with_auto_axes(mesh, work)(
                given, updates, state, params, extra
            )
            like = functools.partial(_sharding, mesh)
            return (
                _like_params(new_updates, updates, params, like),
                jax.tree.map(lambda x, old: jax.sharding.reshard(x, like(old)), new_state, state),
            )

        return type(tx)(init, update)

    return make


def whole_on_explicit_axes(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function of arrays work on meshes with explicit axes; results are whole there."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        mesh = explicit_mesh((args, kwargs))
        if mesh is None:
            return function(*args, **kwargs)
        results = with_auto_axes(mesh, function)(*args, **kwargs)
        whole: T = jax.sharding.reshard(results, NamedSharding(mesh, PartitionSpec()))
        return whole

    return call


def _is_explicit(x: Any) -> bool:
    return isinstance(x, jax.Array) and bool(jax.typeof(x).sharding.mesh.explicit_axes)


def _sharding(mesh: Mesh | AbstractMesh, x: Any) -> NamedSharding:
    """How an array lies on the mesh; whole, if it does not lie there."""
    return NamedSharding(mesh, jax.typeof(x).sharding.spec if _is_explicit(x) else PartitionSpec())


def _like_params(
    new: Any, updates: Any, params: Any, sharding: Callable[[Any], NamedSharding]
) -> Any:
    """Shards new updates like their parameters, and moments in the place of updates like both."""
    leaves = jax.tree.leaves(params)
    if len(jax.tree.leaves(new)) == len(leaves):
        treedef: Any = jax.tree.structure(new)
    else:
        treedef = jax.tree.structure(updates)
    parts = [
        jax.tree.map(
            lambda x, p=param: jax.sharding.reshard(x, shared_sharding(x, sharding(p), p)), part
        )
        for part, param in zip(treedef.flatten_up_to(new), leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, parts)
