"""The error for wrong input, and conversions of other errors to it."""

import contextlib
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

_SHOWN = 200  # largest number of characters of untrusted text in a message

_short = reprlib.Repr()
_short.maxlevel = 3
_short.maxstring = _short.maxother = _SHOWN


class InputError(ValueError):
    """The user's input is wrong; the message says what was found and what was expected.

    The command line prints the message alone and exits with code 2.
    """


class NotFiniteError(InputError):
    """Training cannot go on: losses, gradients or parameters are infinite or NaN."""


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Checks that an argument is one of some words.

    Args:
        name: Of the argument, for the message.
        value: Anything.
        choices: The words.

    Raises:
        InputError: It is none of them.

    Example:
        >>> check_choice("quantization", "nf4", ("none", "int8", "nf4"))
    """
    if value not in choices:
        raise InputError(f"{name} is {shown(value)}, expected {' or '.join(map(repr, choices))}")


def shown(value: Any) -> str:
    """Formats a value for a message: its `repr`, cut to 200 characters.

    Args:
        value: Of any size and depth; containers are not walked to their end.

    Returns:
        The text.

    Example:
        >>> shown("tok"), len(shown("x" * 10_000)), shown([[[[1]]]])
        ("'tok'", 200, '[[[[...]]]]')
    """
    try:
        text = _short.repr(value)
    except Exception:  # an int of more digits than Python prints, say
        text = f"<{type(value).__name__}>"
    return cut(text)


def cut(text: str) -> str:
    """Formats a text of a file for a message: at most 200 characters, all of them printable.

    Args:
        text: Of any length; it may contain control sequences of terminals.

    Returns:
        Its beginning, with escapes for characters that cannot be printed.

    Example:
        >>> print(cut(chr(27) + "[2J"), len(cut("x" * 10_000)))
        \\x1b[2J 200
    """
    printable = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: _SHOWN + 1]
    )
    return printable if len(printable) <= _SHOWN else f"{printable[: _SHOWN - 3]}..."


def size_of(count: int) -> str:
    """Formats a number of bytes for a message.

    Args:
        count: Number of bytes.

    Returns:
        The number in MiB or GiB, and in bytes where it is less than one MiB.

    Example:
        >>> size_of(5232), size_of(3 * 2**19), size_of(80 * 2**30)
        ('5,232 bytes', '1.5 MiB', '80.0 GiB')
    """
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count:,} bytes"


def reason(error: BaseException) -> str:
    """Gives the message of an exception in one line: that of its innermost cause with a message.

    Args:
        error: An exception of any library.

    Returns:
        At most 200 characters; with the name of its class if it has no message, or only a key.
    """
    said = ""
    link: BaseException | None = error
    while link is not None:
        lines = str(link).strip().splitlines()
        if lines:
            named = isinstance(link, (LookupError, TypeError, AttributeError, RecursionError))
            said = f"{type(link).__name__}: {lines[0]}" if named else lines[0]
        link = link.__cause__
    return cut(said or type(error).__name__)


@contextlib.contextmanager
def explained(message: str) -> Iterator[None]:
    """Converts any exception that a library raises on the user's input to an `InputError`.

    On damaged files, libraries raise all kinds of exceptions: `TypeError`, `RecursionError`,
    `Exception`, a panic of a Rust extension. Every call that passes a file to a library is inside
    this context.

    Args:
        message: Names the file and what it cannot be read as; the reason is appended.

    Raises:
        InputError: Any exception but a request to stop was raised; an `InputError` is not changed.

    Example:
        >>> with explained("rows.json: cannot be read as JSON"):
        ...     {}["a"]
        Traceback (most recent call last):
        loft_jax.errors.InputError: rows.json: cannot be read as JSON: KeyError: 'a'
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{message}: {reason(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what Rust extensions raise
            raise
        raise InputError(f"{message}: {reason(error)}") from error


@contextlib.contextmanager
def naming(where: object) -> Iterator[None]:
    """Prefixes the message of an `InputError` with the file that it is about.

    Args:
        where: The file, or a place in it.

    Raises:
        InputError: The raised one, with the place before its message.

    Example:
        >>> with naming("config.json"):
        ...     raise InputError("hidden_size is 0")
        Traceback (most recent call last):
        loft_jax.errors.InputError: config.json: hidden_size is 0
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
