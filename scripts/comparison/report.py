"""The page of results, from the logs of the comparison: tables, plots, and what they answer."""

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from comparison import tables
from comparison.ablations import ABLATIONS
from comparison.claims import CLAIMS, Finding, findings
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
    summarize,
)

_INTRODUCTION = """\
# What the methods come to

Made from the logs in [results/](results) by `python scripts/compare.py report`. Each line of a log
is one run. `python scripts/compare.py run TASK` makes those that are missing, and
`python scripts/compare.py run TASK --best` those at the best rates, after
`python scripts/prepare_demo.py` and `python scripts/prepare_experiments.py`.

Every method runs with the same learning rates, and the one with the least validation loss is
reported: its test, mean ± standard deviation over seeds. Where the best rate was at an end of the
sweep, a method may have run at one more; a star marks a best rate that is at an end all the same.
Runs of one seed see the same batches and start from the same factors (but for `pissa` and
`reflora-balanced`, whose start is their own), on all linear layers, with alpha the rank. Gradients
are clipped to a global norm of 1, for LoFT that of the projected ones; the learning rate rises over
a twelfth of the run and falls to zero by a line. RefLoRA begins behind a sixth of the run. `full`
trains embeddings and norms too; `full-linear` the weights that adapters stand on.

"Steps to LoRA's loss" is when the training loss, mean over a fifth of the run, is what LoRA's is at
the end of its run. Memory is the state of the optimizer, and what the compiler sets aside for a
step. Times are medians of a step over that of LoRA in the same table, from machines that were busy
with other work too: a hint, no more; see [optimizer.md](optimizer.md) for measured ones.
"""

_WITHOUT = (
    "LoFT with one part off. Without the scaling, gradients are the factors' own, and so is the",
    "clip; without a calibration, Adam's bound on an element is off too.",
)


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
    lines += _claims(summaries)
    lines += _at_rate_of_full(summaries)
    for name, found in logs.items():
        lines += _task(TASKS[name], found, summaries[name], results)
    page.write_text("\n".join(lines).rstrip() + "\n", "utf-8")


def _made_with(results: Iterable[Result]) -> list[str]:
    kinds = {tuple((name, r.made_with[name]) for name in PACKAGES) for r in results}
    return [f"Made with {', '.join(f'{k} {v}' for k, v in kind)}." for kind in sorted(kinds)]


def _claims(summaries: Mapping[str, Mapping[Setting, Summary]]) -> list[str]:
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
    found.sort(key=lambda one: (list(summaries).index(one[0]), one[1].better.setting.rank))
    rows = [
        (
            claim.text,
            task,
            _ranks(f),
            tables.gain((f.gain, f.error)),
            "**no**" if f.verdict == "does not hold" else f.verdict,
        )
        for claim in CLAIMS
        for task, f in found
        if f.claim is claim
    ]
    lines += tables.markdown(("claim", "task", "rank", "gain", "verdict"), rows)
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


def _at_rate_of_full(summaries: Mapping[str, Mapping[Setting, Summary]]) -> list[str]:
    """Whether a method can be run with what suits full fine-tuning."""
    rows = [
        row
        for task, of_task in summaries.items()
        for row in tables.at_rate_of_full(TASKS[task], _usual(TASKS[task], of_task))
    ]
    if not rows:
        return []
    lines = ["", "## At the learning rate of full fine-tuning", ""]
    lines += ["The validation loss at the best learning rate of `full`, and in parentheses the one"]
    lines += ["at the method's own best.", ""]
    return [*lines, *tables.markdown(["task", "rank", "rate", *tables.AT_RATE_OF_FULL], rows)]


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
        lines += ["", f"Test {measure} by rank:", "", *tables.by_rank(usual, ranks, measure)]
        plot_ranks(task.title, usual, measure, folder / f"{task.name}_ranks.png")
        lines += ["", f"![test {measure} by rank]({folder.name}/{task.name}_ranks.png)"]
    for rank in ranks[len(task.ranks) // 2 :][:1]:
        of_rank = [s for setting, s in usual.items() if setting.rank in (0, rank)]
        lines += ["", f"At rank {rank}:", "", *tables.at_rank(task, of_rank)]
        plot_task(task.title, of_rank, task.steps, folder / f"{task.name}.png")
        lines += ["", f"![loss curves, and loss by learning rate]({folder.name}/{task.name}.png)"]
        lines += [
            "",
            "Validation loss by learning rate:",
            "",
            *tables.by_rate(task, rank, summaries),
        ]
    if without := tables.ablations(task, summaries):
        lines += ["", *_WITHOUT, "", *without]
    for field in ("eps", "alpha"):
        if found := tables.variants(task, summaries, field):
            lines += ["", f"By {field}:", "", *found]
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
