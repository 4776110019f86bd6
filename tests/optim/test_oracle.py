"""Low rank: the judge is the dense float64 oracle, and numbers kept from runs of the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.optim.problems import gradient, least_squares, loft_path, relative_errors
from tests.oracle import DenseLoFT

CASES = {
    "low_rank": ((24, 17, 4), {"eps": 1e-8}),
    "tall": ((30, 9, 3), {"eps": 1e-6}),
    "rank_one": ((16, 30, 1), {"eps": 1e-8}),
    "rank_min": ((9, 14, 9), {"eps": 1e-8}),
    "full_rank": ((12, 12, 12), {"learning_rate": 0.03, "eps": 1e-3}),
    "scaled": ((15, 20, 3), {"eps": 1e-6, "scaling": 4.0}),
    "decay_and_clip": ((20, 20, 5), {"eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 0.05}),
    "betas": ((14, 11, 4), {"b1": 0.8, "b2": 0.95, "max_grad_norm": 1.0}),
    "no_moments": ((14, 11, 4), {"b1": 0.0, "b2": 0.0, "eps": 1e-3}),
    "a_first": ((18, 13, 4), {"first": "a"}),
    "both_move": ((18, 13, 4), {"alternate": False, "weight_decay": 0.1, "max_grad_norm": 0.5}),
    "b_is_zero": ((24, 17, 4), {"eps": 1e-8}),
    "b_is_zero_clip": ((13, 18, 5), {"eps": 1e-6, "max_grad_norm": 0.05, "scaling": 2.0}),
    "schedule": ((18, 13, 4), {"learning_rate": lambda count: 0.01 / (1 + count)}),
}
STEPS = 100


def oracle_path(problem, steps, *, learning_rate, **hyperparameters):
    if callable(learning_rate):
        learning_rate = np.asarray([learning_rate(count) for count in range(steps)])
    oracle = DenseLoFT(problem["a"], problem["b"], learning_rate, **hyperparameters)
    path = []
    for _ in range(steps):
        x = problem["x"]
        oracle.step(x.T @ (x @ (oracle.w - problem["target"])))
        path.append(oracle.w)
    return np.stack(path)


@pytest.mark.parametrize("name", CASES)
def test_path_is_the_oracles(name):
    (m, n, r), hyperparameters = CASES[name]
    hyperparameters = {"learning_rate": 0.01, **hyperparameters}
    problem = least_squares(m, n, r)
    if name.startswith("b_is_zero"):
        problem["b"][:] = 0
    with jax.enable_x64(True):
        ours = jax.jit(lambda: loft_path(problem, STEPS, "float64", **hyperparameters))()
    assert relative_errors(ours, oracle_path(problem, STEPS, **hyperparameters)).max() < 1e-8


@pytest.mark.parametrize("name", ["low_rank", "scaled", "decay_and_clip"])
def test_float32_stays_near_the_oracle(name):
    (m, n, r), hyperparameters = CASES[name]
    hyperparameters = {"learning_rate": 0.01, **hyperparameters}
    problem = least_squares(m, n, r)
    ours = jax.jit(lambda: loft_path(problem, STEPS, "float32", **hyperparameters))()
    assert relative_errors(ours, oracle_path(problem, STEPS, **hyperparameters)).max() < 1e-3


@pytest.mark.parametrize("b_is_zero", [True, False])
def test_start_and_lost_rank(b_is_zero):
    """B = 0, and a column of A that repeats another: only what the columns span moves."""
    problem = least_squares(12, 10, 3)
    problem["a"][:, 2] = problem["a"][:, 0]
    if b_is_zero:
        problem["b"][:] = 0
    with jax.enable_x64(True):
        ours = jax.jit(lambda: loft_path(problem, 3, "float64", learning_rate=0.01))()
    errors = relative_errors(ours, oracle_path(problem, 3, learning_rate=0.01))
    # The span is the same, so the first step of W is; how a dependent column shares in it is a
    # choice, and decides what A can do next.
    assert errors[0] < 1e-8


def test_gradient_of_the_problem():
    problem = least_squares(5, 4, 2)
    with jax.enable_x64(True):
        w = jnp.asarray(problem["a"] @ problem["b"])
        loss = lambda w: 0.5 * jnp.sum((problem["x"] @ (w - problem["target"])) ** 2)  # noqa: E731
        np.testing.assert_allclose(gradient(problem, w), jax.grad(loss)(w), rtol=1e-12)
