"""Callbacks: functions of the user that a run calls as it goes on, and that may end it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flax import nnx

from loft_jax.errors import InputError, explained, shown
from loft_jax.training.config import FinetuneConfig


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Args:
        folder: Its output folder.
        steps: Number of steps done.
        interrupted: Whether it was asked to stop from outside before its last step, and saved a
            checkpoint to resume from.
        before: Evaluation before training, by name; empty without evaluation.
        after: Evaluation after training; empty without evaluation, or when interrupted.
        trained: Folder of the PEFT adapter, or of the whole model for method "full"; None when
            interrupted.
        stopped: Why a callback ended the run before its last step; empty if none did.
        history: The lines of `metrics.jsonl`, in order; each has its `step`.
        model: The trained model, in evaluation mode; None when interrupted.
    """

    folder: Path
    steps: int
    interrupted: bool
    before: dict[str, float]
    after: dict[str, float]
    trained: Path | None
    stopped: str = ""
    history: Sequence[dict[str, Any]] = field(default=(), repr=False)
    model: Any = field(default=None, repr=False)


class Progress:
    """What a callback sees of a run, and how it ends it.

    Attributes:
        config: Of the run.
        tokenizer: Tokenizer or image processor of the model; None with a loss of one's own.
        steps: Number of steps that the run is to take.
        step: Number of steps done.
        stopped: Why the run is to end; empty as long as it is not.
    """

    def __init__(
        self, config: FinetuneConfig, *, tokenizer: Any, steps: int, stopped: str = ""
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.steps = steps
        self.step = 0
        self.stopped = stopped
        self._model: Callable[[], nnx.Module] | None = None

    @property
    def folder(self) -> Path:
        """The output folder of the run."""
        return Path(self.config.output)

    def model(self) -> Any:
        """Gives the model with its current parameters, in evaluation mode.

        The next step reuses their memory: the model is not to be kept for later.
        """
        assert self._model is not None
        model = self._model()
        model.eval()
        return model

    def stop(self, reason: str) -> None:
        """Ends the run after this step: it is evaluated, saved and exported.

        Asked for in `on_save`, the run ends after the next step. Of several processes, any one may
        ask: they end together, after the next step that is logged or evaluated. A run that is
        interrupted before it ends forgets it.

        Args:
            reason: For the log and the result.
        """
        self.stopped = reason or "a callback ended the run"

    def moved(self, step: int, model: Callable[[], nnx.Module]) -> None:
        """Sets the step, and what gives the model at it; called by the loop."""
        self.step, self._model = step, model


class Callback:
    """Base class of callbacks; each method does nothing unless it is overridden.

    With several processes, callbacks are called on all of them. An exception that one raises ends
    the run; the last checkpoint is kept.

    Example:
        >>> class StopBelow(Callback):
        ...     def on_step(self, run, metrics):
        ...         if metrics.get("train_loss", 1.0) < 0.1:
        ...             run.stop("the loss is below 0.1")
    """

    def on_step(self, run: Progress, metrics: Mapping[str, float]) -> None:
        """Called after every step.

        Args:
            run: The run.
            metrics: The line of the log of this step; empty at steps without one, whose values stay
                on the devices.
        """

    def on_evaluate(self, run: Progress, metrics: Mapping[str, float], score: float | None) -> None:
        """Called after every evaluation; at step 0 before training.

        Args:
            run: The run.
            metrics: Metrics of the task by name; empty without held-out examples.
            score: The number that evaluations are compared by, lower is better; None without
                held-out examples.
        """

    def on_save(self, run: Progress, folder: Path) -> None:
        """Called after a checkpoint was started, which is then written in the background.

        Args:
            run: The run.
            folder: Of the checkpoint.
        """

    def on_end(self, run: Progress, result: RunResult) -> None:
        """Called once at the end, after the adapter was written; also of an interrupted run.

        Args:
            run: The run.
            result: What `finetune` returns.
        """

    def get_state(self) -> dict[str, Any]:
        """Gives what checkpoints keep of the callback, in values that JSON can hold.

        It is also called before the first step, to find then what JSON cannot hold.
        """
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores what `get_state` gave when the checkpoint was saved that a run resumes from."""


class Callbacks:
    """The callbacks of a run, in their order, and their states."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        """Checks the callbacks.

        Args:
            callbacks: In the order in which they are called.

        Raises:
            InputError: One is not a `Callback`.
        """
        for index, callback in enumerate(callbacks):
            if not isinstance(callback, Callback):
                raise InputError(
                    f"callbacks[{index}] is {shown(callback)}, expected an instance of a subclass "
                    "of loft_jax.Callback"
                )
        self._all = tuple(callbacks)

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._all)

    def get_state(self) -> list[list[Any]]:
        """Gives the names and states of the callbacks that have a state.

        Raises:
            InputError: JSON cannot hold a state.
        """
        states = []
        for callback in self._with_state():
            name, state = type(callback).__name__, callback.get_state()
            with explained(f"callback {name}: JSON cannot hold its state"):
                json.dumps(state)
            states.append([name, state])
        return states

    def set_state(self, saved: Sequence[Sequence[Any]]) -> None:
        """Restores the states of a checkpoint.

        Args:
            saved: From `get_state` of a run with the same callbacks; those without a state may
                differ.

        Raises:
            InputError: The callbacks with a state are others, or one refuses its state.
        """
        ours = self._with_state()
        names = [type(each).__name__ for each in ours]
        if names != (before := [name for name, _ in saved]):
            raise InputError(
                f"cannot resume with other callbacks: the run was started with {shown(before)}, "
                f"now they are {shown(names)}"
            )
        for callback, (name, state) in zip(ours, saved, strict=True):
            with explained(f"callback {name}: cannot be set to its saved state"):
                callback.set_state(state)

    def _with_state(self) -> list[Callback]:
        """Gives the callbacks that have a `get_state` of their own, whatever it gives now."""
        return [each for each in self._all if type(each).get_state is not Callback.get_state]
