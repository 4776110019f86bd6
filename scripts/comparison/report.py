"""The page of results, from the logs of the comparison: tables, plots, and what they answer."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from comparison.ablations import ABLATIONS
from comparison.claims import CLAIMS, HIGHER_IS_BETTER, Finding, findings, is_usual
from comparison.plots import plot_ranks, plot_task
from comparison.registry import TASKS
from comparison.tasks import Task
from loft_jax.evaluation.comparison import (
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
is one run, and `python scripts/compare.py run TASK` makes those that are missing (after
`python scripts/prepare_demo.py` and `python scripts/prepare_experiments.py`).

Every method of a table has run with the same learning rates, on the same batches, with the same
factors at the start where it has any (but PiSSA, whose start is its own), the same clip (global
norm 1, of the projected gradients for LoFT), warmup of a twelfth of the run and then a line down to
zero; alpha is the rank. RefLoRA begins behind a sixth of the run. The learning rate of a method is
the one with the least validation loss; then the test, mean ± standard deviation over seeds. A star
marks a best rate at an end of the sweep. Adapters are on all linear layers.

"At ⅓, 3 × the rate" is how much more the validation loss is at the neighbours of the best rate.
"Steps to LoRA's loss" is when the training loss, mean over a fifth of the run, is what LoRA's is at
the end of its run. Full fine-tuning trains embeddings and norms too.

Times are medians of a step over that of LoRA in the same table, from machines that were busy with
other work too: a hint, no more; see [optimizer.md](optimizer.md) for measured ones.
"""


def write_report(results: Path, page: Path) -> None:
    """Writes the page and its plots.

    Args:
        results: Folder of the logs; the plots go there too.
        page: The page.
    """
    logs = {name: ResultLog(results / f"{name}.jsonl").read() for name in TASKS}
    logs = {name: found for name, found in logs.items() if found}
    lines = [_INTRODUCTION, *_made_with(itertools.chain.from_iterable(logs.values()))]
    summaries = {name: summarize(found) for name, found in logs.items()}
    lines += _answers(summaries)
    for name, found in logs.items():
        lines += _task(name, found, summaries[name], results, page)
    page.write_text("\n".join(lines).rstrip() + "\n", "utf-8")


def _made_with(results: Iterable[Result]) -> list[str]:
    kinds = {
        tuple((k, v) for k, v in r.made_with.items() if k not in ("steps", "batch_size"))
        for r in results
    }
    return [f"Made with {', '.join(f'{k} {v}' for k, v in kind)}." for kind in sorted(kinds)]


def _answers(summaries: Mapping[str, Mapping[Setting, Summary]]) -> list[str]:
    """The claims, task by task, and apart those that were not borne out."""
    found: list[tuple[str, Finding]] = [
        (task, finding)
        for task, of_task in summaries.items()
        for finding in findings(_without_ablations(of_task), TASKS[task].measure)
    ]
    lines = ["", "## Claims", ""]
    lines += ["Gains are of the measure of the task (losses: how much lower), seed by seed, with"]
    lines += ["the 95 % interval of Student's t; few seeds make it wide.", ""]
    rows = []
    for claim in CLAIMS:
        for task, finding in found:
            if finding.claim is claim:
                rows.append(
                    (
                        claim.text,
                        task,
                        _ranks(finding),
                        f"{finding.gain:+.4g} ± {finding.error:.2g}",
                        finding.verdict if finding.verdict != "does not hold" else "**no**",
                    )
                )
    lines += _table(("claim", "task", "rank", "gain", "verdict"), rows)
    lines += ["", "## What did not hold", ""]
    failed = [(task, f) for task, f in found if f.verdict != "holds"]
    for claim in CLAIMS:
        of_claim = [(task, f) for task, f in failed if f.claim is claim]
        against = [f"{task} {_ranks(f)}" for task, f in of_claim if f.verdict == "does not hold"]
        open_ = [f"{task} {_ranks(f)}" for task, f in of_claim if f.verdict == "within the noise"]
        if of_claim:
            parts = [f"it does not hold on {', '.join(against)}"] if against else []
            parts += [f"the noise decides on {', '.join(open_)}"] if open_ else []
            lines.append(f"- That {claim.text}: {'; '.join(parts)}.")
    return lines if failed else [*lines, "Nothing of the above."]


def _ranks(finding: Finding) -> str:
    mine, other = finding.better.setting.rank, finding.worse.setting.rank
    return f"r {mine}" if mine == other or not other else f"r {mine} / r {other}"


def _task(
    name: str,
    results: Sequence[Result],
    summaries: Mapping[Setting, Summary],
    folder: Path,
    page: Path,
) -> list[str]:
    task = TASKS[name]
    steps = int(results[0].made_with["steps"])
    lines = ["", f"## {task.title}", "", f"`{name}`: {steps} steps{_rows_of(results[0])}."]
    lines += _left_out(task, results)
    usual = {
        setting: summary
        for setting, summary in _without_ablations(summaries).items()
        if is_usual(setting, summaries)
    }
    ranks = sorted({s.rank for s in usual if s.rank})
    measure = task.measure
    if len(ranks) > 1:
        lines += ["", f"Test {measure} by rank:", "", *_by_rank(usual, ranks, measure)]
        plot_ranks(task.title, usual, measure, folder / f"{name}_ranks.png")
        lines += ["", f"![test {measure} by rank]({folder.name}/{name}_ranks.png)"]
    rank = ranks[len(ranks) // 2]
    at_rank = [s for setting, s in usual.items() if setting.rank in (0, rank)]
    lines += ["", f"At rank {rank}:", "", *_at_rank(at_rank, steps)]
    plot_task(task.title, at_rank, "loss", steps, folder / f"{name}.png")
    lines += ["", f"![loss curves, and loss by learning rate]({folder.name}/{name}.png)"]
    lines += _ablations(summaries, measure)
    lines += _variants(summaries, measure, "eps")
    lines += _variants(summaries, measure, "alpha")
    return lines


def _rows_of(result: Result) -> str:
    size = result.made_with.get("batch_size")
    return f" of {size} rows" if size else ""


def _left_out(task: Task, results: Sequence[Result]) -> list[str]:
    """Methods of the sweep that have not run, or not with every rate or seed."""
    cells = {r.cell for r in results if is_usual(r.cell.setting, {r.cell.setting: None})}  # type: ignore[dict-item]
    tried = {(c.method, c.learning_rate) for c in cells}
    missing = sorted({m for m in task.methods for rate in task.rates if (m, rate) not in tried})
    return [f"Not all of the sweep has run for: {', '.join(missing)}."] if missing else []


def _by_rank(usual: Mapping[Setting, Summary], ranks: Sequence[int], measure: str) -> list[str]:
    by_method: dict[str, dict[int, Summary]] = {}
    for setting, summary in usual.items():
        by_method.setdefault(setting.method, {})[setting.rank] = summary
    rows = [
        (method, *(_measured(found.get(rank, found.get(0)), measure) for rank in ranks))
        for method, found in by_method.items()
    ]
    return _table(("method", *(f"r {rank}" for rank in ranks)), rows)


def _at_rank(summaries: Sequence[Summary], steps: int) -> list[str]:
    measures = [m for m in _MEASURES if any(m in r.test for s in summaries for r in s.results)]
    lora = next((s for s in summaries if s.setting.method == "lora"), None)
    rows = []
    for summary in sorted(summaries, key=lambda s: s.mean("loss", "validation")):
        costs = [r.cost for r in summary.results]
        cost = {name: statistics.median(c[name] for c in costs) for name in costs[0]}
        reached, times = "", ""
        lower, higher = _beside_best(summary)
        if lora is not None:
            took = steps_to_match(summary.curve(), lora.curve(), steps)
            reached = f"{took:.0f}" if math.isfinite(took) else "never"
            base = statistics.median(r.cost["step_seconds"] for r in lora.results)
            times = f"{cost['step_seconds'] / base:.2f}"
        rows.append(
            (
                summary.setting.method,
                f"{summary.learning_rate:g}{'*' if summary.at_edge else ''}",
                f"{summary.mean('loss', 'validation'):.4g}",
                f"{lower}, {higher}",
                *(_measured(summary, m) for m in measures),
                str(len(summary.results)),
                reached,
                f"{cost['trained_parameters'] / 1e3:,.0f}",
                f"{cost['state_bytes'] / 1e6:,.2f}",
                times,
            )
        )
    head = ["method", "rate", "validation loss", "at ⅓, 3 × the rate"]
    head += [*(f"test {m}" for m in measures), "seeds"]
    head += ["steps to LoRA's loss", "trained, 10³", "state, MB", "time"]
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


def _ablations(summaries: Mapping[Setting, Summary], measure: str) -> list[str]:
    found = {s: x for s, x in summaries.items() if s.method in ABLATIONS}
    if not found:
        return []
    lines = ["", "LoFT with one part off:", ""]
    rows = []
    for rank in sorted({s.rank for s in found}):
        whole = next(
            x for s, x in summaries.items() if (s.method, s.rank, s.alpha) == ("loft", rank, None)
        )
        for summary in [whole, *(x for s, x in found.items() if s.rank == rank)]:
            rows.append(
                (
                    summary.setting.method,
                    str(rank),
                    f"{summary.learning_rate:g}{'*' if summary.at_edge else ''}",
                    f"{summary.mean('loss', 'validation'):.4g}",
                    _measured(summary, measure),
                    str(len(summary.results)),
                )
            )
    head = ("chain", "rank", "rate", "validation loss", f"test {measure}", "seeds")
    return [*lines, *_table(head, rows)]


def _variants(summaries: Mapping[Setting, Summary], measure: str, field: str) -> list[str]:
    """Methods that have run with several values of a setting."""
    by_method: dict[tuple[str, int], dict[float, Summary]] = {}
    for setting, summary in summaries.items():
        other = {"eps": setting.alpha is None, "alpha": is_usual(
            setting._replace(alpha=None), summaries
        )}[field]  # fmt: skip
        if other:
            value = getattr(setting, field)
            by_method.setdefault((setting.method, setting.rank), {})[
                float(setting.rank if value is None else value)
            ] = summary
    rows = [
        (
            method,
            str(rank),
            f"{value:g}",
            f"{summary.learning_rate:g}{'*' if summary.at_edge else ''}",
            f"{summary.mean('loss', 'validation'):.4g}",
            _measured(summary, measure),
        )
        for (method, rank), found in by_method.items()
        if len(found) > 1
        for value, summary in sorted(found.items())
    ]
    if not rows:
        return []
    head = ("method", "rank", field, "rate", "validation loss", f"test {measure}")
    return ["", f"By {field}:", "", *_table(head, rows)]


def _without_ablations(summaries: Mapping[Setting, Summary]) -> dict[Setting, Summary]:
    return {s: x for s, x in summaries.items() if s.method not in ABLATIONS}


def _measured(summary: Summary | None, measure: str) -> str:
    if summary is None:
        return ""
    mean, spread = summary.mean(measure), summary.spread(measure)
    if math.isnan(mean):
        return "not tested"
    digits = 3 if measure in HIGHER_IS_BETTER else 4
    if abs(mean) < 0.1 and measure not in HIGHER_IS_BETTER:
        return f"{mean:.2g}" + ("" if math.isnan(spread) else f" ± {spread:.1g}")
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
