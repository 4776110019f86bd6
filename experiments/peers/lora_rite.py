r"""LoRA-RITE: a matrix preconditioner of each factor, in coordinates that no factorization changes.

The gradient of A sees the full gradient G through the partner `P = s Bᵀ`. With `P = Q S` and an
orthonormal Q, `G Q` does not depend on the size of B (the paper calls it unmagnified). Its (r, r)
second moment and its momentum are kept in coordinates of Q, and turned when Q turns.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.peers.shared import apart, finite, small_matrices
from loft_jax.optim.arguments import Number, check_adam
from loft_jax.optim.linear_algebra import batched, matmul, transpose
from loft_jax.optim.optax_types import next_count, transformation
from loft_jax.optim.paired_updates import PairedUpdates, compute_dtype
from loft_jax.optim.pairs import FactorNames, FactorSpec, Scaling, find_pairs


class LoRARiteState(NamedTuple):
    """State of `scale_by_lora_rite`: 2 (m + n) r + 2 r² + 2 numbers a pair.

    Attributes:
        count: (), int32, updates done.
        mu: Momentum of preconditioned gradients, in coordinates of the partner's basis, shaped
            like the parameters.
        nu: Second moments in these coordinates, (*stack, r, r) for each factor.
        escaped: Bound on what second moments lost as the partner turned away, (*stack).
        basis: Orthonormal bases of the factors at the last update, shaped like them.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way, as in Optax
    mu: Any
    nu: Any
    escaped: Any
    basis: Any


def scale_by_lora_rite(
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    *,
    scaling: Scaling = 1.0,
    factors: FactorNames | None = None,
) -> optax.GradientTransformation:
    r"""From raw gradients to updates that point uphill, for trees of pairs alone.

    .. math::
      \bar g = G Q, \quad C = Q_{old}^T Q, \quad
      V \leftarrow \beta_2\, C^T V C + (1 - \beta_2)\, \bar g^T \bar g / m, \quad
      \rho \leftarrow \beta_2 (\rho + d)

    .. math::
      M \leftarrow \beta_1\, M C + (1 - \beta_1)\, \bar g\, (V + \rho I)^{-1/2}, \qquad
      \Delta A = M S^{-T}

    d is the least of the largest fall of an eigenvalue and the fall of the trace from V to
    `Cᵀ V C`; both decays are corrected for their start.

    Args:
        b1: Decay of the momentum.
        b2: Decay of the second moment.
        eps: Added to the roots of eigenvalues.
        scaling: The s of `W = s A B`, or a function of the pair's path.
        factors: Names of the factors; see `find_pairs`.

    Returns:
        A transformation that needs the parameters.
    """
    spec = FactorSpec(factors, scaling)

    def init(params: optax.Params) -> LoRARiteState:
        leaves, treedef = jax.tree.flatten(params)
        nu, escaped = list(leaves), list(leaves)
        for pair in find_pairs(params, spec):
            for factor in (pair.a, pair.b):
                dtype = compute_dtype(leaves[factor.index])
                nu[factor.index] = jnp.zeros((*factor.stack, pair.rank, pair.rank), dtype)
                escaped[factor.index] = jnp.zeros(factor.stack, dtype)
        # Arrays of their own, since a donated state may hold none twice.
        mu, basis = (
            jax.tree.map(lambda x: jnp.zeros_like(x, compute_dtype(x)), params) for _ in range(2)
        )
        nu, escaped = (jax.tree.unflatten(treedef, x) for x in (nu, escaped))
        return LoRARiteState(jnp.zeros([], jnp.int32), mu, nu, escaped, basis)

    def update(
        updates: optax.Updates, state: LoRARiteState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LoRARiteState]:
        tree = PairedUpdates(updates, params, spec)
        treedef = jax.tree.structure(state.mu)
        mu, nu, escaped, basis = (jax.tree.leaves(x) for x in state[1:])
        count = next_count(state.count)
        decay1, decay2 = (_corrected(beta, count) for beta in (b1, b2))

        preconditioners = functools.partial(_preconditioners, decay=decay2, eps=eps)
        turned, moments = [], []
        for group in tree.groups:
            for own, partners in group.sides():
                now = tree.basis(group, partners)
                change = partners.fold([basis[i] for i in partners.indices]).inner(now.q)
                grad = tree.folded(own).times(now.s_inv)
                v = small_matrices(nu, own)
                kept = matmul(matmul(transpose(change), v), change)
                # Numbers as multiples of the identity: matrices are what goes together.
                rho = jnp.stack([escaped[i].reshape(-1, 1, 1) for i in own.indices])
                moments.append((v, kept, grad.inner(grad) / grad.length, rho * jnp.eye(grad.rank)))
                turned.append((own, partners, now, change, grad))
        new_basis: dict[int, jax.Array] = {}
        for (own, partners, now, change, grad), (inverse, v, rho) in zip(
            turned, batched(preconditioners, moments), strict=True
        ):
            direction = grad.times(inverse).array
            momentum = own.fold([mu[i] for i in own.indices]).times(change).array
            momentum = decay1 * momentum + (1 - decay1) * direction
            m = grad.like(momentum.astype(direction.dtype))
            tree.put(own, now.from_coordinates(m))
            for k, (i, leaf) in enumerate(zip(own.indices, own.unfold(m), strict=True)):
                tree.put_update(i, tree.leaves[i])
                mu[i] = leaf
                nu[i] = v[k].reshape(nu[i].shape)
                escaped[i] = rho[k, :, 0, 0].reshape(escaped[i].shape)
            new_basis |= dict(zip(partners.indices, partners.unfold(now.q), strict=True))
        basis = [new_basis[i] for i in range(len(basis))]
        trees = (jax.tree.unflatten(treedef, x) for x in (mu, nu, escaped, basis))
        return tree.rebuilt(), LoRARiteState(count, *trees)

    return transformation(init, update)


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    scaling: Scaling = 1.0,
    factors: FactorNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA-RITE: matrix preconditioning that does not depend on how W is factorized.

    Both factors move at every step, by `scale_by_lora_rite`; the path of W is the same for the
    factors `A T` and `T⁻¹ B`. A clip in front that sees gradients of the factors is not.

    Differs from the paper:

    - s is a part of the partner, so that W moves as far whatever s is.
    - The second moment decays, as in the authors' code; so does what escaped from it, which that
      code leaves out unless it is asked for.
    - The authors' code clips the norm of the unmagnified gradients, of all layers together, at one,
      and skips those whose root mean square is above one; here a clip stands in front, if any.
    - Any orthonormal basis takes the place of the polar factor: the moments turn with it.
    - The default eps is AdamW's; theirs is 1e-6.

    Args:
        learning_rate: A number or a schedule.
        b1: Decay of the momentum.
        b2: Decay of the second moment.
        eps: Added to the roots of eigenvalues of the second moment.
        weight_decay: Decoupled, multiplied by the learning rate; of both factors.
        scaling: The s of `W = s A B`, or a function of the pair's path.
        factors: Names of the factors; see `find_pairs`.

    Returns:
        An Optax transformation that needs the parameters. Leaves that belong to no pair take AdamW.

    References:
        Yen et al., LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA
        Optimization, ICLR 2025 (arXiv 2410.20625).
    """
    check_adam(b1, b2, eps, weight_decay)
    return optax.chain(
        apart(
            scale_by_lora_rite(b1, b2, eps, scaling=scaling, factors=factors),
            optax.scale_by_adam(b1, b2, eps),
            factors,
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _corrected(beta: Number, count: jax.Array) -> jax.Array:
    """The decay of an average that is at each step what Adam's is after its correction."""
    return beta * (1 - beta ** (count - 1)) / (1 - beta**count)


def _preconditioners(
    before: jax.Array,
    kept: jax.Array,
    squares: jax.Array,
    rho: jax.Array,
    *,
    decay: jax.Array,
    eps: Number,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(V + ρ I)^(-1/2)`, V and `ρ I`, of matrices (count, r, r) of which zeros may be a block."""
    v = (decay * kept + (1 - decay) * squares).astype(kept.dtype)
    values, vectors = jnp.linalg.eigh(finite(jnp.concatenate([before, kept, v])))
    values_before, values_kept, values = jnp.split(jnp.maximum(values, 0), 3)
    u = jnp.split(vectors, 3)[-1]
    falls = values_before - values_kept
    fall = jnp.minimum(jnp.max(falls, axis=-1), jnp.sum(falls, axis=-1))
    rho = (decay * (rho[:, 0, 0] + jnp.maximum(fall, 0))).astype(v.dtype)[:, None]
    roots = jnp.sqrt(values + rho) + eps
    inverse = jnp.where(roots > 0, 1 / jnp.where(roots > 0, roots, 1), 0).astype(v.dtype)
    eye = jnp.eye(v.shape[-1], dtype=v.dtype)
    return matmul(u * inverse[:, None, :], transpose(u)), v, rho[:, :, None] * eye
