"""What the runs of a comparison say together.

The best learning rate of a method is chosen by validation, on the seeds that all of its rates have
run with; what is reported is the test at that rate, over all seeds it has.
"""

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from experiments.log import Result, Setting


@dataclass(frozen=True)
class Summary:
    """A method at its best learning rate.

    Args:
        setting: The method.
        learning_rate: The best one by validation.
        at_edge: Whether that is the lowest or the highest that was tried.
        rates: Those that were tried, in order, each with its mean validation loss over the seeds
            that all of them have.
        results: The runs at the best rate, in the order of their seeds.
        step_seconds: The least that a step took in a run, at any rate: the least disturbed one;
            infinite where that was not kept.
    """

    setting: Setting
    learning_rate: float
    at_edge: bool
    rates: Mapping[float, float]
    results: tuple[Result, ...]
    step_seconds: float

    @property
    def best_loss(self) -> float:
        """The mean validation loss at the best rate."""
        return self.rates[self.learning_rate]

    def values(self, measure: str) -> dict[int, float]:
        """A measure of the test by seed, for those that were tested; NaN where a run diverged."""
        return {
            result.cell.seed: math.nan if result.diverged else result.test[measure]
            for result in self.results
            if result.diverged or measure in result.test
        }

    def mean(self, measure: str) -> float:
        """The mean of a measure of the test over seeds; NaN if one diverged, or none was tested."""
        values = self.values(measure).values()
        return statistics.fmean(values) if values else math.nan

    def spread(self, measure: str) -> float:
        """The standard deviation over seeds; NaN of one, or where a value is not finite."""
        values = list(self.values(measure).values())
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return math.nan
        return statistics.stdev(values)

    def curve(self, seeds: Collection[int] | None = None) -> list[float]:
        """The training losses, mean over seeds.

        Args:
            seeds: Those that count; by default all.
        """
        curves = [r.train for r in self.results if seeds is None or r.cell.seed in seeds]
        return [statistics.fmean(losses) for losses in zip(*curves, strict=True)]


def summarize(
    results: Iterable[Result], *, by: str = "loss", seeds: Collection[int] | None = None
) -> dict[Setting, Summary]:
    """Each method at its best learning rate.

    Args:
        results: Of one comparison.
        by: The measure of validation that is least at the best rate, in the mean over the seeds.
        seeds: Of the sweep; a rate that has not run with all of them does not count. By default
            those that all rates of a method have run with.

    Returns:
        Summaries by setting, in the order of the results; none of a method without a whole rate.
    """
    by_setting: dict[Setting, dict[float, dict[int, Result]]] = {}
    for result in results:
        rates = by_setting.setdefault(result.cell.setting, {})
        rates.setdefault(result.cell.learning_rate, {})[result.cell.seed] = result
    found = {}
    for setting, rates in by_setting.items():
        common = set(seeds or set.intersection(*(set(runs) for runs in rates.values())))
        whole = {rate: rates[rate] for rate in sorted(rates) if common <= set(rates[rate])}
        if not common or not whole:
            continue  # the sweep has only begun

        losses, judged = (
            {
                rate: statistics.fmean(_known(runs[s].validation, name) for s in common)
                for rate, runs in whole.items()
            }
            for name in ("loss", by)
        )
        best = min(whole, key=lambda rate: (judged[rate], losses[rate]))
        found[setting] = Summary(
            setting,
            best,
            best in (min(losses), max(losses)),
            losses,
            tuple(whole[best][seed] for seed in sorted(whole[best])),
            min(
                run.cost.get("step_seconds", math.inf)
                for runs in rates.values()
                for run in runs.values()
            ),
        )
    return found


def steps_to_match(curve: Sequence[float], other: Sequence[float], steps: int) -> float:
    """How many steps a run took to come to the training loss that another one ends at.

    Both have seen the same batches, and some are harder than others: by as much as the other run's
    losses are off the falling course that is nearest to them. That is taken off, and a loss is the
    mean over a fifth of the run.

    Args:
        curve: Mean losses over stretches of one length, which make up the run.
        other: Those of the other run, on the same batches.
        steps: Of a whole run.

    Returns:
        The steps after which the loss is as low, between two stretches by a line; infinite if it
        never is. Of a run and itself: when it stopped to fall.

    Example:
        >>> round(steps_to_match([3.0, 2.0, 1.0, 1.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0], steps=50))
        30
    """
    course = isotonic_regression(other, increasing=False).x
    harder = np.asarray(other) - course
    width = max(1, len(curve) // 5)
    mine, theirs = (
        np.convolve(losses, np.full(width, 1 / width), mode="valid")
        for losses in (np.asarray(curve) - harder, course)
    )
    goal = theirs[-1] + 1e-9  # rounding
    if not (there := np.flatnonzero(mine <= goal)).size:
        return math.inf
    index = int(there[0])
    before = mine[index - 1] if index else mine[index]
    back = (goal - mine[index]) / (before - mine[index]) if before > mine[index] else 0.0
    return float((index + width - back) * steps / len(curve))


def _known(measures: Mapping[str, float], name: str) -> float:
    """A measure; infinite where there is none."""
    value = measures.get(name, math.inf)
    return math.inf if math.isnan(value) else value
