"""The training loop, from the configuration of a run to its exported adapter."""

import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
from flax import nnx

from loft_jax.data.source import GivenData
from loft_jax.errors import InputError, NotFiniteError
from loft_jax.hub.host_arrays import gather_to_host
from loft_jax.hub.repository import open_repository
from loft_jax.progress import progress_bar
from loft_jax.tasks.own_loss import RowLoss
from loft_jax.tasks.task import Measured
from loft_jax.training.callbacks import Callback, Progress, RunResult
from loft_jax.training.checkpoint import Checkpoints
from loft_jax.training.config import FinetuneConfig, check_output
from loft_jax.training.config_io import (
    check_same_run,
    config_from_dict,
    config_to_dict,
    load_config,
    save_config,
    settings_of_all,
)
from loft_jax.training.distributed import all_agree, check_same, is_main, wait_for_all
from loft_jax.training.export import trained_with
from loft_jax.training.interrupt import StopRequest
from loft_jax.training.mesh import check_batch, make_mesh
from loft_jax.training.metrics import (
    MetricsLog,
    check_wandb,
    evaluation_at,
    read_metrics,
    rise_of_loss,
)
from loft_jax.training.model import with_precision
from loft_jax.training.monitor import Compilations
from loft_jax.training.objects import Objects
from loft_jax.training.one_run import only_run
from loft_jax.training.plot import plot_run
from loft_jax.training.profiler import StepProfiler
from loft_jax.training.run import Run
from loft_jax.training.step import TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loft_jax.hub.image_processor import ImageProcessor

_log = logging.getLogger(__name__)

# Number of steps that JAX may still be computing when the next one is dispatched: enough to keep a
# device busy, and few enough to stop within seconds.
_STEPS_AHEAD = 2


def finetune(
    config: FinetuneConfig,
    *,
    model: nnx.Module | None = None,
    tokenizer: "PreTrainedTokenizerBase | ImageProcessor | None" = None,
    data: "GivenData | None" = None,
    held_out: "GivenData | None" = None,
    loss: RowLoss | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool | Literal["auto"] = False,
    progress: bool = True,
) -> RunResult:
    """Fine-tunes a model.

    The output folder then holds `config.yaml`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`,
    `loss.png` (with matplotlib) and `adapter/` in PEFT's format (`model/` for method "full"). On an
    interrupt or a termination signal the function saves a checkpoint and returns; a killed run
    loses the steps since its last checkpoint. A resumed run continues as if it had never stopped,
    bit for bit on the same machine; with a constant schedule it may have more steps than before.
    Outside the main thread it leaves signals alone.

    Models and examples are named by the configuration, or given as objects. A resumed run may be
    given either, with the same content: fingerprints of weights and examples are compared.

    Args:
        config: The run.
        model: The base model, of one of the families of `loft_jax.models` and without adapters; or
            with `loss` any NNX model. It is not changed.
        tokenizer: Its tokenizer, or image processor; by default that of `config.model.path`.
        data: Training examples: a `datasets.Dataset`, a `DatasetDict` of which `config.data.split`
            is used, or an iterable of rows, which is read to its end once.
        held_out: Held-out examples, of the same kinds; `config.evaluation.split` is theirs.
        loss: A loss of your own, a function of the model and a batch, arrays (b, ...) by field,
            that gives the loss of each row, (b,). Fields of rows are then numbers or arrays, of the
            same shape in every row. Its code is not compared when a run is resumed. Only parameters
            train: running statistics of the model stay as they are.
        callbacks: Called in their order as the run goes on; see `loft_jax.Callback`.
        resume: Continue from the newest checkpoint in the output folder; a run that was killed
            before its first checkpoint starts again. "auto" continues if there is a checkpoint and
            starts otherwise, so that a cell of a notebook can be executed again.
        progress: Show bars.

    Returns:
        The result of the run.

    Raises:
        InputError: The model, the data or the targets are wrong; something is given neither by the
            configuration nor as an object, or by both; the folder holds another run or a run is
            training there; at resume, the configuration or a callback with a state has changed or
            there is no checkpoint; or the run trained nothing, since no loss or no gradient was
            finite.

    Example:
        >>> result = finetune(  # doctest: +SKIP
        ...     FinetuneConfig(ModelConfig("org/model"), DataConfig(), "runs/first"),
        ...     data=[{"prompt": "Review: a joy\\nSentiment:", "completion": " positive"}],
        ... )
        >>> result.history[-1]["train_loss"]  # doctest: +SKIP
        0.31
    """
    objects = Objects(model, tokenizer, data, held_out, loss)
    config = objects.settled(config)
    check_output(config.output)
    folder = Path(config.output)
    check_wandb(config.logging.wandb)
    mesh = make_mesh(config.mesh)
    check_batch(config.schedule.batch_size, config.schedule.accumulation_steps, mesh)
    check_same({"resume": resume, **settings_of_all(config)})
    with (
        StopRequest() as stop,
        only_run(folder),
        _checkpoints(config, resume) as checkpoints,
        jax.set_mesh(mesh),
        contextlib.closing(
            Run(config, mesh, objects, callbacks, progress=progress and is_main())
        ) as run,
    ):
        if config.export.push_to_hub and is_main():
            open_repository(config.export.push_to_hub)
        restored = bool(checkpoints.steps())
        state, plain = run.begin(checkpoints)
        view = Progress(
            config,
            tokenizer=run.processor,
            steps=run.steps,
            stopped=_still_stopped(run, plain),
        )
        if is_main():
            if plain.get("steps") != run.steps:
                _set_aside(folder / ("adapter" if config.method.adapts else "model"))
            save_config(config, folder / "config.yaml")
        resumed_at = int(gather_to_host(state.step)) if restored else None
        wandb = config.logging.wandb
        postponed = bool(plain.get("postponed"))
        log = (
            MetricsLog(folder, resumed_at=resumed_at, measures_again=postponed, wandb=wandb)
            if is_main()
            else None
        )
        try:
            if not restored:
                _evaluate(run, state, view, log)
                run.callbacks.get_state()  # one that cannot be saved is refused before any step
            elif postponed:
                measured = _evaluate(run, state, view, log)
                ends = _asked_to_stop(view, logs=True)
                run.save(checkpoints, state, measured, stopped=view.stopped if ends else "")
            state, finished = _train(run, state, view, log, checkpoints, stop)
        finally:
            if log is not None:
                log.close()
        done = int(gather_to_host(state.step))
        trained = run.export(state) if finished else None
        wait_for_all("metrics and adapter written")
        rows = read_metrics(folder / "metrics.jsonl")
        if is_main():
            plot_run(rows, folder / "loss.png")
            if finished and (rise := rise_of_loss(rows, held_out=run.measures)):
                _log.warning(
                    "%s: expected it to fall; a smaller learning_rate than %g may train",
                    *(rise, config.schedule.learning_rate),
                )
        view.moved(done, functools.partial(run.trained, state))
        result = RunResult(
            folder=folder,
            steps=done,
            interrupted=not finished,
            before=evaluation_at(rows, 0),
            after=evaluation_at(rows, done) if finished else {},
            trained=trained,
            stopped=view.stopped if finished else "",
            history=rows,
            model=view.model() if finished else None,
        )
        for each in run.callbacks:
            each.on_end(view, result)
        return result


@contextlib.contextmanager
def _checkpoints(config: FinetuneConfig, resume: bool | Literal["auto"]) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a run, and refuses a folder that would mix two runs."""
    folder = Path(config.output)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
    )
    if resume == "auto":
        resume = bool(checkpoints.steps())
    try:
        if not resume and checkpoints.steps():
            raise InputError(
                f"{config.output}: holds a run at step {checkpoints.steps()[0]} already; resume it "
                "(--resume; in Python resume=True) or choose another output"
            )
        if not resume and not config.method.adapts and (folder / "model").exists():
            raise InputError(f"{folder / 'model'}: exists already; choose another output")
        if resume:
            saved = _started_with(checkpoints, folder)
            check_same_run(saved, config_to_dict(config), same_content=bool(checkpoints.steps()))
        yield checkpoints
    finally:
        checkpoints.close()


def _still_stopped(run: Run, plain: Mapping[str, Any]) -> str:
    """Says why a callback had ended the run; empty if none had, or if its steps are now others."""
    stopped: str = plain.get("stopped", "")
    if stopped and plain["steps"] != run.steps:
        _log.info("had ended (%s), and goes on up to step %d", stopped, run.steps)
        return ""
    return stopped


def _set_aside(trained: Path) -> None:
    """Renames what an earlier run has written here, such as that of fewer steps."""
    if trained.exists():
        aside = trained.with_name(f"{trained.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        trained.rename(aside)
        _log.warning("%s: is of an earlier run; now %s", trained, aside.name)


def _started_with(checkpoints: Checkpoints, folder: Path) -> dict[str, Any]:
    """Gives the configuration that a run to resume was started with."""
    if (saved := checkpoints.newest_run()) is not None:
        return config_to_dict(trained_with(saved, str(checkpoints.folder)))
    if checkpoints.steps() or not (folder / "config.yaml").exists():
        found = ", none of the checkpoints there can be read" if checkpoints.steps() else ""
        raise InputError(f"{checkpoints.folder}: no checkpoint to resume from{found}")
    _log.warning("%s: stopped before its first checkpoint; starting again", folder)
    return config_to_dict(with_precision(config_from_dict(load_config(folder / "config.yaml"))))


def _evaluate(
    run: Run, state: TrainState, view: Progress, log: MetricsLog | None
) -> Measured | None:
    """Evaluates the model, logs what is measured, and calls the callbacks."""
    measured = run.evaluate(state)
    step = int(gather_to_host(state.step))
    values = {} if measured is None else measured.values
    _write(log, step, {f"eval_{name}": value for name, value in values.items()})
    view.moved(step, functools.partial(run.trained, state))
    for each in run.callbacks:
        each.on_evaluate(view, values, run.score(measured))
    return measured


def _write(log: MetricsLog | None, step: int, values: dict[str, float]) -> None:
    if log is not None and values:
        log.write(step, **values)


def _train(
    run: Run,
    state: TrainState,
    view: Progress,
    log: MetricsLog | None,
    checkpoints: Checkpoints,
    stop: StopRequest,
) -> tuple[TrainState, bool]:
    """Takes the steps that are left; gives the state, and whether the run has ended."""
    config, done, skipped = (
        run.config,
        int(gather_to_host(state.step)),
        int(gather_to_host(state.skipped)[0]),
    )
    log_every, eval_every = config.logging.log_every, config.evaluation.every
    save_every, keep_best = config.checkpoint.save_every, config.checkpoint.keep_best
    speed, ahead = run.speedometer(), deque[dict[str, jax.Array]]()
    bar = progress_bar(
        total=run.steps,
        initial=done,
        desc=config.method.name,
        shown=run.progress,
        unit="step",
    )
    compilations = Compilations(bar, config.method.name, speed, ahead)
    last = done == run.steps or _asked_to_stop(view, logs=True)
    with (
        bar,
        StepProfiler(Path(config.output) / "profile", config.logging.profile_steps) as profiler,
    ):
        while not last:
            with speed.spent_on("data"):
                batch = next(run.stream)
                placed = run.placed(batch)
            if len(ahead) == _STEPS_AHEAD:
                jax.block_until_ready(ahead.popleft())
            profiler.before(done + 1, ahead)
            with compilations.of(placed) as compiles:
                state, metrics = run.step(state, run.parts.frozen, placed)
                if compiles:  # the step itself is in that time
                    jax.block_until_ready(metrics)
            done += 1
            ahead.append(metrics)
            profiler.after(done, metrics)
            if not compiles:
                speed.count(*run.tokens(batch))
            bar.update()
            # The first step too: later losses are compared with its loss.
            logs = done in (1, run.steps) or done % log_every == 0
            values: dict[str, float] = {}
            if logs:
                jax.block_until_ready(state.step)
                skipped = _check_skipped(state, run, skipped)
                values = {**speed.read(), **run.report(state, metrics, skipped)}
                speed.restart()  # the report, which is compiled too, is no time of steps
                _write(log, done, values)
                told = {"loss": f"{values['train_loss']:.4f}"}
                if "tokens_per_second" in values:
                    told["tokens_s"] = f"{values['tokens_per_second']:.0f}"
                bar.set_postfix(told)
            view.moved(done, functools.partial(run.trained, state))
            for each in run.callbacks:
                each.on_step(view, values)
            last = done == run.steps or _asked_to_stop(view, logs=logs)
            stopped = stop.reached(done)
            due = eval_every > 0 and done % eval_every == 0
            evaluates = last or (due and not stopped)  # a notice of preemption leaves little time
            best = evaluates and due and keep_best > 0
            measured: Measured | None = None
            if evaluates:
                jax.block_until_ready(state.step)
                with speed.spent_on("eval"):
                    measured = _evaluate(run, state, view, log)
                last = last or _asked_to_stop(view, logs=True)
            saves = last or stopped or best or done % save_every == 0
            if saves:
                jax.block_until_ready(state.step)
                with speed.spent_on("save"):
                    skipped = _check_skipped(state, run, skipped)
                    if last or stopped or not gather_to_host(state.skipped)[1]:
                        run.save(
                            checkpoints,
                            state,
                            measured,
                            stopped=view.stopped if last else "",
                            postponed=due and not evaluates,
                        )
                        for each in run.callbacks:
                            each.on_save(view, checkpoints.folder / str(done))
            if stopped and not last:
                break
    checkpoints.wait()
    if not last:
        _log.warning("stopped at step %d of %d, checkpoint saved", done, run.steps)
    elif view.stopped:
        _log.warning("ended at step %d of %d: %s", done, run.steps, view.stopped)
    return state, last


def _asked_to_stop(view: Progress, *, logs: bool) -> bool:
    """Whether the run ends, since a callback of any process asked for it.

    Several processes have to end at the same step. They agree on it at those that are logged, where
    they wait for the devices in any case.
    """
    if jax.process_count() == 1:
        return bool(view.stopped)
    if not logs or all_agree(not view.stopped):
        return False
    view.stopped = view.stopped or "a callback of another process ended the run"
    return True


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
