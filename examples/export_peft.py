"""A trained adapter in the format of Hugging Face PEFT: PyTorch gives the same answers.

Writes a tiny Llama and its adapter. `PeftModel.from_pretrained` opens them in PyTorch;
`load_peft_adapter` reads the adapter back here.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from safetensors.numpy import load_file

import loft_jax
from loft_jax.models.llama import Llama, LlamaConfig

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = jnp.arange(64)[None] * 7 % 64


def main(folder: str = "runs/export_peft") -> None:
    """Trains an adapter for some steps, writes it, and reads it again."""
    base, adapter = Path(folder) / "base", Path(folder) / "adapter"
    model = Llama(LlamaConfig.from_hf({"model_type": "llama", **SIZES, **SHAPE}), rngs=nnx.Rngs(0))
    loft_jax.save_pretrained(base, model)
    lora = loft_jax.LoRAConfig(rank=4, target_modules=("q_proj", "v_proj"))
    loft_jax.add_lora(model, lora, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, loft_jax.loft(3e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model: Llama, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: Llama) -> jax.Array:
            logits = model(TOKENS[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(20)]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    loft_jax.save_peft_adapter(adapter, model, base_model=str(base))
    for name, tensor in sorted(load_file(adapter / "adapter_model.safetensors").items())[:2]:
        print(name, tensor.shape)
    again = loft_jax.load_peft_adapter(adapter, loft_jax.load_pretrained(base))
    print(f"read back, logits differ by {jnp.abs(again(TOKENS) - model(TOKENS)).max():.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
