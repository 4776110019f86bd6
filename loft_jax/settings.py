"""Common checks of settings: types, known names, numbers in their range."""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from loft_jax.errors import InputError, shown


def check_settings(
    settings: Any,
    section: str = "",
    *,
    at_least: Mapping[str, float] | None = None,
    positive: Sequence[str] = (),
    fractions: Sequence[str] = (),
    largest: int = 2**31 - 1,
) -> None:
    """Gives settings the types of their fields, in place; refuses other types and other ranges.

    Paths become texts, lists become tuples, and numbers of NumPy become Python's. A number that is
    given as a text is refused. Settings whose type is a `Literal` must be one of its values.
    Numbers must be finite, also in tuples and mappings. None is an unset setting, and is accepted.

    Args:
        settings: A frozen dataclass. A value that is none of Python's plain types is left alone:
            the command line fills in some values after it has made the dataclass.
        section: Its name in a configuration, for messages; empty for the configuration itself.
        at_least: The least value of settings by name.
        positive: Names of settings that must be above zero.
        fractions: Names of settings that must be in [0, 1).
        largest: The largest integer.

    Raises:
        InputError: A setting is of another type or out of its range; the message names it.

    Example:
        >>> from loft_jax.data import DataConfig
        >>> DataConfig("rows.jsonl", max_length="512")
        Traceback (most recent call last):
        loft_jax.errors.InputError: data.max_length is '512', expected an integer
        >>> check_settings(DataConfig("rows.jsonl"), "data", at_least={"max_length": 2048})
        Traceback (most recent call last):
        loft_jax.errors.InputError: data.max_length is 1024, expected at least 2048
    """
    prefix, hints = f"{section}." if section else "", get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = _plain(getattr(settings, field.name)), hints[field.name]
        if not _fits(value, hint):
            expected = expected_of(hint)
            raise InputError(f"{prefix}{field.name} is {shown(value)}, expected {expected}")
        object.__setattr__(settings, field.name, value)

    def check(name: str, value: Any, holds: bool, expected: str) -> None:
        if value is not None and not holds:
            raise InputError(f"{prefix}{name} is {shown(value)}, expected {expected}")

    for name, number in _numbers(vars(settings)):
        if isinstance(number, int):
            limit = f"at most {largest}" if number > 0 else f"at least {-largest}"
            check(name, number, abs(number) <= largest, limit)
        else:
            check(name, number, math.isfinite(number), "a finite number")
    for name, low in (at_least or {}).items():
        value = getattr(settings, name)
        check(name, value, value is None or value >= low, f"at least {low}")
    for name in positive:
        value = getattr(settings, name)
        check(name, value, value > 0, "a positive number")
    for name in fractions:
        value = getattr(settings, name)
        check(name, value, 0 <= value < 1, "a number in [0, 1)")


def _plain(value: Any) -> Any:
    """Converts a path to text, a number of NumPy to Python's, and a list to a tuple."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of its field; values of no plain type fit every field."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if not isinstance(value, (bool, int, float, str, tuple, dict, NoneType)):
        return True
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, inner[0]) and _fits(each, inner[1]) for key, each in value.items()
        )
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


_EXPECTED = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    tuple: "a list",
    dict: "a mapping",
}


def expected_of(hint: Any) -> str:
    """Says in a message what values a type has."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(expected_of(each) for each in get_args(hint) if each is not NoneType)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    text = _EXPECTED.get(get_origin(hint) or hint, f"a {getattr(hint, '__name__', hint)}")
    inner = [each for each in get_args(hint) if each in _EXPECTED]
    return f"{text}, each {expected_of(inner[-1])}" if inner else text


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Yields all numbers in values, also in tuples and mappings, by their names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, (int, float)):
                    yield name, each
