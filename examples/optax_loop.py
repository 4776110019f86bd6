"""LoFT in a plain Optax loop: a gradient transformation over a dict of factors.

W = A B is fitted to data, twice: from (A, B) and from (10 A, B / 10), which is the same W. Adam on
the factors takes two ways, since its gradients depend on the split. LoFT moves W: one way.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from loft_jax import loft

STEPS = 200


def fit(optimizer: optax.GradientTransformation, params: dict, x: jax.Array, y: jax.Array) -> float:
    """The loss after some steps."""

    def loss(params: dict) -> jax.Array:
        pair = params["layer"]
        return jnp.mean((x @ pair["lora_a"] @ pair["lora_b"] - y) ** 2)

    @jax.jit
    def step(params: Any, state: optax.OptState) -> tuple[Any, optax.OptState]:
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return float(loss(params))


def main() -> None:
    """Fits from both starts with both optimizers."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, target = jax.random.normal(keys[0], (256, 32)), jax.random.normal(keys[1], (32, 16)) / 8
    a, b = jax.random.normal(keys[2], (32, 4)) / 6, jax.random.normal(keys[3], (4, 16)) / 2
    print(f"loss after {STEPS} steps")
    for name, optimizer in {"Adam": optax.adam(1e-2), "LoFT": loft(1e-2)}.items():
        for split in (1, 10):
            params = {"layer": {"lora_a": split * a, "lora_b": b / split}}
            found = fit(optimizer, params, x, x @ target)
            print(f"{name} from ({split} A, B / {split}): {found:.4f}")


if __name__ == "__main__":
    main()
