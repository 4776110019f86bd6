"""One optimizer step: forward, backward, update, jitted as a whole."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from loft_jax.tasks.task import Arrays
from loft_jax.training.gradients import Loss, make_gradients
from loft_jax.training.partition import ModelPartition

Tree = Any

HOST_MEMORY = "pinned_host"
"""JAX's name of the host memory that devices can copy from."""


class TrainState(NamedTuple):
    """The state of a run: what a step changes and a checkpoint holds.

    Attributes:
        step: (), int32, number of steps done, including skipped ones.
        skipped: (2,), int32, number of steps skipped because their loss or gradient was not finite:
            in total, and since the last step that was not skipped.
        params: Trained parameters, nested dicts of float32 arrays.
        opt_state: State of the optimizer.
        streams: Counters of the random streams (dropout).
    """

    step: jax.Array
    skipped: jax.Array
    params: Tree
    opt_state: Tree
    streams: Tree


class StepShardings(NamedTuple):
    """Shardings of the arguments and results of a step.

    Attributes:
        state: A `NamedSharding` for every array of the `TrainState`.
        frozen: A `NamedSharding` for every frozen array.
        batch: The sharding of all arrays of a batch: rows over data and fsdp.
    """

    state: TrainState
    frozen: Tree
    batch: NamedSharding


def initial_state(parts: ModelPartition, tx: optax.GradientTransformation) -> TrainState:
    """Makes the state before the first step, of copied arrays, so that it can be donated."""
    params, streams = jax.tree.map(jnp.copy, (parts.params, parts.streams))
    counters = jnp.zeros([], jnp.int32), jnp.zeros(2, jnp.int32)
    return TrainState(*counters, params, tx.init(params), streams)


def make_step(
    parts: ModelPartition,
    loss: Loss,
    tx: optax.GradientTransformation,
    accumulation_steps: int = 1,
    shardings: StepShardings | None = None,
    *,
    max_skipped_steps: int = 1,
) -> Callable[[TrainState, Tree, Arrays], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes the jitted train step of a run.

    The loss is the weighted mean over the whole batch, independent of the number of parts it is
    computed in: sums of loss and gradient are divided once, by the weight of the whole batch. They
    are also summed once over copies of the model (`data`), after the last part, in float32; with
    dropout each copy then draws its own masks.

    A step whose loss or gradient is not finite leaves parameters and optimizer state unchanged.
    After `max_skipped_steps` such steps in a row every later step is skipped too, so that nothing
    changes before the caller notices.

    Args:
        parts: From `split_model`.
        loss: The loss of a task.
        tx: The optimizer.
        accumulation_steps: Number of parts of the batch, computed one after another; divides its
            rows.
        shardings: Shardings of its arguments and results, from
            `loft_jax.training.shardings.step_shardings`; by default all arrays are on one device.
            An optimizer state in host memory is moved to the devices for the update.
        max_skipped_steps: Number of consecutive skipped steps after which all are skipped.

    Returns:
        A jitted function of state (donated), frozen parameters and a batch as the loss takes it. It
        returns the next state and metrics: `loss` (the mean), `grad_norm` (global norm of the
        gradients, or of the projected gradients if the optimizer clips by that) and `update_norm`
        (global norm of what was added to the parameters).
    """
    gradients = make_gradients(
        parts, loss, accumulation_steps, None if shardings is None else shardings.batch.mesh
    )

    def moved(opt_state: Tree, kind: str) -> Tree:
        """Moves the state that is offloaded between updates to a kind of memory."""
        if shardings is None:
            return opt_state
        return jax.tree.map(
            lambda x, held: (
                jax.device_put(x, held.with_memory_kind(kind))
                if held.memory_kind == HOST_MEMORY
                else x
            ),
            opt_state,
            shardings.state.opt_state,
        )

    def step(
        state: TrainState, frozen: Tree, batch: Arrays
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        total, weight, grads, streams = gradients(state.params, state.streams, frozen, batch)
        count = jnp.maximum(weight, 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        # Without the barrier, what the optimizer computes without gradients, such as bases, would
        # be computed early and take memory beside the activations.
        grads, state, total, count, streams = jax.lax.optimization_barrier(
            (grads, state, total, count, streams)
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)
        skipped_in_all, streak = state.skipped
        moves = finite & (streak < max_skipped_steps)

        def update(params: Tree, opt_state: Tree) -> tuple[Tree, Tree, jax.Array, jax.Array]:
            # Moved inside the branch: outside, the compiler would move it as early as it can.
            updates, opt_state = tx.update(grads, moved(opt_state, "device"), params)
            norm = optax.tree.get(opt_state, "projected_norm", grad_norm)
            update_norm = optax.tree.norm(updates)
            params = optax.apply_updates(params, updates)
            return params, moved(opt_state, HOST_MEMORY), norm, update_norm

        def skip(params: Tree, opt_state: Tree) -> tuple[Tree, Tree, jax.Array, jax.Array]:
            return params, moved(opt_state, HOST_MEMORY), grad_norm, jnp.zeros_like(grad_norm)

        params, opt_state, grad_norm, update_norm = jax.lax.cond(
            moves,
            update,
            skip,
            state.params,
            state.opt_state,
        )
        skipped = jnp.where(moves, jnp.stack([skipped_in_all, 0]), state.skipped + 1)
        metrics = {
            "loss": total / count,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
        }
        return TrainState(state.step + 1, skipped, params, opt_state, streams), metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    mesh = shardings.batch.mesh

    def step_on_mesh(
        state: TrainState, frozen: Tree, batch: Arrays
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        with use_abstract_mesh(mesh.abstract_mesh):  # the model finds it there
            return step(state, frozen, batch)

    return jax.jit(
        step_on_mesh,
        in_shardings=(shardings.state, shardings.frozen, shardings.batch),
        out_shardings=(shardings.state, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
