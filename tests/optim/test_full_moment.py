"""The exact second moment against whole matrices in NumPy: packed halves, tiles, bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loft_jax.optim import full_moment
from loft_jax.optim.full_moment import FullMoment
from loft_jax.optim.linear_algebra import FactorMatrix, orthonormal_basis
from loft_jax.optim.pairs import find_pairs, group_pairs
from loft_jax.optim.second_moments import AdamStep, ProjectedGradient, SecondMomentState
from tests.optim.problems import pack


def layers_of_pairs(batch, stack, m, n, r, seed=0):
    """Equal pairs of stacked layers, apart, as one group; and their factors in NumPy."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(batch, stack, m, r)), rng.normal(size=(batch, stack, r, n))
    params = {
        str(i): {"lora_a": jnp.asarray(a[i]), "lora_b": jnp.asarray(b[i])} for i in range(batch)
    }
    [pairs] = group_pairs(find_pairs(params), jax.tree.leaves(params))
    return pairs, a, b


def laid_out(x, rank_last):
    return jnp.asarray(x if rank_last else np.swapaxes(x, -1, -2))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("batch", "stack", "m", "n", "tile", "role"),
    [
        # Daily each size in the least and the largest tiles, any two together, and two layers.
        pytest.param(
            *size, tile, role, marks=() if ((i + j + k) % 2 and j != 2) or i == j == 2 else SLOW
        )
        for i, size in enumerate([(1, 1, 7, 5), (2, 3, 24, 18), (1, 20, 6, 4)])
        for j, tile in enumerate([1 << 18, 1, 60])
        for k, role in enumerate("ab")
    ],
)
def test_is_the_dense_one_in_any_tiles(batch, stack, m, n, tile, role, platform, monkeypatch):
    """One update and one direction against whole matrices in NumPy, float64."""

    def chosen(*args, default, **ways):
        return ways.get(platform, default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    # Not the cached programs of the platform and the tiles that were traced first.
    monkeypatch.setattr(full_moment, "_by_platform", full_moment._by_platform.__wrapped__)
    monkeypatch.setattr(full_moment, "_TILE_ELEMENTS", tile)
    monkeypatch.setattr(full_moment, "_GPU_TILE_ELEMENTS", tile)
    monkeypatch.setattr(full_moment, "_MOST_TILES_OF_STATE", 1000)
    monkeypatch.setattr(full_moment, "_MOST_TILES_OF_WEIGHT", 1000)
    monkeypatch.setattr(full_moment, "_FEWEST_COLUMNS", 1)
    r, eps, limit, b2, correction = 3, 1e-3, 0.3, 0.7, 0.5
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        pairs, a, b = layers_of_pairs(batch, stack, m, n, r)
        own, partner = (a, np.swapaxes(b, 2, 3)) if role == "a" else (np.swapaxes(b, 2, 3), a)
        factors, _ = pairs.sides()[role == "b"]
        by_rows = role == "a"
        rows = own.shape[2]
        mu, c = rng.normal(size=(2, batch, stack, rows, r))
        root = rng.normal(size=(batch, stack, rows, r, r))
        p = root @ np.swapaxes(root, -1, -2)
        change = rng.normal(size=(batch, stack, r, r))
        of = FactorMatrix(laid_out(partner, not by_rows), not by_rows)
        basis = orthonormal_basis.__wrapped__(of)

        state = SecondMomentState([laid_out(x, by_rows) for x in pack(p)], [])
        gradient = FactorMatrix(laid_out(c, by_rows), by_rows)
        state = FullMoment().update(
            factors,
            state,
            ProjectedGradient(gradient, gradient, jnp.asarray(change)),
            b2,
            jax.random.key(0),
        )
        step = AdamStep(FactorMatrix(laid_out(mu, by_rows), by_rows), basis, correction, eps, limit)
        x = FullMoment().direction(factors, state, step).tall()

    p = b2 * np.einsum("gska,gsikl,gslb->gsiab", change, p, change)
    p += (1 - b2) * c[..., :, None] * c[..., None, :]
    for ours, expected in zip(state.rows, pack(p), strict=True):
        np.testing.assert_allclose(laid_out(ours, by_rows), expected, rtol=1e-10, atol=1e-12)
    q = np.asarray(basis.q.tall())
    d = np.einsum("gsia,gsja->gsij", mu, q)
    d = d / (np.sqrt(np.einsum("gsja,gsiab,gsjb->gsij", q, p, q) / correction) + eps)
    assert (np.abs(d) > limit).any()
    d = np.clip(d, -limit, limit)
    np.testing.assert_allclose(
        np.asarray(x) @ np.swapaxes(partner, 2, 3), d @ q @ np.swapaxes(q, 2, 3), atol=1e-10
    )


def test_direction_stays_within_adams_bound():
    """The quadratic form rounds to a wrongly tiny v: the direction is bounded all the same."""
    pairs, _, b = layers_of_pairs(1, 1, 6, 40, 4)
    basis = orthonormal_basis(FactorMatrix(jnp.asarray(b, jnp.float32), rank_last=False))
    mu = FactorMatrix(jnp.asarray(np.random.default_rng(2).normal(size=(1, 1, 6, 4)), jnp.float32))
    nothing = SecondMomentState([jnp.zeros((1, 6, 10))], [])
    step = AdamStep(mu, basis, 1.0, 1e-30, 1.0)
    x = FullMoment().direction(pairs.a, nothing, step).tall()
    q = basis.q.tall()
    signs = jnp.sign(mu.array @ jnp.swapaxes(q, 2, 3))
    np.testing.assert_allclose(x @ b, signs @ q @ jnp.swapaxes(q, 2, 3), atol=1e-4)
