"""What `optimizer.py` has measured, as a page of tables and a plot."""

import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

Group = Literal["update", "compile", "train"]
Row = dict[str, Any]
Contestant = Literal[
    "adamw",
    "loft",
    "loft-factored",
    "loft-alternate",
    "loft-alternate-factored",
    "loft-balanced",
    "loft-bf16",
    "loft-diagonal",
    "loft-muon",
    "dense",
    "dense-einsum",
]

DENSE: tuple[Contestant, ...] = ("dense", "dense-einsum")
"""Contestants that hold the full matrices."""

REFERENCES: tuple[Contestant, ...] = ("adamw", *DENSE)
"""Contestants that the others are compared with."""

# Of the time of LoRA's training step with AdamW, by optimizer and batch.
_MOST_OF_A_STEP = {
    ("loft-factored", "16x128"): 1.05,
    ("loft-factored", "8x128"): 1.10,
    ("loft", "16x128"): 1.30,
}


class Aim(NamedTuple):
    """What a measured value should stay under (or over).

    Attributes:
        what: The value, in words.
        measured: What it is.
        bound: What it should be at most, or at least.
        unit: Behind both numbers.
        least: Whether the bound is a lower one.
    """

    what: str
    measured: float
    bound: float
    unit: str
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether the value keeps to its bound."""
        return self.measured >= self.bound if self.least else self.measured <= self.bound


def read_rows(folder: Path) -> list[Row]:
    """All rows of a folder of results, in the order of the groups."""
    rows = []
    for group in get_args(Group):
        file = folder / f"{group}.jsonl"
        if file.exists():
            rows += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """The results as Markdown: aims, then a table a group.

    Args:
        rows: From `read_rows`.

    Returns:
        The page.
    """
    page = ["# What LoFT costs", ""]
    settings = ("python", "loft-jax", "jax", "optax", "backend", "device", "cores")
    for made in dict.fromkeys(", ".join(f"{key} {row[key]}" for key in settings) for row in rows):
        page.append(f"Measured with {made}.")
    if any(row["quick"] for row in rows):
        page.append("Sizes are those of `--quick`: these numbers mean nothing.")
    page += ["", "MB are 10⁶ bytes. Temporaries are the compiler's plan, also as a share of the"]
    page += ["base weight in bfloat16. Ratios of times: median over rounds, quartiles in brackets."]
    if found := aims(rows):
        page += ["", "## Aims", ""]
        page += _table(
            ("value", "measured", "aim", "met"),
            [
                (
                    aim.what,
                    f"{aim.measured:.3g}{aim.unit}",
                    f"{'≥' if aim.least else '≤'} {aim.bound:g}{aim.unit}",
                    "yes" if aim.met else "**no**",
                )
                for aim in found
            ],
        )
    cases: dict[Group, Callable[[Row], str]] = {
        "update": lambda row: f"{_shape(row)}, r {row['rank']}",
        "compile": lambda row: f"{row['case']}, r {row['rank']}",
        "train": lambda row: f"{row['case']}, r {row['rank']}",
    }
    for group, case in cases.items():
        mine = [row for row in rows if row["group"] == group]
        if mine:
            timed = group != "compile"
            head = [
                "case",
                "optimizer",
                "state MB",
                "temporaries MB",
                "of base",
                "trace + compile s",
            ]
            head[2:2] = ["ms", *(f"time / {name}" for name in REFERENCES)] if timed else []
            page += ["", f"## {group.capitalize()}", ""]
            page += _table(head, [_cells(row, case(row), timed=timed) for row in mine])
    return "\n".join(page) + "\n"


def aims(rows: Sequence[Row]) -> list[Aim]:
    """What the measured rows say of the bounds that LoFT should keep.

    Args:
        rows: From `read_rows`.

    Returns:
        One for each bound that was measured.
    """
    found = []
    for row in rows:
        name = row["optimizer"]
        if not name.startswith("loft") or row["quick"]:
            continue
        if row["group"] == "compile":
            share = 10.0 if row["case"] == "one pair" else 2.0
            what = f"{name}: {row['case']}, r {row['rank']}"
            if limit := {"separate": 30.0, "stacked": 8.0}.get(row["case"].split()[-1]):
                seconds = row["trace_seconds"] + row["compile_seconds"]
                found.append(Aim(f"{what}, trace + compile", seconds, limit, " s"))
            found.append(Aim(f"{what}, temporaries", 100 * row["temp_share"], share, " % of base"))
        elif row["group"] == "train":
            what = f"{name}: training step, {row['case']}, time / adamw"
            bound = _MOST_OF_A_STEP.get((name, row["case"].rpartition(" ")[2]))
            if "to_adamw" in row and bound:
                found.append(Aim(what, row["to_adamw"], bound, ""))
        elif (row["in"], row["out"], row["pairs"], row["rank"]) == (1024, 1024, 8, 16):
            what = f"{name}: {_shape(row)}, r 16"
            for dense in DENSE:
                if f"to_{dense}" in row:
                    faster = 1 / row[f"to_{dense}"]
                    found.append(Aim(f"{what}, times faster than {dense}", faster, 3.0, "", True))
                for other in rows:
                    if other["optimizer"] == dense and _same_case(row, other):
                        share = row["temp_bytes"] / other["temp_bytes"]
                        found.append(Aim(f"{what}, temporaries / {dense}", share, 0.1, ""))
    return found


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Draws time over AdamW's and temporaries over shapes, one column a rank.

    Args:
        rows: From `read_rows`; those of the update group are drawn.
        path: PNG file to write.

    Returns:
        Whether matplotlib is installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
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
    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    for (line, key), (column, rank) in itertools.product(enumerate(values), enumerate(ranks)):
        axes = grid[line][column]
        for name in dict.fromkeys(row["optimizer"] for row in rows):
            mine = [row for row in rows if (row["optimizer"], row["rank"]) == (name, rank)]
            points = [(shapes.index(_shape(row)), row[key]) for row in mine if row.get(key)]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=name, markersize=4)
        axes.set(yscale="log", title=f"r {rank}" if line == 0 else "")
        axes.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
        axes.grid(alpha=0.3)
        if column == 0:
            axes.set_ylabel(values[key])
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    partial = path.with_suffix(".partial.png")
    FigureCanvasAgg(figure).print_png(partial)
    os.replace(partial, path)
    return True


def _shape(row: Row) -> str:
    return f"{row['in']}x{row['out']}" + (f" x {row['pairs']}" if row["pairs"] > 1 else "")


def _same_case(row: Row, other: Row) -> bool:
    keys = ("group", "in", "out", "pairs", "rank")
    return all(row.get(key) == other.get(key) for key in keys)


def _cells(row: Row, case: str, *, timed: bool) -> list[str]:
    memory = [
        f"{row['state_bytes'] / 1e6:.3g}",
        f"{row['temp_bytes'] / 1e6:.3g}",
        f"{100 * row['temp_share']:.3g} %",
        f"{row['trace_seconds'] + row['compile_seconds']:.2f}",
    ]
    if not timed:
        return [case, row["optimizer"], *memory]
    if "skipped" in row:
        return [
            case,
            row["optimizer"],
            f"skipped: {row['skipped']}",
            *["-"] * len(REFERENCES),
            *memory,
        ]
    times = [f"{1000 * row['seconds']:.3g}", *(_ratio(row, name) for name in REFERENCES)]
    return [case, row["optimizer"], *times, *memory]


def _ratio(row: Row, reference: str) -> str:
    if f"to_{reference}" not in row:
        return "-"
    low, high = row[f"to_{reference}_quartiles"]
    return f"{row[f'to_{reference}']:.3g} ({low:.3g} to {high:.3g})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
