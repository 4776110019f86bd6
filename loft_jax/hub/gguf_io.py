"""Reads GGUF files: configuration and dequantized weights; families map the names."""

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFReader, ReaderTensor
from gguf.quants import dequantize

from loft_jax.errors import InputError, explained, naming, shown
from loft_jax.files import regular_file
from loft_jax.hub.safetensors_io import Region
from loft_jax.models.decoder_gguf import DecoderGGUF
from loft_jax.models.family import PretrainedConfig
from loft_jax.models.registry import gguf_family


class GGUF:
    """A GGUF file: its metadata, family and configuration, and its tensors one at a time.

    Tensors have Hugging Face's names and layouts. A tensor without such a name keeps its own.

    Args:
        path: A `.gguf` file.

    Raises:
        InputError: The file is missing, unreadable, damaged, or of an unknown architecture.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = regular_file(path, "GGUF")
        with explained(f"{self.path}: not a readable GGUF file"):
            reader = _BoundedReader(self.path)
            self.metadata: dict[str, Any] = {
                key: field.contents() for key, field in reader.fields.items()
            }
            tensors = list(reader.tensors)
        with explained(f"{self.path}: does not describe a model"):
            architecture = self.field("general.architecture")
        with naming(self.path):
            self.family = gguf_family(architecture)
        adapter = self.family.gguf
        assert adapter is not None
        self._adapter: DecoderGGUF = adapter
        for tensor in tensors:
            _check_kind(self.path, tensor)
        with explained(f"{self.path}: not a readable GGUF file"):
            self._tensors: dict[str, ReaderTensor] = {
                adapter.name(tensor.name): tensor for tensor in tensors
            }
            if len(self._tensors) < len(tensors):
                raise ValueError("two of its tensors are the same one of Hugging Face's names")
            # GGUF lists sizes in reverse.
            self.shapes: dict[str, tuple[int, ...]] = {
                name: tuple(int(size) for size in reversed(tensor.shape))
                for name, tensor in self._tensors.items()
            }
        with explained(f"{self.path}: does not describe a model"), naming(self.path):
            constants = {
                name: self._values(name, np.arange(self.shapes.pop(name)[0]))
                for name in adapter.constants
                if name in self.shapes
            }
            self.config: PretrainedConfig = adapter.config(self.metadata, self.shapes, constants)

    def read(self, name: str, region: Region = ...) -> np.ndarray:
        """Reads one tensor or a region of it, and dequantizes only the rows that are needed.

        Args:
            name: One of `shapes`.
            region: One slice for each axis, without steps; by default the whole tensor.

        Returns:
            The values as float32.

        Raises:
            InputError: There is no such tensor, or its quantization is not supported.
        """
        if name not in self.shapes:
            raise InputError(f"{self.path}: tensor {shown(name)} is missing")
        rows, *inside = (slice(None),) if region is ... else region
        kind = self._tensors[name].tensor_type.name
        with explained(f"{self.path}: tensor {shown(name)}, {kind}, cannot be dequantized"):
            every = np.arange(self.shapes[name][0])
            stored = self._adapter.stored_rows(name, every, self.config)[rows]
            return self._values(name, stored)[:, *inside]

    def _values(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Dequantizes rows of a tensor, given by their stored positions."""
        tensor = self._tensors[name]
        count, *features = (int(size) for size in reversed(tensor.shape))
        stored = tensor.data.reshape(count, -1)[rows]
        values = dequantize(stored, tensor.tensor_type).astype(np.float32, copy=False)
        return values.reshape(-1, *features)

    def field(self, key: str) -> Any:
        """Gives a metadata field that is required.

        Raises:
            InputError: It is not.
        """
        if key not in self.metadata:
            raise InputError(f"{self.path}: field {key!r} is missing")
        return self.metadata[key]


def _check_kind(path: Path, tensor: ReaderTensor) -> None:
    """Dequantizes one block of zeros, which fails for kinds that the gguf package cannot read."""
    _, size = GGML_QUANT_SIZES[tensor.tensor_type]
    try:
        dequantize(np.zeros((1, size), np.uint8), tensor.tensor_type)
    except NotImplementedError:
        raise InputError(
            f"{path}: tensor {shown(tensor.name)} is stored as {tensor.tensor_type.name}, which "
            "cannot be dequantized; expected floating-point numbers or a quantization that the "
            "gguf package reads"
        ) from None


class _BoundedReader(GGUFReader):
    """Keeps `GGUFReader` within the file; by itself it reads on past the end without an error."""

    _pieces = 0

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        self._pieces += 1
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("it is cut off, or its counts are wrong")
        if self._pieces > _MOST_PIECES:
            raise ValueError(f"its metadata has more than {_MOST_PIECES} values")
        return super()._get(offset, dtype, int(count), override_order)


_MOST_PIECES = 2**22
"""Largest number of values of the metadata; the largest vocabularies have half as many."""


def open_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Opens a GGUF file; the last one is cached, since parsing its vocabulary takes seconds.

    Args:
        path: A `.gguf` file.

    Returns:
        The file, which must not be modified.

    Raises:
        InputError: As for `GGUF`.
    """
    path = regular_file(path, "GGUF").absolute()
    status = path.stat()
    return _open_gguf(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _open_gguf(path: Path, size: int, modified: int) -> GGUF:
    return GGUF(path)
