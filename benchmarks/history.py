"""What benchmarks measure over time: one JSON line a measured row, in `benchmarks/results/`.

A line holds the case, what was measured of it, and what it was made with: the date that the run
began, the git revision, the machine and the versions of packages. Lines are only ever added.

    python -m benchmarks.history rounding                             # the runs that there are
    python -m benchmarks.history rounding --compare 2026-11 1f3c9ab   # by date or by revision
"""

import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro

from loft_jax.errors import InputError

Row = dict[str, Any]

RESULTS = Path("benchmarks/results")
"""The results that are kept, from the root of the repository."""

_PACKAGES = ("loft-jax", "jax", "jaxlib", "libtpu", "flax", "optax")


class Entry(NamedTuple):
    """One line.

    Attributes:
        case: What was measured on; equal cases are compared with each other.
        measured: Measures by name.
        made_with: Date, revision, machine and versions.
    """

    case: Row
    measured: Row
    made_with: Row


class History:
    """The lines of one benchmark.

    Args:
        folder: Of the results; it need not be there.
        benchmark: Its name.
    """

    def __init__(self, folder: Path, benchmark: str) -> None:
        self.path = folder / f"{benchmark}.jsonl"

    @functools.cached_property
    def made_with(self) -> Row:
        """What the lines of this run are made with; one date for all of them."""
        return made_with()

    def read(self) -> list[Entry]:
        """All lines, the oldest first; not the unfinished one of a run that was killed."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [Entry(**json.loads(line)) for line in lines]

    def append(self, case: Row, measured: Row) -> None:
        """Adds a line, in the place of an unfinished one.

        Args:
            case: What was measured on.
            measured: Measures by name.
        """
        line = json.dumps(Entry(case, measured, self.made_with)._asdict()) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line.encode())


def made_with() -> Row:
    """What measurements of now are made with."""
    installed = {dist.name for dist in importlib.metadata.distributions()}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "machine": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES if name in installed},
    }


def _revision() -> str:
    """The commit, and whether files differ from it; "unknown" outside a checkout."""
    git = ("git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*")
    try:
        done = subprocess.run(
            git, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def runs(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The entries of each run, by its date."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.made_with["date"], []).append(entry)
    return found


def listed(entries: Iterable[Entry]) -> str:
    """A table of the runs.

    Args:
        entries: Of one benchmark.

    Returns:
        Markdown, one line a run.
    """
    names = ("date", "revision", "machine", "cores", "device", "jax")
    rows = [
        [*(str(run[0].made_with[name]) for name in names), str(len(run))]
        for run in runs(entries).values()
    ]
    return "\n".join(table([*names, "rows"], rows))


def compared(entries: Sequence[Entry], before: str, after: str) -> str:
    """A table of two runs side by side.

    Args:
        entries: Of one benchmark.
        before: How the date or the revision of a run begins; of several, the last counts.
        after: The same of the run to compare with it.

    Returns:
        Markdown, one line a number that both runs have measured on the same case.

    Raises:
        InputError: There is no such run.
    """
    old, new = (_chosen(entries, start) for start in (before, after))
    rows = []
    for case, measured in new.items():
        for name, value in measured.items():
            other = old.get(case, {}).get(name)
            if _is_number(value) and _is_number(other):
                ratio = f"{value / other:.3g}" if other else "-"
                rows.append([case, name, f"{other:.4g}", f"{value:.4g}", ratio])
    return "\n".join(table(("case", "measure", before, after, "after / before"), rows))


def _chosen(entries: Sequence[Entry], start: str) -> dict[str, Row]:
    """The measures of a run by case, in words."""
    for date, run in reversed(runs(entries).items()):
        if date.startswith(start) or run[0].made_with["revision"].startswith(start):
            return {
                ", ".join(f"{key} {value}" for key, value in entry.case.items()): entry.measured
                for entry in run
            }
    raise InputError(f"there is no run whose date or revision begins with {start!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


@dataclass(frozen=True)
class Options:
    """Which runs to show."""

    benchmark: tyro.conf.Positional[str]
    """Name of the benchmark."""
    compare: tuple[str, str] | None = None
    """Two runs to compare, by how their dates or revisions begin; by default all are listed."""
    results: Path = RESULTS
    """Folder of the results."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Lists the runs of a benchmark, or compares two of them.

    Args:
        arguments: As typed; by default those of the process.

    Returns:
        The exit code.
    """
    about = (__doc__ or "").partition("\n")[0]
    options = tyro.cli(
        Options, args=arguments, prog="python -m benchmarks.history", description=about
    )
    history = History(options.results, options.benchmark)
    try:
        if not (entries := history.read()):
            raise InputError(f"{history.path} has no results")
        print(compared(entries, *options.compare) if options.compare else listed(entries))
    except InputError as error:
        print(f"history: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
