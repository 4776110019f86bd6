"""The links of the LoFT chain that carry no moments.

From `project_gradients` to the end of a chain, a leaf X of factor A stands for the full matrix
`X Pᵀ`, P being the partner: `P = s Bᵀ` for A, and `s A` for Bᵀ. That is what adding X to A does to
`W = s A B`. So a norm, a clip or a linear Optax transformation means the same at every place of
the chain, but for one: between `calibrate_moments` and `project_updates` a leaf is a `Moments`.

Leaves that belong to no pair take the same steps as matrices of their own: plain AdamW.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax.optim.pairs import FactorNames, Number, Scaling, find_pairs
from loft_jax.optim.tree import (
    Bases,
    FactorTree,
    Role,
    absolute_square,
    check,
    check_role,
    check_scaling,
    compute_dtype,
    moves,
)


class StepState(NamedTuple):
    """State of a link that only knows whose turn it is.

    Attributes:
      count: (), int32, updates done.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way, as in Optax


class ClipState(NamedTuple):
    """State of `clip_by_projected_norm`.

    Attributes:
      count: (), steps done.
      projected_norm: (), float32 at least, the norm before clipping at the last step.
    """

    count: jax.Array  # type: ignore[assignment]  # as above
    projected_norm: jax.Array


def project_gradients(
    *, scaling: Scaling = 1.0, factors: FactorNames | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales factor gradients so that they stand for the projected full gradient.

    .. math::
      \tilde g_A = G P (P^T P)^+, \qquad \tilde g_A P^T = G \, \mathrm{proj}(P)

    with the raw gradient of A being `G P`. The result does not depend on how the product is split
    into factors, nor on s. Directions in which the partner has nothing (B = 0 at the start) get
    zero. Other leaves pass unchanged.

    Args:
      scaling: The s of `W = s A B`, or a function of the pair's path.
      factors: Names of the factors; see `find_pairs`.

    Returns:
      A stateless transformation of raw gradients; it needs the parameters.

    Raises:
      ValueError: At init or update, for parameters without proper pairs (see `find_pairs`) or when
        the parameters are missing; at once, for a scaling that is zero or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from loft_jax import project_gradients
      >>> params = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.full((1, 2), 5.0)}
      >>> full = jnp.array([[1.0, 3.0], [2.0, 2.0]])  # gradient of W
      >>> grads = {"lora_a": full @ params["lora_b"].T, "lora_b": params["lora_a"].T @ full}
      >>> tx = project_gradients()
      >>> scaled, _ = tx.update(grads, tx.init(params), params)
      >>> (scaled["lora_a"] @ params["lora_b"]).round(3).tolist()  # rows projected on (1, 1)
      [[2.0, 2.0], [2.0, 2.0]]

    References:
      Tastan et al., LoFT, ICLR 2026 (arXiv 2505.21289), gradient scaling; computed through an
      orthonormal basis instead of the Gram matrix (see `loft_jax.optim.subspace`).
    """
    check_scaling(scaling)

    def init(params: optax.Params) -> optax.EmptyState:
        find_pairs(params, factors)
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        bases: Bases | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        tree = FactorTree(updates, params, factors, bases)
        for batch in tree.batches:
            for own, partners in batch.both():
                basis = tree.basis(batch, partners, scaling)
                tree.put(own, basis.project(tree.folded(own)))
        return tree.rebuilt(), state

    return optax.GradientTransformationExtraArgs(init, update)


def clip_by_projected_norm(
    max_norm: Number,
    *,
    scaling: Scaling = 1.0,
    first: Role = "b",
    alternate: bool = True,
    factors: FactorNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips by the global norm of the full matrices that the leaves stand for.

    .. math::
      \Big( \sum_{\mathrm{pairs}} \| X P^T \|_F^2 + \sum_{\mathrm{others}} \| x \|^2 \Big)^{1/2}

    X being the leaf of the factor that moves at this step (of both, without alternation). No dense
    matrix is made: the norm is that of X in an orthonormal basis of P's columns. Before the
    moments this clips the gradient, as full fine-tuning does; behind `project_updates`, or behind
    a whole `loft(...)`, it clips the update.

    Args:
      max_norm: The largest norm that passes unchanged.
      scaling: The s of `W = s A B`, or a function of the pair's path.
      first: The factor that moves at the first step.
      alternate: Whether one factor moves a step.
      factors: Names of the factors; see `find_pairs`.

    Returns:
      A transformation that needs the parameters, and stands anywhere behind `project_gradients`.
      Its state is a step counter, and the norm that it found at the last step, for those who log.

    Raises:
      ValueError: As `project_gradients`; or for a max_norm that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from loft_jax import clip_by_projected_norm
      >>> params = {"lora_a": jnp.eye(2), "lora_b": 10.0 * jnp.eye(2)}
      >>> updates = {"lora_a": jnp.eye(2), "lora_b": jnp.zeros((2, 2))}  # W moves by 10 I
      >>> tx = clip_by_projected_norm(1.0, first="a")
      >>> clipped, _ = tx.update(updates, tx.init(params), params)
      >>> round(float(clipped["lora_a"][0, 0]) * 10 * 2**0.5, 5)
      1.0

    References:
      Tastan et al., LoFT, ICLR 2026 (arXiv 2505.21289), gradient clipping.
    """
    check_scaling(scaling)
    check_role(first)
    check(max_norm, "max_norm", lambda x: x > 0, "a positive number")

    def init(params: optax.Params) -> ClipState:
        find_pairs(params, factors)
        leaves = [leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")]
        dtype = jnp.result_type(jnp.float32, *map(compute_dtype, leaves))
        return ClipState(jnp.zeros([], jnp.int32), jnp.zeros([], dtype))

    def update(
        updates: optax.Updates,
        state: ClipState,
        params: optax.Params | None = None,
        *,
        bases: Bases | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, ClipState]:
        tree = FactorTree(updates, params, factors, bases)
        total: Number = 0.0
        for batch in tree.batches:
            for own, partners in batch.both():
                c = tree.basis(batch, partners, scaling).coordinates(tree.folded(own))
                counts = moves(own, state.count, first) if alternate else True
                total += jnp.where(counts, jnp.sum(jnp.square(c.array)), 0.0)
        for index in tree.plain:
            leaf = tree.leaves[index]
            total += jnp.sum(absolute_square(leaf.astype(compute_dtype(leaf))))
        norm = jnp.sqrt(total)
        scale = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        tree.leaves = [leaf * scale.astype(leaf.dtype) for leaf in tree.leaves]
        count = optax.safe_increment(state.count)
        return tree.rebuilt(), ClipState(count, norm.astype(state.projected_norm.dtype))

    return optax.GradientTransformationExtraArgs(init, update)


def alternate_factors(
    first: Role = "b", *, factors: FactorNames | None = None
) -> optax.GradientTransformation:
    """Lets one factor of each pair move per step: zero updates for the other.

    Moving both at once adds a cross term of the order of the squared learning rate to W.

    Args:
      first: The factor that moves at the first step; "b", since B = 0 leaves A no gradient.
      factors: Names of the factors; see `find_pairs`.

    Returns:
      A transformation whose state is a step counter; it needs the parameters. Leaves that belong
      to no pair pass.

    Raises:
      ValueError: As `project_gradients`; or for a first that is neither "a" nor "b".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from loft_jax import alternate_factors
      >>> params = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2))}
      >>> tx = alternate_factors()
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(lambda u: float(u.sum()), updates)
      {'lora_a': 0.0, 'lora_b': 2.0}

    References:
      Tastan et al., LoFT, ICLR 2026 (arXiv 2505.21289), alternating updates.
    """
    check_role(first)

    def init(params: optax.Params) -> StepState:
        find_pairs(params, factors)
        return StepState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: StepState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, StepState]:
        tree = FactorTree(updates, params, factors)
        for batch in tree.batches:
            for own, _ in batch.both():
                for index in own.indices:
                    leaf = tree.leaves[index]
                    tree.leaves[index] = jnp.where(
                        moves(own, state.count, first), leaf, jnp.zeros_like(leaf)
                    )
        return tree.rebuilt(), StepState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
