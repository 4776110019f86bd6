"""Reads the lines of text files, one in memory at a time."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from loft_jax.errors import InputError

MOST_CHARACTERS = 2**27
"""Largest number of characters of a line, and of a row of CSV."""


def lines_of(file: Path) -> Iterator[str]:
    """Yields the lines of a file, with their ends and without a byte order mark.

    Args:
        file: A regular file.

    Raises:
        InputError: A line is too long, or is not UTF-8.
    """
    with file.open(encoding="utf-8-sig", newline="") as text:
        for number in itertools.count(1):
            try:
                line = text.readline(MOST_CHARACTERS + 1)
            except UnicodeDecodeError as error:  # of a later line, which was read ahead
                raise InputError(f"{file}: cannot be read as text: {undecodable(file)}") from error
            if len(line) > MOST_CHARACTERS:
                raise InputError(
                    f"{file}: line {number} is longer than {MOST_CHARACTERS} characters; expected "
                    "a shorter one"
                )
            if not line:
                return
            yield line


def undecodable(file: Path) -> str:
    """Says which line of a file is not UTF-8."""
    number = 1
    with file.open("rb") as bytes_of:
        while line := bytes_of.readline(MOST_CHARACTERS):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return (
                    f"line {number} is not UTF-8, it has the byte 0x{byte:02x} at {error.start}; "
                    "expected UTF-8, to which iconv or an editor converts it"
                )
            number += line.endswith(b"\n")
    return "it is not UTF-8"
