"""Descriptions of TPU slices and of GPUs to compile for; none of them is needed.

Slices come from libtpu. GPUs are represented by as many CPU devices: XLA's compiler for them needs
one, so what the step takes there is estimated with its compiler for CPUs.
"""

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
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
    """A generation of TPUs, or a GPU.

    Args:
        name: As in topology names.
        memory: Memory of one chip, in bytes. The compiler or the driver reserves a little of it.
        platform: JAX's name of its platform: "tpu" or "gpu".
    """

    name: str
    memory: int
    platform: str = "tpu"


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * _GB),
        Chip("v5e", 16 * _GB),
        Chip("v5p", 95 * _GB),
        Chip("v6e", 32 * _GB),
    )
}
"""TPUs by generation."""

GPUS = {
    gpu.name: gpu
    for gpu in (
        Chip("a100-40gb", 40 * _GB, "gpu"),
        Chip("a100-80gb", 80 * _GB, "gpu"),
        Chip("h100", 80 * _GB, "gpu"),
        Chip("h200", 141 * _GB, "gpu"),
        Chip("rtx-3090", 24 * _GB, "gpu"),
        Chip("rtx-4090", 24 * _GB, "gpu"),
    )
}
"""GPUs by name."""


@dataclass(frozen=True)
class Topology:
    """One or more slices of TPU chips, or the GPUs of one host.

    Args:
        chip: What it consists of.
        devices: One for each chip. Programs can be compiled for them, but not run; those of GPUs
            are CPU devices.
    """

    chip: Chip
    devices: tuple[jax.Device, ...]


def chip_of(name: str) -> Chip:
    """Finds the chip that a topology consists of.

    Args:
        name: As for `load_topology`.

    Returns:
        The chip.

    Raises:
        InputError: It is not known.

    Example:
        >>> chip_of("8xh100").name, chip_of("v5e:2x4").name
        ('h100', 'v5e')
    """
    return _parsed(name)[0]


def gpu_count(name: str) -> int:
    """Gives the number of GPUs of a topology; 0 if it consists of TPUs.

    Args:
        name: As for `load_topology`.

    Returns:
        The number, which JAX needs as CPU devices to compile for this topology.

    Raises:
        InputError: The chip is not known.

    Example:
        >>> gpu_count("8xh100"), gpu_count("rtx-4090"), gpu_count("v5e:2x4")
        (8, 1, 0)
    """
    chip, rest = _parsed(name)
    return int(rest or 1) if chip.platform == "gpu" else 0


def _parsed(name: str) -> tuple[Chip, str]:
    """Gives the chip of a topology, and the grid of TPUs or the number of GPUs, as text."""
    found = re.fullmatch(r"(?:([1-9]\d{0,2})x)?([^:]*)", name)
    if found and found[2].lower() in GPUS:
        return GPUS[found[2].lower()], found[1] or ""
    generation, _, grid = name.partition(":")
    if generation not in CHIPS:
        raise InputError(
            f"topology {name!r}: unknown TPU or GPU {generation!r}, expected one of "
            f"{', '.join(CHIPS)}, as in v5e:2x4, or of {', '.join(GPUS)}, as in h100 or 8xh100"
        )
    if not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}", grid):
        raise InputError(
            f"topology {name!r}: its grid is {grid!r}, expected chips along two or three axes, as "
            "in v5e:2x4 or v5p:2x2x4"
        )
    return CHIPS[generation], grid


def load_topology(name: str, slices: int = 1) -> Topology:
    """Describes chips to compile for; none of them is needed or touched.

    For a slice of TPUs, this sets the environment variables that libtpu reads for this process,
    unless they are set already.

    Args:
        name: Generation and grid of TPU chips: "v5e:2x4", "v5p:2x2x4"; or a GPU, with the number of
            them in one host: "rtx-4090", "8xh100".
        slices: Number of slices of TPUs, joined by a slower network.

    Returns:
        The slices, or the GPUs.

    Raises:
        InputError: The chip or the grid is not known, libtpu is not installed, GPUs are to be in
            several slices, or JAX has fewer CPU devices than there are to be GPUs.

    Example:
        >>> len(load_topology("h100").devices)
        1
        >>> len(load_topology("v5e:2x4").devices)  # doctest: +SKIP
        8
    """
    chip = chip_of(name)
    if count := gpu_count(name):
        return _load_gpus(name, chip, count, slices)
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise InputError(
            "libtpu, the compiler for TPUs, is not installed; expected: pip install 'loft-jax[tpu]'"
        )
    _set_off_cloud()
    from jax.experimental import topologies

    # A chip of v4 has two cores, which run as one device; of later chips this is the default.
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"topology {name!r}: libtpu refuses it: {error}") from error
    return Topology(chip, tuple(found.devices))


def _load_gpus(name: str, chip: Chip, count: int, slices: int) -> Topology:
    if slices > 1:
        raise InputError(f"slices is {slices}, expected 1 for the GPUs of one host, {name!r}")
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(
            f"topology {name!r}: JAX has {len(devices)} CPU devices to compile for, expected "
            f"{count}; set jax_num_cpu_devices to {count} before JAX is used"
        )
    return Topology(chip, tuple(devices[:count]))


def silence_libtpu() -> None:
    """Keeps libtpu, where it is installed, from warning of missing chips on machines without them.

    JAX asks it for TPUs on every machine. Does nothing where a device may be a TPU.
    """
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    is_google = any(file.read_text().strip() == "0x1ae0" for file in vendors)
    if not (is_google or any(Path("/dev").glob("accel*")) or any(Path("/dev").glob("vfio/[0-9]*"))):
        _set_off_cloud()


def _set_off_cloud() -> None:
    for variable, value in _OFF_CLOUD.items():
        os.environ.setdefault(variable, value)
