"""Moments of the full weight in a subspace that moves: the links that carry Adam's.

`calibrate_moments` accumulates them and `project_updates` makes Adam's direction of them.
`calibrate_first_moment` is the part that Adam and Muon have in common.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from loft_jax.optim.arguments import (
    Number,
    check_choice,
    check_decay,
    check_dtype,
    check_not_negative,
)
from loft_jax.optim.eager import choose, power
from loft_jax.optim.full_moment import FullMoment
from loft_jax.optim.fused_direction import check_fused
from loft_jax.optim.linear_algebra import Basis, FactorMatrix
from loft_jax.optim.links import Move, Role, StepState, has_turn
from loft_jax.optim.meshes import on_explicit_axes
from loft_jax.optim.optax_types import next_count, transformation
from loft_jax.optim.paired_updates import PairedUpdates, absolute_square, compute_dtype
from loft_jax.optim.pairs import DEFAULT_SPEC, FactorGroup, FactorSpec, PairGroup, find_pairs
from loft_jax.optim.second_moments import (
    AdamStep,
    DiagonalMoment,
    FactoredMoment,
    ProjectedGradient,
    SecondMomentRule,
    SecondMomentState,
    stochastic_round,
)
from loft_jax.optim.state import unboxed_structure

SecondMoment = Literal["full", "factored", "diagonal"]

_RULES: dict[str, SecondMomentRule] = {
    "full": FullMoment(),
    "factored": FactoredMoment(),
    "diagonal": DiagonalMoment(),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mu", "nu", "gram", "correction1", "correction2", "limit"],
    meta_fields=["second_moment"],
)
@dataclasses.dataclass(frozen=True)
class Moments:
    """The moments of a leaf, in the place of its update.

    The first three are as in `CalibratedMomentsState`.

    Attributes:
      mu: First moment.
      nu: Second moment.
      gram: Its other part, where the rule has one.
      correction1: (), what the first moment is divided by for Adam's bias correction.
      correction2: (), the same for the second.
      limit: (), the bound of Adam on an element of the direction at this step.
      second_moment: The rule that nu follows.
    """

    mu: jax.Array
    nu: jax.Array
    gram: Any
    correction1: jax.Array
    correction2: jax.Array
    limit: jax.Array
    second_moment: SecondMoment


class CalibratedMomentsState(NamedTuple):
    """State of `calibrate_moments`.

    Each tree has the structure of the parameters, and each leaf the axes of its parameter. For a
    pair it is `(m + n) (w + 2 r)` numbers, w being r (r + 1) / 2 for the full second moment, r for
    the diagonal one, and 1 for the factored one, which has 2 r² besides.

    Attributes:
      count: (), int32, updates done.
      bound: (), the square of Adam's bound on an element, before bias correction.
      mu: First moments. For a factor: shaped like it, in coordinates of the partner's basis.
      nu: Second moments. For a factor: shaped like it, with w in the place of r.
      gram: For a factor with a factored second moment: (*stack, r, r). Nothing for other leaves.
      basis: For a factor: orthonormal basis of its columns at the last update, shaped like it.
        Nothing for other leaves.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way, as in Optax
    bound: jax.Array
    mu: Any
    nu: Any
    gram: Any
    basis: Any


class CalibratedMoment(NamedTuple):
    """The first moment of a group of factors at a step, and what it was made of.

    Attributes:
      mu: (group, stack, m, r), in coordinates of the partner's basis.
      basis: Of the partner.
      gradient: The projected gradient.
    """

    mu: FactorMatrix
    basis: Basis
    gradient: ProjectedGradient


def calibrate_first_moment(
    tree: PairedUpdates,
    group: PairGroup,
    factor: FactorGroup,
    partner: FactorGroup,
    mu: dict[int, jax.Array],
    basis: dict[int, jax.Array],
    decay: Number,
) -> CalibratedMoment:
    r"""Accumulates the first moment of one side of a group of pairs, while its subspace moves.

    .. math::
      C = Q_{old}^T Q, \qquad m \leftarrow \beta \, m C + (1 - \beta) \, G Q

    Args:
      tree: Projected gradients.
      group: The group.
      factor: Its factors of one role.
      partner: Those of the other.
      mu: First moments by position of their factor, replaced in place.
      basis: Orthonormal bases of the columns of a factor by its position; those of the partner are
        replaced in place.
      decay: The β.

    Returns:
      The moment.
    """
    now = tree.basis(group, partner)
    change = partner.fold([basis[i] for i in partner.indices]).inner(now.q)  # (group, stack, r, r)
    x = tree.folded(factor)
    c = now.coordinates(x)  # (group, stack, m, r)
    dtype = c.array.dtype
    m = factor.fold([mu[i].astype(dtype) for i in factor.indices]).times(change)
    m = m.like((decay * m.array + (1 - decay) * c.array).astype(dtype))
    for i, leaf in zip(factor.indices, factor.unfold(m), strict=True):
        mu[i] = leaf.astype(mu[i].dtype)
    for i, leaf in zip(partner.indices, partner.unfold(now.q), strict=True):
        basis[i] = leaf.astype(basis[i].dtype)
    return CalibratedMoment(m, now, ProjectedGradient(x, c, change))


@on_explicit_axes
def calibrate_moments(
    b1: Number = 0.9,
    b2: Number = 0.999,
    *,
    second_moment: SecondMoment = "factored",
    state_dtype: DTypeLike | None = None,
    mu_dtype: DTypeLike | None = None,
    spec: FactorSpec = DEFAULT_SPEC,
) -> optax.GradientTransformation:
    r"""Accumulates the moments of the projected full gradient while its subspace moves.

    With `P = Q S` and the gradient's coordinates `c = G Q` (rows c_i), all at the same parameters
    for both factors:

    .. math::
      C = Q_{old}^T Q, \quad
      m \leftarrow \beta_1 m C + (1 - \beta_1) c, \quad
      p_i \leftarrow \beta_2 C^T p_i C + (1 - \beta_2) c_i c_i^T

    so that `m Qᵀ` is Adam's first moment with every earlier gradient projected on each subspace
    since, one after the other, and `Q_jᵀ p_i Q_j` the second moment of element (i, j) of the same.
    C is a product of orthonormal matrices: a contraction, whatever the condition of the factors.
    The matrices p_i are kept as packed halves; other second moments keep less of them (see
    `loft_jax.optim.full_moment` and `loft_jax.optim.second_moments`).

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      second_moment: "factored": a weight a row and one (r, r) matrix. "full": exact, one symmetric
        (r, r) matrix a row. "diagonal": a number for each of the factor's, which is not invariant.
      state_dtype: Dtype of the second moments; by default that of the computation, float32 at
        least. In bfloat16 they are rounded stochastically.
      mu_dtype: Dtype of the first moments, as in `optax.adamw`.
      spec: The pairs and their scaling.

    Returns:
      A transformation from projected gradients to `Moments`, for `project_updates`; it needs the
      parameters.

    Raises:
      ValueError: As `project_gradients`; or for a b1 or b2 outside [0, 1), an unknown
        second_moment, or a dtype that moments cannot be stored in.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from loft_jax import calibrate_moments, project_gradients, project_updates
      >>> calibrate = calibrate_moments(0.9, 0.99, second_moment="full")
      >>> tx = optax.chain(project_gradients(), calibrate, project_updates())
      >>> state = tx.init({"lora_a": jnp.ones((64, 4)), "lora_b": jnp.zeros((4, 32))})
      >>> state[1].nu["lora_a"].shape, state[1].nu["lora_b"].shape
      ((64, 10), (10, 32))

    References:
      Tastan et al., LoFT, ICLR 2026 (arXiv 2505.21289), calibration of the first and of the second
      moment.
    """
    check_decay(b1, "b1")
    check_decay(b2, "b2")
    check_choice(second_moment, "second_moment", SecondMoment)
    check_dtype(state_dtype, "state_dtype")
    check_dtype(mu_dtype, "mu_dtype")
    rule = _RULES[second_moment]

    def init(params: optax.Params) -> CalibratedMomentsState:
        leaves, treedef = jax.tree.flatten(params)
        dtypes = [compute_dtype(leaf) for leaf in leaves]
        mu = [jnp.zeros_like(x, mu_dtype or t) for x, t in zip(leaves, dtypes, strict=True)]
        nu = [
            jnp.zeros_like(x, state_dtype or jnp.finfo(t).dtype)  # real for complex parameters
            for x, t in zip(leaves, dtypes, strict=True)
        ]
        gram: list[Any] = [optax.MaskedNode() for _ in leaves]
        basis: list[Any] = [optax.MaskedNode() for _ in leaves]
        for pair in find_pairs(params, spec):
            for factor in (pair.a, pair.b):
                i, r = factor.index, pair.rank
                nu[i] = jnp.zeros_like(nu[i], shape=factor.shape(rule.width(r)))
                basis[i] = jnp.zeros_like(leaves[i], dtypes[i])
                if rule.has_gram:
                    gram[i] = jnp.zeros((*factor.stack, r, r), dtypes[i])
        mu_tree, nu_tree, basis_tree = (jax.tree.unflatten(treedef, x) for x in (mu, nu, basis))
        gram_tree = jax.tree.unflatten(unboxed_structure(params), gram)
        return CalibratedMomentsState(
            jnp.zeros([], jnp.int32), jnp.zeros([]), mu_tree, nu_tree, gram_tree, basis_tree
        )

    def update(
        updates: optax.Updates,
        state: CalibratedMomentsState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, CalibratedMomentsState]:
        tree = PairedUpdates(updates, params, spec)
        mu, nu = (dict(enumerate(jax.tree.leaves(x))) for x in (state.mu, state.nu))
        # By position, and not by the MaskedNodes: with `optax.masked` the parameters have some too.
        basis = dict(zip(tree.paired, jax.tree.leaves(state.basis), strict=True))
        gram = dict(zip(tree.paired, jax.tree.leaves(state.gram), strict=rule.has_gram))
        count = next_count(state.count)
        key = jax.random.fold_in(jax.random.key(0), count)
        bound = _adam_bound(state.bound, b1, b2)
        correction1, correction2 = 1 - power(b1, count), 1 - power(b2, count)
        finish = functools.partial(
            Moments,
            correction1=correction1,
            correction2=correction2,
            limit=jnp.sqrt(bound * correction2) / correction1,
            second_moment=second_moment,
        )

        for group in tree.groups:
            for factor, partner in group.sides():
                first = calibrate_first_moment(tree, group, factor, partner, mu, basis, b1)
                second = rule.update(
                    factor,
                    SecondMomentState(
                        [nu[i] for i in factor.indices],
                        [gram[i] for i in factor.indices if rule.has_gram],
                    ),
                    first.gradient,
                    b2,
                    jax.random.fold_in(key, factor.indices[0]),
                )
                nu |= dict(zip(factor.indices, second.rows, strict=True))
                gram |= dict(zip(factor.indices, second.gram, strict=rule.has_gram))
                for i, m in zip(factor.indices, factor.unfold(first.mu), strict=True):
                    tree.leaves[i] = finish(m, nu[i], gram.get(i, optax.MaskedNode()))
        for i in tree.plain:
            dtype = compute_dtype(tree.leaves[i])
            g = tree.leaves[i].astype(dtype)
            m = (b1 * mu[i] + (1 - b1) * g).astype(dtype)
            squares = absolute_square(g)
            p = (b2 * nu[i].astype(squares.dtype) + (1 - b2) * squares).astype(squares.dtype)
            p = stochastic_round(p, nu[i].dtype, jax.random.fold_in(key, i))
            tree.leaves[i] = finish(m, p, optax.MaskedNode())
            mu[i], nu[i] = m.astype(mu[i].dtype), p

        def like(old: Any, leaves: dict[int, jax.Array]) -> Any:
            return jax.tree.unflatten(jax.tree.structure(old), leaves.values())

        new_state = CalibratedMomentsState(
            count,
            bound,
            like(state.mu, mu),
            like(state.nu, nu),
            like(state.gram, gram),
            like(state.basis, basis),
        )
        return tree.rebuilt(), new_state

    return transformation(init, update)


@on_explicit_axes
def project_updates(
    eps: Number = 1e-8,
    *,
    move: Move = "tangent",
    first: Role = "b",
    fused: bool = False,
    spec: FactorSpec = DEFAULT_SPEC,
) -> optax.GradientTransformation:
    r"""Rebuilds Adam's direction of the full weight and projects it on what each partner spans.

    .. math::
      D = \frac{m Q^T}{\sqrt{v} + \epsilon}, \quad v_{ij} = Q_j^T p_i Q_j, \quad
      \Delta A = D P (P^T P)^{-1}

    so that W moves by `ΔA Pᵀ = D proj(P)`, whatever s is. D is made and projected back in tiles,
    and is never in memory as a whole. No element of it exceeds Adam's own bound. (The formulas are
    those of the full second moment; for the others see
    `loft_jax.optim.second_moments`.)

    Args:
      eps: Adam's epsilon, added to the root of the second moment of the full gradient.
      move: "tangent" makes the updates of both factors, for `assign_overlap`; "alternate" only that
        of the factor whose turn it is, and zero for the other.
      first: The factor that moves first, with "alternate".
      fused: Makes the direction of the full second moment in one Pallas kernel on TPUs and NVIDIA
        GPUs, up to rank 128 and in float32 (see `loft_jax.optim.fused_direction`).
      spec: The pairs and their scaling.

    Returns:
      A transformation from the `Moments` of `calibrate_moments` to updates that point uphill, as
      Optax's `scale_by_*` do, in the dtypes of the parameters; its state is a step counter, and it
      needs the parameters.

    Raises:
      ValueError: As `project_gradients`; for a negative eps; for pairs that `fused` cannot do; or,
        at update, for leaves that are not `Moments`, or with `fused` of another second moment.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from loft_jax import calibrate_moments, project_gradients, project_updates
      >>> params = {"lora_a": jnp.eye(2), "lora_b": 3 * jnp.eye(2)}
      >>> full = jnp.array([[1.0, -2.0], [0.5, 4.0]])  # gradient of W
      >>> grads = {"lora_a": full @ params["lora_b"].T, "lora_b": params["lora_a"].T @ full}
      >>> exact = calibrate_moments(second_moment="full")
      >>> tx = optax.chain(project_gradients(), exact, project_updates())
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> (updates["lora_a"] @ params["lora_b"]).round(3).tolist()  # Adam's first step on W
      [[1.0, -1.0], [1.0, 1.0]]

    References:
      Tastan et al., LoFT, ICLR 2026 (arXiv 2505.21289), projected full update.
    """
    check_choice(move, "move", Move)
    check_choice(first, "first", Role)
    check_not_negative(eps, "eps")

    def init(params: optax.Params) -> StepState:
        leaves = jax.tree.leaves(params)
        for pair in find_pairs(params, spec):
            if fused:
                check_fused(pair.path, pair.rank, compute_dtype(leaves[pair.a.index]))
        return StepState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates,
        state: StepState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, StepState]:
        tree = PairedUpdates(updates, params, spec, is_leaf=_is_moments)
        for leaf in tree.leaves:
            if not _is_moments(leaf):
                raise ValueError(
                    f"project_updates found a leaf of type {type(leaf).__name__}, expected the "
                    "Moments that calibrate_moments makes: put that link right before this one"
                )
        for group in tree.groups:
            for factor, partner in group.sides():
                moments = [tree.leaves[i] for i in factor.indices]
                mu = factor.fold([x.mu for x in moments])
                dtype = mu.array.dtype
                rule = _RULES[moments[0].second_moment]
                if fused:
                    check_fused(group.pairs[0].path, group.rank, dtype, moments[0].second_moment)
                    rule = FullMoment(fused=True)
                direction = functools.partial(
                    rule.direction,
                    factor,
                    SecondMomentState(
                        [x.nu for x in moments],
                        [x.gram for x in moments if not isinstance(x.gram, optax.MaskedNode)],
                    ),
                    AdamStep(
                        mu.like(mu.array / moments[0].correction1.astype(dtype)),
                        tree.basis(group, partner),
                        moments[0].correction2.astype(dtype),
                        jnp.asarray(eps, dtype),
                        moments[0].limit.astype(dtype),
                    ),
                )
                if move == "alternate":
                    rest = functools.partial(jax.tree.map, jnp.zeros_like, mu)
                    x = choose(has_turn(factor, state.count, first), direction, rest)
                else:
                    x = direction()
                tree.put_updates(factor, x)
        for i in tree.plain:
            x = tree.leaves[i]
            real = jnp.finfo(x.mu.dtype).dtype
            root = jnp.sqrt(x.nu.astype(real) / x.correction2.astype(real))
            tree.put_update(i, x.mu / x.correction1.astype(real) / (root + eps))
        return tree.rebuilt(), StepState(next_count(state.count))

    return transformation(init, update)


def _adam_bound(old: jax.Array, b1: Number, b2: Number) -> jax.Array:
    """The largest m² / v that Adam can reach, after another update; it starts at zero.

    Of averages `m = Σ w_k g_k` and `v = Σ u_k g_k²` it is `Σ w_k² / u_k` (Cauchy-Schwarz), which an
    update changes as it changes the weights, whatever the decays were before. Each gradient may be
    projected, since m and v are built from the same projected ones.
    """
    rest = (1 - b1) ** 2 / (1 - b2)
    kept = b1**2 / jnp.maximum(b2, float(jnp.finfo(jnp.float32).tiny))
    # Where it grows without end, infinity would be a NaN once a decay is zero.
    return jnp.minimum((kept * old + rest).astype(old.dtype), jnp.finfo(old.dtype).max)


def _is_moments(x: Any) -> bool:
    return isinstance(x, Moments)
