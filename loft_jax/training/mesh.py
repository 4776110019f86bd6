"""The devices of a run as a mesh of three axes.

- `data`: copies of the model, each with its own rows of the batch.
- `fsdp`: rows of the batch too, and weights split over the same devices; a layer's weights are
  gathered when it runs.
- `tensor`: weights split by heads, MLP features and vocabulary, which are computed in parallel.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from loft_jax.errors import InputError
from loft_jax.models.activations import BATCH_AXES
from loft_jax.training.config import MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of devices in which neighbours on the torus of a TPU slice are adjacent.

    Several slices are joined by a slower network: `data` is split across them, or else `fsdp`, but
    never `tensor`.

    Args:
        config: Sizes of the axes.
        devices: By default all devices.

    Returns:
        A mesh with the axes data, fsdp and tensor.

    Raises:
        InputError: The product of the sizes is not the number of devices, or neither data nor fsdp
            is a multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        across = _across_slices(sizes, slices)
        inside = tuple(size // n for size, n in zip(sizes, across, strict=True))
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, list(devices))
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(sizes, list(devices))
    else:  # in the order of their hosts, so that the last axes stay within one host
        grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def _across_slices(sizes: tuple[int, int, int], slices: int) -> tuple[int, int, int]:
    data, fsdp, _ = sizes
    if data % slices == 0:
        return slices, 1, 1
    if fsdp % slices == 0:
        return 1, slices, 1
    raise InputError(
        f"mesh: data {data}, fsdp {fsdp} on {slices} slices, expected one of them to be a multiple "
        f"of {slices}"
    )


def check_batch(rows: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Refuses a batch whose rows cannot be split evenly.

    Args:
        rows: Number of rows of a step, over all devices.
        accumulation_steps: Number of parts that they are computed in.
        mesh: From `make_mesh`.

    Raises:
        InputError: The rows cannot be split; the message names the nearest possible number.
    """
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    unit = shards * accumulation_steps
    if rows % unit:
        nearest = max(unit, round(rows / unit) * unit)
        parts = f" in {accumulation_steps} parts" if accumulation_steps > 1 else ""
        raise InputError(
            f"batch: {rows} rows{parts} do not divide over {shards} devices (data "
            f"{mesh.shape['data']} x fsdp {mesh.shape['fsdp']}), expected a multiple of {unit} "
            f"such as {nearest}"
        )
