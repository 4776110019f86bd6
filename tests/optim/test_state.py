"""What a state costs, how it lies on a mesh, and which parameter each part of it belongs to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loft_jax import loft, reflora, reflora_s, state_bytes, state_shardings
from tests.optim.transforms import PARAMS as MIXED_PARAMS
from tests.optim.transforms import PROJECTED_GRADIENTS, every_form, kinds, make

MESH = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), ("x", "y", "z"))
STACK, IN, HEADS, OUT, RANK = 3, 64, 4, 8, 2
PARAMS = {
    "q": {
        "lora_a": jnp.ones((STACK, IN, RANK)),
        "lora_b": jnp.ones((STACK, RANK, HEADS, OUT)),
    },
    "head": jnp.ones((5, 7)),
}
SPECS = {"q": {"lora_a": P("x", "y"), "lora_b": P("x", None, "z")}, "head": P(None, "z")}
LAYOUT = jax.tree.map(lambda spec: NamedSharding(MESH, spec), SPECS)


def transforms():
    moments = ({}, {"second_moment": "full"}, {"second_moment": "diagonal"})
    for arguments in (*moments, {"state_dtype": jnp.bfloat16, "mu_dtype": jnp.bfloat16}):
        yield loft(1e-3, max_grad_norm=1.0, **arguments)
    yield from (reflora(1e-3), reflora_s(1e-3))
    yield optax.inject_hyperparams(loft)(1e-3)
    yield optax.MultiSteps(loft(1e-3), 2)
    yield optax.masked(loft(1e-3), {"q": True, "head": False})
    labels = {"q": "loft", "head": "adam"}
    yield optax.partition({"loft": loft(1e-3), "adam": optax.adamw(1e-3)}, labels)
    yield optax.chain(optax.add_noise(1.0, 0.5, jax.random.key(0)), loft(1e-3))


@pytest.mark.parametrize("tx", transforms())
def test_bytes_are_those_of_the_arrays(tx):
    arrays = jax.tree.leaves(tx.init(PARAMS))
    expected = sum(
        jax.random.key_data(x).nbytes if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.nbytes
        for x in arrays
    )
    assert state_bytes(tx, PARAMS) == expected
    assert state_bytes(tx, jax.eval_shape(lambda: PARAMS)) == expected


def spec_of(sharding, ndim):
    return (*sharding.spec, *[None] * (ndim - len(sharding.spec)))


@pytest.mark.parametrize("tx", transforms())
def test_a_sharding_for_every_array(tx):
    """The axes that a state shares with its parameter are split as they are, all others whole."""
    state = jax.eval_shape(tx.init, PARAMS)
    found = state_shardings(tx, PARAMS, LAYOUT)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    split = {"lora_a": ("x", "y", None), "lora_b": ("x", None, "z", None), "head": (None, "z")}
    shardings = jax.tree.leaves(found)
    seen = set()
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(state), shardings, strict=True
    ):
        assert isinstance(sharding, NamedSharding)
        name = next((k.key for k in reversed(path) if getattr(k, "key", None) in split), None)
        spec = spec_of(sharding, len(leaf.shape))
        if name is None:
            assert spec == (None,) * len(leaf.shape)
        elif leaf.shape == (STACK, RANK, RANK):  # of a factored second moment
            assert spec == ("x", None, None)
        else:
            assert spec == split[name]
        seen.add(name)
    assert seen >= {"lora_a", "lora_b"}


def test_shardings_of_the_parameters_themselves():
    params = jax.device_put(PARAMS, LAYOUT)
    tx = loft(1e-3)
    assert state_shardings(tx, params) == state_shardings(tx, PARAMS, LAYOUT)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), PARAMS, LAYOUT
    )
    assert state_shardings(tx, shapes) == state_shardings(tx, PARAMS, LAYOUT)


@pytest.mark.parametrize("second_moment", ["full", "factored"])
def test_they_are_a_jitted_functions_outputs(second_moment):
    tx = loft(1e-3, second_moment=second_moment)
    shardings = state_shardings(tx, PARAMS, LAYOUT)
    state = jax.jit(tx.init, out_shardings=shardings)(PARAMS)
    for array, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)


def test_no_parameters():
    tx = loft(1e-3)
    assert state_bytes(tx, {}) == sum(x.nbytes for x in jax.tree.leaves(tx.init({})))


def test_a_parameter_without_a_named_sharding_is_named():
    params = {**PARAMS, "head": jax.device_put(PARAMS["head"], LAYOUT["head"])}
    with pytest.raises(ValueError, match="'q/lora_a' has sharding SingleDeviceSharding"):
        state_shardings(loft(1e-3), params)
    with pytest.raises(ValueError, match="'head' has sharding None, expected a NamedSharding"):
        state_shardings(loft(1e-3), PARAMS, {**LAYOUT, "head": None})


@every_form
def test_map_params(name):
    """Optax finds the parts of a state that belong to parameters, and to which one each belongs."""
    tx = make(name)
    state = tx.init(MIXED_PARAMS)
    ones = optax.tree.map_params(tx, jnp.ones_like, state)
    assert kinds(ones) == kinds(state)
    for leaf in jax.tree.leaves(ones):
        assert bool((leaf == (leaf.ndim > 0)).all())  # all but counters

    found = []

    def compare(leaf, param):
        if not is_masked(leaf):
            found.append(sum(x != y for x, y in zip(leaf.shape, param.shape, strict=True)))

    optax.tree.map_params(tx, compare, state, MIXED_PARAMS, is_leaf=is_masked)
    keeps_moments = name not in (*PROJECTED_GRADIENTS, "alternate_factors", "assign_overlap")
    assert set(found) <= {0, 1}  # something else in the place of the rank, at most
    assert bool(found) == keeps_moments


def is_masked(x):
    return isinstance(x, optax.MaskedNode)
