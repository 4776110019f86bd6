"""Ensures that one run at a time uses an output folder."""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from loft_jax.errors import InputError, cut, explained, reason
from loft_jax.files import locked, own_file, read_text
from loft_jax.training.distributed import all_agree, is_main

_log = logging.getLogger(__name__)
_MOST_BYTES = 1000


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Locks an output folder against other runs, until the context or this process ends.

    The file `.lock` in it names the holder, and is not removed, unless the run is refused before it
    has written anything: then the folder goes too, if it was not there before. With several
    processes, all of them call this, and the first one holds the lock.

    Args:
        folder: Made if missing.

    Raises:
        InputError: The folder cannot be made, its `.lock` is a link, or another run holds it. The
            error is raised on every process.
    """
    made = not folder.exists()
    with contextlib.ExitStack() as held:
        problem = InputError(f"{folder}: the first process cannot have it for this run")
        ok = True
        if is_main():
            try:
                _hold(folder, held)
            except InputError as error:
                ok, problem = False, error
        if not all_agree(ok):
            raise problem
        try:
            yield
        except InputError:
            if made and is_main():
                _leave_nothing(folder)
            raise


def _leave_nothing(folder: Path) -> None:
    """Removes the folder of a run that was refused before it wrote anything."""
    checkpoints, lock = folder / "checkpoints", folder / ".lock"
    with contextlib.suppress(OSError):  # checkpoints that are there stay, and so does the rest
        if {path.name for path in folder.iterdir()} <= {checkpoints.name, lock.name}:
            if checkpoints.exists():
                checkpoints.rmdir()
            lock.unlink()
            folder.rmdir()


def _hold(folder: Path, held: contextlib.ExitStack) -> None:
    file = folder / ".lock"
    with explained(f"{folder}: cannot hold a run"):
        folder.mkdir(parents=True, exist_ok=True)
        own_file(file)
    try:
        held.enter_context(locked(file))
    except BlockingIOError as error:
        holder = cut(read_text(file, "who trains there", most_bytes=_MOST_BYTES).strip())
        raise InputError(
            f"{folder}: a run is being trained there already, by {holder or 'another process'}; "
            "expected another output, or to wait until it has ended"
        ) from error
    except OSError as error:
        _log.warning(
            "%s: this file system has no locks (%s); nothing keeps a second run from writing there",
            *(folder, reason(error)),
        )
        return
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    with explained(f"{folder}: cannot hold a run"):
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
