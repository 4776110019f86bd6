"""The training loop of a run, from its configuration to the adapter it leaves."""

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from loft_jax.data import Batch, eval_batches, load_examples, tokenize, train_stream
from loft_jax.errors import InputError
from loft_jax.evaluation.choices import score_choices
from loft_jax.evaluation.perplexity import perplexity
from loft_jax.hub import load_tokenizer
from loft_jax.models import Llama
from loft_jax.optim.state import state_bytes
from loft_jax.training.checkpoint import Checkpoints
from loft_jax.training.config import (
    FinetuneConfig,
    check_same_run,
    config_from_dict,
    config_to_dict,
    load_config,
    save_config,
)
from loft_jax.training.interrupt import StopRequest
from loft_jax.training.metrics import MetricsLog, read_metrics
from loft_jax.training.model import export_trained, load_model, scaling_of, trained_kind
from loft_jax.training.optimizer import make_optimizer, make_schedule
from loft_jax.training.plot import plot_losses
from loft_jax.training.step import TrainState, initial_state, make_step, predicted, split_model

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Args:
        steps: Steps done.
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
    `loss.png` (with matplotlib) and `adapter/` in PEFT's format (`model/` for method "full"). An
    interrupt or a termination signal saves a checkpoint before the function returns; a killed run
    loses the steps since its last checkpoint. A resumed run goes on as if it had never stopped, to
    the bit on the same machine.

    Args:
        config: The run.
        resume: Go on from the newest checkpoint in the output folder; a run that was killed before
            its first one starts again.
        progress: Show bars.

    Returns:
        What it came to.

    Raises:
        InputError: Something given is wrong: model, data, targets, a folder that holds another
            run, a changed configuration at resume, no checkpoint to resume from.

    Example:
        >>> result = finetune(  # doctest: +SKIP
        ...     FinetuneConfig("org/model", DataConfig("rows.jsonl"), "runs/first", steps=100))
    """
    folder = Path(config.output)
    with StopRequest() as stop, _checkpoints(config, resume) as checkpoints:
        run = _Run(config, progress)
        try:
            state = initial_state(run.parts, run.tx)
            restored = bool(checkpoints.steps())
            if restored:
                state, saved = checkpoints.restore_newest(state)
                run.stream.set_state(saved["data"])
                _log.info("resumed at step %d of %d", int(state.step), run.steps)
            save_config(config, folder / "config.yaml")
            log = MetricsLog(folder, resumed_at=int(state.step) if restored else None)
            try:
                if not restored:
                    log.write(0, **_named(run.evaluate(state)))
                state = _train(run, state, log, checkpoints, stop)
            finally:
                log.close()
        finally:
            run.stream.close()
        rows = read_metrics(log.path)
        plot_losses(rows, folder / "loss.png")
        interrupted = int(state.step) < run.steps
        return RunResult(
            steps=int(state.step),
            interrupted=interrupted,
            before=_evaluation(rows, 0),
            after=_evaluation(rows, run.steps),
            trained=None if interrupted else run.export(state),
        )


@contextmanager
def _checkpoints(config: FinetuneConfig, resume: bool) -> Iterator[Checkpoints]:
    """Opens the folder of a run, refusing before any work what would mix two runs."""
    folder = Path(config.output)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        keep_last=config.keep_last,
        keep_best=config.keep_best,
    )
    try:
        if not resume and checkpoints.steps():
            raise InputError(
                f"{config.output}: holds a run at step {checkpoints.steps()[0]} already; resume it "
                "(--resume) or choose another output"
            )
        if not resume and config.method == "full" and (folder / "model").exists():
            raise InputError(f"{folder / 'model'}: exists already; choose another output")
        if resume:
            check_same_run(_started_with(checkpoints, folder), config_to_dict(config))
        yield checkpoints
    finally:
        checkpoints.close()


def _started_with(checkpoints: Checkpoints, folder: Path) -> dict[str, Any]:
    """The configuration that a run to resume was started with."""
    if (saved := checkpoints.newest_run()) is not None:
        return saved["config"]
    if checkpoints.steps() or not (folder / "config.yaml").exists():
        found = ", none of those it holds can be read" if checkpoints.steps() else ""
        raise InputError(f"{checkpoints.folder}: no checkpoint to resume from{found}")
    _log.warning("%s: stopped before its first checkpoint; starting again", folder)
    return config_to_dict(config_from_dict(load_config(folder / "config.yaml")))


def _named(evaluation: dict[str, float]) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in evaluation.items()}


def _evaluation(rows: Sequence[dict[str, Any]], step: int) -> dict[str, float]:
    return {
        name.removeprefix("eval_"): value
        for row in rows
        if row["step"] == step
        for name, value in row.items()
        if name.startswith("eval_")
    }


def _train(
    run: "_Run",
    state: TrainState,
    log: MetricsLog,
    checkpoints: Checkpoints,
    stop: StopRequest,
) -> TrainState:
    config = run.config
    tokens, since, done = 0, time.perf_counter(), int(state.step)
    bar = tqdm(
        total=run.steps, initial=done, desc=config.method, disable=not run.progress, unit="step"
    )

    def save(eval_loss: float | None) -> None:
        if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.params)):
            raise InputError(
                f"parameters are not finite at step {done}; the last checkpoint is kept. Expected "
                "a smaller learning_rate, or a larger eps, to train"
            )
        plain = {"config": config_to_dict(config), "data": run.stream.get_state()}
        checkpoints.save(state, plain, eval_loss)

    with bar:
        while done < run.steps:
            batch = next(run.stream)
            state, metrics = run.step(state, run.parts.frozen, predicted(batch))
            done += 1
            tokens += int((batch["segment_ids"] > 0).sum())
            bar.update()
            last = done == run.steps
            if done % config.log_every == 0 or last:
                values = {
                    "train_loss": float(metrics["loss"]),
                    "grad_norm": float(metrics["grad_norm"]),
                    "learning_rate": float(run.schedule(done - 1)),
                    "tokens_per_second": tokens / (time.perf_counter() - since),
                }
                if not math.isfinite(values["train_loss"]):
                    raise InputError(
                        f"the loss is {values['train_loss']} at step {done}; the last checkpoint "
                        "is kept. Expected a smaller learning_rate, or a larger eps, to train"
                    )
                log.write(done, **values)
                bar.set_postfix(
                    loss=f"{values['train_loss']:.4f}",
                    tokens_s=f"{values['tokens_per_second']:.0f}",
                )
                tokens, since = 0, time.perf_counter()
            measured = {}
            if last or (config.eval_every and done % config.eval_every == 0):
                measured = run.evaluate(state)
                log.write(done, **_named(measured))
                since = time.perf_counter()
            if stop.requested or last or done % config.save_every == 0:
                save(measured.get("loss"))
                since = time.perf_counter()
            if stop.requested and not last:
                _log.warning("stopped at step %d of %d, checkpoint saved", done, run.steps)
                break
    return state


class _Run:
    """What a run is made of: model, data, optimizer and compiled step."""

    def __init__(self, config: FinetuneConfig, progress: bool) -> None:
        self.config = config
        self.progress = progress
        self.tokenizer = load_tokenizer(config.model)
        rows = load_examples(config.data)
        data = tokenize(rows, self.tokenizer, config.data)
        self.stream = train_stream(
            data, config.data, batch_size=config.batch_size, seed=config.seed
        )
        self.steps = config.steps or math.ceil(
            config.epochs * self.stream.rows_per_epoch / config.batch_size
        )
        self._eval_data = (
            dataclasses.replace(config.data, path=config.eval_path, split=config.eval_split)
            if config.eval_path
            else None
        )
        self._eval_rows: Any = None
        self._eval_batches: Sequence[Batch] = ()
        if self._eval_data is not None:
            self._eval_rows = load_examples(self._eval_data)
            eval_tokens = tokenize(self._eval_rows, self.tokenizer, self._eval_data)
            self._eval_batches = eval_batches(
                eval_tokens, self._eval_data, batch_size=config.eval_batch_size
            )

        model = load_model(config)
        if (largest := int(data.tokens.max())) >= (size := model.config.vocab_size):
            raise InputError(
                f"{config.model}: its tokenizer gives token {largest}, its weights have {size}; "
                "expected a tokenizer and weights that belong together"
            )
        self.parts = split_model(model, trained_kind(config.method))
        self.schedule = make_schedule(config, self.steps)
        self.tx = make_optimizer(config, self.schedule, scaling_of(model))
        self.step = make_step(self.parts, self.tx, config.accumulation_steps)
        _log.info(
            "%s: %s trained parameters, optimizer state of %s bytes",
            config.method,
            f"{sum(x.size for x in jax.tree.leaves(self.parts.params)):,}",
            f"{state_bytes(self.tx, self.parts.params):,}",
        )

    def trained(self, state: TrainState) -> Llama:
        return self.parts.merged(state.params, state.streams)

    def export(self, state: TrainState) -> Path:
        folder, method = Path(self.config.output), self.config.method
        if method == "full" and (folder / "model").exists():
            return folder / "model"  # whole, or not there: this run was at its end before
        return export_trained(
            self.trained(state), self.tokenizer, method, folder, base_model=self.config.model
        )

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Mean loss on the held-out examples, and accuracy if there are choices."""
        if self._eval_data is None:
            return {}
        model = self.trained(state)
        if not self.config.choices:
            return {"loss": perplexity(model, self._eval_batches, progress=self.progress).nll}
        scores = score_choices(
            model,
            self.tokenizer,
            self._eval_rows,
            self._eval_data,
            choices=self.config.choices,
            batch_size=self.config.eval_batch_size,
            progress=self.progress,
        )
        return {"loss": scores.nll, "accuracy": scores.accuracy}
