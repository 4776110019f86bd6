import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from loft_jax.errors import InputError
from loft_jax.hub import load_peft_adapter, load_pretrained, save_peft_adapter, save_pretrained
from loft_jax.lora import LoRAConfig, add_lora, merge_lora
from loft_jax.models.quantized import QuantizedParam, dequantize, quantize, quantize_kernels

KINDS = pytest.mark.parametrize("kind", ["int8", "nf4"])
TOKENS = np.random.default_rng(0).integers(0, 400, (2, 20))


@nnx.jit
def run(model):
    return model(TOKENS)


@KINDS
def test_values_are_qwixs(kind):
    kernel = jax.random.normal(jax.random.key(0), (3, 128, 24))
    kernel = kernel.at[1, :64, 3].set(0.0)
    rounded = quantize(kernel, kind, name="kernel")
    tiles = {} if kind == "int8" else {1: 64}
    expected = qwix.quantize(kernel, kind, channelwise_axes=(0, 2), tiled_axes=tiles)
    assert jax.tree.structure(rounded) == jax.tree.structure(expected)
    np.testing.assert_array_equal(rounded.qvalue, expected.qvalue)
    np.testing.assert_array_equal(rounded.scale, expected.scale)
    np.testing.assert_array_equal(dequantize(rounded), qwix.dequantize(rounded))
    assert rounded.scale.shape == (3, 1 if kind == "int8" else 2, 24)


@KINDS
def test_error_is_that_of_the_format(kind):
    """Half a step of the largest of those that share a scale."""
    kernel = jax.random.normal(jax.random.key(0), (2, 128, 16))
    rounded = quantize(kernel, kind, name="kernel")
    tiles = np.asarray(kernel).reshape(2, rounded.scale.shape[1], -1, 16)
    largest = np.abs(tiles).max(axis=2, keepdims=True)
    step = 1 / 127 if kind == "int8" else 0.31  # the widest gap between two levels of NF4
    error = np.abs(np.asarray(dequantize(rounded)).reshape(tiles.shape) - tiles)
    assert (error <= largest * step / 2 * 1.01).all()


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_a_quantized_model_is_the_model_of_its_dequantized_weights(tiny_llama, kind):
    """To rounding; while the weights take an eighth or a quarter of float32's bits."""
    quantized = load_pretrained(tiny_llama, quantization=kind)
    plain = load_pretrained(tiny_llama)
    for _, module in nnx.iter_modules(plain.layers):
        if isinstance(module, nnx.Linear):
            kernel = quantize(module.kernel[...], kind, name="kernel")
            module.kernel.set_value(dequantize(kernel))
    logits = run(quantized)
    np.testing.assert_allclose(logits, run(plain), atol=1e-5)
    assert float(jnp.abs(logits - run(load_pretrained(tiny_llama))).max()) > 1e-3
    codes = quantized.layers.mlp.up_proj.kernel.get_value().qvalue
    assert codes.dtype == {"int8": jnp.int8, "nf4": jnp.uint4}[kind]


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_lora_on_top_trains_exports_and_loads_as_ever(tmp_path, tiny_llama, kind):
    config = LoRAConfig(rank=2, target_modules=("q_proj", "up_proj"))
    model = add_lora(load_pretrained(tiny_llama, quantization=kind), config, rngs=nnx.Rngs(0))
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        value.set_value(0.1 * jax.random.normal(jax.random.key(len(path[-1])), value.shape))
    nnx.update(model, nnx.from_flat_state(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))))

    def loss(model):
        return model(TOKENS).std()

    grads = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))(model)
    assert all(jnp.isfinite(g).all() and jnp.any(g) for g in jax.tree.leaves(grads))
    save_peft_adapter(tmp_path, model, base_model="base")
    again = load_peft_adapter(tmp_path, load_pretrained(tiny_llama, quantization=kind))
    logits = run(model)
    np.testing.assert_array_equal(run(again), logits)
    np.testing.assert_allclose(run(merge_lora(again)), logits, atol=1e-4)


def test_kernels_only(tiny_llama):
    model = load_pretrained(tiny_llama, quantization="int8", param_dtype=jnp.bfloat16)
    quantized = {
        ".".join(map(str, path))
        for path, value in nnx.to_flat_state(nnx.state(model))
        if isinstance(value, QuantizedParam)
    }
    assert len(quantized) == 7
    assert all(path.startswith("layers.") and path.endswith(".kernel") for path in quantized)
    assert model.layers.mlp.up_proj.kernel.get_value().scale.dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_a_model_is_saved_with_its_dequantized_kernels(tmp_path, tiny_llama, kind):
    config = LoRAConfig(rank=2, target_modules=("q_proj",))
    base = load_pretrained(tiny_llama, quantization=kind)
    merged = merge_lora(add_lora(base, config, rngs=nnx.Rngs(0)))
    save_pretrained(tmp_path / "model", merged)
    saved = load_pretrained(tmp_path / "model")
    np.testing.assert_allclose(run(saved), run(merged), atol=1e-5)


@pytest.mark.parametrize("unknown", [None, "int4", "INT8", ["nf4"]])
def test_another_storage_is_refused(tiny_llama, unknown):
    with pytest.raises(
        InputError, match=r"^quantization is .*, expected 'none' or 'int8' or 'nf4'"
    ):
        load_pretrained(tiny_llama, quantization=unknown)


def test_inputs_that_share_no_tile():
    with pytest.raises(InputError, match=r"layers\.q: has 40 inputs, expected a multiple of 16"):
        quantize(jnp.ones((1, 40, 4)), "nf4", name="layers.q")


def test_without_qwix_it_says_how_to_get_it(monkeypatch, tiny_llama):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(InputError, match=r"pip install 'loft-jax\[quantized\]'"):
        quantize_kernels(load_pretrained(tiny_llama), "int8")
