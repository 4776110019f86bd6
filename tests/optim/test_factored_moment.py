"""The factored second moment against Adafactor's on the whole matrix, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import loft_jax


def adafactor_direction(mu, rows, columns, eps, limit):
    """`m / √v` with Adafactor's v of row sums and column sums, and eps beside the root of a row."""
    n = mu.shape[1]
    shape = np.sqrt(n * columns / columns.sum())
    d = mu / ((np.sqrt(rows / n) + eps)[:, None] * shape)
    norm = np.linalg.norm(d, axis=1, keepdims=True)
    return d * np.minimum(1, limit * np.sqrt(n) / norm)


@pytest.mark.parametrize("turn", ["a", "b"])
def test_is_adafactor_of_the_projected_gradient(turn):
    """Four steps with gradients of a fixed sequence and both factors' moments, float64."""
    m, n, r, lr, b1, b2, eps = 7, 5, 3, 0.1, 0.8, 0.9, 1e-3
    rng = np.random.default_rng(0)
    params = {"lora_a": rng.normal(size=(m, r)), "lora_b": rng.normal(size=(r, n))}
    mu = {"a": np.zeros((m, n)), "b": np.zeros((n, m))}
    nu = {"a": np.zeros((m, n, n)), "b": np.zeros((n, m, m))}  # w_i S / tr S, in full
    with jax.enable_x64(True):
        tx = loft_jax.loft(lr, b1, b2, eps, second_moment="factored", move="alternate", first=turn)
        params = jax.tree.map(jnp.asarray, params)
        state = tx.init(params)
        for k in range(1, 5):
            a, b = np.asarray(params["lora_a"]), np.asarray(params["lora_b"])
            grad = rng.normal(size=(m, n))
            proj = {"a": np.linalg.pinv(b) @ b, "b": a @ np.linalg.pinv(a)}
            mover = turn if k % 2 else {"a": "b", "b": "a"}[turn]
            for key, g in (("a", grad @ proj["a"]), ("b", grad.T @ proj["b"])):
                mu[key] = b1 * mu[key] @ proj[key] + (1 - b1) * g
                moved = proj[key] @ nu[key] @ proj[key]
                rows = b2 * np.einsum("ijj->i", moved) + (1 - b2) * np.sum(g * g, axis=1)
                gram = b2 * moved.sum(axis=0) + (1 - b2) * g.T @ g
                nu[key] = rows[:, None, None] * gram / np.trace(gram)
            rows = np.einsum("ijj->i", nu[mover]) / (1 - b2**k)
            columns = np.einsum("ijj->j", nu[mover]) / (1 - b2**k)
            weights = (1 - b1) * b1 ** np.arange(k), (1 - b2) * b2 ** np.arange(k)
            limit = np.sqrt(np.sum(weights[0] ** 2 / weights[1]) * (1 - b2**k)) / (1 - b1**k)
            direction = adafactor_direction(mu[mover] / (1 - b1**k), rows, columns, eps, limit)
            expected = -lr * direction @ proj[mover]

            updates, state = jax.jit(tx.update)(
                {"lora_a": grad @ b.T, "lora_b": a.T @ grad}, state, params
            )
            moved = {
                "a": np.asarray(updates["lora_a"]) @ b,
                "b": (a @ np.asarray(updates["lora_b"])).T,
            }
            np.testing.assert_allclose(moved[mover], expected, rtol=1e-8, atol=1e-10)
            params = optax.apply_updates(params, updates)


def test_a_row_stays_within_adams_bound():
    """A gradient that comes once, in a row and a column of their own, after long silence."""
    params = {"lora_a": jnp.eye(40, 4), "lora_b": jnp.eye(4, 30)}
    tx = loft_jax.loft(1.0, 0.9, 0.999, 0.0, second_moment="factored", first="a")
    state = tx.init(params)
    quiet = jnp.full((40, 30), 1e-3)
    for k in range(11):
        grad = quiet.at[5, 2].set(1e3) if k == 10 else quiet
        grads = {"lora_a": grad @ params["lora_b"].T, "lora_b": params["lora_a"].T @ grad}
        updates, state = jax.jit(tx.update)(grads, state, params)
    assert bool(jnp.isfinite(updates["lora_a"]).all())
    # Adam's own bound at step 11: (1 - b1) / √(1 - b2), bias-corrected, is under 4.
    assert float(jnp.linalg.norm(updates["lora_a"] @ params["lora_b"], axis=1).max()) < 4 * 30**0.5


def test_state_is_a_number_a_row():
    params = {"lora_a": jnp.ones((2, 64, 8)), "lora_b": jnp.zeros((2, 8, 32))}
    state = loft_jax.calibrate_moments(second_moment="factored").init(params)
    assert state.nu["lora_a"].shape == (2, 64, 1)
    assert state.nu["lora_b"].shape == (2, 1, 32)
    assert state.gram["lora_a"].shape == state.gram["lora_b"].shape == (2, 8, 8)
