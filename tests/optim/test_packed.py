import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loft_jax.optim.packed import congruent, symmetric_product, symmetric_squares
from loft_jax.optim.tall import Tall


def pack(p):
    """The packed half, by its definition."""
    r = p.shape[-1]
    return np.stack(
        [p[..., a, b] * (1 if a == b else np.sqrt(2)) for a in range(r) for b in range(a, r)], -1
    )


@pytest.mark.parametrize("r", [1, 2, 5, 50])
def test_packed_algebra(r):
    rng = np.random.default_rng(r)
    x, y = rng.normal(size=(2, 3, 4, r))
    z = rng.normal(size=(4, r))
    c = rng.normal(size=(r, r))
    half = (x[..., :, None] * y[..., None, :] + y[..., :, None] * x[..., None, :]) / 2
    whole = pack(half)
    with jax.enable_x64(True):
        product = np.asarray(symmetric_product(jnp.asarray(x), jnp.asarray(y)))
        features = np.asarray(symmetric_squares(Tall(jnp.asarray(z))).array)
        wide = symmetric_squares(Tall(jnp.asarray(z.T), rank_last=False)).array
        moved = congruent(Tall(jnp.asarray(whole)), jnp.asarray(c)).array
        columns = jnp.asarray(whole.transpose(0, 2, 1))
        moved_columns = congruent(Tall(columns, rank_last=False), jnp.asarray(c)).array
    np.testing.assert_allclose(product, whole)
    np.testing.assert_array_equal(wide.T, features)
    np.testing.assert_allclose(whole @ features.T, np.einsum("ja,siab,jb->sij", z, half, z))
    expected = pack(c.T @ half @ c)
    np.testing.assert_allclose(moved, expected, atol=1e-12)
    np.testing.assert_allclose(moved_columns, expected.transpose(0, 2, 1), atol=1e-12)
