"""What the papers say of LoFT and RefLoRA, as comparisons that the results can bear out or not."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import t as student

from experiments.log import Setting
from experiments.summary import Summary

Verdict = Literal["better", "as good", "within the noise", "worse by less than 1 %", "worse"]

# "As good" is less than this share of the measure behind.
_AS_GOOD = 0.01

SHARES = ("accuracy", "accuracy_norm")
"""Measures that are shares of the questions."""

HIGHER_IS_BETTER = (*SHARES, "matthews")

# What a measure cannot tell apart.
_RESOLUTION = {"steps": 1.0}


@dataclass(frozen=True)
class Claim:
    """That one method does better than another.

    Args:
        text: In words.
        better: The method that should be better.
        worse: The one that it is compared with.
        ranks: Ranks of the two; None compares them at every rank that both have.
        at_least_equal: Whether being as good is enough: less than 1 % of the measure behind.
    """

    text: str
    better: str
    worse: str
    ranks: tuple[int, int] | None = None
    at_least_equal: bool = False


# What `loft` does by default: along the tangent space, with the factored second moment.
_LOFT = "loft-factored"

CLAIMS = (
    *(
        Claim(f"LoFT is better than {name} at equal rank", _LOFT, method)
        for name, method in (
            ("LoRA", "lora"),
            ("rsLoRA", "rslora"),
            ("DoRA", "dora"),
            ("RefLoRA", "reflora"),
            ("LoRA-Pro", "lora-pro"),
            ("LoRA-RITE", "lora-rite"),
            ("Riemannion", "riemannion"),
            ("AdaPreLoRA", "adapre-lora"),
        )
    ),
    Claim("LoFT at rank 4 is better than LoRA at rank 16", _LOFT, "lora", (4, 16)),
    Claim("LoFT comes to what full fine-tuning comes to", _LOFT, "full", at_least_equal=True),
    Claim(
        "LoFT comes to what full fine-tuning of the linear layers comes to",
        _LOFT,
        "full-linear",
        at_least_equal=True,
    ),
    Claim(
        "the factored second moment does as well as the exact one",
        _LOFT,
        "loft",
        at_least_equal=True,
    ),
    Claim(
        "the diagonal second moment does as well as the exact one",
        "loft-diagonal",
        "loft",
        at_least_equal=True,
    ),
    Claim("along the tangent space is better than alternating", "loft", "loft-alternate"),
    Claim(
        "along the tangent space is better than alternating, both factored",
        _LOFT,
        "loft-alternate-factored",
    ),
    Claim(
        "LoFT with balanced factors does as well as without",
        "loft-balanced",
        "loft",
        at_least_equal=True,
    ),
    *(
        Claim(f"exact LoFT is better than {part}", "loft", f"loft-{name}")
        for part, name in (
            ("without the scaling of gradients", "without-scaling"),
            ("without calibration of the first moment", "without-first-calibration"),
            ("without calibration of the second moment", "without-second-calibration"),
            ("without calibration of both", "without-calibration"),
            ("without Adam's bound on an element", "without-bound"),
            ("with LoRA's clip in the place of its own", "without-projected-clip"),
            ("with the overlap counted twice", "overlap-twice"),
            ("with half of the overlap for each factor", "overlap-halved"),
            ("with the overlap for the longer side", "overlap-longer"),
            ("with a retraction", "retracted"),
        )
    ),
    Claim("RefLoRA is better than LoRA at equal rank", "reflora", "lora"),
    Claim("RefLoRA-S is better than LoRA at equal rank", "reflora-s", "lora"),
)


class Finding(NamedTuple):
    """A claim at two settings.

    Attributes:
        claim: Which one.
        better: Summary of the method that should be better.
        worse: Summary of the other.
        gain: By how much it is better, in the measure of the task; see `gain_over`.
        error: Half the 95 % interval of that.
        verdict: What it comes to.
    """

    claim: Claim
    better: Summary
    worse: Summary
    gain: float
    error: float
    verdict: Verdict


def findings(
    summaries: Mapping[Setting, Summary], measure: str, claims: tuple[Claim, ...] = CLAIMS
) -> list[Finding]:
    """What results say of the claims.

    Runs of one seed see the same batches, and where they can the same start: differences are taken
    seed by seed.

    Args:
        summaries: Of one task, at its epsilon and with alpha the rank.
        measure: Of the test.
        claims: That are looked at.

    Returns:
        A finding for each claim and pair of ranks with results; none for a claim without.
    """
    by_method = {(s.method, s.rank): x for s, x in summaries.items()}
    found = []
    for claim in claims:
        for (method, rank), better in sorted(by_method.items()):
            other = rank if claim.ranks is None else claim.ranks[1]
            worse = by_method.get((claim.worse, other)) or by_method.get((claim.worse, 0))
            if method != claim.better or worse is None:
                continue
            if claim.ranks is not None and rank != claim.ranks[0]:
                continue
            if (gain := gain_over(better, worse, measure)) is not None:
                verdict = _verdict(claim, gain, better, worse, measure)
                found.append(Finding(claim, better, worse, *gain, verdict))
    return found


def _verdict(
    claim: Claim, found: tuple[float, float], better: Summary, worse: Summary, measure: str
) -> Verdict:
    gain, error = found
    if math.isnan(gain):
        fell = any(map(math.isnan, better.values(measure).values()))
        return "worse" if fell else "better"
    if math.isinf(gain):
        alone = arrived(better, measure) == 1 and arrived(worse, measure) == 0
        never = arrived(better, measure) == 0 and arrived(worse, measure) == 1
        return "better" if alone else "worse" if never else "within the noise"
    if gain > error:
        return "better"
    margin = _AS_GOOD * abs(worse.mean(measure)) if claim.at_least_equal else 0.0
    if gain < -error:
        return "worse by less than 1 %" if gain > -margin else "worse"
    return "as good" if gain - error > -margin else "within the noise"


def arrived(summary: Summary, measure: str) -> float:
    """The share of the seeds whose measure is finite."""
    values = summary.values(measure).values()
    return sum(map(math.isfinite, values)) / len(values)


def gain_over(mine: Summary, other: Summary, measure: str) -> tuple[float, float] | None:
    """By how much one does better than another, seed by seed.

    Args:
        mine: The one.
        other: What it is compared with.
        measure: Of the test.

    Returns:
        The gain and half its 95 % interval, by Student's t over the seeds that both have; for
        accuracies also of the sampling of the questions. NaN where a run diverged, infinite where
        the measure of one is; None where fewer than two seeds have both.
    """
    values, theirs = mine.values(measure), other.values(measure)
    seeds = sorted(set(values) & set(theirs))
    if len(seeds) < 2:
        return None
    sign = 1 if measure in HIGHER_IS_BETTER else -1
    if any(map(math.isnan, (*values.values(), *theirs.values()))):
        return math.nan, math.nan
    if arrived(mine, measure) < 1 or arrived(other, measure) < 1:
        return math.inf, math.nan
    gains = [sign * (values[seed] - theirs[seed]) for seed in seeds]
    quantile = student.ppf(0.975, len(gains) - 1)
    error = max(
        quantile * statistics.stdev(gains) / math.sqrt(len(gains)), _RESOLUTION.get(measure, 0.0)
    )
    if measure in SHARES:
        error = math.hypot(error, 1.96 * _of_questions(mine, other, measure, seeds))
    return statistics.fmean(gains), error


def _of_questions(mine: Summary, other: Summary, measure: str, seeds: list[int]) -> float:
    """The standard error of a difference of accuracies that is due to the questions.

    Where it is known which ones were right, of the differences question by question; else as if the
    two had answered different ones.
    """
    right = [_right(summary, measure, seeds) for summary in (mine, other)]
    if right[0] is not None and right[1] is not None:
        differences = (right[0] - right[1]).mean(axis=0)  # (questions,)
        return float(differences.std(ddof=1) / math.sqrt(differences.size))
    level = statistics.fmean(other.values(measure)[seed] for seed in seeds)
    questions = min(r.made_with["test_rows"] for r in other.results)
    return math.sqrt(2 * level * (1 - level) / questions)


def _right(summary: Summary, measure: str, seeds: list[int]) -> np.ndarray | None:
    """Whether questions were right, (seeds, questions), if that is known of all."""
    found = [r.right.get(measure) for r in summary.results if r.cell.seed in seeds]
    return np.array([[int(x) for x in one] for one in found if one]) if all(found) else None
