"""LoRA on a Flax NNX model of your own, trained with `nnx.Optimizer`.

`add_lora` puts adapters on the layers in place; `wrt=nnx.LoRAParam` trains them and nothing else;
`merge_lora` folds them into the weights, and the model is what it was before, but taught.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from loft_jax import LoRAConfig, add_lora, loft, merge_lora


class MLP(nnx.Module):
    """Any module does: layers are found by their types."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(16, 64, rngs=rngs)
        self.down = nnx.Linear(64, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Gives the logits of four classes."""
        return self.down(nnx.relu(self.up(x)))


def main() -> None:
    """Teaches a random model the classes of another one."""
    x = jax.random.normal(jax.random.key(0), (512, 16))
    labels = MLP(nnx.Rngs(7))(x).argmax(-1)
    model = add_lora(MLP(nnx.Rngs(0)), LoRAConfig(rank=4), rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, loft(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model: MLP, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: MLP) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    def accuracy() -> jax.Array:
        return jnp.mean(model(x).argmax(-1) == labels)

    factors, everything = (nnx.state(model, kind) for kind in (nnx.LoRAParam, nnx.Param))
    trained, weights = (sum(x.size for x in jax.tree.leaves(s)) for s in (factors, everything))
    print(f"trained: {trained} numbers, beside {weights - trained} that stay")
    print(f"accuracy before: {accuracy():.3f}")
    for _ in range(200):
        step(model, optimizer)
    print(f"accuracy after: {accuracy():.3f}")
    merge_lora(model)
    print(f"merged into {type(model.up).__name__}: {accuracy():.3f}")


if __name__ == "__main__":
    main()
