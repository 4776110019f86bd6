"""Square and full rank, LoFT is AdamW on the weight: the judge is optax.adamw in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.optim.problems import adamw_path, least_squares, loft_path, relative_errors

STEPS = 200
# Largest distance of W on its way, relative. An eps of 1e-8 is far below the gradients of this
# problem's end: Adam's step is then a sign, and magnifies rounding, by a factor that depends on the
# machine. One of 1e-3 does not.
TOLERANCES = {
    ("float64", 1e-3): 1e-11,
    ("float64", 1e-8): 1e-8,
    ("float32", 1e-3): 5e-4,
    ("float32", 1e-8): 2e-2,
}
CASES = list(
    itertools.product(
        (1e-8, 1e-3),  # eps
        (0.0, 0.1),  # weight decay
        (np.inf, 1.0),  # max_grad_norm
        (False, True),  # schedule
        (1.0, 4.0),  # scaling
    )
)


def learning_rates(schedule):
    if schedule:
        warmup = optax.warmup_cosine_decay_schedule(0.0, 0.03, 20, STEPS)
        return np.asarray([float(warmup(k)) for k in range(STEPS)])
    return np.full(STEPS, 0.03)


@pytest.mark.parametrize("size", [pytest.param(8, marks=pytest.mark.slow), 13])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_w_follows_adamw(size, dtype):
    with jax.enable_x64(True):
        problem = least_squares(size, size, size, seed=size)

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
            ours = loft_path(problem, STEPS, dtype, **hyperparameters(*case))
            return ours, adamw_path(problem, STEPS, "float64", **hyperparameters(*case))

        for eps, decay, clip, schedule, scaling in CASES:
            case = (eps, decay, clip, learning_rates(schedule), scaling)
            errors = relative_errors(*paths(*(jnp.asarray(x, dtype) for x in case)))
            assert errors.max() < TOLERANCES[dtype, eps], (eps, decay, clip, schedule, scaling)
