"""Starts with a product that is not zero: PiSSA's and the balanced one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loft_jax import find_pairs
from loft_jax.errors import InputError
from loft_jax.lora import LoRAConfig, LoRAStart, add_lora, lora_layers, merge_lora, remove_lora
from loft_jax.models.llama import Llama, LlamaConfig
from loft_jax.models.quantized import quantize_kernels
from loft_jax.training.config import MeshConfig
from loft_jax.training.mesh import make_mesh
from loft_jax.training.partition import split_model
from loft_jax.training.shardings import parameter_spec

from .models import Stacked

TOKENS = jnp.arange(10).reshape(2, 5)
STARTS = pytest.mark.parametrize("init", ["pissa", "balanced"])
# Layers of more axes, the einsum of A, B to their kernels, and the matrices that kernels are.
KINDS = {
    "batched": (
        lambda rngs: nnx.LinearGeneral(4, (2, 3), batch_axis={0: 5}, rngs=rngs),
        (5, 2, 4),
        "xar,xrcd->xacd",
        lambda kernel: kernel.reshape(5, 4, 6),
    ),
    "einsum_shared_axis": (
        lambda rngs: nnx.Einsum("bthd,dhf->bthf", (4, 3, 5), rngs=rngs),
        (2, 3, 3, 4),
        "hdr,hrf->dhf",
        lambda kernel: kernel.transpose(1, 0, 2),
    ),
    "einsum_two_in": (
        lambda rngs: nnx.Einsum("bthd,hde->bte", (3, 4, 6), rngs=rngs),
        (2, 3, 3, 4),
        "hdr,re->hde",
        lambda kernel: kernel.reshape(1, 12, 6),
    ),
}


def llama():
    sizes = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
    )
    return Llama(sizes, rngs=nnx.Rngs(0))


def randomize(model, seed=3):
    rng = np.random.default_rng(seed)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_a, layer.lora_b):
            factor[...] = jnp.asarray(rng.normal(size=factor.shape), factor.dtype)
    return model


@nnx.jit
def run(model, x):
    return model(x)


def assert_same_state(model, expected):
    (graphdef, state), (expected_graphdef, expected) = nnx.split(model), nnx.split(expected)
    assert graphdef == expected_graphdef
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(state), nnx.to_pure_dict(expected))


@STARTS
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_more_axes(init, kind):
    make, shape, product, matrices = KINDS[kind]
    base, x = make(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), shape)
    config = LoRAConfig(2, alpha=6.0, init=init, use_rslora=True)
    layer = add_lora(make(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    scaling = 6 / 2**0.5
    a0, b0 = (np.float64(v[...]) for v in (layer.lora_start_a, layer.lora_start_b))
    assert min(np.abs(a0).min(), np.abs(b0).min()) > 0
    np.testing.assert_array_equal(layer(x), base(x))
    np.testing.assert_array_equal(run(layer, x), run(base, x))
    if init == "balanced":
        axes = layer.lora_axes(layer)
        assert 0.5 < np.abs(a0).max() * axes.fan_in**0.5 <= 1
        assert 0.5 < np.abs(b0).max() * axes.fan_out**0.5 <= 1
    else:
        u, sigma, vt = np.linalg.svd(matrices(np.float64(base.kernel[...])), full_matrices=False)
        start = matrices(scaling * np.einsum(product, a0, b0))
        expected = np.einsum("bir,br,bro->bio", u[..., :2], sigma[:, :2], vt[:, :2])
        np.testing.assert_allclose(start, expected, atol=1e-5)
    randomize(layer)
    a, b = (np.float64(v[...]) for v in (layer.lora_a, layer.lora_b))
    update = scaling * (np.einsum(product, a, b) - np.einsum(product, a0, b0))
    expected = np.float64(base.kernel[...]) + update
    adapted = layer(x)
    merged = merge_lora(layer)
    np.testing.assert_allclose(merged.kernel[...], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged(x), adapted, rtol=1e-4, atol=1e-4)
    assert nnx.split(merged)[0] == nnx.split(base)[0]


def test_pissa_is_the_truncated_decomposition_of_every_layer_as_pefts():
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoRAConfig(3, alpha=6.0, init="pissa", target_modules="up_proj")
    layer = add_lora(llama(), config, rngs=nnx.Rngs(1)).layers.mlp.up_proj
    for i in range(2):
        kernel, a, b = (np.float64(v[i]) for v in (layer.kernel, layer.lora_a, layer.lora_b))
        u, sigma, vt = np.linalg.svd(kernel)
        np.testing.assert_allclose(2 * a @ b, (u[:, :3] * sigma[:3]) @ vt[:3], atol=1e-5)
        np.testing.assert_allclose(a.T @ a, np.diag(sigma[:3] / 2), atol=1e-5)
        np.testing.assert_allclose(b @ b.T, np.diag(sigma[:3] / 2), atol=1e-5)
        base = torch.nn.Linear(16, 32, bias=False)
        base.weight.data = torch.tensor(np.array(layer.kernel[i])).T.contiguous()
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa")
        theirs = get_peft_model(torch.nn.Sequential(base), config).base_model.model[0]
        their_a, their_b = (
            factors["default"].weight.detach().numpy() for factors in (theirs.lora_A, theirs.lora_B)
        )
        signs = np.sign(np.sum(their_a.T * a, axis=0))
        np.testing.assert_allclose(a * signs, their_a.T, atol=1e-5)
        np.testing.assert_allclose(b * signs[:, None], their_b.T, atol=1e-5)


def test_the_balanced_start_has_equal_gram_matrices():
    layer = nnx.Linear(2000, 3000, rngs=nnx.Rngs(0))
    add_lora(layer, LoRAConfig(4, init="balanced"), rngs=nnx.Rngs(1))
    a, b = np.asarray(layer.lora_a[...]), np.asarray(layer.lora_b[...])
    np.testing.assert_allclose(a.T @ a, np.eye(4) / 3, atol=0.03)
    np.testing.assert_allclose(b @ b.T, np.eye(4) / 3, atol=0.03)
    assert np.abs(np.corrcoef(a[:, 0], b[0, :2000])[0, 1]) < 0.1  # drawn apart


@pytest.mark.parametrize(
    ("init", "quantization"),
    [
        pytest.param("pissa", "nf4", marks=pytest.mark.slow),
        ("balanced", "none"),
    ],
)
def test_a_llama_starts_as_it_was_trains_and_is_restored_to_the_bit(init, quantization):
    def base():
        model = llama()
        quantize_kernels(model, quantization)
        return model

    config = LoRAConfig(2, init=init, dropout=0.5, target_modules=["q_proj", "down_proj"])
    model = add_lora(base(), config, rngs=nnx.Rngs(1))
    expected = run(base(), TOKENS)
    np.testing.assert_array_equal(run(model, TOKENS), expected)  # whatever dropout drops
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.LoRAParam)
    starts = [np.asarray(v[...]) for _, v in nnx.to_flat_state(nnx.state(model, LoRAStart))]
    assert len(starts) == 4

    @nnx.jit
    def gradients(model):
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        return nnx.grad(lambda model: (model(TOKENS) ** 2).mean(), argnums=wrt)(model)

    grads = gradients(model)
    assert all(np.abs(grad).reshape(2, -1).max(1).min() > 0 for grad in jax.tree.leaves(grads))
    optimizer.update(model, grads)
    for before, (_, after) in zip(
        starts, nnx.to_flat_state(nnx.state(model, LoRAStart)), strict=True
    ):
        np.testing.assert_array_equal(before, after[...])
    model.eval()
    assert np.abs(run(model, TOKENS) - expected).max() > 1e-5
    assert_same_state(remove_lora(model), base())


@STARTS
def test_gradients_are_those_of_the_two_products(init):
    layer = randomize(
        add_lora(
            nnx.Linear(5, 7, rngs=nnx.Rngs(0)),
            LoRAConfig(2, alpha=3.0, init=init),
            rngs=nnx.Rngs(1),
        )
    )
    x, weights = jnp.linspace(-1, 1, 15).reshape(3, 5), jnp.linspace(0, 2, 21).reshape(3, 7)
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda layer: jnp.sum(layer(x) * weights), argnums=wrt)(layer)
    full = 1.5 * np.float64(x).T @ np.float64(weights)  # of A B, times the scaling
    np.testing.assert_allclose(grads.lora_a[...], full @ layer.lora_b[...].T, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(grads.lora_b[...], layer.lora_a[...].T @ full, rtol=2e-5, atol=1e-5)


@STARTS
def test_a_small_update_is_not_lost_in_bfloat16(init):
    """As it would be in the difference of two products that are rounded first."""
    layer = nnx.Linear(64, 48, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.kernel[...] *= 100
    add_lora(layer, LoRAConfig(4, init=init), rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (8, 64)).astype(jnp.bfloat16)
    b0 = layer.lora_b[...]
    layer.lora_b[...] = b0 + 1e-4 * jax.random.normal(jax.random.key(1), b0.shape)
    exact = np.float64(x) @ (np.float64(layer.lora_a[...]) @ np.float64(layer.lora_b[...] - b0))
    a, b = layer.lora_factors()
    update = np.float64(x @ a.astype(x.dtype) @ b.astype(x.dtype))
    assert np.linalg.norm(update - exact) < 0.02 * np.linalg.norm(exact)


@STARTS
def test_a_stack_run_by_a_scan_merges_into_what_it_computed(init):
    config = LoRAConfig(2, alpha=3.0, init=init, dropout=0.5)
    model = add_lora(Stacked(rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    assert model.layers.up_proj.lora_start_b.shape == (3, 2, 12)
    a = np.asarray(model.layers.up_proj.lora_start_a[...])
    assert all(np.abs(a[i] - a[j]).min() > 0 for i, j in ((0, 1), (0, 2), (1, 2)))
    np.testing.assert_array_equal(run(model, TOKENS), run(Stacked(rngs=nnx.Rngs(0)), TOKENS))
    randomize(model)
    model.eval()
    adapted = run(model, TOKENS)
    merged = merge_lora(model)
    np.testing.assert_allclose(run(merged, TOKENS), adapted, rtol=1e-4, atol=1e-4)
    assert nnx.split(merged)[0] == nnx.split(Stacked(rngs=nnx.Rngs(0)))[0]


@pytest.mark.parametrize("fields", [{"init": "pissa"}, {"init": "balanced", "use_dora": True}])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_parts_of_a_run_and_how_they_lie_on_a_mesh(fields, quantization):
    def made():
        model = llama()
        quantize_kernels(model, quantization)
        return add_lora(model, LoRAConfig(2, **fields), rngs=nnx.Rngs(1))

    model = nnx.eval_shape(made)
    parts = split_model(model, nnx.LoRAParam)
    q_proj, frozen = (p["layers"]["self_attn"]["q_proj"] for p in (parts.params, parts.frozen))
    magnitudes = {"lora_magnitude"} if "use_dora" in fields else set()
    assert set(q_proj) == {"lora_a", "lora_b", *magnitudes}
    assert set(frozen) == {"kernel", "lora_start_a", "lora_start_b"}
    pairs = find_pairs(parts.params)
    assert {pair.path.replace("/", ".") for pair in pairs} == set(lora_layers(model))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    for module, out in (("self_attn.q_proj", "tensor"), ("mlp.down_proj", "fsdp")):
        layer = lora_layers(model)[f"layers.{module}"]

        def spec(name, module=module, layer=layer):
            path = f"layers.{module}.{name}"
            return parameter_spec(path, getattr(layer, name).shape, model.table, mesh)

        for factor in "ab":
            assert spec(f"lora_start_{factor}") == spec(f"lora_{factor}")
            assert any(spec(f"lora_{factor}"))
        if magnitudes:
            assert layer.lora_magnitude.shape == (2, layer.out_features)
            assert spec("lora_magnitude") == jax.sharding.PartitionSpec(None, out)


@STARTS
def test_an_embedding_is_refused_by_path(init):
    config = LoRAConfig(2, target_modules=["up_proj", "embed"], init=init)
    model = Stacked(rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=rf"embed: init '{init}' is for linear layers.* Embed"):
        add_lora(model, config, rngs=nnx.Rngs(1))
    assert lora_layers(model) == {}
