"""Time and temporaries of the `update` group, drawn."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.history import Row
from benchmarks.optimizer.aims import shape_of
from loft_jax.files import replacing


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Draws time over AdamW's and temporaries over shapes, one column a rank.

    Args:
        rows: From `latest`; those of the update group are drawn.
        path: PNG file to write.

    Returns:
        Whether matplotlib is installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [row for row in rows if row["group"] == "update"]
    ranks = sorted({row["rank"] for row in rows})
    if not ranks:
        return True
    values = {
        "to_adamw": "time / adamw",
        "temp_share": "temporaries / bf16 base weight",
    }
    figure = Figure(figsize=(4 * len(ranks) + 2, 7), layout="constrained")
    grid = figure.subplots(2, len(ranks), squeeze=False, sharex=True, sharey="row")
    shapes = list(dict.fromkeys(shape_of(row) for row in rows))
    twenty = colormaps["tab20"]  # the ten colors of the default are too few
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    for (line, key), (column, rank) in itertools.product(enumerate(values), enumerate(ranks)):
        axes = grid[line][column]
        for place, name in enumerate(names):
            mine = [row for row in rows if (row["optimizer"], row["rank"]) == (name, rank)]
            points = [(shapes.index(shape_of(row)), row[key]) for row in mine if row.get(key)]
            if points:
                axes.plot(
                    *zip(*points, strict=True), "o-", label=name, color=twenty(place), markersize=4
                )
        axes.set(yscale="log", title=f"r {rank}" if line == 0 else "")
        axes.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
        axes.grid(alpha=0.3)
        if column == 0:
            axes.set_ylabel(values[key])
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    save(figure, path)
    return True


def save(figure: Any, path: Path) -> None:
    """Writes a figure of matplotlib as PNG, in the place of a file that may be open.

    Args:
        figure: The figure.
        path: The file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with replacing(path) as partial:
        FigureCanvasAgg(figure).print_png(partial)
