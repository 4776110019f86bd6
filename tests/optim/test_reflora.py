"""RefLoRA against its theorem, and both forms against NumPy in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_jax import balance_norms, precondition_by_reflora, reflora, reflora_s

NUMBERS = {"learning_rate": 0.02, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1}


def matrix(rng, m, r, condition=3.0):
    u, v = (np.linalg.qr(rng.normal(size=(k, r)))[0] for k in (m, r))
    return u @ np.diag(np.geomspace(1, 1 / condition, r)) @ v.T


def pair(seed, m=7, n=5, r=3, ratio=1.0, stack=()):
    rng = np.random.default_rng(seed)
    a = np.array([matrix(rng, m, r) for _ in range(int(np.prod(stack)))])
    b = np.array([ratio * matrix(rng, n, r).T for _ in range(int(np.prod(stack)))])
    return {"lora_a": a.reshape(*stack, m, r), "lora_b": b.reshape(*stack, r, n)}


def product(params):
    return np.asarray(params["lora_a"], np.float64) @ np.asarray(params["lora_b"], np.float64)


def root(x, power=0.5):
    values, u = np.linalg.eigh(x)
    return (u * np.maximum(values, 0) ** power) @ u.T


def two_roots(a, b):
    """S as it stands in the paper."""
    half, back = root(a.T @ a), root(a.T @ a, -0.5)
    return back @ root(half @ b @ b.T @ half) @ back


def gradients(params):
    """Of a smooth loss of W that no factorization changes."""
    a, b = params["lora_a"], params["lora_b"]
    full = np.sin(3 * (a @ b)) + 0.3 * np.cos(np.arange(a.shape[0] * b.shape[1])).reshape(
        a.shape[0], b.shape[1]
    )
    return {"lora_a": full @ b.T, "lora_b": a.T @ full}


LINK = precondition_by_reflora(warmup_steps=0)
update_link = jax.jit(LINK.update)


def preconditioned(grads, params):
    """Gradients, and the metrics S⁻¹ and S that they were multiplied by."""
    params = jax.tree.map(jnp.asarray, params)
    grads, state = update_link(grads, LINK.init(params), params)
    return jax.tree.map(np.asarray, (grads, state.metrics))


def steps(tx, params, count):
    """Parameters after each step on the gradients above; state and all in float64."""
    with jax.enable_x64(True):
        state, path = tx.init(jax.tree.map(jnp.asarray, params)), []
        update = jax.jit(tx.update)
        for _ in range(count):
            updates, state = update(gradients(params), state, params)
            params = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
            path.append(params)
    return path


def assert_close(x, y, rtol=1e-9, atol=1e-11):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), x, y)


# The theorem


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(12, 9, 4), (8, 8, 8), (5, 30, 1)]),
    condition=st.floats(1.0, 100.0),
    log_ratio=st.floats(-4, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_metric_balances(shape, condition, log_ratio, seed):
    m, n, r = shape
    rng = np.random.default_rng(seed)
    a, b = matrix(rng, m, r, condition), 10**log_ratio * matrix(rng, n, r, condition).T
    g, h = a.T @ a, b @ b.T
    with jax.enable_x64(True):
        _, found = preconditioned({"lora_a": a, "lora_b": b}, {"lora_a": a, "lora_b": b})
    s, inverse = found["lora_b"], found["lora_a"]
    assert np.linalg.norm(s @ g @ s - h) < 1e-8 * np.linalg.norm(h)
    assert np.linalg.norm(s @ inverse - np.eye(r)) < 1e-8
    expected = two_roots(a, b)
    assert np.linalg.norm(s - expected) < 1e-7 * np.linalg.norm(expected)
    # T = S^½ is one of the factorizations that it belongs to.
    t, back = root(s), root(s, -0.5)
    balanced_a, balanced_b = a @ t, back @ b
    difference = balanced_a.T @ balanced_a - balanced_b @ balanced_b.T
    assert np.linalg.norm(difference) < 1e-7 * np.linalg.norm(balanced_b) ** 2
    assert np.linalg.norm(balanced_a @ balanced_b - a @ b) < 1e-9 * np.linalg.norm(a @ b)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(12, 9, 4), (8, 8, 8)]),
    condition=st.floats(1.0, 30.0),
    log_scale=st.floats(-3, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_gradient_step_does_not_depend_on_the_factorization(shape, condition, log_scale, seed):
    m, n, r = shape
    rng = np.random.default_rng(seed)
    start = {"lora_a": matrix(rng, m, r), "lora_b": matrix(rng, n, r).T}
    t = 10**log_scale * matrix(rng, r, r, condition)
    other = {"lora_a": start["lora_a"] @ t, "lora_b": np.linalg.solve(t, start["lora_b"])}

    def increment(params):
        with jax.enable_x64(True):
            grads, _ = preconditioned(gradients(params), params)
        return product({key: params[key] - 0.1 * grads[key] for key in params}) - product(params)

    expected = increment(start)
    assert np.linalg.norm(increment(other) - expected) < 1e-10 * np.linalg.norm(expected)


def test_float32_is_close():
    params = pair(0, 64, 48, 8, ratio=1e-2)
    grads = gradients(params)
    with jax.enable_x64(True):
        expected, _ = preconditioned(grads, params)
    rounded = jax.tree.map(np.float32, (grads, params))
    for key, found in preconditioned(*rounded)[0].items():
        assert np.linalg.norm(found - expected[key]) < 1e-4 * np.linalg.norm(expected[key]), key


# Whole optimizers


def adam(params, count, metric=None, balance=False):
    """RefLoRA, or RefLoRA-S by explicit refactoring, in NumPy: a path of parameters."""
    lr, b1, b2, eps, decay = NUMBERS.values()
    a, b = params["lora_a"], params["lora_b"]
    mu, nu = [np.zeros_like(a), np.zeros_like(b)], [np.zeros_like(a), np.zeros_like(b)]
    path = []
    for k in range(1, count + 1):
        if balance:
            c = np.sqrt(np.linalg.norm(b) / np.linalg.norm(a))
            a, b = c * a, b / c
            mu = [mu[0] / c, mu[1] * c]
            nu = [nu[0] / c**2, nu[1] * c**2]
        grads = gradients({"lora_a": a, "lora_b": b})
        s = np.eye(a.shape[1]) if metric is None else metric(k - 1, a, b)
        grads = [grads["lora_a"] @ np.linalg.inv(s), s @ grads["lora_b"]]
        moved = []
        for i, (x, g) in enumerate(zip((a, b), grads, strict=True)):
            mu[i] = b1 * mu[i] + (1 - b1) * g
            nu[i] = b2 * nu[i] + (1 - b2) * g * g
            direction = mu[i] / (1 - b1**k) / (np.sqrt(nu[i] / (1 - b2**k)) + eps)
            moved.append(x - lr * (direction + decay * x))
        a, b = moved
        path.append({"lora_a": a, "lora_b": b})
    return path


def test_reflora_is_adam_on_preconditioned_gradients():
    """With a warmup: until then it is AdamW."""
    start = pair(1, ratio=0.1)

    def metric(k, a, b):
        return two_roots(a, b) if k >= 2 else np.eye(3)

    path = steps(reflora(**NUMBERS, warmup_steps=2), start, 6)
    assert_close(path, adam(start, 6, metric))
    assert_close(path[:2], steps(optax.adamw(**NUMBERS), start, 2))


def test_a_metric_is_used_until_the_next():
    """At every step of an interval: none sees a raw gradient."""
    start, kept = pair(2, ratio=0.1), []

    def metric(k, a, b):
        if k == 0:
            return np.eye(3)
        if (k - 1) % 3 == 0:
            kept.append(two_roots(a, b))
        return kept[-1]

    tx = reflora(**NUMBERS, warmup_steps=1, interval=3)
    assert_close(steps(tx, start, 8), adam(start, 8, metric))
    assert len(kept) == 3


def test_reflora_s_is_adam_on_refactored_factors():
    start = pair(3, ratio=0.01)
    assert_close(
        steps(reflora_s(**NUMBERS, warmup_steps=0), start, 6), adam(start, 6, balance=True)
    )


@settings(max_examples=5, deadline=None)
@given(log_scale=st.floats(-3, 3))
def test_the_path_of_reflora_s_does_not_depend_on_the_scale(log_scale):
    start, scale = pair(4), 10**log_scale
    other = {"lora_a": scale * start["lora_a"], "lora_b": start["lora_b"] / scale}
    paths = [steps(reflora_s(**NUMBERS, warmup_steps=0), x, 5) for x in (start, other)]
    assert_close(*[[product(params) for params in path] for path in paths])


def test_moments_follow_after_the_warmup():
    """What two steps of AdamW left is Adam's state at the refactored point."""
    start = pair(5, ratio=0.05)
    path = steps(reflora_s(**NUMBERS, warmup_steps=2), start, 3)
    assert_close(path[:2], steps(optax.adamw(**NUMBERS), start, 2))
    with jax.enable_x64(True):
        tx = optax.adamw(**NUMBERS)
        params, state = start, tx.init(start)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(gradients(params), state, params)
            params = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
        c = np.sqrt(np.linalg.norm(params["lora_b"]) / np.linalg.norm(params["lora_a"]))
        by = {"lora_a": c, "lora_b": 1 / c}
        params = {key: x * by[key] for key, x in params.items()}
        adam_state = state[0]._replace(
            mu={key: x / by[key] for key, x in state[0].mu.items()},
            nu={key: x / by[key] ** 2 for key, x in state[0].nu.items()},
        )
        updates, _ = jax.jit(tx.update)(gradients(params), (adam_state, *state[1:]), params)
        expected = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
    assert_close(path[2], expected)


# Many pairs


@functools.partial(jax.jit, static_argnums=0)
def first_update(tx, params):
    grads = jax.tree.map(lambda x: jnp.sin(3 * x) + 0.3, params)
    return tx.update(grads, tx.init(params), params)[0]


def one_update(tx, params):
    return first_update(tx, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params))


OPTIMIZERS = {
    "reflora": reflora(1e-2, eps=1e-3, warmup_steps=0),
    "reflora_s": reflora_s(1e-2, eps=1e-3, warmup_steps=0),
}
PLAIN = optax.adamw(1e-2, eps=1e-3, weight_decay=0.0)
each = pytest.mark.parametrize("name", OPTIMIZERS)


def several():
    """Pairs of several ranks, some of them stacked, and each matrix of them by itself."""
    stacked = pair(6, 6, 8, 4, ratio=0.1, stack=(3,))
    params = {"q": pair(7, r=2, ratio=3.0), "k": stacked, "layers": [pair(8, 9, 9, 9), pair(9)]}

    def singles(tree):
        layers = [{key: x[t] for key, x in tree["k"].items()} for t in range(3)]
        return [tree["q"], *layers, *tree["layers"]]

    return params, singles


def test_metrics_of_several_ranks_and_stacks():
    params, singles = several()
    grads = jax.tree.map(lambda x: np.sin(3 * x) + 0.3, params)
    with jax.enable_x64(True):
        ours, _ = preconditioned(grads, params)
    for x, g, p in zip(singles(ours), singles(grads), singles(params), strict=True):
        s = two_roots(p["lora_a"], p["lora_b"])
        expected = {"lora_a": g["lora_a"] @ np.linalg.inv(s), "lora_b": s @ g["lora_b"]}
        assert_close(x, expected)


def test_norms_of_several_ranks_and_stacks():
    params, singles = several()
    tx = OPTIMIZERS["reflora_s"]
    ours = singles(one_update(tx, params))
    for x, p in zip(ours, singles(params), strict=True):
        assert_close(x, one_update(tx, p), 1e-4, 1e-6)


def spoiled(kind):
    params = pair(10, 6, 5, 3)
    if kind == "b is zero":
        params["lora_b"] *= 0
    elif kind == "a is zero":
        params["lora_a"] *= 0
    elif kind == "a lost a rank":
        params["lora_a"][:, 2] = params["lora_a"][:, 0]
    elif kind == "b lost a rank":
        params["lora_b"][2] = 0
    elif kind == "nothing in common":  # of rank one each, and W is zero
        params = {"lora_a": np.eye(6, 3), "lora_b": np.eye(3, 5)}
        params["lora_a"][1:] = 0
        params["lora_b"][0] = 0
    else:
        params["lora_a"][0, 0] = {"a NaN": np.nan, "infinite": np.inf}[kind]
    return params


@pytest.mark.parametrize(
    "kind",
    [
        "b is zero",
        "a is zero",
        "a lost a rank",
        "b lost a rank",
        "nothing in common",
        "a NaN",
        "infinite",
    ],
)
@each
def test_a_pair_without_rank_takes_plain_steps_and_spoils_no_other(name, kind):
    good, bad = pair(11, ratio=0.1), spoiled(kind)
    tx = OPTIMIZERS[name]
    ours = one_update(tx, {"bad": bad, "good": good})
    assert_close(ours["good"], one_update(tx, {"good": good})["good"], 1e-5, 1e-6)
    if kind not in ("a NaN", "infinite"):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(ours["bad"]))
        if name == "reflora" or "is zero" in kind:
            assert_close(ours["bad"], one_update(PLAIN, bad), 1e-5, 1e-6)


def test_from_zero_without_a_warmup_stays_finite():
    params = {**pair(12), "lora_b": np.zeros((3, 5))}
    for tx in OPTIMIZERS.values():
        for moved in steps(tx, params, 5):
            assert all(np.isfinite(x).all() for x in moved.values())


def test_one_factorization_of_each_kind_for_all_pairs():
    """On CPUs two at one time can wait for each other forever."""
    params = jax.tree.map(jnp.asarray, {"q": pair(0), "k": pair(1, r=2), "v": pair(2, stack=(2,))})
    program = jax.jit(LINK.update).lower(params, LINK.init(params), params).compile().as_text()
    calls = re.findall(r'custom_call_target="(?:lapack|blas)_s(\w+?)_ffi"', program)
    assert sorted(calls) == ["potrf", "syevd", "trsm"]


@each
def test_bfloat16(name):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), pair(13, ratio=0.1))
    grads = jax.tree.map(lambda x: jnp.sin(3 * x) + 0.3, params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (grads, params))
    tx = OPTIMIZERS[name]

    def moved(grads, params):
        return jax.jit(tx.update)(grads, tx.init(params), params)[0]

    ours, expected = moved(grads, params), moved(*wide)
    assert {x.dtype for x in ours.values()} == {jnp.dtype("bfloat16")}
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.float32(x), y, rtol=0.03, atol=1e-3),
        ours,
        expected,
    )


@each
def test_plain_leaves_take_adamw(name):
    params = {**pair(14), "bias": np.arange(3.0)}
    expected = one_update(PLAIN, {"bias": params["bias"]})
    assert_close(one_update(OPTIMIZERS[name], params)["bias"], expected["bias"], 1e-6, 0)


def test_balance_norms_around_a_partition():
    """Moments are there of one pair alone; the other is balanced, and its product stays."""
    params = {"q": pair(15, ratio=0.1), "k": pair(16, ratio=0.1)}
    labels = {"q": "adam", "k": "frozen"}
    inner = optax.partition({"adam": optax.adam(1e-2), "frozen": optax.set_to_zero()}, labels)
    tx = balance_norms(inner)
    ours = one_update(tx, params)
    assert_close(ours["q"], one_update(balance_norms(optax.adam(1e-2)), params["q"]), 1e-5, 1e-6)
    moved = jax.tree.map(lambda p, u: p + u, params["k"], ours["k"])
    np.testing.assert_allclose(product(moved), product(params["k"]), rtol=1e-4, atol=1e-6)
    norms = [np.linalg.norm(x) for x in jax.tree.leaves(moved)]
    np.testing.assert_allclose(*norms, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: reflora(1e-3, warmup_steps=-1), r"warmup_steps is -1\.0, expected a whole"),
        (lambda: reflora(1e-3, warmup_steps=37.8), r"warmup_steps is 37\.8, expected a whole"),
        (lambda: reflora_s(1e-3, warmup_steps=-1), r"warmup_steps is -1\.0"),
        (lambda: reflora_s(1e-3, b2=1.0), r"b2 is 1\.0"),
        (
            lambda: reflora(1e-3, interval=0),
            r"interval is 0\.0, expected a whole number of steps >= 1",
        ),
        (lambda: balance_norms(optax.sgd(1.0)).init(pair(0)), "inner keeps no optax.ScaleByAdam"),
        (lambda: reflora_s(1.0).update({}, reflora_s(1.0).init({})), "the parameters are missing"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
