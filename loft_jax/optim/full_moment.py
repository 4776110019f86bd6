r"""The second moment of the projected full gradient, exactly, in r dimensions.

Row i of the projected gradient is `c_i Qᵀ`, with coordinates c_i (r). Adam's second moment of the
full matrix would be a sum of squares of its (m, n) elements. Squares of `c_i Q_j` are quadratic
forms in Q_j, so that one symmetric matrix a row holds them all:

.. math::
  p_i = \sum_k (1 - \beta_2) \beta_2^{t-k} c_{ik} c_{ik}^T, \qquad v_{ij} = Q_j^T p_i Q_j

A change of basis `C = Q_oldᵀ Q` turns c_i to `Cᵀ c_i`, hence p_i to `Cᵀ p_i C`. The matrices are
kept as packed halves (see `loft_jax.optim.packed`), and neither the (m, n) matrix nor a second copy
of the state ever stands in memory: both products are made in tiles.
"""

import jax
import jax.numpy as jnp

from loft_jax.optim.packed import congruent, packed_size, symmetric_squares
from loft_jax.optim.pairs import FactorBatch, Number
from loft_jax.optim.rounding import stochastic_round
from loft_jax.optim.second_moment import AdamStep, ProjectedGradient, SecondMomentState
from loft_jax.optim.tall import Tall, matmul
from loft_jax.optim.tiles import LeafTiles, Tiling, for_each, part_count

# A tile of float32 has a megabyte, which fits a cache, or this part of what it is a tile of, so
# that large stacks take few of them.
_TILE_ELEMENTS = 1 << 18
_MOST_TILES_OF_STATE = 32
_MOST_TILES_OF_WEIGHT = 128
# Layers of a tile. Stacks sharded over this many devices lie in every tile alike.
_MOST_LAYERS = 8


class FullMoment:
    """One symmetric (r, r) matrix a row: exact, and independent of how W is factorized."""

    has_gram = False

    def width(self, rank: int) -> int:
        """A packed half."""
        return packed_size(rank)

    def update(
        self,
        factors: FactorBatch,
        state: SecondMomentState,
        gradient: ProjectedGradient,
        b2: Number,
        key: jax.Array,
    ) -> SecondMomentState:
        """`p_i ← β₂ Cᵀ p_i C + (1 - β₂) c_i c_iᵀ`, in place where the state is donated."""
        c = gradient.c
        batch, stack = c.array.shape[:2]
        layers = part_count(stack, _MOST_LAYERS)
        matrices, q = batch * stack // layers, packed_size(c.rank)
        elements = max(_TILE_ELEMENTS, batch * stack * c.length * q / _MOST_TILES_OF_STATE)
        rows = part_count(c.length, elements / (matrices * q))
        tiles = LeafTiles(factors, Tiling(layers, rows, c.rank_last))
        by_layers = Tiling(layers, 1, True)
        c_split, change_split = tiles.tiling.split(c.array), by_layers.split(gradient.change)

        def body(t: jax.Array | int, split: list[jax.Array]) -> list[jax.Array]:
            p = tiles.take(split, t)  # (batch, stack, rows, q)
            square = symmetric_squares(c.like(tiles.tiling.take(c_split, t)))
            change = by_layers.take(change_split, t // rows)  # (batch, stack, r, r)
            moved = congruent(p.like(p.array.astype(c.array.dtype)), change)
            new = (b2 * moved.array + (1 - b2) * square.array).astype(c.array.dtype)
            new = stochastic_round(new, p.array.dtype, jax.random.fold_in(key, t))
            return tiles.put(split, t, p.like(new))

        split = for_each(tiles.tiling.total, body, tiles.split(state.rows))
        return state._replace(rows=tiles.join(split))

    def direction(self, factors: FactorBatch, state: SecondMomentState, step: AdamStep) -> Tall:
        r"""Adam's direction, projected, without a whole (m, n) matrix.

        .. math::
          D_{ij} = \frac{m_i^T Q_j}{\sqrt{Q_j^T p_i Q_j} + \epsilon}, \quad |D_{ij}| \le limit

        Rounding leaves the quadratic form at about 1e-7 tr(p_i) in float32 where it should vanish,
        and a small m over a wrongly tiny root would be a huge step. Adam's own bound on D holds
        for the true values, so it is enforced on the computed ones.
        """
        mu, q = step.mu, step.basis.q
        batch, stack = mu.array.shape[:2]
        layers = part_count(stack, _MOST_LAYERS)
        weight = batch * stack * mu.length * q.length
        elements = max(_TILE_ELEMENTS, weight / _MOST_TILES_OF_WEIGHT) * layers / (batch * stack)
        rows = part_count(mu.length, max(elements**0.5, elements / q.length))
        columns = part_count(q.length, elements * rows / mu.length)
        tiles = LeafTiles(factors, Tiling(layers, rows, mu.rank_last))
        q_tiling = Tiling(layers, columns, q.rank_last)
        nu_split = tiles.split(state.rows)
        mu_split, q_split = tiles.tiling.split(mu.array), q_tiling.split(q.array)

        def row_tile(t: jax.Array | int, out: jax.Array) -> jax.Array:
            p = tiles.take(nu_split, t)  # (batch, stack, rows, q)
            p = p.like(p.array.astype(q.array.dtype))
            m = mu.like(tiles.tiling.take(mu_split, t))

            def column_tile(u: jax.Array | int, x: jax.Array) -> jax.Array:
                q_ = q.like(q_tiling.take(q_split, t // rows * columns + u))
                v = jnp.maximum(_outer(p, symmetric_squares(q_)), 0.0) / step.correction
                root = jnp.sqrt(v) + step.eps
                d = _outer(m, q_) / jnp.where(root > 0, root, 1.0)
                d = jnp.clip(d, -step.limit, step.limit)
                # In the orientation of W, whichever factor m is of: (..., rows of A, rows of Bᵀ).
                return x + (matmul(d, q_.tall()) if m.rank_last else matmul(q_.wide(), d))

            x = for_each(columns, column_tile, jnp.zeros_like(m.array))
            return tiles.tiling.put(out, t, x)

        out = for_each(tiles.tiling.total, row_tile, jnp.zeros_like(mu_split))
        return step.basis.from_coordinates(mu.like(tiles.tiling.join(out)))


def _outer(x: Tall, y: Tall) -> jax.Array:
    """`x yᵀ` in the orientation of W, one of the two being of A and by rows, the other of B."""
    return matmul(x.array, y.array) if x.rank_last else matmul(y.array, x.array)
