"""Opens untrusted files safely, and replaces files and folders atomically."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loft_jax.errors import InputError, explained, shown, size_of

_MOST_JSON = 2**25
"""Largest size of an index in bytes; that of the largest models has a third of it."""

_MOST_VALUES = 2**22
"""Largest number of values in a JSON file; the largest vocabularies have half as many."""

MOST_CONFIG = 2**22
"""Largest size of a configuration in bytes."""

_PIECE = 2**16  # bytes read at once

_LONGEST_NAME = 255  # what file systems take

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_POINTER = 1024  # largest size in bytes, by its specification


def regular_file(
    path: str | os.PathLike[str], expected: str, *, most_bytes: int | None = None
) -> Path:
    """Checks that a path is a regular file: a pipe or a device might never end.

    Args:
        path: Path of the file, or of a link to it.
        expected: What it should be, for the message.
        most_bytes: Largest size; None accepts any.

    Returns:
        The path.

    Raises:
        InputError: There is no such file, it is of another kind or too large, or it is a Git LFS
            pointer.
    """
    path = Path(path)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no such file, expected {expected}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise InputError(f"{path}: is {kind}, expected {expected}")
    if 0 < status.st_size < _MOST_POINTER and _begins(path, _LFS_POINTER):
        raise InputError(
            f"{path}: is a Git LFS pointer, expected {expected}; `git lfs pull` fetches the file"
        )
    if most_bytes is not None and status.st_size > most_bytes:
        raise InputError(
            f"{path}: has {size_of(status.st_size)}, expected {expected} of at most "
            f"{size_of(most_bytes)}"
        )
    return path


def own_file(path: Path) -> Path:
    """Checks a file that a run reads and writes, and makes it if it is missing.

    Args:
        path: Path of the file, in an existing folder.

    Returns:
        The path.

    Raises:
        InputError: It is not a regular file, or is a link, which may lead to any file of the user.
        OSError: It cannot be opened.

    Example:
        >>> import tempfile
        >>> own_file(Path(tempfile.mkdtemp()) / ".lock").read_text()
        ''
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # the last for a pipe
        os.close(os.open(path, flags, 0o666))
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(f"{path}: is a link, expected a file of the run itself") from error
    return regular_file(path, "a file of the run itself")


def _begins(path: Path, beginning: bytes) -> bool:
    with explained(f"{path}: cannot be read"), path.open("rb") as file:
        return file.read(len(beginning)) == beginning


def inside(folder: Path, name: str | os.PathLike[str]) -> Path:
    """Gives the path of a name in an untrusted file, if it stays in the folder of that file.

    Links may lead to other places in the folder, and in the cache of the Hugging Face hub from a
    snapshot to the repository's blobs, where that cache keeps its files.

    Args:
        folder: Folder that the name is relative to.
        name: The name in a file of the folder.

    Returns:
        `folder / name`, which need not exist.

    Raises:
        InputError: The name is absolute, has "..", or is a link that leads out of the folder.

    Example:
        >>> inside(Path("/m"), "../b.json")
        Traceback (most recent call last):
        loft_jax.errors.InputError: /m: names the file '../b.json', expected one inside the folder
    """
    with explained(f"{folder}: names a file that cannot be looked for"):
        path = folder / name
        own = folder.resolve()
        target = path.resolve()
        homes = [own, *(up.parent / "blobs" for up in own.parents if up.name == "snapshots")]
        leaves = os.path.isabs(name) or ".." in Path(name).parts
        longer = len(os.fspath(name)) > _LONGEST_NAME
        if leaves or longer or not any(target.is_relative_to(home) for home in homes):
            raise InputError(
                f"{folder}: names the file {shown(os.fspath(name))}, expected one inside the folder"
            )
    return path


def read_text(path: Path, expected: str, *, most_bytes: int = _MOST_JSON) -> str:
    """Reads a text in UTF-8.

    Args:
        path: Path of a regular file.
        expected: What it should be, for the message.
        most_bytes: Largest size in bytes.

    Returns:
        The text.

    Raises:
        InputError: As for `regular_file`; or it cannot be read, or is not UTF-8.
    """
    regular_file(path, expected, most_bytes=most_bytes)
    with explained(f"{path}: cannot be read, expected {expected}"), path.open("rb") as file:
        pieces = []
        while piece := file.read(_PIECE):
            pieces.append(piece)
            # Files of /proc have size 0 and may not end.
            if len(pieces) * _PIECE > most_bytes + _PIECE:
                raise InputError(f"{path}: expected {expected} of at most {size_of(most_bytes)}")
        return b"".join(pieces).decode("utf-8")


def read_json(path: Path, *, most_bytes: int = _MOST_JSON) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
        path: Path of a regular file.
        most_bytes: Largest size in bytes.

    Returns:
        The object.

    Raises:
        InputError: The file is missing, unreadable, too long or too deep, or holds something else.
    """
    with explained(f"{path}: cannot be read as JSON"):
        text = read_text(path, "JSON", most_bytes=most_bytes)
        if sum(map(text.count, ",[{")) > _MOST_VALUES:  # each becomes an object of Python
            raise ValueError(f"it has more than {_MOST_VALUES} values")
        content = json.loads(text)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes a file that replaces another one when it is complete.

    Partial files that killed processes left are removed; those of running processes are locked, and
    are kept.

    Args:
        path: Path of the file, in an existing folder.

    Yields:
        The path of an empty file in the same folder.

    Raises:
        OSError: It cannot be written; then an existing file is kept.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with replacing(file) as partial:
        ...     _ = partial.write_text("whole")
        >>> file.read_text(), [entry.name for entry in file.parent.iterdir()]
        ('whole', ['a.txt'])
    """
    path = Path(path)
    with _partial(path) as (new, partial):
        new.touch(exist_ok=False)
        with locked(new):
            new.rename(partial)
            yield partial
            os.chmod(partial, 0o666 & ~_umask())
            os.replace(partial, path)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes a folder that gets its name when it is complete.

    Args:
        path: Path that does not exist, or of an empty folder; its parent is made if missing.

    Yields:
        The path of an empty folder beside it.

    Raises:
        OSError: It cannot be written; then there is no folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path) as (new, partial):
        new.mkdir()
        with locked(new):
            new.rename(partial)
            yield partial
            os.replace(partial, path)


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[tuple[Path, Path]]:
    """Gives two temporary names beside a path, and removes what has them at the end.

    An entry is made under the first name, locked, and then renamed to the second. Other processes
    look for the second to remove entries that no process has locked.
    """
    for entry in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError), locked(entry):  # a running process has locked its own
            _remove(entry)
    name = f".{path.name}.{secrets.token_hex(4)}"
    new, partial = path.with_name(f"{name}.new"), path.with_name(f"{name}.partial")
    try:
        yield new, partial
    finally:
        _remove(new)
        _remove(partial)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Locks a file or a folder until the context or this process ends.

    Args:
        path: Existing file or folder.

    Raises:
        BlockingIOError: Another process has locked it.
    """
    # Over NFS, an exclusive lock needs a file that is open for writing.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove(entry: Path) -> None:
    if entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cache_folder(name: str) -> Path | None:
    """Gives a folder for files that can be made again, in that of the user's caches.

    Args:
        name: Of what is kept there.

    Returns:
        The folder, which need not be there; `XDG_CACHE_HOME` moves it. None if the user has no
        home.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    with contextlib.suppress(RuntimeError):
        return caches.expanduser() / "loft_jax" / name
    return None
