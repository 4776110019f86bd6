"""Federated averaging at rank 1: four clients with data of their own, and one adapter for all.

Each client trains the adapter with LoFT, and all go on from the best rank-1 adapter of the mean of
their products. The mean of A times that of B is another product, and depends on the splits.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from loft_jax import LoRAConfig, add_lora, average_adapters, loft
from loft_jax.models.llama import Llama, LlamaConfig

CLIENTS, ROUNDS, STEPS = range(1, 5), 4, 25
SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4}


@nnx.jit
def loss(model: Llama, number: int) -> jax.Array:
    """Gives the loss on texts in which every token is the one before it, plus a number, mod 32."""
    first = jax.random.randint(jax.random.key(number), (16, 1), 0, 32)
    tokens = (first + number * jnp.arange(24)) % 32
    logits = model(tokens)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit
def step(model: Llama, optimizer: nnx.Optimizer, number: int) -> None:
    """Trains what the optimizer trains, on the texts of a client."""
    optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, optimizer.wrt))(model, number))


def main() -> None:
    """Adapts a model that counts by 5 to 8 to clients that count by 1 to 4."""
    base = Llama(LlamaConfig.from_hf(SIZES | SHAPE), rngs=nnx.Rngs(0))
    whole, tx = nnx.Optimizer(base, optax.adam(3e-3), wrt=nnx.Param), loft(1e-2)
    for number in range(200):
        step(base, whole, 5 + number % 4)
    for mean_of in ("products", "factors"):
        model, losses = add_lora(nnx.clone(base), LoRAConfig(1), rngs=nnx.Rngs(1)), []
        for _ in range(ROUNDS):
            clients = [nnx.clone(model) for _ in CLIENTS]
            for number, client in zip(CLIENTS, clients, strict=True):
                optimizer = nnx.Optimizer(client, tx, wrt=nnx.LoRAParam)
                for _ in range(STEPS):
                    step(client, optimizer, number)
            if mean_of == "products":
                model = average_adapters(clients, rank=1)
            else:
                factors = (nnx.state(client, nnx.LoRAParam) for client in clients)
                nnx.update(model, jax.tree.map(lambda *some: sum(some) / len(some), *factors))
            losses.append(float(sum(loss(model, number) for number in CLIENTS)) / len(CLIENTS))
        print(f"mean of {mean_of}, loss after each round:", *(f"{x:.3f}" for x in losses))


if __name__ == "__main__":
    main()
