"""Reads examples from files, folders and the hub as `datasets` tables."""

import glob
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from loft_jax.data.config import DataConfig
from loft_jax.data.image_files import (
    ARRAYS_ENDING,
    SPLITS,
    holds_classes,
    read_arrays,
    read_image_folder,
)
from loft_jax.data.presets import Preset, find_preset
from loft_jax.data.row_formats import example_fields
from loft_jax.data.splits import parts_of
from loft_jax.data.text_lines import lines_of
from loft_jax.errors import InputError, cut, explained, shown
from loft_jax.files import inside, read_json, regular_file

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

GivenData: TypeAlias = "Dataset | DatasetDict | Iterable[Mapping[str, Any]]"
"""Examples that a program gives as an object; see `given_examples`."""

# file ending -> what reads it: "json" and "csv" are ours, the others are builders of `datasets`
_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_ABOUT_OTHERS = {
    "classes", "copying", "credits", "labels", "license", "licence", "notice", "readme",
}  # fmt: skip
_COMPRESSED = (".bz2", ".gz", ".xz", ".zip", ".zst")
_log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_examples(config: DataConfig) -> "Dataset | list[dict[str, Any]]":
    """Reads the examples that `config` names.

    For a local path the network is not used, no code in a folder is run, and nothing is written
    beside it: `datasets` converts files into its own cache. Cells of CSV and TSV are read as text,
    and texts of JSON stay texts, even if they look like numbers or dates. In a folder, hidden
    files, subfolders and files with other endings (a README, say) are ignored; images in subfolders
    by label are read where there are no files of rows beside them. Files may differ in their
    fields; one that a file does not have is None in its rows. Columns that refer to files
    (sounds, or images whose bytes are not all in the column) are left out with a warning, and
    nothing that they name is opened.

    Args:
        config: Its `path`, `split`, `name` and `preset` are used.

    Returns:
        The examples, at least one, as a `datasets.Dataset`; those of a preset have the fields that
        `DataConfig` has by default. Images of a folder or of an `.npz` file are a list, with the
        path of each image or its pixels.

    Raises:
        InputError: The path is missing or unreadable, its ending is unknown, the hub cannot be
            reached or does not have it, the split does not exist, or there is no example.
    """
    with explained(f"{cut(config.path)}: cannot be looked for, expected {_EXPECTED}"):
        path = Path(config.path).expanduser()
        is_folder, is_there = path.is_dir(), path.exists()
    if is_folder:
        examples = _read_folder(path, config)
    elif is_there and path.suffix.lower() == ARRAYS_ENDING:
        examples = read_arrays(path, config)
    elif is_there:
        examples = _read_files({"train": [path]}, config, source=path)
    elif path.suffix.lower() in _BUILDERS or not _HUB_ID.fullmatch(config.path):
        raise InputError(f"{cut(config.path)}: no such file or folder; expected {_EXPECTED}")
    else:
        examples = _read_hub(config)
    if len(examples) == 0:
        raise InputError(
            f"{config.path}: split {shown(_split(config))} has no examples; expected some"
        )
    return examples


def given_examples(
    data: GivenData, config: DataConfig, name: str = "data"
) -> "Dataset | list[dict[str, Any]]":
    """Reads the examples that are given as an object.

    Args:
        data: A `datasets.Dataset`, a `DatasetDict` of several splits, or an iterable of rows, which
            is read to its end once.
        config: Its `split` and `preset` are used.
        name: Of the argument, for messages.

    Returns:
        The examples, at least one: a `Dataset`, whose columns may decode images, or a list.

    Raises:
        InputError: It holds no examples, or something else.

    Example:
        >>> given_examples(({"text": text} for text in ("a joy", "dull")), DataConfig())
        [{'text': 'a joy'}, {'text': 'dull'}]
    """
    from datasets import Dataset

    if isinstance(data, (str, bytes, os.PathLike)) or not isinstance(data, Iterable):
        raise InputError(
            f"{name} is {shown(data)}, expected a Dataset or an iterable of rows; the path of a "
            "file goes to DataConfig"
        )
    splits = {"train": data} if isinstance(data, Dataset) else data
    rows: Any
    if isinstance(splits, Mapping):
        if odd := [name for name, part in splits.items() if not isinstance(part, Dataset)]:
            raise InputError(f"{name}: split {shown(odd[0])} is not a Dataset, expected one")
        with explained(f"{name}: split {shown(_split(config))} cannot be read"):
            rows = _part(splits, _split(config)).with_format(None)
    else:
        if hasattr(data, "to_dict") and hasattr(data, "columns"):  # iterates over its columns
            raise InputError(
                f"{name} is a {type(data).__name__}, expected Dataset.from_pandas({name}) of "
                f'datasets, or rows: {name}.to_dict("records")'
            )
        rows = list(data)
        if config.split is not None:
            raise InputError(
                f"{name}: split is {shown(config.split)}, but an iterable of rows has no splits"
            )
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise InputError(
                    f"{name}: row {index} is {shown(row)}, expected a mapping of fields"
                )
    if len(rows) == 0:
        raise InputError(f"{name} holds no examples; expected some")
    if isinstance(rows, list) and config.preset is not None:
        rows = Dataset.from_list(rows)
    return _of_preset(rows, config) if isinstance(rows, Dataset) else rows


_EXPECTED = (
    f"a file ending in {', '.join(_BUILDERS)} or {ARRAYS_ENDING}, a folder of them, "
    "a folder written by save_to_disk, a folder with a subfolder of images for each label, or a "
    "hub id"
)


def _split(config: DataConfig) -> str:
    return config.split or "train"


def _read_files(by_split: dict[str, list[Path]], config: DataConfig, *, source: Path) -> "Dataset":
    """Reads one split from files of one format."""
    files = [file for part in by_split.values() for file in part]
    for file in files:
        if file.suffix.lower() not in _BUILDERS:
            packed = file.suffix.lower() in _COMPRESSED
            why = "is compressed" if packed else f"unknown ending {file.suffix!r:.200}"
            raise InputError(f"{file}: {why}; expected {_EXPECTED}")
        if regular_file(file, "examples").stat().st_size == 0:
            raise InputError(f"{file}: the file is empty; expected examples")
    endings = {file.suffix.lower() for file in files}
    formats = {(_BUILDERS[ending], ending == ".tsv") for ending in endings}
    if config.columns and {builder for builder, _ in formats} != {"csv"}:
        raise InputError(
            f"{source}: columns are {shown(list(config.columns))}, but it names its own; expected "
            "columns for CSV and TSV alone"
        )
    if len(formats) > 1:
        raise InputError(
            f"{source}: holds files of several formats ({', '.join(sorted(endings))}); expected one"
        )
    ((builder, tabs),) = formats
    with explained(f"{source}: cannot be read as {builder}"):
        if tabs and config.preset is not None:
            return _read_unquoted(by_split, find_preset(config.preset), _split(config))
        if builder == "json":
            return _of_preset(_read_json(by_split, config), config)
        if builder == "csv":
            from loft_jax.data.csv_rows import read_csv_rows

            separator, columns = "\t" if tabs else ",", config.columns
            rows = read_csv_rows(by_split, _split(config), separator=separator, columns=columns)
            return _of_preset(rows, config)
        return _of_preset(_build(builder, by_split, _split(config)), config)


def _read_json(by_split: Mapping[str, Sequence[Path]], config: DataConfig) -> "Dataset":
    from loft_jax.data.json_rows import read_json_rows

    return read_json_rows(by_split, _split(config), known=example_fields(config))


def _build(builder: str, by_split: dict[str, list[Path]], split: str) -> "Dataset":
    """Reads one split from files with a builder of `datasets`."""
    from datasets import Dataset

    patterns = {
        name: [glob.escape(str(file.resolve())) for file in part] for name, part in by_split.items()
    }
    # Not `load_dataset`, which reports to the hub what it is asked to load.
    if builder == "parquet":
        if not _same_columns(by_split):
            return _checked(_joined(patterns, split))
        return _checked(Dataset.from_parquet(patterns, split=split))
    for file in itertools.chain.from_iterable(by_split.values()):
        for _ in lines_of(file):  # checks them
            pass
    return Dataset.from_text(patterns, split=split)


def _same_columns(by_split: Mapping[str, Sequence[Path]]) -> bool:
    """Whether all Parquet files have the same columns."""
    from pyarrow import parquet  # type: ignore[import-untyped]  # it has no types

    files = itertools.chain.from_iterable(by_split.values())
    return len({frozenset(parquet.read_schema(file).names) for file in files}) == 1


def _joined(patterns: Mapping[str, Sequence[str]], split: str) -> "Dataset":
    """Reads one split from Parquet files whose columns differ."""
    from datasets import Dataset, concatenate_datasets

    splits = {
        name: concatenate_datasets([Dataset.from_parquet(file) for file in files])
        for name, files in patterns.items()
    }
    return _part(splits, split)


def _read_unquoted(by_split: Mapping[str, Sequence[Path]], preset: Preset, split: str) -> "Dataset":
    """Reads one split from the TSV files of a preset."""
    examples = {
        name: preset.examples(
            row for file in files for row in preset.tsv_rows(lines_of(file), file)
        )
        for name, files in by_split.items()
    }
    return _part(examples, split)


def _of_preset(rows: "Dataset", config: DataConfig) -> "Dataset":
    """Makes the examples of the preset, if there is one."""
    from datasets import ClassLabel

    if config.preset is None:
        return rows
    named = {name: kind for name, kind in rows.features.items() if isinstance(kind, ClassLabel)}

    def placed() -> Iterator[tuple[dict[str, Any], str]]:
        for index, row in enumerate(rows):
            labels = {
                name: kind.int2str(row[name]) for name, kind in named.items() if row[name] >= 0
            }
            yield {**row, **labels}, f"{config.path}: row {index} of {_split(config)}"

    return find_preset(config.preset).examples(placed())


def _read_folder(folder: Path, config: DataConfig) -> "Dataset | list[dict[str, Any]]":
    if any((folder / name).exists() for name in (_SAVED_SPLITS, _SAVED)):
        return _read_saved(folder, config)
    if config.preset is not None:
        files = find_preset(config.preset).files_of(folder, _split(config), _BUILDERS)
        return _read_files(files, config, source=folder)
    by_split: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        hidden = file.name.startswith(".")
        if not (hidden or file.is_dir()) and _is_data(file):
            by_split.setdefault(_split_of(file), []).append(inside(folder, file.name))
    rows = [file for some in by_split.values() for file in some]
    if all(map(_is_about_others, rows)) and holds_classes(folder):
        if rows:
            told = cut(", ".join(file.name for file in rows))
            _log.warning("%s: has images in folders by label; not read: %s", folder, told)
        return read_image_folder(folder, config)
    if not by_split:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise InputError(f"{folder}: no data file (found {cut(found)}); expected {_EXPECTED}")
    return _read_files(by_split, config, source=folder)


def _is_data(file: Path) -> bool:
    """Whether a file of a folder is one of data; a compressed one is refused, as it is alone."""
    if file.suffix.lower() in _COMPRESSED:
        file = file.with_suffix("")
    return file.suffix.lower() in _BUILDERS


def _is_about_others(file: Path) -> bool:
    """Whether a file tells of the data that are beside it, and is none itself by its name."""
    name = file.stem.lower()
    return name == "metadata" or (file.suffix.lower() == ".txt" and name in _ABOUT_OTHERS)


def _split_of(file: Path) -> str:
    """Gives the split that a file of a folder belongs to, by the words of its name."""
    found = {SPLITS.get(word) for word in re.split(r"[^a-z]+", file.stem.lower())}
    return next((split for split in ("test", "validation") if split in found), "train")


def _read_saved(folder: Path, config: DataConfig) -> "Dataset":
    """Reads one split of a folder that `save_to_disk` wrote."""
    from datasets import DatasetDict, load_from_disk

    with explained(f"{folder}: empty or damaged, cannot be loaded from disk"):
        _check_saved(folder)
        loaded = load_from_disk(str(folder))
        splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        return _of_preset(_checked(_part(splits, _split(config))), config)


def _part(splits: Mapping[Any, "Dataset"], split: str) -> "Dataset":
    """Selects a split, a slice of one, or several of them."""
    from datasets import concatenate_datasets

    parts = parts_of(split, {name: len(rows) for name, rows in splits.items()})
    return concatenate_datasets(
        [splits[name].select(range(part.start, part.stop)) for name, part in parts]
    )


def _checked(rows: "Dataset") -> "Dataset":
    """Validates rows of a binary file, whose texts and offsets may be invalid.

    The file sets the types of its columns and the format of its rows. For some types, `datasets`
    opens any file or address that a column names as soon as a row is read; these columns are left
    out. Images are kept as the bytes of a file if all are there.
    """
    from datasets import Image

    rows = rows.with_format(None)
    for name, feature in list(rows.features.items()):
        if isinstance(feature, Image) and _has_bytes(rows, name):
            rows = rows.cast_column(name, Image(decode=False))
    if odd := [name for name, feature in rows.features.items() if not _is_plain(feature)]:
        _log.warning("the columns %s hold no plain values and are left out", shown(odd))
        rows = rows.remove_columns(odd)
    start = 0
    for batch in rows.data.table.to_batches():
        try:
            batch.validate(full=True)
        except ValueError as error:
            raise ValueError(f"row {start + _first_invalid(batch)}: {error}") from None
        start += batch.num_rows
    return rows


def _first_invalid(batch: Any) -> int:
    """Gives the first row of a batch that is not valid on its own."""
    for row in range(batch.num_rows):
        try:
            batch.slice(row, 1).validate(full=True)
        except ValueError:
            return row
    return 0


def _has_bytes(rows: "Dataset", name: str) -> bool:
    """Whether every image of a column is there, and none is only named."""
    chunks = rows.data.column(name).chunks
    return not any(chunk.null_count or chunk.field("bytes").null_count for chunk in chunks)


def _is_plain(feature: Any) -> bool:
    """Whether a value is plain, and does not refer to a file."""
    from datasets import ClassLabel, Image, Json, LargeList, List, Value

    if isinstance(feature, Mapping):
        return all(map(_is_plain, feature.values()))
    if isinstance(feature, (List, LargeList)):
        return _is_plain(feature.feature)
    kept_as_bytes = isinstance(feature, Image) and not feature.decode
    return kept_as_bytes or isinstance(feature, (Value, ClassLabel, Json))


_SAVED_SPLITS, _SAVED, _SAVED_FEATURES = "dataset_dict.json", "state.json", "dataset_info.json"
_SPLIT = re.compile(r"\w+(\.\w+)*")  # as `datasets` has it


def _check_saved(folder: Path) -> None:
    """Checks that a saved folder names only files in it, since `datasets` opens what it names."""
    parts = [folder]
    if (folder / _SAVED_SPLITS).exists():
        names = read_json(folder / _SAVED_SPLITS)["splits"]
        if odd := [name for name in names if not _SPLIT.fullmatch(name)]:
            raise ValueError(f"{_SAVED_SPLITS} names the split {shown(odd[0])}; expected a word")
        parts = [inside(folder, name) for name in names]
    for part in parts:
        regular_file(inside(part, _SAVED_FEATURES), "the features of a saved dataset")
        for file in read_json(inside(part, _SAVED))["_data_files"]:
            regular_file(inside(part, file["filename"]), "rows of a saved dataset")


def _read_hub(config: DataConfig) -> "Dataset":
    from datasets import DownloadManager, load_dataset, load_dataset_builder

    with explained(
        f"{config.path}: not a file or folder here (expected {_EXPECTED}), "
        "and it cannot be loaded from the hub"
    ):
        builder = load_dataset_builder(config.path, config.name)
        if builder.name != "json":
            rows = load_dataset(config.path, config.name, split=_split(config))
            return _of_preset(_checked(rows), config)
        manager = DownloadManager()
        fetched = manager.download_and_extract(dict(builder.config.data_files))
        by_split = {
            str(name): list(map(Path, manager.iter_files(files))) for name, files in fetched.items()
        }
        return _of_preset(_read_json(by_split, config), config)
