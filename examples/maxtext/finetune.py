"""LoFT on a Linen model that is scanned at axis 1, as MaxText scans it, exported for PEFT."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.maxtext.conversion import hf_name, to_hugging_face
from examples.maxtext.llama import VOCAB, Transformer
from loft_jax import LoRAConfig, loft, save_peft_adapter
from loft_jax.lora.linen import LinenLoRA, add_lora

Tree = dict[str, Any]


def train(
    lora: LinenLoRA, params: Tree, factors: Tree, tokens: jax.Array, steps: int
) -> tuple[Tree, list[float]]:
    """Trains the factors, and gives them with the losses."""
    tx = loft(1e-2, scaling=lora.spec.scaling, stack_axis=lora.spec.stack_axis)

    @jax.jit
    def step(factors: Tree, state: optax.OptState) -> tuple[Any, Any, jax.Array]:
        def loss(factors: Tree) -> jax.Array:
            logits = lora.apply({"params": params, "lora": factors}, tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return losses.mean()

        value, grads = jax.value_and_grad(loss)(factors)
        updates, state = tx.update(grads, state, factors)
        return optax.apply_updates(factors, updates), state, value

    state, losses = tx.init(factors), []
    for _ in range(steps):
        factors, state, value = step(factors, state)
        losses.append(float(value))
    return factors, losses


def main(folder: str = "runs/maxtext") -> None:
    """Adapts projections of all layers, trains, and writes the adapter."""
    tokens = jnp.arange(2 * 12).reshape(2, 12) * 7 % VOCAB
    model = Transformer(param_scan_axis=1)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]  # or those of a checkpoint

    config = LoRAConfig(rank=2, alpha=4, target_modules=["query", "out"])
    lora = add_lora(model, config, tokens)
    factors = lora.init(jax.random.key(1))
    factors, losses = train(lora, params, factors, tokens, steps=10)

    adapter = to_hugging_face(factors)
    save_peft_adapter(folder, adapter, alpha=config.alpha_of, hf_name=hf_name, spec=lora.spec)
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last; adapter: {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
