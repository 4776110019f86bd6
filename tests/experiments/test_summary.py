"""What the runs of a comparison say together: the best rates, and steps to a loss."""

import math

import numpy as np
import pytest

from experiments.log import Setting
from experiments.summary import steps_to_match, summarize
from tests.experiments.made import result


def test_the_rate_is_chosen_by_validation_and_never_by_the_test():
    found = summarize(
        [
            result(rate=0.1, loss=1.0, test=0.1),
            result(rate=0.3, loss=0.8, test=0.9),
            result(rate=1.0, loss=math.inf),
        ]
    )
    (summary,) = found.values()
    assert (summary.learning_rate, summary.at_edge) == (0.3, False)
    assert summary.rates == {0.1: 1.0, 0.3: 0.8, 1.0: math.inf}
    assert summary.mean("loss") == 0.9
    assert math.isnan(summary.spread("loss"))


def test_rates_are_compared_on_the_seeds_that_all_have():
    # Seeds 1 and 2 are of the best rate alone: their losses must not take it away again.
    found = summarize(
        [
            result(rate=0.1, seed=0, loss=1.0, test=0.5),
            result(rate=0.1, seed=1, loss=9.0, test=0.6),
            result(rate=0.1, seed=2, loss=9.0, test=0.7),
            result(rate=0.3, seed=0, loss=1.1),
        ]
    )
    (summary,) = found.values()
    assert summary.learning_rate == 0.1
    assert summary.at_edge
    assert summary.mean("loss") == pytest.approx(0.6)
    assert summary.spread("loss") == pytest.approx(0.1)
    assert summary.curve() == [3.0, 2.0, pytest.approx(19 / 3)]
    assert summary.curve([0, 1]) == [3.0, 2.0, 5.0]


def test_rates_that_lack_a_seed_of_the_sweep_do_not_count():
    runs = [result(rate=0.1, seed=seed, loss=1.0) for seed in (0, 1)]
    found = summarize([*runs, result(rate=0.3, seed=0, loss=0.1)], seeds=(0, 1))
    assert [s.rates for s in found.values()] == [{0.1: 1.0}]
    assert summarize(runs, seeds=(0, 1, 2)) == {}


def test_rates_can_be_judged_by_another_measure():
    runs = [result(rate=0.1, loss=1.0), result(rate=0.3, loss=2.0)]
    for run, steps in zip(runs, (9.0, 5.0), strict=True):
        run.validation["steps"] = steps
    (summary,) = summarize(runs, by="steps").values()
    assert summary.learning_rate == 0.3
    assert summary.rates == {0.1: 1.0, 0.3: 2.0}


def test_settings_are_kept_apart():
    found = summarize([result(), result(eps=1e-4), result(alpha=8.0), result(rank=2)])
    assert list(found) == [
        Setting("toy", "loft", 4),
        Setting("toy", "loft", 4, 1e-4),
        Setting("toy", "loft", 4, alpha=8.0),
        Setting("toy", "loft", 2),
    ]


def test_a_seed_that_diverged_is_not_left_out_of_the_mean():
    (summary,) = summarize(
        [result(seed=0, test=0.5), result(seed=1, loss=math.inf), result(rate=0.3, loss=5.0)]
    ).values()
    assert summary.values("accuracy") == {0: 0.5, 1: pytest.approx(math.nan, nan_ok=True)}
    assert math.isnan(summary.mean("accuracy"))
    assert math.isnan(summary.spread("accuracy"))


def test_a_sweep_without_a_common_seed_is_not_summarized():
    assert summarize([result(rate=0.1, seed=0), result(rate=0.3, seed=1)]) == {}


FALLING = np.linspace(4.0, 2.0, 20)


@pytest.mark.parametrize(
    ("curve", "steps"),
    [
        (FALLING, 100.0),
        (FALLING - 1.0, 50.0),  # a stretch is 5 steps: half of the fall is done after 10 of them
        (FALLING + 0.1, math.inf),
        (np.full(20, 1.0), 20.0),  # at once: a fifth of the run is what is looked at
    ],
)
def test_steps_to_a_loss(curve, steps):
    assert steps_to_match(curve, FALLING, steps=100) == pytest.approx(steps, abs=5)


@pytest.mark.parametrize("seed", range(5))
def test_how_hard_a_batch_is_makes_no_difference(seed):
    hard = np.random.default_rng(seed).normal(scale=0.1, size=20)
    took = steps_to_match(FALLING - 1.0 + hard, FALLING + hard, steps=100)
    assert took == pytest.approx(50, abs=10)


def test_an_easy_batch_is_no_progress():
    easy = np.full(20, 3.0)
    easy[3] = 1.5
    assert steps_to_match(easy, np.linspace(4.0, 2.4, 20), steps=100) == math.inf
