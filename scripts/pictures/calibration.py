"""Moments that follow the basis of the subspace, those that do not, and what each takes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from loft_jax import calibrate_moments, loft, project_gradients, state_bytes
from loft_jax.optim.packed_matrices import symmetric_product
from scripts.pictures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, panels

ROWS, COLUMNS, RANK, STEPS = 24, 16, 4, 30
B1, B2 = 0.9, 0.95


class Calibration(NamedTuple):
    """All three panels.

    Attributes:
        angles: By how much the columns of the partner turn in a step, in degrees. What they span
            stays.
        first: By name, errors of the first moment of W (24, 16) after 30 steps, by angle: the
            distance from that of the projected gradients, over the norm of that.
        second: The same of the second moment.
        ranks: Those of the last panel.
        numbers: By name, numbers of state a row of a factor, by rank.
    """

    angles: np.ndarray
    first: dict[str, np.ndarray]
    second: dict[str, np.ndarray]
    ranks: np.ndarray
    numbers: dict[str, np.ndarray]


def compute() -> Calibration:
    """Turns the partner of A at a steady pace, while noisy gradients of one mean come."""
    keys = jax.random.split(jax.random.key(0), 3)
    noise = jax.random.normal(keys[0], (STEPS, ROWS, COLUMNS))
    grads = jax.random.normal(keys[1], (ROWS, COLUMNS)) + 0.5 * noise
    start = jnp.linalg.qr(jax.random.normal(keys[2], (COLUMNS, RANK)))[0]
    quarter = start[:, jnp.array([1, 0, 3, 2])] * jnp.array([1, -1, 1, -1])
    full, factored = (
        optax.chain(project_gradients(), calibrate_moments(B1, B2, second_moment=kind))
        for kind in ("full", "factored")
    )
    age = jnp.arange(STEPS)[::-1, None, None]
    projected = grads @ start @ start.T
    first = (1 - B1) * jnp.sum(B1**age * projected, 0)
    second = (1 - B2) * jnp.sum(B2**age * projected**2, 0)

    def errors(angle: jax.Array) -> tuple[jax.Array, ...]:
        def params(number: jax.Array) -> dict[str, jax.Array]:
            turned = jnp.cos(angle * number) * start + jnp.sin(angle * number) * quarter
            return {"lora_a": jnp.eye(ROWS, RANK), "lora_b": turned.T}

        def step(states: Any, number: jax.Array) -> Any:
            now, g = params(number), grads[number]
            raw = {"lora_a": g @ now["lora_b"].T, "lora_b": now["lora_a"].T @ g}
            states = [link.update(raw, s, now)[1] for link, s in zip(links, states, strict=True)]
            return states, raw["lora_a"]  # the coordinates, as the columns are orthonormal

        links = full, factored
        states: Any = [link.init(params(jnp.array(0))) for link in links]
        states, c = jax.lax.scan(step, states, jnp.arange(STEPS))
        of_full, of_factored = (state[1] for state in states)
        b = params(jnp.array(STEPS - 1))["lora_b"]
        still_first = (1 - B1) * jnp.sum(B1**age * c, 0) @ b
        still = (1 - B2) * jnp.einsum("k,kir,kis->irs", B2 ** age[:, 0, 0], c, c)
        still_second = jnp.einsum("rj,irs,sj->ij", b, still, b)
        q = of_full.basis["lora_b"].T  # (columns, r)
        weights, gram = of_factored.nu["lora_a"], of_factored.gram["lora_a"]
        forms = jnp.sum(q @ gram * q, 1)
        return (
            _error(still_first, first),
            _error(of_full.mu["lora_a"] @ q.T, first),
            _error(still_second, second),
            _error(of_full.nu["lora_a"] @ symmetric_product(q, q).T, second),
            _error(weights * forms / jnp.trace(gram), second),
        )

    angles = np.linspace(0, 10, 11)
    found = [np.asarray(x) for x in jax.jit(jax.vmap(errors))(jnp.deg2rad(angles))]
    ranks = np.array([1, 2, 4, 8, 16, 32])
    return Calibration(
        angles,
        dict(zip(("left as it is", "carried"), found[:2], strict=True)),
        dict(zip(("full, left as it is", "full, carried", "factored"), found[2:], strict=True)),
        ranks,
        _numbers(ranks),
    )


def _error(x: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x - right) / jnp.linalg.norm(right)


def _numbers(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers of state a row, of factors (4096, r) and (r, 4096)."""
    optimizers = {
        "LoFT, full": loft(1.0, second_moment="full"),
        "LoFT, diagonal": loft(1.0, second_moment="diagonal"),
        "LoFT, factored": loft(1.0),
        "LoRA with AdamW": optax.adamw(1.0),
    }
    pairs = [
        {
            "lora_a": jax.ShapeDtypeStruct((4096, int(r)), jnp.float32),
            "lora_b": jax.ShapeDtypeStruct((int(r), 4096), jnp.float32),
        }
        for r in ranks
    ]
    return {
        name: np.array([state_bytes(tx, pair) / 4 / 8192 for pair in pairs])
        for name, tx in optimizers.items()
    }


def draw(found: Calibration) -> Figure:
    """Draws the errors of both moments by angle, and the numbers by rank."""
    figure, (first, second, numbers) = panels(3, (10.2, 3.2))
    for ax, errors in ((first, found.first), (second, found.second)):
        for (name, error), color in zip(errors.items(), (BLUE, ORANGE, GREEN), strict=False):
            ax.plot(found.angles, error, "o-", color=color, label=name, ms=4)
        ax.set(xlabel="the columns turn, degrees a step", ylim=(-0.03, 1.35))
    first.set_title("error of the first moment")
    second.set_title("error of the second moment")
    colors = PURPLE, BLUE, GREEN, GREY
    for (name, count), color in zip(found.numbers.items(), colors, strict=True):
        numbers.plot(found.ranks, count, "o-", color=color, label=name, ms=4)
    numbers.set_xscale("log", base=2)
    numbers.set_xticks(found.ranks, [str(r) for r in found.ranks])
    numbers.set(yscale="log", xlabel="rank r", title="numbers of state a row")
    for ax in (first, second, numbers):
        ax.legend(fontsize=9)
    return figure
