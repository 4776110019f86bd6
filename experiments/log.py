"""The runs of a comparison, and the log they are kept in.

A comparison is a grid of cells, methods x ranks x learning rates x seeds. Each cell that has run is
one line of JSON.
"""

import dataclasses
import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loft_jax.errors import InputError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Args:
        task: Name of the task.
        method: Name of the method.
        rank: Of the adapters; 0 for a method without.
        learning_rate: Peak learning rate.
        seed: Of the start and of the order of the data.
        eps: Adam's epsilon.
        alpha: LoRA's alpha; None is the rank.
    """

    task: str
    method: str
    rank: int
    learning_rate: float
    seed: int = 0
    eps: float = 1e-8
    alpha: float | None = None

    @property
    def setting(self) -> "Setting":
        """What it has in common with the cells of other learning rates and seeds."""
        return Setting(self.task, self.method, self.rank, self.eps, self.alpha)


class Setting(NamedTuple):
    """A method as it is swept: all of a cell but its learning rate and its seed."""

    task: str
    method: str
    rank: int
    eps: float = 1e-8
    alpha: float | None = None

    def cell(self, learning_rate: float, seed: int) -> Cell:
        """A run of it."""
        return Cell(self.task, self.method, self.rank, learning_rate, seed, self.eps, self.alpha)


@dataclass(frozen=True)
class Result:
    """What a cell came to.

    Args:
        cell: Which one.
        train: Mean training loss over stretches of the run of one length, in their order.
        validation: Measures by name, `loss` among them, which is infinite where the run diverged.
        test: The same on the test set; empty where it was not measured.
        cost: Figures of time and memory, by name.
        made_with: Versions and settings of the run.
        right: Of each row of the test whether it was right, as "1" or "0", by the name of an
            accuracy.
    """

    cell: Cell
    train: tuple[float, ...]
    validation: Mapping[str, float]
    test: Mapping[str, float]
    cost: Mapping[str, float]
    made_with: Mapping[str, Any]
    right: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        """Whether the loss stopped being a number."""
        return not math.isfinite(self.validation["loss"])


def grid(
    task: str,
    methods: Iterable[str],
    ranks: Iterable[int],
    rates: Iterable[float],
    seeds: Iterable[int],
    *,
    without_rank: Iterable[str] = (),
    eps: float = 1e-8,
    alpha: float | None = None,
) -> list[Cell]:
    """All cells of a sweep, the first seed of everything first.

    Args:
        task: Name of the task.
        methods: Names of the methods.
        ranks: Ranks that each method runs at.
        rates: Learning rates that each method runs at.
        seeds: Seeds that each method runs with.
        without_rank: Methods that run once, at rank 0, whatever the ranks.
        eps: Adam's epsilon.
        alpha: LoRA's alpha; None is the rank.

    Returns:
        The cells, each once.

    Raises:
        InputError: A rank below 1.

    Example:
        >>> cells = grid("toy", ["loft", "full"], [1, 2], [0.1, 0.3], [0], without_rank=["full"])
        >>> [(c.method, c.rank) for c in cells]
        [('loft', 1), ('loft', 1), ('loft', 2), ('loft', 2), ('full', 0), ('full', 0)]
    """
    plain, ranks = set(without_rank), tuple(ranks)
    if low := [rank for rank in ranks if rank < 1]:
        raise InputError(f"rank is {low[0]}, expected 1 or more")

    def cell(method: str, rank: int, rate: float, seed: int) -> Cell:
        if method in plain:
            return Cell(task, method, 0, rate, seed, eps)
        return Cell(task, method, rank, rate, seed, eps, None if alpha == rank else alpha)

    product = itertools.product(seeds, methods, ranks, rates)
    return list(
        dict.fromkeys(cell(method, rank, rate, seed) for seed, method, rank, rate in product)
    )


class ResultLog:
    """Results as lines of JSON, in a file that is added to."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the log.

        Args:
            path: The file, in a folder that is there once results are added.
        """
        self.path = Path(path)

    def read(self) -> list[Result]:
        """All results; of a cell that is there twice, the one with a test, or else the last.

        A line that a killed process has left unfinished does not count, and is told.

        Raises:
            InputError: A line is no result; the message names the file and the line.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_text("utf-8").splitlines()
        found: dict[Cell, Result] = {}
        for number, line in enumerate(lines, 1):
            if (result := self._parsed(line, number)) is None:
                continue
            before = found.get(result.cell)
            if before is None or result.test or not before.test:
                found[result.cell] = result
        return list(found.values())

    def append(self, result: Result) -> None:
        """Adds a result: one write, so that several processes may share the file."""
        values = dataclasses.asdict(result)
        line = json.dumps({**values.pop("cell"), **_finite(values)}, allow_nan=False)
        with self.path.open("ab+") as file:
            # After a line that was cut off, one of its own.
            cut_off = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write(f"{chr(10) if cut_off else ''}{line}\n".encode())

    def _parsed(self, line: str, number: int) -> Result | None:
        names = [field.name for field in dataclasses.fields(Cell)]
        try:
            read = json.loads(line)
        except json.JSONDecodeError:
            _log.warning("%s: line %d is unfinished; its run does not count", self.path, number)
            return None
        try:
            values = _restored(read)
            cell = Cell(**{name: values.pop(name) for name in names})
            return Result(cell, tuple(values.pop("train")), **values)
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path}: line {number} is no result ({error!r}); remove it to run it again"
            ) from error


def _finite(value: Any) -> Any:
    """What JSON has no number for, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _restored(value: Any) -> Any:
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, dict):
        return {key: _restored(inner) for key, inner in value.items()}
    return [_restored(inner) for inner in value] if isinstance(value, list) else value
