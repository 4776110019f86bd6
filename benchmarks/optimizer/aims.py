"""What the measured rows say of the bounds that LoFT should keep."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.history import Row
from benchmarks.optimizer.contestants import DENSE

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


def aims(rows: Sequence[Row]) -> list[Aim]:
    """What the measured rows say of the bounds that LoFT should keep.

    Args:
        rows: From `latest`.

    Returns:
        One for each bound that was measured.
    """
    found = []
    for row in rows:
        name = row["optimizer"]
        if not name.startswith("loft") or row["quick"]:
            continue
        if row["group"] == "compile":
            share = 10.0 if row["name"] == "one pair" else 2.0
            what = f"{name}: {row['name']}, r {row['rank']}"
            if limit := {"separate": 15.0, "stacked": 8.0}.get(row["name"].split()[-1]):
                seconds = row["trace_seconds"] + row["compile_seconds"]
                found.append(Aim(f"{what}, trace + compile", seconds, limit, " s"))
            found.append(Aim(f"{what}, temporaries", 100 * row["temp_share"], share, " % of base"))
        elif row["group"] == "train":
            what = f"{name}: training step, {row['name']}, time / adamw"
            bound = _MOST_OF_A_STEP.get((name, row["name"].rpartition(" ")[2]))
            if "to_adamw" in row and bound:
                found.append(Aim(what, row["to_adamw"], bound, ""))
        elif (row["in"], row["out"], row["pairs"], row["rank"]) == (1024, 1024, 8, 16):
            what = f"{name}: {shape_of(row)}, r 16"
            for dense in DENSE:
                if f"to_{dense}" in row:
                    faster = 1 / row[f"to_{dense}"]
                    found.append(Aim(f"{what}, times faster than {dense}", faster, 3.0, "", True))
                for other in rows:
                    if other["optimizer"] == dense and _same_case(row, other):
                        share = row["temp_bytes"] / other["temp_bytes"]
                        found.append(Aim(f"{what}, temporaries / {dense}", share, 0.1, ""))
    return found


def shape_of(row: Row) -> str:
    """The weights of an update case, in words."""
    return f"{row['in']}x{row['out']}" + (f" x {row['pairs']}" if row["pairs"] > 1 else "")


def _same_case(row: Row, other: Row) -> bool:
    keys = ("group", "in", "out", "pairs", "rank")
    return all(row.get(key) == other.get(key) for key in keys)
