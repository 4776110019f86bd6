"""Resuming to the bit: factors and LoFT's state are one tree of arrays, which Orbax keeps.

One run takes 20 steps. Another takes 10, is saved and forgotten, and takes 10 more from the
checkpoint. Both end with the same bits, as a batch depends on the number of its step alone.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from loft_jax import loft

TX = loft(1e-2, max_grad_norm=1.0)


def start() -> dict:
    """Factors, their optimizer's state, and the number of steps taken."""
    params = {"lora_a": jax.random.normal(jax.random.key(0), (32, 4)), "lora_b": jnp.zeros((4, 16))}
    return {"params": params, "state": TX.init(params), "step": jnp.zeros((), jnp.int32)}


@jax.jit
def train_step(run: dict) -> dict:
    """One step on the batch that belongs to its number."""
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), run["step"]), (64, 32))

    def loss(params: dict) -> jax.Array:
        return jnp.mean((x @ params["lora_a"] @ params["lora_b"] - jnp.sin(x[:, :16])) ** 2)

    updates, state = TX.update(jax.grad(loss)(run["params"]), run["state"], run["params"])
    params = optax.apply_updates(run["params"], updates)
    return {"params": params, "state": state, "step": run["step"] + 1}


def main() -> None:
    """Compares a run that was interrupted with one that was not."""
    whole = run = start()
    for number in range(20):
        whole, run = train_step(whole), train_step(run) if number < 10 else run
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "run", run)
        checkpointer.wait_until_finished()
        del run  # the interruption: nothing is left in memory
        run = checkpointer.restore(Path(folder) / "run", jax.eval_shape(start))
        print(f"restored at step {run['step']}")
    for _ in range(10):
        run = train_step(run)
    same = all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, run)))
    print(f"at step {run['step']}, bit-equal: {same}")


if __name__ == "__main__":
    main()
