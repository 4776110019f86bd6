"""The links that carry Adam's moments of the full weight, and rebuild its direction from them."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax.optim import second_moment as second
from loft_jax.optim.links import StepState
from loft_jax.optim.pairs import FactorNames, Scaling, find_pairs
from loft_jax.optim.subspace import matmul
from loft_jax.optim.tree import (
    FactorTree,
    Number,
    Role,
    check,
    check_role,
    check_scaling,
    compute_dtype,
    moves,
)

SecondMoment = Literal["full"]


class Moments(NamedTuple):
    """Bias-corrected moments, in the place of a leaf.

    Attributes:
      mu: For a factor (stack, m, r), coordinates in the partner's basis; else like the leaf.
      nu: For a factor (stack, m, q), packed symmetric matrices; else like the leaf.
      limit: (), the bound of Adam on an element of the direction at this step.
    """

    mu: jax.Array
    nu: jax.Array
    limit: jax.Array


class CalibratedMomentsState(NamedTuple):
    """State of `calibrate_moments`: (m + n) (q + 2 r) numbers a pair, q = r (r + 1) / 2.

    Each tree has the structure of the parameters, and each leaf the axes of its parameter.

    Attributes:
      count: (), int32, updates done.
      mu: First moments. For a factor: shaped like it, in coordinates of the partner's basis.
      nu: Second moments. For a factor: shaped like it, with q in the place of r.
      basis: For a factor: orthonormal basis of its columns at the last update, shaped like it.
        Nothing for other leaves.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way, as in Optax
    mu: Any
    nu: Any
    basis: Any


def calibrate_moments(
    b1: Number = 0.9,
    b2: Number = 0.999,
    *,
    second_moment: SecondMoment = "full",
    scaling: Scaling = 1.0,
    factors: FactorNames | None = None,
) -> optax.GradientTransformation:
    r"""Accumulates the moments of the projected full gradient while its subspace moves.

    With `P = Q S` and the gradient's coordinates `c = G Q` (rows c_i), all at the same parameters
    for both factors:

    .. math::
      C = Q_{old}^T Q, \quad
      m \leftarrow \beta_1 m C + (1 - \beta_1) c, \quad
      p_i \leftarrow \beta_2 C^T p_i C + (1 - \beta_2) c_i c_i^T

    so that `m Qᵀ` is Adam's first moment with every earlier gradient projected on today's
    subspace, and `Q_jᵀ p_i Q_j` the second moment of element (i, j) of the same. C is a product of
    orthonormal matrices: a contraction, whatever the condition of the factors. The matrices p_i
    are kept as packed halves (see `loft_jax.optim.second_moment`).

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      second_moment: "full": exact, one symmetric (r, r) matrix a row.
      scaling: The s of `W = s A B`, or a function of the pair's path.
      factors: Names of the factors; see `find_pairs`.

    Returns:
      A transformation from projected gradients to `Moments`, for `project_updates`; it needs the
      parameters. Its state is float32 at least.

    Raises:
      ValueError: As `project_gradients`; or for a b1 or b2 outside [0, 1), or an unknown
        second_moment.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from loft_jax import calibrate_moments, project_gradients, project_updates
      >>> tx = optax.chain(project_gradients(), calibrate_moments(0.9, 0.99), project_updates())
      >>> state = tx.init({"lora_a": jnp.ones((64, 4)), "lora_b": jnp.zeros((4, 32))})
      >>> state[1].nu["lora_a"].shape, state[1].nu["lora_b"].shape
      ((64, 10), (10, 32))

    References:
      Tastan et al., LoFT, ICLR 2026 (arXiv 2505.21289), calibration of the first and of the second
      moment.
    """
    check_scaling(scaling)
    for name, beta in (("b1", b1), ("b2", b2)):
        check(beta, name, lambda x: 0 <= x < 1, "a number in [0, 1)")
    if second_moment != "full":
        raise ValueError(f"second_moment is {second_moment!r}, expected 'full'")

    def init(params: optax.Params) -> CalibratedMomentsState:
        leaves, treedef = jax.tree.flatten(params)
        mu = [jnp.zeros_like(leaf, dtype=compute_dtype(leaf)) for leaf in leaves]
        nu = [jnp.zeros_like(x) for x in mu]
        basis: list[Any] = [optax.MaskedNode() for _ in leaves]
        for pair in find_pairs(params, factors):
            for factor in (pair.a, pair.b):
                # One row of packed numbers in the place of each row of r.
                rows = factor.fold(mu[factor.index]).shape[:2]
                packed = (*rows, second.packed_size(pair.rank))
                nu[factor.index] = factor.unfold(jnp.zeros(packed, mu[factor.index].dtype))
                basis[factor.index] = jnp.zeros_like(mu[factor.index])
        return CalibratedMomentsState(
            jnp.zeros([], jnp.int32), *(jax.tree.unflatten(treedef, x) for x in (mu, nu, basis))
        )

    def update(
        updates: optax.Updates, state: CalibratedMomentsState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, CalibratedMomentsState]:
        tree = FactorTree(updates, params, factors)
        mu, nu = jax.tree.leaves(state.mu), jax.tree.leaves(state.nu)
        # By position, and not by the MaskedNodes: with `optax.masked` the parameters have some too.
        paired = sorted(factor.index for pair in tree.pairs for factor in (pair.a, pair.b))
        basis = dict(zip(paired, jax.tree.leaves(state.basis), strict=True))
        count = optax.safe_increment(state.count)
        correction1, correction2 = 1 - b1**count, 1 - b2**count
        limit = _adam_limit(b1, b2, count)

        def corrected(m: jax.Array, p: jax.Array) -> Moments:
            dtype = m.dtype
            return Moments(
                m / correction1.astype(dtype), p / correction2.astype(dtype), limit.astype(dtype)
            )

        for pair in tree.pairs:
            new_basis = {}
            for factor, partner in pair.both():
                now = tree.basis(pair, partner, scaling)
                old = partner.fold(basis[partner.index])
                c = now.coordinates(tree.folded(factor))  # (stack, m, r)
                change = matmul(jnp.swapaxes(old, 1, 2), now.q)  # (stack, r, r)
                m = b1 * matmul(factor.fold(mu[factor.index]), change) + (1 - b1) * c
                p = b2 * matmul(factor.fold(nu[factor.index]), second.symmetric_square(change))
                p += (1 - b2) * second.symmetric_product(c, c)  # (stack, m, q)
                dtype = mu[factor.index].dtype
                m, p = m.astype(dtype), p.astype(dtype)
                tree.leaves[factor.index] = corrected(m, p)
                mu[factor.index], nu[factor.index] = factor.unfold(m), factor.unfold(p)
                new_basis[partner.index] = partner.unfold(now.q)
            for index, q in new_basis.items():
                basis[index] = q.astype(basis[index].dtype)
        for index in tree.plain:
            g = tree.leaves[index].astype(mu[index].dtype)
            mu[index] = (b1 * mu[index] + (1 - b1) * g).astype(g.dtype)
            nu[index] = (b2 * nu[index] + (1 - b2) * g * g).astype(g.dtype)
            tree.leaves[index] = corrected(mu[index], nu[index])

        new_state = CalibratedMomentsState(
            count,
            jax.tree.unflatten(jax.tree.structure(state.mu), mu),
            jax.tree.unflatten(jax.tree.structure(state.nu), nu),
            jax.tree.unflatten(jax.tree.structure(state.basis), [basis[i] for i in paired]),
        )
        return tree.rebuilt(), new_state

    return optax.GradientTransformation(init, update)


def project_updates(
    eps: Number = 1e-8,
    *,
    scaling: Scaling = 1.0,
    first: Role = "b",
    alternate: bool = True,
    factors: FactorNames | None = None,
) -> optax.GradientTransformation:
    r"""Rebuilds Adam's direction of the full weight and projects it on what the factor can hold.

    .. math::
      D = \frac{m Q^T}{\sqrt{v} + \epsilon}, \quad v_{ij} = Q_j^T p_i Q_j, \quad
      \Delta A = D P (P^T P)^+

    so that W moves by `ΔA Pᵀ = D proj(P)`, whatever s is. D is made and projected back in tiles of
    rows, and never stands whole in memory. No element of it exceeds Adam's own bound.

    Args:
      eps: Adam's epsilon, beside the root of the second moment of the full gradient.
      scaling: The s of `W = s A B`, or a function of the pair's path.
      first: The factor that moves at the first step.
      alternate: Whether one factor moves a step; the direction of the other is then not computed
        and its update is zero.
      factors: Names of the factors; see `find_pairs`.

    Returns:
      A transformation from the `Moments` of `calibrate_moments` to updates that point uphill, as
      Optax's `scale_by_*` do, in the dtypes of the parameters; its state is a step counter, and it
      needs the parameters.

    Raises:
      ValueError: As `project_gradients`; for a negative eps; or, at update, for leaves that are not
        `Moments`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from loft_jax import calibrate_moments, project_gradients, project_updates
      >>> params = {"lora_a": jnp.eye(2), "lora_b": 3 * jnp.eye(2)}
      >>> full = jnp.array([[1.0, -2.0], [0.5, 4.0]])  # gradient of W
      >>> grads = {"lora_a": full @ params["lora_b"].T, "lora_b": params["lora_a"].T @ full}
      >>> tx = optax.chain(project_gradients(), calibrate_moments(), project_updates(first="a"))
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> (updates["lora_a"] @ params["lora_b"]).round(3).tolist()  # Adam's first step on W
      [[1.0, -1.0], [1.0, 1.0]]

    References:
      Tastan et al., LoFT, ICLR 2026 (arXiv 2505.21289), projected full update.
    """
    check_scaling(scaling)
    check_role(first)
    check(eps, "eps", lambda x: x >= 0, "a number >= 0")

    def init(params: optax.Params) -> StepState:
        find_pairs(params, factors)
        return StepState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: StepState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, StepState]:
        tree = FactorTree(updates, params, factors, is_leaf=_is_moments)
        for leaf in tree.leaves:
            if not _is_moments(leaf):
                raise ValueError(
                    f"project_updates found a leaf of type {type(leaf).__name__}, expected the "
                    "Moments that calibrate_moments makes: put that link right before this one"
                )
        for pair in tree.pairs:
            for factor, partner in pair.both():
                basis = tree.basis(pair, partner, scaling)
                mu, nu, limit = tree.leaves[factor.index]

                direction = functools.partial(
                    second.adam_direction, mu, nu, basis.q, jnp.asarray(eps, mu.dtype), limit
                )
                if alternate:
                    rest = functools.partial(jnp.zeros_like, mu)
                    x = jax.lax.cond(moves(factor, state.count, first), direction, rest)
                else:
                    x = direction()
                tree.finish(factor.index, factor.unfold(basis.from_coordinates(x)))
        for index in tree.plain:
            mu, nu, _ = tree.leaves[index]
            tree.finish(index, mu / (jnp.sqrt(nu) + eps))
        return tree.rebuilt(), StepState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _adam_limit(b1: Number, b2: Number, count: jax.Array) -> jax.Array:
    """The largest |m| / sqrt(v), bias-corrected, that Adam can reach after `count` steps.

    By Cauchy-Schwarz over the weights of the two averages: with ρ = b1² / b2,
    `|m̂| / sqrt(v̂) <= (1 - b1) sqrt(1 + ρ + ... + ρ^(count - 1)) / sqrt(1 - b2)`
    times `sqrt(1 - b2^count) / (1 - b1^count)`. Each gradient of the sum may be projected, since m
    and v are built from the same projected ones.
    """
    rho = b1**2 / jnp.maximum(b2, float(jnp.finfo(jnp.float32).tiny))
    one = jnp.abs(1 - rho) < 1e-6
    geometric = jnp.where(one, count, (1 - rho**count) / jnp.where(one, 1.0, 1 - rho))
    corrections = jnp.sqrt(1 - b2**count) / (1 - b1**count)
    return corrections * (1 - b1) * jnp.sqrt(geometric / (1 - b2))


def _is_moments(x: Any) -> bool:
    return isinstance(x, Moments)
