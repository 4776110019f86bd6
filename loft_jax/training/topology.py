"""Descriptions of TPU slices to compile for, from libtpu alone; no TPU is needed."""

import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from loft_jax.errors import InputError

_GB = 1 << 30

# Outside Google Cloud, libtpu would wait in vain for these values from the metadata server. Its
# lock protects chips that two processes must not share; a compiler does not need it.
_OFF_CLOUD = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Chip:
    """A generation of TPUs.

    Args:
        name: As in topology names.
        memory: HBM of one chip, in bytes. The compiler reserves a little of it.
    """

    name: str
    memory: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * _GB),
        Chip("v5e", 16 * _GB),
        Chip("v5p", 95 * _GB),
        Chip("v6e", 32 * _GB),
    )
}


@dataclass(frozen=True)
class Topology:
    """One or more slices of TPU chips.

    Args:
        name: Generation and grid, for example "v5e:2x4".
        chip: Its generation.
        devices: One for each chip; programs can be compiled for them, but not run.
    """

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]


def load_topology(name: str, slices: int = 1) -> Topology:
    """Describes a slice to compile for; no TPU is needed or touched.

    Sets the environment variables that libtpu reads for this process, unless they are set already.

    Args:
        name: Generation and grid of chips: "v5e:2x4", "v5p:2x2x4".
        slices: Number of slices, joined by a slower network.

    Returns:
        The slice or slices.

    Raises:
        InputError: The generation or the grid is not known, or libtpu is not installed.

    Example:
        >>> len(load_topology("v5e:2x4").devices)  # doctest: +SKIP
        8
    """
    generation, _, grid = name.partition(":")
    if generation not in CHIPS:
        raise InputError(
            f"topology {name!r}: unknown TPU {generation!r}, expected one of {', '.join(CHIPS)}, "
            "as in v5e:2x4"
        )
    if not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}", grid):
        raise InputError(
            f"topology {name!r}: its grid is {grid!r}, expected chips along two or three axes, as "
            "in v5e:2x4 or v5p:2x2x4"
        )
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise InputError(
            "libtpu, the compiler for TPUs, is not installed; expected: pip install 'loft-jax[tpu]'"
        )
    for variable, value in _OFF_CLOUD.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    # A chip of v4 has two cores, which run as one device; of later chips this is the default.
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if generation == "v4":
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"topology {name!r}: libtpu refuses it: {error}") from error
    return Topology(name, CHIPS[generation], tuple(found.devices))
