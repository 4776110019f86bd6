"""The held-out examples of a run, and the evaluation of a model on them."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from loft_jax.data import DataConfig
from loft_jax.errors import InputError, shown
from loft_jax.training.config import FinetuneConfig


def held_out_data(config: FinetuneConfig) -> DataConfig | None:
    """Gives the data configuration of the held-out examples of a run; None if there are none.

    Args:
        config: Of the run. If it has no path of them, they are those in the folder of its preset,
            but not the test set unless its split is named.

    Raises:
        InputError: It has a split or choices of them, but no path.
    """
    path, split = config.evaluation.path, config.evaluation.split
    if not path and config.evaluation.choices:
        raise InputError(
            "evaluation.choices are given without evaluation.path, the examples to compare them on"
        )
    if not path and not config.data.has_splits:
        if split is not None:
            raise InputError(
                f"evaluation.split is {shown(split)}, but there is no evaluation.path that has it"
            )
        return None
    data = dataclasses.replace(config.data, path=path or config.data.path, split=split)
    held_out = data.held_out()
    if split is None and data.has_splits and held_out.split == "test":
        if not path:
            return None  # the best checkpoint must not be chosen on it
        raise InputError(
            f"evaluation.path is {shown(path)}, of which preset {data.preset} has the test set "
            "alone, on which no checkpoint is to be chosen; expected evaluation.split to name it"
        )
    return held_out


def rows_fingerprint(rows: Any) -> str:
    """Computes a checksum of the contents of examples, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for index in range(len(rows)):
        row = dict(rows[index])
        digest.update(json.dumps(row, sort_keys=True, default=_content).encode())
    return digest.hexdigest()


def _content(value: Any) -> str:
    """What a value of a row holds: that of a file, or of an array, which `str` abbreviates."""
    if isinstance(value, Path):
        value = value.read_bytes()
    elif hasattr(value, "tobytes"):
        value = value.tobytes()
    if isinstance(value, bytes):
        return hashlib.blake2b(value, digest_size=16).hexdigest()
    return str(value)
