"""Matches untrusted regular expressions within limits of time and memory."""

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

try:
    import regex
except ModuleNotFoundError:  # beside jax and flax alone, where all patterns are the caller's own
    regex = None  # type: ignore[assignment]  # a module, where there is one

from loft_jax.errors import InputError, explained, shown

_SECONDS = 4.0
_LONGEST = 200_000  # characters; one that names every layer of a large model has a quarter of it
_MOST_COPIES = 100_000  # of what counted repetitions, as in `a{9}`, repeat: they are unrolled

# Read by `re` as letters, or as a set of letters, and by `regex` as a fuzzy match or a class.
_OTHERWISE = re.compile(r"\{[a-z]|\[\[:")
_COUNT = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")


class Patterns:
    """Matches the patterns of one source as Python's `re` does, in four seconds of processor time.

    A pattern such as `(a|aa)*!` takes time exponential in the length of the text, and Python's `re`
    cannot be interrupted. Where the package `regex` is missing, it matches, without that limit;
    what reads files needs the package.

    Args:
        source: Where the patterns come from, for messages.

    Example:
        >>> bool(Patterns("target_modules").fullmatch(r"layers\\.\\d+\\.up", "layers.10.up"))
        True
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._left = _SECONDS
        self._compiled: dict[str, Any] = {}
        self._endings: dict[tuple[str, ...], _Endings] = {}

    def check(self, pattern: str) -> Any:
        """Compiles a pattern, once.

        Args:
            pattern: In the syntax of Python's `re`.

        Returns:
            The compiled pattern.

        Raises:
            InputError: It is not a regular expression, has too many repetitions, or takes too long.
        """
        if pattern not in self._compiled:
            before = time.thread_time()
            with explained(f"{self._source}: {shown(pattern)} is no regular expression"):
                if len(pattern) > _LONGEST:
                    raise ValueError(f"it has more than {_LONGEST} characters")
                if _OTHERWISE.search(pattern):
                    raise ValueError("it has '{' and a letter, or '[[:', which is read in two ways")
                re.compile(pattern)  # which takes less than the other
                counts = (int(n or 1) for found in _COUNT.findall(pattern) for n in found)
                if math.prod(max(n, 1) for n in counts) > _MOST_COPIES:
                    raise ValueError(f"it repeats more than {_MOST_COPIES} times")
                self._compiled[pattern] = (regex or re).compile(pattern)
            self._spend(before)
        return self._compiled[pattern]

    def fullmatch(self, pattern: str, text: str) -> Any:
        """Matches a pattern with a whole text; see `match`."""
        return self._matched(self.check(pattern).fullmatch, text)

    def match(self, pattern: str, text: str) -> Any:
        """Matches a pattern at the start of a text.

        Raises:
            InputError: It is not a regular expression, or takes too long.
        """
        return self._matched(self.check(pattern).match, text)

    def first_end(self, keys: Iterable[str], name: str) -> str | None:
        """Gives the first pattern that matches the end of a name, at a dot.

        Patterns that are names are looked up, since there may be one for each module of a model.

        Args:
            keys: Patterns, as in PEFT's `rank_pattern`: a dot is any character.
            name: Dotted path of a module.

        Returns:
            One of them, or None.

        Raises:
            InputError: One is not a regular expression, or they take too long.

        Example:
            >>> Patterns("rank_pattern").first_end(["proj", "mlp.up", ".*up"], "layers.3.mlp.up")
            'mlp.up'
        """
        keys = tuple(keys)
        if keys not in self._endings:
            self._endings[keys] = _Endings(keys)
        first = min(self._endings[keys].find(name), default=len(keys))
        for number, key in self._endings[keys].others.items():
            if number < first and self.match(rf"(.*\.)?({key})$", name):
                return key
        return keys[first] if first < len(keys) else None

    def _matched(self, function: Callable[..., Any], text: str) -> Any:
        if regex is None:
            return function(text)
        before = time.thread_time()
        try:
            # The limit is of the processor's time, and comes at twice what is given.
            return function(text, timeout=max(self._left / 2, 1e-3))
        except (TimeoutError, MemoryError):
            self._left = 0.0
            return None
        finally:
            self._spend(before)

    def _spend(self, before: float) -> None:
        self._left -= time.thread_time() - before
        if self._left <= 0:
            raise InputError(f"{self._source}: matching its regular expressions takes too long")


class _Endings:
    """The numbers of patterns that are names, by what they match; `others` has the rest."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.others: dict[int, str] = {}
        self._whole: dict[str, int] = {}
        self._ends: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}  # by length and dots
        for number, key in enumerate(keys):
            name = key[1:].replace("\\", "")
            if key == f"^{re.escape(name)}":
                self._whole[name] = number
            elif re.fullmatch(r"[\w.-]+", key):
                dots = tuple(at for at, letter in enumerate(key) if letter == ".")
                self._ends.setdefault(len(key), {}).setdefault(dots, {})[key] = number
            else:
                self.others[number] = key

    def find(self, name: str) -> Iterator[int]:
        """Yields the numbers of the names that match an end of a dotted path."""
        if name in self._whole:
            yield self._whole[name]
        for end in ends_of(name):
            for dots, keys in self._ends.get(len(end), {}).items():
                key = "".join("." if at in dots else letter for at, letter in enumerate(end))
                if key in keys:
                    yield keys[key]


def ends_of(path: str) -> list[str]:
    """Gives a dotted path and all that follows one of its dots.

    Example:
        >>> ends_of("layers.3.up")
        ['layers.3.up', '3.up', 'up']
    """
    return [path, *(path[at + 1 :] for at, letter in enumerate(path) if letter == ".")]
