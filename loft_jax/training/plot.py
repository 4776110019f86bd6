"""The loss of a run as a picture."""

import os
from collections.abc import Sequence
from typing import Any

from loft_jax.files import replacing


def plot_losses(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> bool:
    """Draws training and evaluation loss by step.

    Args:
        rows: Rows of `metrics.jsonl`.
        path: PNG file to write.

    Returns:
        Whether it was drawn: False when matplotlib, the extra `plot`, is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, style in (("train_loss", "-"), ("eval_loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as partial:
        FigureCanvasAgg(figure).print_png(partial)
    return True
