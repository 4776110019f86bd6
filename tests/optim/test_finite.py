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
# Each has what others have not; the others run when asked for.
QUICK = ("loft, balanced, tangent", "loft_muon, tangent")


@functools.cache
def made(name):
    tx = TRANSFORMS[name]()
    return tx, jax.jit(tx.update)


def stays_finite(name, shape, kind, from_zero, seed):
    m, n, r = shape
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"lora_a": normal(m, r), "lora_b": jnp.zeros((r, n)) if from_zero else normal(r, n)}
    tx, update = made(name)
    state = tx.init(params)
    for step in range(STEPS):
        full, a, b = normal(m, n), params["lora_a"], params["lora_b"]
        grads = {"lora_a": full @ b.T, "lora_b": a.T @ full}
        if kind == "any":
            grads = {"lora_a": normal(m, r), "lora_b": normal(r, n)}
        if kind == "zero later" and step:
            grads = jax.tree.map(jnp.zeros_like, grads)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for leaf in jax.tree.leaves((params, state)):
            assert bool(jnp.isfinite(leaf).all()), (name, shape, kind, seed, step)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TRANSFORMS],
)
@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(["of a weight", "any", "zero later"]),
    from_zero=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_stays_finite(name, shape, kind, from_zero, seed):
    stays_finite(name, shape, kind, from_zero, seed)


@pytest.mark.parametrize("size", [9, pytest.param(32, marks=pytest.mark.slow)])
def test_a_random_gradient_at_full_rank_with_balance(size):
    for seed in range(8):
        stays_finite("loft, balanced, tangent", (size, size, size), "any", True, seed)
