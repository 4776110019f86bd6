"""One W from three splits into factors, and the share of a gradient that rank r can hold."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from loft_jax import loft
from scripts.pictures.step import project
from scripts.pictures.style import BLUE, GREY, ORANGE, panels

ROWS, COLUMNS, RANK, STEPS, RATE = 24, 16, 4, 100, 1e-2
SPLITS = (0.1, 1.0, 10.0)


class Subspace(NamedTuple):
    """Both panels.

    Attributes:
        adam: Losses of Adam on the factors (split, step), from (c A, B / c) for each c of SPLITS.
        loft: Those of LoFT.
        ranks: From 1 to all 16.
        shares: The share of the squared norm that the projection keeps, by rank, mean over random
            matrices (24, 16); and what `r (m + n - r) / (m n)` says.
    """

    adam: np.ndarray
    loft: np.ndarray
    ranks: np.ndarray
    shares: tuple[np.ndarray, np.ndarray]


def compute() -> Subspace:
    """Fits W = A B to a matrix from each split, and projects random ones at each rank."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (64, ROWS))
    target = jax.random.normal(keys[1], (ROWS, COLUMNS)) / 8
    a = jax.random.normal(keys[2], (ROWS, RANK)) / 6
    b = jax.random.normal(keys[3], (RANK, COLUMNS)) / 2

    def losses(tx: optax.GradientTransformation) -> np.ndarray:
        def loss(params: dict[str, jax.Array]) -> jax.Array:
            return jnp.mean((x @ (params["lora_a"] @ params["lora_b"] - target)) ** 2)

        def run(split: jax.Array) -> jax.Array:
            def step(carry: tuple, _: None) -> tuple:
                params, state = carry
                value, grads = jax.value_and_grad(loss)(params)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), value

            params = {"lora_a": split * a, "lora_b": b / split}
            return jax.lax.scan(step, (params, tx.init(params)), length=STEPS)[1]

        return np.asarray(jax.jit(jax.vmap(run))(jnp.array(SPLITS)))

    ranks = np.arange(1, COLUMNS + 1)
    formula = ranks * (ROWS + COLUMNS - ranks) / (ROWS * COLUMNS)
    shares = np.array([_share(int(r)) for r in ranks]), formula
    return Subspace(losses(optax.adam(RATE)), losses(loft(RATE)), ranks, shares)


def _share(rank: int) -> float:
    """The mean over 100 random gradients and factors."""
    random = np.random.default_rng(0)
    kept = []
    for _ in range(100):
        full = random.normal(size=(ROWS, COLUMNS))
        held = project(full, random.normal(size=(ROWS, rank)), random.normal(size=(rank, COLUMNS)))
        kept.append((held**2).sum() / (full**2).sum())
    return float(np.mean(kept))


def draw(found: Subspace) -> Figure:
    """Draws the losses by step, and the shares by rank."""
    figure, (losses, shares) = panels(2, (8.4, 3.2))
    for curves, color, name in ((found.adam, BLUE, "Adam on A, B"), (found.loft, ORANGE, "LoFT")):
        for curve, split, line in zip(curves, SPLITS, ("--", "-", ":"), strict=True):
            label = f"{name}, from {split:g} A and B / {split:g}"
            losses.plot(curve, line, color=color, label=label, lw=2.2 if line == ":" else 1.5)
    losses.set(yscale="log", xlabel="step", ylabel="loss", title="one W, three splits")
    losses.legend(fontsize=9)
    shares.plot(found.ranks, found.shares[1], "-", color=GREY, label="r (m + n - r) / (m n)")
    shares.plot(found.ranks, found.shares[0], "o", color=ORANGE, label="random gradients")
    shares.set(xlabel=f"rank r, of W ({ROWS}, {COLUMNS})", ylim=(0, 1.05))
    shares.set(title="share of ‖G‖² in the tangent space")
    shares.legend()
    return figure
