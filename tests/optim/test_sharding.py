"""The optimizer on meshes of 8 devices: the same numbers, split states, and no gathered factor.

Jax fixes its number of devices when it starts, so the meshes live in a process of their own: this
module, run as a script, prints what it finds as JSON, and the tests judge it.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import loft_jax
from loft_jax.optim import full_moment

MESHES = {"8": (8,), "4x2": (4, 2), "2x2x2": (2, 2, 2)}

# Long axes, and every shard and tile of them, have more than 16 elements; other axes have less. So
# the dimensions of an array that moves between devices tell what it is.
IN, OUT, RANK, PACKED, STACK = 512, 11 * 32, 4, 10, 8
LONG = 16

# An epsilon that keeps steps from being sign-like, where rounding flips them.
OPTIMIZERS = {
    "full": lambda: loft_jax.loft(
        0.05, eps=1e-2, weight_decay=0.1, max_grad_norm=1.0, second_moment="full"
    ),
    "alternate": lambda: loft_jax.loft(0.05, eps=1e-2, second_moment="full", move="alternate"),
    "factored": lambda: loft_jax.loft(0.05, eps=1e-2, max_grad_norm=1.0),
    "diagonal": lambda: loft_jax.loft(0.05, eps=1e-2, second_moment="diagonal"),
    "balanced": lambda: loft_jax.loft(0.05, eps=1e-2, balance=True),
    "muon": lambda: loft_jax.loft_muon(0.05),
    "reflora": lambda: loft_jax.reflora(0.05, eps=1e-2, warmup_steps=0),
    "riemannian": lambda: loft_jax.riemannian_lora(0.05, eps=1e-2, damping=1e-2),
}
# Optimizer, mesh, and whether the full second moment works in small tiles or in large ones.
RUNS = {
    "full, 8": ("full", "8", "small"),
    "full, 4x2": ("full", "4x2", "small"),
    **{f"{name}, 2x2x2": (name, "2x2x2", "large") for name in OPTIMIZERS},
}

# Compiles for minutes; tests/training/test_mesh.py runs LoFT on meshes too.
pytestmark = pytest.mark.slow


def layouts(optimizer, axes):
    """How the factors of each pair are split; a mesh without an axis does not split by it."""
    x, y, z = (*axes, None, None)[:3]
    every = {
        "whole": (P(), P()),
        "out": (P(), P(None, axes)),
        "in and out": (P(x), P(None, y)),
        "stack, in": (P(None, axes), P()),
        "stack, out": (P(), P(None, None, axes)),
        "stack, in and out": (P(x, y), P(x, None, z)),
        # Split on in. Equal pairs whose names differ in a number move as one batch.
        "layers/0": (P(axes), P()),
        "layers/1": (P(axes), P()),
    }
    few = ("in and out", "stack, in and out", "layers/0", "layers/1")
    return every if optimizer == "full" else {name: every[name] for name in few}


def problem(optimizer, axes):
    """Parameters, and how they lie on a mesh of these axes."""
    params, layout = {}, {}
    for seed, (name, (a, b)) in enumerate(layouts(optimizer, axes).items()):
        stack = (STACK,) if "stack" in name else ()
        factors = jax.random.normal(jax.random.key(seed), (2, *stack, IN, RANK))
        params[name] = {
            "lora_a": factors[0],
            "lora_b": jnp.swapaxes(factors[1], -1, -2)[..., :OUT] / 8,
        }
        layout[name] = {"lora_a": a, "lora_b": b}
    params["bias"], layout["bias"] = jnp.ones(OUT), P(axes)
    return params, layout


def gradients(params):
    """Of the factors, from a gradient that depends on the full weights alone."""

    def of_factors(lora_a, lora_b):
        a, b = lora_a, lora_b
        full = np.sin(a @ b / 4) + 0.3
        return {"lora_a": full @ b.swapaxes(-1, -2), "lora_b": a.swapaxes(-1, -2) @ full}

    params = jax.tree.map(np.asarray, params)
    pairs = {name: of_factors(**x) for name, x in params.items() if name != "bias"}
    return {**pairs, "bias": np.sin(3 * params["bias"]) + 0.3}


def step_of(tx):
    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def on_one_device(name):
    tx, (params, _) = OPTIMIZERS[name](), problem(name, "x")
    state, step = jax.jit(tx.init)(params), jax.jit(step_of(tx))
    for _ in range(2):
        params, state = step(gradients(params), params, state)
    return jax.device_get(params)


def probe(name, mesh_shape, tiles):
    """Two updates on a mesh against two on one device, and what the compiled program moves."""
    expected = on_one_device(name)
    if tiles == "small":
        full_moment._TILE_ELEMENTS = 1 << 13
    jax.clear_caches()  # of what was traced with other tiles
    axes = tuple("xyz"[: len(mesh_shape)])
    devices = np.asarray(jax.devices()).reshape(mesh_shape)
    mesh = Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))
    start, layout = problem(name, axes)
    layout = jax.tree.map(functools.partial(NamedSharding, mesh), layout)
    tx = OPTIMIZERS[name]()

    shardings = loft_jax.state_shardings(tx, start, layout)
    params = jax.device_put(start, layout)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    compiled = (
        jax.jit(step_of(tx), out_shardings=(layout, shardings))
        .lower(params, params, state)
        .compile()
    )
    for _ in range(2):
        params, state = compiled(jax.device_put(gradients(params), layout), params, state)

    def distance(p, x, y):
        p, x, y = (np.asarray(v) for v in (p, x, y))
        move, expected_move = x - p, y - p
        return np.linalg.norm(move - expected_move) / np.linalg.norm(expected_move)

    return {
        "distances": named(
            float, jax.tree.map(distance, *(weights(p) for p in (start, params, expected)))
        ),
        "kept on a device": named(lambda x: x.sharding.shard_shape(x.shape), state),
        "restored": restored(tx, start, state, shardings),
        "moved": collectives(compiled.as_text()),
    }


def weights(params):
    """What does not depend on how a weight is factorized."""
    pairs = {name: x["lora_a"] @ x["lora_b"] for name, x in params.items() if name != "bias"}
    return {**pairs, "bias": params["bias"]}


def named(function, tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): function(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def restored(tx, params, state, shardings):
    """Whether Orbax gives a saved state back, laid out in the same way."""
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        shardings,
    )
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "state", state)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(Path(folder) / "state", target)
    same = jax.tree.map(
        lambda x, y: bool((x == y).all()) and y.sharding.is_equivalent_to(x.sharding, x.ndim),
        state,
        found,
    )
    return all(jax.tree.leaves(same))


def collectives(hlo):
    """Each collective of a program: its operation and the shapes of what it makes."""
    operations = "all-gather|all-to-all|collective-permute|collective-broadcast|all-reduce"
    found = []
    for line in hlo.splitlines():
        made = re.match(
            rf"\s*(?:ROOT )?\S+ = (.*?) ({operations}|reduce-scatter)(?:-start)?\(", line
        )
        if made:
            shapes = re.findall(r"\w+\[([\d,]*)\]", made[1])
            found.append((made[2], [[int(d) for d in s.split(",") if d] for s in shapes], line))
    return found


@pytest.fixture(scope="module")
def probes():
    eight = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # what is partitioned stays, compiling is faster
    }
    run = subprocess.run(
        [sys.executable, "-m", __name__, *RUNS],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **eight},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(run.stdout)


every_run = pytest.mark.parametrize("run", RUNS)


@every_run
def test_updates_are_those_of_one_device(probes, run):
    distances = probes[run]["distances"]
    pairs = layouts(RUNS[run][0], "x")
    assert len(distances) == len(pairs) + 1
    # Muon's iteration multiplies small singular values, and their rounding, by 3.4445⁵ = 485.
    assert max(distances.values()) < (1e-4 if run.startswith("muon") else 1e-5), distances


@every_run
def test_states_are_split_like_their_factors(probes, run):
    axes = dict(zip("xyz", MESHES[RUNS[run][1]], strict=False))
    kept = probes[run]["kept on a device"]
    for name, specs in layouts(RUNS[run][0], tuple(axes)).items():
        for factor, spec in zip(("lora_a", "lora_b"), specs, strict=True):
            shape = (IN, RANK) if factor == "lora_a" else (RANK, OUT)
            shape = (STACK, *shape) if "stack" in name else shape
            entries = (*spec, *[None] * (len(shape) - len(spec)))
            parts = [np.prod([axes[x] for x in (e or ())], dtype=int) for e in entries]
            split = [size // part for size, part in zip(shape, parts, strict=True)]
            states = {k: v for k, v in kept.items() if k.endswith(f".{name}.{factor}")}
            assert states
            for key, found in states.items():
                if ".gram." in key or ".metrics." in key:
                    assert found == [*split[:-2], RANK, RANK]
                    continue
                rank = len(split) - (1 if factor == "lora_a" else 2)
                assert found[rank] in (1, RANK, PACKED)
                assert found[:rank] + found[rank + 1 :] == split[:rank] + split[rank + 1 :], key


@every_run
def test_a_state_is_restored_where_it_was(probes, run):
    assert probes[run]["restored"]


@every_run
def test_no_long_axis_moves(probes, run):
    """What moves are (r, r) matrices, and sums over the devices of what is of a factor's size."""
    decomposed = run.startswith(("balanced", "reflora", "riemannian"))
    exchanges = ("all-to-all", "collective-permute") if decomposed else ()
    for operation, shapes, line in probes[run]["moved"]:
        for shape in shapes:
            long = [d for d in shape if d > LONG]
            if operation in ("all-reduce", "reduce-scatter"):
                assert len(long) <= 1, line
                assert not long or PACKED not in shape, line
            elif operation in exchanges:
                # Layers of a stack may be dealt out anew for their eigendecompositions.
                assert np.prod(shape) <= STACK * IN * RANK // 8, line
            else:
                assert not long, line


if __name__ == "__main__":
    found = {}
    for run in sys.argv[1:]:
        optimizer, shape, tile = RUNS[run]
        default, found[run] = full_moment._TILE_ELEMENTS, probe(optimizer, MESHES[shape], tile)
        full_moment._TILE_ELEMENTS = default
    print(json.dumps(found))
