"""Reads the files of an adapter: its weights by PEFT's names, and both files as one adapter."""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from loft_jax.errors import InputError, shown
from loft_jax.hub.peft_names import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from loft_jax.hub.safetensors_io import Safetensors

Contents = TypeVar("Contents")

_log = logging.getLogger(__name__)

# Parts of a name that `torch.compile`, FSDP and DistributedDataParallel add for the module that
# they wrap; the last does so at the beginning only.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module")
_DISTRIBUTED = "module"

# PEFT saves an adapter without its name, but a state dict of the model in training has it.
_ADAPTER = re.compile(
    r"(?P<start>.+\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector))"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?P<end>\.weight)?"
)
_DEFAULT = "default"


class AdapterFile:
    """The tensors of `adapter_model.safetensors`.

    Names are PEFT's, `base_model.model.` and the module's, without what a wrapper of the trained
    model added: `_orig_mod.`, `module.`, the adapter's name.

    Args:
        path: The file.

    Raises:
        InputError: The file is missing or damaged, or two tensors have one name.

    Attributes:
        path: The file.
        shapes: Shapes by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file = Safetensors(path, keep_open=True)
        self._stored: dict[str, str] = {}
        self._unknown_to_peft: list[str] = []
        for stored, shape in self._file.shapes.items():
            name, known = _plain(stored)
            if name in self._stored:
                raise InputError(
                    f"{path}: tensors {shown(self._stored[name])} and {shown(stored)} are both "
                    f"{name!r}; expected one adapter"
                )
            self.shapes[name], self._stored[name] = shape, stored
            if not known:
                self._unknown_to_peft.append(stored)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, in its stored dtype; see `Safetensors.read`."""
        return self._file.read(self._stored.get(name, name))

    def log_unknown_to_peft(self) -> None:
        """Logs that PEFT does not read some of the tensors, if that is so."""
        if self._unknown_to_peft:
            first = self._unknown_to_peft[0]
            _log.warning(
                "%s: %d tensors have names that PEFT does not read, such as %s; they are read as "
                "%s and the like, where PEFT would apply nothing",
                self.path,
                len(self._unknown_to_peft),
                shown(first),
                _plain(first)[0],
            )


def read_unchanged(folder: Path, read: Callable[[], Contents]) -> Contents:
    """Reads one adapter consistently, even if another is written to the folder meanwhile.

    A writer removes the configuration, replaces the weights, and then writes its configuration. So
    if both files are the same before and after reading, everything that was read belongs to one
    adapter.

    Args:
        folder: Of the adapter.
        read: Reads both files; called again if they were replaced.

    Returns:
        What `read` returns.

    Raises:
        InputError: Raised by `read`; or the adapter is a pickle, or never at rest.
    """
    if not (folder / WEIGHTS_NAME).exists() and (folder / "adapter_model.bin").exists():
        raise InputError(
            f"{folder}: holds adapter_model.bin, a pickle, which can run any code when it is "
            f"opened; expected {WEIGHTS_NAME}, which PEFT's save_pretrained writes"
        )
    deadline = time.monotonic() + _SECONDS_OF_WRITING
    while True:
        before = _identity(folder)
        try:
            contents = read()
        except InputError:
            if _identity(folder) == before:
                raise
        else:
            if _identity(folder) == before:
                return contents
        if time.monotonic() > deadline:
            raise InputError(f"{folder}: is written to all the time, expected an adapter at rest")
        time.sleep(0.05)


_SECONDS_OF_WRITING = 10.0


def _identity(folder: Path) -> list[tuple[int, int, int] | None]:
    """Identifies the files of an adapter, to notice if they are replaced."""
    found: list[tuple[int, int, int] | None] = []
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            status = (folder / name).stat()
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError:
            found.append(None)
    return found


def _plain(stored: str) -> tuple[str, bool]:
    """Gives PEFT's name of a stored tensor, and whether PEFT reads the stored one."""
    parts = stored.split(".")
    while len(parts) > 1 and parts[0] == _DISTRIBUTED:
        del parts[0]
    name = ".".join(part for part in parts if part not in _WRAPPERS)
    known = name == stored and name.startswith(PREFIX)
    if not name.startswith(PREFIX):
        name = PREFIX + name
    if found := _ADAPTER.fullmatch(name):
        known = known and found["adapter"] in (None, _DEFAULT)
        magnitude = found["start"].endswith("magnitude_vector")
        name = found["start"] + ("" if magnitude else found["end"] or "")
    return name, known
