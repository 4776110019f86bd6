"""The look of all pictures: one file serves white pages and black ones.

Nothing has a background, text is of a grey that both show, and what is zero is transparent.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

matplotlib.use("agg")

GREY, BLUE, ORANGE, GREEN, PURPLE = "#7a7a7a", "#3d85d8", "#e07020", "#2e9e5b", "#9a6fd0"

SIGNED = LinearSegmentedColormap.from_list(
    "signed", [to_rgba(BLUE), to_rgba(BLUE, 0), to_rgba(ORANGE, 0), to_rgba(ORANGE)]
)
"""From blue over nothing to orange."""

_RC: Any = {
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "svg.hashsalt": "loft_jax",
}


def panels(count: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Sequence[Axes]]:
    """Makes a row of panels.

    Args:
        count: How many.
        size: Width and height of the whole, in inches.
        **options: As for `matplotlib.pyplot.subplots`.

    Returns:
        The figure, and its axes.
    """
    plt.rcParams.update(_RC)
    figure, axes = plt.subplots(
        1, count, figsize=size, layout="constrained", squeeze=False, **options
    )
    return figure, axes[0]


def save(figure: Figure, path: Path) -> None:
    """Writes an SVG, without its date: the same numbers give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
