"""The page of results, from the logs of the comparison: tables, plots, and what they answer."""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from comparison.ablations import ABLATIONS
from comparison.claims import CLAIMS, HIGHER_IS_BETTER, Finding, findings
from comparison.plots import plot_ranks, plot_task
from comparison.registry import TASKS, read_results
from comparison.runs import PACKAGES
from comparison.tasks import Task
from loft_jax.evaluation.comparison import (
    Cell,
    Result,
    ResultLog,
    Setting,
    Summary,
    steps_to_match,
    summarize,
)

_MEASURES = ("loss", "accuracy", "accuracy_norm", "distance")

_INTRODUCTION = """\
# What the methods come to

Made from the logs in [results/](results) by `python scripts/compare.py report`. Each line of a log
is one run. `python scripts/compare.py run TASK` makes those that are missing, and
`python scripts/compare.py run TASK --best` those at the best rates, after
`python scripts/prepare_demo.py` and `python scripts/prepare_experiments.py`.

Every method runs with the same learning rates, and the one with the least validation loss is
reported: its test, mean ± standard deviation over seeds. A star marks a best rate at an end of the
sweep. Runs of one seed see the same batches and start from the same factors (but for `pissa` and
`reflora-balanced`, whose start is their own), on all linear layers, with alpha the rank. Gradients
are clipped to a global norm of 1, for LoFT that of the projected ones; the learning rate rises over
a twelfth of the run and falls to zero by a line. RefLoRA begins behind a sixth of the run. `full`
trains embeddings and norms too; `full-linear` the weights that adapters stand on.

"At ⅓, 3 × the rate" is how much more the validation loss is at the neighbours of the best rate.
"Steps to LoRA's loss" is when the training loss, mean over a fifth of the run, is what LoRA's is at
the end of its run. Memory is the state of the optimizer, and what the compiler sets aside for a
step. Times are medians of a step over that of LoRA in the same table, from machines that were busy
with other work too: a hint, no more; see [optimizer.md](optimizer.md) for measured ones.
"""


def write_report(results: Path, page: Path) -> None:
    """Writes the page and its plots.

    Args:
        results: Folder of the logs; the plots go there too.
        page: The page.

    Raises:
        InputError: A log is damaged, or of another form of its task.
    """
    logs = {
        name: read_results(ResultLog(results / f"{name}.jsonl"), task)
        for name, task in TASKS.items()
    }
    logs = {name: found for name, found in logs.items() if found}
    lines = [_INTRODUCTION, *_made_with(itertools.chain.from_iterable(logs.values()))]
    summaries = {name: summarize(found) for name, found in logs.items()}
    lines += _answers(summaries)
    for name, found in logs.items():
        lines += _task(TASKS[name], found, summaries[name], results)
    page.write_text("\n".join(lines).rstrip() + "\n", "utf-8")


def _made_with(results: Iterable[Result]) -> list[str]:
    kinds = {tuple((name, r.made_with[name]) for name in PACKAGES) for r in results}
    return [f"Made with {', '.join(f'{k} {v}' for k, v in kind)}." for kind in sorted(kinds)]


def _answers(summaries: Mapping[str, Mapping[Setting, Summary]]) -> list[str]:
    """The claims, task by task, and apart those that were not borne out."""
    found: list[tuple[str, Finding]] = [
        (task, finding)
        for task, of_task in summaries.items()
        for finding in findings(_usual(TASKS[task], of_task), TASKS[task].measure)
    ]
    lines = ["", "## Claims", ""]
    lines += ["Gains are of the measure of the task (losses: how much lower), seed by seed, with"]
    lines += ["the 95 % interval of Student's t; few seeds make it wide. For accuracies the"]
    lines += ["sampling of the questions is in it, as if each method had answered others. Of so"]
    lines += ["many comparisons some will be out of their interval by chance.", ""]
    rows = [
        (
            claim.text,
            task,
            _ranks(f),
            "diverged" if math.isnan(f.gain) else f"{f.gain:+.3g} ± {f.error:.2g}",
            "**no**" if f.verdict == "does not hold" else f.verdict,
        )
        for claim in CLAIMS
        for task, f in found
        if f.claim is claim
    ]
    lines += _table(("claim", "task", "rank", "gain", "verdict"), rows)
    lines += ["", "## What did not hold", ""]
    for claim in CLAIMS:
        where: dict[str, list[str]] = {}
        for task, f in found:
            if f.claim is claim:
                where.setdefault(f.verdict, []).append(f"{task} {_ranks(f)}")
        parts = ["not tested"] if not where else []
        if "does not hold" in where:
            parts.append(f"it does not hold on {', '.join(where['does not hold'])}")
        if "within the noise" in where:
            parts.append(f"the noise decides on {', '.join(where['within the noise'])}")
        if parts:
            lines.append(f"- That {claim.text}: {'; '.join(parts)}.")
    return lines


def _ranks(finding: Finding) -> str:
    mine, other = finding.better.setting.rank, finding.worse.setting.rank
    return f"r {mine}" if mine == other or not other else f"r {mine} / r {other}"


def _task(
    task: Task, results: Sequence[Result], summaries: Mapping[Setting, Summary], folder: Path
) -> list[str]:
    size = results[0].made_with.get("batch_size")
    lines = ["", f"## {task.title}", ""]
    lines += [f"`{task.name}`: {task.steps} steps{f' of {size} rows' if size else ''}. {task.note}"]
    lines += _left_out(task, {r.cell for r in results})
    usual = _usual(task, summaries)
    ranks = sorted({s.rank for s in usual if s.rank})
    measure = task.measure
    if len(ranks) > 1:
        lines += ["", f"Test {measure} by rank:", "", *_by_rank(usual, ranks, measure)]
        plot_ranks(task.title, usual, measure, folder / f"{task.name}_ranks.png")
        lines += ["", f"![test {measure} by rank]({folder.name}/{task.name}_ranks.png)"]
    for rank in ranks[len(task.ranks) // 2 :][:1]:
        at_rank = [s for setting, s in usual.items() if setting.rank in (0, rank)]
        lines += ["", f"At rank {rank}:", "", *_at_rank(at_rank, task.steps)]
        plot_task(task.title, at_rank, task.steps, folder / f"{task.name}.png")
        lines += ["", f"![loss curves, and loss by learning rate]({folder.name}/{task.name}.png)"]
    lines += _ablations(task, summaries)
    lines += _variants(task, summaries, "eps")
    lines += _variants(task, summaries, "alpha")
    return lines


def _usual(task: Task, summaries: Mapping[Setting, Summary]) -> dict[Setting, Summary]:
    """Methods as the task has them: no ablations, no other epsilon or alpha."""
    return {
        s: x
        for s, x in summaries.items()
        if s.method not in ABLATIONS and (s.eps, s.alpha) == (task.eps, None)
    }


def _left_out(task: Task, done: Collection[Cell]) -> list[str]:
    """How much of the sweep has not run, by method."""
    missing = Counter(cell.method for cell in task.cells() if cell not in done)
    planned = Counter(cell.method for cell in task.cells())
    if not missing:
        return ["The whole sweep has run."]
    parts = [f"{name} {count} of {planned[name]}" for name, count in missing.items()]
    return [f"Runs of the sweep that are missing: {', '.join(parts)}."]


def _by_rank(usual: Mapping[Setting, Summary], ranks: Sequence[int], measure: str) -> list[str]:
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
    return _table(("method", *(f"r {rank}" for rank in ranks)), rows)


def _at_rank(summaries: Sequence[Summary], steps: int) -> list[str]:
    measures = [m for m in _MEASURES if any(m in r.test for s in summaries for r in s.results)]
    lora = next((s for s in summaries if s.setting.method == "lora"), None)
    rows = []
    for summary in sorted(summaries, key=_least):
        costs = [r.cost for r in summary.results]
        cost = {name: statistics.median(c[name] for c in costs) for name in costs[0]}
        reached, times = "", ""
        lower, higher = _beside_best(summary)
        if lora is not None:
            seeds = {r.cell.seed for r in summary.results} & {r.cell.seed for r in lora.results}
            if seeds:
                took = steps_to_match(summary.curve(seeds), lora.curve(seeds), steps)
                reached = f"{took:.0f}" if math.isfinite(took) else "never"
            base = statistics.median(r.cost["step_seconds"] for r in lora.results)
            times = f"{cost['step_seconds'] / base:.2f}"
        rows.append(
            (
                summary.setting.method,
                f"{summary.learning_rate:g}{'*' if summary.at_edge else ''}",
                f"{_least(summary):.4g}",
                f"{lower}, {higher}",
                *(_measured(summary, m) for m in measures),
                str(len(summary.results)),
                reached,
                f"{cost['trained_parameters'] / 1e3:,.0f}",
                f"{cost['state_bytes'] / 1e6:,.2f} + {cost['temporary_bytes'] / 1e6:,.0f}",
                times,
            )
        )
    head = ["method", "rate", "validation loss", "at ⅓, 3 × the rate"]
    head += [*(f"test {m}" for m in measures), "seeds"]
    head += ["steps to LoRA's loss", "trained, 10³", "memory, MB", "time"]
    return _table(head, rows)


def _beside_best(summary: Summary) -> tuple[str, str]:
    """How much more the validation loss is at the next lower and the next higher rate."""
    rates = list(summary.rates)
    place = rates.index(summary.learning_rate)
    best = summary.rates[summary.learning_rate]
    return tuple(  # type: ignore[return-value]  # of two
        f"{summary.rates[rates[i]] - best:+.3g}" if 0 <= i < len(rates) else "?"
        for i in (place - 1, place + 1)
    )


def _ablations(task: Task, summaries: Mapping[Setting, Summary]) -> list[str]:
    found = {s: x for s, x in summaries.items() if s.method in ABLATIONS}
    if not found:
        return []
    lines = ["", "LoFT with one part off. Without the scaling, gradients are the factors' own, and"]
    lines += ["so is the clip; without a calibration, Adam's bound on an element is off too.", ""]
    rows = []
    for rank in sorted({s.rank for s in found}):
        whole = summaries.get(Setting(task.name, "loft", rank, task.eps))
        parts = [x for s, x in found.items() if (s.rank, s.eps) == (rank, task.eps)]
        for summary in [*([whole] if whole else []), *parts]:
            rows.append(
                (
                    summary.setting.method,
                    str(rank),
                    f"{summary.learning_rate:g}{'*' if summary.at_edge else ''}",
                    f"{_least(summary):.4g}",
                    _measured(summary, task.measure),
                    str(len(summary.results)),
                )
            )
    head = ("chain", "rank", "rate", "validation loss", f"test {task.measure}", "seeds")
    return [*lines, *_table(head, rows)]


def _variants(task: Task, summaries: Mapping[Setting, Summary], field: str) -> list[str]:
    """Methods that have run with several values of a setting, the others as usual."""
    by_method: dict[tuple[str, int], dict[float, Summary]] = {}
    for setting, summary in summaries.items():
        usual = setting.alpha is None if field == "eps" else setting.eps == task.eps
        if usual:
            value = setting.eps if field == "eps" else setting.alpha
            by_method.setdefault((setting.method, setting.rank), {})[
                float(setting.rank if value is None else value)
            ] = summary
    rows = [
        (
            method,
            str(rank),
            f"{value:g}",
            f"{summary.learning_rate:g}{'*' if summary.at_edge else ''}",
            f"{_least(summary):.4g}",
            _measured(summary, task.measure),
        )
        for (method, rank), found in by_method.items()
        if len(found) > 1
        for value, summary in sorted(found.items())
    ]
    if not rows:
        return []
    head = ("method", "rank", field, "rate", "validation loss", f"test {task.measure}")
    return ["", f"By {field}:", "", *_table(head, rows)]


def _least(summary: Summary) -> float:
    """The validation loss at the best rate."""
    return summary.rates[summary.learning_rate]


def _measured(summary: Summary | None, measure: str, *, starred: bool = False) -> str:
    """Mean and spread of the test, in as many digits as it has."""
    if summary is None:
        return ""
    if not summary.values(measure):
        return "not tested"
    mean, spread = summary.mean(measure), summary.spread(measure)
    if math.isnan(mean):
        return "diverged"
    star = "*" if starred and summary.at_edge else ""
    if abs(mean) < 0.1 and measure not in HIGHER_IS_BETTER:
        return f"{mean:.2g}{star}" + ("" if math.isnan(spread) else f" ± {spread:.1g}")
    digits = 3 if measure in HIGHER_IS_BETTER else 4
    return f"{mean:.{digits}f}{star}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
