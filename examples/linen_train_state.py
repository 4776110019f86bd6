"""LoRA on a Flax Linen model of your own, trained with Flax's `TrainState`.

`add_lora` finds the layers; the factors are a tree of their own, which the state holds alone, and
the parameters of the model stay as they are. `lora.merge` folds them into the weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from loft_jax import LoRAConfig, loft
from loft_jax.lora.linen import add_lora


class MLP(nn.Module):
    """Any module does: layers are found by their types."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Gives the logits of four classes."""
        return nn.Dense(4, name="down")(nn.relu(nn.Dense(64, name="up")(x)))


def main() -> None:
    """Teaches a random model the classes of another one."""
    x, model = jax.random.normal(jax.random.key(0), (512, 16)), MLP()
    labels = model.init_with_output(jax.random.key(7), x)[0].argmax(-1)
    params = model.init(jax.random.key(1), x)["params"]  # or those of a checkpoint

    lora = add_lora(model, LoRAConfig(rank=4), x)
    tx = loft(1e-2, scaling=lora.spec.scaling, stack_axis=lora.spec.stack_axis)
    state = TrainState.create(apply_fn=lora.apply, params=lora.init(jax.random.key(2)), tx=tx)

    @jax.jit
    def step(state: TrainState) -> TrainState:
        def loss(factors: dict) -> jax.Array:
            logits = state.apply_fn({"params": params, "lora": factors}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    def accuracy(logits: Any) -> jax.Array:
        return jnp.mean(logits.argmax(-1) == labels)

    for count in (0, 200):
        for _ in range(count):
            state = step(state)
        logits = lora.apply({"params": params, "lora": state.params}, x)
        print(f"accuracy after {count} steps: {accuracy(logits):.3f}")
    merged = lora.merge(params, state.params)
    print(f"merged into the parameters: {accuracy(model.apply({'params': merged}, x)):.3f}")


if __name__ == "__main__":
    main()
