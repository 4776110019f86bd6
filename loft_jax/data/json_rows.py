"""Reads JSON and JSON Lines into a table of examples, without conversions and in pieces."""

import codecs
import itertools
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loft_jax.data.row_table import Row, as_json, table_of
from loft_jax.data.text_lines import undecodable
from loft_jax.errors import InputError, explained, shown

if TYPE_CHECKING:
    from datasets import Dataset

_log = logging.getLogger(__name__)

_BLOCK = 2**20  # bytes read from a file at once
_MOST_ROW = 2**27  # characters of a row, which are in memory three times while it is read
_MOST_VALUES = 2**22  # values of a row, each of which becomes an object of Python

_SPACE = re.compile(r"[ \t\n\r]*")
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
# A string, or the beginning of one that is cut off; possessive, so that long ones take no memory.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_LONGEST_MARK = 12  # "\ud83d\ude00", which may be cut anywhere where a block ends


def read_json_rows(
    by_split: Mapping[str, Sequence[Path]], split: str, *, known: Collection[str]
) -> "Dataset":
    """Reads the rows of a split from JSON files.

    A file holds a sequence of objects (JSON Lines, also with line breaks inside objects), a list of
    objects, a list of texts, each of which becomes the field `text` of a row, or one object with a
    list of objects in it; the log names the field of that list.

    Args:
        by_split: The files of each split; regular files, in UTF-8.
        split: Name of the split, with slices in the syntax of `datasets`.
        known: Fields of an example. An object that has one of them is an example, and does not hold
            the list of examples.

    Returns:
        The rows, from `table_of`.

    Raises:
        InputError: A file holds something else, or the split does not exist.
    """
    return table_of(lambda file: _rows_of(file, known), by_split, split)


def _rows_of(file: Path, known: Collection[str]) -> Iterator[tuple[Row, int]]:
    """Yields the rows of a file, with the approximate number of characters of each."""
    for number, (value, length) in enumerate(_examples(file, known)):
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            raise InputError(f"{file}: row {number} is {shown(value)}; expected an object")
        yield value, length


def _examples(file: Path, known: Collection[str]) -> Iterator[tuple[Any, int]]:
    values = _values(file)
    first = list(itertools.islice(values, 2))
    alone = len(first) == 1 and _Scanner(file).peek() != "["
    if alone and isinstance(whole := first[0][0], dict):
        lists = [name for name, one in whole.items() if _is_list_of_objects(one)]
        own = sorted(known & whole.keys())
        if len(lists) == 1 and not own:
            _log.info("%s: rows are read from the list in its field %s", file, shown(lists[0]))
            return ((row, 1) for row in whole[lists[0]])
        if len(lists) == 1 and lists[0] not in own:
            _log.info(
                "%s: is one row, since it has a field %s; the list in %s is not read as rows",
                *(file, own[0], shown(lists[0])),
            )
    return itertools.chain(first, values)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _values(file: Path) -> Iterator[tuple[Any, int]]:
    """Yields the values of a file, or of the list in it, with their lengths in characters."""
    found = _scan(_Scanner(file))
    for number in itertools.count():
        with explained(f"{file}: row {number} cannot be read as JSON"):
            try:
                one = next(found, None)
            except UnicodeDecodeError:
                raise ValueError(undecodable(file)) from None
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
            as_json(value).encode()  # raises for half a surrogate pair, which no tokenizer accepts
        length = end - self._at
        self._at = end
        return value, length

    def _read_on(self) -> bool:
        """Doubles the text that is not parsed yet, so that parsing restarts only a few times."""
        rest = self._text[self._at :]
        if len(rest) > _MOST_ROW:
            raise ValueError(f"it is longer than {_MOST_ROW} characters")
        if len(rest) > _MOST_VALUES and _values_in(rest) > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES} values")
        new: list[str] = []
        while sum(map(len, new)) <= len(rest) and (block := next(self._blocks, "")):
            new.append(block)
        self._text, self._at = rest + "".join(new), 0
        return bool(new)


def _values_in(text: str) -> int:
    """Counts the values that JSON, which may be cut off, has at least, without reading it."""
    count = start = 0
    for string in _STRING.finditer(text):
        count += sum(text.count(mark, start, string.start()) for mark in ",[{")
        start = string.end()
    return count + sum(text.count(mark, start) for mark in ",[{")


def _unique(pairs: list[tuple[str, Any]]) -> Row:
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
