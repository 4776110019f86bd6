"""One step of W: by AdamW on W, what rank 4 can hold of it, by LoFT, and by LoRA with Adam."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from loft_jax import loft
from scripts.pictures.style import BLUE, GREY, ORANGE, SIGNED, panels

ROWS, COLUMNS, RANK, STEPS, RATE = 20, 28, 4, 20, 0.02


class Steps(NamedTuple):
    """What one step adds to W (20, 28), at the same W and after the same gradients.

    Attributes:
        adamw: By AdamW on W.
        held: The orthogonal projection of that on the tangent space of the matrices of rank 4.
        loft: By LoFT, to first order in the rate.
        lora: By Adam on the factors, to first order.
    """

    adamw: np.ndarray
    held: np.ndarray
    loft: np.ndarray
    lora: np.ndarray


def compute() -> Steps:
    """Fits W = A B to a matrix from noisy products with it, along LoFT's path."""
    keys = jax.random.split(jax.random.key(0), 4)
    left = jnp.linalg.qr(jax.random.normal(keys[0], (ROWS, ROWS)))[0]
    right = jnp.linalg.qr(jax.random.normal(keys[1], (COLUMNS, COLUMNS)))[0]
    target = (left * 2.0 ** -jnp.arange(ROWS)) @ right[:ROWS]
    target = target / jnp.abs(target).max()
    scale = jnp.exp(jax.random.normal(keys[3], (ROWS,)))
    a = jax.random.normal(keys[2], (ROWS, RANK)) / ROWS**0.5
    params = {"lora_a": a, "lora_b": jnp.zeros((RANK, COLUMNS))}
    optimizers: Any = loft(RATE), optax.adam(RATE), optax.adam(RATE)

    @jax.jit
    def step(params: Any, states: Any, number: jax.Array) -> Any:
        x = jax.random.normal(jax.random.fold_in(jax.random.key(5), number), (32, ROWS)) * scale
        a, b = params["lora_a"], params["lora_b"]
        full = jax.grad(lambda w: jnp.mean((x @ (w - target)) ** 2))(a @ b)
        grads = {"lora_a": full @ b.T, "lora_b": a.T @ full}
        of_loft, of_full, of_lora = (
            optimizer.update(g, state, p)
            for optimizer, g, state, p in zip(
                optimizers, (grads, full, grads), states, (params, a @ b, params), strict=True
            )
        )
        moves = of_full[0], *(u["lora_a"] @ b + a @ u["lora_b"] for u, _ in (of_loft, of_lora))
        states = of_loft[1], of_full[1], of_lora[1]
        return optax.apply_updates(params, of_loft[0]), states, moves

    starts: Any = params, jnp.zeros_like(target), params
    states = tuple(tx.init(start) for tx, start in zip(optimizers, starts, strict=True))
    for number in range(STEPS):
        now = params
        params, states, moves = step(params, states, number)
    adamw, by_loft, by_lora = (np.asarray(x) for x in moves)
    return Steps(adamw, project(adamw, now["lora_a"], now["lora_b"]), by_loft, by_lora)


def project(full: Any, a: Any, b: Any) -> np.ndarray:
    """Projects a matrix on the tangent space of the matrices of rank r at A B."""
    q, p = np.linalg.qr(a)[0], np.linalg.qr(np.asarray(b).T)[0]
    rows, columns = full @ p @ p.T, q @ q.T @ full
    return np.asarray(rows + columns - q @ q.T @ rows)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    """The cosine of the angle between two matrices."""
    return float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))


def draw(steps: Steps) -> Figure:
    """Draws W with its factors, and the four steps."""
    figure, (weight, *axes) = panels(5, (9.8, 2.5), width_ratios=[1.45, 1, 1, 1, 1])
    _draw_weight(weight)
    titles = ("AdamW on W", f"all that rank {RANK} can do", "LoFT", "LoRA: Adam on A, B")
    largest = float(np.abs(steps.adamw).max())
    for ax, title, step in zip(axes, titles, steps, strict=True):
        ax.imshow(step, cmap=SIGNED, vmin=-largest, vmax=largest, aspect="equal")
        ax.set(title=title, xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
        if step is steps.adamw:
            ax.set_xlabel("the step of W")
            continue
        length = np.linalg.norm(step) / np.linalg.norm(steps.adamw)
        ax.set_xlabel(f"cosine {cosine(step, steps.adamw):.2f}\nlength {length:.2f}")
    return figure


def _draw_weight(ax: Axes) -> None:
    """W0 of its shape, beside A and B of theirs."""
    ax.set(xlim=(-1, 57), ylim=(ROWS + 6, -1), aspect="equal", title="W = W0 + s A B")
    ax.axis("off")
    boxes = (
        (0, 0, COLUMNS, ROWS, GREY, "W0"),
        (COLUMNS + 3, 0, RANK, ROWS, BLUE, "A"),
        (COLUMNS + 8, 0, COLUMNS - 8, RANK, ORANGE, "B"),
    )
    for x, y, width, height, color, name in boxes:
        ax.add_patch(Rectangle((x, y), width, height, fc=color, alpha=0.35, ec=color))
        ax.text(x + width / 2, y + height / 2, name, ha="center", va="center", fontsize=11)
    ax.text(COLUMNS + 1.5, ROWS / 2, "+", ha="center", va="center", fontsize=12)
    ax.text(COLUMNS / 2, ROWS + 4, "stays", ha="center", va="center")
    ax.text(COLUMNS + 18, ROWS + 4, "trained", ha="center", va="center")
