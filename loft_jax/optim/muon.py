r"""Muon on the full weight, projected on what rank r can hold.

Muon moves W by its momentum with all singular values brought near one. LoFT's momentum is of rank
r: `m Qᵀ`, with coordinates m (rows, r) in an orthonormal basis Q of what the partner spans. The
Newton-Schulz iteration f is odd in its argument, `X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X`, so that
`f(m Qᵀ) = f(m) Qᵀ`: to orthogonalize the coordinates is to orthogonalize the full momentum,
exactly. And each `f(m)` is m times a polynomial of `mᵀm`: the iteration runs on (r, r) matrices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from loft_jax.optim.links import (
    alternate_factors,
    assign_overlap,
    clip_by_projected_norm,
    project_gradients,
)
from loft_jax.optim.pairs import FactorNames, Number, Scaling, find_pairs, paired_leaves
from loft_jax.optim.sharing import share_bases
from loft_jax.optim.tall import Tall, matmul
from loft_jax.optim.tree import (
    Bases,
    FactorTree,
    Move,
    Role,
    check,
    check_move,
    check_scaling,
    compute_dtype,
)

_NS_COEFFS = (3.4445, -4.7750, 2.0315)  # of Jordan's Muon, and of Optax's


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


def orthogonalize_momentum(
    beta: Number = 0.95,
    *,
    ns_coeffs: Sequence[float] = _NS_COEFFS,
    ns_steps: int = 5,
    eps: Number = 1e-8,
    nesterov: bool = True,
    consistent_rms: Number | None = None,
    mu_dtype: DTypeLike | None = None,
    scaling: Scaling = 1.0,
    factors: FactorNames | None = None,
) -> optax.GradientTransformationExtraArgs:
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
      consistent_rms: If given, the root mean square that updates get whatever their shape (0.2
        matches AdamW's).
      mu_dtype: Dtype of the momentum, float32 at least by default.
      scaling: The s of `W = s A B`, or a function of the pair's path.
      factors: Names of the factors; see `find_pairs`.

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
    check_scaling(scaling)
    check(beta, "beta", lambda x: 0 <= x < 1, "a number in [0, 1)")
    check(eps, "eps", lambda x: x >= 0, "a number >= 0")
    if len(ns_coeffs) != 3:
        raise ValueError(f"ns_coeffs is {ns_coeffs!r}, expected three numbers")
    if ns_steps < 1:
        raise ValueError(f"ns_steps is {ns_steps}, expected 1 or more")
    if consistent_rms is not None:
        check(consistent_rms, "consistent_rms", lambda x: x > 0, "a positive number")

    def init(params: optax.Params) -> OrthogonalizeState:
        leaves = jax.tree.leaves(params)
        if plain := len(leaves) - 2 * len(find_pairs(params, factors)):
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
        *,
        bases: Bases | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, OrthogonalizeState]:
        tree = FactorTree(updates, params, factors, bases)
        mu, treedef = jax.tree.flatten(state.mu)
        basis = jax.tree.leaves(state.basis)
        count = optax.safe_increment(state.count)
        for batch in tree.batches:
            shape = tree.param(batch.a).length, tree.param(batch.b).length
            new_basis: dict[int, jax.Array] = {}
            for own, partners in batch.both():
                now = tree.basis(batch, partners, scaling)
                change = partners.fold([basis[i] for i in partners.indices]).inner(now.q)
                c = now.coordinates(tree.folded(own))
                dtype = c.array.dtype
                m = own.fold([mu[i].astype(dtype) for i in own.indices]).times(change).array
                m = beta * m + (1 - beta) * c.array
                if nesterov:
                    ahead = beta * m / (1 - beta ** optax.safe_increment(count))
                    corrected = ahead + (1 - beta) * c.array / (1 - beta**count)
                else:
                    corrected = m / (1 - beta**count)
                x = _newton_schulz(c.like(corrected.astype(dtype)), ns_coeffs, ns_steps, eps)
                x = now.from_coordinates(x.like(x.array * _scale(shape, consistent_rms)))
                for i, leaf, moment in zip(
                    own.indices, own.unfold(x), own.unfold(c.like(m)), strict=True
                ):
                    tree.finish(i, leaf)
                    mu[i] = moment.astype(mu[i].dtype)
                new_basis |= dict(zip(partners.indices, partners.unfold(now.q), strict=True))
            for i, q in new_basis.items():
                basis[i] = q
        state = OrthogonalizeState(
            count, jax.tree.unflatten(treedef, mu), jax.tree.unflatten(treedef, basis)
        )
        return tree.rebuilt(), state

    return optax.GradientTransformationExtraArgs(init, update)


def loft_muon(
    learning_rate: optax.ScalarOrSchedule,
    beta: Number = 0.95,
    weight_decay: Number = 0.0,
    *,
    ns_coeffs: Sequence[float] = _NS_COEFFS,
    ns_steps: int = 5,
    eps: Number = 1e-8,
    nesterov: bool = True,
    consistent_rms: Number | None = None,
    adam_b1: Number = 0.9,
    adam_b2: Number = 0.999,
    mu_dtype: DTypeLike | None = None,
    max_grad_norm: Number | None = None,
    scaling: Scaling = 1.0,
    move: Move = "tangent",
    first: Role = "b",
    factors: FactorNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoFT with Muon: the factors move so that W moves as Muon on W would, projected.

    The momentum of the projected full gradient is calibrated as in LoFT, and orthogonalized exactly
    through its (m, r) coordinates. Both factors move, and W by what they do together, as in `loft`.
    Where the factors span the smaller side of W (r = min(in, out)), W follows `optax.contrib.muon`
    on W; at every rank its path depends neither on how W is factorized nor on s. There is no second
    moment: the state is 2 (m + n) r numbers a pair. Leaves that belong to no pair take Adam, as in
    Optax's Muon.

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
      scaling: The s of `W = s A B`, or a function of the pair's path.
      move: As in `loft`.
      first: As in `loft`.
      factors: Endings of the paths of the factors; see `find_pairs`.

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
    for name, beta_ in (("adam_b1", adam_b1), ("adam_b2", adam_b2)):
        check(beta_, name, lambda x: 0 <= x < 1, "a number in [0, 1)")
    check(weight_decay, "weight_decay", lambda x: x >= 0, "a number >= 0")
    check_move(move)

    def labels(params: optax.Params) -> Any:
        return jax.tree.map(
            lambda paired: "muon" if paired else "adam", paired_leaves(params, factors)
        )

    clip = []
    if max_grad_norm is not None:
        check(max_grad_norm, "max_grad_norm", lambda x: x > 0, "a positive number")
        clip.append(
            clip_by_projected_norm(
                max_grad_norm, scaling=scaling, move=move, first=first, factors=factors
            )
        )
    orthogonalize = orthogonalize_momentum(
        beta,
        ns_coeffs=ns_coeffs,
        ns_steps=ns_steps,
        eps=eps,
        nesterov=nesterov,
        consistent_rms=consistent_rms,
        mu_dtype=mu_dtype,
        scaling=scaling,
        factors=factors,
    )
    if move == "tangent":
        turns = assign_overlap(first, scaling=scaling, factors=factors)
    else:
        turns = alternate_factors(first, factors=factors)
    pairs = optax.chain(orthogonalize, optax.add_decayed_weights(weight_decay))
    adam = optax.scale_by_adam(adam_b1, adam_b2, eps, mu_dtype=mu_dtype, nesterov=nesterov)
    chain = optax.chain(
        project_gradients(scaling=scaling, factors=factors),
        *clip,
        optax.partition({"muon": pairs, "adam": adam}, labels),
        optax.scale_by_learning_rate(learning_rate),
        turns,
    )
    return share_bases(chain, scaling=scaling, factors=factors)


def _newton_schulz(x: Tall, coeffs: Sequence[float], steps: int, eps: Number) -> Tall:
    """The iteration on x (..., m, r) over its Frobenius norm, as a product with (..., r, r)."""
    a, b, c = coeffs
    gram = x.inner(x)
    norm = jnp.sqrt(jnp.trace(gram, axis1=-2, axis2=-1))[..., None, None] + eps
    norm = jnp.where(norm > 0, norm, 1)
    gram = gram / (norm * norm)
    eye = jnp.eye(x.rank, dtype=gram.dtype)
    product = jnp.broadcast_to(eye, gram.shape)
    for _ in range(steps):
        step = a * eye + matmul(b * eye + c * gram, gram)
        product = matmul(product, step)
        gram = matmul(matmul(step, gram), step)
    return x.times(product / norm)


def _scale(shape: tuple[int, int], consistent_rms: Number | None) -> Number:
    """Optax's factor for a weight of this shape (in, out)."""
    fan_in, fan_out = shape
    if consistent_rms is None:
        return max(1.0, fan_out / fan_in) ** 0.5
    return max(fan_in, fan_out) ** 0.5 * consistent_rms
