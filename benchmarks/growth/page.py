"""The page of the latest rows, and its figures."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

from benchmarks import growth
from benchmarks.growth.sizes import OPTIMIZERS, Point, Size, floor
from benchmarks.history import Entry, Row, table
from benchmarks.optimizer.plot import save


def latest(entries: Iterable[Entry]) -> dict[Size, list[Entry]]:
    """The entries of the latest run of each size."""
    runs: dict[Size, dict[str, list[Entry]]] = {size: {} for size in get_args(Size)}
    for entry in entries:
        runs[entry.case["against"]].setdefault(entry.made_with["date"], []).append(entry)
    return {size: found[max(found)] for size, found in runs.items() if found}


class Line(NamedTuple):
    """A contestant's points in a figure, those that were measured.

    Attributes:
        label: Its name, and how layers are kept where that differs.
        sizes: What grows.
        seconds: Of an update, over the number of devices.
        state: Bytes on a device.
        rows: What was measured.
        floors: Operations and numbers at the same points.
    """

    label: str
    sizes: list[int]
    seconds: list[float]
    state: list[int]
    rows: list[Row]
    floors: list[tuple[float, float]]


def lines(size: Size, entries: Sequence[Entry]) -> list[Line]:
    """The lines of a figure, in the order of the contestants."""
    found: dict[str, Line] = {}
    for case, row, _ in entries:
        if "seconds" in row:
            point = Point(*(case[name] for name in Point._fields))
            label = case["optimizer"]
            if size == "layers":
                label += ", stacked" if point.stacked else ", separate"
            line = found.setdefault(label, Line(label, [], [], [], [], []))
            line.sizes.append(case[size])
            line.seconds.append(row["seconds"] / point.devices)
            line.state.append(row["state_bytes"])
            line.rows.append(row)
            line.floors.append(floor(case["optimizer"], point))
    return list(found.values())


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the straight line through logarithms, by least squares.

    Example:
        >>> round(slope([1, 2, 4], [3, 12, 48]), 6)  # quadratic
        2.0
    """
    x, y = np.log(sizes), np.log(values)
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x @ x))


_WHAT: dict[Size, str] = {
    "rank": "One pair of {width}x{width}.",
    "width": "One pair of width x width, rank {rank}.",
    "layers": "Pairs of {width}x{width}, rank {rank}, as one stack and as separate leaves.",
    "devices": "A stack of two layers a device, {width}x{width}, rank {rank}; ms are over devices.",
}


def page(found: dict[Size, list[Entry]], name: str) -> str:
    """The page.

    Args:
        found: From `latest`.
        name: What the names of its figures begin with.

    Returns:
        Markdown.
    """
    about = (growth.__doc__ or "").split("\n\n")
    text = ["# How cost grows", "", *"\n\n".join(about[1:-2]).splitlines(), ""]
    text += ["```console", "$ python -m benchmarks.growth --page docs/evidence/growth.md", "```"]
    for size, entries in found.items():
        case, made = entries[0].case, entries[0].made_with
        text += ["", f"## {size.capitalize()}", ""]
        if case["quick"]:
            text += ["Sizes are those of `--quick`: these numbers mean nothing.", ""]
        machine = f"{made['cores']} cores, {made['machine']}"
        text += [f"{_WHAT[size].format(**case)} Measured on {machine},"]
        text += [f"with jax {made['jax']}, at revision {made['revision']}.", ""]
        text += [f"![Time and state over {size}]({name}-{size}.png)", ""]
        drawn = lines(size, entries)
        text += [*_slopes(size, drawn), "", *_times(size, drawn)]
        for entry in entries:
            if "skipped" in entry.measured:
                what = f"{entry.case['optimizer']} at {size} {entry.case[size]}"
                text += ["", f"Left out: {what}, {entry.measured['skipped']}."]
    return "\n".join(text) + "\n"


def _slopes(size: Size, drawn: Sequence[Line]) -> list[str]:
    head = ["optimizer", size, "ms", "slope", "floor", "last", "floor"]
    head += ["state MB", "slope", "floor", "trace + compile s"]
    head += ["sent MB"] if size == "devices" else []
    rows = []
    for line in drawn:
        operations, numbers = zip(*line.floors, strict=True)
        compiled = [row["trace_seconds"] + row["compile_seconds"] for row in line.rows]
        cells = [line.label, _range(line.sizes), _range([1e3 * x for x in line.seconds])]
        for values in (line.seconds, operations):
            cells.append(_slope(line.sizes, values))
        for values in (line.seconds, operations):
            cells.append(_slope(line.sizes[-2:], values[-2:]))
        cells.append(_range([x / 1e6 for x in line.state]))
        cells += [_slope(line.sizes, values) for values in (line.state, numbers)]
        cells.append(_range(compiled))
        if size == "devices":
            cells.append(_range([row["sent_bytes"] / 1e6 for row in line.rows]))
        rows.append(cells)
    return table(head, rows)


def _range(values: Sequence[float]) -> str:
    first, last = (f"{value:.3g}" for value in (values[0], values[-1]))
    return f"{first} to {last}"


def _slope(sizes: Sequence[float], values: Sequence[float]) -> str:
    # Adding zero makes 0 of -0.
    return f"{round(slope(sizes, values), 2) + 0.0:.2f}" if len(set(sizes)) > 1 else "-"


def _times(size: Size, drawn: Sequence[Line]) -> list[str]:
    """Milliseconds at each point."""
    sizes = sorted({x for line in drawn for x in line.sizes})
    times = [dict(zip(line.sizes, line.seconds, strict=True)) for line in drawn]
    rows = [[str(x), *(f"{1e3 * t[x]:.3g}" if x in t else "-" for t in times)] for x in sizes]
    return table([f"ms at {size}", *(line.label for line in drawn)], rows)


def draw(size: Size, drawn: Sequence[Line], path: Path) -> bool:
    """Draws time and state, with the floors' slopes from the largest size down.

    Args:
        size: What grows.
        drawn: From `lines`.
        path: PNG file to write.

    Returns:
        Whether matplotlib is installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, line in enumerate(drawn):
        operations, numbers = zip(*line.floors, strict=True)
        for axes, values, least in ((left, line.seconds, operations), (right, line.state, numbers)):
            style = "s:" if line.label.endswith("separate") else "o-"
            color = f"C{place % len(OPTIMIZERS)}"
            axes.plot(line.sizes, values, style, color=color, label=line.label, markersize=4)
            if not line.label.endswith("separate"):
                floors = [values[-1] * x / least[-1] for x in least]
                axes.plot(line.sizes, floors, "--", color=color, linewidth=0.8)
    over = " / devices" if size == "devices" else ""
    left.set_ylabel(f"seconds of an update{over}")
    right.set_ylabel("bytes of state on a device")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel=size)
        axes.set_xticks(sorted({x for line in drawn for x in line.sizes}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    save(figure, path)
    return True
