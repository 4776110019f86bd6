r"""AdaPreLoRA: the step of Adafactor on W, projected on what factors can do in Adafactor's metric.

Adafactor's second moment of a full weight is an outer product, of row means and column means: its
root is a metric H with `H(X) = D X E`, D and E diagonal. Factors move W in the tangent space of
the matrices of its rank. Their move here is the nearest, in the norm of H, to Adafactor's
`H⁻¹(G) = D⁻¹ G E⁻¹`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.peers.shared import apart
from loft_jax.optim.arguments import Number, check_adam
from loft_jax.optim.linear_algebra import Basis, FactorMatrix, orthonormal_basis
from loft_jax.optim.optax_types import next_count, transformation
from loft_jax.optim.paired_updates import PairedUpdates, compute_dtype
from loft_jax.optim.pairs import FactorNames, FactorSpec, Scaling, find_pairs


class AdaPreLoRAState(NamedTuple):
    """State of `scale_by_adapre_lora`: (m + n) (r + 1) numbers a pair.

    Attributes:
        count: (), int32, updates done.
        mu: First moments of the factors' gradients, shaped like the parameters.
        nu: Means of squares over the rows of the full gradient for A, over its columns for B: one
            number in the place of r.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way, as in Optax
    mu: Any
    nu: Any


def scale_by_adapre_lora(
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    *,
    scaling: Scaling = 1.0,
    factors: FactorNames | None = None,
) -> optax.GradientTransformation:
    r"""From raw gradients to updates that point uphill, for trees of pairs alone.

    .. math::
      D = \sqrt{L / \mathrm{mean}(L)}, \quad E = \sqrt{R}, \quad
      \Pi_A = P (P^T D P)^+ P^T D, \quad P = s A

    .. math::
      \Delta B = (P^T D P)^+ m_B\, E^{-1} (I - \tfrac12 \Pi_B), \qquad
      \Delta A = (I - \tfrac12 \Pi_A)\, D^{-1} m_A\, (s B E B^T s)^+

    with L and R the row and column means of squares of the gradient, averaged over steps. Of all
    factor updates with this move of W, the one whose two parts are nearest to each other.

    Args:
        b1: Decay of the first moment.
        b2: Decay of the second moments.
        eps: Its square is added to the second moments.
        scaling: The s of `W = s A B`, or a function of the pair's path.
        factors: Names of the factors; see `find_pairs`.

    Returns:
        A transformation that needs the parameters.
    """
    spec = FactorSpec(factors, scaling)

    def init(params: optax.Params) -> AdaPreLoRAState:
        leaves, treedef = jax.tree.flatten(params)
        nu = list(leaves)
        for pair in find_pairs(params, spec):
            for factor in (pair.a, pair.b):
                nu[factor.index] = jnp.zeros(factor.shape(1), compute_dtype(leaves[factor.index]))
        mu = jax.tree.map(lambda x: jnp.zeros_like(x, compute_dtype(x)), params)
        return AdaPreLoRAState(jnp.zeros([], jnp.int32), mu, jax.tree.unflatten(treedef, nu))

    def update(
        updates: optax.Updates, state: AdaPreLoRAState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdaPreLoRAState]:
        tree = PairedUpdates(updates, params, spec)
        treedef = jax.tree.structure(state.mu)
        mu, nu = jax.tree.leaves(state.mu), jax.tree.leaves(state.nu)
        count = next_count(state.count)

        def averaged(
            leaves: list[jax.Array], x: FactorMatrix, own: Any, beta: Number
        ) -> FactorMatrix:
            """Goes on with an average that is kept in some leaves; corrected for its start."""
            dtype = x.array.dtype
            average = own.fold([leaves[i] for i in own.indices]).array
            average = (beta * average + (1 - beta) * x.array).astype(dtype)
            for i, leaf in zip(own.indices, own.unfold(x.like(average)), strict=True):
                leaves[i] = leaf
            return x.like((average / (1 - beta**count)).astype(dtype))

        for group in tree.groups:
            both = group.a, group.b
            bases = [tree.basis(group, own) for own in both]
            grads = [tree.folded(own) for own in both]
            squares = _mean_squares(grads, bases)
            rows, columns = (
                averaged(nu, x, own, b2).array + eps**2
                for x, own in zip(squares, both, strict=True)
            )
            axis = squares[0].long_axis
            rows /= _nonzero(jnp.mean(rows, axis, keepdims=True))
            roots = rows**0.25, columns**0.25  # of D and E
            weighted = []
            for basis, root in zip(bases, roots, strict=True):
                p = basis.q.times(basis.s)  # s A, or s Bᵀ
                weighted.append(orthonormal_basis(p.like(p.array * root)))
            for k, own in enumerate(both):
                m = averaged(mu, grads[k], own, b1)
                x = weighted[1 - k].project(m.like(m.array / _nonzero(roots[k])))
                q = weighted[k].q
                x = x.like((x.array - q.times(q.inner(x)).array / 2) / _nonzero(roots[k]))
                tree.put_updates(own, x)
        trees = (jax.tree.unflatten(treedef, x) for x in (mu, nu))
        return tree.rebuilt(), AdaPreLoRAState(count, *trees)

    return transformation(init, update)


def adapre_lora(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    scaling: Scaling = 1.0,
    factors: FactorNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaPreLoRA: Adafactor's preconditioner of W, solved for the factors in closed form.

    Both factors move at every step, by `scale_by_adapre_lora`.

    Differs from the paper, of which the equations of a step were at hand but not the algorithm:

    - The second moments are those of the full gradient projected on the tangent space, all that
      gradients of factors tell of it; the paper reads the full gradient (m, n), or takes
      `g_A B + A g_B` for it, whose size depends on how W is factorized.
    - The averages over steps are Adam's: of the factors' gradients, and of their squares.
    - A pseudoinverse through an orthonormal basis takes the place of any damping.

    Args:
        learning_rate: A number or a schedule.
        b1: Decay of the first moment.
        b2: Decay of the second moments.
        eps: Its square is added to the second moments.
        weight_decay: Decoupled, multiplied by the learning rate; of both factors.
        scaling: The s of `W = s A B`, or a function of the pair's path.
        factors: Names of the factors; see `find_pairs`.

    Returns:
        An Optax transformation that needs the parameters. Leaves that belong to no pair take AdamW.

    References:
        Liu et al., AdaPreLoRA: Adafactor Preconditioned Low-Rank Adaptation (arXiv 2605.08734),
        Theorem 3.2; Shazeer and Stern, Adafactor, ICML 2018 (arXiv 1804.04235).
    """
    check_adam(b1, b2, eps, weight_decay)
    return optax.chain(
        apart(
            scale_by_adapre_lora(b1, b2, eps, scaling=scaling, factors=factors),
            optax.scale_by_adam(b1, b2, eps),
            factors,
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _mean_squares(grads: list[FactorMatrix], bases: list[Basis]) -> list[FactorMatrix]:
    """Row and column means of squares of the projection of the full gradient G.

    With bases U and V of the factors, it is a sum `G V Vᵀ + U (Uᵀ G - Uᵀ G V Vᵀ)` of two matrices
    whose rows are orthogonal; its transpose is one of the same form.
    """
    # G V and Gᵀ U.
    seen = [grad.times(basis.s_inv) for grad, basis in zip(grads, reversed(bases), strict=True)]
    found = []
    for k, (own, other) in enumerate(zip(bases, reversed(bases), strict=True)):
        beside = seen[1 - k]
        beside = beside.like(beside.array - other.q.times(other.q.inner(beside)).array)
        q = own.q
        squares = jnp.square(seen[k].array) + q.array * q.times(beside.inner(beside)).array
        total = jnp.sum(squares, axis=q.rank_axis, keepdims=True)
        found.append(q.like(jnp.maximum(total, 0) / beside.length))
    return found


def _nonzero(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 1, x)
