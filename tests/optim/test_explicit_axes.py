"""Meshes with explicit axes, as `jax.make_mesh` makes them; parameters that name their axes.

Jax fixes its number of devices when it starts, so the meshes live in a process of their own: this
module, run as a script, prints what it finds as JSON, and the tests judge it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import loft_jax
from tests.optim.transforms import LR, MOMENTS, TRANSFORMS, gradients, make, normal, pair

PARAMS = {
    "bias": normal(1, 8),
    "plain": pair(2, m=8, n=8),
    "stack": pair(4, m=8, n=8, stack=(4,)),
}
LAYOUT = {
    "bias": P("tp"),
    "plain": {"lora_a": P("fsdp"), "lora_b": P(None, "tp")},
    "stack": {"lora_a": P("tp", "fsdp"), "lora_b": P(None, None, ("fsdp", "tp"))},
}
# What runs by default, beside LoFT on parameters that name their axes; the rest of the table, for
# minutes, with -m slow.
FAST = ("reflora_s",)
EXPLICIT = {name: name in FAST for name in TRANSFORMS}
NAMED = {
    f"{kind}, {second_moment}": (kind, second_moment) == ("Explicit", "factored")
    for kind in ("Auto", "Explicit")
    for second_moment in ("full", "factored", "diagonal")
}


def on_mesh(name):
    """How far a mesh is from one device, and whether all lies there as it does with AdamW."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    layout = jax.tree.map(lambda spec: NamedSharding(mesh, spec), LAYOUT)
    given = jax.device_put(PARAMS, layout)
    factory, numbers, others = TRANSFORMS[name]
    with jax.set_mesh(mesh):
        # The numbers are arrays of the mesh too, which the transformation closes over.
        tx = optax.inject_hyperparams(factory)(**numbers, **others)
        reached, state = steps(tx, given)
        shardings = loft_jax.state_shardings(tx, given)
    return {
        "distance": distance(reached, steps(make(name), PARAMS)[0]),
        "parameters": laid_out(reached, layout),
        "state": laid_out(state, shardings),
    }


def steps(tx, params, count=1):
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(count):
        params, state = step(params, state)
    return params, state


def distance(x, y):
    both = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in both)


def laid_out(tree, layout):
    both = zip(jax.tree.leaves(tree), jax.tree.leaves(layout), strict=True)
    return all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in both)


class Factors(nnx.Module):
    """Factors beside an einsum of heads; A has an axis more than its gram matrix."""

    def __init__(self):
        def named(value, *axes):
            init = nnx.with_partitioning(lambda: value, axes)
            return nnx.LoRAParam(init())

        self.lora_a = named(normal(1, 4, 8, 2), "tp", "fsdp", None)  # (heads, head, r)
        self.lora_b = named(normal(2, 2, 8), None, "fsdp")


def with_named_axes(name):
    """Two steps of `nnx.Optimizer` on a model whose variables name mesh axes."""
    kind, second_moment = name.split(", ")
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(AxisType[kind],) * 2)
    tx = loft_jax.loft(LR, **MOMENTS, second_moment=second_moment)
    with jax.set_mesh(mesh):
        model = Factors()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
        state = nnx.state(optimizer, nnx.optimizer.OptState)
        nnx.update(optimizer, jax.device_put(state, nnx.get_named_sharding(state, mesh)))

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, gradients(nnx.state(model, nnx.LoRAParam)))

        for _ in range(2):
            step(model, optimizer)
        params = nnx.state(model, nnx.LoRAParam)
        layout = nnx.get_named_sharding(params, mesh)
        shardings = loft_jax.state_shardings(tx, params)
    plain = {"lora_a": normal(1, 4, 8, 2), "lora_b": normal(2, 2, 8)}
    return {
        "distance": distance(params, steps(tx, plain, 2)[0]),
        "parameters": laid_out(params, layout),
        "state": laid_out(optimizer.opt_state, shardings),
    }


@pytest.fixture(scope="module")
def probes(request):
    items = [item for item in request.session.items if item.path == request.path]
    names = dict.fromkeys(item.callspec.params["name"] for item in items)
    run = subprocess.run(
        [sys.executable, "-m", __name__, *names],
        cwd=Path(__file__).parents[2],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        },
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(run.stdout)


def each_of(table):
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "name", [name if fast else pytest.param(name, marks=slow) for name, fast in table.items()]
    )


@each_of(EXPLICIT)
def test_explicit_axes_are_worked_on_as_by_adamw(probes, name):
    assert probes[name]["distance"] < 1e-4
    assert probes[name]["parameters"]
    assert probes[name]["state"]


@each_of(NAMED)
def test_state_is_laid_out_where_parameters_name_their_axes(probes, name):
    assert probes[name]["distance"] < 1e-4
    assert probes[name]["parameters"]
    assert probes[name]["state"]


if __name__ == "__main__":
    print(json.dumps({x: (with_named_axes if x in NAMED else on_mesh)(x) for x in sys.argv[1:]}))
