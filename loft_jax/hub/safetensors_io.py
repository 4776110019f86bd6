"""Reads safetensors files one tensor at a time, and writes them completely or not at all."""

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from loft_jax.errors import InputError, explained, shown
from loft_jax.files import inside, read_json, regular_file, replacing

INDEX_NAME = "model.safetensors.index.json"
FILE_NAME = "model.safetensors"

Region = tuple[slice, ...] | EllipsisType
"""One slice for each axis of a tensor, or `...` for the whole tensor."""

_READABLE = ("F64", "F32", "F16", "BF16")


class Safetensors:
    """The floating-point tensors of one file, or of the shards that an index names.

    Args:
        path: A `.safetensors` file, or a `.safetensors.index.json` beside its shards.
        keep_open: Keep files mapped in memory, for many small tensors: each opening takes time in
            proportion to their number.

    Raises:
        InputError: A file is missing, unreadable or damaged, or the index does not match its
            shards.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "x.safetensors"
        >>> write_safetensors(path, {"a": np.ones((2, 3), np.float32)})
        >>> Safetensors(path).shapes
        {'a': (2, 3)}
    """

    def __init__(self, path: str | os.PathLike[str], *, keep_open: bool = False) -> None:
        self.path = Path(path)
        opener = functools.partial(safe_open, framework="numpy")
        self._open: Callable[[Path], Any] = functools.cache(opener) if keep_open else opener
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        if self.path.suffix == ".json":
            self._open_index()
        else:
            self._open_file(self.path)

    def read(self, name: str, region: Region = ...) -> np.ndarray:
        """Reads one tensor or a region of it, and nothing else of the file.

        Args:
            name: One of `shapes`.
            region: One slice for each axis, without steps; by default the whole tensor.

        Returns:
            The values in their stored dtype (bfloat16 as `ml_dtypes.bfloat16`).

        Raises:
            InputError: There is no such tensor, the file cannot be read, or the tensor is not of
                floating-point numbers.
        """
        if name not in self._files:
            raise InputError(f"{self.path}: tensor {shown(name)} is missing")
        file = self._files[name]
        with explained(f"{file}: cannot read tensor {shown(name)}"):
            opened = self._open(file)
            tensor = opened.get_slice(name)
            stored = tensor.get_dtype()
            if stored not in _READABLE:
                raise InputError(
                    f"{file}: tensor {shown(name)} is stored as {stored}, "
                    f"expected one of {', '.join(_READABLE)}"
                )
            # Slices take no ellipsis before safetensors 0.8.
            found: np.ndarray = opened.get_tensor(name) if region is ... else tensor[region]
            return found

    def _open_file(self, file: Path) -> None:
        regular_file(inside(file.parent, file.name), "safetensors")
        with explained(f"{file}: not a readable safetensors file"):
            opened = self._open(file)
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                if name in self._files:
                    raise InputError(
                        f"{self.path}: tensor {shown(name)} is in {self._files[name].name} and in "
                        f"{file.name}, expected it once"
                    )
                self.shapes[name] = tuple(opened.get_slice(name).get_shape())
                self._files[name] = file

    def _open_index(self) -> None:
        weight_map = read_json(self.path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{self.path}: has no 'weight_map'")
        for name, shard in weight_map.items():
            if not isinstance(shard, str):
                raise InputError(
                    f"{self.path}: weight_map[{shown(name)}] is {shown(shard)}, expected a "
                    "file's name"
                )
        for shard in sorted(set(weight_map.values())):
            self._open_file(inside(self.path.parent, shard))
        for name, shard in weight_map.items():
            if self._files.get(name) != self.path.parent / shard:
                raise InputError(
                    f"{self.path}: says {shard} holds tensor {shown(name)}, it does not"
                )


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors to a file, which is complete or does not exist.

    Args:
        path: Path of the file; an existing file is replaced.
        tensors: Arrays by name.

    Raises:
        InputError: The file cannot be written.
    """
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with explained(f"{path}: cannot be written"), replacing(path) as partial:
        save_file(contiguous, partial, metadata={"format": "pt"})  # PyTorch's loaders require it


def write_checkpoint(
    folder: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterator[tuple[str, np.ndarray]],
    *,
    max_shard_bytes: int,
) -> None:
    """Writes a model's tensors as one file, or as shards and their index.

    One shard at a time is held in memory.

    Args:
        folder: An existing folder.
        shapes: Shape and dtype of every tensor, in the order in which `tensors` yields them.
        tensors: Names and arrays.
        max_shard_bytes: Largest size of a shard, unless it holds a single larger tensor.
    """
    shards: list[list[str]] = [[]]
    total = room = 0
    for name, (shape, dtype) in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if shards[-1] and room + size > max_shard_bytes:
            shards.append([])
            room = 0
        shards[-1].append(name)
        room += size
        total += size
    if len(shards) == 1:
        write_safetensors(folder / FILE_NAME, dict(tensors))
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, dict(next(tensors) for _ in names))
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
