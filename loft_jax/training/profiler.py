"""Records a JAX trace of some steps, for TensorBoard or Perfetto."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

_log = logging.getLogger(__name__)


class StepProfiler:
    """Records a trace from before the first to after the last of some steps."""

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        """Sets up the trace, which `before` starts.

        Args:
            folder: Folder of the trace.
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
        """Starts the trace at the first of its steps, when earlier steps have finished."""
        if self._steps and not self._traced and self._steps[0] <= step <= self._steps[1]:
            jax.block_until_ready(running)
            jax.profiler.start_trace(self._folder)
            self._running = self._traced = True

    def after(self, step: int, results: Any) -> None:
        """Stops the trace after the last of its steps, when its results are computed."""
        if self._running and step == self._steps[1]:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
