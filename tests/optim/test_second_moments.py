"""The factored second moment against Adafactor's, the diagonal one against Adam's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import loft_jax
from loft_jax import loft


def adafactor_direction(mu, rows, columns, eps, limit):
    """`m / √v` with Adafactor's v of row sums and column sums, and eps beside the root of a row."""
    n = mu.shape[1]
    shape = np.sqrt(n * columns / columns.sum())
    d = mu / ((np.sqrt(rows / n) + eps)[:, None] * shape)
    norm = np.linalg.norm(d, axis=1, keepdims=True)
    return d * np.minimum(1, limit * np.sqrt(n) / norm)


@pytest.mark.parametrize("turn", [pytest.param("a", marks=pytest.mark.slow), "b"])
def test_factored_is_adafactor_of_the_projected_gradient(turn):
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


def test_a_row_of_the_factored_one_stays_within_adams_bound():
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


def test_the_factored_state_is_a_number_a_row():
    params = {"lora_a": jnp.ones((2, 64, 8)), "lora_b": jnp.zeros((2, 8, 32))}
    state = loft_jax.calibrate_moments(second_moment="factored").init(params)
    assert state.nu["lora_a"].shape == (2, 64, 1)
    assert state.nu["lora_b"].shape == (2, 1, 32)
    assert state.gram["lora_a"].shape == state.gram["lora_b"].shape == (2, 8, 8)


def test_diagonal_is_adam_on_the_scaled_gradients_while_the_partner_rests():
    """With B left alone its span does not move, and A takes Adam's steps of `G P (PᵀP)⁻¹`."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 3)), rng.normal(size=(3, 5))
    with jax.enable_x64(True):
        params = {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}
        chain = optax.chain(
            loft_jax.project_gradients(),
            loft_jax.calibrate_moments(0.8, 0.9, second_moment="diagonal"),
            loft_jax.project_updates(1e-4),
        )
        state, adam = chain.init(params), optax.scale_by_adam(0.8, 0.9, 1e-4)
        adam_state = adam.init(params["lora_a"])
        for _ in range(5):
            grad = rng.normal(size=(7, 5))
            updates, state = chain.update(
                {"lora_a": jnp.asarray(grad @ b.T), "lora_b": jnp.asarray(a.T @ grad)},
                state,
                params,
            )
            scaled = grad @ b.T @ np.linalg.inv(b @ b.T)
            expected, adam_state = adam.update(jnp.asarray(scaled), adam_state)
            np.testing.assert_allclose(updates["lora_a"], expected, rtol=1e-8)


def test_diagonal_depends_on_the_factorization():
    """What the full and the factored second moment do not: the missing invariance is real."""
    rng = np.random.default_rng(1)
    grad = rng.normal(size=(7, 5))
    a, b = rng.normal(size=(7, 3)), rng.normal(size=(3, 5))
    tx, moves = loft(0.1, second_moment="diagonal"), []
    update = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])
    for t in (np.eye(3), rng.normal(size=(3, 3))):
        params = {"lora_a": jnp.asarray(a @ t), "lora_b": jnp.asarray(np.linalg.solve(t, b))}
        grads = {"lora_a": grad @ params["lora_b"].T, "lora_b": params["lora_a"].T @ grad}
        moves.append(params["lora_a"] @ update(grads, params)["lora_b"])
    assert not np.allclose(*moves, rtol=0.1)
