"""The latest measurements as a page of tables."""

from collections.abc import Callable, Iterable, Sequence
from typing import get_args

from benchmarks.history import Entry, Row, table
from benchmarks.optimizer.aims import aims, shape_of
from benchmarks.optimizer.contestants import REFERENCES
from benchmarks.optimizer.settings import Group


def latest(entries: Iterable[Entry]) -> list[Row]:
    """The rows of the latest run of each group, in the order of the groups.

    Args:
        entries: Of the history of the optimizer.

    Returns:
        Rows of case, measures and what they were made with, in one.
    """
    by_group: dict[str, dict[str, list[Row]]] = {}
    for entry in entries:
        runs = by_group.setdefault(entry.case["group"], {})
        row = {**entry.case, **entry.measured, **entry.made_with}
        runs.setdefault(entry.made_with["date"], []).append(row)
    found: list[Row] = []
    for group in get_args(Group):
        if group in by_group:
            *_, last = by_group[group].values()
            found += last
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The results as Markdown: aims, then a table a group.

    Args:
        rows: From `latest`.

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
        page += table(
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
        "update": lambda row: f"{shape_of(row)}, r {row['rank']}",
        "compile": lambda row: f"{row['name']}, r {row['rank']}",
        "train": lambda row: f"{row['name']}, r {row['rank']}",
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
            page += table(head, [_cells(row, case(row), timed=timed) for row in mine])
    return "\n".join(page) + "\n"


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
