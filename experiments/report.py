"""The pages of results, from the logs of the comparison: tables, plots, and what they answer."""

import itertools
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from experiments import tables
from experiments.claims import CLAIMS, HIGHER_IS_BETTER, Finding, Verdict, findings
from experiments.log import Result, ResultLog, Setting
from experiments.plots import plot_headline, plot_ranks, plot_task
from experiments.registry import TASKS, read_results, summaries_of
from experiments.runs import PACKAGES
from experiments.summary import Summary
from experiments.tasks import BEFORE, WHOLE, Task
from loft_jax.errors import InputError

_INTRODUCTION = """\
# What the methods come to

Made by `python -m experiments report` from the logs in `experiments/results`, one line a run.
`python -m experiments run TASK` makes the runs that are missing, and with `--best` those at the
best rates, after `python scripts/prepare_demo.py` and `python -m experiments.prepare`, for
`vit-digits` after `experiments/vit_digits.py`; one run again, as of a cell of a table, is
`python -m experiments run stories --methods loft --ranks 4 --rates 1e-2 --seeds 0
--results runs/again`. [Methods](../how-to/methods.md) describes the methods.

| question | where the answer is |
| --- | --- |
| LoFT against LoRA, DoRA, rsLoRA, RefLoRA and its kin at equal rank | [claims](#claims) |
| LoFT at rank 4 against LoRA at rank 16 | [claims](#claims) |
| how far from full fine-tuning | [claims](#claims), and the tables by rank |
| how much is speed, and how much stays after more steps | [tasks](#tasks): `stories-long`, \
`wikitext-long` |
| GLUE with MiniLM | [tasks](#tasks): `sst2`, `cola`, `rte` |
| images with a ViT-S | [tasks](#tasks): `vit-digits` |
| how a method depends on the learning rate | [below](#at-the-learning-rate-of-full-fine-tuning), \
and "Validation loss by learning rate" of each task |
| on eps and on alpha | "By eps" and "By alpha" of each task |
| what each part of LoFT does, and how to divide the overlap | "Without a part" of each task |
| steps to LoRA's final loss, memory, time | the table of each task at one rank |
| what did not hold, or is not decided | [claims](#claims) |

## How it was compared

Every method runs with the same learning rates (on MiniLM, `full` with lower ones; on images, LoFT
too), and the one with the least validation loss (on matrices: the fewest steps) is reported: its
test, mean ± standard deviation over seeds. On SmolLM2, MiniLM and images the rate is chosen with
seed 0 alone, elsewhere with seeds 0, 1 and 2. Where the best rate was at an end of the sweep, a
method may have run at one more; a star marks what comes of a best rate that is at an end all the
same. On `stories` some methods have more seeds at the best rate than others: what tells two apart
are the gains, of the seeds that both have.

Runs of one seed see the same batches and start from the same factors (but for `pissa` and
`reflora-balanced`, whose start is their own), on all linear layers, with alpha the rank. Gradients
are clipped to a global norm of 1, for LoFT that of the projected ones, for the others that of the
factors' own: not the same clip, and it matters (`lora-unclipped`, `loft-unclipped`). The learning
rate rises over a twelfth of the run and falls to zero by a line. RefLoRA is plain LoRA for a sixth
of the run, where B starts at zero. Base weights and computation are in float32, where a task does
not say bfloat16: its losses are other ones, and only those of one task are compared. `full` trains
embeddings and norms too; `full-linear` the weights that adapters stand on.

Most runs of LoFT along the tangent space are of before revision 48c6770, which holds the product of
both updates to the step more tightly. Four of them on `stories` were made again: three differ by
2e-6 at most, and one, at three times its best rate, by 0.0006. Two settings of SmolLM2 were made
again whole, and at high rates differ more. `loft-factored` on `wikitext` at rank 8 has its best
rate and its losses there as before, to 2e-4. On `shakespeare` it is the new runs that count:
before, rates of 0.001 and 0.0003 had validation losses of 3.566 and 3.569, and at 0.001 LoFT was
worse than LoRA by 0.048 ± 0.023 over ten seeds; now 0.001 has 3.593, and 0.0003 is the best rate.

`loft-factored` is what `loft` is by default: along the tangent space, with the factored second
moment. `loft` is the same with the exact one, and `loft-alternate` moves one factor a step, as the
authors of LoFT have it. `lora-pro`, `riemannion`, `adapre-lora` and `lora-rite` are published
methods in the form with states of the factors' size; where that is not the paper's own, the files
of `experiments/peers` say so.

"Steps to LoRA's loss" is the step at which a method reaches the training loss that LoRA ends with.
Losses are means over a fifth of the run, of runs of one seed. LoRA's own losses tell which batches
are hard, and that is subtracted first. Memory is the state of the optimizer, and what the compiler
sets aside for a step. Times are those of a step over LoRA's in the same table, each the shortest of
its runs: a hint, no more, since other programs ran beside them, and left out for runs on a GPU.
[Benchmarks](benchmarks.md) has times that were measured in turns.

Left out: `altlora-plus`; on SmolLM2 most ranks but 8 and most methods; eps and alpha on most tasks.
Rates are a factor of three apart: what a method would gain between them is not known. Models, data
and runs are small: what holds here need not hold at a thousand times the size.
"""

_CLAIMS = """\

## Claims

Runs of one seed are compared with each other. The error is half the 95 % interval of Student's t
over seeds; few seeds make it wide. For accuracies the sampling of the questions is in it; losses
and Matthews' correlations are those of the rows that were tested. "As good" is less than 1 %
behind. "Within the noise" says that these runs do not tell, not that there is nothing. Intervals
are of one comparison each: of so many, one in twenty is out of its interval by chance. The gains
themselves stand with each task.
"""

_VARIANTS = {"eps": "", "alpha": " (a scaling that is a power of two rounds nothing)"}

_HEADLINE = """\

![loss by learning rate and by rank](results/headline.png)

On `stories`: each method at every learning rate, and at its best one by rank.
"""

_AT_RATE_OF_FULL = """\

## At the learning rate of full fine-tuning

The validation loss at the best learning rate of `full`, and in parentheses the one at the method's
own best.
"""

_GAINS = "Gains in {measure}, of which {better} is better, and what they say:"

_PARTS = """\

Without a part, or with another in its place. `without-scaling` clips by its unscaled gradients,
which is the norm of nothing in particular; only where nothing is clipped is it the scaling alone.
Without a calibration, Adam's bound on an element is off too: `without-bound` is that alone.
`without-projected-clip` has LoRA's clip in its place; `loft-unclipped` has none. Of the overlap of
both projections `overlap-twice` leaves all to both factors, `overlap-halved` a half to each,
`overlap-longer` all to the factor of the longer side. `retracted` takes W to the best approximation
of rank r of what the projection asks for, in place of the product of the moved factors.
"""


def write_report(results: Path, page: Path) -> None:
    """Writes the page, a page for each task, and their plots.

    Args:
        results: Folder of the logs.
        page: The page; those of the tasks and the plots go into the folder of its name.

    Raises:
        InputError: There is no log; or one is damaged, or of another form of its task.
    """
    logs = {
        name: read_results(ResultLog(results / f"{name}.jsonl"), task)
        for name, task in TASKS.items()
    }
    logs = {name: found for name, found in logs.items() if found}
    if not logs:
        raise InputError(f"{results}: holds no results, expected a log such as stories.jsonl")
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [_INTRODUCTION, *_made_with(itertools.chain.from_iterable(logs.values()))]
    summaries = {name: summaries_of(TASKS[name], found) for name, found in logs.items()}
    found = {
        name: findings(_as_planned(TASKS[name], of_task), TASKS[name].measure)
        for name, of_task in summaries.items()
    }
    if "stories" in summaries:
        usual = _usual(TASKS["stories"], summaries["stories"])
        plot_headline(usual, 4, folder / "headline.png")
        lines.append(_HEADLINE.replace("](results/", f"]({folder.name}/"))
    lines += _claims({name: of_task for name, of_task in found.items() if of_task})
    lines += _at_rate_of_full(summaries)
    lines += ["", "## Tasks", "", "Tables and plots of each:", ""]
    lines += [f"- [{TASKS[name].title}]({folder.name}/{name}.md): `{name}`" for name in logs]
    _write(page, lines)
    for name, of_task in logs.items():
        about = _task(TASKS[name], of_task, summaries[name], found[name], folder)
        _write(folder / f"{name}.md", about)


def _write(page: Path, lines: Sequence[str]) -> None:
    page.write_text("\n".join(lines).rstrip() + "\n", "utf-8")


def _made_with(results: Iterable[Result]) -> list[str]:
    devices: dict[tuple[str, str], set[str]] = {}
    for result in results:
        packages = ", ".join(f"{name} {result.made_with[name]}" for name in PACKAGES)
        key = packages, result.made_with.get("device", "cpu")
        devices.setdefault(key, set()).add(result.cell.task)
    lines = []
    for (packages, device), tasks in sorted(devices.items()):
        which = "CPUs" if device == "cpu" else f"{device}: {', '.join(sorted(tasks))}"
        lines += _wrapped(f"Made with {packages} on {which}.")
    return lines


def _claims(found: Mapping[str, Sequence[Finding]]) -> list[str]:
    """What runs say of each claim."""
    rows = []
    for claim in CLAIMS:
        places: dict[Verdict, dict[str, list[str]]] = {}
        for task, of_task in found.items():
            for finding in of_task:
                if finding.claim is claim:
                    at = places.setdefault(finding.verdict, {}).setdefault(task, [])
                    at.append(_ranks(finding))
        said = [
            f"**{verdict}**: "
            + ", ".join(f"{task} (r {', '.join(at)})" for task, at in places[verdict].items())
            for verdict in get_args(Verdict)
            if verdict in places
        ]
        rows.append((claim.text, "; ".join(said) or "not tested"))
    return [_CLAIMS, *tables.markdown(("claim", "what runs say, by task and rank"), rows)]


def _ranks(finding: Finding) -> str:
    mine, other = finding.better.setting.rank, finding.worse.setting.rank
    return f"{mine}" if mine == other or not other else f"{mine} / r {other}"


def _at_rate_of_full(summaries: Mapping[str, Mapping[Setting, Summary]]) -> list[str]:
    """Whether a method can be run with what suits full fine-tuning."""
    rows = [
        row
        for task, of_task in summaries.items()
        for row in tables.at_rate_of_full(TASKS[task], _usual(TASKS[task], of_task))
    ]
    head = ["task", "rank", "rate", *tables.AT_RATE_OF_FULL]
    return [_AT_RATE_OF_FULL, *tables.markdown(head, rows)] if rows else []


def _task(
    task: Task,
    results: Sequence[Result],
    summaries: Mapping[Setting, Summary],
    found: Sequence[Finding],
    folder: Path,
) -> list[str]:
    sizes = [r.made_with["batch_size"] for r in results if "batch_size" in r.made_with]
    length = f"{task.steps} steps{f' of {sizes[0]} rows' if sizes else ''}"
    lines = [f"# {task.title}", ""]
    text = f"`{task.name}`, {length}. {task.note} {_before(results)}{_left_out(task, results)}"
    lines += _wrapped(text)
    usual = _usual(task, summaries)
    lines += _by_rank(task, usual, folder)
    lines += _at_one_rank(task, usual, summaries, folder)
    if gains := tables.gains(task, found):
        better = "higher" if task.measure in HIGHER_IS_BETTER else "lower"
        lines += ["", _GAINS.format(measure=task.measure, better=better), "", *gains]
    if parts := tables.parts(task, summaries):
        lines += [_PARTS, *parts]
    for field, note in _VARIANTS.items():
        if variants := tables.variants(task, summaries, field):
            lines += ["", f"By {field}{note}:", "", *variants]
    return lines


def _by_rank(task: Task, usual: Mapping[Setting, Summary], folder: Path) -> list[str]:
    """The test at each rank, if there are several."""
    ranks = sorted({s.rank for s in usual if s.rank})
    if len(ranks) < 2:
        return []
    plot = f"{task.name}_ranks.png"
    plot_ranks(task.title, usual, task.measure, folder / plot)
    table = tables.by_rank(usual, ranks, task.measure)
    return [
        "",
        f"Test {task.measure} by rank:",
        "",
        *table,
        "",
        f"![test {task.measure} by rank]({plot})",
    ]


def _at_one_rank(
    task: Task,
    usual: Mapping[Setting, Summary],
    summaries: Mapping[Setting, Summary],
    folder: Path,
) -> list[str]:
    """All measures at the middle rank, curves, and the loss by learning rate."""
    middle = task.ranks[len(task.ranks) // 2]
    ranks = sorted({s.rank for s in usual if s.rank}, key=lambda rank: abs(rank - middle))
    if not ranks:
        return []
    rank = ranks[0]
    of_rank = [s for setting, s in usual.items() if setting.rank in (0, rank)]
    plot_task(task.title, of_rank, task.steps, folder / f"{task.name}.png")
    return [
        "",
        f"At rank {rank}:",
        "",
        *tables.at_rank(task, of_rank),
        "",
        f"![loss curves, and loss by learning rate]({task.name}.png)",
        "",
        "Validation loss by learning rate; bold is the one that is reported:",
        "",
        *tables.by_rate(task, rank, summaries),
    ]


def _before(results: Sequence[Result]) -> str:
    """What the model did before training."""
    for result in results:
        if result.cell.method == BEFORE:
            measures = [f"{name} {value:.4g}" for name, value in result.test.items()]
            return f"Before training, test {', '.join(measures)}. "
    return ""


def _usual(task: Task, summaries: Mapping[Setting, Summary]) -> dict[Setting, Summary]:
    """Whole methods, without another epsilon or alpha."""
    return {s: x for s, x in _as_planned(task, summaries).items() if s.method not in WHOLE}


def _as_planned(task: Task, summaries: Mapping[Setting, Summary]) -> dict[Setting, Summary]:
    """Methods with the epsilon and the alpha of the task."""
    return {s: x for s, x in summaries.items() if (s.eps, s.alpha) == (task.eps, None)}


def _left_out(task: Task, results: Sequence[Result]) -> str:
    """How much of the sweep has not run, by method."""
    done = {result.cell for result in results}
    missing = Counter(cell.method for cell in task.cells() if cell not in done)
    planned = Counter(cell.method for cell in task.cells())
    if not missing:
        return "All that was planned of the sweep has run."
    parts = [f"{name} {count} of {planned[name]}" for name, count in missing.items()]
    return f"Runs of the sweep that are missing: {', '.join(parts)}."


def _wrapped(text: str) -> list[str]:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.wrap(text, 100, subsequent_indent=indent, break_on_hyphens=False)
