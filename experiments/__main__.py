"""Compares fine-tuning methods: sweeps, then several seeds at each method's best learning rate.

`run` makes the runs that are not in the log yet, and can be stopped and started again at any time;
`run --best` those at the best learning rates, with a test; `report` writes the page and the plots.
Data and models come from `scripts/prepare_demo.py` and `python -m experiments.prepare`.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import jax
import tyro
from tqdm import tqdm

from experiments.log import Cell, Result, ResultLog
from experiments.registry import TASKS, methods_of, read_results, runs_of, summaries_of
from experiments.report import write_report
from experiments.tasks import BEFORE, Sweep, Task
from loft_jax.errors import InputError


@dataclass(frozen=True)
class Run:
    """Make the runs of a task that are not there yet."""

    task: tyro.conf.Positional[str]
    """Name of the task."""
    methods: tuple[str, ...] = ()
    """Methods; by default those of the task."""
    ranks: tuple[int, ...] = ()
    """Ranks; by default those of the task."""
    rates: tuple[float, ...] = ()
    """Learning rates; by default those of the task."""
    seeds: tuple[int, ...] = ()
    """Seeds; by default those of the task."""
    eps: float | None = None
    """Adam's epsilon; by default that of the task."""
    alpha: float | None = None
    """LoRA's alpha; by default the rank."""
    best: bool = False
    """Run at the best learning rate of each method so far, by validation, and test."""
    share: str = "1/1"
    """Which part of the work, of how many processes: "2/2" is the second half."""
    results: str = "experiments/results"
    """Folder of the logs, one a task."""
    assets: str = "assets"
    """Folder of models and data."""
    cache: str = "runs/compile_cache"
    """Folder that compiled steps are kept in."""

    def __call__(self) -> None:
        """Runs the command."""
        if self.task not in TASKS:
            raise InputError(f"task is {self.task!r}, expected one of {', '.join(TASKS)}")
        task = TASKS[self.task]
        if unknown := sorted(set(self.methods) - set(methods_of(task))):
            known = ", ".join(methods_of(task))
            raise InputError(f"{self.task} has no method {unknown[0]!r}, expected some of {known}")
        jax.config.update("jax_compilation_cache_dir", str(Path(self.cache).resolve()))
        log = ResultLog(Path(self.results) / f"{self.task}.jsonl")
        before = read_results(log, task)
        cells = self._cells(task)
        test = self.best or task.always_tests
        if self.best:
            cells = at_best(task, before, cells, self.seeds or task.final_seeds)
        done = {r.cell for r in before if r.test or not test}
        mine = [cell for cell in self._shared(cells) if cell not in done]
        make = runs_of(task, Path(self.assets))
        log.path.parent.mkdir(parents=True, exist_ok=True)  # before a run that would be lost
        with tqdm(mine, desc=self.task, unit="run") as bar:
            for cell in bar:
                result = make(cell, test=test or cell.method == BEFORE)
                log.append(result)
                bar.write(f"{_named(cell)}: {_measures(result.validation)}", file=sys.stderr)

    def _cells(self, task: Task) -> list[Cell]:
        """What is asked for; without any wish, all that is planned."""
        if self.best and self.rates:
            raise InputError("rates are given with best, which runs at the best ones")
        if low := [rate for rate in self.rates if not 0 < rate < math.inf]:
            raise InputError(f"rate is {low[0]:g}, expected a positive number")
        seeds = (not self.best and self.seeds) or task.seeds
        chosen = replace(task, rates=self.rates or task.rates, seeds=seeds)
        if not self.methods and not self.ranks and self.eps is None and self.alpha is None:
            return chosen.cells()
        sweep = Sweep(self.methods or task.methods, self.ranks or task.ranks, self.eps, self.alpha)
        return chosen.cells(sweep)

    def _shared(self, cells: Sequence[Cell]) -> list[Cell]:
        """Cells of this process: whole settings, so that each is compiled by one."""
        part, _, parts = self.share.partition("/")
        if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
            raise InputError(f"share is {self.share!r}, expected a form as in 1/2")
        order = {setting: i for i, setting in enumerate(dict.fromkeys(c.setting for c in cells))}
        return [cell for cell in cells if order[cell.setting] % int(parts) == int(part) - 1]


@dataclass(frozen=True)
class Report:
    """Write the pages and the plots from the logs."""

    results: str = "experiments/results"
    """Folder of the logs."""
    page: str = "docs/evidence/results.md"
    """The page; those of the tasks and the plots go into the folder of its name."""

    def __call__(self) -> None:
        """Runs the command."""
        write_report(Path(self.results), Path(self.page))


def at_best(
    task: Task, results: Sequence[Result], cells: Sequence[Cell], seeds: Sequence[int]
) -> list[Cell]:
    """Runs at the best learning rates of the settings of some cells.

    Raises:
        InputError: Some of these cells have not run, so that the best is not known yet.
    """
    done = {result.cell for result in results}
    if open_ := [cell for cell in cells if cell not in done]:
        raise InputError(
            f"{len(open_)} runs of the sweep are not there yet, as {_named(open_[0])}; the best "
            "rates are not known"
        )
    wanted = dict.fromkeys(cell.setting for cell in cells if cell.method != BEFORE)
    best = summaries_of(task, results)
    return [setting.cell(best[setting].learning_rate, seed) for seed in seeds for setting in wanted]


def _named(cell: Cell) -> str:
    return f"{cell.method} r {cell.rank}, lr {cell.learning_rate:g}, seed {cell.seed}"


def _measures(values: object) -> str:
    assert isinstance(values, dict)
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; mistakes of the user end with a message and exit code 2."""
    Command = (
        Annotated[Run, tyro.conf.subcommand("run")]
        | Annotated[Report, tyro.conf.subcommand("report")]
    )
    command = tyro.cli(Command, args=arguments, prog="python -m experiments", description=__doc__)
    try:
        command()
    except (InputError, OSError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("experiments: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
