"""Bases at the limit of the arithmetic, products layer by layer, many sizes in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_jax import loft
from loft_jax.optim.linear_algebra import (
    FactorMatrix,
    _by_sums,
    _layer_by_layer,
    batched,
    matmul,
    orthonormal_bases,
    orthonormal_basis,
)
from loft_jax.training.topology import load_topology


def conditioned(n, r, condition, seed=0):
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=(n, r)))[0]
    v = np.linalg.qr(rng.normal(size=(r, r)))[0]
    return u @ np.diag(np.geomspace(1, 1 / condition, r)) @ v


@pytest.mark.parametrize(
    ("n", "r", "rank_last", "dtype", "condition"),
    [
        # Daily each size in one of the precisions.
        pytest.param(*size, *precision, marks=() if (i + j) % 2 == 0 else pytest.mark.slow)
        for i, size in enumerate(
            [(50, 1, True), (50, 8, True), (50, 8, False), (8, 8, False), (1000, 16, True)]
        )
        for j, precision in enumerate([("float32", 1e4), ("float64", 1e12)])
    ],
)
def test_factorizes_at_the_limit_of_the_arithmetic(n, r, rank_last, dtype, condition):
    with jax.enable_x64(True):
        p = jnp.asarray(conditioned(n, r, condition), dtype)
        basis = orthonormal_basis(FactorMatrix(p if rank_last else p.T, rank_last))
        q, s, s_inv = (np.asarray(x, np.float64) for x in (basis.q.tall(), basis.s, basis.s_inv))
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(q.T @ q, np.eye(r), atol=40 * eps)
    np.testing.assert_allclose(q @ s, p, atol=40 * eps)
    np.testing.assert_allclose(s @ s_inv, np.eye(r), atol=100 * condition * eps)


@settings(max_examples=20, deadline=None)
@given(
    zero=st.lists(st.integers(0, 5), max_size=6, unique=True),
    twins=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=3),
    scale=st.floats(-15, 15),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_zero_and_dependent_columns_add_no_direction(zero, twins, scale, dtype):
    p = np.random.default_rng(0).normal(size=(20, 6))
    for i, j in twins:
        p[:, i] = -2 * p[:, j]
    p[:, zero] = 0
    p *= 10.0**scale
    with jax.enable_x64(True):
        basis = jax.jit(orthonormal_basis)(FactorMatrix(jnp.asarray(p, dtype)))
        q = np.asarray(basis.q.array, np.float64)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(basis))
    rank = np.linalg.matrix_rank(p)
    projector = p @ np.linalg.pinv(p, rcond=1e-10)
    assert np.isclose(np.trace(q @ q.T), rank, atol=1e-4)
    np.testing.assert_allclose(q @ q.T, projector, atol=1e-4 if dtype == "float32" else 1e-10)


def test_projects_a_product():
    """`project(G P) Pᵀ = G proj(P)`, with one column of P zero."""
    rng = np.random.default_rng(1)
    p, g = conditioned(9, 3, 10), rng.normal(size=(7, 9))
    p[:, 1] = 0
    with jax.enable_x64(True):
        basis = orthonormal_basis(FactorMatrix(jnp.asarray(p)))
        x = np.asarray(basis.project(FactorMatrix(jnp.asarray(g @ p))).array)
    np.testing.assert_allclose(x @ p.T, g @ p @ np.linalg.pinv(p), atol=1e-12)
    np.testing.assert_allclose(x[:, 1], 0, atol=1e-12)


def test_square_full_rank_basis_is_the_identity():
    with jax.enable_x64(True):
        q = orthonormal_basis(FactorMatrix(jnp.asarray(conditioned(6, 6, 100)))).q.array
    np.testing.assert_allclose(np.abs(q), np.eye(6), atol=1e-14)


def test_a_nan_shows():
    p = jnp.ones((5, 2)).at[0, 0].set(jnp.nan)
    assert bool(jnp.isnan(orthonormal_basis(FactorMatrix(p)).q.array).any())


@pytest.mark.parametrize(
    ("way", "sizes", "part"),
    [
        (_layer_by_layer, (5, 4, 300), "f32[1,1,5,300]"),  # of one layer of one pair
        (_layer_by_layer, (40, 300, 30), "f32[1,1,40,30]"),
        (_by_sums, (5, 300, 4), "f32[2,24,5,4,300]"),
    ],
)
def test_products_of_several_layers_are_the_products(way, sizes, part):
    """As they are made for TPUs."""
    n, k, l = sizes
    x = jax.random.normal(jax.random.key(0), (2, 24, n, k))
    y = jax.random.normal(jax.random.key(1), (2, 24, k, l))
    expected = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    for product in (way, matmul):
        np.testing.assert_allclose(product(x, y), expected, rtol=1e-5, atol=1e-4)
        assert part in str(jax.make_jaxpr(product)(x, y))


@pytest.mark.parametrize(
    ("platform", "rank_last"),
    [("tpu", True), ("cuda", False), pytest.param("tpu", False, marks=pytest.mark.slow)],
)
def test_what_accelerators_run_makes_a_basis_too(monkeypatch, platform, rank_last):
    p = np.stack([conditioned(40, 6, condition) for condition in (1, 1e3, 1e6, 1e9)])
    p[1, :, 2] = 0

    def basis(x):
        # Not from the cache of what was traced before.
        return orthonormal_basis.__wrapped__(FactorMatrix(x, rank_last))

    def chosen(*args, default, **ways):
        return ways.get(platform, default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    with jax.enable_x64(True):
        x = jnp.asarray(p if rank_last else np.swapaxes(p, -1, -2))[None]  # two axes of layers
        program = str(jax.make_jaxpr(basis)(x))
        assert "length=3" in program
        assert ("unroll=16" in program) == (platform == "cuda")
        one_device, layers = jax.sharding.Mesh(jax.devices()[:1], "layers"), jax.P(None, "layers")
        mapped = jax.shard_map(basis, mesh=one_device, in_specs=layers, out_specs=layers)
        for found in (basis(x), jax.vmap(basis)(x[None]), jax.jit(mapped)(x)):
            q = np.asarray(found.q.tall()).reshape(p.shape)
            s, s_inv = (np.asarray(y).reshape(-1, 6, 6) for y in (found.s, found.s_inv))
            projector = np.stack([y @ np.linalg.pinv(y, rcond=1e-12) for y in p])
            np.testing.assert_allclose(q @ np.swapaxes(q, -1, -2), projector, atol=1e-6)
            np.testing.assert_allclose(q @ s, p, atol=1e-14)
            np.testing.assert_allclose(p @ s_inv, q, atol=1e-6)
            np.testing.assert_allclose(
                np.swapaxes(q, -1, -2)[[0, 2, 3]] @ q[[0, 2, 3]], [np.eye(6)] * 3, atol=1e-14
            )


@pytest.mark.parametrize("platform", ["cpu", "cuda", pytest.param("tpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("r", [3, 20])  # steps of an elimination on GPUs are unrolled by 16
def test_bases_of_both_factors_are_those_of_each(monkeypatch, platform, r):
    rng = np.random.default_rng(r)
    a, b = rng.normal(size=(1, 4, 50, r)), rng.normal(size=(1, 4, r, 30))
    a[0, 1, :, 1] = a[0, 1, :, 0]  # of rank r - 1
    b[0, 2], b[0, 3, 0, 0] = 0, np.nan

    def chosen(*args, default, **ways):
        return ways.get(platform, default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    with jax.enable_x64(True):
        factors = FactorMatrix(jnp.asarray(a)), FactorMatrix(jnp.asarray(b), rank_last=False)
        together = orthonormal_bases.__wrapped__(*factors)
        for factor, found in zip(factors, together, strict=True):
            alone = orthonormal_basis.__wrapped__(factor)
            jax.tree.map(np.testing.assert_array_equal, found, alone)
            p, q = (np.asarray(x.tall())[0, :3] for x in (factor, found.q))
            projector = np.stack([x @ np.linalg.pinv(x, rcond=1e-12) for x in p])
            np.testing.assert_allclose(q @ np.swapaxes(q, -1, -2), projector, atol=1e-7)
    assert np.isnan(together[1].q.array[0, 3]).any()


@pytest.mark.slow
def test_programs_for_tpus_hardly_grow_with_the_pairs():
    """By libtpu, ahead of time, for one chip."""
    chip = jax.sharding.SingleDeviceSharding(load_topology("v5e:2x2").devices[0])
    tx = loft(1e-3)

    def program(count):
        shapes = {"lora_a": (512, 8), "lora_b": (8, 512)}
        pair = {
            name: jax.ShapeDtypeStruct(x, "float32", sharding=chip) for name, x in shapes.items()
        }
        pairs = {str(layer): pair for layer in range(count)}
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip),
            jax.eval_shape(tx.init, pairs),
        )
        update = jax.jit(tx.update, donate_argnums=1).lower(pairs, state, pairs).compile()
        return update.memory_analysis().generated_code_size_in_bytes

    # 0.12 MiB a pair; 0.24 with a program for each product.
    assert program(12) - program(2) < 10 * 0.15 * 2**20


def test_one_call_for_all_sizes():
    """Small matrices beside an identity; each result in the dtype of its group."""
    calls = []

    def inverse(x):
        calls.append(x.shape)
        return (jnp.linalg.inv(x),)

    rng = np.random.default_rng(0)
    groups = [
        (jnp.asarray(rng.normal(size=(*count, r, r)) + 3 * np.eye(r), jnp.float32),)
        for count, r in (((2, 3), 2), ((1, 1), 4), ((4, 1), 1))
    ]
    found = batched(inverse, groups, diagonal=1.0)
    assert calls == [(11, 4, 4)]
    for (x,), (y,) in zip(groups, found, strict=True):
        np.testing.assert_allclose(y, np.linalg.inv(x), rtol=1e-4, atol=1e-5)
    assert batched(inverse, []) == []
