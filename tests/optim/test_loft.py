"""LoFT as users hold it: its links apart, stacks, plain leaves, hard cases, errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import loft_jax
from loft_jax import loft
from tests.optim.problems import (
    assert_trees_close,
    gradient,
    least_squares,
    normal,
    pair,
    random_grads,
    run,
)


@pytest.mark.parametrize("move", ["tangent", pytest.param("alternate", marks=pytest.mark.slow)])
def test_the_chain_by_hand_is_loft(move):
    params = {"q": pair(0), "bias": normal(5, 4)}
    spec = loft_jax.FactorSpec(scaling=2.0)
    turns = {
        "tangent": loft_jax.assign_overlap(spec=spec),
        "alternate": loft_jax.alternate_factors(spec=spec),
    }
    by_hand = optax.chain(
        loft_jax.project_gradients(spec=spec),
        loft_jax.clip_by_projected_norm(0.5, move=move, spec=spec),
        loft_jax.calibrate_moments(0.8, 0.9, spec=spec),
        loft_jax.project_updates(1e-6, move=move, spec=spec),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.1),
        turns[move],
    )
    alias = loft(0.1, 0.8, 0.9, 1e-6, 0.1, max_grad_norm=0.5, move=move, scaling=2.0)
    ours, _ = run(alias, params, random_grads, 4)
    expected, _ = run(by_hand, params, random_grads, 4)
    assert_trees_close(ours, expected, rtol=1e-6)


def test_one_factor_moves_at_a_time():
    params = {"q": pair(0), "bias": normal(5, 4)}
    path, _ = run(loft(0.1, weight_decay=0.1, move="alternate"), params, random_grads, 4)
    path = [params, *path]
    moved = [
        tuple(bool((x["q"][k] != y["q"][k]).any()) for k in ("lora_a", "lora_b"))
        for x, y in itertools.pairwise(path)
    ]
    assert moved == [(False, True), (True, False)] * 2


def test_plain_leaves_take_adamw():
    params = {"q": pair(0), "head": normal(5, 4, 3), "bias": normal(6, 4)}
    numbers = {"b1": 0.8, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.1}
    ours, _ = run(loft(0.05, **numbers), params, random_grads, 10)
    plain = {k: params[k] for k in ("head", "bias")}
    expected, _ = run(optax.adamw(0.05, **numbers), plain, random_grads, 10)
    assert_trees_close([{k: p[k] for k in plain} for p in ours], expected, rtol=1e-5)


@pytest.mark.slow
def test_stacked_layers_move_as_separate_ones():
    stacked = {"q": pair(0, stack=(3,))}
    layers = {str(i): jax.tree.map(lambda x, i=i: x[i], stacked["q"]) for i in range(3)}
    tx = loft(0.05, eps=1e-3, max_grad_norm=1.0, weight_decay=0.1)
    ours, _ = run(tx, stacked, random_grads, 6)
    expected, _ = run(tx, layers, random_grads, 6)
    joined = [{"q": jax.tree.map(lambda *x: jnp.stack(x), *p.values())} for p in expected]
    assert_trees_close(ours, joined, rtol=1e-4, atol=1e-5)


def test_scaling_by_path():
    params = {"q": pair(0), "k": pair(2)}
    scalings = {"q": 2.0, "k": 0.5}
    ours, _ = run(loft(0.05, scaling=scalings.__getitem__), params, random_grads, 4)

    @jax.jit
    def alone(params, scaling):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(random_grads(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        tx = loft(0.05, scaling=scaling)
        return jax.lax.scan(step, (params, tx.init(params)), length=4)[1]

    for name, scaling in scalings.items():
        found = jax.tree.map(lambda *x: jnp.stack(x), *(p[name] for p in ours))
        assert_trees_close(found, alone(params[name], scaling), rtol=1e-5)


def test_bfloat16_factors_have_a_float32_state():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {"q": pair(0)})
    path, state = run(loft(0.05), params, random_grads, 3)
    assert {x.dtype for x in jax.tree.leaves(path)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state[1].mu)} == {jnp.dtype(jnp.float32)}
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((path, state)))


def test_numbers_of_another_precision():
    with jax.enable_x64(True):
        numbers = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "scaling": 2.0, "max_grad_norm": 1.0}
        tx = loft(0.05, **{name: np.float64(x) for name, x in numbers.items()})
        ours, _ = run(tx, {"q": pair(0)}, random_grads, 3)
        expected, _ = run(loft(0.05, **numbers), {"q": pair(0)}, random_grads, 3)
        assert_trees_close(ours, expected, rtol=1e-4)


# Hard cases


@pytest.mark.parametrize(
    ("m", "n", "r"),
    [
        (12, 9, 4),
        pytest.param(7, 12, 7, marks=pytest.mark.slow),
        pytest.param(9, 9, 9, marks=pytest.mark.slow),
        pytest.param(12, 9, 1, marks=pytest.mark.slow),
    ],
)
def test_hard_cases_stay_finite_and_within_adams_bound(m, n, r):
    """B = 0, then a gradient, a zero one, lost ranks of both factors, and tiny factors."""
    lr, b1, b2 = 0.1, 0.9, 0.999
    problem = least_squares(m, n, r)
    params = {"lora_a": jnp.asarray(problem["a"], jnp.float32), "lora_b": jnp.zeros((r, n))}
    tx = loft(lr, b1, b2, second_moment="full")
    state = tx.init(params)
    update = jax.jit(tx.update)
    for k in range(1, 41):
        if k == 10:
            params["lora_b"] = params["lora_b"].at[-1].set(params["lora_b"][0])
        if k == 17:
            params["lora_a"] = params["lora_a"].at[:, 0].set(0)
        if k == 25:
            params = jax.tree.map(lambda x: x * 1e-12, params)
        if k == 31:
            params = jax.tree.map(jnp.zeros_like, params)
        full = gradient(problem, params["lora_a"] @ params["lora_b"]) * (k != 14)
        grads = {"lora_a": full @ params["lora_b"].T, "lora_b": params["lora_a"].T @ full}
        updates, state = update(grads, state, params)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state))), k
        # To first order W moves by two matrices that are orthogonal, each D times a projector.
        move = updates["lora_a"] @ params["lora_b"] + params["lora_a"] @ updates["lora_b"]
        weights = (1 - b1) * b1 ** np.arange(k)
        squares = (1 - b2) * b2 ** np.arange(k)
        bound = np.sqrt(np.sum(weights**2 / squares) * (1 - b2**k)) / (1 - b1**k)
        assert float(jnp.linalg.norm(move)) <= lr * bound * np.sqrt(2 * m * n) * 1.001, k
        params = optax.apply_updates(params, updates)
    assert bool((state[1].mu["lora_a"] == 0).all())  # nothing is left of what spans nothing


def test_a_layer_that_is_not_finite_spoils_no_other():
    """Of a stack: one as usual, one with B = 0, one with a NaN."""
    params, grads_of_all = pair(0, stack=(3,)), pair(5, stack=(3,))
    params["lora_a"] = params["lora_a"].at[2, 0, 0].set(jnp.nan)
    params["lora_b"] = params["lora_b"].at[1].set(0)
    tx = loft(0.1)
    updates, _ = jax.jit(tx.update)(grads_of_all, tx.init(params), params)
    for layer in range(2):
        alone, grads = (jax.tree.map(lambda x, i=layer: x[i], x) for x in (params, grads_of_all))
        expected, _ = jax.jit(tx.update)(grads, tx.init(alone), alone)
        for key in ("lora_a", "lora_b"):
            np.testing.assert_allclose(updates[key][layer], expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("m", "n"), [(4096, 11008), pytest.param(11008, 4096, marks=pytest.mark.slow)]
)
def test_temporaries_are_a_tenth_of_the_weight(m, n):
    params = jax.eval_shape(lambda: {"lora_a": jnp.zeros((m, 16)), "lora_b": jnp.zeros((16, n))})
    tx = loft(1e-3, max_grad_norm=1.0, second_moment="full")
    step = jax.jit(tx.update, donate_argnums=1)
    compiled = step.lower(params, jax.eval_shape(tx.init, params), params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * (2 * m * n)  # in bfloat16


def test_layers_apart_are_compiled_as_one():
    """Four layers take hardly more of a program than one: moves of leaves, and no products."""

    def products(layers):
        params = {f"layers_{i}": pair(i, 64, 48, 4) for i in range(layers)}
        tx = loft(1e-3)
        text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
        return text.count("dot_general")

    assert products(4) == products(1)


# Errors


def test_update_without_parameters():
    params = {"q": pair(0)}
    tx = loft(0.1)
    with pytest.raises(ValueError, match="the parameters are missing"):
        tx.update(params, tx.init(params))


def test_updates_of_another_structure():
    params = {"q": pair(0)}
    tx = loft(0.1)
    with pytest.raises(ValueError, match="'extra' where the parameters have 'q/lora_a'"):
        tx.update({**params, "extra": jnp.zeros(1)}, tx.init(params), params)
    a, b = params["q"].values()
    with pytest.raises(ValueError, match="'q/x' where the parameters have 'q/lora_a'"):
        tx.update({"q": {"x": a, "y": b}}, tx.init(params), params)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scaling": 0.0}, "scaling is 0.0, expected a finite number, not 0"),
        ({"scaling": None}, "scaling is None, expected a finite number, not 0"),
        ({"eps": "a"}, "eps is 'a', expected a number >= 0"),
        ({"weight_decay": jnp.inf}, "weight_decay is inf, expected a finite number >= 0"),
        ({"state_dtype": "foo"}, "state_dtype is 'foo', expected one of"),
        ({"mu_dtype": jnp.ones(())}, "mu_dtype is an array, expected a dtype: with optax.inject"),
        ({"scaling": float("nan")}, "scaling is nan"),
        ({"scaling": np.float32(0)}, "scaling is 0.0"),
        ({"scaling": jnp.zeros(())}, "scaling is 0.0"),
        ({"b1": 1.0}, r"b1 is 1.0, expected a number in \[0, 1\)"),
        ({"b2": -0.1}, "b2 is -0.1"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0, expected a positive"),
        ({"first": "c"}, "first is 'c', expected one of "),
        ({"move": "both"}, "move is 'both', expected one of"),
        ({"second_moment": "half"}, "second_moment is 'half', expected one of "),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        loft(0.1, **arguments)


def test_a_scaling_of_zero_names_the_path():
    params = {"q": pair(0), "k": pair(2)}
    tx = loft(0.1, scaling={"q": 2.0, "k": 0.0}.__getitem__)
    with pytest.raises(ValueError, match=r"scaling of 'k' is 0\.0"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_dtypes_that_moments_cannot_be_stored_in(dtype):
    with pytest.raises(ValueError, match=f"state_dtype is {dtype}, expected one of"):
        loft(0.1, state_dtype=dtype)


@pytest.mark.parametrize("second_moment", ["full", "factored", "diagonal"])
def test_no_gradient_without_an_epsilon_is_no_step(second_moment):
    params = pair(0)
    tx = loft(0.1, eps=0.0, second_moment=second_moment)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    assert all(bool((x == 0).all()) for x in jax.tree.leaves(updates))
