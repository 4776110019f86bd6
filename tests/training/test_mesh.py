"""Sharding rules, and training steps on 8 CPU devices against one."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from loft_jax.errors import InputError
from loft_jax.models.llama import Llama, LlamaConfig
from loft_jax.training.config import MeshConfig
from loft_jax.training.mesh import check_batch, make_mesh
from loft_jax.training.shardings import parameter_spec
from loft_jax.training.topology import load_topology
from tests.training.eight_devices import LOADED, QUANTIZED

DAILY, SLOW = ((2, 2, 2),), ((8, 1, 1), (1, 8, 1), (1, 4, 2))
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is for Linux on x86-64"
)
TABLE = Llama.parameter_table(LlamaConfig(400, 32, 48, 3, 4, 2, 8))


@functools.cache
def runs_on(meshes):
    """What tests/training/eight_devices.py prints: these meshes, and one device, in one process."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.eight_devices", *map(json.dumps, meshes)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=True,
    )
    return json.loads(done.stdout)


def run_on(sizes):
    """What came of one mesh, and of one device ("alone")."""
    runs = runs_on(SLOW if sizes in SLOW else DAILY)
    return {**runs, **runs["x".join(map(str, sizes))]}


def each_of(meshes):
    marked = [pytest.param(s, marks=pytest.mark.slow) if s in SLOW else s for s in meshes]
    return pytest.mark.parametrize("sizes", marked, ids=lambda s: "x".join(map(str, s)))


each_mesh = each_of((*DAILY, *SLOW))


@each_mesh
def test_ten_steps_equal_those_of_one_device(sizes):
    run = run_on(sizes)
    np.testing.assert_allclose(run["losses"], run["alone"]["losses"], rtol=1e-5)
    assert run["distance"] < 1e-5
    assert run["moved"] > 1e-2
    assert run["losses"][0] != run["losses"][-1]


@each_mesh
def test_each_device_holds_its_share_of_every_array(sizes):
    _, fsdp, tensor = sizes
    names = set()
    for path, (total, held) in run_on(sizes)["bytes"].items():
        name = path.rpartition(".")[2]
        names.add(name)
        assert held * (1 if name == "scale" else fsdp * tensor) == total, path
    assert names == {"kernel", "embedding", "scale", "lora_a", "lora_b"}


@each_mesh
def test_each_device_holds_its_share_of_the_moments(sizes):
    total, held = run_on(sizes)["state_bytes"]
    counters = 64
    assert held * sizes[1] * sizes[2] <= total + counters * sizes[1] * sizes[2]


@each_mesh
def test_weights_are_gathered_one_layer_at_a_time(sizes):
    gathers = run_on(sizes)["all_gathers"]
    shapes = [tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", str(gathers))]
    assert not [shape for shape in shapes if shape[0] == 3 and np.prod(shape) >= 3 * 32 * 16]
    layer = [shape for shape in shapes if np.prod(shape) == 32 * 48 // sizes[2]]
    assert bool(layer) == (sizes[1] > 1)


@pytest.mark.slow
def test_accumulated_gradients_are_added_up_over_copies_once():
    """Behind the loop over the parts, in which there is no reduction; else there are some."""
    assert not run_on((8, 1, 1))["reduced_in_loops"]
    assert run_on((2, 2, 2))["reduced_in_loops"]


@each_of(LOADED)
def test_weights_load_into_their_shards(sizes):
    """Each byte is read once, and the host holds the shard of one device at a time.

    JAX lets go of what it has copied a call later; and beside it there is a part of one tensor.
    """
    loaded = run_on(sizes)["loaded"]
    assert loaded["same"]
    _, fsdp, tensor = sizes
    # Norms alone are whole on every device; here all devices are of one host, which reads once.
    assert loaded["read"] == loaded["bytes"]
    assert loaded["held_by_a_device"] < 1.01 * loaded["bytes"] / (fsdp * tensor)
    overhead = 150_000  # of Python and safetensors, whatever the size of the arrays
    assert loaded["peak"] < 3 * loaded["largest_shard"] + overhead


@each_mesh
def test_the_digest_is_that_of_one_device(sizes):
    run = run_on(sizes)
    assert run["digest"] == run["alone"]["digest"]


@each_of([QUANTIZED])
def test_a_quantized_base_trains_on_a_mesh_as_on_one_device(sizes):
    run = run_on(sizes)
    alone, meshed = run["quantized"]
    np.testing.assert_allclose(meshed, alone, rtol=1e-5)
    assert alone != run["alone"]["losses"]


@needs_libtpu
def test_data_runs_across_slices_or_else_fsdp():
    devices = load_topology("v5e:2x2", slices=2).devices

    def slices_along(config):
        numbers = np.vectorize(lambda device: device.slice_index)(
            make_mesh(config, devices).devices
        )
        return [bool((np.diff(numbers, axis=axis) != 0).any()) for axis in range(3)]

    assert slices_along(MeshConfig(2, 2, 2)) == [True, False, False]
    assert slices_along(MeshConfig(4, 1, 2)) == [True, False, False]
    assert slices_along(MeshConfig(1, 4, 2)) == [False, True, False]
    with pytest.raises(InputError, match="data 1, fsdp 1 on 2 slices, expected one of them"):
        make_mesh(MeshConfig(1, 1, 8), devices)


def test_heads_that_tensor_does_not_divide_stay_whole():
    mesh = AbstractMesh((1, 2, 4), ("data", "fsdp", "tensor"))
    attention = "layers.self_attn."

    def spec(name, *shape):
        return parameter_spec(attention + name, shape, TABLE, mesh)

    assert spec("q_proj.kernel", 3, 32, 32) == PartitionSpec(None, "fsdp", "tensor")
    assert spec("k_proj.kernel", 3, 32, 16) == PartitionSpec(None, "fsdp", None)
    assert spec("o_proj.kernel", 3, 32, 32) == PartitionSpec(None, "tensor", "fsdp")
    assert spec("k_proj.lora_b", 3, 2, 16) == PartitionSpec(None, None, ("tensor", "fsdp"))
    assert spec("k_proj.lora_a", 3, 32, 2) == PartitionSpec(None, ("fsdp", "tensor"), None)
    assert spec("k_proj.bias", 3, 16) == PartitionSpec(None, None)
    assert spec("q_proj.bias", 3, 32) == PartitionSpec(None, "tensor")
    assert spec("q_proj.lora_dropout.rngs.key", 3) == PartitionSpec()


def test_sizes_that_the_mesh_does_not_divide_stay_whole():
    mesh = AbstractMesh((1, 8, 1), ("data", "fsdp", "tensor"))
    spec = parameter_spec("embed_tokens.embedding", (401, 36), TABLE, mesh)
    assert spec == PartitionSpec("tensor", None)


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ((3, 1, 1), 8, "do not make up 8 devices"),
        ((3, -1, 1), 8, "do not make up 8 devices"),
        ((-1, -1, 1), 8, "data and fsdp are -1"),
        ((1, 0, 1), 8, "fsdp is 0"),
        ((1, -2, 1), 8, "fsdp is -2"),
        (("2", 1, 1), 8, r"mesh\.data is '2', expected an integer"),
    ],
)
def test_sizes_that_make_no_mesh_are_refused(sizes, devices, message):
    with pytest.raises(InputError, match=message):
        MeshConfig(*sizes).sizes(devices)


def test_the_open_axis_takes_the_rest():
    assert MeshConfig(2, -1, 2).sizes(16) == (2, 4, 2)
    assert MeshConfig(-1, 1, 1).sizes(3) == (3, 1, 1)
    assert make_mesh(MeshConfig(), jax.devices()[:1]).shape == {"data": 1, "fsdp": 1, "tensor": 1}


def test_a_batch_that_does_not_divide_names_the_nearest_that_does():
    mesh = AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"))
    check_batch(16, 2, mesh)
    with pytest.raises(InputError, match=r"20 rows do not divide over 8 devices.* such as 16"):
        check_batch(20, 1, mesh)
    with pytest.raises(InputError, match=r"24 rows in 2 parts .* multiple of 16 such as 32"):
        check_batch(24, 2, mesh)
    with pytest.raises(InputError, match="such as 8"):
        check_batch(1, 1, mesh)
