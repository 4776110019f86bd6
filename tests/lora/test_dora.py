"""DoRA against PEFT, its norms against the weight written out, and what it leaves behind."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from loft_jax.errors import InputError
from loft_jax.lora import LoRAConfig, add_lora, lora_layers, merge_lora, remove_lora
from loft_jax.lora.dora import column_norms
from loft_jax.models.llama import Llama, LlamaConfig
from loft_jax.models.quantized import quantize_kernels

from .models import Doubled, Stacked

TOKENS = jnp.arange(10).reshape(2, 5)


def linear(use_bias=True, **fields):
    layer = nnx.Linear(5, 7, use_bias=use_bias, rngs=nnx.Rngs(0))
    if use_bias:
        layer.bias[...] = jnp.arange(7.0)
    return add_lora(layer, LoRAConfig(2, use_dora=True, **fields), rngs=nnx.Rngs(1))


def randomize(model, seed=3):
    rng = np.random.default_rng(seed)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_a, layer.lora_b):
            factor[...] = jnp.asarray(rng.normal(size=factor.shape), factor.dtype)
        layer.lora_magnitude[...] *= jnp.asarray(rng.uniform(0.5, 1.5, layer.lora_magnitude.shape))
    return model


@nnx.jit
def run(model, tokens):
    return model(tokens)


class Mask(torch.nn.Module):
    """A dropout of PEFT's layer that drops what ours dropped."""

    def __init__(self, mask):
        super().__init__()
        self.mask = torch.tensor(np.asarray(mask))

    def forward(self, x):
        return x * self.mask


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("use_bias", "dropout", "use_rslora"),
    [
        pytest.param(False, 0.0, False, marks=pytest.mark.slow),
        (True, 0.0, True),
        (True, 0.5, False),
    ],
)
def test_output_and_gradients_are_pefts(use_bias, dropout, use_rslora):
    layer = randomize(linear(use_bias, alpha=3.0, dropout=dropout, use_rslora=use_rslora))
    x, weights = jax.random.normal(jax.random.key(1), (2, 3, 4, 5))[0], jnp.arange(84.0)
    mask = jnp.ones_like(x)
    if dropout:
        mask = copy.deepcopy(layer.lora_dropout)(jnp.ones_like(x))

    def loss(layer):
        y = layer(x)
        return jnp.sum(y.ravel() * weights), y

    wrt = nnx.DiffState(0, nnx.LoRAParam)
    (_, y), grads = nnx.value_and_grad(loss, argnums=wrt, has_aux=True)(layer)

    def tensor(array):
        return torch.tensor(np.asarray(array))

    base = torch.nn.Linear(5, 7, bias=use_bias)
    base.weight.data = tensor(layer.kernel[...]).T.contiguous()
    if use_bias:
        base.bias.data = tensor(layer.bias[...])
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["0"],
        lora_dropout=dropout,
        use_dora=True,
        use_rslora=use_rslora,
    )
    theirs = get_peft_model(torch.nn.Sequential(base), config).train().base_model.model[0]
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    magnitude = theirs.lora_magnitude_vector["default"].weight
    a.data, b.data = tensor(layer.lora_a[...]).T, tensor(layer.lora_b[...]).T
    magnitude.data = tensor(layer.lora_magnitude[...])
    if dropout:
        theirs.lora_dropout["default"] = Mask(mask)
    out = theirs(tensor(x))
    (out.flatten() * tensor(weights)).sum().backward()

    def close(ours, expected):
        expected = expected.detach().numpy()
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())

    close(y, out)
    close(grads.lora_a[...], a.grad.T)
    close(grads.lora_b[...], b.grad.T)
    close(grads.lora_magnitude[...], magnitude.grad)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(1, 1, 1), (9, 3, 2), (3, 8, 4)]),  # each is compiled
    st.integers(0, 2**32),
    st.floats(0.01, 100.0),
    st.sampled_from(["random", "cancelling", "zero"]),
)
def test_norms_are_those_of_the_weight_written_out(sizes, seed, scaling, kind):
    fan_in, fan_out, rank = sizes
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(fan_in, rank)), rng.normal(size=(rank, fan_out))
    w = {"random": rng.normal(size=(fan_in, fan_out)), "cancelling": -scaling * a @ b, "zero": 0.0}
    w = np.broadcast_to(w[kind], (fan_in, fan_out)).astype(np.float32)
    a, b = a.astype(np.float32), b.astype(np.float32)
    norms = np.asarray(jax.jit(column_norms)(w, a, b, scaling))
    exact = np.linalg.norm(np.float64(w) + scaling * (np.float64(a) @ b), axis=0)
    size = np.linalg.norm(w, axis=0) + scaling * np.linalg.norm(np.abs(a) @ np.abs(b), axis=0)
    np.testing.assert_array_less(np.abs(norms**2 - exact**2), 1e-5 * size**2 + 1e-30)


@pytest.mark.parametrize(
    "param_dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
def test_a_stack_starts_as_the_base(param_dtype):
    base = Stacked(rngs=nnx.Rngs(0), param_dtype=param_dtype)
    model = Stacked(rngs=nnx.Rngs(0), param_dtype=param_dtype)
    add_lora(model, LoRAConfig(2, use_dora=True), rngs=nnx.Rngs(1))
    layer = model.layers.up_proj
    assert isinstance(layer.lora_magnitude, nnx.LoRAParam)
    assert (layer.lora_magnitude.shape, layer.lora_magnitude.dtype) == ((3, 12), jnp.float32)
    kernel = np.float32(layer.kernel[...])
    np.testing.assert_allclose(layer.lora_magnitude[...], np.linalg.norm(kernel, axis=1), rtol=1e-6)
    np.testing.assert_allclose(run(model, TOKENS), run(base, TOKENS), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "init", [pytest.param("kaiming_uniform", marks=pytest.mark.slow), "balanced"]
)
def test_a_stack_merges_layer_by_layer_and_is_restored_to_the_bit(init):
    def model():
        config = LoRAConfig(2, alpha=3.0, use_dora=True, init=init)
        return randomize(add_lora(Stacked(rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1)))

    base, adapted = Stacked(rngs=nnx.Rngs(0)), run(model(), TOKENS)
    assert np.abs(adapted - run(base, TOKENS)).max() > 0.1
    layer, merged = model().layers.up_proj, merge_lora(model())
    np.testing.assert_allclose(run(merged, TOKENS), adapted, rtol=1e-4, atol=1e-5)
    assert nnx.split(merged)[0] == nnx.split(base)[0]
    a, b = map(np.float64, layer.lora_factors())
    for i in range(3):
        summed = np.float64(layer.kernel[i]) + 1.5 * a[i] @ b[i]
        expected = summed * (np.float64(layer.lora_magnitude[i]) / np.linalg.norm(summed, axis=0))
        np.testing.assert_allclose(merged.layers.up_proj.kernel[i], expected, rtol=1e-5, atol=1e-6)
    (graphdef, state), (base_graphdef, expected) = nnx.split(remove_lora(model())), nnx.split(base)
    assert graphdef == base_graphdef
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(state), nnx.to_pure_dict(expected))


@pytest.mark.slow
def test_on_quantized_kernels_of_a_llama():
    sizes = LlamaConfig(16, 16, 32, 2, 2, 1, 8, initializer_range=0.3)
    model = Llama(sizes, rngs=nnx.Rngs(0))
    quantize_kernels(model, "nf4")
    expected = run(model, TOKENS)
    config = LoRAConfig(2, use_dora=True, target_modules=["q_proj", "down_proj"])
    add_lora(model, config, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(run(model, TOKENS), expected, rtol=1e-4, atol=1e-4)
    adapted = run(randomize(model), TOKENS)
    assert np.abs(adapted - expected).max() > 0.1
    np.testing.assert_allclose(run(merge_lora(model), TOKENS), adapted, rtol=1e-4, atol=1e-4)


def test_a_column_of_zeros_stays_one_without_nan():
    layer = nnx.Linear(5, 7, rngs=nnx.Rngs(0))
    layer.kernel[...] = layer.kernel[...].at[:, 2].set(0.0)
    expected = layer(jnp.ones((1, 5)))
    add_lora(layer, LoRAConfig(2, use_dora=True), rngs=nnx.Rngs(1))
    np.testing.assert_allclose(layer(jnp.ones((1, 5))), expected, rtol=1e-6)
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda layer: layer(jnp.ones((1, 5))).sum(), argnums=wrt)(layer)
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))
    assert np.isfinite(merge_lora(layer).kernel[...]).all()


def test_a_subclass_a_bfloat16_layer_and_explicit_sharding():
    config, x = LoRAConfig(2, use_dora=True), jax.random.normal(jax.random.key(0), (2, 4))
    layer = randomize(add_lora(Doubled(4, 6, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1)))
    adapted = layer(x)
    np.testing.assert_allclose(merge_lora(layer)(x), adapted, rtol=1e-5, atol=1e-6)
    narrow = nnx.Linear(4, 6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert randomize(add_lora(narrow, config, rngs=nnx.Rngs(1)))(x).dtype == jnp.bfloat16
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        layer = randomize(linear())
        x, spec = jnp.ones((2, 5)), jax.sharding.PartitionSpec("data", None)
        np.testing.assert_allclose(layer(x, out_sharding=spec), layer(x), rtol=1e-6)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (lambda: nnx.Embed(4, 6, rngs=nnx.Rngs(0)), "Embed"),
        (lambda: nnx.LinearGeneral(4, 6, rngs=nnx.Rngs(0)), "LinearGeneral"),
        (lambda: nnx.Einsum("ab,bc->ac", (4, 6), rngs=nnx.Rngs(0)), "Einsum"),
    ],
)
def test_other_layers_are_refused_by_path(layer, kind):
    config = LoRAConfig(2, target_modules=r".*\d", use_dora=True)
    message = rf"layers\.0: use_dora is for nnx\.Linear, and this is a {kind}"
    with pytest.raises(InputError, match=message):
        add_lora(nnx.Sequential(layer()), config, rngs=nnx.Rngs(1))


def test_magnitudes_are_not_rounded_with_the_factors():
    base = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    expected = base(x)
    config = LoRAConfig(rank=2, use_dora=True, dtype=jnp.bfloat16)
    model = add_lora(base, config, rngs=nnx.Rngs(1))
    assert (model.lora_a.dtype, model.lora_magnitude.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(model(x), expected, atol=1e-6)
