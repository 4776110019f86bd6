r"""The second moment of the projected full gradient, exactly, in r dimensions.

Row i of the projected gradient is `c_i Qᵀ`, with coordinates c_i (r). Adam's second moment of the
full matrix would be a sum of squares of its (m, n) elements. Squares of `c_i Q_j` are quadratic
forms in Q_j, so that one symmetric matrix a row holds them all:

.. math::
  p_i = \sum_k (1 - \beta_2) \beta_2^{t-k} c_{ik} c_{ik}^T, \qquad v_{ij} = Q_j^T p_i Q_j

A change of basis `C = Q_oldᵀ Q` turns c_i to `Cᵀ c_i`, hence p_i to `Cᵀ p_i C`.

**Packed halves.** A symmetric (r, r) matrix has `q = r (r + 1) / 2` numbers. Packed with √2 on the
off-diagonal ones, the inner product of two packed matrices is that of the matrices. So, for rows of
packed matrices p `(m, q)`:

- the outer products `g_i g_iᵀ`, packed: `symmetric_squares(g)`;
- all of `⟨p_i, Q_j Q_jᵀ⟩ = Q_jᵀ p_i Q_j`: `p · symmetric_squares(Q)ᵀ`, `(m, q) x (q, n)`;
- all of `Cᵀ p_i C`: `congruent(p, C)`, for small r a product with one matrix too, (m, q) x (q, q).

**Tiles.** Neither the (m, n) matrix nor a second copy of the state is ever in memory: both products
are made in tiles. Of m rows in k tiles, tile t is rows t, t + k, t + 2k, ..., and so it is
with the layers of a stack: rows or layers that are sharded over devices are in every tile alike, so
that taking a tile moves nothing between devices.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from loft_jax.optim.arguments import Number
from loft_jax.optim.linear_algebra import FactorMatrix, matmul, transpose
from loft_jax.optim.pairs import FactorGroup
from loft_jax.optim.second_moments import (
    AdamStep,
    ProjectedGradient,
    SecondMomentState,
    stochastic_round,
)

T = TypeVar("T")

# A tile has this many elements, a megabyte of float32 that fits a cache, or more where there would
# be more tiles than the two limits below.
_TILE_ELEMENTS = 1 << 18
_MOST_TILES_OF_STATE = 32
_MOST_TILES_OF_WEIGHT = 128
# Most layers of a tile. A stack that is sharded over as many devices has a layer of each in it.
_MOST_LAYERS = 8
# From this rank on, two products of (r, r) matrices a row take less time than one with (q, q).
_MANY = 48


class FullMoment:
    """One symmetric (r, r) matrix a row: exact, and independent of how W is factorized."""

    has_gram = False

    def width(self, rank: int) -> int:
        """A packed half."""
        return packed_size(rank)

    def update(
        self,
        factor: FactorGroup,
        state: SecondMomentState,
        gradient: ProjectedGradient,
        b2: Number,
        key: jax.Array,
    ) -> SecondMomentState:
        """`p_i ← β₂ Cᵀ p_i C + (1 - β₂) c_i c_iᵀ`, in place where the state is donated."""
        c = gradient.c
        count, stack = c.array.shape[:2]
        layers = part_count(stack, _MOST_LAYERS)
        matrices, q = count * stack // layers, packed_size(c.rank)
        elements = max(_TILE_ELEMENTS, count * stack * c.length * q / _MOST_TILES_OF_STATE)
        rows = part_count(c.length, elements / (matrices * q))
        tiles = LeafTiles(factor, Tiling(layers, rows, c.rank_last))
        by_layers = Tiling(layers, 1, True)
        c_split, change_split = tiles.tiling.split(c.array), by_layers.split(gradient.change)

        def body(t: jax.Array | int, split: list[jax.Array]) -> list[jax.Array]:
            p = tiles.take(split, t)  # (group, stack, rows, q)
            square = symmetric_squares(c.like(tiles.tiling.take(c_split, t)))
            change = by_layers.take(change_split, t // rows)  # (group, stack, r, r)
            moved = congruent(p.like(p.array.astype(c.array.dtype)), change)
            new = (b2 * moved.array + (1 - b2) * square.array).astype(c.array.dtype)
            new = stochastic_round(new, p.array.dtype, jax.random.fold_in(key, t))
            return tiles.put(split, t, p.like(new))

        split = for_each(tiles.tiling.total, body, tiles.split(state.rows))
        return state._replace(rows=tiles.join(split))

    def direction(
        self, factor: FactorGroup, state: SecondMomentState, step: AdamStep
    ) -> FactorMatrix:
        r"""Adam's direction, projected, without a whole (m, n) matrix.

        .. math::
          D_{ij} = \frac{m_i^T Q_j}{\sqrt{Q_j^T p_i Q_j} + \epsilon}, \quad |D_{ij}| \le limit

        Rounding leaves the quadratic form at about 1e-7 tr(p_i) in float32 where it should vanish,
        and a small m over a wrongly tiny root would be a huge step. Adam's own bound on D holds
        for the true values, so it is enforced on the computed ones.
        """
        mu, q = step.mu, step.basis.q
        count, stack = mu.array.shape[:2]
        layers = part_count(stack, _MOST_LAYERS)
        weight = count * stack * mu.length * q.length
        elements = max(_TILE_ELEMENTS, weight / _MOST_TILES_OF_WEIGHT) * layers / (count * stack)
        rows = part_count(mu.length, max(elements**0.5, elements / q.length))
        columns = part_count(q.length, elements * rows / mu.length)
        tiles = LeafTiles(factor, Tiling(layers, rows, mu.rank_last))
        q_tiling = Tiling(layers, columns, q.rank_last)
        nu_split = tiles.split(state.rows)
        mu_split, q_split = tiles.tiling.split(mu.array), q_tiling.split(q.array)

        def row_tile(t: jax.Array | int, out: jax.Array) -> jax.Array:
            p = tiles.take(nu_split, t)  # (group, stack, rows, q)
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


def _outer(x: FactorMatrix, y: FactorMatrix) -> jax.Array:
    """`x yᵀ` in the orientation of W, one of the two being of A and by rows, the other of B."""
    return matmul(x.array, y.array) if x.rank_last else matmul(y.array, x.array)


def for_each(count: int, body: Callable[[jax.Array | int, T], T], init: T) -> T:
    """Calls body(t, carry) for t = 0, 1, ... in turn."""
    return body(0, init) if count == 1 else jax.lax.fori_loop(0, count, body, init)


def part_count(size: int, most: float) -> int:
    """Chooses a part count whose part size is near the limit, so that shards stay even.

    Among part sizes between a quarter of the limit and the limit, the one that is divisible by the
    largest power of two wins. Where no divisor gives such a size, the part size is the least one
    above the limit.

    Args:
      size: What is divided, into equal parts.
      most: The limit on a part's size.

    Returns:
      The number of parts.

    Example:
      >>> part_count(24, 10), part_count(22, 10)  # parts of 8; of 11, since 2 is too small
      (3, 2)
    """
    if size <= most:
        return 1
    counts = [k for k in range(1, size + 1) if size % k == 0]
    fitting = [k for k in counts if most / 4 <= size // k <= most]
    larger = max(k for k in counts if size // k > most)
    return max(fitting, key=lambda k: (size // k & -(size // k), -k), default=larger)


class Tiling(NamedTuple):
    """How an array (..., stack, rows, k), or (..., stack, k, rows), falls into tiles.

    Attributes:
      layers: Parts of the stack.
      rows: Parts of the rows.
      rank_last: Whether the rows come before k.
    """

    layers: int
    rows: int
    rank_last: bool

    @property
    def total(self) -> int:
        """Number of tiles."""
        return self.layers * self.rows

    def split(self, x: jax.Array) -> jax.Array:
        """(..., stack, layers, rows, parts, k) or (..., stack, layers, k, rows, parts)."""
        *front, stack, a, b = x.shape
        if self.rank_last:
            return x.reshape(*front, stack // self.layers, self.layers, -1, self.rows, b)
        return x.reshape(*front, stack // self.layers, self.layers, a, -1, self.rows)

    def join(self, split: jax.Array) -> jax.Array:
        """Undoes `split`."""
        *front, stack, layers, a, b, c = split.shape
        last = (a * b, c) if self.rank_last else (a, b * c)
        return split.reshape(*front, stack * layers, *last)

    def take(self, split: jax.Array, t: jax.Array | int) -> jax.Array:
        """Tile t of what `split` gives, (..., stack, rows, k) or (..., stack, k, rows)."""
        x = jax.lax.dynamic_index_in_dim(split, t // self.rows, split.ndim - 4, keepdims=False)
        axis = x.ndim - (2 if self.rank_last else 1)
        return jax.lax.dynamic_index_in_dim(x, t % self.rows, axis, keepdims=False)

    def put(self, split: jax.Array, t: jax.Array | int, tile: jax.Array) -> jax.Array:
        """What `split` gives, with another tile t."""
        layer, part = split.ndim - 4, split.ndim - (2 if self.rank_last else 1)
        start: list[jax.Array | int] = [0] * split.ndim
        start[layer], start[part] = t // self.rows, t % self.rows
        return jax.lax.dynamic_update_slice(split, jnp.expand_dims(tile, (layer, part)), start)


class LeafTiles(NamedTuple):
    """A tiling of the leaves of a group of factors, which are never joined to one array."""

    factor: FactorGroup
    tiling: Tiling

    def split(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """The leaves, split each for itself."""
        pairs = zip(self.factor.factors, leaves, strict=True)
        return [self.tiling.split(factor.fold(leaf)) for factor, leaf in pairs]

    def take(self, split: Sequence[jax.Array], t: jax.Array | int) -> FactorMatrix:
        """Tile t of all leaves, (group, stack, rows, k)."""
        return FactorMatrix(
            jnp.stack([self.tiling.take(x, t) for x in split]), self.tiling.rank_last
        )

    def put(
        self, split: Sequence[jax.Array], t: jax.Array | int, x: FactorMatrix
    ) -> list[jax.Array]:
        """The leaves with another tile t."""
        tiles = zip(split, x.array, strict=True)
        return [self.tiling.put(leaf, t, tile) for leaf, tile in tiles]

    def join(self, split: Sequence[jax.Array]) -> list[jax.Array]:
        """Undoes `split`."""
        pairs = zip(self.factor.factors, split, strict=True)
        return [factor.unfold(self.tiling.join(x)) for factor, x in pairs]


def packed_size(rank: int) -> int:
    """Numbers in the packed half of a symmetric (rank, rank) matrix."""
    return rank * (rank + 1) // 2


def symmetric_product(x: jax.Array, y: jax.Array, axis: int = -1) -> jax.Array:
    """Packs `(x yᵀ + y xᵀ) / 2`: diagonal elements as they are, the others times √2.

    Args:
      x: (..., r), vectors along the given axis.
      y: Of the same shape.
      axis: -1 or -2.

    Returns:
      Like x with q = r (r + 1) / 2 in the place of r, such that the dot product of two packed
      matrices is the sum of the elementwise products of the whole ones.

    Example:
      >>> x, y = jnp.array([1.0, 2.0]), jnp.array([3.0, 5.0])
      >>> [round(value.item(), 3) for value in symmetric_product(x, y)]  # of [[3, 5.5], [5.5, 10]]
      [3.0, 7.778, 10.0]
    """
    rows, columns = _upper_half(x.shape[axis])
    weight = jnp.where(rows == columns, 0.5, math.sqrt(0.5)).astype(x.dtype)

    def take(x: jax.Array, which: jax.Array) -> jax.Array:
        return jnp.take(x, which, axis=axis)

    products = take(x, rows) * take(y, columns) + take(x, columns) * take(y, rows)
    return (weight if axis == -1 else weight[:, None]) * products


def symmetric_squares(x: FactorMatrix) -> FactorMatrix:
    """Packs `x_i x_iᵀ` of every row: (..., n, r) to (..., n, q)."""
    return x.like(symmetric_product(x.array, x.array, x.rank_axis))


def congruent(p: FactorMatrix, c: jax.Array) -> FactorMatrix:
    """Packs `Cᵀ p_i C` of every row.

    Args:
      p: (..., n, q), packed symmetric matrices.
      c: (..., r, r).

    Returns:
      (..., n, q).

    Example:
      >>> squares = symmetric_squares(FactorMatrix(jnp.array([[1.0, 2.0]]), rank_last=True))
      >>> found = congruent(squares, jnp.diag(jnp.array([2.0, 3.0]))).array[0]
      >>> [round(value.item(), 3) for value in found]  # the square of (2, 6)
      [4.0, 16.971, 36.0]
    """
    r = c.shape[-1]
    if r < _MANY:
        return p.times(_congruence(c))
    rows, columns = _upper_half(r)
    axis, last = p.rank_axis, p.rank_last
    places = jnp.arange(len(rows), dtype=jnp.int32)
    which = jnp.zeros((r, r), jnp.int32).at[rows, columns].set(places)
    weight = jnp.where(rows == columns, 1.0, math.sqrt(2.0)).astype(c.dtype)
    weight = weight if last else weight[:, None]
    # Whole symmetric matrices, then Y = P C and Cᵀ P C = Yᵀ C; with P = Pᵀ nothing else turns.
    x = jnp.take(p.array / weight, jnp.maximum(which, which.T).ravel(), axis=axis)
    for _ in range(2):
        *front, y, z = x.shape
        if last:  # (..., n, r, r): transposed, times (r, r)
            x = jnp.swapaxes(x.reshape(*front, y, r, r), -2, -1)
            x = matmul(x.reshape(*front, y * r, r), c).reshape(*front, y, z)
        else:  # (r, r) times the transposed (..., r, r, n)
            x = jnp.swapaxes(x.reshape(*front, r, r, z), -3, -2)
            x = matmul(transpose(c), x.reshape(*front, r, r * z)).reshape(*front, y, z)
    return p.like(jnp.take(x, rows * r + columns, axis=axis) * weight)


def _congruence(c: jax.Array) -> jax.Array:
    """The matrix M (..., q, q) with `pack(P) M = pack(Cᵀ P C)` for every symmetric P.

    Row (a, b) is the packed image of the packed basis matrix (a, b).
    """
    rows, columns = _upper_half(c.shape[-1])
    weight = jnp.where(rows == columns, 1.0, math.sqrt(2.0)).astype(c.dtype)
    return weight[:, None] * symmetric_product(c[..., rows, :], c[..., columns, :])


def _upper_half(r: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of each packed element, (q,) each."""
    pairs = jnp.asarray([(row, column) for row in range(r) for column in range(row, r)])
    return pairs[:, 0], pairs[:, 1]
