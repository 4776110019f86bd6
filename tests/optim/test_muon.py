"""LoFT with Muon against Optax's Muon on the full weight, and an iteration on dense matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loft_jax
from loft_jax import loft_muon
from tests.optim.problems import factor_path, full_path, least_squares, relative_errors

STEPS = 20


FULL_RANK = [((13, 13), 1.0), ((13, 13), 4.0), ((16, 7), 2.0), ((7, 16), 1.0)]
SETTINGS = [
    {},
    {"nesterov": False, "weight_decay": 0.1},
    {"consistent_rms": 0.2, "beta": 0.8, "ns_steps": 3},
    {"ns_coeffs": (2.0, -1.5, 0.5), "eps": 1e-3},
]


@pytest.mark.parametrize(
    ("shape", "scaling", "settings"),
    [
        # Daily each shape and each setting once.
        pytest.param(*sizes, settings, marks=() if i == j else pytest.mark.slow)
        for i, sizes in enumerate(FULL_RANK)
        for j, settings in enumerate(SETTINGS)
    ],
)
def test_at_full_rank_is_muon_of_optax(shape, scaling, settings):
    with jax.enable_x64(True):
        problem = least_squares(*shape, min(shape), seed=2)

        @jax.jit
        def paths():
            ours = loft_muon(0.02, scaling=scaling, **settings)
            theirs = optax.contrib.muon(0.02, **settings)
            w, _ = factor_path(problem, STEPS, "float64", ours, scaling)
            return w, full_path(problem, STEPS, "float64", theirs, scaling)

        errors = relative_errors(*paths())
    assert errors.max() < 1e-9


def newton_schulz(x, coeffs=(3.4445, -4.7750, 2.0315), steps=5, eps=1e-8):
    """The iteration as it is written, on a dense matrix."""
    a, b, c = coeffs
    x = x / (np.linalg.norm(x) + eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize(
    ("shape", "turn", "move"),
    [
        # Daily any two of two shapes, turns and moves together.
        pytest.param(
            shape, turn, move, marks=() if i < 2 and (i + j + k) % 2 == 0 else pytest.mark.slow
        )
        for i, shape in enumerate([(12, 9, 4), (20, 6, 6), (6, 20, 1)])
        for j, turn in enumerate("ab")
        for k, move in enumerate(["tangent", "alternate"])
    ],
)
def test_orthogonalizes_the_projected_momentum(shape, turn, move):
    """Three steps against dense matrices: projected, averaged, orthogonalized, moved by."""
    m, n, r = shape
    beta, lr = 0.8, 0.1
    rng = np.random.default_rng(3)
    params = {"lora_a": rng.normal(size=(m, r)), "lora_b": rng.normal(size=(r, n))}
    momentum = {"a": np.zeros((m, n)), "b": np.zeros((m, n))}
    with jax.enable_x64(True):
        tx = loft_muon(lr, beta, nesterov=False, move=move, first=turn)
        params = jax.tree.map(jnp.asarray, params)
        state = tx.init(params)
        for k in range(1, 4):
            a, b = np.asarray(params["lora_a"]), np.asarray(params["lora_b"])
            grad = rng.normal(size=(m, n))
            of_b, of_a = np.linalg.pinv(b) @ b, a @ np.linalg.pinv(a)
            momentum["a"] = beta * momentum["a"] @ of_b + (1 - beta) * grad @ of_b
            momentum["b"] = beta * of_a @ momentum["b"] + (1 - beta) * of_a @ grad
            direction = {
                key: -lr * max(1, n / m) ** 0.5 * newton_schulz(x / (1 - beta**k))
                for key, x in momentum.items()
            }
            mover = turn if k % 2 else {"a": "b", "b": "a"}[turn]
            if move == "alternate":
                expected = direction[mover]
            else:
                keeper = mover if r < min(m, n) else "a" if r == n else "b"  # no square one here
                overlap = of_a @ direction["a"] if keeper == "b" else direction["b"] @ of_b
                expected = direction["a"] + direction["b"] - overlap
            updates, state = jax.jit(tx.update)(
                {"lora_a": grad @ b.T, "lora_b": a.T @ grad}, state, params
            )
            moved = np.asarray(updates["lora_a"]) @ b + a @ np.asarray(updates["lora_b"])
            np.testing.assert_allclose(moved, expected, rtol=1e-8, atol=1e-10)
            params = optax.apply_updates(params, updates)


@functools.cache
def path_function(shape):
    problem = least_squares(*shape, seed=4)

    @jax.jit
    def path(a, b, scaling):
        moved = {**problem, "a": a, "b": b}
        return factor_path(moved, STEPS, "float64", loft_muon(0.01, scaling=scaling), scaling)[0]

    return problem, path


@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from([(12, 9, 4), (8, 8, 8)]),
    condition=st.floats(1.0, 1e3),
    log_scaling=st.floats(-2, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_depends_neither_on_the_factorization_nor_on_s(shape, condition, log_scaling, seed):
    with jax.enable_x64(True):
        problem, path = path_function(shape)
        rng = np.random.default_rng(seed)
        u, v = (np.linalg.qr(rng.normal(size=(shape[2],) * 2))[0] for _ in range(2))
        t = u @ np.diag(np.geomspace(1, 1 / condition, shape[2])) @ v
        s = 10**log_scaling
        a, b = problem["a"] @ t, np.linalg.solve(t, problem["b"]) / s
        errors = relative_errors(path(a, b, s), path(problem["a"], problem["b"], 1.0))
    assert errors.max() < 1e-8


def test_plain_leaves_take_adam():
    params = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 3)), "bias": jnp.arange(3.0)}
    tx, adam = loft_muon(0.1, adam_b1=0.8, adam_b2=0.9), optax.nadam(0.1, 0.8, 0.9)
    state, adam_state = tx.init(params), adam.init(params["bias"])
    for k in range(3):
        grads = jax.tree.map(lambda x: jnp.sin(x + k), params)  # noqa: B023
        updates, state = jax.jit(tx.update)(grads, state, params)
        expected, adam_state = adam.update(grads["bias"], adam_state)
        np.testing.assert_allclose(updates["bias"], expected, rtol=1e-6)


def test_no_second_moment_is_kept():
    params = {"lora_a": jnp.ones((64, 4)), "lora_b": jnp.zeros((4, 32))}
    counters = 64
    held = loft_jax.state_bytes(loft_muon(0.1), params)
    assert held <= 4 * (2 * (64 + 32) * 4) + counters  # momentum, and the basis it is held in


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 1.0}, r"beta is 1\.0, expected a number in \[0, 1\)"),
        ({"weight_decay": -1.0}, r"weight_decay is -1\.0"),
        ({"ns_coeffs": (1.0, 2.0)}, "expected three numbers"),
        ({"first": "c"}, "first is 'c'"),
        ({"move": "both"}, "move is 'both'"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0\.0"),
        ({"eps": -1.0}, r"eps is -1\.0"),
        ({"ns_steps": 0}, "ns_steps is 0, expected 1 or more"),
        ({"consistent_rms": 0.0}, r"consistent_rms is 0\.0"),
        ({"adam_b1": 1.0}, r"adam_b1 is 1\.0"),
        ({"scaling": 0.0}, r"scaling is 0\.0"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        loft_muon(0.1, **arguments)


def test_no_gradient_without_an_epsilon_is_no_step():
    params = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 3))}
    tx = loft_muon(0.1, eps=0.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    assert all(bool((x == 0).all()) for x in jax.tree.leaves(updates))


def test_orthogonalize_momentum_is_for_pairs_alone():
    params = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"1 leaves belong to no factor pair.*use loft_muon"):
        loft_jax.orthogonalize_momentum().init(params)
