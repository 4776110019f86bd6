"""The record of a published data set, and how its files are found and read."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loft_jax.errors import InputError, shown
from loft_jax.files import inside

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]

_log = logging.getLogger(__name__)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")  # how the hub numbers the parts of a split


@dataclass(frozen=True)
class Preset:
    """A published data set: its task, its files, its rows, and what it is judged by.

    Args:
        name: Name of the preset.
        task: Name of the task.
        example: Makes an example of the task from a row of a file and, for messages, its place. The
            example has the field names that `DataConfig` has by default. Raises `InputError` if the
            row has other columns or values.
        labels: Names of the labels in the order of their numbers; `example` gives names. Empty for
            tasks without labels.
        best_metrics: Metrics whose mean decides which checkpoint is the best; empty for what the
            task decides by.
        files: For each split, the names that its file may have without an ending, the preferred
            first.
        held_out: The split that models are evaluated on; also during a run, unless it is the test
            set.
        columns: Columns of TSV files that have no header; empty if all have one.
        answer_pattern: Regular expression of the answer in a text that a model generates; empty for
            tasks that are not evaluated by generation.
        folder: Name of its folder in that of a collection; empty if it belongs to none.
        parts: The data sets of a collection, which is read as their union; empty for a single one.
    """

    name: str
    task: str
    example: Callable[[Row, str], dict[str, Any]]
    labels: tuple[str, ...] = ()
    best_metrics: tuple[str, ...] = ()
    files: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "train": ("train",),
            "validation": ("dev", "validation", "valid", "val"),
            "test": ("test",),
        }
    )
    held_out: str = "validation"
    columns: tuple[str, ...] = ()
    answer_pattern: str = ""
    folder: str = ""
    parts: "tuple[Preset, ...]" = ()

    @property
    def is_of_questions(self) -> bool:
        """Whether models are evaluated on it by the answers that they generate."""
        return bool(self.answer_pattern or self.parts)

    def parts_in(self, folder: Path) -> "tuple[Preset, ...]":
        """Finds the data sets of a collection that are there.

        Args:
            folder: With a folder for each.

        Returns:
            Those whose folder is there, in the order of the collection.

        Raises:
            InputError: There is none.
        """
        found = tuple(part for part in self.parts if (folder / part.folder).is_dir())
        if not found:
            raise InputError(
                f"{folder}: has no data set of preset {self.name}; expected at least one of the "
                f"folders {', '.join(part.folder for part in self.parts)}"
            )
        return found

    def files_of(self, folder: Path, split: str, endings: Iterable[str]) -> dict[str, list[Path]]:
        """Finds the files of a split in a folder; other files are not looked at.

        Args:
            folder: With a file for each split, or several that are numbered as on the hub; for a
                collection, with the folders of its data sets.
            split: Name of a split, or of a file without its ending; with slices in the syntax of
                `datasets`.
            endings: Endings of files of data.

        Returns:
            Files by the names of splits in `split`.

        Raises:
            InputError: There is no file for a split, or there are several of one name.
        """
        if self.parts:
            union: dict[str, list[Path]] = {}
            for part in self.parts_in(folder):
                own = part.files_of(folder / part.folder, split, endings)
                for name, files in own.items():
                    union.setdefault(name, []).extend(files)
            return union
        found: dict[str, list[Path]] = {}
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in endings and not file.name.startswith(".") and file.is_file():
                found.setdefault(_SHARD.sub("", file.stem), []).append(inside(folder, file.name))
        chosen = {}
        for name in [part.partition("[")[0].strip() for part in split.split("+")]:
            names = self.files.get(name, (name,))
            stem = next((stem for stem in names if stem in found), None)
            if stem is None:
                raise InputError(
                    f"{folder}: has no file for the split {shown(name)}; found "
                    f"{shown(sorted(found))}, expected {' or '.join(names)} "
                    f"(one of {', '.join(sorted(endings))}); to train without evaluation, name one "
                    "file as the path"
                )
            chosen[name] = found[stem]
            copies = Counter(file.stem for file in found[stem])
            if more := [stem for stem, count in copies.items() if count > 1]:
                raise InputError(
                    f"{folder}: has {', '.join(f.name for f in found[stem] if f.stem == more[0])}; "
                    "expected one of them"
                )
        return chosen

    def tsv_rows(self, lines: Iterable[str], file: Path) -> Iterator[tuple[Row, str]]:
        """Reads the rows of a TSV file in which quotes are characters like all others.

        Rows with fewer or more cells than the header are left out, with a warning: some of the
        published files have them. Empty lines are no rows.

        Args:
            lines: Of the file.
            file: Its path, for messages.

        Yields:
            Rows, and the place of each.
        """
        header: Sequence[str] = ()
        odd: list[int] = []
        for number, line in enumerate(lines, 1):
            cells = line.rstrip("\r\n").split("\t")
            if cells == [""]:
                continue
            if not header:
                headless = len(cells) == len(self.columns) and not set(cells) & set(self.columns)
                header = self.columns if headless else cells
                if not headless:
                    continue
            if len(cells) != len(header):
                odd.append(number)
                continue
            yield dict(zip(header, cells, strict=True)), f"{file}: line {number}"
        if odd:
            _log.warning(
                "%s: left out %d of its lines, which do not have the %d cells of the header, the "
                "first of them line %d",
                *(file, len(odd), len(header), odd[0]),
            )

    def examples(self, rows: Iterable[tuple[Row, str]]) -> "Dataset":
        """Makes the examples of the task from rows of files.

        Args:
            rows: Rows, each with its place for messages.

        Returns:
            The examples.

        Raises:
            InputError: A row has other columns or values than expected.
        """
        from datasets import ClassLabel, Dataset

        columns: dict[str, list[Any]] = {}
        for row, where in rows:
            for name, value in self.example(row, where).items():
                columns.setdefault(name, []).append(value)
        if not (self.labels and columns):
            return Dataset.from_dict(columns)
        features = Dataset.from_dict({name: some[:1] for name, some in columns.items()}).features
        features["label"] = ClassLabel(names=list(self.labels))
        return Dataset.from_dict(columns, features=features)
