"""Trees without pairs: an error that names the paths, or plain AdamW where that is asked for."""

import jax
import jax.numpy as jnp
import optax
import pytest

import loft_jax
from tests.optim.transforms import (
    PARAMS,
    TRANSFORMS,
    assert_close,
    every_form,
    follow,
    make,
)


@every_form
def test_empty_trees(name):
    tx = make(name)
    state = tx.init({})
    updates, state = tx.update({}, state, {})
    assert updates == {}


@every_form
def test_no_pair_is_an_error(name):
    with pytest.raises(ValueError, match=r"no factor pair.*kernel.*factors=\(\)"):
        make(name).init({"kernel": jnp.zeros((3, 3))})


@every_form
def test_half_a_pair_is_an_error(name):
    """A mask may not go through a pair."""
    mask = {"head": True, "q": {"lora_a": True, "lora_b": False}}
    with pytest.raises(ValueError, match="half a factor pair: found 'q/lora_a' but not 'q/lora_b'"):
        optax.masked(make(name), mask).init(PARAMS)


def parabola(dtype):
    final = jnp.array([1.0, -1.0, 1.0], dtype) * (1 + 1j if dtype == "complex64" else 1)
    return jnp.array([-1.0, 10.0, 1.0], dtype), final, lambda p: squares(p - final)


def rosenbrock(dtype):
    a = 1 + 1j if dtype == "complex64" else 1.0

    def loss(p):
        return squares(a - p[0]) + 100 * squares(p[1] - p[0] ** 2)

    return jnp.zeros(2, dtype), jnp.array([a, a**2], dtype), loss


def matrix_parabola(dtype):
    final = jnp.array([[3.0, -2.0], [1.0, 4.0]], dtype)
    return jnp.zeros((2, 2), dtype), final, lambda p: squares(p - final)


def mixed_tensors(dtype):
    final = (jnp.array([1.0, -1.0, 2.0], dtype), jnp.array([[1.0, 0.0], [-1.0, 1.0]], dtype))
    start = jax.tree.map(jnp.zeros_like, final)
    return start, final, lambda p: squares(p[0] - final[0]) + squares(p[1] - final[1])


def squares(x):
    return jnp.sum((x * x.conj()).real)


@pytest.mark.parametrize(
    ("problem", "dtype"),
    [
        (parabola, "float32"),
        (parabola, "complex64"),
        (rosenbrock, "float32"),
        (rosenbrock, "complex64"),
        (matrix_parabola, "float32"),
        (mixed_tensors, "float32"),
    ],
)
def test_problems_of_optax_without_pairs(problem, dtype):
    """Those of its common tests, with their numbers of steps and tolerance."""
    start, final, loss = problem(dtype)
    tx = loft_jax.loft(1e-1, factors=())

    def body(carry, _):
        params, state = carry
        grads = jax.tree.map(jnp.conj, jax.grad(loss)(params))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda: jax.lax.scan(body, (start, tx.init(start)), length=10_000))()
    assert_close(params, final, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", ["loft", "loft, alternate", "loft, a first", "loft, balanced"])
def test_no_pairs_on_purpose_is_adamw(name):
    factory, numbers, others = TRANSFORMS[name]
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    ours = follow(factory(**numbers, **others, factors=()), params, 3)
    assert_close(ours, follow(optax.adamw(**numbers), params, 3))
