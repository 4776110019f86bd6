"""No transform makes a number that is not finite out of finite ones, at any rank, from B = 0.

The gradients are those of a full weight, or any at all: in the first step of an adapter's life a
factor may end up nearly singular, which nothing may divide by.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loft_jax

LR, STEPS = 0.1, 4
LOFT = {
    "full": {},
    "factored": {"second_moment": "factored"},
    "diagonal": {"second_moment": "diagonal"},
    "bfloat16": {"state_dtype": "bfloat16", "mu_dtype": "bfloat16"},
    "clipped, decayed": {"max_grad_norm": 0.1, "weight_decay": 0.1, "scaling": 4.0},
    "balanced": {"balance": True},
    "balanced, factored": {"balance": True, "second_moment": "factored"},
}
TRANSFORMS = {
    **{
        f"loft, {name}, {move}": lambda x=numbers, y=move: loft_jax.loft(LR, move=y, **x)
        for name, numbers in LOFT.items()
        for move in ("tangent", "alternate")
    },
    "loft_muon, tangent": lambda: loft_jax.loft_muon(LR),
    "loft_muon, alternate": lambda: loft_jax.loft_muon(LR, move="alternate"),
    "reflora": lambda: loft_jax.reflora(LR, warmup_steps=0),
    "reflora_s": lambda: loft_jax.reflora_s(LR, warmup_steps=0),
    "lora_plus": lambda: loft_jax.lora_plus(LR),
    "lora_fa": lambda: loft_jax.lora_fa(LR),
    "riemannian_lora": lambda: loft_jax.riemannian_lora(LR),
    "alt_lora_plus": lambda: loft_jax.alt_lora_plus(LR),
}


SHAPES = [(9, 9, 9), (5, 13, 5), (12, 7, 3), (7, 1, 1)]
# Daily each shape once, with methods that have what others have not; the others when asked for.
QUICK = {"loft, balanced, tangent": SHAPES[::2], "loft_muon, tangent": SHAPES[1::2]}
CASES = [
    pytest.param(name, shapes, marks=marks)
    for name in TRANSFORMS
    for shapes, marks in (
        (QUICK.get(name, []), ()),
        ([shape for shape in SHAPES if shape not in QUICK.get(name, [])], pytest.mark.slow),
    )
    if shapes
]


@functools.cache
def steps_of(name):
    """All steps as one program, which says after which of them all is finite."""
    tx = TRANSFORMS[name]()

    def step(carry, given):
        params, state = carry
        full, grads, of_weight, size = given
        a, b = params["lora_a"], params["lora_b"]
        projected = {"lora_a": full @ b.T, "lora_b": a.T @ full}
        grads = jax.tree.map(lambda x, y: size * jnp.where(of_weight, x, y), projected, grads)
        updates, state = tx.update(grads, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(carry)]).all()

    return jax.jit(lambda params, given: jax.lax.scan(step, (params, tx.init(params)), given)[1])


def stays_finite(name, shape, kind, from_zero, seed):
    m, n, r = shape
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    params = {"lora_a": normal(m, r), "lora_b": normal(r, n) * (not from_zero)}
    grads = {"lora_a": normal(STEPS, m, r), "lora_b": normal(STEPS, r, n)}
    size = np.float32([1, *[kind != "zero later"] * (STEPS - 1)])
    given = normal(STEPS, m, n), grads, np.full(STEPS, kind != "any"), size
    assert steps_of(name)(params, given).all(), (name, shape, kind, seed)


@pytest.mark.parametrize(("name", "shapes"), CASES)
@settings(max_examples=30, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from(["of a weight", "any", "zero later"]),
    from_zero=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_stays_finite(name, shapes, data, kind, from_zero, seed):
    stays_finite(name, data.draw(st.sampled_from(shapes)), kind, from_zero, seed)


@pytest.mark.parametrize("size", [9, pytest.param(32, marks=pytest.mark.slow)])
def test_a_random_gradient_at_full_rank_with_balance(size):
    for seed in range(8):
        stays_finite("loft, balanced, tangent", (size, size, size), "any", True, seed)
