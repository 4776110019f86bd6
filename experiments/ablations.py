"""Exact LoFT with parts of it off or others in their place, each a chain of its links.

For the two calibrations there is one link more, which keeps moments as they are while the subspace
moves under them. What is off with them too, Adam's bound on an element, has a chain of its own. For
the overlap of the two projections there is a link that divides it in other ways, and for the cross
term of both updates one that retracts W to its best approximation of rank r.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from loft_jax import (
    assign_overlap,
    calibrate_moments,
    clip_by_projected_norm,
    project_gradients,
    project_updates,
)
from loft_jax.optim.linear_algebra import (
    FactorMatrix,
    batched,
    matmul,
    orthonormal_basis,
    transpose,
)
from loft_jax.optim.moments import Moments
from loft_jax.optim.optax_types import next_count, transformation
from loft_jax.optim.packed_matrices import congruence, packed_size, symmetric_squares
from loft_jax.optim.paired_updates import PairedUpdates, compute_dtype
from loft_jax.optim.pairs import FactorSpec, Scaling, find_pairs
from loft_jax.training.config import FinetuneConfig

Kept = Literal["first", "second", "both"]
Overlap = Literal["twice", "halved", "longer"]
Part = Literal["scaling", "clip", "bound", "retraction"] | Kept | Overlap


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
    calibrated = calibrate_moments(b1, b2, second_moment="full", spec=FactorSpec(scaling=scaling))

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
        tree = PairedUpdates(updates, params, FactorSpec(scaling=scaling))
        mu, nu = jax.tree.leaves(state[1].mu), jax.tree.leaves(state[1].nu)
        for group in tree.groups:
            for own, partners in group.sides():
                basis = tree.basis(group, partners)
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
                    own.unfold(congruence(transpose(basis.s))(p)),
                    strict=True,
                )
                for i, m_, p_, m_seen, p_seen in new:
                    mu[i], nu[i] = m_, p_
                    seen = {"first": {"mu": m_seen}, "second": {"nu": p_seen}}
                    changed = seen.get(kept) or {"mu": m_seen, "nu": p_seen}
                    # Adam's bound on an element is one of moments that belong together.
                    found[i] = _without_bound(dataclasses.replace(found[i], **changed))
        kept_state = KeptMomentsState(
            next_count(state[1].count),
            jax.tree.unflatten(jax.tree.structure(state[1].mu), mu),
            jax.tree.unflatten(jax.tree.structure(state[1].nu), nu),
        )
        return jax.tree.unflatten(treedef, found), (calibrated_state, kept_state)

    return transformation(init, update)


def _without_bound(moments: Moments) -> Moments:
    return dataclasses.replace(moments, limit=jnp.full_like(moments.limit, jnp.inf))


def _drop_bounds(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
    """`Moments` that bound no element, and other leaves as they are."""

    def changed(x: Any) -> Any:
        return _without_bound(x) if isinstance(x, Moments) else x

    return jax.tree.map(changed, updates, is_leaf=lambda x: isinstance(x, Moments))


def divide_overlap(overlap: Overlap, scaling: Scaling) -> optax.GradientTransformation:
    """As `assign_overlap`, with another rule.

    Args:
        overlap: "twice" leaves it to both factors, "halved" gives each a half, "longer" all of it
            to the factor of the longer side of the weight.
        scaling: The s of `W = s A B`.

    Returns:
        A transformation without state.
    """

    def divided(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        tree = PairedUpdates(updates, params, FactorSpec(scaling=scaling))
        for group in tree.groups:
            a_keeps = tree.param(group.a).length >= tree.param(group.b).length
            for own, _ in group.sides():
                taken = {"twice": 0.0, "halved": 0.5, "longer": float(own.rank_last != a_keeps)}
                x, q = tree.folded(own), tree.basis(group, own).q
                tree.put(own, x.like(x.array - taken[overlap] * q.times(q.inner(x)).array))
        return tree.rebuilt()

    return optax.stateless(divided)


def retract(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
    """Final updates to the balanced factors of the best approximation of `W + u_A B + A u_B`.

    That matrix is `[A u_A] [B + u_B; B]`, of rank 2 r. With orthonormal bases of both, its singular
    values are those of a (2r, 2r) matrix, of which the r largest are kept. Without this link W goes
    to `(A + u_A) (B + u_B)`: to first order the same.
    """
    tree = PairedUpdates(updates, params)
    wide: list[tuple[Any, Any]] = []
    for group in tree.groups:
        a, u_a = tree.param(group.a), tree.folded(group.a)
        b, u_b = tree.param(group.b), tree.folded(group.b)
        left = FactorMatrix(jnp.concatenate([a.tall(), u_a.tall()], axis=-1))
        right = FactorMatrix(
            jnp.concatenate([(b.like(b.array + u_b.array)).tall(), b.tall()], axis=-1)
        )
        wide.append((orthonormal_basis(left), orthonormal_basis(right)))
    cores = [(matmul(left.s, transpose(right.s)),) for left, right in wide]
    parts = batched(_factors_of_core, cores)
    for group, (left, right), (of_left, of_right) in zip(tree.groups, wide, parts, strict=True):
        for own, basis, part in ((group.a, left, of_left), (group.b, right, of_right)):
            new = basis.q.times(part[..., : group.rank])
            now = tree.param(own)
            moved = new if own.rank_last else FactorMatrix(new.wide(), rank_last=False)
            # Where B is zero yet, there is nothing to balance: its first move has no cross term.
            kept = jnp.where(
                jnp.any(tree.param(group.b).array != 0),
                moved.array - now.array,
                tree.folded(own).array,
            )
            tree.put(own, now.like(kept))
    return tree.rebuilt()


def _factors_of_core(core: jax.Array) -> tuple[jax.Array, jax.Array]:
    u, sigma, v = jnp.linalg.svd(core, full_matrices=False)
    return u * jnp.sqrt(sigma)[:, None], transpose(v) * jnp.sqrt(sigma)[:, None]


def loft_with(
    part: Part, config: FinetuneConfig, schedule: optax.Schedule, scaling: Scaling
) -> optax.GradientTransformation:
    """The chain of `loft` without one part, or with another in its place; without weight decay.

    Args:
        part: Which one.
        config: The b1, b2, eps and max_grad_norm of its optimizer are used.
        schedule: Learning rate by step.
        scaling: The s of `W = s A B` by path of a pair.

    Returns:
        The optimizer.
    """
    given, spec = config.optimizer, FactorSpec(scaling=scaling)
    clip: list[Any] = []
    if given.max_grad_norm and part == "clip":
        clip = [optax.clip_by_global_norm(given.max_grad_norm)]
    elif given.max_grad_norm:
        clip = [clip_by_projected_norm(given.max_grad_norm, spec=spec)]
    project = [] if part == "scaling" else [project_gradients(spec=spec)]
    # Plain clipping is that of the factors' own gradients, before they are scaled.
    start = [*clip, *project] if part == "clip" else [*project, *clip]
    if part in get_args(Kept):
        moments = keep_moments(part, given.b1, given.b2, scaling)  # type: ignore[arg-type]  # one of Kept
    else:
        moments = calibrate_moments(given.b1, given.b2, second_moment="full", spec=spec)
    if part in get_args(Overlap):
        overlap = divide_overlap(part, scaling)  # type: ignore[arg-type]  # one of Overlap
    else:
        overlap = assign_overlap(spec=spec)
    return optax.chain(
        *start,
        moments,
        *([optax.stateless(_drop_bounds)] if part == "bound" else []),
        project_updates(given.eps, spec=spec),
        optax.scale_by_learning_rate(schedule),
        overlap,
        *([optax.stateless(retract)] if part == "retraction" else []),
    )


def _ablation(part: Part) -> Callable[..., optax.GradientTransformation]:
    def make(
        config: FinetuneConfig, schedule: optax.Schedule, scaling: Scaling
    ) -> optax.GradientTransformation:
        return loft_with(part, config, schedule, scaling)

    return make


ABLATIONS = {
    "loft-without-scaling": _ablation("scaling"),
    "loft-without-first-calibration": _ablation("first"),
    "loft-without-second-calibration": _ablation("second"),
    "loft-without-calibration": _ablation("both"),
    "loft-without-bound": _ablation("bound"),
    "loft-without-projected-clip": _ablation("clip"),
    "loft-overlap-twice": _ablation("twice"),
    "loft-overlap-halved": _ablation("halved"),
    "loft-overlap-longer": _ablation("longer"),
    "loft-retracted": _ablation("retraction"),
}
"""Optimizers by the name of the ablation."""
