"""Reads CSV and TSV into a table of texts, row by row."""

import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loft_jax.data import text_lines
from loft_jax.data.row_table import Row, table_of
from loft_jax.data.text_lines import lines_of
from loft_jax.errors import InputError, shown

if TYPE_CHECKING:
    from datasets import Dataset


def read_csv_rows(
    by_split: Mapping[str, Sequence[Path]], split: str, *, separator: str, columns: Sequence[str]
) -> "Dataset":
    """Reads the rows of a split from CSV files, whose columns may differ.

    All cells are texts, whatever they look like. Empty lines are no rows. A cell that is missing
    at the end of a row is None, like a column that a file does not have.

    Args:
        by_split: The files of each split; regular files, in UTF-8.
        split: Name of the split, with slices in the syntax of `datasets`.
        separator: Between cells.
        columns: Names of the columns if files have no header; else empty.

    Returns:
        The rows, from `table_of`.

    Raises:
        InputError: A header names a column twice, a row has more cells than there are columns, a
            quote is never closed or text follows a closed one, or the split does not exist.
    """
    return table_of(lambda file: _rows_of(file, separator, columns), by_split, split)


def _rows_of(file: Path, separator: str, columns: Sequence[str]) -> Iterator[tuple[Row, int]]:
    rows = _cells(file, separator)
    header = list(columns) or [str(cell) for cell in next(rows, ([], 0))[0]]
    if len(set(header)) < len(header):
        raise InputError(
            f"{file}: cannot be read as csv: the header {shown(header)} names a column twice"
        )
    for number, (cells, length) in enumerate(rows):
        if len(cells) > len(header):
            raise InputError(
                f"{file}: row {number} cannot be read as csv: it has {len(cells)} cells; expected "
                f"those of the {'columns' if columns else 'header'} {shown(header)}"
            )
        yield dict(itertools.zip_longest(header, cells)), length


def _cells(file: Path, separator: str) -> Iterator[tuple[list[str], int]]:
    """Yields the cells of each row that is not empty, and the number of its characters."""
    size, ended = 0, False

    def lines() -> Iterator[str]:
        nonlocal size, ended
        for number, line in enumerate(lines_of(file), 1):
            size += len(line)
            if size > text_lines.MOST_CHARACTERS:  # within quotes a row continues on the next line
                raise InputError(
                    f"{file}: the row at line {number} is longer than "
                    f"{text_lines.MOST_CHARACTERS} characters; expected a shorter one (a quote "
                    "that is never closed makes one row of all)"
                )
            yield line
        ended = True

    # Unless strict, it takes a quote that is never closed as closed at the end of the file.
    reader = csv.reader(lines(), delimiter=separator, strict=True)
    while True:
        start = reader.line_num + 1
        limit = csv.field_size_limit(text_lines.MOST_CHARACTERS)  # of the whole process
        try:
            cells = next(reader, None)
        except csv.Error as error:
            found = (
                "it has a quote that is never closed; expected one that closes it"
                if ended
                else f"at line {reader.line_num}, text follows a quote that closes a cell; "
                f"expected {separator!r} or the end of the row, and quotes within quotes doubled"
            )
            raise InputError(
                f"{file}: the row at line {start} cannot be read as csv: {found}"
            ) from error
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        if cells:
            yield cells, size
        size = 0
