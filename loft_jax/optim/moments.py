"""The links that carry Adam's moments of the full weight, and rebuild its direction from them."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from loft_jax.optim.diagonal_moment import DiagonalMoment
from loft_jax.optim.factored_moment import FactoredMoment
from loft_jax.optim.full_moment import FullMoment
from loft_jax.optim.links import StepState
from loft_jax.optim.pairs import FactorNames, Number, Scaling, find_pairs
from loft_jax.optim.rounding import stochastic_round
from loft_jax.optim.second_moment import (
    AdamStep,
    ProjectedGradient,
    SecondMomentRule,
    SecondMomentState,
)
from loft_jax.optim.tree import (
    Bases,
    FactorTree,
    Move,
    Role,
    absolute_square,
    check,
    check_move,
    check_role,
    check_scaling,
    compute_dtype,
    has_turn,
)

SecondMoment = Literal["full", "factored", "diagonal"]

# Squares of gradients underflow in float16.
_STORABLE = [str(jnp.dtype(name)) for name in ("bfloat16", "float32", "float64")]

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
    """The moments of a leaf, in its place; the first three as in `CalibratedMomentsState`.

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
      mu: First moments. For a factor: shaped like it, in coordinates of the partner's basis.
      nu: Second moments. For a factor: shaped like it, with w in the place of r.
      gram: For a factor with a factored second moment: (*stack, r, r). Nothing for other leaves.
      basis: For a factor: orthonormal basis of its columns at the last update, shaped like it.
        Nothing for other leaves.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way, as in Optax
    mu: Any
    nu: Any
    gram: Any
    basis: Any


def calibrate_moments(
    b1: Number = 0.9,
    b2: Number = 0.999,
    *,
    second_moment: SecondMoment = "factored",
    state_dtype: DTypeLike | None = None,
    mu_dtype: DTypeLike | None = None,
    scaling: Scaling = 1.0,
    factors: FactorNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates the moments of the projected full gradient while its subspace moves.

    With `P = Q S` and the gradient's coordinates `c = G Q` (rows c_i), all at the same parameters
    for both factors:

    .. math::
      C = Q_{old}^T Q, \quad
      m \leftarrow \beta_1 m C + (1 - \beta_1) c, \quad
      p_i \leftarrow \beta_2 C^T p_i C + (1 - \beta_2) c_i c_i^T

    so that `m Qᵀ` is Adam's first moment with every earlier gradient projected on today's
    subspace, and `Q_jᵀ p_i Q_j` the second moment of element (i, j) of the same. C is a product of
    orthonormal matrices: a contraction, whatever the condition of the factors. The matrices p_i
    are kept as packed halves; other second moments keep less of them (see `full_moment`,
    `factored_moment` and `diagonal_moment` in `loft_jax.optim`).

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      second_moment: "factored": a weight a row and one (r, r) matrix. "full": exact, one symmetric
        (r, r) matrix a row. "diagonal": a number for each of the factor's, which is not invariant.
      state_dtype: Dtype of the second moments; by default that of the computation, float32 at
        least. In bfloat16 they are rounded stochastically.
      mu_dtype: Dtype of the first moments, as in `optax.adamw`.
      scaling: The s of `W = s A B`, or a function of the pair's path.
      factors: Names of the factors; see `find_pairs`.

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
    check_scaling(scaling)
    for name, beta in (("b1", b1), ("b2", b2)):
        check(beta, name, lambda x: 0 <= x < 1, "a number in [0, 1)")
    if second_moment not in get_args(SecondMoment):
        raise ValueError(
            f"second_moment is {second_moment!r}, expected one of {get_args(SecondMoment)}"
        )
    for name, dtype in (("state_dtype", state_dtype), ("mu_dtype", mu_dtype)):
        if dtype is not None and str(jnp.dtype(dtype)) not in _STORABLE:
            raise ValueError(f"{name} is {jnp.dtype(dtype)}, expected one of {_STORABLE}")
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
        for pair in find_pairs(params, factors):
            for factor in (pair.a, pair.b):
                i, r = factor.index, pair.rank
                nu[i] = jnp.zeros_like(nu[i], shape=factor.shape(rule.width(r)))
                basis[i] = jnp.zeros_like(leaves[i], dtypes[i])
                if rule.has_gram:
                    gram[i] = jnp.zeros((*factor.stack, r, r), dtypes[i])
        return CalibratedMomentsState(
            jnp.zeros([], jnp.int32),
            *(jax.tree.unflatten(treedef, x) for x in (mu, nu, gram, basis)),
        )

    def update(
        updates: optax.Updates,
        state: CalibratedMomentsState,
        params: optax.Params | None = None,
        *,
        bases: Bases | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, CalibratedMomentsState]:
        tree = FactorTree(updates, params, factors, bases)
        mu, nu = jax.tree.leaves(state.mu), jax.tree.leaves(state.nu)
        # By position, and not by the MaskedNodes: with `optax.masked` the parameters have some too.
        basis = dict(zip(tree.paired, jax.tree.leaves(state.basis), strict=True))
        gram = dict(zip(tree.paired, jax.tree.leaves(state.gram), strict=rule.has_gram))
        count = optax.safe_increment(state.count)
        key = jax.random.fold_in(jax.random.key(0), count)
        finish = functools.partial(
            Moments,
            correction1=1 - b1**count,
            correction2=1 - b2**count,
            limit=_adam_limit(b1, b2, count),
            second_moment=second_moment,
        )

        for batch in tree.batches:
            new_basis: dict[int, jax.Array] = {}
            for own, partners in batch.both():
                now = tree.basis(batch, partners, scaling)
                old = partners.fold([basis[i] for i in partners.indices])
                change = old.inner(now.q)  # (batch, stack, r, r)
                x = tree.folded(own)
                c = now.coordinates(x)  # (batch, stack, m, r)
                dtype = c.array.dtype
                m = own.fold([mu[i].astype(dtype) for i in own.indices]).times(change)
                m = m.like((b1 * m.array + (1 - b1) * c.array).astype(dtype))
                second = rule.update(
                    own,
                    SecondMomentState(
                        [nu[i] for i in own.indices], [gram[i] for i in own.indices if i in gram]
                    ),
                    ProjectedGradient(x, c, change),
                    b2,
                    jax.random.fold_in(key, own.indices[0]),
                )
                grams = second.gram or [optax.MaskedNode()] * len(own.indices)
                for i, m_, p, s in zip(own.indices, own.unfold(m), second.rows, grams, strict=True):
                    tree.leaves[i] = finish(m_, p, s)
                    mu[i], nu[i] = m_.astype(mu[i].dtype), p
                    if rule.has_gram:
                        gram[i] = s
                new_basis |= dict(zip(partners.indices, partners.unfold(now.q), strict=True))
            basis |= new_basis
        for i in tree.plain:
            dtype = compute_dtype(tree.leaves[i])
            g = tree.leaves[i].astype(dtype)
            m = (b1 * mu[i] + (1 - b1) * g).astype(dtype)
            squares = absolute_square(g)
            p = (b2 * nu[i].astype(squares.dtype) + (1 - b2) * squares).astype(squares.dtype)
            p = stochastic_round(p, nu[i].dtype, jax.random.fold_in(key, i))
            tree.leaves[i] = finish(m, p, optax.MaskedNode())
            mu[i], nu[i] = m.astype(mu[i].dtype), p

        def like(old: Any, leaves: list[jax.Array]) -> Any:
            return jax.tree.unflatten(jax.tree.structure(old), leaves)

        new_state = CalibratedMomentsState(
            count,
            like(state.mu, mu),
            like(state.nu, nu),
            like(state.gram, list(gram.values())),
            like(state.basis, list(basis.values())),
        )
        return tree.rebuilt(), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def project_updates(
    eps: Number = 1e-8,
    *,
    scaling: Scaling = 1.0,
    move: Move = "tangent",
    first: Role = "b",
    factors: FactorNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rebuilds Adam's direction of the full weight and projects it on what each partner spans.

    .. math::
      D = \frac{m Q^T}{\sqrt{v} + \epsilon}, \quad v_{ij} = Q_j^T p_i Q_j, \quad
      \Delta A = D P (P^T P)^+

    so that W moves by `ΔA Pᵀ = D proj(P)`, whatever s is. D is made and projected back in tiles,
    and never stands whole in memory. No element of it exceeds Adam's own bound. (The formulas are
    those of the full second moment; for the others see their modules.)

    Args:
      eps: Adam's epsilon, beside the root of the second moment of the full gradient.
      scaling: The s of `W = s A B`, or a function of the pair's path.
      move: "tangent" makes the updates of both factors, for `assign_overlap`; with "alternate" the
        direction of the one whose turn it is not is not computed, and its update is zero.
      first: The factor that moves first, with "alternate".
      factors: Names of the factors; see `find_pairs`.

    Returns:
      A transformation from the `Moments` of `calibrate_moments` to updates that point uphill, as
      Optax's `scale_by_*` do, in the dtypes of the parameters; its state is a step counter, and it
      needs the parameters.

    Raises:
      ValueError: As `project_gradients`; for a negative eps; or, at update, for leaves that are not
        `Moments`.

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
    check_scaling(scaling)
    check_move(move)
    check_role(first)
    check(eps, "eps", lambda x: x >= 0, "a number >= 0")

    def init(params: optax.Params) -> StepState:
        find_pairs(params, factors)
        return StepState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates,
        state: StepState,
        params: optax.Params | None = None,
        *,
        bases: Bases | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, StepState]:
        tree = FactorTree(updates, params, factors, bases, is_leaf=_is_moments)
        for leaf in tree.leaves:
            if not _is_moments(leaf):
                raise ValueError(
                    f"project_updates found a leaf of type {type(leaf).__name__}, expected the "
                    "Moments that calibrate_moments makes: put that link right before this one"
                )
        for batch in tree.batches:
            for own, partners in batch.both():
                moments = [tree.leaves[i] for i in own.indices]
                basis = tree.basis(batch, partners, scaling)
                mu = own.fold([x.mu for x in moments])
                dtype = mu.array.dtype
                direction = functools.partial(
                    _RULES[moments[0].second_moment].direction,
                    own,
                    SecondMomentState(
                        [x.nu for x in moments],
                        [x.gram for x in moments if not isinstance(x.gram, optax.MaskedNode)],
                    ),
                    AdamStep(
                        mu.like(mu.array / moments[0].correction1.astype(dtype)),
                        basis,
                        moments[0].correction2.astype(dtype),
                        jnp.asarray(eps, dtype),
                        moments[0].limit.astype(dtype),
                    ),
                )
                if move == "alternate":
                    rest = functools.partial(jax.tree.map, jnp.zeros_like, mu)
                    x = jax.lax.cond(has_turn(own, state.count, first), direction, rest)
                else:
                    x = direction()
                for i, leaf in zip(own.indices, own.unfold(x), strict=True):
                    tree.finish(i, leaf)
        for i in tree.plain:
            x = tree.leaves[i]
            real = jnp.finfo(x.mu.dtype).dtype
            root = jnp.sqrt(x.nu.astype(real) / x.correction2.astype(real))
            tree.finish(i, x.mu / x.correction1.astype(real) / (root + eps))
        return tree.rebuilt(), StepState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _adam_limit(b1: Number, b2: Number, count: jax.Array) -> jax.Array:
    """The largest |m| / sqrt(v), bias-corrected, that Adam can reach after `count` steps.

    By Cauchy-Schwarz over the weights of the two averages: with ρ = b1² / b2,
    `|m̂| / sqrt(v̂) <= (1 - b1) sqrt(1 + ρ + ... + ρ^(count - 1)) / sqrt(1 - b2)`
    times `sqrt(1 - b2^count) / (1 - b1^count)`. Each gradient of the sum may be projected, since m
    and v are built from the same projected ones.
    """
    rho = b1**2 / jnp.maximum(b2, float(jnp.finfo(jnp.float32).tiny))
    one = jnp.abs(1 - rho) < 1e-6
    geometric = jnp.where(one, count, (1 - rho**count) / jnp.where(one, 1.0, 1 - rho))
    corrections = jnp.sqrt(1 - b2**count) / (1 - b1**count)
    return corrections * (1 - b1) * jnp.sqrt(geometric / (1 - b2))


def _is_moments(x: Any) -> bool:
    return isinstance(x, Moments)
