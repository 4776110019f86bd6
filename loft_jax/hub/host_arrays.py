"""Copies arrays to the host, including those that are split over several processes."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather_to_host(array: Any) -> np.ndarray:
    """Copies a whole array to this host.

    Args:
        array: An array on devices of this process, or of several, which then all call this.

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
