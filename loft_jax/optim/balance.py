r"""The balanced factorization of a product: a link that goes there, and how far factors are.

`W = A B` is also `(A T) (T⁻¹ B)` for every invertible T. In exact arithmetic LoFT does not care; in
float arithmetic the factors' condition numbers decide what is left of the last digits. The balanced
factorization, `AᵀA = B Bᵀ`, has the least: each factor gets the root of the singular values of W.

From `G_A = AᵀA` and `G_B = B Bᵀ`, Newton's method goes there by steps `T = I + D`: to first order,
balance asks for

.. math::
  H D + D H = G_B - G_A, \qquad H = G_A + G_B

which an eigendecomposition of H solves. Since `-H ≤ G_B - G_A ≤ H`, also `-½ ≤ D ≤ ½`: every step
can be undone, whatever the factors. (D is held to that by its own eigendecomposition: next to what
is nearly singular, rounding may leave it.) All of it happens in (r, r) matrices. To A and B the
product of the steps is applied as a correction, `A + A D` and `B + E B` with `(I + D) (I + E) = I`:
between factors that are nearly balanced the corrections are small, and so is what their rounding
does to W.

Moments are held in orthonormal bases, and what the factors span does not move: the next change of
basis carries them along, as always.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax.optim.linear_algebra import FactorMatrix, batched, matmul, transpose
from loft_jax.optim.meshes import on_explicit_axes, varying_like, whole_on_explicit_axes
from loft_jax.optim.optax_types import transformation
from loft_jax.optim.paired_updates import PairedUpdates, compute_dtype
from loft_jax.optim.pairs import DEFAULT_SPEC, FactorSpec, find_pairs

# Factors that a training step has moved need few. Each brings a singular value that is much the
# smaller one four times closer, so that these are enough for a ratio of 1e8.
_MOST_STEPS = 20


@on_explicit_axes
def balance_factors(*, spec: FactorSpec = DEFAULT_SPEC) -> optax.GradientTransformation:
    r"""Moves factors to the balanced factorization of the product that the updates lead to.

    .. math::
      A + u_A = A' , \quad B + u_B = B' \quad\Rightarrow\quad
      A'' B'' = A' B' , \quad {A''}^T A'' = B'' {B''}^T

    Of the balanced factorizations it is one near the factors as they are. A direction in which W
    has nothing shrinks in the factors, to the root of rounding; nothing moves while one factor is
    zero. The updates hold the whole change of factorization: what scales or clips them after this
    link changes W. A change is rounded at the size of the factor as it is: of factors whose sizes
    differ by a ratio, the product is off by the rounding of their dtype times its square root.

    Args:
      spec: The pairs.

    Returns:
      A stateless transformation of final updates, the last of a chain: after the learning rate. It
      needs the parameters. Leaves that belong to no pair pass.

    Raises:
      ValueError: As `project_gradients`.

    Example:
      >>> import jax.numpy as jnp
      >>> from loft_jax import balance_factors
      >>> params = {"lora_a": jnp.array([[8.0], [0.0]]), "lora_b": jnp.array([[0.0, 2.0]])}
      >>> tx = balance_factors()
      >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
      >>> balanced = optax.apply_updates(params, updates)
      >>> jax.tree.map(lambda x: x.round(4).tolist(), balanced)  # 16 = 4 times 4
      {'lora_a': [[4.0], [0.0]], 'lora_b': [[0.0, 4.0]]}

    References:
      The balanced factorization: Zhang et al., RefLoRA, NeurIPS 2025 (arXiv 2505.18877), Theorem
      on the optimal refactorization; here by Newton's method.
    """

    def init(params: optax.Params) -> optax.EmptyState:
        find_pairs(params, spec)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        tree = PairedUpdates(updates, params, spec)
        reached = [tuple(map(tree.reached, (group.a, group.b))) for group in tree.groups]
        grams = [(a.inner(a), b.inner(b)) for a, b in reached]  # (group, stack, r, r) each
        for group, pair, corrections in zip(
            tree.groups, reached, batched(_corrections, grams), strict=True
        ):
            for factor, now, correction in zip((group.a, group.b), pair, corrections, strict=True):
                moved = tree.folded(factor).array + now.times(correction).array
                tree.put_updates(factor, now.like(moved))
        return tree.rebuilt(), state

    return transformation(init, update)


@whole_on_explicit_axes
def factor_grams(params: optax.Params, *, spec: FactorSpec = DEFAULT_SPEC) -> dict[str, jax.Array]:
    """Computes the Gram matrix of each factor: `AᵀA` of a factor A, `B Bᵀ` of a factor B.

    Their condition numbers are the squares of the factors'.

    Args:
      params: With pairs, as for `loft`.
      spec: The pairs.

    Returns:
      Arrays (stack, r, r), of float32 at least, by path of the factor.

    Raises:
      ValueError: As `find_pairs`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.zeros((1, 3))}
      >>> {path: gram.tolist() for path, gram in factor_grams(params).items()}
      {'lora_a': [[[4.0]]], 'lora_b': [[[0.0]]]}
    """
    leaves = jax.tree.leaves(params)
    grams = {}
    for pair in find_pairs(params, spec):
        for factor in (pair.a, pair.b):
            leaf = leaves[factor.index]
            folded = factor.fold(leaf.astype(compute_dtype(leaf)))
            matrix = FactorMatrix(folded[None], factor.rank_last)
            grams[factor.path] = matrix.inner(matrix)[0]
    return grams


class _Progress(NamedTuple):
    """Gram matrices `(I + D)ᵀ G_A (I + D)` and `(I + E) G_B (I + E)ᵀ` on the way to each other."""

    steps: jax.Array
    a: jax.Array
    b: jax.Array
    d: jax.Array
    e: jax.Array


@jax.jit  # once, also where the update is not
def _corrections(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The D and Eᵀ that balance Gram matrices (count, r, r) of A's and of B's."""
    eps = float(jnp.finfo(a.dtype).eps)
    eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    # Sizes of their own are taken off first, and put back into the corrections at the end.
    size_a, size_b = (jnp.sqrt(jnp.trace(x, axis1=1, axis2=2))[:, None, None] for x in (a, b))
    # A NaN shows in the updates anyway, and must not keep others from their balance.
    usable = (size_a > 0) & (size_b > 0) & jnp.isfinite(size_a) & jnp.isfinite(size_b)

    def unit(gram: jax.Array, size: jax.Array) -> jax.Array:
        divisor = jnp.where(usable, size, 1.0)
        return jnp.where(usable, gram / divisor / divisor, 0.0)

    def body(now: _Progress) -> _Progress:
        values, u = jnp.linalg.eigh(now.a + now.b)
        sums = values[:, :, None] + values[:, None, :]
        rotated = matmul(matmul(transpose(u), now.b - now.a), u)
        # In directions where both factors have next to nothing there is nothing to divide by; less
        # than what the loop ends at, so that it can end.
        counted = sums > 4 * eps
        d = jnp.where(counted, rotated / jnp.where(counted, sums, 1.0), 0.0)
        # Rounding of what is nearly singular may leave the bounds that make the step invertible.
        values, v = jnp.linalg.eigh(matmul(matmul(u, d), transpose(u)))
        values = jnp.clip(values, -0.5, 0.5)[:, None, :]
        d = matmul(v * values, transpose(v))
        e = matmul(v * (-values / (1 + values)), transpose(v))
        step, back = eye + d, eye + e
        return _Progress(
            now.steps + 1,
            matmul(matmul(transpose(step), now.a), step),
            matmul(matmul(back, now.b), transpose(back)),
            now.d + d + matmul(now.d, d),
            now.e + e + matmul(e, now.e),
        )

    def unbalanced(now: _Progress) -> jax.Array:
        return (now.steps < _MOST_STEPS) & (jnp.max(jnp.abs(now.a - now.b)) > 8 * eps)

    zero = jnp.zeros_like(a)
    none = varying_like(jnp.zeros([], jnp.int32), a, b)
    start = _Progress(none, unit(a, size_a), unit(b, size_b), zero, zero)
    done = jax.lax.while_loop(unbalanced, body, start)
    ratio = jnp.sqrt(jnp.where(usable, size_b, 1.0) / jnp.where(usable, size_a, 1.0))
    # (ratio - 1) exactly where the sizes are nearly one.
    return ratio * done.d + (ratio - 1) * eye, transpose(done.e / ratio + (1 / ratio - 1) * eye)
