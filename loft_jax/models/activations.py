"""Shardings of activations on a mesh."""

import math

import jax
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

# Mesh axes that the rows of a batch are split over, and the axis that features are split over.
BATCH_AXES = ("data", "fsdp")
FEATURE_AXIS = "tensor"


def laid_out(x: jax.Array, *, features: int | None = None) -> jax.Array:
    """Splits activations over the current mesh: their rows, and features if an axis is given.

    Weights and rows are split over the same devices (fsdp). Without this constraint, the compiler
    may move activations to the weights (or to their small LoRA factors) instead of weights to the
    activations.

    Args:
        x: `(b, ...)`.
        features: Axis of heads or features to split over the mesh axis `tensor`; it is not split if
            `tensor` does not divide it. Other axes are never split.

    Returns:
        The same values; without a mesh, or with one of other axes, the same array.

    Example:
        >>> laid_out(jax.numpy.ones((2, 3))).shape
        (2, 3)
    """
    mesh = _mesh()
    if mesh is None:
        return x
    axes: list[str | tuple[str, ...] | None] = [_automatic(mesh), *[None] * (x.ndim - 1)]
    if features is not None and x.shape[features] % mesh.shape[FEATURE_AXIS] == 0:
        axes[features] = FEATURE_AXIS
    return lax.with_sharding_constraint(x, PartitionSpec(*axes))


def embeddings_laid_out(x: jax.Array) -> jax.Array:
    """Splits the output of an embedding by rows.

    The features of an embedding are split over fsdp, so each device looks up its features for all
    rows of its copy of the model. With two constraints the compiler exchanges features for rows
    once; with one, it may replicate the whole array.

    Args:
        x: `(b, t, hidden)`.

    Returns:
        The same values.

    Example:
        >>> embeddings_laid_out(jax.numpy.ones((2, 3, 4))).shape
        (2, 3, 4)
    """
    mesh = _mesh()
    copies, shards = BATCH_AXES
    if mesh is not None and x.shape[-1] % mesh.shape[shards] == 0:
        rows = copies if copies in _automatic(mesh) else None
        x = lax.with_sharding_constraint(x, PartitionSpec(rows, None, shards))
    return laid_out(x)


def gathered(x: jax.Array) -> jax.Array:
    """Replicates results on all devices of the mesh, so that any process can read them.

    Args:
        x: A small array of any shape.

    Returns:
        The same values; without a mesh, the same array.

    Example:
        >>> gathered(jax.numpy.ones(2)).shape
        (2,)
    """
    return x if _mesh() is None else lax.with_sharding_constraint(x, PartitionSpec())


def row_shards() -> int:
    """The number of parts that `laid_out` splits rows into.

    Returns:
        1 without a mesh, or with one of other axes.

    Example:
        >>> row_shards()
        1
    """
    mesh = _mesh()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in _automatic(mesh))


def _mesh() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if {*BATCH_AXES, FEATURE_AXIS} <= set(mesh.axis_names) else None


def _automatic(mesh: AbstractMesh) -> tuple[str, ...]:
    """Gives the axes of rows that the compiler handles: in a `shard_map` over data, not data."""
    return tuple(name for name in BATCH_AXES if name not in mesh.manual_axes)
