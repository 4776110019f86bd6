"""At r = min(m, n) LoFT is AdamW on the weight: the judge is optax.adamw in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
