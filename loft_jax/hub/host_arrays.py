"""Arrays brought to the host, also those that are spread over several processes."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather_to_host(array: Any) -> np.ndarray:
    """All of an array, on this host.

    Args:
        array: On devices of this process, or spread over several: then every process calls this.

    Returns:
        Its values.

    Example:
        >>> gather_to_host(jax.numpy.arange(3)).tolist()
        [0, 1, 2]
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
