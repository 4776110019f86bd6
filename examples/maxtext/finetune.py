"""LoFT on a Linen model that is scanned at axis 1, as MaxText scans it, exported for PEFT."""

import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.maxtext.llama import HEAD_DIM, VOCAB, Transformer
from loft_jax import LoRAConfig, loft, save_peft_adapter
from loft_jax.lora.linen import LinenLoRA, add_lora

PROJECTIONS = {
    "self_attention.query": "self_attn.q_proj",
    "self_attention.key": "self_attn.k_proj",
    "self_attention.value": "self_attn.v_proj",
    "self_attention.out": "self_attn.o_proj",
    "mlp.wi_0": "mlp.gate_proj",
    "mlp.wi_1": "mlp.up_proj",
    "mlp.wo": "mlp.down_proj",
}


def hf_name(path: str, layer: int | None) -> str:
    """Names a module of the scan as Hugging Face does: MaxText's own table."""
    return f"model.layers.{layer}.{PROJECTIONS[path.removeprefix('decoder.layers.')]}"


def to_hugging_face(factors: dict[str, Any]) -> dict[str, Any]:
    """Takes the 1 / sqrt(head_dim) out of the queries, which Hugging Face's attention has."""
    factors = jax.tree.map(lambda x: x, factors)  # a copy of the dicts
    query = factors["decoder"]["layers"]["self_attention"]["query"]
    query["kernel_lora_b"] *= math.sqrt(HEAD_DIM)
    return factors


def train(lora: LinenLoRA, params: Any, factors: Any, tokens: jax.Array, steps: int) -> Any:
    """Trains the factors, and gives them with the losses."""
    tx = loft(1e-2, scaling=lora.spec.scaling, stack_axis=lora.spec.stack_axis)

    @jax.jit
    def step(factors: Any, state: optax.OptState) -> Any:
        def loss(factors: Any) -> jax.Array:
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
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")

    adapter = to_hugging_face(factors)
    save_peft_adapter(folder, adapter, alpha=config.alpha_of, hf_name=hf_name, spec=lora.spec)
    print(f"adapter for PEFT: {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
