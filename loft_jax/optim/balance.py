r"""The balanced factorization of a product, as the last link of a chain.

`W = A B` is also `(A T) (T⁻¹ B)` for every invertible T. In exact arithmetic LoFT does not care; in
float arithmetic the factors' condition numbers decide what is left of the last digits. The balanced
factorization, `AᵀA = B Bᵀ`, has the least: each factor gets the root of the singular values of W.

With orthonormal bases of both, `A = Q_A S_A` and `Bᵀ = Q_B S_B`, the product is
`Q_A M Q_Bᵀ`, `M = S_A S_Bᵀ` (r, r). By one eigendecomposition, `M Mᵀ = U Σ² Uᵀ`, take

.. math::
  A' = Q_A \, U \Sigma^{1/2} U^T, \qquad B' = (M^T U \Sigma^{-1/2} U^T)^T Q_B^T

Then `A' B' = W` and `A'ᵀA' = B' B'ᵀ = U Σ Uᵀ`. Moments are held in the orthonormal bases, and what
the factors span does not move: the next change of basis carries them along, as always.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax.optim.pairs import FactorNames, find_pairs
from loft_jax.optim.subspace import orthonormal_basis
from loft_jax.optim.tall import Tall, matmul, transpose
from loft_jax.optim.tree import FactorTree


def balance_factors(*, factors: FactorNames | None = None) -> optax.GradientTransformation:
    r"""Moves factors to the balanced factorization of the product that the updates lead to.

    .. math::
      A + u_A = A' , \quad B + u_B = B' \quad\Rightarrow\quad
      A'' B'' = A' B' , \quad A''^T A'' = B'' B''^T

    A direction in which W has nothing (all of them, while B = 0) keeps a place in A, of the size
    of its smallest counted one; nothing is divided by zero, and nothing moves while W = 0.

    Args:
      factors: Names of the factors; see `find_pairs`.

    Returns:
      A stateless transformation of final updates, to stand last: behind the learning rate. It
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
      >>> jax.tree.map(lambda x: jnp.abs(x).round(4).tolist(), balanced)  # 16 = 4 times 4
      {'lora_a': [[4.0], [0.0]], 'lora_b': [[0.0, 4.0]]}

    References:
      The balanced factorization: Zhang et al., RefLoRA, NeurIPS 2025 (arXiv 2505.18877), Theorem
      on the optimal refactorization; here by orthonormal bases instead of Gram matrices.
    """

    def init(params: optax.Params) -> optax.EmptyState:
        find_pairs(params, factors)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        tree = FactorTree(updates, params, factors)
        reached = [tuple(map(tree.reached, (batch.a, batch.b))) for batch in tree.batches]
        products = [_Product.of(a, b) for a, b in reached]
        eigen = _eigh_of_all([x.square for x in products])
        for batch, factors_, product, (squares, u) in zip(
            tree.batches, reached, products, eigen, strict=True
        ):
            balanced = product.balanced(squares, u)
            for own, now, new in zip((batch.a, batch.b), factors_, balanced, strict=True):
                chosen = jnp.where(product.size > 0, new.array, now.array)
                moved = own.unfold(now.like(chosen - tree.param(own).array))
                for index, leaf in zip(own.indices, moved, strict=True):
                    tree.finish(index, leaf)
        return tree.rebuilt(), state

    return optax.GradientTransformation(init, update)


class _Product(NamedTuple):
    """`A Bᵀ = Q_A M Q_Bᵀ` of tall A and B, with `unit = M / size` and `square = unit unitᵀ`."""

    q_a: Tall
    q_b: Tall
    size: jax.Array
    unit: jax.Array
    square: jax.Array

    @classmethod
    def of(cls, a: Tall, b: Tall) -> "_Product":
        """The product of A (..., m, r) and the transpose of B (..., n, r)."""
        q_a, s_a, _ = orthonormal_basis(a)
        q_b, s_b, _ = orthonormal_basis(b)
        core = matmul(s_a, transpose(s_b))  # (..., r, r)
        # Of unit size, so that its square neither overflows nor vanishes.
        size = jnp.max(jnp.abs(core), axis=(-2, -1), keepdims=True)
        unit = core / jnp.where(size > 0, size, 1.0)
        return cls(q_a, q_b, size, unit, matmul(unit, transpose(unit)))

    def balanced(self, squares: jax.Array, u: jax.Array) -> tuple[Tall, Tall]:
        """The balanced factors, given eigenvalues (..., r) and eigenvectors of the square."""
        # A singular value below the rounding of the largest is taken for that, on the side of A.
        largest = jnp.max(squares, axis=-1, keepdims=True)
        floor = float(jnp.finfo(squares.dtype).eps) * largest
        root = jnp.maximum(squares, floor)[..., None, :] ** 0.25  # Σ^½, (..., 1, r)
        root = jnp.where(root > 0, root, 1.0)
        outer = jnp.sqrt(self.size)
        k_a = matmul(u * root, transpose(u)) * outer
        k_b = matmul(matmul(transpose(self.unit), u / root), transpose(u)) * outer
        return self.q_a.times(k_a), self.q_b.times(k_b)


def _eigh_of_all(matrices: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    """Eigenvalues and eigenvectors of positive semidefinite matrices, by one call for all.

    On CPUs two of LAPACK's batched routines at one time can wait for each other's threads for good.
    """
    most = max((x.shape[-1] for x in matrices), default=0)

    def padded(x: jax.Array) -> jax.Array:
        # With -1 on the rest of the diagonal, which no eigenvalue is, so that nothing mixes.
        r = x.shape[-1]
        wider = jnp.pad(x.reshape(-1, r, r), ((0, 0), (0, most - r), (0, most - r)))
        return wider - jnp.diag(jnp.arange(most) >= r).astype(x.dtype)

    if not matrices:
        return []
    dtype = jnp.result_type(*matrices)
    values, vectors = jnp.linalg.eigh(jnp.concatenate([padded(x.astype(dtype)) for x in matrices]))
    found, start = [], 0
    for x in matrices:
        *batch, r, _ = x.shape
        part = slice(start, start := start + math.prod(batch))
        # Ascending, so that the eigenvalues -1 of the padding come first.
        found.append(
            (
                values[part, most - r :].reshape(*batch, r).astype(x.dtype),
                vectors[part, :r, most - r :].reshape(x.shape).astype(x.dtype),
            )
        )
    return found
