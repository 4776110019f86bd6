"""A run of several processes: joining and agreeing."""

import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from loft_jax.errors import InputError, shown

# Seconds after which a silent process counts as dead, so that the others stop.
_HEARTBEAT_TIMEOUT = 30

# Where Slurm and Open MPI say how many processes they have started.
_PROCESS_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class DistributedConfig:
    """How this process finds the others; not needed on Cloud TPU, Slurm and Open MPI.

    Args:
        coordinator_address: Address of process 0 that every process can reach, with a free port:
            "10.0.0.1:1234".
        process_count: Number of processes.
        process_id: Number of this process, from 0.

    Raises:
        InputError: Some of the settings are given, but not all.
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
    """Joins the other processes of a run, before JAX uses a device; does nothing if there are none.

    Args:
        config: As users give it; by default it is read from the cluster's environment.

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
        expected = config.coordinator_address or any(
            os.environ.get(name, "1") != "1" for name in _PROCESS_COUNTS
        )
        if expected or not any(words in str(error) for words in alone):
            raise InputError(f"cannot join the other processes: {error}") from error


def is_of_another_process(error: Exception) -> bool:
    """Whether an error is one that a process gets when another process is gone."""
    text = str(error)
    if isinstance(error, ValueError):
        # JAX raises some errors of its runtime so, with a text that begins with their code.
        of_runtime = re.match(r"[A-Z_]+: ", text) is not None
    else:
        of_runtime = isinstance(error, jax.errors.JaxRuntimeError)
    words = ("unavailable", "aborted", "deadline_exceeded", "gloo", "connection")
    return of_runtime and any(word in text.lower() for word in words)


def leave(code: int) -> NoReturn:
    """Ends this process at once, so that the whole run ends.

    A usual exit would wait for the other processes, which wait for this one. Once this one is gone,
    their waiting fails and they end too.

    Args:
        code: Exit code.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_main() -> bool:
    """Whether this is the process that writes files for all."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until every process has called this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def all_agree(ok: bool) -> bool:
    """Whether `ok` is true on every process; every process calls this."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def check_same(values: Mapping[str, Any]) -> None:
    """Refuses a run whose processes have different settings or content; every process calls this.

    Args:
        values: What has to be the same, by name, as JSON can hold it.

    Raises:
        InputError: Names the first that differs, with the values of two processes. The error is
            raised on every process.
    """
    if jax.process_count() == 1:
        return
    own = np.frombuffer(json.dumps(values).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.asarray(own.size))))
    padded = np.pad(own, (0, longest - own.size), constant_values=ord(" "))
    found = [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]
    check_alike(found)


def check_alike(found: Sequence[Mapping[str, Any]]) -> None:
    """Refuses values that are not the same on every process, in the order of the processes."""
    first = found[0]
    for number, other in enumerate(found):
        for name in dict.fromkeys([*first, *other]):
            if other.get(name) != first.get(name):
                raise InputError(
                    f"{name} is {shown(first.get(name))} on process 0 and "
                    f"{shown(other.get(name))} on process {number}; expected the same on every "
                    "process"
                )
