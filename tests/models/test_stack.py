import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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
