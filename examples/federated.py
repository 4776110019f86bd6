"""Federated averaging at rank 1: four clients with data of their own, and one adapter for all.

Each client trains the adapter with LoFT for some steps, and sends its factors. The best rank-1
adapter of the mean of their products is what the clients go on from. Averaging A and B one by one
instead is not the mean of the products, and depends on how each product is split into factors.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from loft_jax import LoRAConfig, add_lora, average_adapters, loft
from loft_jax.models.llama import Llama, LlamaConfig

CLIENTS, ROUNDS, STEPS, RANK = 4, 4, 25, 1
SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def texts(client: int, rows: int = 16, length: int = 24) -> jax.Array:
    """Sequences of one client: the next token is that before it, plus the client's number + 1."""
    first = jax.random.randint(jax.random.key(client), (rows, 1), 0, 32)
    return (first + (client + 1) * jnp.arange(length)) % 32


def loss(model: Llama, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of the next token."""
    logits, targets = model(tokens)[:, :-1], tokens[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@nnx.jit
def step(model: Llama, optimizer: nnx.Optimizer, tokens: jax.Array) -> None:
    """Trains the adapter on one batch."""
    optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, tokens))


def mean_of_factors(clients: list[Llama]) -> Llama:
    """Averages A and B one by one."""
    factors = [nnx.state(client, nnx.LoRAParam) for client in clients]
    mean = nnx.clone(clients[0])
    nnx.update(mean, jax.tree.map(lambda *some: sum(some) / len(some), *factors))
    return mean


def main() -> None:
    """Averages both ways from one start."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    base = Llama(LlamaConfig(**SIZES, **heads), rngs=nnx.Rngs(0))
    optimizer = loft(1e-1)  # one for all, so that a step is compiled once
    products = functools.partial(average_adapters, rank=RANK)
    for name, average in {"products": products, "factors": mean_of_factors}.items():
        model = add_lora(nnx.clone(base), LoRAConfig(RANK), rngs=nnx.Rngs(1))
        losses = []
        for _ in range(ROUNDS):
            clients = [nnx.clone(model) for _ in range(CLIENTS)]
            for client, own in enumerate(clients):
                state = nnx.Optimizer(own, optimizer, wrt=nnx.LoRAParam)
                for _ in range(STEPS):
                    step(own, state, texts(client))
            model = average(clients)
            losses.append(sum(loss(model, texts(client)) for client in range(CLIENTS)) / CLIENTS)
        print(f"mean of {name}, loss after each round:", *(f"{value:.3f}" for value in losses))


if __name__ == "__main__":
    main()
