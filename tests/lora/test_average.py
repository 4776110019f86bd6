"""Sums and means of adapters against dense products, in NumPy's float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_jax import LoRAConfig, add_lora, average_adapters, lora_layers, sum_adapters
from loft_jax.errors import InputError
from loft_jax.lora.average import best_factors
from loft_jax.models.llama import Llama, LlamaConfig
from loft_jax.models.quantized import quantize_kernels

WEIGHTS = (1.0, 2.0, 3.0)


class Mixed(nnx.Module):
    """A layer of each kind: linear, of several axes, an einsum, an embedding, a stack."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(12, 7, rngs=rngs)
        self.general = nnx.LinearGeneral((3, 4), (2, 5), axis=(-2, -1), rngs=rngs)
        self.einsum = nnx.Einsum("bi,hio->bho", (3, 6, 5), rngs=rngs)
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.stack = nnx.vmap(lambda rngs: nnx.Linear(6, 5, rngs=rngs))(rngs.fork(split=4))


def adapted(base, seed, **options):
    model = add_lora(nnx.clone(base), LoRAConfig(**options), rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_a, layer.lora_b):
            factor.set_value(jnp.asarray(rng.normal(size=factor.shape), jnp.float32))
    return model


def products(model):
    """Each adapted layer's update of the weight, (stack, in, out) in float64."""
    found = {}
    for path, layer in lora_layers(model).items():
        axes, (a, b) = layer.lora_axes(layer), layer.lora_factors()
        own = axes.of_layers(layer.lora_numbers)
        rows = int(np.prod((*own.stack, *own.batch), dtype=int))
        a = np.asarray(a, np.float64).reshape(rows, axes.fan_in, -1)
        b = np.asarray(b, np.float64).reshape(rows, -1, axes.fan_out)
        some = layer.lora_scaling * a @ b
        if layer.lora_numbers is not None:
            every = np.zeros((*axes.stack, axes.fan_in, axes.fan_out))
            every[list(layer.lora_numbers)] = some
            some = every
        found[path] = some
    return found


def best(matrices, rank):
    u, sigma, vt = np.linalg.svd(matrices, full_matrices=False)
    return (u[..., :rank] * sigma[..., None, :rank]) @ vt[..., :rank, :]


@pytest.fixture(scope="module")
def three():
    base = Mixed(nnx.Rngs(0))
    return [
        adapted(base, 1, rank=2, alpha=5, target_modules=".*"),
        adapted(base, 2, rank=3, alpha=7, use_rslora=True, target_modules=".*"),
        adapted(base, 3, rank=2, init="balanced", target_modules="linear|general|einsum"),
    ]


@pytest.mark.parametrize("rank", [1, pytest.param(3, marks=pytest.mark.slow), None])
def test_every_product_is_the_best_approximation_of_the_mean(three, rank):
    found = products(average_adapters(three, WEIGHTS, rank=rank))
    given = [products(model) for model in three]
    assert set(found) == {"linear", "general", "einsum", "embed", "stack"}
    for path, product in found.items():
        dense = sum(w / 6 * some.get(path, 0) for w, some in zip(WEIGHTS, given, strict=True))
        expected = dense if rank is None else best(dense, rank)
        np.testing.assert_allclose(product, expected, atol=1e-5 * np.abs(dense).max())


def test_a_sum_takes_weights_of_any_sign(three):
    found = products(sum_adapters(three[:2], (1.5, -0.5)))
    first, second = map(products, three[:2])
    for path, product in found.items():
        dense = 1.5 * first[path] - 0.5 * second[path]
        np.testing.assert_allclose(product, dense, atol=1e-5 * np.abs(dense).max())


def test_adapters_on_some_layers_of_a_stack_count_as_zero_elsewhere():
    base = Mixed(nnx.Rngs(0))
    models = [
        adapted(base, seed, rank=2, target_modules=["stack"], layers=layers)
        for seed, layers in enumerate(([0], [0, 2]))
    ]
    mean = average_adapters(models)
    assert mean.stack.lora_numbers == (0, 2)
    expected = (products(models[0])["stack"] + products(models[1])["stack"]) / 2
    np.testing.assert_allclose(products(mean)["stack"], expected, atol=1e-5)
    whole = average_adapters([models[0], adapted(base, 9, rank=2, target_modules=["stack"])])
    assert whole.stack.lora_numbers is None


def test_models_are_not_changed_and_share_their_base(three):
    before = products(three[0])
    mean = average_adapters(three)
    assert mean.linear.kernel[...] is three[0].linear.kernel[...]
    for path, product in products(three[0]).items():
        np.testing.assert_array_equal(product, before[path])


def test_what_was_trained_whole_is_the_mean_of_arrays(three):
    models = [nnx.clone(model) for model in three[:2]]
    for value, model in enumerate(models):
        model.linear.bias.set_value(jnp.full(7, float(value)))
    np.testing.assert_allclose(average_adapters(models, (1, 3)).linear.bias[...], 0.75)
    with pytest.raises(InputError, match=r"sum to 2.*linear\.bias"):
        sum_adapters(models, (1, 1))


def test_clones_of_a_quantized_base_share_it():
    base = Llama(LlamaConfig(32, 16, 24, 2, 2, 1, 8), rngs=nnx.Rngs(0))
    quantize_kernels(base, "int8")
    first, second = (adapted(base, seed, rank=2, target_modules=["q_proj"]) for seed in (1, 2))
    mean = average_adapters([first, second], rank=4)
    for path, product in products(mean).items():
        expected = (products(first)[path] + products(second)[path]) / 2
        np.testing.assert_allclose(product, expected, atol=1e-5)


def test_one_adapter_is_its_own_mean(three):
    for path, product in products(average_adapters(three[:1], rank=2)).items():
        np.testing.assert_allclose(product, products(three[0])[path], atol=1e-5)


def test_directions_without_a_product_can_be_trained():
    base = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)))
    fresh = [add_lora(nnx.clone(base), LoRAConfig(2), rngs=nnx.Rngs(i)) for i in range(2)]
    layer = average_adapters(fresh, rank=2).layers[0]
    np.testing.assert_array_equal(layer.lora_b[...], 0)
    a = np.asarray(layer.lora_a[...])
    np.testing.assert_allclose(a.T @ a, np.eye(2), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(6, 9, 3), (9, 4, 7), (5, 5, 2), (1, 6, 2), (6, 1, 3)]),
    rank=st.integers(1, 8),
    low=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_best_factors(shape, rank, low, seed):
    m, n, k = shape
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(m, k)), rng.normal(size=(k, n))
    if low:
        a[:, 1:] = a[:, :1]
    left, right = best_factors(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), rank)
    assert left.shape == (m, min(rank, m, n, k))
    expected = best(a @ b, rank)
    np.testing.assert_allclose(left @ right, expected, atol=2e-5 * np.abs(a @ b).max())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"weights": (1, 2)}, {}, "2 weights for 3 adapters"),
        ({"weights": (0, 0, 0)}, {}, "not all 0"),
        ({"weights": (1, -1, 1)}, {}, "0 or more"),
        ({"rank": 0}, {}, "rank is 0"),
        ({}, {"use_dora": True}, "model 2: linear has DoRA"),
    ],
)
def test_mistakes_are_named(three, arguments, options, message):
    models = three
    if options:
        last = adapted(Mixed(nnx.Rngs(0)), 3, rank=2, target_modules=["linear"], **options)
        models = [*three[:2], last]
    with pytest.raises(InputError, match=message):
        average_adapters(models, **arguments)


def test_models_without_an_adapter_or_of_another_base(three):
    with pytest.raises(InputError, match="model 1 has no LoRA"):
        average_adapters([three[0], Mixed(nnx.Rngs(0))])
    for combine in (average_adapters, lambda none: sum_adapters(none, [])):
        with pytest.raises(InputError, match=r"no (adapters|models) are given"):
            combine([])
    headed = nnx.clone(three[0])
    headed.head = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    for models in ([three[0], headed], [headed, three[0]]):
        with pytest.raises(InputError, match=r"head\.\w+: differs between models, or some lack it"):
            average_adapters(models)
    other = adapted(nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0))), 1, rank=2)
    with pytest.raises(InputError, match="of one base"):
        average_adapters([three[0], other])
