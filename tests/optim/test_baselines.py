"""Other optimizers of factors against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loft_jax import (
    alt_lora_plus,
    lora_fa,
    lora_plus,
    precondition_by_gram,
    riemannian_lora,
    state_bytes,
)

STEPS = 5
ADAM = {"learning_rate": 0.02, "b1": 0.8, "b2": 0.9, "eps": 1e-3}
NUMBERS = {**ADAM, "weight_decay": 0.1}


def start(seed=0, m=7, n=5, r=3):
    rng = np.random.default_rng(seed)
    return {
        "lora_a": rng.normal(size=(m, r)),
        "lora_b": rng.normal(size=(r, n)),
        "bias": rng.normal(size=n),
    }


def gradients(params, scaling=1.0):
    a, b, bias = params["lora_a"], params["lora_b"], params["bias"]
    full = np.sin(3 * scaling * (a @ b) + bias)
    return {
        "lora_a": scaling * full @ b.T,
        "lora_b": scaling * a.T @ full,
        "bias": full.sum(axis=0),
    }


def path_of(tx, scaling=1.0):
    """Parameters after each step, all in float64."""
    params, path = start(), []
    with jax.enable_x64(True):
        state = tx.init(jax.tree.map(jnp.asarray, params))
        update = jax.jit(tx.update)
        for _ in range(STEPS):
            updates, state = update(gradients(params, scaling), state, params)
            params = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
            path.append(params)
    return path


def adam(change, rates, scaling=1.0, weight_decay=0.1):
    """AdamW in NumPy on changed gradients, with a learning rate for each leaf."""
    _, b1, b2, eps = ADAM.values()
    params, path = start(), []
    mu, nu = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    for k in range(1, STEPS + 1):
        grads = change(gradients(params, scaling), params)
        mu = {key: b1 * mu[key] + (1 - b1) * g for key, g in grads.items()}
        nu = {key: b2 * nu[key] + (1 - b2) * g * g for key, g in grads.items()}
        moved = {}
        for key, x in params.items():
            direction = mu[key] / (1 - b1**k) / (np.sqrt(nu[key] / (1 - b2**k)) + eps)
            moved[key] = x - rates[key] * (direction + weight_decay * x)
        params = moved
        path.append(params)
    return path


def assert_close(ours, expected):
    for x, y in zip(ours, expected, strict=True):
        jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-8, atol=1e-10), x, y)


def rates(a=0.02, b=0.02):
    return {"lora_a": a, "lora_b": b, "bias": 0.02}


def test_lora_plus():
    expected = adam(lambda grads, params: grads, rates(b=0.08))
    assert_close(path_of(lora_plus(**NUMBERS, ratio=4.0)), expected)
    schedule = {**NUMBERS, "learning_rate": optax.constant_schedule(0.02)}
    assert_close(path_of(lora_plus(**schedule, ratio=4.0)), expected)


@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_lora_fa(scaling):
    def change(grads, params):
        a = params["lora_a"]
        return {**grads, "lora_b": np.linalg.inv(a.T @ a) @ grads["lora_b"] / scaling**2}

    expected = adam(change, rates(a=0.0), scaling)
    assert_close(path_of(lora_fa(**NUMBERS, scaling=scaling), scaling), expected)


def test_lora_fa_keeps_nothing_for_a():
    params = {"lora_a": jnp.ones((640, 4)), "lora_b": jnp.zeros((4, 32))}
    assert state_bytes(lora_fa(1e-3), params) <= 4 * 2 * 4 * 32 + 16


def test_lora_fa_in_bfloat16_keeps_its_types():
    params = {"lora_a": jnp.ones((6, 2), jnp.bfloat16), "lora_b": jnp.zeros((2, 4), jnp.bfloat16)}
    tx = lora_fa(1e-3)
    state = tx.init(params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert {x.dtype for x in updates.values()} == {jnp.dtype("bfloat16")}
    types = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, new_state)]
    assert types[0] == types[1]


@pytest.mark.parametrize("damping", [1e-6, 1e-2])
def test_riemannian_lora(damping):
    def change(grads, params):
        a, b, eye = params["lora_a"], params["lora_b"], damping * np.eye(3)
        return {
            **grads,
            "lora_a": grads["lora_a"] @ np.linalg.inv(b @ b.T + eye),
            "lora_b": np.linalg.inv(a.T @ a + eye) @ grads["lora_b"],
        }

    ours = path_of(riemannian_lora(**NUMBERS, damping=damping))
    assert_close(ours, adam(change, rates()))


def test_gram_of_several_ranks_and_stacks():
    rng = np.random.default_rng(1)

    def pair(m, n, r, *stack):
        return {
            "lora_a": rng.normal(size=(*stack, m, r)),
            "lora_b": rng.normal(size=(*stack, r, n)),
        }

    params = {"q": pair(7, 5, 2), "k": pair(6, 8, 4, 3), "layers": [pair(7, 5, 3), pair(7, 5, 3)]}
    grads = jax.tree.map(np.sin, params)
    tx = precondition_by_gram(0.1)
    with jax.enable_x64(True):
        program = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()
        ours, _ = program(grads, tx.init(params), params)
    # On CPUs two at one time can wait for each other forever.
    assert program.as_text().count('custom_call_target="lapack_dsyevd') == 1
    for found, g, p in zip(
        *([tree["q"], tree["k"], *tree["layers"]] for tree in (ours, grads, params)), strict=True
    ):
        a, b = p["lora_a"], p["lora_b"]
        eye = 0.1 * np.eye(a.shape[-1])
        at, bt = (np.swapaxes(x, -1, -2) for x in (a, b))
        np.testing.assert_allclose(found["lora_a"], g["lora_a"] @ np.linalg.inv(b @ bt + eye))
        np.testing.assert_allclose(found["lora_b"], np.linalg.inv(at @ a + eye) @ g["lora_b"])


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_pair_that_is_zero_or_not_finite_spoils_no_other(bad):
    """Zeros are divided by the damping alone, which gradients of zero do not notice."""
    good = {key: jnp.asarray(x, jnp.float32) for key, x in start().items() if key != "bias"}
    other = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.full((2, 4), bad)}
    params = {"good": good, "other": other}
    tx = precondition_by_gram()
    together, _ = tx.update(params, optax.EmptyState(), params)
    alone, _ = tx.update(good, optax.EmptyState(), good)
    for key in good:
        np.testing.assert_allclose(together["good"][key], alone[key], rtol=1e-5)
    if bad == 0:
        assert all(np.isfinite(x).all() for x in together["other"].values())


def test_alt_lora_plus():
    """Both moments at every step, then the factor whose turn it is."""
    lr, b1, b2, eps = ADAM.values()
    scaling, decay = 2.0, 0.1
    params = start()
    names = ("lora_a", "lora_b")
    mu, nu = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    old, expected = params, []
    for k in range(1, STEPS + 1):
        grads = gradients(params, scaling)
        partner = {"lora_a": scaling * params["lora_b"].T, "lora_b": scaling * params["lora_a"]}
        before = {"lora_a": scaling * old["lora_b"].T, "lora_b": scaling * old["lora_a"]}
        for key in names:
            p = partner[key]
            inverse = np.linalg.inv(p.T @ p)
            change = before[key].T @ p @ inverse
            if key == "lora_a":
                grads[key], aligned = grads[key] @ inverse, mu[key] @ change
            else:
                grads[key], aligned = inverse @ grads[key], change.T @ mu[key]
            mu[key] = aligned
        mu = {key: b1 * mu[key] + (1 - b1) * g for key, g in grads.items()}
        nu = {key: b2 * nu[key] + (1 - b2) * g * g for key, g in grads.items()}
        rho = b1**2 / b2  # Adam's bound on an element, of moments of the same gradients
        bound = np.sqrt((1 - b2**k) / (1 - b2) * sum(rho**i for i in range(k)))
        bound *= (1 - b1) / (1 - b1**k)
        old, moved = params, dict(params)
        for key in ("bias", names[k % 2]):
            direction = mu[key] / (1 - b1**k) / (np.sqrt(nu[key] / (1 - b2**k)) + eps)
            direction = np.clip(direction, -bound, bound)
            moved[key] = params[key] - lr * (direction + decay * params[key])
        params = moved
        expected.append(params)
    assert_close(path_of(alt_lora_plus(**NUMBERS, scaling=scaling), scaling), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora_plus(1e-3, ratio=0.0), r"ratio is 0\.0, expected a positive, finite number"),
        (lambda: lora_plus(1e-3, weight_decay=-1.0), r"weight_decay is -1\.0"),
        (lambda: lora_fa(1e-3, eps=-1.0), r"eps is -1\.0"),
        (lambda: riemannian_lora(1e-3, b1=1.0), r"b1 is 1\.0"),
        (lambda: lora_fa(1e-3, scaling=0.0), r"scaling is 0\.0, expected a finite number, not 0"),
        (lambda: riemannian_lora(1e-3, damping=0.0), r"damping is 0\.0, expected a positive"),
        (lambda: alt_lora_plus(1e-3, scaling=0.0), r"scaling is 0\.0"),
        (lambda: alt_lora_plus(1e-3, weight_decay=-1.0), r"weight_decay is -1\.0"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
