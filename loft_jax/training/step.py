"""One optimizer step: forward, backward, update, jitted."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from loft_jax.tasks.task import Arrays
from loft_jax.training.gradients import Loss, Sums, make_gradients
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


class TrainStep:
    """A jitted training step, as two programs: gradients, and the optimizer's update.

    The gradients are compiled for each shape of batches, the update once for all of them.

    Attributes:
        gradients: Jitted, from trained parameters, streams, frozen parameters and a batch to the
            loss, its weight, the mean gradients and the next streams.
        update: Jitted, from a state with the next streams (donated) and the first three of these
            to the result of a step.
    """

    def __init__(self, gradients: Any, update: Any, whole: Any) -> None:
        self.gradients, self.update, self._whole = gradients, update, whole

    def __call__(
        self, state: TrainState, frozen: Tree, batch: Arrays
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Does a step.

        Args:
            state: Before the step; donated.
            frozen: Frozen parameters.
            batch: As the loss takes it.

        Returns:
            The state after the step, and metrics: `loss` (the mean), `grad_norm` (global norm of
            the gradients, or of the projected gradients if the optimizer clips by that) and
            `update_norm` (global norm of what was added to the parameters).
        """
        *sums, streams = self.gradients(state.params, state.streams, frozen, batch)
        result: tuple[TrainState, dict[str, jax.Array]] = self.update(
            state._replace(streams=streams), *sums
        )
        return result

    def lower(self, state: Tree, frozen: Tree, batch: Tree) -> jax.stages.Lowered:
        """Lowers the step as one program, to see what it takes on a machine.

        That is what both take: gradients are all that is left of one when the other begins, in one
        program too.
        """
        lowered: jax.stages.Lowered = self._whole.lower(state, frozen, batch)
        return lowered


def make_step(
    parts: ModelPartition,
    loss: Loss,
    tx: optax.GradientTransformation,
    accumulation_steps: int = 1,
    shardings: StepShardings | None = None,
    *,
    max_skipped_steps: int = 1,
) -> TrainStep:
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
        The step.
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

    def mean_gradients(params: Tree, streams: Tree, frozen: Tree, batch: Arrays) -> Sums:
        total, weight, grads, streams = gradients(params, streams, frozen, batch)
        count = jnp.where(weight > 0, weight, 1.0)  # weights of classes may add up to less than 1
        return total, count, jax.tree.map(lambda g: g / count, grads), streams

    def updated(
        state: TrainState, total: jax.Array, count: jax.Array, grads: Tree
    ) -> tuple[TrainState, dict[str, jax.Array]]:
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
        return TrainState(state.step + 1, skipped, params, opt_state, state.streams), metrics

    def whole(
        state: TrainState, frozen: Tree, batch: Arrays
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        *sums, streams = mean_gradients(state.params, state.streams, frozen, batch)
        # Without the barrier, what the optimizer computes without gradients, such as bases, would
        # be computed early and take memory beside the activations.
        state, sums = jax.lax.optimization_barrier((state._replace(streams=streams), sums))
        return updated(state, *sums)

    if shardings is None:
        return TrainStep(
            jax.jit(mean_gradients),
            jax.jit(updated, donate_argnums=0),
            jax.jit(whole, donate_argnums=0),
        )
    mesh, layout = shardings.batch.mesh, shardings.state
    everywhere = NamedSharding(mesh, PartitionSpec())
    inputs = (shardings.frozen, shardings.batch)
    sums = (everywhere, everywhere, layout.params)

    def on_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*arguments: Any) -> Any:
            with use_abstract_mesh(mesh.abstract_mesh):  # the model finds it there
                return function(*arguments)

        return called

    return TrainStep(
        jax.jit(
            on_mesh(mean_gradients),
            in_shardings=(layout.params, layout.streams, *inputs),
            out_shardings=(*sums, layout.streams),
        ),
        jax.jit(
            on_mesh(updated),
            in_shardings=(layout, *sums),
            out_shardings=(layout, everywhere),
            donate_argnums=0,
        ),
        jax.jit(
            on_mesh(whole),
            in_shardings=(layout, *inputs),
            out_shardings=(layout, everywhere),
            donate_argnums=0,
        ),
    )
