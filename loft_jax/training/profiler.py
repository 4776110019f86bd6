"""A JAX trace of some steps, to be looked at in TensorBoard or Perfetto."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

_log = logging.getLogger(__name__)


class StepProfiler:
    """Records from before the first of two steps to after the last."""

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        """Prepares the recording.

        Args:
            folder: Where the trace goes.
            steps: The first and the last step; empty for no trace.
        """
        self._folder, self._steps = folder, tuple(steps)
        self._running = self._traced = False

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()
        if self._steps and not self._traced and error[0] is None:
            _log.warning("profile_steps %d to %d: none of them was done", *self._steps)

    def before(self, step: int, running: Any) -> None:
        """Begins at the first of the steps that is done here, when those before have ended."""
        if self._steps and not self._traced and self._steps[0] <= step <= self._steps[1]:
            jax.block_until_ready(running)
            jax.profiler.start_trace(self._folder)
            self._running = self._traced = True

    def after(self, step: int, results: Any) -> None:
        """Ends, if this step is the last one, when its results are there."""
        if self._running and step == self._steps[1]:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
