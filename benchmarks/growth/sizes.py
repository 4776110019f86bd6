"""What grows: the points of each figure, and the floor of an update's cost at a point."""

from typing import Literal, NamedTuple

from benchmarks.optimizer.contestants import Contestant

Size = Literal["rank", "width", "layers", "devices"]

OPTIMIZERS: tuple[Contestant, ...] = ("adamw", "loft-factored", "loft-alternate", "loft")


class Point(NamedTuple):
    """What is updated: pairs of square weights, on some devices."""

    rank: int
    width: int
    layers: int = 1
    stacked: bool = True
    devices: int = 1


def points(size: Size, quick: bool) -> list[Point]:
    """The points of a figure, the smallest first."""
    doubling = [2**k for k in range(14)]
    if size == "rank":
        return [Point(r, 32 if quick else 1024) for r in (doubling[:3] if quick else doubling[:8])]
    if size == "width":
        return [Point(2 if quick else 16, n) for n in (doubling[3:6] if quick else doubling[8:14])]
    rank, width = (2, 16) if quick else (16, 512)
    if size == "layers":
        counts = [1, 2, 3] if quick else [*doubling[:8], 224]
        return [Point(rank, width, k, stacked) for stacked in (True, False) for k in counts]
    return [Point(rank, width, 2 * d, devices=d) for d in (doubling[:2] if quick else doubling[:4])]


def floor(name: Contestant, point: Point) -> tuple[float, float]:
    """What the mathematics asks of one device, in multiples that do not depend on the point.

    Args:
        name: One of `OPTIMIZERS`.
        point: What is updated.

    Returns:
        The operations of an update, and the numbers of the state.
    """
    rank, width, layers, _, devices = point
    rows, packed = 2 * width * layers, rank * (rank + 1) // 2
    if name == "adamw":
        return 2 * rank * rows / devices, 2 * rank * rows / devices
    if name == "loft-factored":
        whole = 2 * rank**2 * layers  # on each device
        return 2 * rank**2 * rows / devices, (1 + 2 * rank) * rows / devices + whole
    moving = 1 if name == "loft-alternate" else 2
    operations = 2 * moving * (packed + 2 * rank) * width**2 * layers + 4 * rank**3 * rows
    return operations / devices, (packed + 2 * rank) * rows / devices
