"""LoFT: AdamW on the full weight, projected on what rank r can hold."""

import optax
from jax.typing import DTypeLike

from loft_jax.optim.balance import balance_factors
from loft_jax.optim.links import (
    alternate_factors,
    assign_overlap,
    clip_by_projected_norm,
    project_gradients,
)
from loft_jax.optim.moments import SecondMoment, calibrate_moments, project_updates
from loft_jax.optim.pairs import FactorNames, Number, Scaling
from loft_jax.optim.sharing import share_bases
from loft_jax.optim.tree import Move, Role, check, check_move


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
    scaling: Scaling = 1.0,
    first: Role = "b",
    factors: FactorNames | None = None,
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
    the path of W does not depend on how W is split into factors, nor on s: there is no alpha to
    tune. Leaves that belong to no pair take plain AdamW with the same numbers.

    The optimizer is the chain `project_gradients`, `clip_by_projected_norm` (with max_grad_norm),
    `calibrate_moments`, `project_updates`, `optax.add_decayed_weights`,
    `optax.scale_by_learning_rate`, `assign_overlap`, `balance_factors` (with balance), under
    `share_bases`.

    Args:
      learning_rate: Step size, or an Optax schedule of the step. That of full fine-tuning with
        AdamW is the one to start with, at every rank.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Adam's epsilon, beside the root of the second moment of the full gradient.
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
        (see `balance_factors`): W's path is the same in exact arithmetic (but for the diagonal
        second moment), and rounding disturbs it less. What clips or scales updates has to stand
        before it, so inside: `max_grad_norm` and the learning rate do.
      scaling: The s of `W = s A B` that the forward pass uses (alpha / rank in LoRA), or a
        function from a pair's path (`"layers/q_proj"`) to it.
      first: The factor that keeps the overlap at the first step (see `assign_overlap`), or moves at
        it, with "alternate". "b", since adapters start with B = 0 and A has no gradient then.
      factors: Endings of the paths of the factors; by default `lora_a` with `lora_b` and `lora_A`
        with `lora_B`, at the end of a step also after an underscore. See `find_pairs`.

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
    check(weight_decay, "weight_decay", lambda x: x >= 0, "a number >= 0")
    check_move(move)
    clip = []
    if max_grad_norm is not None:
        check(max_grad_norm, "max_grad_norm", lambda x: x > 0, "a positive number")
        clip.append(
            clip_by_projected_norm(
                max_grad_norm, scaling=scaling, move=move, first=first, factors=factors
            )
        )
    if move == "tangent":
        turns = assign_overlap(first, scaling=scaling, factors=factors)
    else:
        turns = alternate_factors(first, factors=factors)
    chain = optax.chain(
        project_gradients(scaling=scaling, factors=factors),
        *clip,
        calibrate_moments(
            b1,
            b2,
            second_moment=second_moment,
            state_dtype=state_dtype,
            mu_dtype=mu_dtype,
            scaling=scaling,
            factors=factors,
        ),
        project_updates(eps, scaling=scaling, move=move, first=first, factors=factors),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
        turns,
        *([balance_factors(factors=factors)] if balance else []),
    )
    return share_bases(chain, scaling=scaling, factors=factors)
