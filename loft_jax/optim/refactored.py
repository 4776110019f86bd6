r"""RefLoRA: the gradients of the balanced factorization, in the factors as they are.

`W = A B` is also `(A T) (T⁻¹ B)`. Zhang et al. ask for the T of the tightest bound on the loss
after a gradient step, and find the balanced factorization, `TᵀAᵀA T = T⁻¹B BᵀT⁻ᵀ`. A gradient
step on the balanced factors is, on the factors as they are, a step along gradients multiplied by
`S = T Tᵀ`:

.. math::
  S G S = H, \quad G = A^T A, \quad H = B B^T, \qquad
  g_A \leftarrow g_A S^{-1}, \quad g_B \leftarrow S\, g_B

With `G = L Lᵀ` and `Lᵀ H L = U Λ Uᵀ`, one Cholesky factorization and one eigendecomposition of
(r, r) matrices:

.. math::
  S = (L^{-T} U)\, \Lambda^{1/2} (L^{-T} U)^T, \qquad S^{-1} = (L U)\, \Lambda^{-1/2} (L U)^T

By a gradient step on such gradients W moves the same way whatever T the factors have. Λ holds the
squares of the singular values of W.

The scalar form, RefLoRA-S, takes the best T among multiples of the identity, and moves the factors
there, and the moments with them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax.optim.arguments import Number, check_adam, check_steps
from loft_jax.optim.eager import choose
from loft_jax.optim.linear_algebra import batched, matmul, transpose
from loft_jax.optim.meshes import on_explicit_axes, varying_like, whole_on_explicit_axes
from loft_jax.optim.optax_types import next_count, transformation
from loft_jax.optim.paired_updates import PairedUpdates, compute_dtype
from loft_jax.optim.pairs import DEFAULT_SPEC, FactorNames, FactorSpec, StackAxis, find_pairs
from loft_jax.optim.state import unboxed_structure

# An eigenvalue counts as zero below this many rounding units of the largest one.
_ZERO_UNITS = 16


class RefLoRAState(NamedTuple):
    """State of `precondition_by_reflora`: 2 r² numbers a pair.

    Attributes:
      count: (), int32, updates done.
      metrics: For each factor what its gradient is multiplied by, (*stack, r, r): `S⁻¹` for A, `S`
        for B. Nothing for other leaves.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way, as in Optax
    metrics: Any


class BalanceNormsState(NamedTuple):
    """State of `balance_norms`.

    Attributes:
      count: (), int32, updates done.
      inner_state: That of the wrapped optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # as above
    inner_state: Any


@on_explicit_axes
def precondition_by_reflora(
    warmup_steps: Number = 100, *, interval: Number = 1, spec: FactorSpec = DEFAULT_SPEC
) -> optax.GradientTransformation:
    r"""Multiplies the gradients of each pair by the metric of its balanced factorization.

    .. math::
      g_A \leftarrow g_A S^{-1}, \quad g_B \leftarrow S\, g_B, \qquad S A^T A\, S = B B^T

    The link goes before any optimizer, which then sees gradients of one scale for both factors. A
    pair without full rank (in working precision; as with B = 0 at the start) has no such S and
    keeps its gradients as they are.

    Args:
      warmup_steps: Steps before the first one that is changed: until then B gets its rank.
      interval: Steps that an S is used for: it multiplies the gradients of every one of them. With
        each new S, and most of all with the first one after the warmup, gradients have another
        scale than those that the moments after this link remember.
      spec: The pairs.

    Returns:
      A transformation of raw gradients that needs the parameters. Leaves that belong to no pair
      pass.

    Raises:
      ValueError: As `project_gradients`; or for a warmup_steps or an interval that is no whole
        number of steps.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from loft_jax import precondition_by_reflora
      >>> params = {"lora_a": jnp.full((1, 1), 4.0), "lora_b": jnp.full((1, 1), 2.0)}
      >>> tx = precondition_by_reflora(warmup_steps=0)
      >>> grads, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> jax.tree.map(lambda g: g.item(), grads)  # S = 2 / 4
      {'lora_a': 2.0, 'lora_b': 0.5}

    References:
      Zhang et al., RefLoRA, NeurIPS 2025 (arXiv 2505.18877), the optimal refactorization; computed
      by one eigendecomposition instead of two.
    """
    check_steps(warmup_steps, "warmup_steps", 0)
    check_steps(interval, "interval", 1)

    def init(params: optax.Params) -> RefLoRAState:
        leaves = jax.tree.leaves(params)
        metrics: list[Any] = [optax.MaskedNode() for _ in leaves]
        for pair in find_pairs(params, spec):
            for factor in (pair.a, pair.b):
                eye = jnp.eye(pair.rank, dtype=compute_dtype(leaves[factor.index]))
                metrics[factor.index] = jnp.tile(eye, (*factor.stack, 1, 1))
        treedef = unboxed_structure(params)
        return RefLoRAState(jnp.zeros([], jnp.int32), jax.tree.unflatten(treedef, metrics))

    def update(
        updates: optax.Updates, state: RefLoRAState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RefLoRAState]:
        tree = PairedUpdates(updates, params, spec)
        leaves, treedef = jax.tree.flatten(state.metrics)
        # By position, and not by the MaskedNodes: with `optax.masked` the parameters have some too.
        kept = dict(zip(tree.paired, leaves, strict=True))

        def computed() -> dict[int, jax.Array]:
            both = [(tree.param(group.a), tree.param(group.b)) for group in tree.groups]
            found = _metrics_of_all([(a.inner(a), b.inner(b)) for a, b in both])
            return {
                i: metric.reshape(kept[i].shape).astype(kept[i].dtype)
                for group, pair in zip(tree.groups, found, strict=True)
                for factor, metrics in zip((group.a, group.b), pair, strict=True)
                for i, metric in zip(factor.indices, metrics, strict=True)
            }

        since = state.count - warmup_steps
        before = varying_like(kept, [tree.param(f).array for g in tree.groups for f in (g.a, g.b)])
        metrics = choose((since >= 0) & (since % interval == 0), computed, lambda: before)
        for group in tree.groups:
            for factor in (group.a, group.b):
                grads = tree.folded(factor)  # (group, stack, m, r)
                metric = jnp.stack([metrics[i] for i in factor.indices])
                metric = metric.reshape(*grads.array.shape[:2], *metric.shape[-2:])
                tree.put_gradients(factor, grads.times(metric))
        return tree.rebuilt(), RefLoRAState(
            next_count(state.count),
            jax.tree.unflatten(treedef, [metrics[i] for i in tree.paired]),
        )

    return transformation(init, update)


def reflora(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    warmup_steps: Number = 100,
    interval: Number = 1,
    factors: FactorNames | None = None,
    stack_axis: StackAxis = None,
) -> optax.GradientTransformationExtraArgs:
    r"""RefLoRA: AdamW on the gradients of the balanced factorization.

    .. math::
      g_A \leftarrow g_A S^{-1}, \quad g_B \leftarrow S\, g_B, \qquad S A^T A\, S = B B^T

    It is the chain `precondition_by_reflora`, `optax.adamw`. A clip of gradients goes before it.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: As in `optax.adamw`: decoupled, multiplied by the learning rate.
      warmup_steps: Steps of plain LoRA before the first change.
      interval: Steps that an S is used for.
      factors: Endings of the paths of the factors. See `FactorSpec` for this and the next one.
      stack_axis: The axis that stacks layers, or several; by default leading ones.

    Returns:
      An Optax transformation; its update needs the parameters. Leaves that belong to no pair take
      AdamW.

    Raises:
      ValueError: As `precondition_by_reflora`; or for an argument of AdamW out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from loft_jax import reflora
      >>> params = {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))}
      >>> tx = reflora(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> round(float(updates["lora_a"][0, 0]), 5)
      -0.001

    References:
      Zhang et al., RefLoRA, NeurIPS 2025 (arXiv 2505.18877).
    """
    check_adam(b1, b2, eps, weight_decay)
    return optax.chain(
        precondition_by_reflora(
            warmup_steps, interval=interval, spec=FactorSpec(factors, stack_axis=stack_axis)
        ),
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay),
    )


def balance_norms(
    inner: optax.GradientTransformation,
    warmup_steps: Number = 0,
    *,
    spec: FactorSpec = DEFAULT_SPEC,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs an optimizer on factors of equal norms, and moves the factors there.

    .. math::
      c = \sqrt{\|B\|_F / \|A\|_F}, \qquad A \leftarrow c A, \quad B \leftarrow B / c

    for each pair, and for each layer of a stack, at the beginning of every step. The product is the
    same, but for rounding, as in `balance_factors`. Gradients, and Adam's moments of earlier ones,
    follow by the chain rule: those of A are divided by c and those of B multiplied by it, second
    moments by its square. Then the inner optimizer takes its step from there. A pair with a factor
    that is zero or not finite stays.

    Args:
      inner: A whole optimizer, with its learning rate and its weight decay: updates of this
        transformation hold the change of factors, so what scales or clips them after it changes W.
        Of its state, moments of `optax.scale_by_adam` follow; others, as a trace, or gradients that
        are accumulated over steps, would not. Factors that it freezes are rescaled too.
      warmup_steps: Steps of the inner optimizer alone, before the first change.
      spec: The pairs.

    Returns:
      A transformation that needs the parameters. Leaves that belong to no pair take the inner
      optimizer's updates.

    Raises:
      ValueError: As `project_gradients`; for a warmup_steps that is no whole number of steps; at
        init, for an inner optimizer that keeps no `optax.ScaleByAdamState`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from loft_jax import balance_norms
      >>> params = {"lora_a": jnp.full((1, 1), 8.0), "lora_b": jnp.full((1, 1), 2.0)}
      >>> tx = balance_norms(optax.adam(1.0))
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> moved = optax.apply_updates(params, updates)
      >>> jax.tree.map(lambda x: round(x.item(), 4), moved)  # 8 times 2 is 4 times 4; a step of 1
      {'lora_a': 3.0, 'lora_b': 3.0}

    References:
      Zhang et al., RefLoRA, NeurIPS 2025 (arXiv 2505.18877), RefLoRA-S.
    """
    check_steps(warmup_steps, "warmup_steps", 0)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> BalanceNormsState:
        find_pairs(params, spec)
        inner_state = inner.init(params)
        if not any(map(_is_adam, jax.tree.leaves(inner_state, is_leaf=_is_adam))):
            raise ValueError(
                "inner keeps no optax.ScaleByAdamState, expected an optimizer of Adam's kind: its "
                "moments have to follow the factors"
            )
        return BalanceNormsState(jnp.zeros([], jnp.int32), inner_state)

    def update(
        updates: optax.Updates,
        state: BalanceNormsState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, BalanceNormsState]:
        PairedUpdates(updates, params, spec)  # refuses what does not fit
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        found = _norm_scales(params, spec, state.count >= warmup_steps)
        scales = {paths[i]: scale for i, scale in found.items()}

        def follow(x: Any) -> Any:
            if not _is_adam(x):
                return x
            return x._replace(mu=_times(x.mu, scales, -1), nu=_times(x.nu, scales, -2))

        updates, inner_state = inner.update(
            _times(updates, scales, -1),
            jax.tree.map(follow, state.inner_state, is_leaf=_is_adam),
            _times(params, scales, 1),
            **extra,
        )

        def whole(path: tuple[Any, ...], update: jax.Array, param: jax.Array) -> jax.Array:
            if path not in scales:
                return update
            scale = scales[path]
            return ((scale - 1) * param + update.astype(scale.dtype)).astype(param.dtype)

        updates = jax.tree_util.tree_map_with_path(whole, updates, params)
        return updates, BalanceNormsState(next_count(state.count), inner_state)

    return optax.GradientTransformationExtraArgs(*transformation(init, update))


def reflora_s(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    warmup_steps: Number = 100,
    factors: FactorNames | None = None,
    stack_axis: StackAxis = None,
) -> optax.GradientTransformationExtraArgs:
    r"""RefLoRA-S: AdamW on factors that are kept at equal norms.

    .. math::
      c = \sqrt{\|B\|_F / \|A\|_F}, \qquad A \leftarrow c A, \quad B \leftarrow B / c

    at the beginning of every step, and the moments with them. It is `balance_norms` around
    `optax.adamw`, and has its state. Nothing may scale or clip its updates.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: As in `optax.adamw`: decoupled, multiplied by the learning rate.
      warmup_steps: Steps of plain LoRA before the first change.
      factors: Endings of the paths of the factors. See `FactorSpec` for this and the next one.
      stack_axis: The axis that stacks layers, or several; by default leading ones.

    Returns:
      An Optax transformation; its update needs the parameters. Leaves that belong to no pair take
      AdamW.

    Raises:
      ValueError: As `balance_norms`; or for an argument of AdamW out of its range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from loft_jax import reflora_s
      >>> params = {"lora_a": jnp.full((6, 2), 9.0), "lora_b": jnp.full((2, 6), 4.0)}
      >>> tx = reflora_s(1e-3, warmup_steps=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> [round(float(params[key][0, 0]), 4) for key in ("lora_a", "lora_b")]  # √36, less 0.001
      [5.999, 5.999]

    References:
      Zhang et al., RefLoRA, NeurIPS 2025 (arXiv 2505.18877), RefLoRA-S.
    """
    check_adam(b1, b2, eps, weight_decay)
    adamw = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)
    return balance_norms(adamw, warmup_steps, spec=FactorSpec(factors, stack_axis=stack_axis))


def _metrics_of_all(
    grams: Sequence[tuple[jax.Array, jax.Array]],
) -> list[tuple[jax.Array, jax.Array]]:
    """`S⁻¹` and `S` of each group of Gram matrices (group, stack, r, r), in one call for all."""
    units, sizes = [], []
    for g, h in grams:
        r = g.shape[-1]
        # Of this size G's diagonal is 1 on average, and so is Λ. What stands beside the matrices of
        # small rank, an identity, then has neither the largest nor the least of them.
        size_g = jnp.trace(g, axis1=-2, axis2=-1)[..., None, None] / r
        g = g / jnp.where(size_g > 0, size_g, 1)
        size_h = jnp.sum(g * h, axis=(-2, -1), keepdims=True) / r
        h = h / jnp.where(size_h > 0, size_h, 1)
        # A NaN shows in the gradients anyway, and must not spoil the others.
        usable = (size_g > 0) & (size_h > 0) & jnp.isfinite(size_g) & jnp.isfinite(size_h)
        units.append(tuple(jnp.where(usable, x, jnp.eye(r, dtype=x.dtype)) for x in (g, h)))
        sizes.append((usable, jnp.sqrt(size_h) / jnp.sqrt(size_g)))
    metrics = []
    for (inverse, s), (usable, size) in zip(
        batched(_metrics, units, diagonal=1.0), sizes, strict=True
    ):
        usable &= jnp.trace(s, axis1=-2, axis2=-1)[..., None, None] > 0
        size = jnp.where(usable, size, 1)
        eye = jnp.eye(s.shape[-1], dtype=s.dtype)
        metrics.append((jnp.where(usable, inverse / size, eye), jnp.where(usable, s * size, eye)))
    return metrics


def _metrics(g: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`S⁻¹` and `S` of Gram matrices (count, r, r); zeros where one has less than full rank."""
    nothing = _ZERO_UNITS * float(jnp.finfo(g.dtype).eps)
    lower = jnp.linalg.cholesky(g)  # NaN where g is not definite
    # What is left of each column after projecting out the ones before it, as a share of the column.
    left = jnp.square(_diagonal(lower)) / _diagonal(g)
    usable = jnp.all(left > nothing, axis=-1)[:, None, None]  # no NaN is
    lower = jnp.where(usable, lower, jnp.eye(g.shape[-1], dtype=g.dtype))
    values, u = jnp.linalg.eigh(matmul(matmul(transpose(lower), h), lower))
    values = values[:, None, :]  # ascending
    usable &= values[..., :1] > nothing * values[..., -1:]
    roots = jnp.sqrt(jnp.where(usable, values, 1))
    with jax.default_matmul_precision("highest"):
        x = jax.scipy.linalg.solve_triangular(lower, u, lower=True, trans="T")
    y = matmul(lower, u)
    s, inverse = matmul(x * roots, transpose(x)), matmul(y / roots, transpose(y))
    return jnp.where(usable, inverse, 0), jnp.where(usable, s, 0)


def _diagonal(x: jax.Array) -> jax.Array:
    diagonal: jax.Array = jnp.diagonal(x, axis1=-2, axis2=-1)
    return diagonal


@whole_on_explicit_axes
def _norm_scales(params: Any, spec: FactorSpec, begun: jax.Array) -> dict[int, jax.Array]:
    """What each factor is multiplied by, (*stack, 1, ...), by the position of its leaf."""
    leaves = jax.tree.leaves(params)
    scales = {}
    for pair in find_pairs(params, spec):
        a, b = leaves[pair.a.index], leaves[pair.b.index]
        axes_a, axes_b = (
            tuple(axis for axis in range(x.ndim) if axis not in pair.a.stack_axes) for x in (a, b)
        )
        norm_a, norm_b = (
            jnp.sqrt(jnp.sum(jnp.square(x.astype(compute_dtype(x))), axis=axes))
            for x, axes in ((a, axes_a), (b, axes_b))
        )
        usable = begun & (norm_a > 0) & (norm_b > 0) & jnp.isfinite(norm_a) & jnp.isfinite(norm_b)
        c = jnp.sqrt(jnp.where(usable, norm_b, 1)) / jnp.sqrt(jnp.where(usable, norm_a, 1))
        scales[pair.a.index] = jnp.expand_dims(c, axes_a)
        scales[pair.b.index] = jnp.expand_dims(1 / c, axes_b)
    return scales


def _times(tree: Any, scales: Mapping[tuple[Any, ...], jax.Array], power: int) -> Any:
    """Multiplies leaves by a power of their scales, in the dtype of the scales."""

    def scaled(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return (x * scales[path] ** power).astype(x.dtype) if path in scales else x

    return jax.tree_util.tree_map_with_path(scaled, tree)


def _is_adam(x: Any) -> bool:
    return isinstance(x, optax.ScaleByAdamState)
