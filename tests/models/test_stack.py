import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loft_jax.lora import LoRAConfig, add_lora
from loft_jax.models.stack import PerLayer, run_layers, stack_layers


class Masked(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x, mask, cache, index):
        return x + self.linear(x) * mask, cache


def test_layers_of_two_kinds_run_in_one_scan():
    layers = stack_layers(4, Masked, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    masks = jnp.array([1.0, 1.0, 0.0, 1.0]), jnp.array([0.5, 0.0, 1.0, 1.0])
    kinds = [1, 0, 0, 1]
    program = jax.make_jaxpr(lambda x: run_layers(layers, x, masks[0], remat="dots")[0])(x)
    mixed = jax.make_jaxpr(
        lambda x: run_layers(layers, x, PerLayer.of(kinds, *masks), remat="dots")[0]
    )(x)
    assert str(mixed).count("scan[") == str(program).count("scan[") == 1

    found, _ = run_layers(layers, x, PerLayer.of(kinds, *masks), remat="dots")
    for layer, kind in enumerate(kinds):
        kernel, bias = (p[...][layer] for p in (layers.linear.kernel, layers.linear.bias))
        x = x + (x @ kernel + bias) * masks[kind]
    np.testing.assert_allclose(found, x, atol=1e-6)


class Linear(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 24, rngs=rngs)

    def __call__(self, x, cache, index):
        return x + jnp.sin(self.linear(x))[..., :16], cache


@pytest.mark.parametrize(("rank", "kept"), [(2, 1), (8, 2)])
def test_the_product_with_a_factor_is_computed_again_if_its_rank_is_low(rank, kept):
    """Of a layer with an adapter, the product with the weight alone is kept, not their sum too."""
    layers = stack_layers(3, Linear, nnx.Rngs(0))
    add_lora(layers, LoRAConfig(rank=rank, target_modules="linear"), rngs=nnx.Rngs(1))
    graphdef, factors, rest = nnx.split(layers, nnx.LoRAParam, ...)
    x = jnp.ones((2, 5, 16))

    def total(factors):
        return run_layers(nnx.merge(graphdef, factors, rest), x, remat="dots")[0].sum()

    program = jax.make_jaxpr(jax.grad(total))(factors)
    forward = re.findall(r"scan\[", str(program))
    assert len(forward) == 2
    results = str(program).partition("= scan[")[0].splitlines()[-1]
    assert len(re.findall(r"f32\[3,(?:10|2,5),24\]", results)) == kept
