"""One optimizer step: forward, backward, update, jitted as a whole."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from loft_jax.data import Batch
from loft_jax.models.loss import Arrays
from loft_jax.training.gradients import make_gradients
from loft_jax.training.parts import Parts

Tree = Any

HOST_MEMORY = "pinned_host"
"""What JAX calls the memory of the hosts that devices can copy from."""


class TrainState(NamedTuple):
    """All that a step changes, and so all that a checkpoint holds.

    Attributes:
        step: (), int32, steps done, with those that were skipped.
        skipped: (2,), int32, steps skipped, since their loss or gradient was not finite: all of
            them, and those since the last one that was not.
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
    """Where everything that a step takes and gives lies on a mesh.

    Attributes:
        state: A `NamedSharding` for each array of the `TrainState`.
        frozen: One for each frozen array.
        batch: The one of every array of a batch: rows over data and fsdp.
    """

    state: TrainState
    frozen: Tree
    batch: NamedSharding


def initial_state(parts: Parts, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step; its arrays are its own, so that it can be donated."""
    params, streams = jax.tree.map(jnp.copy, (parts.params, parts.streams))
    counters = jnp.zeros([], jnp.int32), jnp.zeros(2, jnp.int32)
    return TrainState(*counters, params, tx.init(params), streams)


def predicted(batch: Batch) -> Batch:
    """Adds which tokens of a batch are to be predicted, so that only they meet the output head.

    Where the loss is on completions only, most positions carry none, and logits are the largest
    array of a step: (b, t, vocab) in float32.

    Args:
        batch: `tokens` and `loss_mask` (b, t), as `loft_jax.data` makes them.

    Returns:
        The batch without `loss_mask`, with `places` (b, k) int32, the positions whose next token is
        predicted, `targets` (b, k) int32, those tokens, and `weights` (b, k) float32, 0 where a row
        has fewer than k. k is a power of two or t, so that few shapes are compiled.
    """
    learned = batch["loss_mask"][:, 1:] > 0  # (b, t - 1)
    length = learned.shape[1] + 1
    most = max(1, int(learned.sum(axis=1).max()))
    k = min(length, 1 << (most - 1).bit_length())
    # A stable sort brings the learned positions to the front, in order.
    places = np.argsort(~learned, axis=1, kind="stable")[:, :k].astype(np.int32)
    places = np.pad(places, ((0, 0), (0, k - places.shape[1])))
    weights = np.arange(k) < learned.sum(axis=1, keepdims=True)
    targets = np.take_along_axis(batch["tokens"], np.minimum(places + 1, length - 1), axis=1)
    out = {key: batch[key] for key in ("tokens", "positions", "segment_ids")}
    return {**out, "places": places, "targets": targets, "weights": weights.astype(np.float32)}


def make_step(
    parts: Parts,
    tx: optax.GradientTransformation,
    accumulation_steps: int = 1,
    shardings: StepShardings | None = None,
    *,
    max_skipped_steps: int = 1,
) -> Callable[[TrainState, Tree, Arrays], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles the step of a run.

    The loss is the mean over all predicted tokens of the batch, however many parts it is computed
    in: sums of loss and gradient are divided once, by the tokens of the whole batch. Over copies of
    the model (`data`) they are added up once too, behind the last part, in float32; with dropout
    each copy then draws its own.

    A step whose loss or gradient is not finite leaves parameters and optimizer as they are. From
    `max_skipped_steps` of them in a row on all are skipped, however late the caller notices.

    Args:
        parts: From `split_model`.
        tx: The optimizer.
        accumulation_steps: Parts of the batch, computed one after the other; divides its rows.
        shardings: Where its arguments and results lie on a mesh, from
            `loft_jax.training.shardings.step_shardings`; by default all on one device. An optimizer
            state in the memory of the hosts is brought to the devices for the update.
        max_skipped_steps: Steps skipped in a row after which nothing moves.

    Returns:
        A jitted function of state (donated), frozen parameters and a batch from `predicted`. It
        gives the next state and metrics: `loss` (nats a token), `grad_norm` (global norm of the
        gradients; where the optimizer clips by the norm of projected ones, that norm) and
        `update_norm` (global norm of what was added to the parameters).
    """
    gradients = make_gradients(
        parts, accumulation_steps, None if shardings is None else shardings.batch.mesh
    )

    def moved(opt_state: Tree, kind: str) -> Tree:
        """What lies in the memory of the hosts between updates, there or on the devices."""
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
        loss, grads, streams = gradients(state.params, state.streams, frozen, batch)
        count = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        # What the optimizer can compute without gradients, such as bases, would else be computed
        # early and lie beside the activations.
        grads, state, loss, count, streams = jax.lax.optimization_barrier(
            (grads, state, loss, count, streams)
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        total, streak = state.skipped
        moves = finite & (streak < max_skipped_steps)

        def update(params: Tree, opt_state: Tree) -> tuple[Tree, Tree, jax.Array, jax.Array]:
            # Moved in here, since the compiler moves it as early as it can.
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
        skipped = jnp.where(moves, jnp.stack([total, 0]), state.skipped + 1)
        metrics = {
            "loss": loss / count,
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
