r"""Linear algebra on the factors of a weight: products, orthonormal bases, many small matrices.

**Layout.** The mathematics sees both factors alike, as tall matrices: A as (m, r), B as its
transpose (n, r). `FactorMatrix` is such a matrix in the layout of its factor: A stays (m, r) in
memory and B stays (r, n). Nothing is transposed, and the long axis stays where a mesh may have
split it.

**Bases.** The gradient of one factor, `G P`, depends on the full gradient G only through the
columns of the other factor, its *partner* P `(n, r)`. The paper divides by the Gram matrix `PᵀP`,
which squares the condition number, and B starts at zero. Here `P = Q S` with orthonormal Q and
triangular S: `G Q = (G P) S⁻¹` is the full gradient in coordinates of P's column space, whose norm
and products are those of the projected gradient itself, and moving from one basis to the next is
the contraction `Q_oldᵀ Q_new`, which never amplifies.

Q comes from the Gram matrix after all, but in three passes, each a product over the long axis and
an elimination in an `(r, r)` matrix, so that a long axis sharded over devices is reduced and never
gathered:

1. Columns of unit length and a shifted Cholesky factorization: what is left has a condition number
   of at most `1 / √shift`, whatever that of P (Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa,
   Shifted Cholesky QR, SIAM J. Sci. Comput. 2020, arXiv 1809.11085).
2. A pivoted Cholesky factorization, which now finds the rank to nearly the working precision, and
   drops the directions in which P has nothing but rounding.
3. A Cholesky factorization of what is within rounding of the identity.

**LAPACK.** On CPUs JAX calls LAPACK's batched routines for factorizations. They wait for threads of
the pool that they run on, and two of them at a time can wait for each other's threads forever. So
the eliminations are written out (r steps over all matrices of a group at once), and other functions
of small matrices are called once for all groups (`batched`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from loft_jax.optim.meshes import varying_like

# A matrix with a longer axis than this is not (r, r).
_LONG = 256
# A TPU multiplies (128, 128) matrices at once. By the count of operations, sums take no longer for
# products of up to this many elements.
_SMALL = 32 * 32


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiplies matrices in all bits of float32.

    TPUs and newer GPUs multiply in fewer bits by default; a basis needs all of them. On TPUs, a
    product over several layers compiles to one program per layer, of a megabyte each in the memory
    of the chip: there, products of long matrices are sums, or are made in a loop over the layers.

    Args:
      x: (..., n, k); the layers of pairs are (group, stack, n, k).
      y: (..., k, l), of as many layers.

    Returns:
      (..., n, l).
    """
    several = x.ndim == 4 and x.shape[0] * x.shape[1] > 1
    if not several or max(*x.shape[-2:], y.shape[-1]) < _LONG:
        return _matmul(x, y)
    small = x.shape[-1] >= _LONG and x.shape[-2] * y.shape[-1] <= _SMALL
    way = _by_sums if small else _layer_by_layer
    product: jax.Array = jax.lax.platform_dependent(x, y, tpu=way, default=_matmul)
    return product


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    product: jax.Array = jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
    return product


def _by_sums(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiplies in one program for all layers, with one sum over devices where k is split."""
    # (group, stack, n, l, k), never in memory: the products are summed as they are made.
    return jnp.sum(x[..., :, None, :] * transpose(y)[..., None, :, :], axis=-1)


def _layer_by_layer(x: jax.Array, y: jax.Array) -> jax.Array:
    group, stack, n, _ = x.shape

    def body(t: jax.Array, out: jax.Array) -> jax.Array:
        start = (t // stack, t % stack, 0, 0)
        layers = (jax.lax.dynamic_slice(z, start, (1, 1, *z.shape[2:])) for z in (x, y))
        done: jax.Array = jax.lax.dynamic_update_slice(out, _matmul(*layers), start)
        return done

    out = varying_like(jnp.zeros((group, stack, n, y.shape[-1]), jnp.result_type(x, y)), x, y)
    product: jax.Array = jax.lax.fori_loop(0, group * stack, body, out)
    return product


def transpose(x: jax.Array) -> jax.Array:
    """Swaps the last two axes."""
    return jnp.swapaxes(x, -1, -2)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["rank_last"]
)
@dataclasses.dataclass(frozen=True)
class FactorMatrix:
    """Tall matrices (n, k) in the layout of a factor, A's or B's.

    Attributes:
      array: (..., n, k) if rank_last, else (..., k, n).
      rank_last: Whether k is the last axis, as in A.
    """

    array: jax.Array
    rank_last: bool = True

    @property
    def rank_axis(self) -> int:
        """Position of the axis of size k."""
        return -1 if self.rank_last else -2

    @property
    def long_axis(self) -> int:
        """Position of the axis of size n."""
        return -2 if self.rank_last else -1

    @property
    def rank(self) -> int:
        """Number of columns, k."""
        return self.array.shape[self.rank_axis]

    @property
    def length(self) -> int:
        """Number of rows, n."""
        return self.array.shape[self.long_axis]

    def like(self, array: jax.Array) -> "FactorMatrix":
        """Wraps an array of this layout."""
        return FactorMatrix(array, self.rank_last)

    def times(self, t: jax.Array) -> "FactorMatrix":
        """Multiplies by t (..., k, l) from the right."""
        if self.rank_last:
            return self.like(matmul(self.array, t))
        return self.like(matmul(transpose(t), self.array))

    def inner(self, other: "FactorMatrix") -> jax.Array:
        """Inner products (..., k, l) of the columns with those of another of the same layout."""
        if self.rank_last:
            return matmul(transpose(self.array), other.array)
        return matmul(self.array, transpose(other.array))

    def scaled(self, columns: jax.Array) -> "FactorMatrix":
        """Multiplies each column by its number, (..., k)."""
        return self.like(self.array * jnp.expand_dims(columns, self.long_axis))

    def tall(self) -> jax.Array:
        """The matrices as (..., n, k)."""
        return self.array if self.rank_last else transpose(self.array)

    def wide(self) -> jax.Array:
        """Their transposes, (..., k, n)."""
        return transpose(self.array) if self.rank_last else self.array


class Basis(NamedTuple):
    """An orthonormal basis of the column space of P: `P = q s`.

    When P has a rank k below r, q is an orthonormal basis times a (k, r) matrix with orthonormal
    rows, so `q qᵀ` is the projector all the same; of P = 0, q is zero.

    Attributes:
      q: (..., n, r).
      s: (..., r, r).
      s_inv: (..., r, r), the inverse of s on the directions that are kept: `q = P s_inv`.
    """

    q: FactorMatrix
    s: jax.Array
    s_inv: jax.Array

    def coordinates(self, x: FactorMatrix) -> FactorMatrix:
        """`X Pᵀ Q` of an X (..., m, r) that stands for the full matrix `X Pᵀ`."""
        return x.times(transpose(self.s))

    def from_coordinates(self, c: FactorMatrix) -> FactorMatrix:
        """The X (..., m, r) with `X Pᵀ = c Qᵀ`; undoes `coordinates`."""
        return c.times(transpose(self.s_inv))

    def project(self, gp: FactorMatrix) -> FactorMatrix:
        """The X (..., m, r) with `X Pᵀ = G proj(P)`, given the product `G P` (..., m, r).

        This is `G P (PᵀP)⁻¹` without the Gram matrix. Where P lacks rank, it is one such X, zero
        for the columns that depend on others.
        """
        return self.from_coordinates(gp.times(self.s_inv))


# Without jit, updates that are not compiled would trace the loops of these two at every call.
@jax.jit
def orthonormal_basis(p: FactorMatrix) -> Basis:
    """Factorizes `P = Q S` with orthonormal Q, by products over the long axis.

    The scale of each column does not matter. With columns of unit length, directions whose singular
    value is under 4 √r ε are dropped: nothing moves along them.

    Args:
      p: (..., n, r) with n >= r, float32 or float64; leading axes are a batch.

    Returns:
      The basis, finite for every finite p, in the layout of p.

    Example:
      >>> import jax.numpy as jnp
      >>> p = jnp.array([[3.0, 0.0], [4.0, 0.0], [0.0, 0.0]])
      >>> q = orthonormal_basis(FactorMatrix(p)).q.array
      >>> print((100 * q @ q.T).round())  # 100 times the projector on (3, 4, 0)
      [[36. 48.  0.]
       [48. 64.  0.]
       [ 0.  0.  0.]]
    """
    return _bases(p)[0]


@jax.jit
def orthonormal_bases(a: FactorMatrix, b: FactorMatrix) -> tuple[Basis, Basis]:
    """The bases of both factors of pairs, with one elimination for two.

    Args:
      a: (..., m, r), as `orthonormal_basis` takes it.
      b: (..., n, r) of the same dtype and batch, in either layout.

    Returns:
      The basis of each, as `orthonormal_basis` makes it.

    Example:
      >>> import jax.numpy as jnp
      >>> a, b = FactorMatrix(jnp.ones((3, 1))), FactorMatrix(2 * jnp.ones((1, 4)), rank_last=False)
      >>> [round(basis.s.item(), 4) for basis in orthonormal_bases(a, b)]  # √3 and 2 · √4
      [1.7321, 4.0]
    """
    first, second = _bases(a, b)
    return first, second


def _bases(*ps: FactorMatrix) -> tuple[Basis, ...]:
    """The bases of matrices that have all but the long axis in common."""
    r, x = ps[0].rank, ps[0].array
    eps = float(jnp.finfo(x.dtype).eps)
    batch = x.shape[:-2]
    lengths = [_column_lengths(p) for p in ps]
    qs = [p.scaled(1 / length) for p, length in zip(ps, lengths, strict=True)]
    eye = jnp.broadcast_to(jnp.eye(r, dtype=x.dtype), (*batch, r, r))
    eye, qs = varying_like((eye, qs), ps)

    # What each pass adds to the diagonal, and which pivots count as zero in it. After the first, a
    # singular value σ of the unit columns is σ / √(σ² + shift); after the second, columns that are
    # kept have length one but for rounding, and dropped ones are zero.
    shifts = jnp.array([2 * r * eps, 0.0, 0.0], x.dtype)
    drops = jnp.array([0.0, 8 * eps, 0.5], x.dtype)

    def passes(
        qs: list[FactorMatrix], *, unroll: int, eliminate: Callable[..., tuple[jax.Array, ...]]
    ) -> list[Basis]:
        def one_pass(k: jax.Array, bases: list[Basis]) -> list[Basis]:
            grams = jnp.stack([basis.q.inner(basis.q) + shifts[k] * eye for basis in bases])
            changes = zip(*eliminate(grams, drops[k]), strict=True)
            return [_change(basis, *change) for basis, change in zip(bases, changes, strict=True)]

        found: list[Basis] = jax.lax.fori_loop(
            0, 3, one_pass, [Basis(q, eye, eye) for q in qs], unroll=unroll
        )
        return found

    # As a loop the passes are half the program, which lies in the memory of a TPU, and which takes
    # long to compile for a GPU. On CPUs a loop would copy what it carries.
    bases: list[Basis] = jax.lax.platform_dependent(
        qs,
        tpu=functools.partial(passes, unroll=1, eliminate=_eliminate),
        cuda=functools.partial(passes, unroll=1, eliminate=_eliminate_on_gpus),
        default=functools.partial(passes, unroll=3, eliminate=_eliminate),
    )
    return tuple(map(_finished, bases, lengths))


def _column_lengths(p: FactorMatrix) -> jax.Array:
    """Norms (..., r) of the columns, and 1 for what has none."""
    tiny = float(jnp.finfo(p.array.dtype).tiny)
    # By the largest element before the norm: squares of tiny ones would underflow. A comparison
    # that a NaN fails leaves it in: it must show in the result.
    largest = jnp.max(jnp.abs(p.array), axis=p.long_axis)
    largest = jnp.where(largest < tiny, 1.0, largest)
    norm = jnp.linalg.norm(p.scaled(1 / largest).array, axis=p.long_axis)
    return largest * jnp.where(norm < tiny, 1.0, norm)


def _finished(basis: Basis, length: jax.Array) -> Basis:
    """The basis of a matrix, given that of its unit columns."""
    if basis.q.length == basis.q.rank:
        # A square Q is turned to the identity: no quadratic form then suffers from cancellation.
        rotation = transpose(basis.q.tall())
        basis = _change(basis, transpose(rotation), rotation)
    return Basis(basis.q, basis.s * length[..., None, :], basis.s_inv / length[..., :, None])


def _change(basis: Basis, forward: jax.Array, backward: jax.Array) -> Basis:
    """Goes on from `P = q s` to the basis `q backward`, forward being the inverse of backward."""
    return Basis(basis.q.times(backward), matmul(forward, basis.s), matmul(basis.s_inv, backward))


def _picked(x: jax.Array, at: jax.Array, axis: int) -> jax.Array:
    """The row or column of each matrix at an index (..., 1, 1), by a sum."""
    places = jax.lax.broadcasted_iota(at.dtype, x.shape, x.ndim + axis)
    return jnp.sum(jnp.where(places == at, x, 0.0), axis=axis, keepdims=True)


def _eliminate(
    gram: jax.Array,
    drop: jax.Array,
    *,
    pick: Callable[[jax.Array, jax.Array, int], jax.Array] = _picked,
    unroll: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Factorizes Gram matrices G = FᵀF by pivoted Cholesky elimination, with F's inverse.

    Args:
      gram: (..., r, r), symmetric, positive semidefinite.
      drop: Pivots that are not above it, and what is left with them, count as zero.
      pick: Takes the row (-2) or the column (-1) of each matrix at an index (..., 1, 1).
      unroll: Steps of an iteration.

    Returns:
      F and T (..., r, r) with `Tᵀ G T` the identity on the columns that are kept; those of T and
      rows of F that are dropped are zero.
    """
    r = gram.shape[-1]
    rows, columns = (jax.lax.broadcasted_iota(int, gram.shape, gram.ndim - i) for i in (2, 1))
    eye = varying_like(jnp.broadcast_to(jnp.eye(r, dtype=gram.dtype), gram.shape), gram)

    def body(k: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        left, vectors, forward, backward = carry
        diagonal = jnp.diagonal(left, axis1=-2, axis2=-1)  # (..., r), zero where done
        largest = jnp.max(diagonal, axis=-1, keepdims=True)  # (..., 1)
        # Unit columns are all as large, and rounding is not to choose between them: the first does.
        at = jnp.argmax(diagonal >= 0.99 * largest, axis=-1)[..., None, None]  # (..., 1, 1)
        row = pick(left, at, -2)  # (..., 1, r)
        # A NaN is kept, and shows in the result.
        size = jnp.where(jnp.isnan(largest[..., None]), jnp.nan, pick(row, at, -1))  # (..., 1, 1)
        dropped = size <= drop
        scale = jnp.where(dropped, 0.0, 1 / jnp.sqrt(jnp.where(dropped, 1.0, size)))
        row = row * scale
        vector = pick(vectors, at, -1) * scale  # (..., r, 1)
        rest = jnp.where(columns == at, 0.0, row)
        # What rounding leaves of the pivot's row and column is not to be chosen again.
        done = (rows == at) | (columns == at)
        left = jnp.where(done, 0.0, left - transpose(row) * row)
        vectors = vectors - vector * rest
        forward = jnp.where(rows == k, row, forward)
        backward = jnp.where(columns == k, vector, backward)
        return left, vectors, forward, backward

    # F and T begin with what is overwritten. A constant there would lie in memory from the start.
    start = (gram, eye, gram, gram)
    _, _, forward, backward = jax.lax.fori_loop(0, r, body, start, unroll=unroll)
    return forward, backward


# What a GPU takes for small matrices is the number of kernels. With elements taken by their index a
# step has two, the choice of the pivot and all that follows, and with sums six; an iteration of a
# loop has some of its own. Other devices make the sums.
_eliminate_on_gpus = functools.partial(
    _eliminate,
    pick=functools.partial(jnp.take_along_axis, mode="promise_in_bounds"),
    unroll=16,
)


def batched(
    function: Callable[..., tuple[jax.Array, ...]],
    groups: Sequence[tuple[jax.Array, ...]],
    diagonal: float = 0.0,
) -> list[tuple[jax.Array, ...]]:
    """Applies a function of small matrices to groups of several sizes, in one call for all.

    Smaller matrices are padded to the largest size, with a multiple of the identity as the other
    diagonal block. The function must not mix the two blocks.

    Args:
      function: From arrays (count, r, r) to a tuple of such arrays.
      groups: Its arguments for each group: arrays (group, stack, r, r) of one r.
      diagonal: The multiple of the identity.

    Returns:
      Its results for each group, (group, stack, r, r), in the dtype of the group.

    Example:
      >>> import jax.numpy as jnp
      >>> groups = [(jnp.full((1, 1, 1, 1), 2.0),), (4 * jnp.ones((3, 1, 1, 1)) * jnp.eye(2),)]
      >>> [[x], [y]] = batched(lambda m: (jnp.linalg.inv(m),), groups, diagonal=1.0)
      >>> x.tolist(), y.shape, y[0, 0].tolist()
      ([[[[0.5]]]], (3, 1, 2, 2), [[0.25, 0.0], [0.0, 0.25]])
    """
    if not groups:
        return []
    most = max(x.shape[-1] for x, *_ in groups)
    dtype = jnp.result_type(*(x for group in groups for x in group))

    def padded(x: jax.Array) -> jax.Array:
        r = x.shape[-1]
        x = jnp.pad(x.reshape(-1, r, r).astype(dtype), ((0, 0), (0, most - r), (0, most - r)))
        added = jnp.arange(r, most)
        return x.at[:, added, added].set(diagonal) if diagonal and r < most else x

    given = [jnp.concatenate([padded(x) for x in role]) for role in zip(*groups, strict=True)]
    results = function(*given)
    found, start = [], 0
    for x, *_ in groups:
        *count, r, _ = x.shape
        part = slice(start, start := start + math.prod(count))
        found.append(tuple(y[part, :r, :r].reshape(x.shape).astype(x.dtype) for y in results))
    return found
