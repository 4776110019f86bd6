r"""Adam's direction with the full second moment as one Pallas kernel, for TPUs and NVIDIA GPUs.

In plain JAX three matrices of the size of a tile of W follow one another through memory: v, the
numerator and D. The kernels make a small tile of all three where they compute, and keep nothing but
its projection x (rows, r):

.. math::
  v = p \, S^T, \quad D = \frac{m Q^T}{\sqrt{v} + \epsilon}, \quad x \mathrel{+}= D \, Q

with the packed second moments p (rows, q), and S (columns, q), the packed squares of Q
(columns, r); the same as in `loft_jax.optim.full_moment`. Products are of float32 or, with as many
bits, of six passes of bfloat16.

- **TPUs** (Mosaic). Rows lie along the lanes, in both factors. The grid is (layer, row tile, column
  tile), columns innermost: p is read once, x stays in place until its row tile is done, and the
  squares of a tile of Q are made in a scratch.
- **NVIDIA GPUs** (Triton). A program does one row tile and a share of the columns. S is made
  before: as many numbers, in float32, as the other factor's second moments have.

XLA cannot share a kernel out over devices, and no TPU has run the one for TPUs:
`loft(..., fused=True)` has to ask for them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from loft_jax.optim.linear_algebra import FactorMatrix
from loft_jax.optim.packed_matrices import symmetric_squares
from loft_jax.optim.second_moments import AdamStep

# The largest rank whose tiles fit the vector memory of a TPU.
_MOST_RANK = 128
# Sides of tiles: a TPU's is the largest of these that takes at most so much vector memory.
_TPU_TILES = (512, 256, 128)
_TPU_BYTES = 8 << 20
_GPU_ROWS, _GPU_COLUMNS = 64, 64
# A product on a GPU has at least this many terms and columns.
_GPU_LEAST = 16
# Six passes of bfloat16, as TPUs make a product of float32: a GPU's matrix units have no float32,
# and its other units take longer for one pass.
_GPU_PRECISION = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6
_GPU_ELEMENTS = 2**31 - 1
# Programs that keep a GPU busy; with fewer row tiles than this, columns are shared out too.
_GPU_PROGRAMS = 1024


def check_fused(path: str, rank: int, dtype: Any, second_moment: str = "full") -> None:
    """Checks that the kernels can do a pair.

    Raises:
      ValueError: They cannot.
    """
    for what, found, fits, expected in (
        ("second_moment", repr(second_moment), second_moment == "full", "'full'"),
        ("rank", rank, rank <= _MOST_RANK, f"at most {_MOST_RANK}"),
        ("dtype of computation", jnp.dtype(dtype), dtype == jnp.float32, "float32"),
    ):
        if not fits:
            raise ValueError(f"fused=True: the {what} of {path} is {found}, expected {expected}")


def fused_direction(
    p: FactorMatrix,
    mu: FactorMatrix,
    q: FactorMatrix,
    step: AdamStep,
    elsewhere: Callable[[FactorMatrix, FactorMatrix, FactorMatrix, AdamStep], jax.Array],
) -> jax.Array:
    """The coordinates `D Q` (group, stack, m, r) by the kernel of the device that will run it.

    Args:
      p: (group, stack, m, q), packed second moments.
      mu: (group, stack, m, r), bias-corrected first moments.
      q: (group, stack, n, r), the partner's basis, in the other factor's layout.
      step: What else the direction is made of.
      elsewhere: The same on devices without a kernel.

    Returns:
      In the layout of mu.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if any(size > 1 and name not in mesh.manual_axes for name, size in mesh.shape.items()):
        raise ValueError(
            f"fused=True: the mesh in use is {dict(mesh.shape)}, of which {mesh.manual_axes} are "
            "axes of a shard_map, expected all: XLA cannot share out a Pallas kernel"
        )
    numbers = jnp.stack([step.correction**-0.5, step.eps, step.limit]).astype(mu.array.dtype)

    def by(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda p, mu, q, _, numbers: kernel(p, mu, q, numbers)

    direction: jax.Array = jax.lax.platform_dependent(
        *(p, mu, q, step, numbers),
        tpu=by(on_tpu),
        cuda=by(on_cuda),
        default=lambda *given: elsewhere(*given[:-1]),
    )
    return direction


def on_tpu(
    p: FactorMatrix,
    mu: FactorMatrix,
    q: FactorMatrix,
    numbers: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """The direction by Mosaic.

    Args:
      p: (group, stack, m, q), packed second moments.
      mu: (group, stack, m, r), bias-corrected first moments.
      q: (group, stack, n, r), the partner's basis, in the other factor's layout.
      numbers: (3,), what the root of v is multiplied by, Adam's epsilon and its bound.
      interpret: Runs the kernel as plain JAX, on any device.

    Returns:
      The coordinates `D Q` (group, stack, m, r), in the layout of mu.
    """
    from jax.experimental.pallas import tpu as pltpu

    layers, m, n = math.prod(mu.array.shape[:2]), mu.length, q.length
    size, r = p.rank, mu.rank
    fitting = [tile for tile in _TPU_TILES if 12 * size * tile <= _TPU_BYTES]
    tile = max(fitting, default=_TPU_TILES[-1])
    rows, columns = (min(tile, 128 * pl.cdiv(length, 128)) for length in (m, n))

    def of_rows(k: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, k, rows), lambda layer, i, j: (layer, 0, i))

    arrays = [x.wide().reshape(layers, x.rank, x.length) for x in (p, mu, q)]
    x = pl.pallas_call(
        functools.partial(_tpu_kernel, n),
        out_shape=_result((layers, r, m), *arrays, numbers),
        grid=(layers, pl.cdiv(m, rows), pl.cdiv(n, columns)),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            of_rows(size),
            of_rows(r),
            pl.BlockSpec((None, r, columns), lambda layer, i, j: (layer, 0, j)),
        ],
        out_specs=of_rows(r),
        scratch_shapes=[pltpu.VMEM((size, columns), mu.array.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="loft_direction",
    )(numbers, *arrays)
    x = FactorMatrix(x, rank_last=False)
    return (x.tall() if mu.rank_last else x.wide()).reshape(mu.array.shape)


def _tpu_kernel(n: int, numbers: Any, p: Any, mu: Any, q: Any, out: Any, squares: Any) -> None:
    """One tile: p (q, rows), mu and out (r, rows), q (r, columns), squares (q, columns)."""
    r, columns = q.shape
    j = pl.program_id(2)
    # What is past the end of W is not a number that may be added.
    column = j * columns + jax.lax.broadcasted_iota(jnp.int32, (r, columns), 1)
    basis = jnp.where(column < n, q[...], 0.0)
    start = 0
    for a in range(r):  # the packed half, a row of the (r, r) matrix at a time
        one = basis[a : a + 1]
        squares[start : start + 1] = one * one
        if a < r - 1:
            squares[start + 1 : start + r - a] = math.sqrt(2.0) * one * basis[a + 1 :]
        start += r - a
    v = _dot(squares[...], p[...].astype(basis.dtype), 0, 0)  # (columns, rows)
    d = _divided(_dot(basis, mu[...], 0, 0), v, *(numbers[k] for k in range(3)))
    x = _dot(basis, d, 1, 0)  # (r, rows)

    @pl.when(j == 0)
    def _() -> None:
        out[...] = x

    @pl.when(j > 0)
    def _() -> None:
        out[...] += x


def on_cuda(
    p: FactorMatrix,
    mu: FactorMatrix,
    q: FactorMatrix,
    numbers: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """The direction by Triton; arguments and result are those of `on_tpu`."""
    from jax.experimental.pallas import triton

    layers, m, n = math.prod(mu.array.shape[:2]), mu.length, q.length
    size, r = p.rank, mu.rank
    squares = symmetric_squares(q)
    for what, array in (("second moments", p.array), ("squares of a basis", squares.array)):
        if array.size > _GPU_ELEMENTS:
            raise ValueError(
                f"fused=True: {what} of shape {array.shape} are {array.size} numbers, expected at "
                f"most {_GPU_ELEMENTS} in one array: Triton counts them in 32 bits"
            )
    row_tiles, column_tiles = pl.cdiv(m, _GPU_ROWS), pl.cdiv(n, _GPU_COLUMNS)
    each = pl.cdiv(column_tiles, pl.cdiv(_GPU_PROGRAMS, layers * row_tiles))  # a program's
    shares = pl.cdiv(column_tiles, each)
    wide = max(_GPU_LEAST, pl.next_power_of_2(r))
    arrays = [x.array.reshape(layers, *x.array.shape[2:]) for x in (p, mu, q, squares)]
    x = pl.pallas_call(
        functools.partial(_gpu_kernel, (m, n, r, size), wide, (shares, each), mu.rank_last),
        # Whole tiles: nothing is written past the end.
        out_shape=_result((layers, shares, row_tiles * _GPU_ROWS, wide), *arrays, numbers),
        grid=(row_tiles * shares, layers),
        out_specs=pl.BlockSpec(
            (None, None, _GPU_ROWS, wide), lambda i, layer: (layer, i % shares, i // shares, 0)
        ),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="loft_direction",
    )(numbers, *arrays)
    x = FactorMatrix(jnp.sum(x, axis=1)[:, :m, :r])
    return (x.tall() if mu.rank_last else x.wide()).reshape(mu.array.shape)


def _gpu_kernel(
    sizes: tuple[int, int, int, int],
    wide: int,
    share: tuple[int, int],
    rank_last: bool,
    numbers: Any,
    p: Any,
    mu: Any,
    q: Any,
    squares: Any,
    out: Any,
) -> None:
    """One row tile and a share of the column tiles: all whole but out, (rows, wide)."""
    from jax.experimental.pallas import triton

    m, n, r, size = sizes
    shares, each = share
    i, layer = pl.program_id(0) // shares, pl.program_id(1)
    rows = i * _GPU_ROWS + jnp.arange(_GPU_ROWS, dtype=jnp.int32)

    def take(ref: Any, long: jax.Array, k: jax.Array, ends: tuple[int, int], last: bool) -> Any:
        """Elements (layer, long, k) of an array in either layout, zero past the ends."""
        long, k = jnp.broadcast_arrays(long, k)
        inside = (long < ends[0]) & (k < ends[1])
        ref = ref.at[layer, long, k] if last else ref.at[layer, k, long]
        return triton.load(ref, mask=inside, other=0.0)

    of_rank = jnp.arange(wide, dtype=jnp.int32)
    m_i = take(mu, rows[:, None], of_rank[None], (m, r), rank_last)  # (rows, wide)
    scale, eps, limit = (numbers[k] for k in range(3))

    def column_tile(t: jax.Array, x: jax.Array) -> jax.Array:
        columns = t * _GPU_COLUMNS + jnp.arange(_GPU_COLUMNS, dtype=jnp.int32)
        basis = take(q, columns[None], of_rank[:, None], (n, r), not rank_last)  # (wide, columns)

        def some(start: jax.Array, v: jax.Array) -> jax.Array:
            k = start * _GPU_LEAST + jnp.arange(_GPU_LEAST, dtype=jnp.int32)
            p_i = take(p, rows[:, None], k[None], (m, size), rank_last).astype(v.dtype)
            s_j = take(squares, columns[None], k[:, None], (n, size), not rank_last)
            return v + _dot(p_i, s_j, 1, 0, _GPU_PRECISION)

        v = jnp.zeros((_GPU_ROWS, _GPU_COLUMNS), x.dtype)
        v = jax.lax.fori_loop(0, pl.cdiv(size, _GPU_LEAST), some, v)
        numerator = _dot(m_i, basis, 1, 0, _GPU_PRECISION)
        d = _divided(numerator, v, scale, eps, limit)
        return x + _dot(d, basis, 1, 1, _GPU_PRECISION)

    first = pl.program_id(0) % shares * each
    end = jnp.minimum(first + each, pl.cdiv(n, _GPU_COLUMNS))
    out[...] = jax.lax.fori_loop(first, end, column_tile, jnp.zeros((_GPU_ROWS, wide), m_i.dtype))


def _divided(
    numerator: jax.Array, v: jax.Array, scale: jax.Array, eps: jax.Array, limit: jax.Array
) -> jax.Array:
    root = jnp.sqrt(jnp.maximum(v, 0.0)) * scale + eps
    return jnp.clip(numerator / jnp.where(root > 0, root, 1.0), -limit, limit)


def _dot(
    x: jax.Array,
    y: jax.Array,
    of_x: int,
    of_y: int,
    precision: jax.lax.PrecisionLike = jax.lax.Precision.HIGHEST,
) -> jax.Array:
    """Products over one axis of each, by default in all bits of float32."""
    return jax.lax.dot_general(x, y, (((of_x,), (of_y,)), ((), ())), precision=precision)


def _result(shape: tuple[int, ...], *given: jax.Array) -> Any:
    """The type of a result: under `shard_map` it varies along every axis that an argument does."""
    return jax.eval_shape(
        lambda *xs: jnp.zeros(shape) + sum(x.ravel()[0].astype(jnp.float32) for x in xs), *given
    )
