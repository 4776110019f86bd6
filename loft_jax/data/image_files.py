"""Reads labelled images from folders and from arrays in files."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loft_jax.data.config import DataConfig
from loft_jax.data.splits import parts_of
from loft_jax.errors import InputError, cut, explained, shown, size_of
from loft_jax.files import inside, regular_file

_log = logging.getLogger(__name__)

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
ARRAYS_ENDING = ".npz"

SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


def holds_classes(folder: Path) -> bool:
    """Whether a folder has a subfolder with images for each class, maybe within one a split."""
    return any(map(_is_class, _folders(folder))) or any(map(_is_class, _of_splits(folder)))


def read_image_folder(folder: Path, config: DataConfig) -> list[dict[str, Any]]:
    """Reads the names of images in a folder by class, which are also those in folders within.

    What else is there is told by a warning.

    Args:
        folder: With a subfolder for each class, or for each split with such subfolders.
        config: Its `split` and the names of its fields are used.

    Returns:
        A row for each image: its path, and the name of its subfolder as the label.

    Raises:
        InputError: A class has no image, or a link leads out of the folder.
    """
    if any(map(_is_class, _of_splits(folder))):
        by_split: dict[str, list[Path]] = {}
        outer = [folder, *_folders(folder)]
        for entry in _folders(folder):
            if entry.name.lower() not in SPLITS:
                raise InputError(
                    f"{entry}: stands beside folders of splits; expected one of {list(SPLITS)}"
                )
            by_split.setdefault(SPLITS[entry.name.lower()], []).extend(_folders(entry))
    else:
        by_split = {"train": list(_folders(folder))}
        outer = [folder]
    with explained(f"{folder}: cannot be read as images by class"):
        files = {entry: _files(entry) for classes in by_split.values() for entry in classes}
        rows = {
            split: [
                {config.image_field: path, config.label_field: entry.name}
                for entry in classes
                for path in _images(folder, entry, files[entry])
            ]
            for split, classes in by_split.items()
        }
        parts = parts_of(config.split or "train", {name: len(one) for name, one in rows.items()})
        beside = [entry for one in outer for entry in sorted(one.iterdir()) if _is_image(entry)]
    _tell(folder, beside, {entry: files[entry] for name in dict(parts) for entry in by_split[name]})
    return [row for name, part in parts for row in rows[name][part]]


def _tell(folder: Path, beside: Sequence[Path], by_class: Mapping[Path, Sequence[Path]]) -> None:
    """Warns of images of which one may expect something else, and of files that are not read."""
    files = [(entry, of_class) for of_class, own in by_class.items() for entry in own]
    deeper = [entry for entry, of_class in files if _is_image(entry) and entry.parent != of_class]
    others = [entry for entry, _ in files if not _is_image(entry)]
    for said, found in (
        ("images in no folder of a label are not read", beside),
        ("images in folders within that of a label have this label", deeper),
        (f"files are not read: expected images, ending in {', '.join(IMAGE_ENDINGS)}", others),
    ):
        if found:
            first = cut(str(found[0].relative_to(folder)))
            _log.warning("%s: %d %s; the first is %s", folder, len(found), said, first)


def _of_splits(folder: Path) -> Iterator[Path]:
    return (inner for entry in _folders(folder) if _is_split(entry) for inner in _folders(entry))


def _is_split(folder: Path) -> bool:
    return folder.name.lower() in SPLITS


def _folders(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            yield inside(folder, entry.name)


def _files(folder: Path) -> list[Path]:
    """Lists the files of a folder, then those of folders within; links to folders are as files."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = [name for name in folders if Path(place, name).is_symlink()]
        visible = sorted(name for name in [*names, *links] if not name.startswith("."))
        found += [Path(place, name) for name in visible]
    return found


def _is_class(folder: Path) -> bool:
    return any(map(_is_image, folder.iterdir()))


def _is_image(entry: Path) -> bool:
    return entry.suffix.lower() in IMAGE_ENDINGS and not entry.name.startswith(".")


def _images(folder: Path, of_class: Path, files: Sequence[Path]) -> list[Path]:
    found = [inside(folder, entry.relative_to(folder)) for entry in files if _is_image(entry)]
    if not found:
        raise InputError(
            f"{of_class}: has no image; expected files ending in {', '.join(IMAGE_ENDINGS)}"
        )
    return found


_MOST_ARRAYS = 2**33
"""Largest size of the arrays of a file, in bytes; a small file may hold much more."""


def read_arrays(path: Path, config: DataConfig) -> list[dict[str, Any]]:
    """Reads the images and labels of an `.npz` file.

    Args:
        path: Of a file with two arrays, which have the names of the fields: images `(n, height,
            width)` or `(n, height, width, 3)` uint8, and labels `(n,)`.
        config: Its `split` and the names of its fields are used.

    Returns:
        A row for each image.

    Raises:
        InputError: An array is missing, or of another shape.
    """
    regular_file(path, "arrays")
    names = (config.image_field, config.label_field)
    with explained(f"{path}: cannot be read as arrays"), np.load(path, allow_pickle=False) as file:
        if missing := [name for name in names if name not in file.files]:
            raise InputError(
                f"{path}: array {missing[0]!r} is missing; found {shown(sorted(file.files))}"
            )
        sizes = {entry.filename: entry.file_size for entry in file.zip.infolist()}
        if (held := sum(sizes[f"{name}.npy"] for name in names)) > _MOST_ARRAYS:
            raise InputError(
                f"{path}: arrays have {size_of(held)}, expected {size_of(_MOST_ARRAYS)} at most"
            )
        images, labels = (file[name] for name in names)
    if labels.ndim != 1 or images.ndim < 3 or len(images) != len(labels):
        raise InputError(
            f"{path}: {names[0]} is {images.shape} and {names[1]} is {labels.shape}; expected "
            "(n, height, width) or (n, height, width, 3), and (n,)"
        )
    pairs = zip(images, labels.tolist(), strict=True)
    rows = [dict(zip(names, pair, strict=True)) for pair in pairs]
    with explained(f"{path}: cannot be read as arrays"):
        parts = parts_of(config.split or "train", {"train": len(rows)})
    return [row for _, part in parts for row in rows[part]]
