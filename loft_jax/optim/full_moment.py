r"""The second moment of the projected full gradient, exactly, in r dimensions.

Row i of the projected gradient is `c_i Qᵀ`, with coordinates c_i (r). Adam's second moment of the
full matrix would be a sum of squares of its (m, n) elements. Squares of `c_i Q_j` are quadratic
forms in Q_j, so that one symmetric matrix a row holds them all:

.. math::
  p_i = \sum_k (1 - \beta_2) \beta_2^{t-k} c_{ik} c_{ik}^T, \qquad v_{ij} = Q_j^T p_i Q_j

A change of basis `C = Q_oldᵀ Q` turns c_i to `Cᵀ c_i`, hence p_i to `Cᵀ p_i C`.

The matrices are packed halves, `q = r (r + 1) / 2` numbers (`loft_jax.optim.packed_matrices`), so
that all of v is one product, `p · symmetric_squares(Q)ᵀ`, `(m, q) x (q, n)`.

**Tiles.** Neither the (m, n) matrix nor a second copy of the state is ever in memory. The loops go
over the layers, one at a time where nothing below says more. Inside, the direction loops over
columns of D, all rows at once, so that the squares of Q are made once; the update loops over rows,
with the matrix of the change of basis made once before. A tile of rows or columns is spread over
the whole axis (`Tiling`): where the axis is sharded over devices, each of them has its share of
every tile, and taking one moves nothing. Layers of a stack may be sharded too: a program for
several devices takes up to 8 layers, spread over the stack, at a time. With CUDA, tiles are larger
and hold several small layers, since each tile starts kernels of its own. The states of separate
pairs of one shape are joined for it, a copy of at most 128 MiB in float32, or of one pair.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from loft_jax.optim.arguments import Number
from loft_jax.optim.fused_direction import fused_direction
from loft_jax.optim.linear_algebra import FactorMatrix, matmul
from loft_jax.optim.packed_matrices import congruence, packed_size, symmetric_squares
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
# With CUDA, where each tile starts kernels of its own: 64 MiB of float32.
_GPU_TILE_ELEMENTS = 1 << 24
_MOST_TILES_OF_STATE = 32
_MOST_TILES_OF_WEIGHT = 128
# Products with fewer columns than this are slow.
_FEWEST_COLUMNS = 32
# Rows of a tile that follow one another are at most a line of a cache, and so few that as many
# devices as this can share the blocks evenly, where the sizes allow.
_BLOCK = 16
_MOST_SHARDS = 64
# Most layers that a tile has for the sake of several devices.
_MOST_LAYERS = 8
# Separate pairs of one shape are joined to one array, a copy of at most this many elements.
_MOST_JOINED = 1 << 25


@dataclasses.dataclass(frozen=True)
class FullMoment:
    """One symmetric (r, r) matrix a row: exact, and independent of how W is factorized.

    Attributes:
      fused: Whether the direction is made by a Pallas kernel, where there is one.
    """

    fused: bool = False
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
        rows = []
        decay = b2, 1 - b2  # of a number, the difference is exact here, and not in a program
        for part, some in _parts(factor, state.rows[0].size):
            c, p = gradient.c.like(gradient.c.array[part]), some.fold(state.rows[part])
            some_key = jax.random.fold_in(key, part.start)
            new = _by_platform(_updated, p, c, gradient.change[part], some_key, decay)
            rows += some.unfold(new)
        return state._replace(rows=rows)

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
        longest = max(mu.length, q.length) if self.fused else mu.length
        plain = functools.partial(_by_platform, _direction)
        find = functools.partial(fused_direction, elsewhere=plain) if self.fused else plain
        coordinates = [
            find(some.fold(state.rows[part]), mu.like(mu.array[part]), q.like(q.array[part]), step)
            for part, some in _parts(factor, state.rows[0].size // mu.length * longest)
        ]
        return step.basis.from_coordinates(mu.like(jnp.concatenate(coordinates)))


def _parts(factor: FactorGroup, size: int) -> Iterator[tuple[slice, FactorGroup]]:
    """Parts of a group of pairs whose arrays of a size, joined to one, are not too large a copy."""
    most = max(1, _MOST_JOINED // max(1, size))
    for start in range(0, len(factor.factors), most):
        part = slice(start, start + most)
        yield part, FactorGroup(factor.factors[part])


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _by_platform(work: Callable[..., T], *args: Any) -> T:
    """Does some work in the tiles of the device that will run it.

    As one program, since an update that is not jitted would compile the loops at every step.
    """
    large = functools.partial(work, elements=_GPU_TILE_ELEMENTS, several_layers=True)
    small = functools.partial(work, elements=_TILE_ELEMENTS)
    done: T = jax.lax.platform_dependent(*args, cuda=large, default=small)
    return done


def _updated(
    p: FactorMatrix,
    c: FactorMatrix,
    change: jax.Array,
    key: jax.Array,
    decay: tuple[Number, Number],
    *,
    elements: float,
    several_layers: bool = False,
) -> FactorMatrix:
    """The new state (group, stack, m, q) of the layers of some pairs."""
    layers = _layer_parts(p, elements / (p.length * p.rank) if several_layers else 1)
    numbers = p.array[0].size // layers
    elements = max(elements, p.array.size / _MOST_TILES_OF_STATE)
    rows = part_count(p.length, elements * p.length / numbers)
    tiling, whole = Tiling(layers, rows, p.rank_last), Tiling(layers, 1, True)
    c_split, change_split = tiling.split(c.array), whole.split(change)

    def layer(i: jax.Array | int, split: jax.Array) -> jax.Array:
        carried = congruence(whole.take(change_split, i, 0))

        def tile(t: jax.Array | int, split: jax.Array) -> jax.Array:
            old = tiling.take(split, i, t)  # (layers, rows, q)
            square = symmetric_squares(c.like(tiling.take(c_split, i, t))).array
            moved = carried(p.like(old.astype(square.dtype))).array
            new = (decay[0] * moved + decay[1] * square).astype(square.dtype)
            noise = jax.random.fold_in(key, i * rows + t)
            return tiling.put(split, i, t, stochastic_round(new, old.dtype, noise))

        return for_each(rows, tile, split)

    split = for_each(len(p.array) * layers, layer, tiling.split(p.array))
    return p.like(tiling.join(split))


def _direction(
    p: FactorMatrix,
    mu: FactorMatrix,
    q: FactorMatrix,
    step: AdamStep,
    *,
    elements: float,
    several_layers: bool = False,
) -> jax.Array:
    """The coordinates `D Q` (group, stack, m, r) of the layers of some pairs."""
    layers = _layer_parts(p, elements / (p.length * q.length) if several_layers else 1)
    elements = max(elements, p.array.size // p.rank * q.length / _MOST_TILES_OF_WEIGHT)
    per_column = p.array[0].size // p.rank // layers
    columns = part_count(q.length, max(_FEWEST_COLUMNS, elements / per_column))
    rows, tiling = Tiling(layers, 1, p.rank_last), Tiling(layers, columns, q.rank_last)
    p_split, mu_split = rows.split(p.array), rows.split(mu.array)
    q_split = tiling.split(q.array)
    scale = 1 / step.correction**0.5  # of the root of v; once, not for each element

    def layer(i: jax.Array | int, out: jax.Array) -> jax.Array:
        m = mu.like(rows.take(mu_split, i, 0))  # (layers, m, r)
        p_i = p.like(rows.take(p_split, i, 0).astype(m.array.dtype))  # (layers, m, q)

        def tile(t: jax.Array | int, x: jax.Array) -> jax.Array:
            q_ = q.like(tiling.take(q_split, i, t))  # (layers, columns, r)
            v = jnp.maximum(_outer(p_i, symmetric_squares(q_)), 0.0)
            root = jnp.sqrt(v) * scale + step.eps
            d = _outer(m, q_) / jnp.where(root > 0, root, 1.0)
            d = jnp.clip(d, -step.limit, step.limit)
            # In the orientation of W, whichever factor m is of: (..., rows of A, rows of Bᵀ).
            return x + (matmul(d, q_.tall()) if m.rank_last else matmul(q_.wide(), d))

        return rows.put(out, i, 0, for_each(columns, tile, jnp.zeros_like(m.array)))

    return rows.join(for_each(len(p.array) * layers, layer, jnp.zeros_like(mu_split)))


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


def _layer_parts(x: FactorMatrix, most: float) -> int:
    """Parts of the stack of (group, stack, n, k): more layers than most only for several devices.

    Args:
      x: The array.
      most: How many layers fit a tile; at least one is taken.

    Returns:
      The number of parts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = jax.device_count() if mesh.empty else mesh.size
    return part_count(x.array.shape[1], max(most, min(devices, _MOST_LAYERS)))


class Tiling(NamedTuple):
    """How arrays (group, stack, rows, k), or (group, stack, k, rows), fall into tiles.

    Of a stack in L parts, part l is the layers l, l + L, l + 2 L, ...; and so it is with blocks of
    rows that follow one another. Of an axis that is sharded over devices, each part has some of
    every device.

    Attributes:
      layers: Parts of the stack.
      rows: Parts of the rows.
      rank_last: Whether the rows come before k.
    """

    layers: int
    rows: int
    rank_last: bool

    def split(self, x: jax.Array) -> jax.Array:
        """(group, stack / layers, layers, ..., k), or k before the blocks of rows.

        The axis of the rows becomes (blocks, rows, block), without what has size 1: such axes can
        make XLA copy an array.
        """
        group, stack, a, b = x.shape
        matrix = [a, b]
        if self.rows > 1:
            size = (a if self.rank_last else b) // self.rows
            power = size & -size  # the largest power of two that divides the size
            block = min(max(power // _MOST_SHARDS, 1), _BLOCK)
            place = 0 if self.rank_last else 1
            matrix[place : place + 1] = [size // block, self.rows, *([block] if block > 1 else [])]
        return x.reshape(group, stack // self.layers, self.layers, *matrix)

    def join(self, split: jax.Array) -> jax.Array:
        """Undoes `split`."""
        group, stack, layers, a, *_, b = split.shape
        return split.reshape(group, stack * layers, *self._matrix(a, b))

    def take(self, split: jax.Array, i: jax.Array | int, t: jax.Array | int) -> jax.Array:
        """Tile t of layer part i of the group, (layers, rows, k) or (layers, k, rows)."""
        starts, sizes = self._window(split, i, t)
        _, layers, _, a, *_, b = sizes
        tile = jax.lax.dynamic_slice(split, starts, sizes)
        return tile.reshape(layers, *self._matrix(a, b))

    def put(
        self, split: jax.Array, i: jax.Array | int, t: jax.Array | int, tile: jax.Array
    ) -> jax.Array:
        """What `split` gives, with another tile."""
        starts, sizes = self._window(split, i, t)
        return jax.lax.dynamic_update_slice(split, tile.reshape(sizes), starts)

    def _matrix(self, a: int, b: int) -> tuple[int, int]:
        """The shape of rows and k, given the outermost and the innermost axis of what is split."""
        return (-1, b) if self.rank_last else (a, -1)

    def _window(
        self, split: jax.Array, i: jax.Array | int, t: jax.Array | int
    ) -> tuple[list[jax.Array | int], list[int]]:
        """Where a tile starts, and its sizes."""
        starts: list[jax.Array | int] = [0] * split.ndim
        sizes = list(split.shape)
        places = {0: i // self.layers, 2: i % self.layers}
        if self.rows > 1:
            places[4 if self.rank_last else 5] = t
        for axis, start in places.items():
            starts[axis], sizes[axis] = start, 1
        return starts, sizes
