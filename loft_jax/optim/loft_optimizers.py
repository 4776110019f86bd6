r"""LoFT, whole: full fine-tuning projected on what rank r can hold, with AdamW and with Muon.

`loft` is a chain of the links of `loft_jax.optim.links` and `loft_jax.optim.moments`. `loft_muon`
has another direction in the place of Adam's, `orthogonalize_momentum`:

Muon moves W by its momentum with all singular values brought near one. LoFT's momentum is of rank
r: `m Qᵀ`, with coordinates m (rows, r) in an orthonormal basis Q of what the partner spans. The
Newton-Schulz iteration f is odd in its argument, `X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X`, so that
`f(m Qᵀ) = f(m) Qᵀ`: to orthogonalize the coordinates is to orthogonalize the full momentum,
exactly. And each `f(m)` is m times a polynomial of `mᵀm`: the iteration runs on (r, r) matrices.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    check_positive,
    check_weight_decay,
)
from loft_jax.optim.balance import balance_factors
from loft_jax.optim.eager import power
from loft_jax.optim.linear_algebra import FactorMatrix, matmul
from loft_jax.optim.links import (
    Move,
    Role,
    alternate_factors,
    assign_overlap,
    clip_by_projected_norm,
    project_gradients,
)
from loft_jax.optim.meshes import on_explicit_axes, varying_like
from loft_jax.optim.moments import (
    SecondMoment,
    calibrate_first_moment,
    calibrate_moments,
    project_updates,
)
from loft_jax.optim.optax_types import next_count, transformation
from loft_jax.optim.paired_updates import PairedUpdates, compute_dtype, share_bases
from loft_jax.optim.pairs import (
    DEFAULT_SPEC,
    FactorNames,
    FactorSpec,
    Scaling,
    StackAxis,
    find_pairs,
    paired_leaves,
)

_NS_COEFFS = (3.4445, -4.7750, 2.0315)  # of Jordan's Muon, and of Optax's


@on_explicit_axes
def loft(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    max_grad_norm: Number | None = None,
    second_moment: SecondMoment = "factored",
    move: Move = "tangent",
    state_dtype: DTypeLike | None = None,
    mu_dtype: DTypeLike | None = None,
    balance: bool = False,
    first: Role = "b",
    fused: bool = False,
    factors: FactorNames | None = None,
    scaling: Scaling = 1.0,
    stack_axis: StackAxis = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoFT: low-rank adaptation that behaves like full fine-tuning with AdamW.

    For every factor pair of the parameters, `W = s A B`, the factors move so that W moves as AdamW
    on W would, with gradient, moments and update projected on what the factors can hold. Of each
    factor, Q being an orthonormal basis of what the other one spans and C the change from the last:

    .. math::
      c = G Q, \quad
      m \leftarrow \beta_1 m C + (1 - \beta_1) c, \quad
      p_i \leftarrow \beta_2 C^T p_i C + (1 - \beta_2) c_i c_i^T, \quad
      D_{ij} = \frac{\hat m_i^T Q_j}{\sqrt{Q_j^T \hat p_i Q_j} + \epsilon}

    Both factors move at every step, W along the tangent space of the matrices of rank r. With Π_P
    and Π_R the projectors on what the rows of B and the columns of A span,

    .. math::
      \Delta W = -\eta \, (D_A \Pi_P + \Pi_R D_B (1 - \Pi_P)) \quad\mathrm{or}\quad
      -\eta \, (\Pi_R D_B + (1 - \Pi_R) D_A \Pi_P)

    by turns (see `assign_overlap`): what both factors can do to W counts once. With
    `second_moment="full"` and factors that span the smaller side of W (r = min(in, out)), W follows
    `optax.adamw` step for step; for r = in from B = 0 too. At every rank, and with the default too,
    the path of W does not depend on how W is split into factors of independent columns, nor on s:
    there is no alpha to tune. Leaves that belong to no pair take plain AdamW with the same numbers.

    The optimizer is the chain `project_gradients`, `clip_by_projected_norm` (with max_grad_norm),
    `calibrate_moments`, `project_updates`, `optax.add_decayed_weights`,
    `optax.scale_by_learning_rate`, `assign_overlap`, `balance_factors` (with balance), under
    `share_bases`.

    Args:
      learning_rate: Step size, or an Optax schedule of the step. That of full fine-tuning with
        AdamW is the one to start with, at every rank.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Adam's epsilon, added to the root of the second moment of the full gradient.
      weight_decay: Decoupled weight decay of `s A B` (not of the base weight) and of other leaves,
        multiplied by the learning rate: W shrinks by it once a step.
      max_grad_norm: Clips the gradients to this global norm of the projected full gradients; None
        for no clipping.
      second_moment: "factored": Adafactor's in the projected space, one number a row of each
        factor and no work on full matrices. "full": Adam's own, the exact method, with
        r (r + 1) / 2 numbers a row. "diagonal": Adam's of the factor's own gradient, which depends
        on the factorization and on s.
      move: "tangent": both factors at every step. "alternate": one factor a step, as LoFT's authors
        have it: W moves in half of the tangent space at a time.
      state_dtype: Dtype of the second moments, float32 at least by default. In bfloat16 they are
        rounded stochastically.
      mu_dtype: Dtype of the first moments, as in `optax.adamw`.
      balance: Moves the factors to the balanced factorization of the same product at every step
        (see `balance_factors`): from factors of independent columns W's path is the same in
        exact arithmetic (but for the diagonal second moment), and rounding disturbs it less. What
        clips or scales updates has to stand before it, so inside: `max_grad_norm` and the learning
        rate do.
      first: The factor that keeps the overlap at the first step (see `assign_overlap`), or moves at
        it, with "alternate". "b", since adapters start with B = 0 and A has no gradient then.
      fused: Makes the direction of the full second moment by a Pallas kernel where there is one
        (see `project_updates`).
      factors: Endings of the paths of the factors; by default `lora_a` with `lora_b` and `lora_A`
        with `lora_B`, also after an underscore. See `FactorSpec` for this and the next two.
      scaling: The s of `W = s A B` that the forward pass uses (alpha / rank in LoRA), or a
        function from a pair's path (`"layers/q_proj"`) to it.
      stack_axis: The axis that stacks layers, or several; by default leading ones.

    Returns:
      An `optax.GradientTransformation`. Its `update` needs the parameters.

    Raises:
      ValueError: For an argument out of its range, named; at init or update, for parameters
        without proper pairs (see `find_pairs`), or when the parameters are missing.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from loft_jax import loft
      >>> target = jnp.outer(jnp.arange(8.0), jnp.arange(6.0)) / 10
      >>> params = {"lora_a": jax.random.normal(jax.random.key(0), (8, 2)),
      ...           "lora_b": jnp.zeros((2, 6))}
      >>> def loss(params):
      ...     return jnp.mean((params["lora_a"] @ params["lora_b"] - target) ** 2)
      >>> tx = loft(0.05, max_grad_norm=1.0)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(200):
      ...     params, state = step(params, state)
      >>> bool(loss(params) < 1e-2)
      True

    References:
      Tastan et al., LoFT: Low-Rank Adaptation That Behaves Like Full Fine-Tuning, ICLR 2026,
      arXiv 2505.21289: all but the move along the tangent space. On that space LoRA-Pro (Wang et
      al., ICLR 2025, arXiv 2407.18242) and Riemannion (Bogachev et al., ICLR 2026, arXiv
      2507.12142) project gradients.
    """
    check_weight_decay(weight_decay)
    check_positive(max_grad_norm, "max_grad_norm")
    check_choice(move, "move", Move)
    if fused and second_moment != "full":
        raise ValueError(f"fused=True: second_moment is {second_moment!r}, expected 'full'")
    spec = FactorSpec(factors, scaling, stack_axis)
    chain = optax.chain(
        project_gradients(spec=spec),
        *_clip(max_grad_norm, move, first, spec),
        calibrate_moments(
            b1,
            b2,
            second_moment=second_moment,
            state_dtype=state_dtype,
            mu_dtype=mu_dtype,
            spec=spec,
        ),
        project_updates(eps, move=move, first=first, fused=fused, spec=spec),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
        _turns(move, first, spec),
        *([balance_factors(spec=spec)] if balance else []),
    )
    return share_bases(chain, spec=spec)


class OrthogonalizeState(NamedTuple):
    """State of `orthogonalize_momentum`: 2 (m + n) r numbers a pair.

    Attributes:
      count: (), int32, updates done.
      mu: First moments, shaped like the parameters, in coordinates of the partner's basis.
      basis: Orthonormal bases of the factors' columns at the last update, shaped like them.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way, as in Optax
    mu: Any
    basis: Any


@on_explicit_axes
def orthogonalize_momentum(
    beta: Number = 0.95,
    *,
    ns_coeffs: Sequence[float] = _NS_COEFFS,
    ns_steps: int | jax.Array = 5,
    eps: Number = 1e-8,
    nesterov: bool = True,
    consistent_rms: Number | None = None,
    mu_dtype: DTypeLike | None = None,
    spec: FactorSpec = DEFAULT_SPEC,
) -> optax.GradientTransformation:
    r"""Orthogonalizes the calibrated momentum of the projected full gradient.

    .. math::
      m \leftarrow \beta \, m \, Q_{old}^T Q + (1 - \beta) \, G Q, \qquad
      W \mathrel{+}= k \; \mathrm{NewtonSchulz}(\hat m) \, Q^T

    with bias correction, Nesterov's look-ahead and the factor k of Optax's Muon:
    `√max(1, out / in)`, or `√max(in, out) · consistent_rms`.

    Args:
      beta: Decay of the momentum.
      ns_coeffs: The three coefficients of the iteration.
      ns_steps: Iterations.
      eps: Added to the norm that the momentum is divided by.
      nesterov: Whether the gradient is counted once more.
      consistent_rms: If given, the root mean square that updates of full rank get whatever their
        shape (0.2 matches AdamW's); those of rank r get √(r / min(in, out)) times as much.
      mu_dtype: Dtype of the momentum, float32 at least by default.
      spec: The pairs and their scaling.

    Returns:
      A transformation from projected gradients to updates that point uphill, for trees of pairs
      alone; it needs the parameters.

    Raises:
      ValueError: As `project_gradients`; for an argument out of its range, or ns_coeffs that are
        not three; at init, for leaves that belong to no pair.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from loft_jax import orthogonalize_momentum, project_gradients
      >>> params = {"lora_a": jnp.eye(2), "lora_b": 3 * jnp.eye(2)}
      >>> full = jnp.array([[5.0, 0.0], [0.0, 5.0]])  # gradient of W
      >>> grads = {"lora_a": full @ params["lora_b"].T, "lora_b": params["lora_a"].T @ full}
      >>> tx = optax.chain(project_gradients(), orthogonalize_momentum(ns_steps=30,
      ...                  ns_coeffs=(1.5, -0.5, 0.0)))  # these converge
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> (updates["lora_a"] @ params["lora_b"]).round(3).tolist()
      [[1.0, 0.0], [0.0, 1.0]]

    References:
      Jordan et al., Muon (https://kellerjordan.github.io/posts/muon/); Liu et al., Muon is Scalable
      for LLM Training (arXiv 2502.16982); Tastan et al., LoFT, ICLR 2026 (arXiv 2505.21289), first
      moment calibration.
    """
    check_decay(beta, "beta")
    check_not_negative(eps, "eps")
    check_positive(consistent_rms, "consistent_rms")
    check_dtype(mu_dtype, "mu_dtype")
    if len(ns_coeffs) != 3:
        raise ValueError(f"ns_coeffs is {ns_coeffs!r}, expected three numbers")
    if not isinstance(ns_steps, jax.core.Tracer) and ns_steps < 1:
        raise ValueError(f"ns_steps is {ns_steps}, expected 1 or more")

    def init(params: optax.Params) -> OrthogonalizeState:
        leaves = jax.tree.leaves(params)
        if plain := len(leaves) - 2 * len(find_pairs(params, spec)):
            raise ValueError(
                f"{plain} leaves belong to no factor pair; expected pairs alone: use loft_muon, or "
                "optax.partition with another optimizer for the others"
            )

        def zeros(dtype: DTypeLike | None) -> Any:
            return jax.tree.map(lambda x: jnp.zeros_like(x, dtype or compute_dtype(x)), params)

        return OrthogonalizeState(jnp.zeros([], jnp.int32), zeros(mu_dtype), zeros(None))

    def update(
        updates: optax.Updates,
        state: OrthogonalizeState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, OrthogonalizeState]:
        tree = PairedUpdates(updates, params, spec)
        treedef = jax.tree.structure(state.mu)
        mu, basis = (dict(enumerate(jax.tree.leaves(x))) for x in (state.mu, state.basis))
        count = next_count(state.count)
        for group in tree.groups:
            shape = tree.param(group.a).length, tree.param(group.b).length
            for factor, partner in group.sides():
                m, now, gradient = calibrate_first_moment(
                    tree, group, factor, partner, mu, basis, beta
                )
                if nesterov:
                    ahead = beta * m.array / (1 - power(beta, next_count(count)))
                    corrected = ahead + (1 - beta) * gradient.c.array / (1 - power(beta, count))
                else:
                    corrected = m.array / (1 - power(beta, count))
                corrected = corrected.astype(m.array.dtype)
                x = _newton_schulz(m.like(corrected), ns_coeffs, ns_steps, eps)
                x = now.from_coordinates(x.like(x.array * _scale(shape, consistent_rms)))
                tree.put_updates(factor, x)
        mu_tree, basis_tree = (jax.tree.unflatten(treedef, x.values()) for x in (mu, basis))
        state = OrthogonalizeState(count, mu_tree, basis_tree)
        return tree.rebuilt(), state

    return transformation(init, update)


@on_explicit_axes
def loft_muon(
    learning_rate: optax.ScalarOrSchedule,
    beta: Number = 0.95,
    weight_decay: Number = 0.0,
    *,
    ns_coeffs: Sequence[float] = _NS_COEFFS,
    ns_steps: int | jax.Array = 5,
    eps: Number = 1e-8,
    nesterov: bool = True,
    consistent_rms: Number | None = None,
    adam_b1: Number = 0.9,
    adam_b2: Number = 0.999,
    mu_dtype: DTypeLike | None = None,
    max_grad_norm: Number | None = None,
    move: Move = "tangent",
    first: Role = "b",
    factors: FactorNames | None = None,
    scaling: Scaling = 1.0,
    stack_axis: StackAxis = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoFT with Muon: the factors move so that W moves as Muon on W would, projected.

    The momentum of the projected full gradient is calibrated as in LoFT, and orthogonalized exactly
    through its (m, r) coordinates. Both factors move, and W by what they do together, as in `loft`.
    Where the factors span the smaller side of W (r = min(in, out)), W follows `optax.contrib.muon`
    on W; at every rank its path depends neither on how W is factorized, into factors of independent
    columns, nor on s. There is no second moment: the state is 2 (m + n) r numbers a pair. Leaves
    that belong to no pair take Adam, as in Optax's Muon.

    Args:
      learning_rate: Step size, or an Optax schedule of the step: Muon's, far larger than Adam's
        (0.02 is common), unless consistent_rms is given.
      beta: Decay of the momentum.
      weight_decay: Decoupled weight decay of `s A B`, multiplied by the learning rate. Leaves that
        belong to no pair do not decay.
      ns_coeffs: The three coefficients of the Newton-Schulz iteration.
      ns_steps: Its iterations.
      eps: Added to denominators, for pairs and for Adam.
      nesterov: Whether the gradient is counted once more; for Adam too.
      consistent_rms: If given, scales updates by `√max(in, out)` times this.
      adam_b1: Decay of Adam's first moment.
      adam_b2: Decay of Adam's second moment.
      mu_dtype: Dtype of first moments.
      max_grad_norm: Clips to this global norm of the projected full gradients; None for none.
      move: As in `loft`.
      first: As in `loft`.
      factors: Endings of the paths of the factors; see `FactorSpec` for this and the next two.
      scaling: The s of `W = s A B` that the forward pass uses, or a function from a pair's path.
      stack_axis: The axis that stacks layers, or several; by default leading ones.

    Returns:
      An `optax.GradientTransformation`. Its `update` needs the parameters.

    Raises:
      ValueError: For an argument out of its range; at init or update, for parameters without
        proper pairs, or when the parameters are missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from loft_jax import loft_muon
      >>> params = {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.zeros((2, 6)), "bias": jnp.ones(6)}
      >>> tx = loft_muon(0.02, weight_decay=0.1)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(jnp.shape, optax.apply_updates(params, updates))
      {'bias': (6,), 'lora_a': (8, 2), 'lora_b': (2, 6)}

    References:
      As `orthogonalize_momentum`; named as future work by LoFT's authors.
    """
    check_decay(adam_b1, "adam_b1")
    check_decay(adam_b2, "adam_b2")
    check_weight_decay(weight_decay)
    check_positive(max_grad_norm, "max_grad_norm")
    check_choice(move, "move", Move)
    spec = FactorSpec(factors, scaling, stack_axis)

    def labels(params: optax.Params) -> Any:
        return jax.tree.map(
            lambda paired: "muon" if paired else "adam", paired_leaves(params, spec)
        )

    orthogonalize = orthogonalize_momentum(
        beta,
        ns_coeffs=ns_coeffs,
        ns_steps=ns_steps,
        eps=eps,
        nesterov=nesterov,
        consistent_rms=consistent_rms,
        mu_dtype=mu_dtype,
        spec=spec,
    )
    pairs = optax.chain(orthogonalize, optax.add_decayed_weights(weight_decay))
    adam = optax.scale_by_adam(adam_b1, adam_b2, eps, mu_dtype=mu_dtype, nesterov=nesterov)
    chain = optax.chain(
        project_gradients(spec=spec),
        *_clip(max_grad_norm, move, first, spec),
        optax.partition({"muon": pairs, "adam": adam}, labels),
        optax.scale_by_learning_rate(learning_rate),
        _turns(move, first, spec),
    )
    return share_bases(chain, spec=spec)


def _clip(
    max_grad_norm: Number | None, move: Move, first: Role, spec: FactorSpec
) -> list[optax.GradientTransformation]:
    if max_grad_norm is None:
        return []
    return [clip_by_projected_norm(max_grad_norm, move=move, first=first, spec=spec)]


def _turns(move: Move, first: Role, spec: FactorSpec) -> optax.GradientTransformation:
    link = assign_overlap if move == "tangent" else alternate_factors
    return link(first, spec=spec)


def _newton_schulz(
    x: FactorMatrix, coeffs: Sequence[float], steps: int | jax.Array, eps: Number
) -> FactorMatrix:
    """The iteration on x (..., m, r) over its Frobenius norm, as a product with (..., r, r)."""
    a, b, c = coeffs
    gram = x.inner(x)
    norm = jnp.sqrt(jnp.trace(gram, axis1=-2, axis2=-1))[..., None, None] + eps
    norm = jnp.where(norm > 0, norm, 1)
    gram = gram / (norm * norm)
    eye = jnp.broadcast_to(jnp.eye(x.rank, dtype=gram.dtype), gram.shape)

    def iterate(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        product, gram = carry
        step = a * eye + matmul(b * eye + c * gram, gram)
        return matmul(product, step), matmul(matmul(step, gram), step)

    carry = varying_like(eye, gram), gram
    if isinstance(steps, jax.core.Tracer):  # as by `optax.inject_hyperparams`
        carry = jax.lax.fori_loop(0, steps, iterate, carry)
    else:
        for k in range(operator.index(steps)):
            carry = iterate(k, carry)
    product, _ = carry
    return x.times(product / norm)


def _scale(shape: tuple[int, int], consistent_rms: Number | None) -> Number:
    """Optax's factor for a weight of this shape (in, out)."""
    fan_in, fan_out = shape
    if consistent_rms is None:
        return float(max(1.0, fan_out / fan_in) ** 0.5)
    return float(max(fan_in, fan_out) ** 0.5) * consistent_rms
