"""Adapters and merged models of a trained base, opened in PyTorch.

SmolLM2's logits reach 33, where rounding to float32 alone keeps the two sides apart: by 1.0e-4
without any adapter, by 1.7e-4 with the one here. So equality is judged in float64, to 1e-4, and
float32 by how far PyTorch's own float32 is from its float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loft_jax.hub import load_peft_adapter, load_pretrained, save_peft_adapter, save_pretrained
from loft_jax.lora import LoRAConfig, add_lora, lora_layers, merge_lora


def torch_model(path):
    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()


def tokens(vocabulary):
    return np.random.default_rng(0).integers(0, vocabulary, (2, 64))


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(tokens(model.config.vocab_size))).logits.numpy()


@nnx.jit
def run(model, tokens):
    return model(tokens)


def our_logits(model):
    return np.asarray(run(model, jnp.asarray(tokens(model.config.vocab_size))))


def apart(left, right):
    return np.abs(left - right).max()


def add_random_lora(model, std):
    add_lora(model, LoRAConfig(rank=8, alpha=16), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_a, layer.lora_b):
            factor[...] = jnp.asarray(rng.normal(size=factor.shape) * std, factor.dtype)
    return model


@pytest.fixture(scope="module")
def adapter(smollm2, tmp_path_factory):
    """A folder with an adapter of every linear layer, and the logits it gives with us."""
    folder = tmp_path_factory.mktemp("smollm2") / "adapter"
    model = add_random_lora(load_pretrained(smollm2), std=0.05)
    save_peft_adapter(folder, model, base_model=str(smollm2))
    return folder, our_logits(model)


@pytest.fixture(scope="module")
def peft_logits(smollm2, adapter):
    """The logits of PEFT without the adapter, with it, and with it in float64."""
    base = torch_model(smollm2)
    without = torch_logits(base)
    model = PeftModel.from_pretrained(base, adapter[0], torch_device="cpu").eval()
    return without, torch_logits(model), torch_logits(model.double())


@pytest.mark.slow
def test_peft_gives_our_logits(smollm2, adapter, peft_logits):
    folder, ours = adapter
    without, theirs, exact = peft_logits
    assert apart(exact, without) > 10
    assert apart(ours, theirs) < 3e-4
    assert np.linalg.norm(ours - exact) < 2 * np.linalg.norm(theirs - exact)
    with jax.enable_x64(True):
        model = load_pretrained(smollm2, dtype=jnp.float64, param_dtype=jnp.float64)
        assert apart(our_logits(load_peft_adapter(folder, model)), exact) < 1e-4


@pytest.mark.slow
def test_merged_model_in_transformers(smollm2, adapter, peft_logits, tmp_path):
    folder, ours = adapter
    _, theirs, exact = peft_logits
    model = merge_lora(load_peft_adapter(folder, load_pretrained(smollm2)))
    save_pretrained(tmp_path / "merged", model)
    del model
    merged = torch_model(tmp_path / "merged")
    logits = torch_logits(merged)
    assert apart(logits, ours) < 3e-4
    assert np.linalg.norm(logits - exact) < 2 * np.linalg.norm(theirs - exact)
    assert apart(torch_logits(merged.double()), exact) < 1e-4


def test_merged_small_llama_in_transformers(tiny_llama, tmp_path):
    base = our_logits(load_pretrained(tiny_llama))
    model = add_random_lora(load_pretrained(tiny_llama), std=0.2)
    adapted = our_logits(model)
    assert apart(adapted, base) > 1
    save_pretrained(tmp_path / "merged", merge_lora(model))
    merged = torch_logits(torch_model(tmp_path / "merged"))
    assert apart(merged, adapted) < 1e-4
    assert apart(merged, our_logits(model)) < 1e-4
