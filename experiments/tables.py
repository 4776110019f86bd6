"""Markdown tables of a comparison."""

import math
import statistics
from collections.abc import Mapping, Sequence

from experiments.claims import CLAIMS, HIGHER_IS_BETTER, Finding, arrived, gain_over
from experiments.log import Setting
from experiments.summary import Summary, steps_to_match
from experiments.tasks import WHOLE, Task

AT_RATE_OF_FULL = ("loft-factored", "loft", "loft-alternate", "lora", "rslora", "reflora", "dora")
"""Methods that are shown at the learning rate of another."""

_MEASURES = ("loss", "steps", "accuracy", "accuracy_norm", "matthews", "distance")


def by_rank(usual: Mapping[Setting, Summary], ranks: Sequence[int], measure: str) -> list[str]:
    """The measure of the test of each method at each rank."""
    by_method: dict[str, dict[int, Summary]] = {}
    for setting, summary in usual.items():
        by_method.setdefault(setting.method, {})[setting.rank] = summary
    rows = [
        (
            method,
            *(_measured(found.get(rank, found.get(0)), measure, starred=True) for rank in ranks),
        )
        for method, found in by_method.items()
    ]
    return markdown(("method", *(f"r {rank}" for rank in ranks)), rows)


def at_rank(task: Task, summaries: Sequence[Summary]) -> list[str]:
    """All measures of some methods, the best first, and what they cost."""
    measures = [m for m in _MEASURES if any(m in r.test for s in summaries for r in s.results)]
    lora = next((s for s in summaries if s.setting.method == "lora"), None)
    rows = []
    for summary in sorted(summaries, key=lambda s: s.best_loss):
        cost = {name: _median_cost(summary, name) for name in summary.results[0].cost}
        row = {
            "method": summary.setting.method,
            "rate": _rate(summary),
            "validation loss": f"{summary.best_loss:.4g}",
            **{f"test {m}": _measured(summary, m) for m in measures},
            "seeds": str(len(summary.results)),
        }
        row["trained"] = f"{cost['trained_parameters']:,.0f}"
        row["memory, MB"] = f"{_size(cost['state_bytes'])} + {_size(cost['temporary_bytes'])}"
        if task.measure == "steps":  # a step takes microseconds, of which most are the loop's
            row["error at the end"] = f"{_at_end(summary):.1g}"
        else:
            row["steps to LoRA's loss"] = _steps_to(lora, summary, task.steps)
            ratio = summary.step_seconds / lora.step_seconds if lora else math.nan
            row["time"] = f"{ratio:.2f}" if math.isfinite(ratio) else ""
        rows.append(row)
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def _rate(summary: Summary) -> str:
    """The best learning rate, with a star where it is at an end of those tried."""
    return f"{summary.learning_rate:g}{'*' if summary.at_edge else ''}"


def _size(count: float) -> str:
    return f"{count / 1e6:,.0f}" if count >= 1e7 else f"{count / 1e6:.2g}"


def _at_end(summary: Summary) -> float:
    """The training loss over the last twentieth of the run, in the geometric mean over seeds."""
    return statistics.geometric_mean(result.train[-1] for result in summary.results)


def _median_cost(summary: Summary, name: str) -> float:
    return statistics.median(result.cost[name] for result in summary.results)


def _steps_to(other: Summary | None, summary: Summary, steps: int) -> str:
    """When the training loss is what that of another is at its end, over the seeds of both."""
    theirs = {r.cell.seed: r.train for r in other.results} if other else {}
    took = [
        steps_to_match(result.train, theirs[result.cell.seed], steps)
        for result in summary.results
        if result.cell.seed in theirs and not result.diverged
    ]
    arrived = [steps for steps in took if math.isfinite(steps)]
    if not took or not arrived:
        return "never" if took else ""
    text = f"{statistics.fmean(arrived):.0f}"
    if len(arrived) < len(took):
        return f"{text} ({len(arrived)} of {len(took)} seeds)"
    return text + (f" ± {statistics.stdev(arrived):.0f}" if len(arrived) > 1 else "")


def by_rate(task: Task, rank: int, summaries: Mapping[Setting, Summary]) -> list[str]:
    """The validation loss of all chains, ablations too, at each rate of the task."""
    found = [summary for setting, summary in summaries.items() if setting.rank in (0, rank)]
    rates = sorted({rate for summary in found for rate in summary.rates})
    rows = [
        (_name(task, summary.setting), *(_loss_at(summary, rate) for rate in rates))
        for summary in found
    ]
    return markdown(("method", *(f"{rate:g}" for rate in rates)), rows)


def _name(task: Task, setting: Setting) -> str:
    """The method, and what is not as usual."""
    eps = "" if setting.eps == task.eps else f", eps {setting.eps:g}"
    alpha = "" if setting.alpha is None else f", alpha {setting.alpha:g}"
    return setting.method + eps + alpha


def at_rate_of_full(task: Task, usual: Mapping[Setting, Summary]) -> list[list[str]]:
    """Rows of the validation loss at the best rate of full fine-tuning, beside the own best.

    Args:
        task: Of the rows.
        usual: Summaries of its methods.

    Returns:
        Task, rank, the best rate of `full`, and what `AT_RATE_OF_FULL` come to, by rank.
    """
    by_method = {(s.method, s.rank): x for s, x in usual.items()}
    if ("full", 0) not in by_method:
        return []
    rate = by_method["full", 0].learning_rate
    rows = []
    for rank in sorted({rank for _, rank in by_method if rank}):
        found = [by_method.get((method, rank)) for method in AT_RATE_OF_FULL]
        cells = [
            f"{_loss(x, rate)} ({x.best_loss:.4g})" if x and rate in x.rates else "" for x in found
        ]
        rows.append([task.name, f"r {rank}", f"{rate:g}", *cells])
    return rows


def _loss_at(summary: Summary, rate: float) -> str:
    text = _loss(summary, rate)
    return f"**{text}**" if rate == summary.learning_rate else text


def _loss(summary: Summary, rate: float) -> str:
    """The validation loss at a rate, if it has run."""
    loss = summary.rates.get(rate, math.nan)
    return "" if math.isnan(loss) else f"{loss:.4g}" if math.isfinite(loss) else "diverged"


def parts(task: Task, summaries: Mapping[Setting, Summary]) -> list[str]:
    """Methods without a part beside the whole ones; nothing if there are no such runs."""
    usual = {
        (s.method, s.rank): x for s, x in summaries.items() if (s.eps, s.alpha) == (task.eps, None)
    }
    rows = []
    for method in dict.fromkeys(WHOLE.values()):
        left = [name for name, whole in WHOLE.items() if whole == method]
        for rank in sorted({rank for name, rank in usual if name in left}):
            whole = usual.get((method, rank))
            found = [usual[name, rank] for name in left if (name, rank) in usual]
            for summary in [*([whole] if whole else []), *found]:
                rows.append(
                    (
                        summary.setting.method,
                        str(rank),
                        _rate(summary),
                        f"{summary.best_loss:.4g}",
                        _measured(summary, task.measure),
                        _gained(summary, whole, task.measure),
                        str(len(summary.results)),
                    )
                )
    head = ["chain", "rank", "rate", "validation loss", f"test {task.measure}"]
    head += ["gain over the whole", "seeds"]
    return markdown(head, rows) if rows else []


def gains(task: Task, found: Sequence[Finding]) -> list[str]:
    """What the runs of a task say of each claim, by rank; nothing if they say nothing."""
    ranks = sorted({f.better.setting.rank for f in found})
    rows = []
    for claim in CLAIMS:
        by_rank = {f.better.setting.rank: f for f in found if f.claim is claim}
        if by_rank:
            cells = [
                f"{gain(by_rank[r].better, by_rank[r].worse, task.measure)}, {by_rank[r].verdict}"
                if r in by_rank
                else ""
                for r in ranks
            ]
            rows.append([claim.text, *cells])
    return markdown(["", *(f"r {rank}" for rank in ranks)], rows) if rows else []


def variants(task: Task, summaries: Mapping[Setting, Summary], field: str) -> list[str]:
    """Methods that have run with several values of a setting; nothing if there are none."""
    by_method: dict[tuple[str, int], dict[float, Summary]] = {}
    for setting, summary in summaries.items():
        if setting.alpha is None if field == "eps" else setting.eps == task.eps:
            value = setting.eps if field == "eps" else setting.alpha
            by_method.setdefault((setting.method, setting.rank), {})[
                float(setting.rank if value is None else value)
            ] = summary
    rows = [
        (
            method,
            str(rank),
            f"{value:g}",
            _rate(summary),
            f"{summary.best_loss:.4g}",
            _measured(summary, task.measure),
            _gained(summary, found[usual], task.measure),
        )
        for (method, rank), found in by_method.items()
        for usual in ([task.eps] if field == "eps" else [float(rank)])
        if len(found) > 1 and usual in found
        for value, summary in sorted(found.items())
    ]
    head = ["method", "rank", field, "rate", "validation loss", f"test {task.measure}"]
    head += [f"gain over {field} {f'{task.eps:g}' if field == 'eps' else 'as the rank'}"]
    return markdown(head, rows) if rows else []


def _gained(summary: Summary, other: Summary | None, measure: str) -> str:
    return "" if other is None or summary is other else gain(summary, other, measure)


def gain(mine: Summary, other: Summary, measure: str) -> str:
    """A gain with half its interval; a star where a rate of the two is at an end of the sweep."""
    found = gain_over(mine, other, measure)
    if found is None:
        return "not tested"
    if math.isnan(found[0]):
        return "diverged"
    if math.isinf(found[0]):
        both = (len(x.results) * arrived(x, measure) for x in (mine, other))
        return " against ".join(f"{count:.0f}" for count in both) + " seeds arrive"
    star = "*" if mine.at_edge or other.at_edge else ""
    return f"{round(found[0], 12) + 0.0:+.3g}{star} ± {found[1]:.2g}"


def _measured(summary: Summary | None, measure: str, *, starred: bool = False) -> str:
    """Mean and spread of the test, in as many digits as it has."""
    if summary is None:
        return ""
    if not summary.values(measure):
        return "not tested"
    mean, spread = summary.mean(measure), summary.spread(measure)
    if math.isnan(mean):
        return "diverged"
    if math.isinf(mean):
        finite = [x for x in summary.values(measure).values() if math.isfinite(x)]
        share = f" ({len(finite)} of {len(summary.results)} seeds)"
        return f"{statistics.fmean(finite):.1f}{share}" if finite else "never"
    star = "*" if starred and summary.at_edge else ""
    if abs(mean) < 0.1 and measure not in HIGHER_IS_BETTER:
        return f"{mean:.2g}{star}" + ("" if math.isnan(spread) else f" ± {spread:.1g}")
    digits = {**dict.fromkeys(HIGHER_IS_BETTER, 3), "steps": 1}.get(measure, 4)
    return f"{mean:.{digits}f}{star}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
