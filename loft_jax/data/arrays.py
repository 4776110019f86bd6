"""Rows of numbers and arrays, for models and losses of one's own."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loft_jax.data.batches import Batch
from loft_jax.errors import InputError, shown

ROW_WEIGHTS = "row_weights"
"""Array of a batch that is 0 for the rows that only pad it."""


@dataclass(frozen=True, eq=False)
class ArrayData:
    """Rows of arrays, one column for each field.

    Args:
        columns: Arrays by field, (n, ...) each.
    """

    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def fingerprint(self) -> str:
        """A checksum of names, dtypes, shapes and values, 32 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        for name, column in sorted(self.columns.items()):
            digest.update(f"{name} {column.dtype} {column.shape} ".encode())
            digest.update(column.tobytes())
        return digest.hexdigest()

    def batch(self, rows: Sequence[int] | np.ndarray, batch_size: int) -> Batch:
        """Puts rows into a batch, and pads it with rows of zeros without weight.

        Args:
            rows: Indices of at most `batch_size` rows.
            batch_size: Number of rows of the batch.

        Returns:
            An array (batch_size, ...) for each field, and `ROW_WEIGHTS` (batch_size,) float32.
        """
        missing = batch_size - len(rows)
        batch = {
            name: np.pad(column[np.asarray(rows)], [(0, missing), *[(0, 0)] * (column.ndim - 1)])
            for name, column in self.columns.items()
        }
        return {**batch, ROW_WEIGHTS: (np.arange(batch_size) < len(rows)).astype(np.float32)}


def array_rows(rows: Iterable[Mapping[str, Any]]) -> ArrayData:
    """Reads rows whose fields are numbers or arrays.

    Args:
        rows: At least one. A field has the same shape in every row.

    Returns:
        The columns. Integers become int32, other numbers float32.

    Raises:
        InputError: A row lacks a field or has another one, or a field has no numbers or another
            shape than in the first row, or an integer beyond int32; the message
            names the row and the field.

    Example:
        >>> data = array_rows([{"x": [1.0, 2.0], "y": 0}, {"x": [3.0, 4.0], "y": 1}])
        >>> {name: column.shape for name, column in data.columns.items()}
        {'x': (2, 2), 'y': (2,)}
    """
    columns: dict[str, list[np.ndarray]] = {}
    for index, row in enumerate(rows):
        if index == 0:
            columns = {name: [] for name in row}
            if ROW_WEIGHTS in row:
                raise InputError(f"row 0: field {ROW_WEIGHTS!r} is used by batches; rename it")
        if set(row) != set(columns):
            raise InputError(
                f"row {index}: has the fields {shown(sorted(row))}, expected those of row 0, "
                f"{shown(sorted(columns))}"
            )
        for name, found in columns.items():
            value = _array(row[name], f"row {index}: field {name!r}")
            if found and value.shape != found[0].shape:
                raise InputError(
                    f"row {index}: field {name!r} has the shape {value.shape}, expected "
                    f"{found[0].shape}, as in row 0"
                )
            found.append(value)
    return ArrayData({name: _column(values) for name, values in columns.items()})


def _array(value: Any, where: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except Exception:  # rows of different lengths, or an object of another library
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"{where} is {shown(value)}; expected numbers of one shape, for a loss of your own"
        )
    if array.dtype.kind in "iu" and array.size:
        bounds = np.iinfo(np.int32)
        for extreme in (int(array.min()), int(array.max())):
            if not bounds.min <= extreme <= bounds.max:
                raise InputError(
                    f"{where} has {extreme}; expected integers from {bounds.min} to {bounds.max} "
                    "(int32)"
                )
    return array


def _column(values: Sequence[np.ndarray]) -> np.ndarray:
    column = np.stack(values)
    if column.dtype.kind == "b":
        return column
    return column.astype(np.float32 if column.dtype.kind == "f" else np.int32)
