"""Keeps standard output and standard error usable without readers or with a limited encoding."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def readers_may_leave() -> Iterator[None]:
    """Keeps a command running when nobody reads its output any more.

    If the reader of a pipe is gone, as with `head`, the output is lost without an error, also when
    the interpreter exits. For standard error that holds for every failure, a full disk too, since
    progress is not a result. A character that a stream's encoding lacks is written as its escape,
    as in `\\xe9`. If a stream was closed from the start, output to it is discarded, and no file
    that is opened later gets its file descriptor.

    Raises:
        OSError: Standard output cannot be written for another reason.
    """
    before = sys.stdout, sys.stderr
    _occupy_numbers()
    sys.stdout = _ForgivingStream(before[0], BrokenPipeError)
    sys.stderr = _ForgivingStream(before[1], OSError)
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        finally:
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


def _occupy_numbers() -> None:
    """Occupies descriptors 0 to 2: C++ libraries write messages to 2, whichever file that is."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)


class _ForgivingStream:
    """A text stream that drops what it cannot write, if the error is of a given class."""

    def __init__(self, stream: TextIO | None, lost: type[OSError]) -> None:
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115  # Python's are not closed
        self._lost = lost

    def write(self, text: str) -> int:
        try:
            self._safely(self._stream.write, text)
        except UnicodeEncodeError as error:
            escaped = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            self._safely(self._stream.write, escaped)
        return len(text)

    def flush(self) -> None:
        self._safely(self._stream.flush)

    def _safely(self, call: Callable[..., Any], *arguments: str) -> None:
        try:
            call(*arguments)
        except OSError as error:
            # The buffered text would fail again, at the latest when Python exits.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            if not isinstance(error, self._lost):
                error.filename = "standard output"
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
