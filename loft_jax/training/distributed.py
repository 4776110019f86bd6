"""Several processes as one run: joining, agreeing, and arrays that are spread over them."""

import logging
import os
import sys
from dataclasses import dataclass
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from loft_jax.data import Batch
from loft_jax.errors import InputError

# Seconds after which a process that is silent is taken for dead, so that the others stop.
_HEARTBEAT_TIMEOUT = 30

# Where Slurm and Open MPI say how many processes they have started.
_PROCESS_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class DistributedConfig:
    """How this process finds the others. On Cloud TPU, Slurm and Open MPI nothing is needed.

    Args:
        coordinator_address: Address of process 0, as every process reaches it, and a free port:
            "10.0.0.1:1234".
        process_count: Number of processes.
        process_id: Number of this one, from 0.

    Raises:
        InputError: Some are given, but not all.
    """

    coordinator_address: str = ""
    process_count: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        given = self.coordinator_address or None, self.process_count, self.process_id
        if len({value is None for value in given}) > 1:
            raise InputError(
                f"coordinator_address is {self.coordinator_address!r}, process_count is "
                f"{self.process_count}, process_id is {self.process_id}; expected all or none"
            )


def join(config: DistributedConfig) -> None:
    """Joins the other processes of the run, before JAX touches a device; alone, does nothing.

    Args:
        config: As users give it; by default the cluster's environment tells.

    Raises:
        InputError: The processes cannot find each other.

    Example:
        >>> join(DistributedConfig())  # doctest: +SKIP
    """
    if jax.distributed.is_initialized():  # by the program that runs this
        return
    try:
        jax.distributed.initialize(
            config.coordinator_address or None,
            config.process_count,
            config.process_id,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        # What JAX says where nothing announces a cluster, and in a program that has used it.
        alone = ("coordinator_address should be defined", "must be called before any JAX calls")
        told = config.coordinator_address or any(
            os.environ.get(name, "1") != "1" for name in _PROCESS_COUNTS
        )
        if told or not any(words in str(error) for words in alone):
            raise InputError(f"cannot join the other processes: {error}") from error


def is_of_another_process(error: Exception) -> bool:
    """Whether an error is one that a process gets when another one has gone."""
    told = ("unavailable", "aborted", "deadline_exceeded", "gloo", "connection")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(
        word in str(error).lower() for word in told
    )


def leave(code: int) -> NoReturn:
    """Ends this process in the middle of a run, and so the run.

    The usual end waits for the others, who wait in vain for this one; once it is gone, what they
    wait for fails.

    Args:
        code: Exit code.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_main() -> bool:
    """Whether this process writes what one process has to."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def all_agree(ok: bool) -> bool:
    """Whether it holds on every process; every process asks."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def place_batch(batch: Batch, sharding: NamedSharding) -> dict[str, jax.Array]:
    """Puts the rows of a batch on the devices that compute them.

    Args:
        batch: All of it, the same on every process.
        sharding: Of its rows.

    Returns:
        Arrays over the mesh; a process copies the rows of its own devices.
    """
    return {
        name: jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)
        for name, rows in batch.items()
    }
