"""How far one gradient step moves W, by how W is split into factors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from loft_jax import precondition_by_reflora
from scripts.pictures.style import BLUE, GREEN, ORANGE, panels

ROWS, COLUMNS, RANK = 24, 16, 4


class Moves(NamedTuple):
    """Lengths of the move of W, over that from the balanced factors, for each T.

    Attributes:
        t: The numbers that T is made of.
        plain: The gradients of the factors as they are.
        scalar: Those of factors of equal norms, as RefLoRA-S has them.
        reflora: RefLoRA's.
    """

    t: np.ndarray
    plain: np.ndarray
    scalar: np.ndarray
    reflora: np.ndarray


def compute() -> tuple[Moves, Moves]:
    """Splits one W by T = t I, and by T = diag(t, 1 / t, t, 1 / t)."""
    keys = jax.random.split(jax.random.key(0), 2)
    full, w = (jax.random.normal(key, (ROWS, COLUMNS)) for key in keys)
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[:RANK])
    a, b = u[:, :RANK] * root, root[:, None] * vt[:RANK]  # balanced
    t = jnp.logspace(-1, 1, 41)
    link = precondition_by_reflora(warmup_steps=0)

    def gradients(a: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
        return {"lora_a": full @ b.T, "lora_b": a.T @ full}

    def length(a: jax.Array, b: jax.Array, grads: Any) -> jax.Array:
        return jnp.linalg.norm(grads["lora_a"] @ b + a @ grads["lora_b"])

    def moves(diagonal: jax.Array) -> tuple[jax.Array, ...]:
        a_split, b_split = a * diagonal, b / diagonal[:, None]
        params = {"lora_a": a_split, "lora_b": b_split}
        grads = gradients(a_split, b_split)
        of_reflora, _ = link.update(grads, link.init(params), params)
        c = jnp.sqrt(jnp.linalg.norm(b_split) / jnp.linalg.norm(a_split))
        equal = c * a_split, b_split / c
        plain, reflora = (length(a_split, b_split, g) for g in (grads, of_reflora))
        return plain, length(*equal, gradients(*equal)), reflora

    least = length(a, b, gradients(a, b))
    found = []
    for powers in (jnp.ones(RANK), jnp.array([1.0, -1.0, 1.0, -1.0])):
        lengths = jax.jit(jax.vmap(moves))(t[:, None] ** powers)
        found.append(Moves(np.asarray(t), *(np.asarray(x / least) for x in lengths)))
    return found[0], found[1]


def draw(found: tuple[Moves, Moves]) -> Figure:
    """Draws a panel for each kind of T."""
    figure, axes = panels(2, (8.4, 3.2), sharey=True)
    titles = "(t A) (B / t)", "(A T) (T⁻¹ B), T = diag(t, 1/t, t, 1/t)"
    lines = ("plain", BLUE, "-", "LoRA"), ("scalar", GREEN, "--", "RefLoRA-S")
    for ax, title, moves in zip(axes, titles, found, strict=True):
        for name, color, line, label in (*lines, ("reflora", ORANGE, "-", "RefLoRA")):
            width = 3.5 if name == "plain" else 1.7
            ax.plot(moves.t, getattr(moves, name), line, color=color, label=label, lw=width)
        ax.set(xscale="log", yscale="log", xlabel="t", title=title)
    axes[0].set_ylabel("length of the move of W")
    axes[0].legend()
    return figure
