"""Puts rows of files into a table of `datasets`, without conversions and in pieces."""

import itertools
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]  # it has no types

from loft_jax.data.splits import parts_of
from loft_jax.errors import InputError, explained

_MOST_FIELDS = 1000
_BATCH = 2**22  # characters of the rows held as Python objects at once, unless one row is longer

_KINDS = {str: "string", bool: "bool", int: "int64", float: "float64", type(None): "null"}

Row = dict[str, Any]


def table_of(
    rows_of: Callable[[Path], Iterator[tuple[Row, int]]],
    by_split: Mapping[str, Sequence[Path]],
    split: str,
) -> "datasets.Dataset":
    """Reads the rows of a split into a table.

    A field is stored as text, boolean, integer or number if it has that type in all rows that have
    it; other fields are stored as JSON, so that each value is read back unchanged. A field that a
    row lacks is None there. Files are read twice, first to find the types of their fields.

    Args:
        rows_of: Yields the rows of a file, with the approximate number of characters of each.
        by_split: The files of each split.
        split: Name of the split, with slices in the syntax of `datasets`.

    Returns:
        The rows, in memory.

    Raises:
        InputError: A file has too many fields, or the split does not exist.
    """
    kinds: dict[str, set[str]] = {}
    sizes = dict.fromkeys(by_split, 0)
    for name, files in by_split.items():
        for file in files:
            for row, _ in rows_of(file):
                sizes[name] += 1
                for field, value in row.items():
                    kinds.setdefault(field, set()).add(_kind(value))
                if len(kinds) > _MOST_FIELDS:
                    raise InputError(f"{file}: has more than {_MOST_FIELDS} fields; expected fewer")
    features = datasets.Features({field: _feature(found) for field, found in kinds.items()})
    rows = itertools.chain.from_iterable(
        itertools.islice(
            itertools.chain.from_iterable(map(rows_of, by_split[name])), part.start, part.stop
        )
        for name, part in parts_of(split, sizes)
    )
    return datasets.Dataset(
        pa.Table.from_batches(list(_batches(rows, features)), features.arrow_schema),
        info=datasets.DatasetInfo(features=features),
        fingerprint=secrets.token_hex(8),  # the default reads the whole table
    )


def as_json(value: Any) -> str:
    """Formats a value as JSON, with letters as they are."""
    return json.dumps(value, ensure_ascii=False)


class _Json(datasets.Json):  # type: ignore[misc]  # which has no types
    """Stores values as JSON; the class of `datasets` rounds numbers and loses long ones."""

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        """Decodes a value for a row."""
        with explained("a value of a row cannot be read as JSON"):
            return None if value is None else json.loads(value)


def _kind(value: Any) -> str:
    kind = _KINDS.get(type(value), "json")
    return "json" if kind == "int64" and not -(2**63) <= value < 2**63 else kind


def _feature(kinds: set[str]) -> Any:
    kinds = kinds - {"null"} or {"null"}
    (kind,) = kinds if len(kinds) == 1 else ("json",)
    return _Json() if kind == "json" else datasets.Value(kind)


def _batches(
    rows: Iterable[tuple[Row, int]], features: "datasets.Features"
) -> Iterator[pa.RecordBatch]:
    held: list[Row] = []
    size = 0
    for row, length in rows:
        held.append(row)
        size += length
        if size >= _BATCH:
            yield _batch(held, features)
            held, size = [], 0
    if held:
        yield _batch(held, features)


def _batch(rows: Sequence[Row], features: "datasets.Features") -> pa.RecordBatch:
    columns = []
    for name, feature in features.items():
        values = [row.get(name) for row in rows]
        if isinstance(feature, _Json):
            texts = [None if value is None else as_json(value) for value in values]
            columns.append(
                pa.ExtensionArray.from_storage(feature.pa_type, pa.array(texts, pa.string()))
            )
        else:
            columns.append(pa.array(values, feature.pa_type))
    return pa.RecordBatch.from_arrays(columns, schema=features.arrow_schema)
