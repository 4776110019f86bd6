"""Low rank: the judge is the dense float64 oracle, and numbers kept from runs of the equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loft_jax import assign_overlap, clip_by_projected_norm, loft, project_gradients
from tests.optim.problems import gradient, least_squares, loft_path, relative_errors
from tests.oracle import DenseLoFT

STEPS = 100
# Of one size where the size does not matter: those are numbers of one program.
SIZES = (24, 17, 4)
CASES = {
    "low_rank": (SIZES, {"eps": 1e-8}),
    "tall": ((30, 9, 3), {"eps": 1e-6}),
    "rank_one": ((16, 30, 1), {"eps": 1e-8}),
    "rank_min": ((9, 14, 9), {"eps": 1e-8}),
    "full_rank": ((12, 12, 12), {"learning_rate": 0.03, "eps": 1e-3}),
    "scaled": (SIZES, {"eps": 1e-6, "scaling": 4.0}),
    "decay_and_clip": (SIZES, {"eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 0.05}),
    "betas": (SIZES, {"b1": 0.8, "b2": 0.95, "max_grad_norm": 1.0}),
    "no_moments": (SIZES, {"b1": 0.0, "b2": 0.0, "eps": 1e-3}),
    "a_first": ((18, 13, 4), {"first": "a"}),
    "alternate": (SIZES, {"move": "alternate", "eps": 1e-8}),
    "alternate_decay_and_clip": (
        SIZES,
        {"move": "alternate", "eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 0.05},
    ),
    "wide": ((14, 9, 9), {"eps": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5}),
    "alternate_a_first": ((18, 13, 4), {"move": "alternate", "first": "a"}),
    "b_is_zero": (SIZES, {"eps": 1e-8}),
    "small_b": (SIZES, {"learning_rate": 0.1, "eps": 1e-3, "weight_decay": 0.1}),
    "b_is_zero_clip": (SIZES, {"eps": 1e-6, "max_grad_norm": 0.05, "scaling": 2.0}),
    "schedule": (SIZES, {"learning_rate": 0.01 / (1 + np.arange(STEPS))}),
}
DEFAULTS = {
    "learning_rate": 0.01,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": np.inf,
    "scaling": 1.0,
}


@functools.partial(jax.jit, static_argnames=("dtype", "move", "first"))
def our_path(problem, numbers, *, dtype, move="tangent", first="b"):
    rates = numbers["learning_rate"]
    numbers = numbers | {"learning_rate": lambda count: rates[count]}
    return loft_path(problem, STEPS, dtype, move=move, first=first, **numbers)


def paths(name, dtype):
    """W after each step of a case, by LoFT and by the oracle."""
    (m, n, r), given = CASES[name]
    given = DEFAULTS | given
    problem = least_squares(m, n, r)
    if name.startswith("b_is_zero"):
        problem["b"][:] = 0
    if name == "small_b":  # where the product of both moves is bounded
        problem["b"] *= 1e-6
    numbers = {key: given[key] for key in DEFAULTS}
    numbers["learning_rate"] = np.broadcast_to(numbers["learning_rate"], STEPS)
    how = {key: x for key, x in given.items() if key not in DEFAULTS}
    return our_path(problem, numbers, dtype=dtype, **how), oracle_path(problem, STEPS, **given)


def oracle_path(problem, steps, *, learning_rate, **hyperparameters):
    oracle = DenseLoFT(problem["a"], problem["b"], learning_rate, **hyperparameters)
    path = []
    for _ in range(steps):
        x = problem["x"]
        oracle.step(x.T @ (x @ (oracle.w - problem["target"])))
        path.append(oracle.w)
    return np.stack(path)


# What differs little from another one, and is a program of its own.
SLOW = ("tall", "rank_one", "alternate_a_first", "wide")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in CASES]
)
def test_path_is_the_oracles(name):
    with jax.enable_x64(True):
        errors = relative_errors(*paths(name, "float64"))
    assert errors.max() < 1e-8


@pytest.mark.parametrize("name", ["low_rank", "scaled", "decay_and_clip"])
def test_float32_stays_near_the_oracle(name):
    assert relative_errors(*paths(name, "float32")).max() < 1e-3


@pytest.mark.parametrize("move", ["tangent", pytest.param("alternate", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "shape",
    [
        (12, 10, 3),
        (7, 7, 7),
        pytest.param((9, 14, 1), marks=pytest.mark.slow),
        pytest.param((10, 6, 6), marks=pytest.mark.slow),
    ],
)
def test_the_increment_of_w_is_the_dense_one(shape, move):
    """To first order in the rate, with clip, decay and s, while moments build up."""
    numbers = {"eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 0.2, "scaling": 2.0, "move": move}
    tx = loft(0.01, second_moment="full", **numbers)
    update = jax.jit(tx.update)
    for start in ("both", "b is zero", "a lost column"):
        problem = least_squares(*shape)
        if start == "b is zero":
            problem["b"][:] = 0
        if start == "a lost column":
            problem["a"][:, -1] = problem["a"][:, 0] if shape[2] > 1 else 0
        oracle = DenseLoFT(problem["a"], problem["b"], 0.01, **numbers)
        with jax.enable_x64(True):
            params = {"lora_a": jnp.asarray(problem["a"]), "lora_b": jnp.asarray(problem["b"])}
            state = tx.init(params)
            for _ in range(3):
                # From one point, since how a dependent column shares in a move is a choice.
                oracle.a, oracle.b = (np.asarray(params[key]) for key in ("lora_a", "lora_b"))
                full = problem["x"].T @ (problem["x"] @ (oracle.w - problem["target"]))
                grads = {"lora_a": 2 * full @ oracle.b.T, "lora_b": 2 * oracle.a.T @ full}
                updates, state = update(grads, state, params)
                u_a, u_b = (np.asarray(updates[key]) for key in ("lora_a", "lora_b"))
                moved = 2 * (u_a @ oracle.b + oracle.a @ u_b)
                oracle.step(full)
                error = np.linalg.norm(moved - oracle.first_order)
                assert error <= 1e-10 * np.linalg.norm(oracle.first_order), start
                params = optax.apply_updates(params, updates)


@pytest.mark.parametrize(
    ("shape", "turn"),
    [
        ((12, 10, 3), "a"),
        ((6, 11, 6), "b"),
        pytest.param((12, 10, 3), "b", marks=pytest.mark.slow),
        pytest.param((6, 11, 6), "a", marks=pytest.mark.slow),
    ],
)
def test_without_moments_w_moves_along_the_projected_gradient(shape, turn):
    """With a direction that is the gradient itself, the increment is its projection on the space
    that is tangent at W to the matrices of rank r: `Π_R G + G Π_P - Π_R G Π_P`."""
    problem = least_squares(*shape)
    rng = np.random.default_rng(1)
    a, b, full = problem["a"], problem["b"], rng.normal(size=shape[:2])
    rows, columns = a @ np.linalg.pinv(a), np.linalg.pinv(b) @ b
    expected = rows @ full + full @ columns - rows @ full @ columns
    clip = clip_by_projected_norm(1e9, first=turn)
    with jax.enable_x64(True):
        params = {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}
        tx = optax.chain(project_gradients(), clip, optax.scale(1e-3), assign_overlap(turn), clip)
        updates, state = tx.update(
            {"lora_a": full @ b.T, "lora_b": a.T @ full}, tx.init(params), params
        )
        moved = updates["lora_a"] @ b + a @ updates["lora_b"]
        np.testing.assert_allclose(moved, 1e-3 * expected, atol=1e-13)
        # The same norm before the overlap is left to one factor, and after.
        norm = np.linalg.norm(expected)
        np.testing.assert_allclose(state[1].projected_norm, norm, rtol=1e-10)
        np.testing.assert_allclose(state[4].projected_norm, 1e-3 * norm, rtol=1e-10)


def test_gradient_of_the_problem():
    problem = least_squares(5, 4, 2)
    with jax.enable_x64(True):
        w = jnp.asarray(problem["a"] @ problem["b"])
        loss = lambda w: 0.5 * jnp.sum((problem["x"] @ (w - problem["target"])) ** 2)  # noqa: E731
        np.testing.assert_allclose(gradient(problem, w), jax.grad(loss)(w), rtol=1e-12)
