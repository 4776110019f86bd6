"""Numbers that transformations take, and how those out of range are refused."""

import math
from collections.abc import Callable

import jax

Number = float | jax.Array
"""A hyperparameter: known, or traced as `optax.inject_hyperparams` does."""


def check(value: Number, name: str, holds: Callable[[float], bool], expected: str) -> None:
    """Refuses a number that is known (not traced) and breaks a condition.

    Args:
      value: The number.
      name: Of the argument.
      holds: The condition.
      expected: The condition in words.

    Raises:
      ValueError: The condition does not hold; the message has the name, the value and the words.

    Example:
      >>> check(-1.0, "eps", lambda x: x >= 0, "a number >= 0")
      Traceback (most recent call last):
      ValueError: eps is -1.0, expected a number >= 0
    """
    if not isinstance(value, jax.core.Tracer) and not holds(float(value)):
        raise ValueError(f"{name} is {float(value)!r}, expected {expected}")


def check_scaling(scaling: Number, name: str = "scaling") -> None:
    """Refuses a scaling of zero, which would erase the adapter."""
    check(scaling, name, lambda x: x != 0 and math.isfinite(x), "a finite number, not 0")


def check_decay(decay: Number, name: str) -> None:
    """Refuses what is not the decay of a moving average."""
    check(decay, name, lambda x: 0 <= x < 1, "a number in [0, 1)")


def check_not_negative(value: Number, name: str) -> None:
    """Refuses a negative number."""
    check(value, name, lambda x: x >= 0, "a number >= 0")


def check_positive(value: Number | None, name: str) -> None:
    """Refuses a number that is not positive; None passes, for an option that is off."""
    if value is not None:
        check(value, name, lambda x: x > 0, "a positive number")


def check_positive_finite(value: Number, name: str) -> None:
    """Refuses a number that is not positive, or not finite."""
    check(value, name, lambda x: x > 0 and math.isfinite(x), "a positive, finite number")


def check_adam(b1: Number, b2: Number, eps: Number, weight_decay: Number) -> None:
    """Refuses arguments that are out of the range of AdamW's."""
    check_decay(b1, "b1")
    check_decay(b2, "b2")
    check_not_negative(eps, "eps")
    check_not_negative(weight_decay, "weight_decay")


def check_steps(count: Number, name: str, least: int) -> None:
    """Refuses a number of steps that is not whole, or below the least one."""
    check(
        count,
        name,
        lambda x: x >= least and x == math.floor(x),
        f"a whole number of steps >= {least}",
    )
