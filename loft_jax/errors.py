"""The one error that means "the input is wrong", and what becomes it."""

import contextlib
import reprlib
from collections.abc import Iterator
from typing import Any

_SHOWN = 200  # characters of what a stranger wrote that a message repeats

_short = reprlib.Repr()
_short.maxlevel = 3
_short.maxstring = _short.maxother = _SHOWN


class InputError(ValueError):
    """A mistake in what the user gave: its message says what was found and what was expected.

    The command line prints the message alone and exits with code 2.
    """


def shown(value: Any) -> str:
    """A value as a message repeats it: its `repr`, of at most 200 characters.

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
    """A text of a file as a message repeats it: of at most 200 characters, all of them printable.

    Args:
        text: Of any length; it may hold what a terminal takes for commands.

    Returns:
        Its beginning, with escapes in the place of what cannot be printed.

    Example:
        >>> print(cut(chr(27) + "[2J"), len(cut("x" * 10_000)))
        \\x1b[2J 200
    """
    printable = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: _SHOWN + 1]
    )
    return printable if len(printable) <= _SHOWN else f"{printable[: _SHOWN - 3]}..."


def reason(error: BaseException) -> str:
    """What an exception says, in one line: the innermost of its causes that says anything.

    Args:
        error: Of whichever library.

    Returns:
        At most 200 characters; the name of its class where it has no message, or only a key.
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
    """Turns whatever a library raises while it reads what a user gave into an `InputError`.

    Libraries raise what the damage happens to touch: `TypeError`, `RecursionError`, `Exception`,
    a panic of a Rust extension. The place that hands a file to a library stands inside.

    Args:
        message: Names the file and what it cannot be read as; the reason is put after it.

    Raises:
        InputError: Anything was raised, other than a request to stop; an `InputError` as it is.

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
    """Puts the file before what is wrong with its values.

    Args:
        where: The file, or a place in it.

    Raises:
        InputError: As it was raised, with the place in front.

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
