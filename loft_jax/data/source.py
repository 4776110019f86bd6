"""Examples from files, folders and the hub, through `datasets`."""

import csv
import glob
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loft_jax.data.config import DataConfig
from loft_jax.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

# file ending -> the builder of `datasets` that reads it
_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_examples(config: DataConfig) -> "Dataset":
    """Read the examples that `config` names.

    A local path never touches the network, and nothing is written beside it: what `datasets`
    converts goes to its own cache. CSV and TSV cells are read as text, whatever they look like. In
    a folder, hidden files, folders and files with other endings (a README, say) are passed over.

    Args:
        config: Its `path`, `split` and `name` are used.

    Returns:
        The examples, at least one, as a `datasets.Dataset`.

    Raises:
        InputError: The path is missing or unreadable, its ending is unknown, the hub cannot be
            reached or does not have it, the split does not exist, or there is no example.
    """
    path = Path(config.path).expanduser()
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
        examples = _read_saved(path, config.split) if saved else _read_folder(path, config.split)
    elif path.is_file():
        examples = _read_files({"train": [path]}, config.split, shown=path)
    elif path.suffix.lower() in _BUILDERS or not _HUB_ID.fullmatch(config.path):
        raise InputError(f"{config.path}: no such file or folder; expected {_EXPECTED}")
    else:
        examples = _read_hub(config)
    if len(examples) == 0:
        raise InputError(f"{config.path}: split {config.split!r} has no examples; expected some")
    return examples


_EXPECTED = (
    f"a file ending in {', '.join(_BUILDERS)}, a folder of them, "
    "a folder written by save_to_disk, or a hub id"
)


def _read_files(by_split: dict[str, list[Path]], split: str, *, shown: Path) -> "Dataset":
    """One split out of files of one format."""
    from datasets import Features, Value, load_dataset

    files = [file for part in by_split.values() for file in part]
    unknown = [file for file in files if file.suffix.lower() not in _BUILDERS]
    if unknown:
        raise InputError(
            f"{unknown[0]}: unknown ending {unknown[0].suffix!r}; expected {_EXPECTED}"
        )
    builders = {_BUILDERS[file.suffix.lower()] for file in files}
    separators = {"\t" if file.suffix.lower() == ".tsv" else "," for file in files}
    if len(builders) > 1 or len(separators) > 1:
        endings = ", ".join(sorted({file.suffix for file in files}))
        raise InputError(f"{shown}: holds files of several formats ({endings}); expected one")
    for file in files:
        if file.stat().st_size == 0:
            raise InputError(f"{file}: the file is empty; expected examples")
    options: dict[str, Any] = {}
    builder = builders.pop()
    try:
        if builder == "csv":
            # Without this, pandas reads the words "None" and "NA" as missing, and "1" as a number.
            columns = _csv_columns(files[0], separator := separators.pop())
            features = Features({column: Value("string") for column in columns})
            options = {"sep": separator, "na_filter": False, "features": features}
        patterns = {
            name: [glob.escape(str(file.resolve())) for file in part]
            for name, part in by_split.items()
        }
        return load_dataset(builder, data_files=patterns, split=split, **options)
    except Exception as error:  # each reader raises kinds of its own for a file it cannot read
        raise InputError(f"{shown}: cannot be read as {builder}: {_reason(error)}") from error


def _csv_columns(file: Path, separator: str) -> list[str]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=separator)
        header, first = next(reader), next(reader, [])
    if len(first) > len(header):  # pandas would take the first columns for an index
        raise ValueError(f"the first row has {len(first)} cells and the header {len(header)}")
    if len(set(header)) < len(header):
        raise ValueError(f"the header {header} names a column twice")
    return header


def _read_folder(folder: Path, split: str) -> "Dataset":
    by_split: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        hidden = file.name.startswith(".")
        if file.is_file() and not hidden and file.suffix.lower() in _BUILDERS:
            by_split.setdefault(_split_of(file), []).append(file)
    if not by_split:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise InputError(f"{folder}: no data file (found {found}); expected {_EXPECTED}")
    return _read_files(by_split, split, shown=folder)


def _split_of(file: Path) -> str:
    """The split that a file of a folder belongs to, by the words of its name."""
    words = set(re.split(r"[^a-z]+", file.stem.lower()))
    if words & {"test", "testing", "eval", "evaluation"}:
        return "test"
    if words & {"validation", "valid", "val", "dev"}:
        return "validation"
    return "train"


def _read_saved(folder: Path, split: str) -> "Dataset":
    """One split of what `save_to_disk` wrote."""
    from datasets import DatasetDict, ReadInstruction, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
        splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        sizes = {name: len(rows) for name, rows in splits.items()}
        part, *more = ReadInstruction.from_spec(split).to_absolute(sizes)
        if more:
            raise ValueError(f"split is {split!r}; expected one split or a slice of one")
        return splits[part.splitname].select(range(part.from_, part.to))
    except Exception as error:  # a damaged folder fails in as many ways as it has files
        raise InputError(
            f"{folder}: empty or damaged, cannot be loaded from disk: {_reason(error)}"
        ) from error


def _read_hub(config: DataConfig) -> "Dataset":
    from datasets import load_dataset

    try:
        return load_dataset(config.path, config.name, split=config.split)
    except Exception as error:  # network, hub, builder: the user can only be told which
        raise InputError(
            f"{config.path}: not a file or folder here, and it cannot be loaded from the hub: "
            f"{_reason(error)}; expected {_EXPECTED}"
        ) from error


def _reason(error: BaseException) -> str:
    """The innermost message: `datasets` wraps the reader's own words twice."""
    chain = list(_causes(error))
    messages = [str(link).strip() for link in chain if str(link).strip()]
    return messages[-1] if messages else type(error).__name__


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
