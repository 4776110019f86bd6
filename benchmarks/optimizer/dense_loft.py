"""LoFT as the paper writes it, in plain JAX: what `optimizer.py` measures `loft` against.

Gram inverses, the projected gradient as a dense matrix for its norm, one whole (r, r) matrix a row
for the second moment, and Adam's direction as a dense matrix that is projected back. Right as long
as the factors are well conditioned and not zero. Do not train with it; see `loft_jax.loft`.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax.optim.optax_types import transformation

Role = Literal["a", "b"]
Side = list[jax.Array]  # one array a pair, for one of its two factors

_RIDGE = 1e-8  # what the authors' code adds to a Gram matrix


class DenseLoFTState(NamedTuple):
    """State of `dense_loft`: (m + n) (r² + 2 r) numbers a pair.

    Attributes:
        steps: (), int32, updates done.
        first: By role, first moments (m, r) or (n, r) of each pair.
        second: By role, second moments (m, r, r) or (n, r, r) of each pair.
        partner: By role, what the factor was multiplied with at the last update: (n, r) or (m, r).
    """

    steps: jax.Array
    first: dict[Role, Side]
    second: dict[Role, Side]
    partner: dict[Role, Side]


def dense_loft(
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    max_grad_norm: float,
    from_the_left: bool = True,
) -> optax.GradientTransformation:
    r"""The paper's equations over pairs `W = A B`, with no other leaves and nothing stacked.

    With the partner `P = Bᵀ` of A, the gradient `g` of A, and the same for Bᵀ with `P = A`:

    .. math::
      \tilde g = g (P^T P)^{-1}, \quad C = P_{old}^T P (P^T P)^{-1}, \quad
      m \leftarrow \beta_1 m C + (1 - \beta_1) \tilde g, \quad
      p_i \leftarrow \beta_2 C^T p_i C + (1 - \beta_2) \tilde g_i \tilde g_i^T

    .. math::
      v_{ij} = P_j^T p_i P_j, \quad
      \Delta A = - \eta \frac{\hat m P^T}{\sqrt{\hat v} + \epsilon} P (P^T P)^{-1}

    Both factors' moments move at every step, and the factors by turns, B first.

    Args:
        learning_rate: Step size.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Adam's epsilon.
        max_grad_norm: Clips the gradients to this norm of the dense projected gradients
            `g̃ Pᵀ` of the factors that move, over all pairs.
        from_the_left: Whether `P_jᵀ p_i P_j` is made as it reads, `P_jᵀ p_i` first, which is an
            (m, n, r) array and the order of the authors' code; otherwise in the order of least
            work, which `jnp.einsum` finds: the (n, r²) outer products of P's rows first.

    Returns:
        A transformation of the gradients of a tree whose leaves are `lora_a` (m, r) and `lora_b`
        (r, n), each pair in a dict of its own.

    Example:
        >>> params = {"q": {"lora_a": jnp.ones((6, 1)), "lora_b": jnp.ones((1, 4))}}
        >>> tx = dense_loft(1.0, max_grad_norm=1.0)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> print(updates["q"]["lora_b"].round(3))
        [[-1. -1. -1. -1.]]

    Source:
        Tastan et al., LoFT: Low-Rank Adaptation That Behaves Like Full Fine-Tuning, ICLR 2026,
        arXiv 2505.21289.
    """

    def init(params: Any) -> DenseLoFTState:
        sides = _sides(params)
        return DenseLoFTState(
            jnp.zeros([], jnp.int32),
            first={role: [jnp.zeros_like(x) for x in side] for role, side in sides.items()},
            second={
                role: [jnp.zeros((*x.shape, x.shape[1]), x.dtype) for x in side]
                for role, side in sides.items()
            },
            partner={
                role: [jnp.zeros_like(x) for x in side] for role, side in _partners(sides).items()
            },
        )

    def update(
        updates: Any, state: DenseLoFTState, params: Any = None
    ) -> tuple[Any, DenseLoFTState]:
        with jax.default_matmul_precision("highest"):
            return dense_update(updates, state, params)

    def dense_update(
        updates: Any, state: DenseLoFTState, params: Any
    ) -> tuple[Any, DenseLoFTState]:
        b_moves = state.steps % 2 == 0
        steps = state.steps + 1
        partner, gradients = _partners(_sides(params)), _sides(updates)
        inverse = {role: [_gram_inverse(p) for p in side] for role, side in partner.items()}
        scaled = {
            role: [g @ i for g, i in zip(gradients[role], inverse[role], strict=True)]
            for role in gradients
        }

        def squared_norm(role: Role) -> jax.Array:
            pairs = zip(scaled[role], partner[role], strict=True)
            return sum((jnp.sum(jnp.square(g @ p.T)) for g, p in pairs), jnp.zeros([]))

        norm = jnp.sqrt(jax.lax.cond(b_moves, lambda: squared_norm("b"), lambda: squared_norm("a")))
        clip = jnp.minimum(1.0, max_grad_norm / norm)

        first: dict[Role, Side] = {"a": [], "b": []}
        second: dict[Role, Side] = {"a": [], "b": []}
        for role in first:
            for g, p, i, old, m, v in zip(
                scaled[role],
                partner[role],
                inverse[role],
                state.partner[role],
                state.first[role],
                state.second[role],
                strict=True,
            ):
                g = (clip * g).astype(g.dtype)
                c = old.T @ p @ i  # (r, r)
                first[role].append(b1 * m @ c + (1 - b1) * g)
                calibrated = jnp.einsum("ba,ibc,cd->iad", c, v, c)
                outer = jnp.einsum("ia,ib->iab", g, g)
                second[role].append(b2 * calibrated + (1 - b2) * outer)

        def moved(role: Role) -> Side:
            steps_of = []
            for m, s, p, i in zip(
                first[role], second[role], partner[role], inverse[role], strict=True
            ):
                if from_the_left:
                    v = jnp.einsum("ijb,jb->ij", jnp.einsum("ja,iab->ijb", p, s), p)  # (m, n)
                else:
                    v = jnp.einsum("ja,iab,jb->ij", p, s, p)
                v /= 1 - b2**steps
                full = (m @ p.T) / (1 - b1**steps) / (jnp.sqrt(jnp.maximum(v, 0.0)) + eps)
                steps_of.append((-learning_rate * full @ p @ i).astype(p.dtype))
            return steps_of

        def still(role: Role) -> Side:
            return [jnp.zeros_like(m) for m in first[role]]

        a, b = jax.lax.cond(
            b_moves, lambda: (still("a"), moved("b")), lambda: (moved("a"), still("b"))
        )
        pairs = [{"lora_a": x, "lora_b": y.T} for x, y in zip(a, b, strict=True)]
        treedef = jax.tree.structure(updates, is_leaf=_is_pair)
        return jax.tree.unflatten(treedef, pairs), DenseLoFTState(steps, first, second, partner)

    return transformation(init, update)


def _is_pair(x: Any) -> bool:
    return isinstance(x, dict) and "lora_a" in x


def _sides(tree: Any) -> dict[Role, Side]:
    """All A (m, r) and all Bᵀ (n, r) of a tree."""
    pairs = jax.tree.leaves(tree, is_leaf=_is_pair)
    return {"a": [pair["lora_a"] for pair in pairs], "b": [pair["lora_b"].T for pair in pairs]}


def _partners(sides: dict[Role, Side]) -> dict[Role, Side]:
    return {"a": sides["b"], "b": sides["a"]}


def _gram_inverse(p: jax.Array) -> jax.Array:
    return jnp.linalg.inv(p.T @ p + _RIDGE * jnp.eye(p.shape[1], dtype=p.dtype))
