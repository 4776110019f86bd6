"""Federated averaging at rank 1: four clients with data of their own, and one adapter for all.

Each client trains the adapter with LoFT, and sends its factors. The best rank-1 adapter of the mean
of their products is what the clients go on from. The mean of A times the mean of B is not the mean
of the products, and depends on how each product is split into factors.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from loft_jax import LoRAConfig, add_lora, average_adapters, loft
from loft_jax.models.llama import Llama, LlamaConfig

CLIENTS, ROUNDS, STEPS = 4, 4, 25
SIZES = LlamaConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
)


def texts(number: int, rows: int = 16, length: int = 24) -> jax.Array:
    """Sequences in which every token is the one before it, plus a number, modulo 32."""
    first = jax.random.randint(jax.random.key(number), (rows, 1), 0, 32)
    return (first + number * jnp.arange(length)) % 32


@nnx.jit
def loss(model: Llama, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of the next token."""
    logits, targets = model(tokens)[:, :-1], tokens[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@nnx.jit
def step(model: Llama, optimizer: nnx.Optimizer, tokens: jax.Array) -> None:
    """Trains what the optimizer trains, on one batch."""
    optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, optimizer.wrt))(model, tokens))


def mean_of_factors(clients: list[Llama]) -> Llama:
    """Averages A and B one by one."""
    factors = [nnx.state(client, nnx.LoRAParam) for client in clients]
    mean = nnx.clone(clients[0])
    nnx.update(mean, jax.tree.map(lambda *some: sum(some) / len(some), *factors))
    return mean


def main() -> None:
    """Adapts a model that counts by 5 to 8 to clients that count by 1 to 4."""
    base = Llama(SIZES, rngs=nnx.Rngs(0))
    whole = nnx.Optimizer(base, optax.adam(3e-3), wrt=nnx.Param)
    for number in range(200):
        step(base, whole, texts(5 + number % 4))
    tx = loft(1e-2)  # one for all, so that its step is compiled once
    for name in ("products", "factors"):
        model = add_lora(nnx.clone(base), LoRAConfig(1), rngs=nnx.Rngs(1))
        losses = []
        for _ in range(ROUNDS):
            clients = [nnx.clone(model) for _ in range(CLIENTS)]
            for number, client in enumerate(clients, 1):
                optimizer = nnx.Optimizer(client, tx, wrt=nnx.LoRAParam)
                for _ in range(STEPS):
                    step(client, optimizer, texts(number))
            products = name == "products"
            model = average_adapters(clients, rank=1) if products else mean_of_factors(clients)
            losses.append(sum(loss(model, texts(n)) for n in range(1, 5)) / CLIENTS)
        print(f"mean of {name}, loss after each round:", *(f"{mean:.3f}" for mean in losses))


if __name__ == "__main__":
    main()
