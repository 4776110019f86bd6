"""How far W is from AdamW's path with each move, and what each move keeps of a direction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from loft_jax import calibrate_moments, loft, project_gradients, project_updates
from scripts.pictures.step import project
from scripts.pictures.style import BLUE, GREEN, GREY, ORANGE, panels

ROWS, COLUMNS, STEPS, RATE = 18, 9, 100, 1e-2


class WholeStep(NamedTuple):
    """Both panels.

    Attributes:
        distances: By the name of the move, the distance of W (18, 9) from AdamW's W, over the way
            that AdamW's has come, after each step; factors have rank 9.
        lengths: By what moves, the share of the norm of one direction D (18, 9) that is kept, for
            each rank from 1 to 9, mean over 100 random ones.
    """

    distances: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]


def compute() -> WholeStep:
    """Runs AdamW on W and three moves of the factors on one problem."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (64, ROWS))
    y = x @ jax.random.normal(keys[1], (ROWS, COLUMNS)) + 1
    a = jax.random.normal(keys[2], (ROWS, COLUMNS)) / 4
    b = jax.random.normal(keys[3], (COLUMNS, COLUMNS)) / 3

    def path(tx: optax.GradientTransformation, params: dict[str, jax.Array]) -> jax.Array:
        def weight(params: Any) -> jax.Array:
            return params["w"] if "w" in params else params["lora_a"] @ params["lora_b"]

        def step(carry: tuple, _: None) -> tuple:
            params, state = carry
            grads = jax.grad(lambda p: jnp.mean((x @ weight(p) - y) ** 2))(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), weight(params)

        return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=STEPS)[1])(params)

    twice = optax.chain(
        project_gradients(),
        calibrate_moments(second_moment="full"),
        project_updates(),
        optax.scale_by_learning_rate(RATE),
    )
    moves = {
        "both factors, overlap twice": twice,
        'one factor a step: "alternate"': loft(RATE, second_moment="full", move="alternate"),
        'the whole step: "tangent"': loft(RATE, second_moment="full"),
    }
    right = path(optax.adamw(RATE, weight_decay=0.0), {"w": a @ b})
    way = jnp.linalg.norm(right - a @ b, axis=(1, 2))
    distances = {
        name: jnp.linalg.norm(path(tx, {"lora_a": a, "lora_b": b}) - right, axis=(1, 2)) / way
        for name, tx in moves.items()
    }
    return WholeStep({k: np.asarray(v) for k, v in distances.items()}, _lengths())


def _lengths() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    names = ("the factor B alone", "the factor A alone", "both: the tangent space")
    lengths = np.zeros((3, COLUMNS, 100))
    for r in range(1, COLUMNS + 1):
        for i in range(100):
            d = random.normal(size=(ROWS, COLUMNS))
            a, b = random.normal(size=(ROWS, r)), random.normal(size=(r, COLUMNS))
            q, p = np.linalg.qr(a)[0], np.linalg.qr(b.T)[0]
            kept = q @ q.T @ d, d @ p @ p.T, project(d, a, b)
            lengths[:, r - 1, i] = [np.linalg.norm(x) / np.linalg.norm(d) for x in kept]
    return dict(zip(names, lengths.mean(2), strict=True))


def draw(found: WholeStep) -> Figure:
    """Draws the distances by step, and the lengths by rank."""
    figure, (paths, lengths) = panels(2, (8.4, 3.2))
    for (name, distance), color in zip(found.distances.items(), (BLUE, GREEN, ORANGE), strict=True):
        paths.plot(range(1, STEPS + 1), distance, color=color, label=name)
    paths.set(yscale="log", ylim=(1e-8, 30), xlabel="step", title="distance of W from AdamW's W")
    paths.legend(fontsize=9)
    for (name, length), color in zip(found.lengths.items(), (GREY, GREEN, ORANGE), strict=True):
        lengths.plot(range(1, COLUMNS + 1), length, "o-", color=color, label=name, ms=4)
    lengths.set(ylim=(0, 1.05), xlabel=f"rank r, of W ({ROWS}, {COLUMNS})")
    lengths.set(title="share of ‖D‖ that is kept")
    lengths.legend(fontsize=9)
    return figure
