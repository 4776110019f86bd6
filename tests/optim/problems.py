"""Least-squares problems on a full weight, and paths of W on them; small trees and their paths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from loft_jax import loft


def least_squares(m, n, r, seed=0, samples=3):
    """Data x (samples m, m), a target (m, n) and factors, float64: loss ½‖x (W - target)‖²."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(samples * m, m)) / np.sqrt(samples * m),
        "target": rng.normal(size=(m, n)),
        "a": rng.normal(size=(m, r)) / np.sqrt(m),
        "b": rng.normal(size=(r, n)) / np.sqrt(r),
    }


def gradient(problem, w):
    """Gradient (m, n) of the loss at W, in the dtype of w."""
    x, target = (jnp.asarray(problem[k], w.dtype) for k in ("x", "target"))
    product = jnp.matmul(x, w - target, precision="highest")
    return jnp.matmul(x.T, product, precision="highest")


def loft_path(problem, steps, dtype, *, scaling=1.0, second_moment="full", **hyperparameters):
    """W after each of the steps (steps, m, n), from float factors moved by loft in one scan."""
    tx = loft(scaling=scaling, second_moment=second_moment, **hyperparameters)
    return factor_path(problem, steps, dtype, tx, scaling)[0]


def factor_path(problem, steps, dtype, tx, scaling=1.0):
    """W (steps, m, n) and the factors after each of the steps, moved by any optimizer."""
    params = {
        "lora_a": jnp.asarray(problem["a"], dtype),
        "lora_b": jnp.asarray(problem["b"], dtype),
    }

    def weight(params):
        return scaling * jnp.matmul(params["lora_a"], params["lora_b"], precision="highest")

    def body(carry, _):
        params, state = carry
        w, pullback = jax.vjp(weight, params)
        (grads,) = pullback(gradient(problem, w).astype(w.dtype))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (weight(params), params)

    return jax.lax.scan(body, (params, tx.init(params)), length=steps)[1]


def adamw_path(
    problem, steps, dtype, *, scaling=1.0, max_grad_norm=jnp.inf, weight_decay=0.0, **numbers
):
    """W after each of the steps (steps, m, n), the full weight moved by optax.adamw."""
    tx = optax.chain(
        optax.clip_by_global_norm(max_grad_norm), optax.adamw(weight_decay=weight_decay, **numbers)
    )
    return full_path(problem, steps, dtype, tx, scaling)


def full_path(problem, steps, dtype, tx, scaling=1.0):
    """W after each of the steps (steps, m, n), the full weight moved by any optimizer."""
    w = scaling * jnp.asarray(problem["a"], dtype) @ jnp.asarray(problem["b"], dtype)

    def body(carry, _):
        w, state = carry
        updates, state = tx.update(gradient(problem, w), state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), w

    return jax.lax.scan(body, (w, tx.init(w)), length=steps)[1]


def relative_errors(path, reference):
    """Frobenius distance over Frobenius norm, step by step."""
    path, reference = np.asarray(path, np.float64), np.asarray(reference, np.float64)
    distance = np.linalg.norm(path - reference, axis=(1, 2))
    size = np.linalg.norm(reference, axis=(1, 2))
    return np.where(distance == 0, 0, distance / np.where((distance == 0) & (size == 0), 1, size))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def pair(seed, m=12, n=9, r=3, stack=()):
    return {"lora_a": normal(seed, *stack, m, r), "lora_b": normal(seed + 1, *stack, r, n)}


def run(tx, params, grads_of, steps):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads_of(params), state, params)
        return optax.apply_updates(params, updates), state

    state, path = tx.init(params), []
    for _ in range(steps):
        params, state = step(params, state)
        path.append(params)
    return path, state


def assert_trees_close(x, y, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), x, y)


def random_grads(params):
    return jax.tree.map(lambda p: jnp.sin(3 * p) + 0.3, params)


def pack(p):
    """Packed halves (..., q) of symmetric matrices (..., r, r), by their definition."""
    r = p.shape[-1]
    return np.stack(
        [p[..., a, b] * (1 if a == b else np.sqrt(2)) for a in range(r) for b in range(a, r)], -1
    )
