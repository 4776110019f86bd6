"""Whether the loss of a run went up instead of down."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

_LAST = 5  # logged losses that the end of a run is judged by: one alone is of one batch


def rise_of_loss(rows: Sequence[dict[str, Any]], *, held_out: bool) -> str:
    """What to tell of a run whose loss ended far above its start, or as no number.

    Far is half of the first loss and half a nat above it, or three times the first loss and a tenth
    of a nat above it: batches scatter by less around a loss that stays as it is, be it large or
    small, and a run that diverged has lost more.

    Args:
        rows: Of the `metrics.jsonl` of a run that is at its end; what was infinite or no number is
            missing in them.
        held_out: Whether the run has held-out examples: rows without training's values are then
            theirs, and otherwise none of this run.

    Returns:
        Of the training loss the first and the median of the last 5, and of the held-out loss those
        before and after training: of whichever rose. Empty if neither did.

    Example:
        >>> rise_of_loss([{"step": 1, "learning_rate": 0.1, "train_loss": 2.0},
        ...               {"step": 9, "learning_rate": 0.1, "train_loss": 7.5}],
        ...              held_out=False)
        'the training loss was 2.0000 at first and 7.5000 at the end'
    """
    trained = [row.get("train_loss", math.inf) for row in rows if "learning_rate" in row]
    measured = [row.get("eval_loss", math.inf) for row in rows if "learning_rate" not in row]
    told = []
    kinds = [("training", trained, _LAST), ("held-out", measured, 1)]
    for name, losses, count in kinds if held_out else kinds[:1]:
        first, later = losses[:1], losses[1:][-count:]
        if first and later and _rose(first[0], median(later)):
            figures = f"{_figure(first[0])} at first and {_figure(median(later))} at the end"
            told.append(f"the {name} loss was {figures}")
    return ", ".join(told)


def _rose(first: float, last: float) -> bool:
    return last == math.inf or last > min(1.5 * first + 0.5, max(3 * first, first + 0.1))


def _figure(loss: float) -> str:
    return "no finite number" if loss == math.inf else f"{loss:.4f}"
