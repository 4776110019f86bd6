"""Common checks of settings: known names, numbers in their range."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

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
    """Refuses settings out of their range.

    Settings whose type is a `Literal` must be one of its values. Numbers must be finite, also in
    tuples and mappings. None is an unset setting, and is accepted.

    Args:
        settings: A dataclass.
        section: Its name in a configuration, for messages; empty for the configuration itself.
        at_least: The least value of settings by name.
        positive: Names of settings that must be above zero.
        fractions: Names of settings that must be in [0, 1).
        largest: The largest integer.

    Raises:
        InputError: A setting is out of its range; the message names it.

    Example:
        >>> from loft_jax.data import DataConfig
        >>> check_settings(DataConfig("rows.jsonl"), "data", at_least={"max_length": 2048})
        Traceback (most recent call last):
        loft_jax.errors.InputError: data.max_length is 1024, expected at least 2048
    """
    prefix = f"{section}." if section else ""

    def check(name: str, value: Any, holds: bool, expected: str) -> None:
        if value is not None and not holds:
            raise InputError(f"{prefix}{name} is {shown(value)}, expected {expected}")

    for name, number in _numbers(vars(settings)):
        if isinstance(number, int):
            limit = f"at most {largest}" if number > 0 else f"at least {-largest}"
            check(name, number, abs(number) <= largest, limit)
        else:
            check(name, number, math.isfinite(number), "a finite number")
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal:
            value, known = getattr(settings, name), get_args(hint)
            check(name, value, value in known, f"one of {', '.join(known)}")
    for name, low in (at_least or {}).items():
        value = getattr(settings, name)
        check(name, value, value is None or value >= low, f"at least {low}")
    for name in positive:
        value = getattr(settings, name)
        check(name, value, value > 0, "a positive number")
    for name in fractions:
        value = getattr(settings, name)
        check(name, value, 0 <= value < 1, "a number in [0, 1)")


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Yields all numbers in values, also in tuples and mappings, by their names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, (int, float)):
                    yield name, each
