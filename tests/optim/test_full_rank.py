"""At r = min(m, n) LoFT is AdamW on the weight: the judge is optax.adamw in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loft_jax import loft
from tests.optim.problems import adamw_path, least_squares, loft_path, relative_errors

STEPS = 200
# An eps of 1e-8 is far below gradients at the end of this problem: Adam's step is then a sign, and
# magnifies rounding; with a clip, whose factor both paths round differently, most of all. The
# factor depends on the machine.
TOLERANCES = {"float64": 1e-9, "float32": 1e-3}
UNSTEADY = 1e-8  # in float64, with a clip and that eps


SETTINGS = (
    (1e-8, 1e-3),  # eps
    (0.0, 0.1),  # weight decay
    (np.inf, 1.0),  # max_grad_norm
    (False, True),  # schedule
    (1.0, 4.0),  # scaling
)
# Half of all cases, in which any four settings take all their values together.
CASES = [
    tuple(values[i] for values, i in zip(SETTINGS, which, strict=True))
    for which in itertools.product((0, 1), repeat=len(SETTINGS))
    if sum(which) % 2 == 0
]


@functools.cache
def learning_rates(schedule):
    if schedule:
        warmup = optax.warmup_cosine_decay_schedule(0.0, 0.03, 20, STEPS)
        return np.asarray([float(warmup(k)) for k in range(STEPS)])
    return np.full(STEPS, 0.03)


# Which of them run daily: a square one, each side the longer one, and B = 0 in both precisions.
PATHS = {
    ((8, 8), "tangent"): ("float64",),
    ((12, 6), "tangent"): ("float64",),
    ((6, 12), "tangent"): ("float64",),
    ((1, 7), "tangent"): (),
    ((8, 1), "tangent"): (),
    ((13, 13), "alternate"): (),
    ((8, 8), "tangent from zero"): ("float64", "float32"),
    ((6, 12), "tangent from zero"): (),
}


@pytest.mark.parametrize(
    ("shape", "move", "dtype"),
    [
        pytest.param(*path, dtype, marks=() if dtype in daily else pytest.mark.slow)
        for path, daily in PATHS.items()
        for dtype in ("float64", "float32")
    ],
)
def test_w_follows_adamw(shape, move, dtype):
    with jax.enable_x64(True):
        problem = least_squares(*shape, min(shape), seed=shape[0])
        if move.endswith("from zero"):  # B, as adapters start; A spans the smaller side
            move, problem["b"] = "tangent", np.zeros_like(problem["b"])

        def hyperparameters(eps, decay, clip, rates, scaling):
            return {
                "learning_rate": lambda count: rates[count],
                "eps": eps,
                "weight_decay": decay,
                "max_grad_norm": clip,
                "scaling": scaling,
            }

        @jax.jit
        def paths(*case):
            ours = loft_path(problem, STEPS, dtype, move=move, **hyperparameters(*case))
            return ours, adamw_path(problem, STEPS, "float64", **hyperparameters(*case))

        for eps, decay, clip, schedule, scaling in CASES:
            case = (eps, decay, clip, learning_rates(schedule), scaling)
            errors = relative_errors(*paths(*(jnp.asarray(x, dtype) for x in case)))
            setting = (eps, decay, clip, schedule, scaling)
            if dtype == "float32":
                assert errors[-1] < TOLERANCES[dtype], setting
            elif eps == 1e-8 and np.isfinite(clip):
                assert errors.max() < UNSTEADY, setting
            else:
                assert errors.max() < TOLERANCES[dtype], setting


def b1_that_jumps(count):
    return jnp.where(count < 20, 0.5, 0.95)


@pytest.mark.parametrize(
    ("b1", "b2"),
    [
        (b1_that_jumps, 0.999),
        (0.9, lambda count: jnp.where(count < 20, 0.999, 0.9)),
        (optax.linear_schedule(0.95, 0.0, 40), lambda count: 1 - (count + 2.0) ** -0.8),
    ],
)
def test_w_follows_adamw_with_decays_that_change(b1, b2):
    """Of sparse gradients, at which Adam's largest elements are near their bound."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {"lora_a": rng.normal(size=(4, 4)), "lora_b": rng.normal(size=(4, 6))}
        weight = params["lora_a"] @ params["lora_b"]
        own = optax.inject_hyperparams(loft)(1e-3, b1=b1, b2=b2, second_moment="full")
        adam = optax.inject_hyperparams(optax.adam)(1e-3, b1=b1, b2=b2)
        state, state_of_adam = own.init(params), adam.init(weight)
        update, update_of_adam = jax.jit(own.update), jax.jit(adam.update)
        for _ in range(40):
            full = rng.normal(size=(4, 6)) * (rng.random((4, 6)) < 0.1)
            a, b = params["lora_a"], params["lora_b"]
            updates, state = update({"lora_a": full @ b.T, "lora_b": a.T @ full}, state, params)
            params = optax.apply_updates(params, updates)
            expected, state_of_adam = update_of_adam(full, state_of_adam)
            found = params["lora_a"] @ params["lora_b"] - a @ b
            np.testing.assert_allclose(found, expected, atol=1e-9)
