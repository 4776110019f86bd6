"""Numbers that transformations take, and how those out of range are refused."""

import math
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Number = float | jax.Array
"""A hyperparameter: known, or traced as `optax.inject_hyperparams` does."""

# Squares of gradients underflow in float16.
_STORABLE = ("bfloat16", "float32", "float64")


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
    if isinstance(value, jax.core.Tracer):
        return
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {value!r}, expected {expected}") from error
    if not holds(number):
        raise ValueError(f"{name} is {number!r}, expected {expected}")


def check_choice(value: str, name: str, kind: Any) -> None:
    """Refuses a word that is none of those of a `Literal`."""
    if value not in get_args(kind):
        raise ValueError(f"{name} is {value!r}, expected one of {get_args(kind)}")


def check_scaling(scaling: Number, name: str = "scaling") -> None:
    """Refuses a scaling of zero, which would erase the adapter."""
    check(scaling, name, lambda x: x != 0 and math.isfinite(x), "a finite number, not 0")


def check_decay(decay: Number, name: str) -> None:
    """Refuses what is not the decay of a moving average."""
    check(decay, name, lambda x: 0 <= x < 1, "a number in [0, 1)")


def check_not_negative(value: Number, name: str) -> None:
    """Refuses a negative number."""
    check(value, name, lambda x: x >= 0, "a number >= 0")


def check_weight_decay(value: Number) -> None:
    """Refuses a negative or infinite decay."""
    check(value, "weight_decay", lambda x: 0 <= x < math.inf, "a finite number >= 0")


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
    check_weight_decay(weight_decay)


def check_steps(count: Number, name: str, least: int) -> None:
    """Refuses a number of steps that is not whole, or below the least one."""
    check(
        count,
        name,
        lambda x: x >= least and x == math.floor(x),
        f"a whole number of steps >= {least}",
    )


def check_dtype(dtype: DTypeLike | None, name: str) -> None:
    """Refuses a dtype that moments cannot have; None passes, for the dtype of the parameters."""
    if isinstance(dtype, (jax.Array, np.ndarray)):
        raise ValueError(
            f"{name} is an array, expected a dtype: with optax.inject_hyperparams, give its name, "
            f"or name {name} in static_args"
        )
    if dtype is None:
        return
    try:
        found = str(jnp.dtype(dtype))
    except TypeError:
        found = repr(dtype)
    if found not in _STORABLE:
        raise ValueError(f"{name} is {found}, expected one of {_STORABLE}")
