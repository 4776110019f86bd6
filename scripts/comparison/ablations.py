"""LoFT with parts of it off, each a chain of the links that `loft` is made of.

For the two calibrations there is one link more, which keeps moments as they are while the subspace
moves under them. What is off with them too, Adam's bound on an element, has a chain of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax import (
    alternate_factors,
    calibrate_moments,
    clip_by_projected_norm,
    project_gradients,
    project_updates,
)
from loft_jax.optim.moments import Moments
from loft_jax.optim.packed import congruent, packed_size, symmetric_squares
from loft_jax.optim.pairs import Scaling, find_pairs
from loft_jax.optim.tall import transpose
from loft_jax.optim.tree import FactorTree, compute_dtype
from loft_jax.training.config import FinetuneConfig

Kept = Literal["first", "second", "both"]
Part = Literal["scaling", "alternation", "clip", "bound"] | Kept


class KeptMomentsState(NamedTuple):
    """State of `keep_moments`.

    Attributes:
        count: (), int32, updates done.
        mu: First moments of the factors' own projected gradients, shaped like the parameters.
        nu: Second ones, packed: r (r + 1) / 2 in the place of r.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way, as in Optax
    mu: Any
    nu: Any


def keep_moments(
    kept: Kept, b1: float, b2: float, scaling: Scaling
) -> optax.GradientTransformation:
    """As `calibrate_moments`, but with moments that stay what they are when the subspace moves.

    With `X` the projected gradient of a factor, the moments are `m ← b1 m + (1 - b1) X` and
    `p_i ← b2 p_i + (1 - b2) x_i x_iᵀ`: numbers of the factor, read with today's partner.

    Args:
        kept: Which moment stays, or both; the other is calibrated.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        scaling: The s of `W = s A B`.

    Returns:
        A transformation from projected gradients to `Moments`.
    """
    calibrated = calibrate_moments(b1, b2, scaling=scaling)

    def init(params: optax.Params) -> tuple[Any, KeptMomentsState]:
        leaves, treedef = jax.tree.flatten(params)
        mu = [jnp.zeros_like(x, compute_dtype(x)) for x in leaves]
        nu = list(mu)
        for pair in find_pairs(params):
            for factor in (pair.a, pair.b):
                shape = factor.shape(packed_size(pair.rank))
                nu[factor.index] = jnp.zeros(shape, mu[factor.index].dtype)
        state = KeptMomentsState(
            jnp.zeros([], jnp.int32),
            jax.tree.unflatten(treedef, mu),
            jax.tree.unflatten(treedef, nu),
        )
        return calibrated.init(params), state

    def update(
        updates: optax.Updates,
        state: tuple[Any, KeptMomentsState],
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, tuple[Any, KeptMomentsState]]:
        moments, calibrated_state = calibrated.update(updates, state[0], params)
        found, treedef = jax.tree.flatten(moments, is_leaf=lambda x: isinstance(x, Moments))
        tree = FactorTree(updates, params, None)
        mu, nu = jax.tree.leaves(state[1].mu), jax.tree.leaves(state[1].nu)
        for batch in tree.batches:
            for own, partners in batch.both():
                basis = tree.basis(batch, partners, scaling)
                x = tree.folded(own)
                m = own.fold([mu[i] for i in own.indices])
                m = m.like(b1 * m.array + (1 - b1) * x.array)
                p = own.fold([nu[i] for i in own.indices])
                p = p.like(b2 * p.array + (1 - b2) * symmetric_squares(x).array)
                new = zip(
                    own.indices,
                    own.unfold(m),
                    own.unfold(p),
                    own.unfold(basis.coordinates(m)),
                    own.unfold(congruent(p, transpose(basis.s))),
                    strict=True,
                )
                for i, m_, p_, m_seen, p_seen in new:
                    mu[i], nu[i] = m_, p_
                    seen = {"first": {"mu": m_seen}, "second": {"nu": p_seen}}
                    changed = seen.get(kept) or {"mu": m_seen, "nu": p_seen}
                    # Adam's bound on an element is one of moments that belong together.
                    found[i] = _without_bound(dataclasses.replace(found[i], **changed))
        kept_state = KeptMomentsState(
            optax.safe_increment(state[1].count),
            jax.tree.unflatten(jax.tree.structure(state[1].mu), mu),
            jax.tree.unflatten(jax.tree.structure(state[1].nu), nu),
        )
        return jax.tree.unflatten(treedef, found), (calibrated_state, kept_state)

    return optax.GradientTransformation(init, update)


def _without_bound(moments: Moments) -> Moments:
    return dataclasses.replace(moments, limit=jnp.full_like(moments.limit, jnp.inf))


def _drop_bounds(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
    """`Moments` that bound no element, and other leaves as they are."""

    def changed(x: Any) -> Any:
        return _without_bound(x) if isinstance(x, Moments) else x

    return jax.tree.map(changed, updates, is_leaf=lambda x: isinstance(x, Moments))


def loft_without(
    part: Part, config: FinetuneConfig, schedule: optax.Schedule, scaling: Scaling
) -> optax.GradientTransformation:
    """The chain of `loft` without one part; without weight decay.

    Args:
        part: Which one.
        config: Its b1, b2, eps and max_grad_norm are used.
        schedule: Learning rate by step.
        scaling: The s of `W = s A B` by path of a pair.

    Returns:
        The optimizer.
    """
    alternate = part != "alternation"
    clip: list[Any] = []
    if config.max_grad_norm and part == "clip":
        clip = [optax.clip_by_global_norm(config.max_grad_norm)]
    elif config.max_grad_norm:
        clip = [clip_by_projected_norm(config.max_grad_norm, scaling=scaling, alternate=alternate)]
    project = [] if part == "scaling" else [project_gradients(scaling=scaling)]
    # Plain clipping is that of the factors' own gradients, before they are scaled.
    start = [*clip, *project] if part == "clip" else [*project, *clip]
    if part in ("first", "second", "both"):
        moments = keep_moments(part, config.b1, config.b2, scaling)
    else:
        moments = calibrate_moments(config.b1, config.b2, scaling=scaling)
    unbound = [optax.stateless(_drop_bounds)] if part == "bound" else []
    return optax.chain(
        *start,
        moments,
        *unbound,
        project_updates(config.eps, scaling=scaling, alternate=alternate),
        *([alternate_factors()] if alternate else []),
        optax.scale_by_learning_rate(schedule),
    )


def _ablation(part: Part) -> Callable[..., optax.GradientTransformation]:
    def make(
        config: FinetuneConfig, schedule: optax.Schedule, scaling: Scaling
    ) -> optax.GradientTransformation:
        return loft_without(part, config, schedule, scaling)

    return make


ABLATIONS = {
    "loft-without-scaling": _ablation("scaling"),
    "loft-without-alternation": _ablation("alternation"),
    "loft-without-first-calibration": _ablation("first"),
    "loft-without-second-calibration": _ablation("second"),
    "loft-without-calibration": _ablation("both"),
    "loft-without-bound": _ablation("bound"),
    "loft-without-projected-clip": _ablation("clip"),
}
"""Optimizers by the name of the ablation."""
