"""Every transform as a program: one compilation, donated buffers, carried states, dtypes."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.optim.transforms import (
    ADAM_OF_OPTAX,
    ALIASES,
    PARAMS,
    PROJECTED_GRADIENTS,
    ROUNDING,
    TRANSFORMS,
    assert_close,
    assert_stable,
    each_of,
    every_form,
    every_transform,
    gradients,
    make,
    pair,
    path_of,
)


@functools.cache
def compiled_twice(name):
    """Two updates by one compiled function that takes the state and the parameters over."""
    tx = optax.with_extra_args_support(make(name))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, value):
        updates, state = tx.update(gradients(params), state, params, unexpected=value)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    given, path = [(params, state)], []
    for _ in range(2):
        params, state = step(params, state, 1.0)
        path.append(jax.tree.map(jnp.copy, params))
        given.append((params, state))
    return step._cache_size(), given, path


@every_transform
def test_compiled_once_with_extra_arguments(name):
    programs, _, _ = compiled_twice(name)
    assert programs == 1


@each_of(TRANSFORMS, daily=("loft", "reflora_s"))
def test_the_program_computes_what_single_operations_do(name):
    _, _, path = compiled_twice(name)
    rtol, atol = ROUNDING.get(name, (1e-3, 1e-4))
    assert_close(path, path_of(name), rtol, atol)


@every_transform
def test_donated_buffers_are_used(name):
    """All of the old state and parameters: none is left, none was of no use to the new ones.

    But for the norm that a clip found at the last step, which is there to be read only.
    """
    _, (*given, last), _ = compiled_twice(name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(given):
        assert leaf.is_deleted() or "projected_norm" in jax.tree_util.keystr(path)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(last))


@every_form
def test_scan_and_cond(name):
    """The state may be carried by a scan, and chosen by a condition: no type may change."""
    tx = make(name)

    def body(carry, skip):
        params, state = carry
        updates, state = jax.lax.cond(
            skip,
            lambda: (params, state),
            lambda: tx.update(gradients(params), state, params),
        )
        return (optax.apply_updates(params, updates), state), None

    def run(params, skips):
        return jax.lax.scan(body, (params, tx.init(params)), skips)

    jax.eval_shape(run, PARAMS, jnp.zeros(3, bool))


@every_form
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(name, dtype):
    """Updates come in the dtype of the parameters, and states in float32 at least unless asked."""
    with jax.enable_x64(dtype == "float64"), jax.numpy_rank_promotion("raise"):
        params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
        tx = make(name)
        if name in PROJECTED_GRADIENTS:
            updates, _ = jax.eval_shape(tx.update, gradients(params), tx.init(params), params)
            wide = jnp.promote_types(dtype, jnp.float32)
            assert {x.dtype for x in jax.tree.leaves(updates["q"])} == {wide}
            return
        assert_stable(tx, params)
        state = jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, params))
        for path, leaf in state:
            # Muon's plain leaves take Optax's Adam, whose state is in the dtype of the parameters.
            where = jax.tree_util.keystr(path)
            optax_s = name == "loft_muon" and "head" in where
            optax_s |= name in ADAM_OF_OPTAX and ("mu" in where or "nu" in where)
            if jnp.issubdtype(leaf.dtype, jnp.floating) and not optax_s:
                asked = name == "loft, bfloat16" and leaf.dtype == jnp.bfloat16
                assert asked or leaf.dtype == jnp.promote_types(dtype, jnp.float32)


@every_form
@pytest.mark.parametrize("factor", ["lora_a", "lora_b"])
def test_a_factor_in_float64_beside_one_in_float32(name, factor):
    def widened(path, x):
        return x.astype("float64" if path[-1].key == factor else "float32")

    with jax.enable_x64(True):
        params = jax.tree_util.tree_map_with_path(widened, PARAMS)
        if name not in PROJECTED_GRADIENTS:
            assert_stable(make(name), params)


# What chooses between branches, by moments, turns and metrics, or loops over layers.
@each_of(ALIASES, daily=("loft", "loft, full", "loft_muon", "reflora", "reflora_s"))
def test_without_jit_nothing_is_compiled_after_the_first_steps(name, caplog):
    tx, params = make(name), PARAMS | {"stack": pair(2, stack=(2,))}
    state = tx.init(params)

    def step(state):
        return tx.update(gradients(params), state, params)[1]

    for _ in range(2):
        state = step(state)
    with jax.log_compiles():
        for _ in range(2):
            state = step(state)
    assert [x.getMessage() for x in caplog.records if "ompil" in x.getMessage()] == []
