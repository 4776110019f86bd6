r"""LoRA-Pro: gradients of the factors that move W along the projected full gradient.

A step of both factors moves `W = s A B` in the tangent space of the matrices of its rank. The
gradients here are those for which it moves along the projection of the full gradient G on that
space, and of these the nearest to the factors' own.
"""

import jax
import jax.numpy as jnp
import optax

from experiments.peers.shared import finite
from loft_jax.optim.arguments import Number, check_adam
from loft_jax.optim.linear_algebra import batched, matmul, transpose
from loft_jax.optim.optax_types import transformation
from loft_jax.optim.paired_updates import PairedUpdates
from loft_jax.optim.pairs import FactorNames, FactorSpec, Scaling, find_pairs


def adjust_gradients(
    *, scaling: Scaling = 1.0, factors: FactorNames | None = None
) -> optax.GradientTransformation:
    r"""Replaces the gradients of each pair by those of LoRA-Pro.

    .. math::
      g_B \leftarrow \tfrac{1}{s^2} (A^T A)^+ g_B + X B, \qquad
      g_A \leftarrow \tfrac{1}{s^2} (I - P_A)\, g_A (B B^T)^+ - A X

    with P_A the projector on the columns of A and X the solution of

    .. math::
      A^T A\, X + X\, B B^T = -\tfrac{1}{s^2} (A^T A)^+ g_B B^T

    so that `s (g_A B + A g_B) = P_A G + (I - P_A) G P_B`.

    Args:
        scaling: The s of `W = s A B`, or a function of the pair's path.
        factors: Names of the factors; see `find_pairs`.

    Returns:
        A stateless transformation of raw gradients that needs the parameters. Leaves that belong
        to no pair pass.
    """
    spec = FactorSpec(factors, scaling)

    def init(params: optax.Params) -> optax.EmptyState:
        find_pairs(params, spec)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        tree = PairedUpdates(updates, params, spec)
        nearest, equations = [], []
        for group in tree.groups:
            (a, b) = (tree.param(own) for own in (group.a, group.b))
            basis_a = tree.basis(group, group.a)
            basis_b = tree.basis(group, group.b)
            grad_a = basis_b.project(tree.folded(group.a))
            grad_a = grad_a.like(grad_a.array - basis_a.q.times(basis_a.q.inner(grad_a)).array)
            grad_b = basis_a.project(tree.folded(group.b))
            nearest.append((a, b, grad_a, grad_b))
            equations.append((a.inner(a), b.inner(b), -grad_b.inner(b)))
        solved = batched(_solve_sylvester, equations)
        for group, (a, b, grad_a, grad_b), (x,) in zip(tree.groups, nearest, solved, strict=True):
            for own, changed in (
                (group.a, grad_a.array - a.times(x).array),
                (group.b, grad_b.array + b.times(transpose(x)).array),
            ):
                tree.put_gradients(own, (a if own.rank_last else b).like(changed))
        return tree.rebuilt(), state

    return transformation(init, update)


def lora_pro(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    scaling: Scaling = 1.0,
    factors: FactorNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA-Pro: AdamW on the gradients of `adjust_gradients`.

    The state is AdamW's, 2 (m + n) r numbers a pair.

    Differs from the paper:

    - Adam's moments are those of the adjusted gradients of the factors, as in the memory-efficient
      form that the authors publish beside it; the paper's AdamW keeps moments (m, n) of the full
      gradient, and adjusts their quotient.
    - A pseudoinverse through an orthonormal basis takes the place of a damped inverse. Where B is
      zero, so is the adjusted gradient of A.

    Args:
        learning_rate: A number or a schedule.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: As in `optax.adamw`: decoupled, multiplied by the learning rate.
        scaling: The s of `W = s A B`, or a function of the pair's path.
        factors: Names of the factors; see `find_pairs`.

    Returns:
        A chain of `adjust_gradients` and `optax.adamw`. It needs the parameters.

    References:
        Wang et al., LoRA-Pro: Are Low-Rank Adapters Properly Optimized?, ICLR 2025
        (arXiv 2407.18242).
    """
    check_adam(b1, b2, eps, weight_decay)
    return optax.chain(
        adjust_gradients(scaling=scaling, factors=factors),
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay),
    )


def _solve_sylvester(m: jax.Array, n: jax.Array, c: jax.Array) -> tuple[jax.Array]:
    """The least X of `M X + X N = C`, M and N (count, r, r) symmetric, positive semidefinite."""
    values, vectors = jnp.linalg.eigh(finite(jnp.concatenate([m, n])))
    (values_m, values_n), (u, v) = jnp.split(values, 2), jnp.split(vectors, 2)
    sums = jnp.maximum(values_m, 0)[:, :, None] + jnp.maximum(values_n, 0)[:, None, :]
    rounding = m.shape[-1] * float(jnp.finfo(m.dtype).eps)
    solvable = sums > rounding * jnp.max(sums, axis=(-2, -1), keepdims=True)
    x = matmul(matmul(transpose(u), c), v)
    x = jnp.where(solvable, x / jnp.where(solvable, sums, 1), 0)
    return (matmul(matmul(u, x), transpose(v)),)
