"""The training loop, from the configuration of a run to its exported adapter."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from loft_jax.errors import InputError, NotFiniteError
from loft_jax.hub.host_arrays import gather_to_host
from loft_jax.hub.repository import open_repository
from loft_jax.tasks.task import Measured
from loft_jax.training.checkpoint import Checkpoints
from loft_jax.training.config import FinetuneConfig
from loft_jax.training.config_io import (
    check_same_run,
    config_from_dict,
    config_to_dict,
    load_config,
    save_config,
)
from loft_jax.training.distributed import is_main, wait_for_all
from loft_jax.training.export import trained_with
from loft_jax.training.held_out import held_out_data
from loft_jax.training.interrupt import StopRequest
from loft_jax.training.mesh import check_batch, make_mesh
from loft_jax.training.metrics import (
    MetricsLog,
    check_wandb,
    read_metrics,
    rise_of_loss,
)
from loft_jax.training.model import with_precision
from loft_jax.training.monitor import Compilations
from loft_jax.training.one_run import only_run
from loft_jax.training.plot import plot_run
from loft_jax.training.profiler import StepProfiler
from loft_jax.training.run import Run
from loft_jax.training.step import TrainState

_log = logging.getLogger(__name__)

# Number of steps that JAX may still be computing when the next one is dispatched: enough to keep a
# device busy, and few enough to stop within seconds.
_STEPS_AHEAD = 2


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Args:
        steps: Number of steps done.
        interrupted: Whether it was asked to stop before its last step, and saved a checkpoint.
        before: Evaluation before training, by name; empty without evaluation.
        after: Evaluation after training; empty without evaluation, or when interrupted.
        trained: Folder of the PEFT adapter, or of the whole model for method "full"; None when
            interrupted.
    """

    steps: int
    interrupted: bool
    before: dict[str, float]
    after: dict[str, float]
    trained: Path | None


def finetune(config: FinetuneConfig, *, resume: bool = False, progress: bool = True) -> RunResult:
    """Fine-tunes a model.

    The output folder then holds `config.yaml`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`,
    `loss.png` (with matplotlib) and `adapter/` in PEFT's format (`model/` for method "full"). On an
    interrupt or a termination signal the function saves a checkpoint and returns; a killed run
    loses the steps since its last checkpoint. A resumed run continues as if it had never stopped,
    bit for bit on the same machine; with a constant schedule it may have more steps than before.

    Args:
        config: The run.
        resume: Continue from the newest checkpoint in the output folder; a run that was killed
            before its first checkpoint starts again.
        progress: Show bars.

    Returns:
        The result of the run.

    Raises:
        InputError: The model, the data or the targets are wrong; the folder holds another run or a
            run is training there; at resume, the configuration has changed or there is no
            checkpoint; or the run trained nothing, since no loss or no gradient was finite.

    Example:
        >>> result = finetune(  # doctest: +SKIP
        ...     FinetuneConfig(ModelConfig("org/model"), DataConfig("rows.jsonl"), "runs/first")
        ... )
    """
    config = with_precision(config)
    folder = Path(config.output)
    check_wandb(config.logging.wandb)
    if config.export.push_to_hub and is_main():
        open_repository(config.export.push_to_hub)
    mesh = make_mesh(config.mesh)
    check_batch(config.schedule.batch_size, config.schedule.accumulation_steps, mesh)
    with (
        StopRequest() as stop,
        only_run(folder),
        _checkpoints(config, resume) as checkpoints,
        jax.set_mesh(mesh),
        contextlib.closing(Run(config, mesh, progress=progress and is_main())) as run,
    ):
        restored = bool(checkpoints.steps())
        state = run.begin(checkpoints)
        if is_main():
            save_config(config, folder / "config.yaml")
        resumed_at = int(gather_to_host(state.step)) if restored else None
        wandb = config.logging.wandb
        log = MetricsLog(folder, resumed_at=resumed_at, wandb=wandb) if is_main() else None
        try:
            if not restored:
                _write(log, 0, _named(run.evaluate(state)))
            state = _train(run, state, log, checkpoints, stop)
        finally:
            if log is not None:
                log.close()
        done = int(gather_to_host(state.step))
        trained = run.export(state) if done == run.steps else None
        wait_for_all("metrics and adapter written")
        rows = read_metrics(folder / "metrics.jsonl")
        if is_main():
            plot_run(rows, folder / "loss.png")
            held_out = held_out_data(config) is not None
            if done == run.steps and (rise := rise_of_loss(rows, held_out=held_out)):
                _log.warning(
                    "%s: expected it to fall; a smaller learning_rate than %g may train",
                    *(rise, config.schedule.learning_rate),
                )
        return RunResult(
            steps=done,
            interrupted=done < run.steps,
            before=_evaluation(rows, 0),
            after=_evaluation(rows, run.steps),
            trained=trained,
        )


@contextlib.contextmanager
def _checkpoints(config: FinetuneConfig, resume: bool) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a run, and refuses a folder that would mix two runs."""
    folder = Path(config.output)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
    )
    try:
        if not resume and checkpoints.steps():
            raise InputError(
                f"{config.output}: holds a run at step {checkpoints.steps()[0]} already; resume it "
                "(--resume) or choose another output"
            )
        if not resume and not config.method.adapts and (folder / "model").exists():
            raise InputError(f"{folder / 'model'}: exists already; choose another output")
        if resume:
            saved = _started_with(checkpoints, folder)
            now = config_to_dict(config)
            check_same_run(saved, now, same_content=bool(checkpoints.steps()))
            if not config.method.adapts and saved["schedule"] != now["schedule"]:
                _set_model_aside(folder)
        yield checkpoints
    finally:
        checkpoints.close()


def _set_model_aside(folder: Path) -> None:
    """Renames the model of a finished run that is extended, since it writes another."""
    if is_main() and (model := folder / "model").exists():
        aside = folder / f"model-{time.strftime('%Y%m%d-%H%M%S')}"
        model.rename(aside)
        _log.warning("%s: is of fewer steps; now %s", model, aside.name)


def _started_with(checkpoints: Checkpoints, folder: Path) -> dict[str, Any]:
    """Gives the configuration that a run to resume was started with."""
    if (saved := checkpoints.newest_run()) is not None:
        return config_to_dict(trained_with(saved, str(checkpoints.folder)))
    if checkpoints.steps() or not (folder / "config.yaml").exists():
        found = ", none of the checkpoints there can be read" if checkpoints.steps() else ""
        raise InputError(f"{checkpoints.folder}: no checkpoint to resume from{found}")
    _log.warning("%s: stopped before its first checkpoint; starting again", folder)
    return config_to_dict(with_precision(config_from_dict(load_config(folder / "config.yaml"))))


def _named(measured: Measured | None) -> dict[str, float]:
    values = {} if measured is None else measured.values
    return {f"eval_{name}": value for name, value in values.items()}


def _evaluation(rows: Sequence[dict[str, Any]], step: int) -> dict[str, float]:
    return {
        name.removeprefix("eval_"): value
        for row in rows
        if row["step"] == step
        for name, value in row.items()
        if name.startswith("eval_")
    }


def _write(log: MetricsLog | None, step: int, values: dict[str, float]) -> None:
    if log is not None and values:
        log.write(step, **values)


def _train(
    run: Run,
    state: TrainState,
    log: MetricsLog | None,
    checkpoints: Checkpoints,
    stop: StopRequest,
) -> TrainState:
    config, done, skipped = (
        run.config,
        int(gather_to_host(state.step)),
        int(gather_to_host(state.skipped)[0]),
    )
    log_every, eval_every = config.logging.log_every, config.evaluation.every
    save_every, keep_best = config.checkpoint.save_every, config.checkpoint.keep_best
    speed, ahead = run.speedometer(), deque[dict[str, jax.Array]]()
    bar = tqdm(
        total=run.steps,
        initial=done,
        desc=config.method.name,
        disable=not run.progress,
        unit="step",
    )
    compilations = Compilations(bar, config.method.name, speed)
    with (
        bar,
        StepProfiler(Path(config.output) / "profile", config.logging.profile_steps) as profiler,
    ):
        while done < run.steps:
            with speed.spent_on("data"):
                batch = next(run.stream)
                placed = run.placed(batch)
            if len(ahead) == _STEPS_AHEAD:
                jax.block_until_ready(ahead.popleft())
            profiler.before(done + 1, ahead)
            with compilations.of(placed):
                state, metrics = run.step(state, run.parts.frozen, placed)
            done += 1
            ahead.append(metrics)
            profiler.after(done, metrics)
            speed.count(*run.tokens(batch))
            bar.update()
            last, stopped = done == run.steps, stop.reached(done)
            # The first step too: later losses are compared with its loss.
            logs = last or done == 1 or done % log_every == 0
            due = eval_every > 0 and done % eval_every == 0
            evaluates = last or (due and not stopped)  # a notice of preemption leaves little time
            best = evaluates and due and keep_best > 0
            saves = last or stopped or best or done % save_every == 0
            if logs or evaluates or saves:
                jax.block_until_ready(state.step)
            if logs:
                skipped = _check_skipped(state, run, skipped)
                values = {**speed.read(), **run.report(state, metrics, skipped)}
                _write(log, done, values)
                bar.set_postfix(
                    loss=f"{values['train_loss']:.4f}",
                    tokens_s=f"{values['tokens_per_second']:.0f}",
                )
            measured: Measured | None = None
            if evaluates:
                with speed.spent_on("eval"):
                    measured = run.evaluate(state)
                _write(log, done, _named(measured))
            if saves:
                with speed.spent_on("save"):
                    skipped = _check_skipped(state, run, skipped)
                    if last or stopped or not gather_to_host(state.skipped)[1]:
                        run.save(checkpoints, state, measured)
            if stopped and not last:
                break
    checkpoints.wait()
    if done < run.steps:
        _log.warning("stopped at step %d of %d, checkpoint saved", done, run.steps)
    return state


def _check_skipped(state: TrainState, run: Run, known: int) -> int:
    """Warns of newly skipped steps, and raises if too many were skipped in a row."""
    done = int(gather_to_host(state.step))
    skipped, in_a_row = (int(count) for count in gather_to_host(state.skipped))
    if in_a_row >= run.config.optimizer.max_skipped_steps or skipped == run.steps:
        raise NotFiniteError(
            f"loss or gradient was not finite in {in_a_row} steps in a row, up to step {done} of "
            f"{run.steps}; the last checkpoint is kept. Expected a smaller learning_rate, or a "
            "larger eps, to train"
        )
    if skipped > known:
        _log.warning(
            "step %d: %d steps skipped so far, their loss or gradient was not finite", done, skipped
        )
    return skipped
