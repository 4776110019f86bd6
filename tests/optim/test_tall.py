"""Products layer by layer, as TPUs make them, are the products."""

import jax
import numpy as np

from loft_jax.optim.tall import _layer_by_layer, matmul


def test_products_layer_by_layer_are_the_products():
    x = jax.random.normal(jax.random.key(0), (2, 24, 5, 4))
    y = jax.random.normal(jax.random.key(1), (2, 24, 4, 300))
    expected = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    for product in (_layer_by_layer, matmul):
        np.testing.assert_allclose(product(x, y), expected, rtol=1e-5, atol=1e-6)
    for program in (_layer_by_layer, matmul):
        assert "f32[2,5,300]" in str(jax.make_jaxpr(program)(x, y))  # of one layer
