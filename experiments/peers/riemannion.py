r"""Riemannion: Muon on the manifold of matrices of rank r.

With orthonormal bases U of the columns of A and V of the rows of B, a tangent vector at
`W = s A B` is `U Ḃᵀ + Ȧ Vᵀ` with `Uᵀ Ȧ = 0`: a matrix of rank 2r at most. With bases of what Ȧ
and Ḃ have beside U and V, it is a core (2r, 2r) between orthonormal factors. To orthogonalize it,
to project the result on the tangent space (the last quarter of the core becomes zero) and to
retract `W` to rank r are all work on cores.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.peers.shared import apart, finite
from loft_jax.optim.arguments import Number, check_adam, check_decay, check_positive
from loft_jax.optim.linear_algebra import (
    FactorMatrix,
    batched,
    matmul,
    orthonormal_basis,
    transpose,
)
from loft_jax.optim.optax_types import next_count, transformation
from loft_jax.optim.paired_updates import PairedUpdates, compute_dtype
from loft_jax.optim.pairs import FactorNames, FactorSpec, Scaling, find_pairs


class RiemannionState(NamedTuple):
    """State of the pairs: 2 (m + n) r numbers each.

    Attributes:
        count: (), int32, updates done.
        mu: The Ȧ and Ḃ of the momentum, shaped like the parameters.
        basis: The U and V that they belong to, shaped like the parameters.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way, as in Optax
    mu: Any
    basis: Any


def riemannion(
    learning_rate: optax.ScalarOrSchedule,
    beta: Number = 0.95,
    weight_decay: Number = 0.0,
    *,
    consistent_rms: Number | None = None,
    adam_b1: Number = 0.9,
    adam_b2: Number = 0.999,
    eps: Number = 1e-8,
    scaling: Scaling = 1.0,
    factors: FactorNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Riemannion: the orthogonalized tangent momentum, and a retraction to rank r.

    .. math::
      M \leftarrow \beta\, \mathrm{P}_W(M) + \mathrm{P}_W(G), \qquad
      W \leftarrow \mathrm{SVD}_r\big((1 - \eta \lambda)\, W
      - \eta\, k\, \mathrm{P}_W(\mathrm{ortho}(M))\big)

    with the projection P_W on the tangent space, `ortho(X Σ Yᵀ) = X Yᵀ`, and the best approximation
    SVD_r of rank r. The factors become `A = X` and `s B = Σ Yᵀ` of the last. The path of W depends
    neither on how W is factorized nor on s. Nothing may scale or clip the updates.

    Differs from the paper:

    - It starts from any A and B = 0, not from the paper's initialization by a full gradient: where
      B has nothing, V has nothing either, and the first step moves W in the columns of A.
    - Where W falls below rank r again, by gradients of less rank for instance, a direction that
      both factors have lost does not come back.
    - The momentum that is kept is Muon's, before it is orthogonalized; as it can be read, the
      paper's algorithm keeps the direction.
    - With consistent_rms, k is the factor of Muon; the paper's k is one.

    Args:
        learning_rate: A number or a schedule; of AdamW's size with consistent_rms.
        beta: Decay of the momentum.
        weight_decay: Decoupled, of W and inside the retraction, multiplied by the learning rate.
        consistent_rms: If given, `k = √max(m, n) · consistent_rms`, as in `loft_muon`.
        adam_b1: Decay of Adam's first moment, of leaves that belong to no pair.
        adam_b2: Decay of Adam's second moment.
        eps: Adam's, added to the root of the second moment.
        scaling: The s of `W = s A B`, or a function of the pair's path.
        factors: Names of the factors; see `find_pairs`.

    Returns:
        An Optax transformation that needs the parameters. Leaves that belong to no pair take AdamW.

    References:
        Bogachev et al., LoRA meets Riemannion: Muon Optimizer for Parametrization-independent
        Low-Rank Adapters, ICLR 2026 (arXiv 2507.12142).
    """
    check_decay(beta, "beta")
    check_positive(consistent_rms, "consistent_rms")
    check_adam(adam_b1, adam_b2, eps, weight_decay)
    spec = FactorSpec(factors, scaling)

    def init(params: optax.Params) -> RiemannionState:
        find_pairs(params, spec)
        # Arrays of their own, since a donated state may hold none twice.
        mu, basis = (
            jax.tree.map(lambda x: jnp.zeros_like(x, compute_dtype(x)), params) for _ in range(2)
        )
        return RiemannionState(jnp.zeros([], jnp.int32), mu, basis)

    def update(
        updates: optax.Updates, state: RiemannionState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RiemannionState]:
        tree = PairedUpdates(updates, params, spec)
        treedef = jax.tree.structure(state.mu)
        mu, basis = jax.tree.leaves(state.mu), jax.tree.leaves(state.basis)
        rate: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate

        frames, cores = [], []
        for group in tree.groups:
            now = [tree.basis(group, own) for own in (group.a, group.b)]
            u, v = (x.q for x in now)
            old_u, old_v = (own.fold([basis[i] for i in own.indices]) for own in (group.a, group.b))
            dot_a, dot_b = (own.fold([mu[i] for i in own.indices]) for own in (group.a, group.b))
            # M V and Mᵀ U, of the momentum and of the gradient.
            m_v = _plus(dot_a.times(old_v.inner(v)), old_u.times(dot_b.inner(v)))
            m_u = _plus(dot_b.times(old_u.inner(u)), old_v.times(dot_a.inner(u)))
            g_v = tree.folded(group.a).times(now[1].s_inv)
            g_u = tree.folded(group.b).times(now[0].s_inv)
            m_v = m_v.like((beta * m_v.array + g_v.array).astype(g_v.array.dtype))
            m_u = m_u.like((beta * m_u.array + g_u.array).astype(g_u.array.dtype))
            beside_u, beside_v = _beside(m_v, u), _beside(m_u, v)
            rest_a, rest_b = orthonormal_basis(beside_u), orthonormal_basis(beside_v)
            kept = zip((group.a, group.b), (beside_u, m_u), (u, v), strict=True)  # M = Ȧ Vᵀ + U Ḃᵀ
            for own, moment, q in kept:
                for i, x, y in zip(own.indices, own.unfold(moment), own.unfold(q), strict=True):
                    mu[i], basis[i] = x, y
            s = tree.scalings(group)
            point = matmul(now[0].s, transpose(now[1].s)) / s  # W = U point Vᵀ
            frames.append((group, (u, rest_a.q), (v, rest_b.q), point, s))
            cores.append((_core(u.inner(m_v), transpose(rest_b.s), rest_a.s),))

        retracted = []
        for (_, (u, _), (v, _), point, _), (direction,) in zip(
            frames, batched(_orthogonalize, cores), strict=True
        ):
            k = 1.0
            if consistent_rms is not None:
                k = max(u.length, v.length) ** 0.5 * consistent_rms
            r = u.rank
            moved = -rate * k * direction
            first = (1 - rate * weight_decay) * point + moved[..., :r, :r]
            core = _core(first, moved[..., :r, r:], moved[..., r:, :r])
            retracted.append((core.astype(point.dtype),))
        for (group, left, right, _, s), (x, y) in zip(
            frames, batched(_singular_factors, retracted), strict=True
        ):
            for own, (near, beside), t in ((group.a, left, x), (group.b, right, y / s)):
                r = near.rank
                new = _plus(near.times(t[..., :r, :r]), beside.times(t[..., r:, :r]))
                new = new.like(new.array - tree.param(own).array)
                tree.put_updates(own, new)
        trees = (jax.tree.unflatten(treedef, x) for x in (mu, basis))
        return tree.rebuilt(), RiemannionState(next_count(state.count), *trees)

    adamw = optax.adamw(learning_rate, adam_b1, adam_b2, eps, weight_decay=weight_decay)
    return apart(transformation(init, update), adamw, factors)


def _plus(x: FactorMatrix, y: FactorMatrix) -> FactorMatrix:
    return x.like(x.array + y.array)


def _beside(x: FactorMatrix, q: FactorMatrix) -> FactorMatrix:
    """What x has outside the columns of q; once more, for what rounding has left inside."""
    for _ in range(2):
        x = x.like(x.array - q.times(q.inner(x)).array)
    return x


def _core(first: jax.Array, right: jax.Array, below: jax.Array) -> jax.Array:
    """The core (..., 2r, 2r) of a tangent vector, from three of its quarters."""
    return jnp.block([[first, right], [below, jnp.zeros_like(first)]])


def _orthogonalize(core: jax.Array) -> tuple[jax.Array]:
    """Cores (count, 2r, 2r) with their singular values at one, but for those of rounding."""
    x, values, y = jnp.linalg.svd(finite(core))
    rounding = 4 * core.shape[-1] * float(jnp.finfo(core.dtype).eps)
    kept = values > rounding * values[:, :1]
    return (matmul(jnp.where(kept[:, None, :], x, 0), y),)


def _singular_factors(core: jax.Array) -> tuple[jax.Array, jax.Array]:
    """X and Y Σ of `core = X Σ Yᵀ`, with falling Σ."""
    x, values, y = jnp.linalg.svd(finite(core))
    return x, transpose(y) * values[:, None, :]
