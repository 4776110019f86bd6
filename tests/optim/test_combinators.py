"""Every transform under every combinator of Optax: the same numbers as by itself."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.optim.transforms import (
    PARAMS,
    ROUNDING,
    TRANSFORMS,
    assert_close,
    assert_stable,
    every_alias,
    every_transform,
    follow,
    gradients,
    make,
    normal,
    op_by_op,
    pair,
    path_of,
)


@every_transform
def test_inject_hyperparams(name):
    factory, numbers, others = TRANSFORMS[name]
    tx = optax.inject_hyperparams(factory)(**numbers, **others)
    assert set(tx.init(PARAMS).hyperparams) >= set(numbers)
    assert_stable(tx, PARAMS)
    # Numbers in float32 instead of float64 round otherwise.
    assert_close(follow(tx, PARAMS, 2), path_of(name), *ROUNDING.get(name, (1e-5, 1e-5)))


@every_alias
def test_injected_numbers_and_decays_that_are_static(name):
    """After Optax's own test, with default decays: of all numbers float32 changes `1 - b2` alone.

    With static decays all of it is the same to the bit. With traced ones the updates are those
    within rtol 1e-5 of their norm, as AdamW's of Optax are; single elements may be small
    differences of larger terms.
    """
    factory, numbers, others = TRANSFORMS[name]
    decays = {"b1", "b2", "beta", "adam_b1", "adam_b2"} & set(inspect.signature(factory).parameters)
    numbers = {key: x for key, x in numbers.items() if key not in decays | {"eps"}}

    def first_update(tx):
        return tx.update(gradients(PARAMS), tx.init(PARAMS), PARAMS)

    with op_by_op():
        updates, state = first_update(factory(**numbers, **others))
        found, inner = first_update(optax.inject_hyperparams(factory, decays)(**numbers, **others))
        assert_close((found, inner.inner_state), (updates, state), 0, 0)
        found, inner = first_update(optax.inject_hyperparams(factory)(**numbers, **others))
    for x, expected in zip(jax.tree.leaves(found), jax.tree.leaves(updates), strict=True):
        assert jnp.linalg.norm(x - expected) <= 1e-5 * jnp.linalg.norm(expected)
    # 1 - float32(0.999) is 9.99987e-4.
    assert_close(inner.inner_state, state, *ROUNDING.get(name, (1.4e-5, 1e-7)))


@every_transform
def test_multi_steps(name):
    """Two half gradients are one."""
    tx = optax.MultiSteps(make(name), 2)
    assert_stable(tx, PARAMS)
    path = follow(tx, PARAMS, 4)
    assert_close(path[0], PARAMS)
    assert_close(path[1::2], path_of(name))


@every_transform
# A partition is made of masked transformations.
@pytest.mark.parametrize("wrap", [pytest.param("masked", marks=pytest.mark.slow), "partition"])
def test_whole_pairs_left_out(name, wrap):
    """What is left out does not matter: before, between and after ours, a plain leaf or a pair."""
    params = {"a": normal(6, 2), **PARAMS, "k": pair(2), "z": normal(7, 2)}
    ours = {key: key in PARAMS for key in params}
    if wrap == "masked":
        theirs = {key: not own for key, own in ours.items()}
        tx = optax.chain(optax.masked(make(name), ours), optax.masked(optax.set_to_zero(), theirs))
    else:
        labels = {key: "ours" if own else "frozen" for key, own in ours.items()}
        tx = optax.partition({"ours": make(name), "frozen": optax.set_to_zero()}, labels)
    assert_stable(tx, params)
    path = follow(tx, params, 2)
    assert_close([{key: p[key] for key in PARAMS} for p in path], path_of(name))
    assert_close({key: path[-1][key] for key in "akz"}, {key: params[key] for key in "akz"}, 0, 0)


@every_transform
def test_apply_if_finite(name):
    """A gradient with a NaN is passed over as if it had not been."""
    tx = optax.apply_if_finite(make(name), max_consecutive_errors=3)
    assert_stable(tx, PARAMS)
    params, path = PARAMS, []
    with op_by_op():
        state = tx.init(params)
        for bad in (False, True, False):
            grads = gradients(params)
            if bad:
                grads["q"]["lora_a"] = grads["q"]["lora_a"].at[0, 0].set(jnp.nan)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            path.append(params)
    assert_close(path[1], path[0], 0, 0)
    assert_close(path[::2], path_of(name))


@every_transform
def test_chain_with_a_schedule_and_extra_arguments(name):
    """Links with and without extra arguments, before and after; a step size that changes."""

    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda u: u * value, updates), state

    by_value = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.0})
    tx = optax.named_chain(
        ("value", by_value), ("ours", make(name)), ("size", optax.scale_by_schedule(schedule))
    )
    path = follow(tx, PARAMS, 2, value=1.0, unexpected=2)
    assert_close(path, [path_of(name)[0]] * 2)


@every_alias
def test_learning_rate_schedule(name):
    factory, numbers, others = TRANSFORMS[name]
    schedule = optax.constant_schedule(numbers["learning_rate"])
    tx = factory(**{**numbers, "learning_rate": schedule}, **others)
    assert_stable(tx, PARAMS)
    assert_close(follow(tx, PARAMS, 2), path_of(name))
