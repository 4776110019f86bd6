"""Loss and gradient of a batch, summed over its parts and over copies of the model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from loft_jax.models.activations import laid_out
from loft_jax.tasks.task import Arrays
from loft_jax.training.partition import ModelPartition

Tree = Any
Loss = Callable[[Any, Arrays], tuple[jax.Array, jax.Array]]
"""Maps a model and a batch to the summed loss and its weight."""

Sums = tuple[jax.Array, jax.Array, Tree, Tree]
"""Sums of loss, weight and gradients, and the counters of the random streams afterwards."""


def make_gradients(
    parts: ModelPartition, loss: Loss, accumulation_steps: int, mesh: Mesh | AbstractMesh | None
) -> Callable[[Tree, Tree, Tree, Arrays], Sums]:
    """Makes the function that sums loss, weight and gradients of a batch.

    Args:
        parts: From `split_model`.
        loss: The loss of a task.
        accumulation_steps: Number of parts of the batch, computed one after another; divides its
            rows.
        mesh: The mesh that the step is split over, if any.

    Returns:
        A function of trained parameters, counters of the random streams, frozen parameters and a
        batch as the loss takes it. It sums over copies of the model (`data`) once, after the last
        part, in float32; with dropout each copy then draws its own masks.
    """

    def summed_loss(
        params: Tree, streams: Tree, frozen: Tree, batch: Arrays
    ) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
        model = nnx.merge(parts.graphdef, params, streams, frozen, copy=True)
        total, weight = loss(model, batch)
        streams = nnx.to_pure_dict(nnx.state(model, nnx.RngCount))
        return total, (weight, streams)

    def summed_gradients(params: Tree, streams: Tree, frozen: Tree, batch: Arrays) -> Sums:
        value_and_grad = jax.value_and_grad(summed_loss, has_aux=True)
        if accumulation_steps == 1:
            (total, (weight, streams)), grads = value_and_grad(params, streams, frozen, batch)
            return total, weight, grads, streams

        def add(carry: Sums, part: Arrays) -> tuple[Sums, None]:
            total, weight, grads, streams = carry
            part = jax.tree.map(laid_out, part)
            (more, (heavier, streams)), extra = value_and_grad(params, streams, frozen, part)
            grads = jax.tree.map(jnp.add, grads, extra)
            return (total + more, weight + heavier, grads, streams), None

        divided = jax.tree.map(
            lambda x: jnp.reshape(x, (accumulation_steps, -1, *x.shape[1:])), batch
        )
        start = (jnp.zeros([]), jnp.zeros([]), jax.tree.map(jnp.zeros_like, params), streams)
        return jax.lax.scan(add, start, divided)[0]

    def summed_in_each_copy(params: Tree, streams: Tree, frozen: Tree, batch: Arrays) -> Sums:
        """Sums over the parts within each copy of the model, then once over the copies."""
        copy = jax.lax.axis_index("data")
        frozen = jax.tree.map(
            lambda x: (
                jax.random.fold_in(x, copy) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            ),
            frozen,
        )
        total, weight, grads, streams = summed_gradients(params, streams, frozen, batch)
        return *jax.lax.psum((total, weight, grads), "data"), streams

    if accumulation_steps == 1 or mesh is None or not _copies_apart(mesh):
        return summed_gradients
    everywhere = PartitionSpec()
    return jax.shard_map(
        summed_in_each_copy,
        in_specs=(everywhere, everywhere, everywhere, PartitionSpec("data")),
        out_specs=everywhere,
        axis_names={"data"},
        check_vma=False,
    )


def _copies_apart(mesh: Mesh | AbstractMesh) -> bool:
    """Whether each copy of the model can sum its gradients over the parts by itself.

    Otherwise the compiler sums them over the copies in every part and layer. With three axes in use
    there is no choice: XLA's partitioner cannot split the remaining computation over two axes (its
    check in `ExpandDeviceGroups` fails, jaxlib 0.10.2).
    """
    return mesh.shape["data"] > 1 and 1 in (mesh.shape["fsdp"], mesh.shape["tensor"])
