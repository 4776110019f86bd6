"""From the configuration of a run to its learning rates and its optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import loft_jax
from loft_jax.data import DataConfig
from loft_jax.lora.targets import scaling_of, stack_axis_of
from loft_jax.methods import METHODS
from loft_jax.training.config import ScheduleConfig
from loft_jax.training.optimizer import make_optimizer, make_schedule
from tests.flat_config import flat_config


def config(**changes):
    return flat_config(model="m", data=DataConfig("d"), output="o", **changes)


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_warmup_and_course(name, middle, end):
    schedule = make_schedule(ScheduleConfig(learning_rate=1.0, warmup_steps=4, shape=name), 24)
    rates = [float(schedule(step)) for step in range(25)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose([rates[14], rates[24]], [middle, end], atol=1e-6)
    assert make_schedule(ScheduleConfig(learning_rate=1.0, shape=name), 10)(0) == 1.0


def test_warmup_of_one_step_and_of_all():
    assert make_schedule(ScheduleConfig(learning_rate=1.0, warmup_steps=1), 10)(0) == 1.0
    whole = make_schedule(ScheduleConfig(learning_rate=1.0, warmup_steps=50), 10)
    np.testing.assert_allclose([whole(0), whole(9)], [0.1, 1.0], rtol=1e-6)


RATE, SCALING = 1e-2, 2.0
ADAM = (RATE, 0.8, 0.95, 1e-3, 0.1)
CLIP = 0.5


def clipped(tx):
    return optax.chain(optax.clip_by_global_norm(CLIP), tx)


def adamw():
    return clipped(optax.adamw(*ADAM[:-1], weight_decay=0.1))


EXPECTED = {
    "loft": lambda: loft_jax.loft(*ADAM, max_grad_norm=CLIP, scaling=SCALING),
    "loft-muon": lambda: loft_jax.loft_muon(
        RATE,
        weight_decay=0.1,
        consistent_rms=0.2,
        adam_b1=0.8,
        adam_b2=0.95,
        eps=1e-3,
        max_grad_norm=CLIP,
        scaling=SCALING,
    ),
    "lora-fa": lambda: loft_jax.lora_fa(*ADAM, max_grad_norm=CLIP, scaling=SCALING),
    "lora-plus": lambda: clipped(loft_jax.lora_plus(*ADAM, ratio=4.0)),
    "riemannian": lambda: clipped(loft_jax.riemannian_lora(*ADAM, damping=0.1)),
    "altlora-plus": lambda: clipped(loft_jax.alt_lora_plus(*ADAM, scaling=SCALING)),
    "reflora": lambda: clipped(loft_jax.reflora(*ADAM, warmup_steps=1)),
    "reflora-s": lambda: clipped(loft_jax.reflora_s(*ADAM, warmup_steps=1)),
    **dict.fromkeys(("lora", "rslora", "dora", "pissa", "full"), adamw),
}
OWN = {
    "lora-plus": {"lora_plus_ratio": 4.0},
    "riemannian": {"damping": 0.1},
    "reflora": {"reflora_warmup_steps": 1},
    "reflora-s": {"reflora_warmup_steps": 1},
}


def walk(tx):
    """Parameters behind some steps, whose gradients are above the norm that is clipped to."""
    rng = np.random.default_rng(0)
    shapes = {"lora_a": (6, 2), "lora_b": (2, 5), "bias": (5,)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        grads = jax.tree.map(lambda x: jnp.cos(3 * x), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_every_method_has_an_optimizer():
    assert set(EXPECTED) == set(METHODS)


@pytest.mark.parametrize("method", EXPECTED)
def test_a_method_is_the_optimizer_of_its_name(method):
    numbers = {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.1, "max_grad_norm": CLIP}
    run = config(method=method, **numbers, **OWN.get(method, {}))
    found = walk(make_optimizer(run, optax.constant_schedule(RATE), SCALING))
    for name, expected in walk(EXPECTED[method]()).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "width", "dtype"),
    [
        ({}, 1, jnp.float32),
        ({"state_dtype": "bfloat16"}, 1, jnp.bfloat16),
        ({"second_moment": "full"}, 10, jnp.float32),
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


@pytest.mark.parametrize("method", EXPECTED)
def test_adapters_know_their_stack(method):
    """Also where shapes cannot tell: as many layers as ranks and as input features."""
    stack = nnx.Linear(4, 12, rngs=nnx.Rngs(0))
    stack.kernel, stack.bias = nnx.Param(jnp.zeros((4, 4, 12))), nnx.Param(jnp.zeros((4, 12)))
    heads = nnx.LinearGeneral(5, (2, 3), rngs=nnx.Rngs(0))
    batched = nnx.LinearGeneral(5, 6, batch_axis={0: 7}, rngs=nnx.Rngs(0))
    model = nnx.Sequential(stack, heads, batched)
    model = loft_jax.add_lora(model, loft_jax.LoRAConfig(rank=4), rngs=nnx.Rngs(1))
    params = nnx.state(model, nnx.LoRAParam)
    stack_axis = stack_axis_of(model)
    assert [stack_axis(f"layers/{i}") for i in range(3)] == [(0,), (), (0,)]
    tx = make_optimizer(
        config(method=method), optax.constant_schedule(RATE), scaling_of(model), stack_axis
    )
    moments = optax.tree.get_all_with_path(jax.eval_shape(tx.init, params), "mu")
    assert moments
    with pytest.raises(ValueError, match=r"'layers/0' can be read in several ways"):
        loft_jax.find_pairs(params)
