"""Models with random adapters, ours and PEFT's, and their logits on the same tokens."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from peft import get_peft_model
from safetensors.numpy import load_file

from loft_jax.hub.pretrained import load_pretrained
from loft_jax.lora import LoRAConfig, add_lora, lora_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9))
CPU = {"torch_device": "cpu"}


def save_torch_llama(folder: Path) -> None:
    """Writes a random Llama of three layers, as transformers does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)


def torch_llama(folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@nnx.jit
def run(model, tokens):
    return model(tokens)


def our_logits(model):
    return np.asarray(run(model, jnp.asarray(TOKENS, jnp.int32)))


def torch_logits(model):
    with torch.no_grad():
        output = model(torch.tensor(TOKENS))
    return np.asarray(getattr(output, "logits", output))


def randomize(model, seed=3):
    rng = np.random.default_rng(seed)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_a, layer.lora_b):
            factor[...] = jnp.asarray(rng.normal(size=factor.shape) * 0.2, factor.dtype)
        if (magnitude := layer.lora_magnitude) is not None:
            magnitude[...] *= jnp.asarray(rng.uniform(0.5, 1.5, magnitude.shape), magnitude.dtype)
    return model


def randomized_peft(model, config, seed=5):
    torch.manual_seed(seed)
    model = get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def adapted_llama(folder, **fields):
    model = load_pretrained(folder)
    return randomize(add_lora(model, LoRAConfig(**{"rank": 4, **fields}), rngs=nnx.Rngs(0)))


def assert_same_files(left: Path, right: Path):
    ours, theirs = load_file(left / WEIGHTS), load_file(right / WEIGHTS)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
