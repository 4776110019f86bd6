"""The path of W depends neither on how W is split into factors, nor on s."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.optim.problems import least_squares, loft_path, relative_errors

STEPS = 20
TOLERANCE = {"float64": 1e-8, "float32": 1e-3}
KINDS = [("full", "tangent"), ("factored", "tangent"), ("full", "alternate")]
SHAPES = [(12, 9, 4), (20, 30, 6), (8, 8, 8)]
every_case = pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        # Daily each kind and each shape once.
        pytest.param(shape, dtype, kind, marks=() if i == j and (j == 1) == k else pytest.mark.slow)
        for i, shape in enumerate(SHAPES)
        for j, kind in enumerate(KINDS)
        for k, dtype in enumerate(["float64", "float32"])
    ],
)


@functools.cache
def path_function(shape, dtype, second_moment, move):
    """Compiled once for a shape: factors and s are its arguments."""
    problem = least_squares(*shape, seed=1)
    if dtype == "float64":
        # Less than a step: the product of both updates is bounded at first. In float32 signs of the
        # first step would turn with rounding, and W is little more than that step.
        problem["b"] /= 1e3
    numbers = {
        "learning_rate": 0.01,
        "second_moment": second_moment,
        "move": move,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
    }

    @jax.jit
    def path(a, b, scaling):
        moved = {**problem, "a": a, "b": b}
        return loft_path(moved, STEPS, dtype, scaling=scaling, **numbers)

    return problem, path


def gauge(r, condition, seed):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(r, r)))[0] for _ in range(2))
    return u @ np.diag(np.geomspace(1, 1 / condition, r)) @ v


@every_case
@settings(max_examples=6, deadline=None)
@given(
    condition=st.floats(1.0, 1e3),
    seed=st.integers(0, 2**32 - 1),
)
def test_gauge(shape, dtype, kind, condition, seed):
    with jax.enable_x64(True):
        problem, path = path_function(shape, dtype, *kind)
        t = gauge(shape[2], condition, seed)
        a, b = problem["a"] @ t, np.linalg.solve(t, problem["b"])
        errors = relative_errors(path(a, b, 1.0), path(problem["a"], problem["b"], 1.0))
    assert errors.max() < TOLERANCE[dtype]


@every_case
@settings(max_examples=6, deadline=None)
@given(
    log_scaling=st.floats(-3, 3),
    sign=st.sampled_from([-1.0, 1.0]),
)
def test_scaling(shape, dtype, kind, log_scaling, sign):
    """The same W from factors made for another s."""
    scaling = sign * 10**log_scaling
    with jax.enable_x64(True):
        problem, path = path_function(shape, dtype, *kind)
        errors = relative_errors(
            path(problem["a"], problem["b"] / scaling, scaling),
            path(problem["a"], problem["b"], 1.0),
        )
    assert errors.max() < TOLERANCE[dtype]


@pytest.mark.parametrize("scaling", [3.0, -0.07])
@pytest.mark.parametrize("move", ["tangent", "alternate"])
@pytest.mark.parametrize(("dtype", "steps"), [("float64", STEPS), ("float32", 2)])
def test_scaling_where_few_rows_span_few_directions(scaling, move, dtype, steps):
    """From B = 0, with two rows of data and rank 4: B has rank 2 at first, and then directions that
    are too small for float32."""
    problem = least_squares(12, 9, 4, seed=1)
    problem |= {"x": problem["x"][:2], "b": np.zeros_like(problem["b"])}
    numbers = {"second_moment": "factored", "move": move, "learning_rate": 0.01}
    with jax.enable_x64(True):
        path = functools.partial(loft_path, problem, steps, dtype, **numbers)
        errors = relative_errors(path(scaling=scaling), path())
    assert errors.max() < TOLERANCE[dtype]
