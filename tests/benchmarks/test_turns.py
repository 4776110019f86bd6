"""Contestants take turns, and are compared within a round."""

import jax.numpy as jnp
import pytest

from benchmarks.optimizer.turns import Turn, take_turns, timing
from loft_jax.errors import InputError


def test_turns_alternate_and_ratios_are_within_a_round():
    order = []

    class Fake(Turn):
        def __init__(self, name, seconds):
            self.name, self.seconds = name, iter(seconds)

        def __call__(self, repeats):
            order.append((self.name, repeats))
            return next(self.seconds) * repeats

    # A machine that slows down by four: every ratio is 3 all the same.
    slow = [1.0, 1.0, 1.0, 1.0, 2.0, 4.0]
    turns = {"adamw": Fake("adamw", slow), "loft": Fake("loft", [3 * x for x in slow])}
    times = take_turns(turns, rounds=3, seconds=0.0)
    assert times == {"adamw": [1.0, 2.0, 4.0], "loft": [3.0, 6.0, 12.0]}
    assert [name for name, _ in order[6:]] == ["adamw", "loft", "loft", "adamw", "adamw", "loft"]
    assert all(repeats % 2 == 0 for _, repeats in order[6:])
    row = timing(times, "loft")
    assert (row["seconds"], row["rounds"], row["to_adamw"]) == (6.0, 3, 3.0)
    assert "to_dense" not in row


def test_nothing_measured_is_silent_about_nan():
    turn = Turn(lambda state: ({"q": jnp.array([1.0, state])}, jnp.nan), 0.0)
    turn(1)
    turn.check("loft")
    turn(1)
    with pytest.raises(InputError, match="loft came to values"):
        turn.check("loft")
