import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loft_jax.optim import second_moment
from loft_jax.optim.second_moment import adam_direction, symmetric_product, symmetric_square


def pack(p):
    """The packed half, by its definition."""
    r = p.shape[-1]
    return np.stack(
        [p[..., a, b] * (1 if a == b else np.sqrt(2)) for a in range(r) for b in range(a, r)], -1
    )


@pytest.mark.parametrize("r", [1, 2, 5])
def test_packed_algebra(r):
    rng = np.random.default_rng(r)
    x, y, z = rng.normal(size=(3, 4, r))
    c = rng.normal(size=(r, r))
    half = (x[:, :, None] * y[:, None] + y[:, :, None] * x[:, None]) / 2
    whole = pack(half)
    with jax.enable_x64(True):
        product = np.asarray(symmetric_product(jnp.asarray(x), jnp.asarray(y)))
        features = np.asarray(symmetric_product(jnp.asarray(z), jnp.asarray(z)))
        square = np.asarray(symmetric_square(jnp.asarray(c)))
    np.testing.assert_allclose(product, whole)
    np.testing.assert_allclose(whole @ features.T, np.einsum("ja,iab,jb->ij", z, half, z))
    np.testing.assert_allclose(whole @ square, pack(c.T @ half @ c))


@pytest.mark.parametrize(("stack", "m", "n"), [(1, 7, 5), (3, 23, 11)])
@pytest.mark.parametrize("tile", [1 << 18, 40, 1])
def test_direction_is_the_dense_one_in_any_tiles(stack, m, n, tile, monkeypatch):
    monkeypatch.setattr(second_moment, "_TILE_ELEMENTS", tile)
    r, eps, limit = 3, 1e-3, 0.9
    rng = np.random.default_rng(0)
    mu, root = rng.normal(size=(stack, m, r)), rng.normal(size=(stack, m, r, r))
    p = root @ np.swapaxes(root, -1, -2)
    q = np.linalg.qr(rng.normal(size=(stack, n, r)))[0]
    d = np.einsum("sia,sja->sij", mu, q)
    d = d / (np.sqrt(np.einsum("sja,siab,sjb->sij", q, p, q)) + eps)
    assert (np.abs(d) > limit).any()
    expected = np.clip(d, -limit, limit) @ q
    with jax.enable_x64(True):
        ours = adam_direction(*(jnp.asarray(x) for x in (mu, pack(p), q)), eps, limit)
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12)
