"""Ends a run whose evaluations do not get better any more."""

import math
from collections.abc import Mapping
from typing import Any

from loft_jax.training.callbacks import Callback, Progress


class EarlyStopping(Callback):
    """Counts evaluations that are no better than the best one before, and ends the run.

    NaN is no better than anything. The count is part of checkpoints.
    `EvaluationConfig.patience` adds this callback to a run.
    """

    def __init__(self, patience: int) -> None:
        """Sets the number of evaluations.

        Args:
            patience: The run ends after this many in a row that are no better.
        """
        self._patience = patience
        self._best: float | None = None
        self._best_step = self._count = 0

    def on_evaluate(self, run: Progress, metrics: Mapping[str, float], score: float | None) -> None:
        """Compares an evaluation during training with the best one.

        One after the last step counts only if `every` divides the step: extended to more steps, the
        run would have none there.
        """
        every = run.config.evaluation.every
        if score is None or run.step == 0 or not every or run.step % every:
            return
        if not math.isnan(score) and (self._best is None or score < self._best):
            self._best, self._best_step, self._count = score, run.step, 0
            return
        self._count += 1
        if self._count >= self._patience and run.step < run.steps:
            run.stop(
                f"none of the last {self._count} evaluations was a number"
                if self._best is None
                else f"no evaluation of the last {self._count} was better than that of step "
                f"{self._best_step}"
            )

    def get_state(self) -> dict[str, Any]:
        """Gives the best score, its step, and the count since then."""
        return {"best": self._best, "best_step": self._best_step, "count": self._count}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores them."""
        self._best = None if state["best"] is None else float(state["best"])
        self._best_step, self._count = int(state["best_step"]), int(state["count"])
