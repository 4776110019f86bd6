"""What runs say of a claim: it holds only as far as it is more than the noise."""

import dataclasses

import numpy as np
import pytest

from experiments.claims import Claim, findings
from experiments.log import Cell, Result
from experiments.summary import summarize

BETTER = (Claim("it is better", "loft", "lora"),)
AS_GOOD = (Claim("it does as well", "loft", "lora", at_least_equal=True),)


def made(method, losses, **measures):
    """A summary of runs at one rate, with a loss for each seed."""
    results = []
    for seed, loss in enumerate(losses):
        values = {"loss": loss} | {name: found[seed] for name, found in measures.items()}
        cell = Cell("toy", method, 4, 0.1, seed)
        test = values if np.isfinite(loss) else {"loss": loss}
        results.append(Result(cell, (loss,), values, test, {}, {"test_rows": 400}))
    return summarize(results)


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([1.0, 1.1, 1.2], "better"),
        ([1.0, 3.0, 2.0], "within the noise"),
        ([3.0, 3.1, 3.2], "worse"),
        ([1.0, np.inf, 1.0], "worse"),
    ],
)
def test_a_claim_needs_more_than_the_noise(losses, verdict):
    lora = made("lora", [2.0, 2.1, 2.2])
    (finding,) = findings({**made("loft", losses), **lora}, "loss", BETTER)
    assert finding.verdict == verdict
    assert findings({**made("loft", losses[:1]), **lora}, "loss", BETTER) == []


@pytest.mark.parametrize(
    ("behind", "verdict"),
    [
        ((-0.1, -0.101), "better"),
        ((0.0003, -0.0003), "as good"),
        ((0.3, -0.3), "within the noise"),
        ((0.0101, 0.0099), "worse by less than 1 %"),
        ((0.1, 0.101), "worse"),
    ],
)
def test_as_good_is_less_than_a_hundredth_behind(behind, verdict):
    mine = made("loft", [2.0 + more for more in behind])
    (finding,) = findings({**mine, **made("lora", [2.0, 2.0])}, "loss", AS_GOOD)
    assert finding.verdict == verdict


def test_one_question_more_is_not_better_however_alike_the_seeds():
    for right, verdict in ((0.8025, "within the noise"), (0.9, "better")):
        mine = made("loft", [1.0] * 3, accuracy=[right] * 3)
        theirs = made("lora", [1.0] * 3, accuracy=[0.8] * 3)
        (finding,) = findings({**mine, **theirs}, "accuracy", BETTER)
        assert finding.verdict == verdict


def test_correlations_are_better_where_they_are_higher():
    """They are no shares of the questions, and may be negative."""
    theirs = made("lora", [1.0] * 2, matthews=[-0.2, -0.1])
    mine = made("loft", [1.0] * 2, matthews=[0.1, 0.2])
    (finding,) = findings({**mine, **theirs}, "matthews", BETTER)
    assert (finding.gain, finding.verdict) == (pytest.approx(0.3), "better")


def test_questions_are_compared_one_by_one_where_they_are_known():
    """Two that differ in few questions differ in them alone, however many all get wrong."""
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.6
    better = base | (np.arange(400) < 20)

    def answered(method, right, known):
        text = "".join("01"[int(x)] for x in right)
        of_method = made(method, [1.0] * 3, accuracy=[right.mean()] * 3)
        return {
            setting: dataclasses.replace(
                summary,
                results=tuple(
                    dataclasses.replace(r, right={"accuracy": text} if known else {})
                    for r in summary.results
                ),
            )
            for setting, summary in of_method.items()
        }

    found = {}
    for known in (True, False):
        runs = {**answered("loft", better, known), **answered("lora", base, known)}
        (finding,) = findings(runs, "accuracy", BETTER)
        found[known] = finding
    gained = better.sum() - base.sum()
    assert found[True].gain == found[False].gain == pytest.approx(gained / 400)
    share = gained / 400
    assert found[True].error == pytest.approx(1.96 * (share * (1 - share) / 400) ** 0.5, rel=1e-2)
    assert found[True].verdict == "better"
    assert found[False].verdict == "within the noise"


@pytest.mark.parametrize(
    ("mine", "theirs", "verdict"),
    [
        ((120.0, 121.0, 119.0), (np.inf, np.inf, np.inf), "better"),
        ((120.0, 121.0, 119.0), (np.inf, 130.0, np.inf), "within the noise"),
        ((np.inf, np.inf, np.inf), (120.0, 121.0, 119.0), "worse"),
        ((120.0, 120.0, 120.0), (121.0, 121.0, 121.0), "within the noise"),  # it counts in steps
    ],
)
def test_runs_that_never_arrive_have_no_number_of_steps(mine, theirs, verdict):
    runs = {**made("loft", [1.0] * 3, steps=mine), **made("lora", [1.0] * 3, steps=theirs)}
    (finding,) = findings(runs, "steps", BETTER)
    assert finding.verdict == verdict
