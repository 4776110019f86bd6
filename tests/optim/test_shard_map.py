"""Updates inside of `jax.shard_map`, whose types say which axes of a mesh an array varies along."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from tests.optim.transforms import ROUNDING, assert_close, each_of, gradients, make, normal, pair

PARAMS = {"bias": normal(1, 1, 8), "stack": pair(4, stack=(1, 3))}
# They differ in the loops and the branches that they have; those of OTHERS are slow.
OTHERS = (
    "loft",
    "loft, alternate",
    "loft, balanced",
    "loft, diagonal",
    "loft, bfloat16",
    "loft_muon",
)
DAILY = ("loft, clipped", "reflora")


@each_of((*DAILY, *OTHERS), DAILY)
def test_each_device_may_have_adapters_of_its_own(name):
    tx = make(name)

    def two_steps(params):
        params = jax.tree.map(lambda x: x[0], params)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(gradients(params), state, params)
            params = optax.apply_updates(params, updates)
        return jax.tree.map(lambda x: jnp.asarray(x)[None], params)

    mesh = jax.sharding.Mesh(jax.devices()[:1], "d")
    mapped = jax.shard_map(two_steps, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    assert_close(jax.jit(mapped)(PARAMS), jax.jit(two_steps)(PARAMS), *ROUNDING.get(name, ()))


@each_of(("loft", "loft, clipped", "loft_muon", "reflora"), ("loft, clipped",))
def test_one_factor_may_be_that_of_all_devices(name):
    tx, params = make(name), pair(4)

    def updates(a, b):
        given = {"lora_a": a, "lora_b": b}
        return tx.update(gradients(given), tx.init(given), given)[0]

    mesh = jax.sharding.Mesh(jax.devices()[:1], "d")
    mapped = jax.shard_map(updates, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))
    factors = params["lora_a"], params["lora_b"]
    assert_close(jax.jit(mapped)(*factors), jax.jit(updates)(*factors), *ROUNDING.get(name, ()))
