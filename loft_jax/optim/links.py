"""The links of the LoFT chain that carry no moments.

From `project_gradients` to the end of a chain, a leaf X of factor A stands for the full matrix
`X Pᵀ`, P being the partner: `P = s Bᵀ` for A, and `s A` for Bᵀ. That is what adding X to A does to
`W = s A B`. So a norm, a clip or a linear Optax transformation means the same at every place of
the chain, with one exception: between `calibrate_moments` and `project_updates` a leaf is a
`Moments`.

Leaves that belong to no pair take the same steps as matrices of their own: plain AdamW.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax.optim.arguments import Number, check_choice, check_positive
from loft_jax.optim.linear_algebra import Basis, FactorMatrix
from loft_jax.optim.meshes import on_explicit_axes
from loft_jax.optim.optax_types import next_count, transformation
from loft_jax.optim.paired_updates import PairedUpdates, absolute_square, compute_dtype
from loft_jax.optim.pairs import DEFAULT_SPEC, FactorGroup, FactorSpec, PairGroup, find_pairs

Role = Literal["a", "b"]
Move = Literal["tangent", "alternate"]


class StepState(NamedTuple):
    """State of a link that only counts steps, to know which factor's turn it is.

    Attributes:
      count: (), int32, updates done.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way, as in Optax


class ClipState(NamedTuple):
    """State of `clip_by_projected_norm`.

    Attributes:
      count: (), steps done.
      projected_norm: (), float32 at least, the norm before clipping at the last step.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way, as above
    projected_norm: jax.Array


@on_explicit_axes
def project_gradients(*, spec: FactorSpec = DEFAULT_SPEC) -> optax.GradientTransformation:
    r"""Rescales factor gradients so that they stand for the projected full gradient.

    .. math::
      \tilde g_A = G P (P^T P)^{-1}, \qquad \tilde g_A P^T = G \, \mathrm{proj}(P)

    with the raw gradient of A being `G P`. What the result stands for, `g̃_A Pᵀ`, depends neither on
    how the product is split into factors, nor on s. Where columns of P depend on one another, the
    result uses as few of them as it takes, and the others get zero. Directions in which the partner
    has nothing (B = 0 at the start) get zero. Other leaves pass unchanged.

    Args:
      spec: The pairs and their scaling.

    Returns:
      A stateless transformation of raw gradients; it needs the parameters. Gradients of factors
      leave it in float32 at least, and the links of this package take them so. A link with a state
      in the dtype of the parameters, such as `optax.trace` over factors in bfloat16, needs
      `optax.stateless(optax.tree.cast_like)` before it.

    Raises:
      ValueError: At init or update, for parameters without proper pairs (see `find_pairs`) or when
        the parameters are missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from loft_jax import project_gradients
      >>> params = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.full((1, 2), 5.0)}
      >>> full = jnp.array([[1.0, 3.0], [2.0, 2.0]])  # gradient of W
      >>> grads = {"lora_a": full @ params["lora_b"].T, "lora_b": params["lora_a"].T @ full}
      >>> tx = project_gradients()
      >>> scaled, _ = tx.update(grads, tx.init(params), params)
      >>> (scaled["lora_a"] @ params["lora_b"]).round(3).tolist()  # rows projected on (1, 1)
      [[2.0, 2.0], [2.0, 2.0]]

    References:
      Tastan et al., LoFT, ICLR 2026 (arXiv 2505.21289), gradient scaling; computed through an
      orthonormal basis instead of the Gram matrix (see `loft_jax.optim.linear_algebra`).
    """

    def init(params: optax.Params) -> optax.EmptyState:
        find_pairs(params, spec)
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        tree = PairedUpdates(updates, params, spec)
        for group in tree.groups:
            for factor, partner in group.sides():
                basis = tree.basis(group, partner)
                tree.put(factor, basis.project(tree.folded(factor)))
        return tree.rebuilt(), state

    return transformation(init, update)


@on_explicit_axes
def clip_by_projected_norm(
    max_norm: Number,
    *,
    move: Move = "tangent",
    first: Role = "b",
    spec: FactorSpec = DEFAULT_SPEC,
) -> optax.GradientTransformation:
    r"""Clips by the global norm of the full matrices that the leaves stand for.

    .. math::
      \Big( \sum_{\mathrm{pairs}} \| X_A P^T + R X_B^T - \mathrm{overlap} \|_F^2
        + \sum_{\mathrm{others}} \| x \|^2 \Big)^{1/2}

    For gradients the first sum is that of their projection on the tangent space,
    `‖G Π_P‖² + ‖Π_R G‖² - ‖Π_R G Π_P‖²`. After `assign_overlap`, so after a whole `loft(...)`, it
    is that of the update. In between, where both factors have an overlap of their own, it is the
    longer of what `assign_overlap` can leave. With move "alternate" it is the norm of what the
    factor whose turn it is does to W. No dense matrix is made: norms are those of coordinates in
    orthonormal bases.

    Args:
      max_norm: The largest norm that passes unchanged.
      move: Whether both factors count and their overlap once ("tangent"), or only the factor whose
        turn it is ("alternate").
      first: For "alternate" alone, as in `alternate_factors`.
      spec: The pairs and their scaling.

    Returns:
      A transformation that needs the parameters, for any place after `project_gradients`.
      Its state is a step counter, and the norm at the last step, to be logged.

    Raises:
      ValueError: As `project_gradients`; or for a max_norm that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from loft_jax import clip_by_projected_norm
      >>> params = {"lora_a": jnp.eye(2), "lora_b": 10.0 * jnp.eye(2)}
      >>> updates = {"lora_a": jnp.eye(2), "lora_b": jnp.zeros((2, 2))}  # W moves by 10 I
      >>> tx = clip_by_projected_norm(1.0)
      >>> clipped, _ = tx.update(updates, tx.init(params), params)
      >>> round(float(clipped["lora_a"][0, 0]) * 10 * 2**0.5, 5)
      1.0

    References:
      Tastan et al., LoFT, ICLR 2026 (arXiv 2505.21289), gradient clipping.
    """
    check_choice(move, "move", Move)
    check_choice(first, "first", Role)
    check_positive(max_norm, "max_norm")

    def init(params: optax.Params) -> ClipState:
        find_pairs(params, spec)
        leaves = [leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")]
        dtype = jnp.result_type(jnp.float32, *map(compute_dtype, leaves))
        return ClipState(jnp.zeros([], jnp.int32), jnp.zeros([], dtype))

    def update(
        updates: optax.Updates,
        state: ClipState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ClipState]:
        tree = PairedUpdates(updates, params, spec)
        total: Number = 0.0
        for group in tree.groups:
            squares = []
            for factor, partner in group.sides():
                c = tree.basis(group, partner).coordinates(tree.folded(factor))
                if move == "tangent":
                    rest = _without_overlap(c, tree.basis(group, factor), keeps=False)
                    squares.append((_squares(c), _squares(rest)))
                else:
                    turn = has_turn(factor, state.count, first)
                    total += jnp.sum(jnp.where(turn, _squares(c), 0.0))
            if move == "tangent":
                (a, rest_a), (b, rest_b) = squares
                total += jnp.sum(jnp.maximum(a + rest_b, rest_a + b))
        for index in tree.plain:
            leaf = tree.leaves[index]
            total += jnp.sum(absolute_square(leaf.astype(compute_dtype(leaf))))
        norm = jnp.sqrt(total)
        scale = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        tree.leaves = [leaf * scale.astype(leaf.dtype) for leaf in tree.leaves]
        count = next_count(state.count)
        return tree.rebuilt(), ClipState(count, norm.astype(state.projected_norm.dtype))

    return transformation(init, update)


def _squares(x: FactorMatrix) -> jax.Array:
    """The squared Frobenius norms (...) of matrices (..., m, r)."""
    return jnp.sum(jnp.square(x.array), axis=(-2, -1))


@on_explicit_axes
def assign_overlap(
    first: Role = "b", *, spec: FactorSpec = DEFAULT_SPEC
) -> optax.GradientTransformation:
    r"""Removes the overlap of both updates from one of them, so that it is counted once.

    The update of A moves W by `D_A Π_P` and that of B by `Π_R D_B`: what each factor's moments make
    of AdamW's direction, with Π_P and Π_R projecting on what the rows of B and the columns of A
    span. In the sum, what both can do counts twice: `Π_R D_A Π_P` and `Π_R D_B Π_P`. One factor
    keeps its own; from the update of the other it is removed by

    .. math::
      X \leftarrow X - Q Q^T X

    with Q an orthonormal basis of the columns of *that* factor itself. Where both directions are
    the same D, W moves by the orthogonal projection of D on the tangent space of the matrices of
    rank r at W. Weight decay is all overlap: added before this link, it shrinks W once.

    The factors take turns in keeping the overlap. If the columns of one have room for their whole
    side (r = in or r = out), its partner always keeps it, since nothing is projected away there;
    where both have (r = in = out), that is `first`.

    W also moves by the product of both updates, a term of the squared learning rate. It is large
    where a direction of W is smaller than a step. Where it would move W further than the rest does,
    the factor without the overlap moves less, so far that both are equally long.

    Args:
      first: The factor that keeps the overlap at the first step, where they take turns.
      spec: The pairs and their scaling.

    Returns:
      A transformation of final updates, for the place after the learning rate. Its state is a step
      counter; it needs the parameters. Leaves that belong to no pair pass.

    Raises:
      ValueError: As `project_gradients`; or for a first that is neither "a" nor "b".

    Example:
      >>> import jax.numpy as jnp
      >>> from loft_jax import assign_overlap
      >>> params = {"lora_a": jnp.eye(3, 2), "lora_b": jnp.eye(2)}
      >>> updates = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 2))}
      >>> tx = assign_overlap()
      >>> updates, _ = tx.update(updates, tx.init(params), params)
      >>> (updates["lora_a"] @ params["lora_b"] + params["lora_a"] @ updates["lora_b"]).tolist()
      [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]

    References:
      LoRA-Pro (Wang et al., ICLR 2025, arXiv 2407.18242) and Riemannion (Bogachev et al., ICLR
      2026, arXiv 2507.12142) project gradients on this tangent space.
    """
    check_choice(first, "first", Role)

    def init(params: optax.Params) -> StepState:
        find_pairs(params, spec)
        return StepState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates,
        state: StepState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, StepState]:
        tree = PairedUpdates(updates, params, spec)
        for group in tree.groups:
            moved = []
            for factor, _ in group.sides():
                keeps = keeps_overlap(group, factor, state.count, first)
                x = _without_overlap(tree.folded(factor), tree.basis(group, factor), keeps)
                moved.append((factor, keeps, x))
            share = _share_of_other(
                (moved[0][2], tree.basis(group, group.b)),
                (moved[1][2], tree.basis(group, group.a)),
                tree.scalings(group),
                a_keeps=moved[0][1],
            )
            for factor, keeps, x in moved:
                x = x.like(x.array * jnp.where(keeps, 1.0, share).astype(x.array.dtype))
                tree.put_updates(factor, x)
        return tree.rebuilt(), StepState(next_count(state.count))

    return transformation(init, update)


def _without_overlap(x: FactorMatrix, own: Basis, keeps: jax.Array | bool) -> FactorMatrix:
    """`X - Q Qᵀ X` for the columns Q of the factor itself; X of the factor that keeps all."""
    inside = own.q.inner(x)  # (..., r, r)
    return x.like(x.array - own.q.times(jnp.where(keeps, 0.0, inside)).array)


def _share_of_other(
    a: tuple[FactorMatrix, Basis],
    b: tuple[FactorMatrix, Basis],
    s: jax.Array,
    a_keeps: jax.Array | bool,
) -> jax.Array:
    """How much is left, (..., 1, 1), of the update of the factor that does not keep the overlap.

    All of it, unless `s X_A X_Bᵀ` is longer than `X_A Pᵀ + R X_Bᵀ`: then as much as makes them
    equally long. The two parts of the sum are orthogonal, since the overlap has one owner. Each
    update comes with the basis of its partner.
    """

    def unit(x: FactorMatrix) -> tuple[jax.Array, FactorMatrix]:
        # By the largest element before squares, which would overflow next to a tiny partner.
        largest = jnp.max(jnp.abs(x.array), axis=(-2, -1), keepdims=True)
        return largest, x.like(x.array / jnp.where(largest > 0, largest, 1.0))

    def root(x: jax.Array) -> jax.Array:
        total = jnp.sum(x, axis=(-2, -1), keepdims=True)
        return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1.0)), 0.0)

    sizes, grams, moves = [], [], []
    for x, partner in (a, b):
        size, direction = unit(x)
        sizes.append(size)
        grams.append(direction.inner(direction))  # (..., r, r)
        size, move = unit(partner.coordinates(x))
        moves.append(size * root(jnp.square(move.array)))
    product = jnp.abs(s) * sizes[0] * sizes[1] * root(grams[0] * grams[1])
    kept, other = (jnp.where(a_keeps, x, y) for x, y in (moves, reversed(moves)))
    # The share t with t product = hypot(kept, t other).
    bound = product > jnp.hypot(kept, other)
    less, more = (jnp.sqrt(jnp.where(bound, x, 1.0)) for x in (product - other, product + other))
    # Where `product` is next to `other`, rounding could make it more than all.
    return jnp.where(bound, jnp.minimum(kept / (less * more), 1.0), 1.0)


@on_explicit_axes
def alternate_factors(
    first: Role = "b", *, spec: FactorSpec = DEFAULT_SPEC
) -> optax.GradientTransformation:
    """Lets one factor of each pair move per step: zero updates for the other.

    W then moves by what that factor alone can do, with no product of two updates.

    Args:
      first: The factor that moves at the first step; "b", since B = 0 leaves A no gradient.
      spec: The pairs.

    Returns:
      A transformation whose state is a step counter; it needs the parameters. Leaves that belong
      to no pair pass.

    Raises:
      ValueError: As `project_gradients`; or for a first that is neither "a" nor "b".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from loft_jax import alternate_factors
      >>> params = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2))}
      >>> tx = alternate_factors()
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(lambda u: float(u.sum()), updates)
      {'lora_a': 0.0, 'lora_b': 2.0}

    References:
      Tastan et al., LoFT, ICLR 2026 (arXiv 2505.21289), alternating updates.
    """
    check_choice(first, "first", Role)

    def init(params: optax.Params) -> StepState:
        find_pairs(params, spec)
        return StepState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: StepState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, StepState]:
        tree = PairedUpdates(updates, params, spec)
        for group in tree.groups:
            for factor, _ in group.sides():
                for index in factor.indices:
                    leaf = tree.leaves[index]
                    tree.leaves[index] = jnp.where(
                        has_turn(factor, state.count, first), leaf, jnp.zeros_like(leaf)
                    )
        return tree.rebuilt(), StepState(next_count(state.count))

    return transformation(init, update)


def has_turn(factor: FactorGroup, count: jax.Array, first: Role) -> jax.Array:
    """Whether it is the turn of a factor at the step after `count` updates."""
    return (count % 2 == 0) == ((first == "a") == factor.rank_last)


def keeps_overlap(
    group: PairGroup, factor: FactorGroup, count: jax.Array, first: Role
) -> jax.Array | bool:
    """Whether a factor keeps the overlap at the step after `count` updates.

    The two take turns, unless the columns of one can span their whole side (r = in or r = out):
    its partner then moves W without any projection, and always keeps the overlap. Where both can,
    that is `first`: with "b", A spans its side from the start, though B is zero.
    """
    a_spans, b_spans = (group.rank == math.prod(x.factors[0].features) for x in (group.a, group.b))
    if a_spans and b_spans:
        return factor.rank_last == (first == "a")
    if a_spans or b_spans:
        return factor.rank_last == b_spans
    return has_turn(factor, count, first)
