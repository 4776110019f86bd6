"""Plots metrics of runs; nothing without matplotlib, the extra `plot`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loft_jax.files import replacing

_SMOOTHED = 20  # number of logged losses from which a smoothed line says more than they do
_FENCE = 3.0  # interquartile ranges above which a value would set the scale of all others

Points = tuple[np.ndarray, np.ndarray]
"""Steps (n,) and values (n,)."""


def plot_run(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Plots losses, the other metrics of evaluations, and learning rates by step, in panels.

    Where there are 20 training losses or more, a smoothed line is in front of them. Evaluations are
    joined by a line if there are more than two. Losses far above the others do not set the scale;
    a mark at the edge shows where they are.

    Args:
        rows: Rows of `metrics.jsonl`.
        path: PNG file to write.
    """
    columns: dict[str, Points] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        steps, values = zip(*[(row["step"], row[name]) for row in rows if name in row], strict=True)
        columns[name] = np.asarray(steps), np.asarray(values, float)
    measured = {
        name.removeprefix("eval_"): points
        for name, points in columns.items()
        if name.startswith("eval_") and name != "eval_loss"
    }
    rates = columns.get("learning_rate")
    heights = [3.0, *([1.5] if measured else []), *([1.0] if rates is not None else [])]
    if not (figure := _figure(7, 1.2 + 1.1 * sum(heights))):
        return
    panels = list(figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights))
    (axes,) = panels.pop(0)
    _plot_losses(axes, columns)
    if measured:
        (axes,) = panels.pop(0)
        for name, points in measured.items():
            axes.plot(*points, _joined(points), label=name.replace("_", " "))
        axes.set(ylabel="held-out")
        axes.legend()
    if rates is not None:
        (axes,) = panels.pop(0)
        axes.plot(*rates, color="0.3")
        axes.set(ylabel="learning rate")
        axes.ticklabel_format(axis="y", scilimits=(-2, 2))
    axes.set(xlabel="step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    for each in figure.axes:
        each.grid(alpha=0.3)
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    """A figure of a size in inches; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with replacing(path) as partial:
        FigureCanvasAgg(figure).print_png(partial)


def _plot_losses(axes: Any, columns: Mapping[str, Points]) -> None:
    shown: list[np.ndarray] = []
    if (trained := columns.get("train_loss")) is not None:
        steps, losses = trained
        shown.append(losses)
        if len(losses) < _SMOOTHED:
            axes.plot(steps, losses, color="C0", label="training")
        else:
            axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8, label="training")
            axes.plot(steps, smoothed(losses), color="C0", label="training, smoothed")
    if (measured := columns.get("eval_loss")) is not None:
        axes.plot(*measured, _joined(measured), color="C1", label="held-out")
        shown.append(measured[1])
    axes.set(ylabel="loss")
    if not shown:
        return
    axes.legend()
    values = np.concatenate(shown)
    top = robust_top(values)
    if top < values.max():
        low = values.min()
        axes.set_ylim(low - 0.05 * (top - low), top)
        for color, points in (("C0", trained), ("C1", measured)):
            if points is not None:
                above = points[0][points[1] > top]
                edge = np.full(len(above), top)
                axes.plot(above, edge, "^", color=color, clip_on=False, markersize=5)
        axes.set_title(f"up to {values.max():.4g} at the triangles", loc="right", fontsize="small")


def _joined(points: Points) -> str:
    """Gives the style of evaluations: two of them, before and after, are no course."""
    return "o-" if len(points[0]) > 2 else "o"


def smoothed(values: np.ndarray) -> np.ndarray:
    """Smooths a line by medians over a tenth of it, so that single peaks do not move it.

    Args:
        values: (n,).

    Returns:
        (n,), the median of each value and of up to n / 20 on either side.

    Example:
        >>> smoothed(np.asarray([*range(20), 999.0, *range(21, 40)]))[[0, 20, 39]].tolist()
        [1.0, 21.0, 38.0]
    """
    half = len(values) // 20
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return np.asarray([np.median(window) for window in windows])


def robust_top(values: np.ndarray) -> float:
    """Gives the top of a scale that a few large values do not set.

    Args:
        values: (n,), finite.

    Returns:
        The largest value, or three interquartile ranges above the third quartile if that is less.

    Example:
        >>> robust_top(np.asarray([1.0, 2.0, 3.0, 4.0, 500.0]))
        10.0
    """
    low, high = np.quantile(values, [0.25, 0.75])
    return float(min(values.max(), high + _FENCE * (high - low) if high > low else np.inf))


def plot_sweep(
    points: Sequence[tuple[Mapping[str, str], float]], metric: str, path: str | os.PathLike[str]
) -> None:
    """Plots how a metric depends on the settings of a sweep.

    The horizontal axis is the setting with the most numbers, or else the first one; there is a line
    for each combination of the others.

    Args:
        points: Settings by name, as texts, and the value of the metric; nothing is plotted of none.
        metric: Its name.
        path: PNG file to write.
    """
    if not (points and (figure := _figure(7, 4))):
        return
    columns = {name: [settings[name] for settings, _ in points] for name in points[0][0]}
    numbers = {
        name: len({*column}) for name, column in columns.items() if all(map(_is_number, column))
    }
    across = max(numbers, key=lambda name: numbers[name]) if numbers else next(iter(columns))
    lines: dict[str, list[tuple[float | str, float]]] = {}
    for settings, value in points:
        label = ", ".join(f"{name} {text}" for name, text in settings.items() if name != across)
        place = float(settings[across]) if numbers else settings[across]
        lines.setdefault(label, []).append((place, value))
    axes = figure.add_subplot()
    for label in sorted(lines):
        axes.plot(*zip(*sorted(lines[label]), strict=True), "o-", label=label)
    if numbers and 0 < 8 * min(map(float, columns[across])) <= max(map(float, columns[across])):
        axes.set_xscale("log")
    axes.set(xlabel=across.replace("-", " "), ylabel=f"held-out {metric}")
    axes.grid(alpha=0.3)
    if any(lines):
        axes.legend()
    _save(figure, path)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
