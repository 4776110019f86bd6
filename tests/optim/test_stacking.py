"""Stacks of separate pairs: taken apart as `jnp.unstack` does, and made once for a whole chain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loft_jax import clip_by_projected_norm, loft, project_gradients, share_bases
from loft_jax.optim.stacking import unstack

COUNT = 12
MOVES = loft(1e-2, eps=1e-3)


def separate_pairs(count):
    keys = jax.random.split(jax.random.key(0), 2 * count)
    return {
        str(i): {
            "lora_a": jax.random.normal(keys[2 * i], (6, 2)),
            "lora_b": jax.random.normal(keys[2 * i + 1], (2, 5)),
        }
        for i in range(count)
    }


@pytest.mark.parametrize("count", [1, 7, 8, 33])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_unstack_is_that_of_jax(count, dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.arange(count * 6).reshape(count, 2, 3).astype(dtype)
        for parts in (unstack(x), jax.jit(unstack)(x)):
            assert len(parts) == count
            for part, expected in zip(parts, jnp.unstack(x), strict=True):
                assert part.dtype == x.dtype
                np.testing.assert_array_equal(part, expected)


def test_unstack_has_gradients():
    x = jnp.arange(COUNT * 6.0).reshape(COUNT, 2, 3)
    slope = jax.grad(lambda x: sum(i * jnp.sin(part).sum() for i, part in enumerate(unstack(x))))
    expected = jnp.arange(COUNT)[:, None, None] * jnp.cos(x)
    np.testing.assert_allclose(jax.jit(slope)(x), expected, rtol=1e-5, atol=1e-6)


def step(params, tx=MOVES):
    grads = jax.tree.map(jnp.cos, params)
    return optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])


def alone(function, params):
    function = jax.jit(function)
    return {name: function({"only": pair})["only"] for name, pair in params.items()}


def test_many_pairs_move_as_each_alone():
    """By themselves, and in a scan of a batch of seeds."""
    params = separate_pairs(8)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jax.jit(step)(params), alone(step, params))

    projected = functools.partial(step, tx=project_gradients())
    seeds = jax.tree.map(lambda x: x[None], params)
    scan = functools.partial(jax.lax.scan, lambda p, _: (jax.vmap(projected)(p), None), length=1)
    found, _ = jax.jit(scan)(seeds)
    jax.tree.map(lambda x, y: close(x[0], y), found, alone(projected, params))


@pytest.mark.slow
def test_the_gradient_of_a_step_of_many_pairs_is_that_of_each_alone():
    params = separate_pairs(8)

    def size(params):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(step(params, project_gradients())))

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3)
    slopes = alone(jax.grad(size), params)
    jax.tree.map(close, jax.jit(jax.grad(size))(params), slopes)


def test_only_a_program_for_cpus_looks_places_up():
    x = jnp.zeros((COUNT, 4, 3))
    for platform, loops in (("cpu", 1), ("tpu", 0), ("cuda", 0)):
        text = jax.jit(unstack).trace(x).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.while") == loops


def test_one_kernel_serves_all_parts():
    """Kernels are what computations are called: of parts whose places are known, one each."""
    text = jax.jit(unstack).lower(jnp.zeros((COUNT, 64, 16))).compile().as_text()
    assert " slice(" not in text
    assert text.count(" dynamic-slice(") == COUNT


def concatenations(tx, params):
    text = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params).as_text()
    whole = f"tensor<{COUNT}x1x6x2xf32>"
    return sum("stablehlo.concatenate" in x and x.endswith(whole) for x in text.splitlines())


def test_what_links_hand_on_is_stacked_once():
    """Of A: gradient, parameter, first moment, basis, and the update that Optax has scaled."""
    assert concatenations(loft(1e-3), separate_pairs(COUNT)) == 5


def test_each_update_has_stacks_of_its_own():
    """Two updates in one trace, with the same parameters: nothing of the first is left."""
    params = separate_pairs(COUNT)
    tx = share_bases(optax.chain(project_gradients(), clip_by_projected_norm(0.1)))
    state = tx.init(params)
    other = jax.tree.map(lambda g: -jnp.cos(g), params)

    @jax.jit
    def both(grads, other, state):
        return [tx.update(x, state, params)[0] for x in (grads, other)]

    for found, grads in zip(both(params, other, state), (params, other), strict=True):
        expected, _ = jax.jit(tx.update)(grads, state, params)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8)
        jax.tree.map(close, found, expected)


def test_both_branches_of_a_condition_stack_for_themselves():
    params = separate_pairs(COUNT)
    scaled = project_gradients()

    def update(updates, state, params=None):
        branches = [lambda: scaled.update(updates, state, params)[0] for _ in range(2)]
        return jax.lax.cond(updates["0"]["lora_a"][0, 0] > 0, *branches), state

    tx = share_bases(optax.GradientTransformation(scaled.init, update))
    found, _ = jax.jit(tx.update)(params, tx.init(params), params)
    expected, _ = jax.jit(scaled.update)(params, scaled.init(params), params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found, expected)
