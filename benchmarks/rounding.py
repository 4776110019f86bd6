"""What float formats cost LoFT: how far W's path goes from the path in float64.

On least-squares problems ½‖X (W - W*)‖² with random factors, W is moved by LoFT in float64, and
again with fewer bits in one place: everything in float32, the second or both moments stored in
bfloat16, or the products that make Adam's direction in one or three passes of bfloat16 (what TPUs
do at the precisions "default" and "high"; emulated, so that any machine gives the same figures), at
every step or from some step on.

A distance is ‖W - W₆₄‖ over the distance that W₆₄ has come from its start, in the Frobenius norm:
at the first step, the largest over all steps, and at the last. Beside it stands how many times that
of float32 it is, at the step where that is most.

Adds a line a row to `rounding.jsonl` in the folder of results, and prints the table.

    python -m benchmarks.rounding
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.typing import DTypeLike
from tqdm import tqdm

from benchmarks.history import RESULTS, History, table
from loft_jax import loft
from loft_jax.optim import full_moment
from loft_jax.optim.linear_algebra import matmul

# (in, out, rank), steps, learning rate, Adam's epsilon.
PROBLEMS = (
    ((96, 80, 8), 60, 0.01, 1e-8),
    ((64, 64, 1), 60, 0.01, 1e-8),
    ((13, 13, 13), 200, 0.03, 1e-3),
    ((13, 13, 13), 200, 0.03, 1e-8),
)


def in_bfloat16(passes: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A product of float32 matrices as this many products of bfloat16 ones, 1 or 3."""

    def upper(x: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16).astype(x.dtype)

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        total = matmul(upper(x), upper(y))
        if passes == 3:
            total += matmul(upper(x), upper(y - upper(y))) + matmul(upper(x - upper(x)), upper(y))
        return total

    return product


# What is measured: a name, arguments of loft, what multiplies in place of float32, and how many
# steps are in float32 before.
CASES: tuple[tuple[str, dict[str, Any], Callable[..., jax.Array], int], ...] = (
    ("float32", {}, matmul, 0),
    ("float32, balanced factors", {"balance": True}, matmul, 0),
    ("second moment in bfloat16", {"state_dtype": "bfloat16"}, matmul, 0),
    ("both moments in bfloat16", {"state_dtype": "bfloat16", "mu_dtype": "bfloat16"}, matmul, 0),
    ("direction in three passes of bfloat16", {}, in_bfloat16(3), 0),
    ("direction in three passes after 3 steps", {}, in_bfloat16(3), 3),
    ("direction in three passes after 20 steps", {}, in_bfloat16(3), 20),
    ("direction in one pass of bfloat16", {}, in_bfloat16(1), 0),
)


@dataclass(frozen=True)
class Options:
    """Where the results go."""

    results: Path = RESULTS
    """Folder of the results: add to those that are kept, or start others."""


def path(
    shape: tuple[int, int, int],
    steps: int,
    dtype: DTypeLike,
    product: Callable[..., jax.Array] = matmul,
    before: int = 0,
    **numbers: Any,
) -> np.ndarray:
    """W before the first and after each of the steps.

    Args:
        shape: (m, n, r).
        steps: How many.
        dtype: Of the factors.
        product: What multiplies where a direction is made.
        before: Steps that float32 multiplies at first.
        numbers: Of `loft_jax.loft`.

    Returns:
        (steps + 1, m, n), float64.
    """
    m, n, r = shape
    rng = np.random.default_rng(1)
    data = jnp.asarray(rng.normal(size=(3 * m, m)) / np.sqrt(3 * m), dtype)
    target = jnp.asarray(rng.normal(size=(m, n)), dtype)
    start = {
        "lora_a": jnp.asarray(rng.normal(size=(m, r)) / np.sqrt(m), dtype),
        "lora_b": jnp.asarray(rng.normal(size=(r, n)) / np.sqrt(r), dtype),
    }
    tx = loft(second_moment="full", **numbers)

    def loss(params: Any) -> jax.Array:
        residual = data @ (params["lora_a"] @ params["lora_b"] - target)
        return jnp.sum(residual**2) / 2

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def run(carry: tuple[Any, Any], length: int, product: Callable[..., jax.Array]) -> Any:
        def body(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], Any]:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        with mock.patch.object(full_moment, "matmul", product):
            return jax.lax.scan(body, carry, length=length)

    carry, moved = (start, tx.init(start)), [jax.tree.map(lambda x: x[None], start)]
    with jax.default_matmul_precision("highest"):
        for length, by in ((before, matmul), (steps - before, product)):
            if length:
                jax.clear_caches()  # of directions that were traced with another product
                carry, of_phase = run(carry, length, by)
                moved.append(of_phase)
    a, b = (
        np.concatenate([np.asarray(part[key], np.float64) for part in moved])
        for key in ("lora_a", "lora_b")
    )
    return a @ b


def main(options: Options) -> None:
    """Measures all cases and prints them."""
    jax.config.update("jax_enable_x64", True)
    history, lines = History(options.results, "rounding"), []
    for shape, steps, learning_rate, eps in PROBLEMS:
        numbers: dict[str, Any] = {"learning_rate": learning_rate, "eps": eps}
        exact = path(shape, steps, jnp.float64, **numbers)
        come = np.linalg.norm(exact[1:] - exact[0], axis=(1, 2))
        plain = np.ones(steps)
        for name, settings, product, before in tqdm(CASES, desc=f"{shape}", unit="path"):
            found = path(shape, steps, jnp.float32, product, before, **numbers, **settings)
            distance = np.linalg.norm(found[1:] - exact[1:], axis=(1, 2)) / come
            plain = distance if name == "float32" else plain
            measured = {
                "first": float(distance[0]),
                "largest": float(distance.max()),
                "last": float(distance[-1]),
                "to_float32": float((distance / plain).max()),
            }
            history.append({"problem": shape, "steps": steps, **numbers, "with": name}, measured)
            *distances, ratio = measured.values()
            cells = [*(f"{value:.1e}" for value in distances), f"{ratio:.3g}"]
            lines.append([f"{shape}, {eps:g}", name, *cells])
    head = (
        "problem (in, out, r), eps",
        "with",
        "first step",
        "largest",
        "last step",
        "times float32",
    )
    print("\n".join(table(head, lines)))


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.rounding", description=__doc__))
