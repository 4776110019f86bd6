"""Reads JSON and JSON Lines into a table of examples, without conversions and in pieces."""

import codecs
import itertools
import json
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from loft_jax.errors import InputError, explained, shown

_BLOCK = 2**20  # bytes read from a file at once
_MOST_ROW = 2**26  # characters of a row; its Python objects take about ten times that
_MOST_FIELDS = 1000
_BATCH = 2**22  # characters of the rows held as Python objects at once, unless one row is longer

_KINDS = {str: "string", bool: "bool", int: "int64", float: "float64", type(None): "null"}
_SPACE = re.compile(r"[ \t\n\r]*")
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_LONGEST_MARK = 12  # "\ud83d\ude00", which may be cut anywhere where a block ends

_Row = dict[str, Any]


def read_json_rows(
    by_split: Mapping[str, Sequence[Path]], split: str, *, known: Collection[str]
) -> "datasets.Dataset":
    """Reads the rows of a split from JSON files.

    A file holds a sequence of objects (JSON Lines, also with line breaks inside objects), a list of
    objects, a list of texts, each of which becomes the field `text` of a row, or one object with a
    list of objects in it. A field is stored as text, boolean, integer or number if it has that type
    in all rows that have it; other fields are stored as JSON, so that each value is read back
    unchanged. A field that a row lacks is None there. Files are read twice, first to find the types
    of their fields.

    Args:
        by_split: The files of each split; regular files, in UTF-8.
        split: Name of the split, with slices in the syntax of `datasets`.
        known: Fields of an example. An object that has one of them is an example, and does not hold
            the list of examples.

    Returns:
        The rows, in memory.

    Raises:
        InputError: A file holds something else, or the split does not exist.
    """
    kinds: dict[str, set[str]] = {}
    sizes = dict.fromkeys(by_split, 0)
    for name, files in by_split.items():
        for file in files:
            for row, _ in _rows_of([file], known):
                sizes[name] += 1
                for field, value in row.items():
                    kinds.setdefault(field, set()).add(_kind(value))
                if len(kinds) > _MOST_FIELDS:
                    raise InputError(f"{file}: has more than {_MOST_FIELDS} fields; expected fewer")
    features = datasets.Features({field: _feature(found) for field, found in kinds.items()})
    spec = "+".join(sizes) if split == "all" else split
    parts = datasets.ReadInstruction.from_spec(spec).to_absolute(sizes)
    rows = itertools.chain.from_iterable(
        itertools.islice(_rows_of(by_split[part.splitname], known), part.from_, part.to)
        for part in parts
    )
    return datasets.Dataset(
        pa.Table.from_batches(list(_batches(rows, features)), features.arrow_schema),
        info=datasets.DatasetInfo(features=features),
        fingerprint=secrets.token_hex(8),  # the default reads the whole table
    )


class _Json(datasets.Json):
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
    rows: Iterable[tuple[_Row, int]], features: "datasets.Features"
) -> Iterator[pa.RecordBatch]:
    held: list[_Row] = []
    size = 0
    for row, length in rows:
        held.append(row)
        size += length
        if size >= _BATCH:
            yield _batch(held, features)
            held, size = [], 0
    if held:
        yield _batch(held, features)


def _batch(rows: Sequence[_Row], features: "datasets.Features") -> pa.RecordBatch:
    columns = []
    for name, feature in features.items():
        values = [row.get(name) for row in rows]
        if isinstance(feature, _Json):
            texts = [None if value is None else _as_json(value) for value in values]
            columns.append(
                pa.ExtensionArray.from_storage(feature.pa_type, pa.array(texts, pa.string()))
            )
        else:
            columns.append(pa.array(values, feature.pa_type))
    return pa.RecordBatch.from_arrays(columns, schema=features.arrow_schema)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _rows_of(files: Sequence[Path], known: Collection[str]) -> Iterator[tuple[_Row, int]]:
    """Yields the rows of files, with the approximate number of characters of each."""
    for file in files:
        for number, (value, length) in enumerate(_examples(file, known)):
            if isinstance(value, str):
                value = {"text": value}
            if not isinstance(value, dict):
                raise InputError(f"{file}: row {number} is {shown(value)}; expected an object")
            yield value, length


def _examples(file: Path, known: Collection[str]) -> Iterator[tuple[Any, int]]:
    values = _values(file)
    first = list(itertools.islice(values, 2))
    if len(first) == 1 and isinstance(whole := first[0][0], dict) and not known & whole.keys():
        lists = [one for one in whole.values() if _is_list_of_objects(one)]
        if len(lists) == 1:
            return ((row, 1) for row in lists[0])
    return itertools.chain(first, values)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _values(file: Path) -> Iterator[tuple[Any, int]]:
    """Yields the values of a file, or of the list in it, with their lengths in characters."""
    found = _scan(_Scanner(file))
    for number in itertools.count():
        with explained(f"{file}: row {number} cannot be read as JSON"):
            one = next(found, None)
        if one is None:
            return
        yield one


def _scan(scanner: "_Scanner") -> Iterator[tuple[Any, int]]:
    if scanner.peek() != "[":
        while scanner.peek():
            yield scanner.value()
        return
    scanner.skip()
    if scanner.peek() != "]":
        yield scanner.value()
        while scanner.peek() == ",":
            scanner.skip()
            yield scanner.value()
    if scanner.peek() != "]":
        raise ValueError("expected a comma or the end of the list")
    scanner.skip()
    if scanner.peek():
        raise ValueError("expected nothing after the list")


class _Scanner:
    """Scans the JSON values of a file, with one block and the current value in memory."""

    def __init__(self, file: Path) -> None:
        self._blocks = _blocks(file)
        self._text = ""
        self._at = 0

    def peek(self) -> str:
        """Gives the next character that is not white space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def skip(self) -> None:
        """Skips the character that `peek` gave."""
        self._at += 1

    def value(self) -> tuple[Any, int]:
        """Reads the next value, and its length."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                said, place = error.msg.removesuffix(" at"), error.pos - self._at
                near_end = error.pos >= len(self._text) - _LONGEST_MARK
                cut = near_end or said.startswith("Unterminated string")
                if not (cut and self._read_on()):
                    raise ValueError(f"{said} at character {place} of it") from None
        if _HALF_A_PAIR.search(self._text, self._at, end):
            _as_json(value).encode()  # raises for half a surrogate pair, which no tokenizer accepts
        length = end - self._at
        self._at = end
        return value, length

    def _read_on(self) -> bool:
        """Doubles the text that is not parsed yet, so that parsing restarts only a few times."""
        rest = self._text[self._at :]
        if len(rest) > _MOST_ROW:
            raise ValueError(f"it is longer than {_MOST_ROW} characters")
        new: list[str] = []
        while sum(map(len, new)) <= len(rest) and (block := next(self._blocks, "")):
            new.append(block)
        self._text, self._at = rest + "".join(new), 0
        return bool(new)


def _unique(pairs: list[tuple[str, Any]]) -> _Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the field {shown(twice)} twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _blocks(file: Path) -> Iterator[str]:
    """Yields the text of a file in blocks, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with file.open("rb") as bytes_of:
        while True:
            block = bytes_of.read(_BLOCK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                yield error.object[
                    : error.start
                ].decode()  # so that the rows before the error are counted
                raise
            if text:
                yield text
            if not block:
                return
