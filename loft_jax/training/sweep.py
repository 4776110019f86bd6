"""Runs a grid of configurations one after another, and compares them by their held-out examples."""

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from loft_jax.errors import InputError, NotFiniteError
from loft_jax.files import replacing
from loft_jax.training.checkpoint import Checkpoints
from loft_jax.training.config import FinetuneConfig
from loft_jax.training.export import trained_with
from loft_jax.training.held_out import held_out_data
from loft_jax.training.loop import finetune
from loft_jax.training.metrics import evaluation_at, read_metrics
from loft_jax.training.model import with_precision
from loft_jax.training.plot import plot_sweep

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GridRun:
    """One run of a sweep.

    Args:
        settings: What differs between the runs, by name, as texts.
        config: Its configuration, with an output folder of its own.
    """

    settings: Mapping[str, str]
    config: FinetuneConfig


@dataclass(frozen=True)
class GridResult:
    """The result of one run of a sweep, at the best of its checkpoints.

    Attributes:
        run: The run.
        step: Step of that checkpoint; None for a run that failed, whose loss was not finite, or
            whose score never was a number.
        score: Score of its evaluation; lower is better.
        decides: Names of the metrics that the score is of.
        metrics: The evaluation, by name.
        error: Message of a run that failed.
    """

    run: GridRun
    step: int | None
    score: float = math.inf
    decides: tuple[str, ...] = ()
    metrics: Mapping[str, float] | None = None
    error: str = ""


def run_sweep(
    runs: Sequence[GridRun], folder: Path, *, progress: bool = True
) -> list[GridResult] | None:
    """Trains every run of a grid that has not finished, and writes how they compare.

    After every run, `sweep.md` in the folder holds the table of `sweep_table`, and `sweep.png`
    (with matplotlib) a plot. Called again, it goes on: finished runs are not trained again, and
    one that was stopped or killed is resumed. A run whose loss does not stay finite, that has no
    score, or that fails after others have finished, comes last.

    Args:
        runs: With output folders below `folder`.
        folder: Of the sweep.
        progress: Show bars.

    Returns:
        The results, best first; None if a run was asked to stop.

    Raises:
        InputError: A run has no held-out examples to compare it by; or the first one cannot be
            started, or its folder holds a run of other settings.
    """
    for run in runs:
        if held_out_data(run.config) is None:
            raise InputError(
                "a sweep compares its runs by held-out examples; expected an evaluation.path"
            )
    results: list[GridResult] = []
    for number, run in enumerate(runs, 1):
        result: GridResult | None = None
        if not _is_finished(run.config):
            _log.info("run %d of %d: %s", number, len(runs), Path(run.config.output).name)
            try:
                resume = Path(run.config.output, "config.yaml").exists()
                if finetune(run.config, resume=resume, progress=progress).interrupted:
                    return None
            except NotFiniteError as error:
                _log.warning("%s: %s", run.config.output, error)
                result = GridResult(run, None)
            except InputError as error:
                if not results:  # most likely all runs have what is wrong with it
                    raise
                _log.warning("%s: %s", run.config.output, error)
                result = GridResult(run, None, error=str(error))
        results.append(result or _result(run))
        results.sort(key=lambda result: result.score)
        with replacing(folder / "sweep.md") as partial:
            partial.write_text(sweep_table(results), encoding="utf-8")
        points = [(r.run.settings, _value(r)) for r in results if r.step is not None]
        plot_sweep(points, " and ".join(results[0].decides), folder / "sweep.png")
    return results


def _is_finished(config: FinetuneConfig) -> bool:
    """Whether a run of the same settings has ended, and written its adapter or model."""
    folder = Path(config.output)
    written = "adapter/adapter_config.json" if config.method.adapts else "model/config.json"
    if not (folder / written).exists():
        return False
    with contextlib.closing(Checkpoints(folder / "checkpoints", read_only=True)) as checkpoints:
        steps, saved = checkpoints.steps(), checkpoints.newest_run()
    if saved is None or trained_with(saved, str(checkpoints.folder)) != with_precision(config):
        return False
    return bool(saved["stopped"]) or steps[0] == saved["steps"]


def _result(run: GridRun) -> GridResult:
    """Reads the best evaluation of a finished run."""
    folder = Path(run.config.output)
    with contextlib.closing(Checkpoints(folder / "checkpoints", read_only=True)) as checkpoints:
        if (step := checkpoints.best_step()) is None:  # every score was NaN
            return GridResult(run, None)
        saved = checkpoints.run_of(step)
    metrics = evaluation_at(read_metrics(folder / "metrics.jsonl"), step)
    return GridResult(run, step, saved["score"], tuple(saved["best_metrics"]), metrics)


def _value(result: GridResult) -> float:
    """Gives the mean of the metrics that decide, as a plot shows it."""
    return fmean((result.metrics or {}).get(name, math.nan) for name in result.decides)


def sweep_table(results: Sequence[GridResult]) -> str:
    """Writes results as a table in Markdown.

    Args:
        results: In the order of the lines, best first.

    Returns:
        A line for each run: its settings, the step of its best checkpoint and the metrics there.

    Example:
        >>> from loft_jax.data import DataConfig
        >>> from loft_jax.training.config import ModelConfig
        >>> config = FinetuneConfig(ModelConfig("model"), DataConfig("rows.jsonl"), "runs/sweep/a")
        >>> run = GridRun({"rank": "4"}, config)
        >>> print(sweep_table([GridResult(run, 60, 1.5, ("loss",), {"loss": 1.5})]), end="")
        | rank | best step | loss |
        | --- | --- | --- |
        | 4 | 60 | 1.5000 |
    """
    names = list(dict.fromkeys(name for result in results for name in result.metrics or ()))
    settings = list(results[0].run.settings)
    lines = [[*settings, "best step", *names], ["---"] * (len(settings) + 1 + len(names))]
    for result in results:
        values = [
            f"{v:.4f}" if (v := (result.metrics or {}).get(n)) is not None else "" for n in names
        ]
        without = "failed" if result.error else "not finite"
        step = without if result.step is None else str(result.step)
        lines.append([*result.run.settings.values(), step, *values])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
