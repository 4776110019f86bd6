"""Timing contestants by turns, so that what a shared machine does to all of them cancels."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.history import Row
from benchmarks.optimizer.contestants import REFERENCES, Contestant
from loft_jax.errors import InputError

WARM_UP = 2
"""Turns that do not count: the first is slow for reasons of its own, and both factors must move."""

_TURN_SECONDS = 0.03  # a turn is at least this long: many dispatches, and still short
_LEAST_ROUNDS = 3


class Turn:
    """What one contestant does when it is its turn, going on from the last time.

    Args:
        step: From a state to (result, next state).
        state: The first state; `step` may donate it.
    """

    def __init__(self, step: Callable[[Any], tuple[Any, Any]], state: Any) -> None:
        self._step, self._state = step, state
        self._result: Any = None

    def __call__(self, repeats: int) -> float:
        """Does it `repeats` times, to the end; gives the seconds of all together."""
        start = time.perf_counter()
        for _ in range(repeats):
            self._result, self._state = self._step(self._state)
        jax.block_until_ready((self._result, self._state))
        return time.perf_counter() - start

    def check(self, name: str) -> None:
        """Refuses a measurement of NaN.

        Args:
            name: Of the contestant, for the message.

        Raises:
            InputError: The last result is not finite.
        """
        if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(self._result)):
            raise InputError(f"{name} came to values that are not finite: its time means nothing")


def take_turns(
    turns: Mapping[Contestant, Turn], rounds: int, seconds: float, *, repeat: bool = True
) -> dict[Contestant, list[float]]:
    """Times contestants by turns.

    Args:
        turns: By name.
        rounds: Turns of each at most.
        seconds: After which no new round begins, but three are done.
        repeat: Whether a turn is filled up to 30 ms. It has an even number of repeats, since both
            factors take the same share of it then; otherwise it is a single one.

    Returns:
        Seconds of one repeat by name, one number a round.
    """
    repeats = {}
    for name, turn in turns.items():
        for _ in range(WARM_UP):
            turn(1)
        repeats[name] = 2 * math.ceil(_TURN_SECONDS / turn(2)) if repeat else 1
    times: dict[Contestant, list[float]] = {name: [] for name in turns}
    names = list(turns)
    start = time.perf_counter()
    for number in range(rounds):
        if number >= _LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            times[name].append(turns[name](repeats[name]) / repeats[name])
    return times


def timing(times: Mapping[Contestant, Sequence[float]], name: Contestant) -> Row:
    """What the rounds came to for one contestant.

    Args:
        times: Seconds by contestant, one number a round.
        name: Of the contestant.

    Returns:
        `seconds` (median), `rounds`, and for each reference that took part (adamw, both dense)
        the median ratio over the rounds with its quartiles: `to_adamw`, `to_adamw_quartiles`.
    """
    row: Row = {"seconds": statistics.median(times[name]), "rounds": len(times[name])}
    for reference in REFERENCES:
        if reference in times:
            ratios = [x / y for x, y in zip(times[name], times[reference], strict=True)]
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
            row |= {f"to_{reference}": middle, f"to_{reference}_quartiles": [low, high]}
    return row
