"""Other optimizers of low-rank factors, to compare with: LoRA+, LoRA-FA, Riemannian LoRA, AltLoRA+.

Each is a chain with AdamW's arguments, and is AdamW for the leaves that belong to no pair.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from loft_jax.optim.arguments import (
    Number,
    check_adam,
    check_positive,
    check_positive_finite,
)
from loft_jax.optim.linear_algebra import batched, matmul, transpose
from loft_jax.optim.links import Role, project_gradients
from loft_jax.optim.loft_optimizers import loft
from loft_jax.optim.meshes import on_explicit_axes
from loft_jax.optim.optax_types import transformation
from loft_jax.optim.paired_updates import PairedUpdates
from loft_jax.optim.pairs import (
    DEFAULT_SPEC,
    FactorNames,
    FactorSpec,
    Scaling,
    StackAxis,
    find_pairs,
)


def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    ratio: Number = 16.0,
    factors: FactorNames | None = None,
    stack_axis: StackAxis = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA+: AdamW with a larger learning rate for B than for A.

    .. math::
      \eta_A = \eta, \qquad \eta_B = \mathrm{ratio} \cdot \eta

    Args:
      learning_rate: A number or a schedule, of A and of leaves that belong to no pair.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled, multiplied by the learning rate of the leaf.
      ratio: B's learning rate over A's.
      factors: Endings of the paths of the factors. See `FactorSpec` for this and the next one.
      stack_axis: The axis that stacks layers, or several; by default leading ones.

    Returns:
      `optax.adamw`, with the updates of factors B multiplied by the ratio.

    Raises:
      ValueError: For a ratio that is not positive and finite, or an argument of AdamW out of its
        range; at init, for parameters without proper pairs (see `find_pairs`).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from loft_jax import lora_plus
      >>> params = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2))}
      >>> tx = lora_plus(1e-3, ratio=4.0)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(lambda u: round(u.max().item(), 5), updates)
      {'lora_a': -0.001, 'lora_b': -0.004}

    References:
      Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, ICML 2024
      (arXiv 2402.12354).
    """
    check_adam(b1, b2, eps, weight_decay)
    check_positive_finite(ratio, "ratio")
    spec = FactorSpec(factors, stack_axis=stack_axis)
    return optax.chain(
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay),
        optax.masked(optax.scale(ratio), lambda params: _has_role(params, spec, "b")),
    )


def lora_fa(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    max_grad_norm: Number | None = None,
    factors: FactorNames | None = None,
    scaling: Scaling = 1.0,
    stack_axis: StackAxis = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA-FA: A is frozen, and B follows AdamW on the projected full gradient.

    .. math::
      g_B \leftarrow \frac{1}{s^2} (A^T A)^{-1} g_B

    A has no state: moments are kept of B alone. A has to start away from zero, as adapters of
    embeddings do not.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment. (PEFT's LoRA-FA adds it before the correction of
        the bias.)
      weight_decay: As in `optax.adamw`: decoupled, multiplied by the learning rate.
      max_grad_norm: Clips the gradients to this global norm, A's not counted; None for no clipping.
        A clip before this transformation would count them.
      factors: Endings of the paths of the factors. See `FactorSpec` for this and the next two.
      scaling: The s of `W = s A B`, or a function of the pair's path.
      stack_axis: The axis that stacks layers, or several; by default leading ones.

    Returns:
      A chain of `project_gradients` and `optax.adamw` on all leaves but the factors A, whose
      updates are zero. It needs the parameters.

    Raises:
      ValueError: As `project_gradients`; or for a max_grad_norm that is not positive, or an
        argument of AdamW out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from loft_jax import lora_fa
      >>> params = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2))}
      >>> tx = lora_fa(1e-3)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(lambda u: round(u.max().item(), 5), updates)
      {'lora_a': 0.0, 'lora_b': -0.001}

    References:
      Zhang et al., LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
      Fine-tuning (arXiv 2308.03303), with the corrected gradient of PEFT's optimizer.
    """
    check_adam(b1, b2, eps, weight_decay)
    check_positive(max_grad_norm, "max_grad_norm")
    spec = FactorSpec(factors, scaling, stack_axis)

    def labels(params: optax.Params) -> Any:
        frozen = _has_role(params, spec, "a")
        return jax.tree.map(lambda x: "frozen" if x else "trained", frozen)

    clip = []
    if max_grad_norm is not None:
        clip.append(optax.clip_by_global_norm(max_grad_norm))
    adamw = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)
    return optax.chain(
        optax.masked(optax.set_to_zero(), lambda params: _has_role(params, spec, "a")),
        *clip,
        project_gradients(spec=spec),
        # AdamW's state takes the dtype of its gradients.
        optax.stateless(optax.tree.cast_like),  # type: ignore[arg-type]  # None never gets here
        optax.partition({"trained": adamw, "frozen": optax.set_to_zero()}, labels),
    )


@on_explicit_axes
def precondition_by_gram(
    damping: Number = 1e-6, *, spec: FactorSpec = DEFAULT_SPEC
) -> optax.GradientTransformation:
    r"""Divides the gradient of each factor by the damped Gram matrix of the other.

    .. math::
      g_A \leftarrow g_A (B B^T + \delta I)^{-1}, \qquad g_B \leftarrow (A^T A + \delta I)^{-1} g_B

    Without damping it would be what `project_gradients` does, which takes none. The damped form
    depends on how W is factorized.

    Args:
      damping: The δ, not relative to the factors.
      spec: The pairs.

    Returns:
      A stateless transformation of raw gradients; it needs the parameters. Leaves that belong to no
      pair pass.

    Raises:
      ValueError: As `project_gradients`; or for a damping that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from loft_jax import precondition_by_gram
      >>> params = {"lora_a": jnp.full((1, 1), 1.0), "lora_b": jnp.full((1, 1), 3.0)}
      >>> tx = precondition_by_gram(damping=1.0)
      >>> grads, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> jax.tree.map(lambda g: round(g.item(), 4), grads)
      {'lora_a': 0.1, 'lora_b': 0.5}

    References:
      Zhang and Pilanci, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, ICML 2024
      (arXiv 2402.02347).
    """
    check_positive_finite(damping, "damping")

    def inverse(gram: jax.Array) -> tuple[jax.Array]:
        # A NaN shows in the gradients anyway, and must not spoil the others.
        usable = jnp.all(jnp.isfinite(gram), axis=(1, 2), keepdims=True)
        eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
        # Beside a large matrix a small damping is rounded away: a Cholesky factorization may fail.
        values, u = jnp.linalg.eigh(jnp.where(usable, gram, eye))
        found = matmul(u / (jnp.maximum(values, 0) + damping)[:, None], transpose(u))
        return (jnp.where(usable, found, eye).astype(gram.dtype),)

    def init(params: optax.Params) -> optax.EmptyState:
        find_pairs(params, spec)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        tree = PairedUpdates(updates, params, spec)
        sides = [side for group in tree.groups for side in group.sides()]
        partners = [tree.param(partner) for _, partner in sides]
        grams = [(x.inner(x),) for x in partners]  # (group, stack, r, r)
        for (factor, _), (metric,) in zip(sides, batched(inverse, grams), strict=True):
            tree.put_gradients(factor, tree.folded(factor).times(metric))
        return tree.rebuilt(), state

    return transformation(init, update)


def riemannian_lora(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    damping: Number = 1e-6,
    factors: FactorNames | None = None,
    stack_axis: StackAxis = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Riemannian preconditioned LoRA, also called scaled AdamW.

    .. math::
      g_A \leftarrow g_A (B B^T + \delta I)^{-1}, \qquad g_B \leftarrow (A^T A + \delta I)^{-1} g_B

    Args:
      learning_rate: A number or a schedule.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: As in `optax.adamw`: decoupled, multiplied by the learning rate.
      damping: The δ; 1e-6 in the authors' code, 1e-2 in PEFT's.
      factors: Endings of the paths of the factors. See `FactorSpec` for this and the next one.
      stack_axis: The axis that stacks layers, or several; by default leading ones.

    Returns:
      A chain of `precondition_by_gram` and `optax.adamw`. It needs the parameters.

    Raises:
      ValueError: As `precondition_by_gram`; or for an argument of AdamW out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from loft_jax import riemannian_lora
      >>> params = {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))}
      >>> tx = riemannian_lora(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> updates["lora_a"].shape
      (6, 2)

    References:
      Zhang and Pilanci, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, ICML 2024
      (arXiv 2402.02347).
    """
    check_adam(b1, b2, eps, weight_decay)
    return optax.chain(
        precondition_by_gram(damping, spec=FactorSpec(factors, stack_axis=stack_axis)),
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay),
    )


def alt_lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    factors: FactorNames | None = None,
    scaling: Scaling = 1.0,
    stack_axis: StackAxis = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AltLoRA+: one factor a step, with aligned momentum and Adam's second moment of the factor.

    .. math::
      \tilde g_A = G P (P^T P)^{-1}, \quad
      m \leftarrow \beta_1 m P_{old}^T P (P^T P)^{-1} + (1 - \beta_1) \tilde g_A, \quad
      v \leftarrow \beta_2 v + (1 - \beta_2) \tilde g_A^2

    This is `loft` with its diagonal second moment, which goes by these equations. It differs from
    the authors' code in this:

    - The moments of both factors follow the gradient at every step; theirs only when the factor
      moves, so that they see every second gradient.
    - The aligned momentum is the one that is kept; theirs serves the step, and the one kept is not
      aligned.
    - The bias of v is corrected as in Adam, and no element of m / √v exceeds Adam's bound.
    - A pseudoinverse through an orthonormal basis takes the place of a damped inverse.
    - s divides the scaled gradients, as it has to.
    - The defaults are AdamW's; theirs are betas of 0.999 and 0.98 and an epsilon of 1e-6.

    (AltLoRA without the plus has no second moment.)

    Args:
      learning_rate: A number or a schedule.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled, multiplied by the learning rate. The factor that moves shrinks.
      factors: Endings of the paths of the factors. See `FactorSpec` for this and the next two.
      scaling: The s of `W = s A B`, or a function of the pair's path.
      stack_axis: The axis that stacks layers, or several; by default leading ones.

    Returns:
      The chain that `loft` is. It needs the parameters.

    Raises:
      ValueError: As `loft`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from loft_jax import alt_lora_plus
      >>> params = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2))}
      >>> tx = alt_lora_plus(1e-3)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(lambda u: round(abs(u).max().item(), 5), updates)  # B moves first
      {'lora_a': 0.0, 'lora_b': 0.001}

    References:
      Yu et al., AltLoRA: Towards Better Gradient Approximation in Low-Rank Adaptation with
      Alternating Projections, NeurIPS 2025 (arXiv 2505.12455).
    """
    return loft(
        learning_rate,
        b1,
        b2,
        eps,
        weight_decay,
        second_moment="diagonal",
        move="alternate",
        factors=factors,
        scaling=scaling,
        stack_axis=stack_axis,
    )


def _has_role(params: Any, spec: FactorSpec, role: Role) -> Any:
    """Marks the leaves that are factors A, or B, of a pair: a tree of booleans."""
    leaves, treedef = jax.tree.flatten(params)
    indices = {getattr(pair, role).index for pair in find_pairs(params, spec)}
    return jax.tree.unflatten(treedef, [i in indices for i in range(len(leaves))])
