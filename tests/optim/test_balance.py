"""The balanced factorization: of the same product, on the same path, closer in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_jax import balance_factors, loft
from tests.optim.problems import adamw_path, factor_path, least_squares, loft_path, relative_errors


@jax.jit
def balanced(params):
    tx = balance_factors()
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    return optax.apply_updates(params, updates)


def product(params):
    a, b = (np.asarray(params[key], np.float64) for key in ("lora_a", "lora_b"))
    return a @ b


def imbalance(params):
    """‖AᵀA - BBᵀ‖ over the sum of W's singular values, which the trace of either should be."""
    a, b = (np.asarray(params[key], np.float64) for key in ("lora_a", "lora_b"))
    difference = np.linalg.norm(np.swapaxes(a, -1, -2) @ a - b @ np.swapaxes(b, -1, -2))
    return difference / np.linalg.norm(product(params), "nuc", axis=(-2, -1)).max()


def factors(m, n, r, condition, ratio, seed):
    """Factors with these condition numbers, B being `ratio` times as large as A."""
    rng = np.random.default_rng(seed)

    def factor(size):
        u, v = (np.linalg.qr(rng.normal(size=(k, r)))[0] for k in (size, r))
        return u @ np.diag(np.geomspace(1, 1 / condition, r)) @ v.T

    return {"lora_a": factor(m), "lora_b": ratio * factor(n).T}


@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from([(12, 9, 4), (8, 8, 8), (5, 30, 1)]),
    condition=st.floats(1.0, 30.0),
    log_ratio=st.floats(-6, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_same_product_balanced(shape, condition, log_ratio, seed):
    with jax.enable_x64(True):
        start = factors(*shape, condition, 10**log_ratio, seed)
        # An update is a difference: a factor that shrinks keeps the rounding of its former size.
        shrinks = 10 ** (abs(log_ratio) / 2)
        for dtype, rounding in (("float64", 1e-15), ("float32", 5e-7)):
            params = jax.tree.map(lambda x: jnp.asarray(x, dtype), start)  # noqa: B023
            end = balanced(params)
            w = product(params)
            assert np.linalg.norm(product(end) - w) < 2 * shrinks * rounding * np.linalg.norm(w)
            assert imbalance(end) < 20 * shrinks * rounding
            # The least condition numbers that factors of W can have.
            sigma = np.linalg.svd(w, compute_uv=False)[: shape[2]]
            least = np.sqrt(sigma[0] / sigma[-1])
            assert np.linalg.cond(end["lora_a"]) < 1.01 * least
            assert np.linalg.cond(end["lora_b"]) < 1.01 * least


def test_balanced_factors_stay():
    """To the bit: rounding does not carry W away, however many steps it takes."""
    params = balanced(balanced({"lora_a": jnp.ones((6, 1)), "lora_b": 3 * jnp.ones((1, 5))}))
    for _ in range(5):
        now = balanced(params)
        assert all(bool((now[key] == params[key]).all()) for key in params)
        params = now


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones((6, 2)), np.zeros((2, 5))),  # as adapters start
        (np.zeros((6, 2)), np.zeros((2, 5))),
    ],
)
def test_nothing_moves_while_a_factor_is_zero(a, b):
    params = {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}
    end = balanced(params)
    np.testing.assert_array_equal(end["lora_a"], a)
    np.testing.assert_array_equal(end["lora_b"], b)


def test_a_lost_rank():
    """W of rank 2 in factors of rank 3: finite, the same W, balanced where it counts."""
    rng = np.random.default_rng(0)
    b = rng.normal(size=(3, 5))
    b[2] = 0
    params = {"lora_a": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32), "lora_b": jnp.asarray(b)}
    end = balanced(params)
    np.testing.assert_allclose(product(end), product(params), rtol=0, atol=1e-5)
    assert imbalance(end) < 1e-5


def test_a_pair_that_is_not_finite_keeps_no_other_from_balance():
    good = {"lora_a": 4 * jnp.eye(3, 2), "lora_b": jnp.eye(2, 5)}
    bad = {"lora_a": jnp.full((3, 2), jnp.inf), "lora_b": jnp.ones((2, 5))}
    end = balanced({"q": good, "k": bad})
    assert imbalance(end["q"]) < 1e-6


def test_pairs_of_several_ranks_and_stacks_move_as_alone():
    rng = np.random.default_rng(1)

    def pair(m, n, r, *stack):
        a, b = rng.normal(size=(*stack, m, r)), 9 * rng.normal(size=(*stack, r, n))
        return {"lora_a": jnp.asarray(a, jnp.float32), "lora_b": jnp.asarray(b, jnp.float32)}

    params = {"q": pair(7, 5, 2), "k": pair(6, 8, 4, 3), "layers": [pair(7, 5, 3), pair(7, 5, 3)]}
    together = balanced(params)
    alone = {
        "q": balanced(params["q"]),
        "k": balanced(params["k"]),
        "layers": [balanced(x) for x in params["layers"]],
    }
    for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_plain_leaves_pass():
    params = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2)), "bias": jnp.ones(2)}
    updates, _ = balance_factors().update(params, optax.EmptyState(), params)
    np.testing.assert_array_equal(updates["bias"], params["bias"])


@functools.partial(jax.jit, static_argnums=1)
def path(problem, balance):
    numbers = {"learning_rate": 0.03, "eps": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}
    tx = loft(**numbers, scaling=2.0, second_moment="full", balance=balance)
    return factor_path(problem, 200, "float64", tx, 2.0)


@pytest.mark.parametrize(
    ("shape", "from_zero"),
    [
        ((12, 9, 4), False),
        ((12, 9, 4), True),
        pytest.param((13, 13, 13), False, marks=pytest.mark.slow),
        pytest.param((13, 13, 13), True, marks=pytest.mark.slow),
    ],
)
def test_the_path_of_w_is_the_same(shape, from_zero):
    """In float64, with clip, decay and a scaling; B at zero has no balanced factorization."""
    with jax.enable_x64(True):
        problem = least_squares(*shape, seed=shape[0])
        if from_zero:
            problem["b"] = np.zeros_like(problem["b"])

        w, moved = path(problem, True)
        errors = relative_errors(w, path(problem, False)[0])
    assert errors.max() < 1e-10
    last = jax.tree.map(lambda x: x[-1], moved)
    assert imbalance(last) < 1e-10


@pytest.mark.parametrize("learning_rate", [0.01, pytest.param(0.03, marks=pytest.mark.slow)])
def test_float32_stays_closer_to_adamw(learning_rate):
    """Square and full rank, 200 steps: balanced factors end several times closer.

    With the alternating move, that is: along the tangent space one factor stays as it was drawn.
    """
    numbers = {"learning_rate": learning_rate, "eps": 1e-3}
    with jax.enable_x64(True):
        problem = least_squares(13, 13, 13, seed=1)
        expected = adamw_path(problem, 200, "float64", **numbers)

        def errors(balance):
            how = {"balance": balance, "move": "alternate", **numbers}
            path = jax.jit(lambda: loft_path(problem, 200, "float32", **how))()
            return relative_errors(path, expected)

        ours, plain = errors(True), errors(False)
    assert ours.max() < 1e-5
    assert ours[-1] < plain[-1]
