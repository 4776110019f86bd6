"""Standard output and standard error, when nobody reads them or they cannot take a letter."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def readers_may_leave() -> Iterator[None]:
    """Keeps a command at work when nobody reads what it writes any more.

    Where a pipe's reader has gone, as `head` does, what is written there is lost and nothing fails,
    at the end of the interpreter neither. Of standard error that holds for every failure, a full
    disk too: progress is no result. A letter that a stream's encoding lacks is written as its
    escape, as in `\\xe9`. A stream that was closed from the start takes all and keeps
    nothing, and no file that is opened later gets its number.

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
    """C++ libraries write their messages to number 2, whichever file that is."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)


class _ForgivingStream:
    """A text stream that drops what it cannot write, if the reason is of a given kind."""

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
            # What is buffered would fail again, at the latest when Python ends.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            if not isinstance(error, self._lost):
                error.filename = "standard output"
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
