"""Where activations lie on a mesh."""

import jax
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

# Mesh axes that the rows of a batch are split over, and the one that its features are.
BATCH_AXES = ("data", "fsdp")
FEATURE_AXIS = "tensor"


def laid_out(x: jax.Array, *, features: int | None = None) -> jax.Array:
    """Splits activations over the mesh that the caller computes on: rows, and features if asked.

    Weights and rows are split over the same devices (fsdp). Left alone, a compiler may move the
    activations to the weights (or to their small LoRA factors) instead of the weights to the
    activations.

    Args:
        x: `(b, ...)`.
        features: The axis of heads or features that belongs to the mesh axis `tensor`; it stays
            whole where `tensor` does not divide it. Other axes are whole on every device.

    Returns:
        The same values; with no mesh in the context, or one of other axes, the same array.

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
    """Splits what was looked up in an embedding by rows.

    The features of an embedding are split over fsdp, so each device looks up its features for all
    rows of its copy of the model. Said in two steps, this becomes rows by one exchange; in one, a
    compiler may make the whole of it everywhere.

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
    """Puts results on every device of the mesh, where any process can read them.

    Args:
        x: Small; of any shape.

    Returns:
        The same values; with no mesh in the context, the same array.

    Example:
        >>> gathered(jax.numpy.ones(2)).shape
        (2,)
    """
    return x if _mesh() is None else lax.with_sharding_constraint(x, PartitionSpec())


def _mesh() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if {*BATCH_AXES, FEATURE_AXIS} <= set(mesh.axis_names) else None


def _automatic(mesh: AbstractMesh) -> tuple[str, ...]:
    """Axes of the rows that the compiler sees to: in a `shard_map` over data, not that one."""
    return tuple(name for name in BATCH_AXES if name not in mesh.manual_axes)
