"""One run of a comparison on a pretrained model: trained and measured, as a line of the log."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments.log import Cell, Result
from experiments.methods import configured, optimizer_of
from experiments.tasks import BEFORE, PretrainedTask
from loft_jax.data import load_examples, train_stream
from loft_jax.data.arrays import ArrayData
from loft_jax.data.encode import TokenizedData
from loft_jax.data.images import ImageData
from loft_jax.hub import load_model_config, load_processor
from loft_jax.lora.targets import scaling_of
from loft_jax.methods import Full
from loft_jax.models.family import PretrainedModel
from loft_jax.optim import state_bytes
from loft_jax.tasks.task import Evaluation
from loft_jax.training.config import FinetuneConfig
from loft_jax.training.held_out import held_out_data
from loft_jax.training.model import load_model, task_of, trained_variables
from loft_jax.training.optimizer import make_schedule
from loft_jax.training.partition import ModelPartition, split_model
from loft_jax.training.step import TrainState, initial_state, make_step

Step = Callable[..., Any]

# Points of a curve that are kept of a run.
_STRETCHES = 20
PACKAGES = ("loft-jax", "jax", "flax", "optax")


@dataclass
class _Compiled:
    """The step of a method for every learning rate and seed, by the shapes of a batch."""

    parts: ModelPartition
    loss: Any
    make: Callable[[jax.Array], Any]
    by_shape: dict[Any, Step] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    temporaries: int = 0

    def __call__(self, rate: np.float32, state: TrainState, frozen: Any, batch: Any) -> Any:
        key = tuple((name, x.shape) for name, x in sorted(batch.items()))
        if key not in self.by_shape:
            began = time.perf_counter()
            step = jax.jit(self._step, donate_argnums=1)
            compiled = step.lower(rate, state, frozen, batch).compile()
            self.seconds += time.perf_counter() - began
            found = compiled.memory_analysis()
            self.temporaries = max(self.temporaries, found.temp_size_in_bytes if found else 0)
            self.by_shape[key] = compiled
        return self.by_shape[key](rate, state, frozen, batch)

    def _step(self, rate: jax.Array, state: TrainState, frozen: Any, batch: Any) -> Any:
        return make_step(self.parts, self.loss, self.make(rate))(state, frozen, batch)


class _HeldOut(NamedTuple):
    """How a model is measured on held-out rows, and their number."""

    evaluate: Evaluation
    rows: int


class PretrainedRuns:
    """Runs of one task; data are read, and steps compiled, once for all of them."""

    def __init__(self, task: PretrainedTask, assets: Path) -> None:
        """Reads the data.

        Args:
            task: Which one.
            assets: Where models and data lie.
        """
        self.task = task
        self._config = task.config(assets)
        self._processor = load_processor(self._config.model.path)
        self._rows = load_examples(self._config.data)
        family, sizes = load_model_config(self._config.model.path)
        evaluation = held_out_data(self._config)
        assert evaluation is not None
        measured = load_examples(evaluation)
        self._task = task_of(self._config, family, sizes, self._rows, measured)
        self._steps: dict[Any, _Compiled] = {}

    def __call__(self, cell: Cell, *, test: bool) -> Result:
        """Trains and measures.

        Args:
            cell: What to run.
            test: Whether to measure on the test set too.

        Returns:
            The result; its validation loss is infinite where the loss stopped being a number.
        """
        if cell.method == BEFORE:
            start = load_model(dataclasses.replace(self._config, method=Full()), self._task)
            return self._result(cell, start, train=(), cost={}, test=test)
        config = configured(self._config, cell)
        model = load_model(config, self._task)
        schedule = dataclasses.replace(config.schedule, learning_rate=1.0)
        course = make_schedule(schedule, schedule.steps)
        optimizer, scaling = optimizer_of(cell.method), scaling_of(model)
        heads = self._task.head_modules(model)
        parts = split_model(model, trained_variables(config.method, heads))

        def make(rate: Any) -> Any:
            return optimizer(config, lambda count: rate * course(count), scaling)

        key = (cell.method, cell.rank, cell.eps, cell.alpha)
        if key not in self._steps:
            # Of the model it needs the structure alone: its arrays are those of the run.
            empty = parts._replace(params=None, streams=None, frozen=None)
            self._steps[key] = _Compiled(empty, self._task.loss, make)
        step = self._steps[key]
        state = initial_state(parts, make(cell.learning_rate))
        stream = train_stream(
            self._data, config.data, batch_size=schedule.batch_size, seed=config.seed
        )
        rate, losses, seconds = np.float32(cell.learning_rate), [], []
        with tqdm(range(schedule.steps), desc=_title(cell), leave=False) as bar:
            for _ in bar:
                batch = self._task.inputs(next(stream))
                compiling, began = step.seconds, time.perf_counter()
                state, metrics = step(rate, state, parts.frozen, batch)
                losses.append(float(metrics["loss"]))
                spent = time.perf_counter() - began
                if step.seconds == compiling:
                    seconds.append(spent)
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
        stream.close()
        # A step that is skipped would leave a run that has only stopped early.
        finite = bool(np.isfinite(losses).all()) and not int(state.skipped[0])
        return self._result(
            cell,
            parts.merged(state.params, state.streams) if finite else None,
            train=tuple(round(float(np.mean(x)), 5) for x in np.array_split(losses, _STRETCHES)),
            cost={
                "step_seconds": round(statistics.median(seconds or [math.nan]), 5),
                "compile_seconds": round(step.seconds, 2),
                "trained_parameters": moved(parts.params, state.params),
                "state_bytes": state_bytes(make(cell.learning_rate), state.params),
                "temporary_bytes": step.temporaries,
            },
            test=test,
        )

    def _result(
        self,
        cell: Cell,
        model: PretrainedModel | None,
        *,
        train: tuple[float, ...],
        cost: Mapping[str, float],
        test: bool,
    ) -> Result:
        """What a model comes to; None is one that has diverged."""
        validation: dict[str, float] = {"loss": math.inf}
        tested: dict[str, float] = {}
        right: dict[str, tuple[bool, ...]] = {}
        if model is not None:
            validation = self._held_out(test=False).evaluate(model).values
        if test:
            tested = {"loss": math.inf}
            if model is not None:
                measured = self._held_out(test=True).evaluate(model)
                tested, right = measured.values, measured.right
        return Result(
            cell,
            train=train,
            validation=validation,
            test=tested,
            cost=cost,
            made_with={
                **{name: version(name) for name in PACKAGES},
                "device": jax.devices()[0].device_kind,
                "task": self.task.digest,
                "steps": self.task.steps,
                "batch_size": self._config.schedule.batch_size,
                "test_rows": self._held_out(test=True).rows if test else 0,
            },
            right={name: "".join("01"[row] for row in rows) for name, rows in right.items()},
        )

    @functools.cached_property
    def _data(self) -> TokenizedData | ImageData | ArrayData:
        return self._task.tokenize(self._rows, self._processor, self._config.data)

    @functools.cache  # noqa: B019  # lives as long as the runs of its task
    def _held_out(self, *, test: bool) -> _HeldOut:
        config: FinetuneConfig = self.task.tested(self._config) if test else self._config
        data = held_out_data(config)
        assert data is not None
        rows, size = load_examples(data), config.evaluation.batch_size
        evaluate = self._task.evaluation(rows, self._processor, data, batch_size=size)
        return _HeldOut(evaluate, len(rows))


def moved(before: Any, after: Any) -> int:
    """How many numbers belong to arrays that training has changed."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return sum(x.size for x, y in pairs if not np.array_equal(x, y))


def _title(cell: Cell) -> str:
    return f"{cell.method} r {cell.rank} lr {cell.learning_rate:g} seed {cell.seed}"
