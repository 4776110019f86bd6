"""Packed halves of symmetric matrices against whole ones in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loft_jax.optim.linear_algebra import FactorMatrix
from loft_jax.optim.packed_matrices import congruence, symmetric_product, symmetric_squares
from tests.optim.problems import pack


@pytest.mark.parametrize("r", [1, pytest.param(2, marks=pytest.mark.slow), 5, 50])
def test_packed_algebra(r):
    rng = np.random.default_rng(r)
    x, y = rng.normal(size=(2, 3, 4, r))
    z = rng.normal(size=(4, r))
    c = rng.normal(size=(r, r))
    half = (x[..., :, None] * y[..., None, :] + y[..., :, None] * x[..., None, :]) / 2
    whole = pack(half)
    with jax.enable_x64(True):
        product = np.asarray(symmetric_product(jnp.asarray(x), jnp.asarray(y)))
        features = np.asarray(symmetric_squares(FactorMatrix(jnp.asarray(z))).array)
        wide = symmetric_squares(FactorMatrix(jnp.asarray(z.T), rank_last=False)).array
        moved = congruence(jnp.asarray(c))(FactorMatrix(jnp.asarray(whole))).array
        columns = jnp.asarray(whole.transpose(0, 2, 1))
        moved_columns = congruence(jnp.asarray(c))(FactorMatrix(columns, rank_last=False)).array
    np.testing.assert_allclose(product, whole)
    np.testing.assert_array_equal(wide.T, features)
    np.testing.assert_allclose(whole @ features.T, np.einsum("ja,siab,jb->sij", z, half, z))
    expected = pack(c.T @ half @ c)
    np.testing.assert_allclose(moved, expected, atol=1e-12)
    np.testing.assert_allclose(moved_columns, expected.transpose(0, 2, 1), atol=1e-12)
