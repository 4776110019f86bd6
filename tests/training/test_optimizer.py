import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loft_jax.data import DataConfig
from loft_jax.training.config import FinetuneConfig
from loft_jax.training.optimizer import make_optimizer, make_schedule


def config(**changes):
    return FinetuneConfig("m", DataConfig("d"), "o", **changes)


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_warmup_and_course(name, middle, end):
    schedule = make_schedule(config(learning_rate=1.0, warmup_steps=4, schedule=name), 24)
    rates = [float(schedule(step)) for step in range(25)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose([rates[14], rates[24]], [middle, end], atol=1e-6)
    assert make_schedule(config(learning_rate=1.0, schedule=name), 10)(0) == 1.0


def test_warmup_of_one_step_and_of_all():
    assert make_schedule(config(learning_rate=1.0, warmup_steps=1), 10)(0) == 1.0
    whole = make_schedule(config(learning_rate=1.0, warmup_steps=50), 10)
    np.testing.assert_allclose([whole(0), whole(9)], [0.1, 1.0], rtol=1e-6)


def test_methods_clip_alike():
    params = {"w": jnp.zeros(2)}
    grads = {"w": jnp.asarray([30.0, 40.0])}
    for method in ("lora", "full"):
        ours = make_optimizer(
            config(method=method, max_grad_norm=0.5, eps=1.0),
            optax.constant_schedule(1.0),
            lambda path: 1.0,
        )
        updates, _ = ours.update(grads, ours.init(params), params)
        # Clipped to (0.3, 0.4); with eps 1, the first step of Adam is g / (|g| + 1).
        np.testing.assert_allclose(updates["w"], [-0.3 / 1.3, -0.4 / 1.4], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "width", "dtype"),
    [
        ({}, 10, jnp.float32),
        ({"state_dtype": "bfloat16"}, 10, jnp.bfloat16),
        ({"second_moment": "factored"}, 1, jnp.float32),
        ({"second_moment": "diagonal"}, 4, jnp.float32),
    ],
)
def test_second_moments_of_loft(changes, width, dtype):
    params = {"lora_a": jnp.ones((8, 4)), "lora_b": jnp.zeros((4, 6))}
    tx = make_optimizer(config(**changes), optax.constant_schedule(1.0), lambda path: 1.0)
    moments = optax.tree.get(tx.init(params), "nu")
    assert moments["lora_a"].shape == (8, width)
    assert moments["lora_a"].dtype == dtype


def test_balance_is_passed_on():
    params = {"lora_a": 4 * jnp.eye(2), "lora_b": jnp.eye(2)}
    zeros = {"lora_a": jnp.zeros((2, 2)), "lora_b": jnp.zeros((2, 2))}
    for balance, size in ((True, 2.0), (False, 4.0)):
        run = config(balance=balance, max_grad_norm=0.0)
        tx = make_optimizer(run, optax.constant_schedule(1.0), lambda path: 1.0)
        updates, _ = tx.update(zeros, tx.init(params), params)
        moved = optax.apply_updates(params, updates)
        np.testing.assert_allclose(jnp.linalg.norm(moved["lora_a"], 2), size, rtol=1e-5)
