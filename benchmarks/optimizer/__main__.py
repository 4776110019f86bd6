"""Command line: measures the groups that are asked for."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import jax
import jax.numpy as jnp
import tyro

from benchmarks import optimizer
from benchmarks.history import History, Row
from benchmarks.optimizer.compilation import compile_rows
from benchmarks.optimizer.plot import plot
from benchmarks.optimizer.report import latest, markdown
from benchmarks.optimizer.settings import Bench, Group
from benchmarks.optimizer.train import train_rows
from benchmarks.optimizer.update import update_rows
from loft_jax.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, and adds what was measured to the results.

    Args:
        arguments: As typed; by default those of the process.

    Returns:
        The exit code.
    """
    about = (optimizer.__doc__ or "").partition("\n")[0]
    bench = tyro.cli(
        Bench, args=arguments, prog="python -m benchmarks.optimizer", description=about
    )
    if bench.quick:
        bench = dataclasses.replace(
            bench, shapes=("48x32x2",), ranks=(2,), rounds=2, seconds=1.0, train_rounds=2
        )
    # What one case leaves behind must not make the next one compile faster.
    jax.config.update("jax_enable_compilation_cache", False)
    # On a CPU two updates in flight would compete for the same cores.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    measure: dict[Group, Callable[[Bench], Iterator[Row]]] = {
        "update": update_rows,
        "compile": compile_rows,
        "train": train_rows,
    }
    try:
        bench.sizes()
        jax.jit(jnp.linalg.cholesky)(jnp.eye(4))  # starts the compiler: no case pays for that
        history = History(bench.results, "optimizer")
        for group in get_args(Group):
            if group in bench.cases:
                for row in measure[group](bench):
                    history.append(*_split({"group": group, "quick": bench.quick} | row))
        rows = latest(history.read())
        table = markdown(rows)
        (bench.results / "optimizer.md").write_text(table, encoding="utf-8")
    except (InputError, OSError) as error:
        print(f"optimizer: {error}", file=sys.stderr)
        return 2
    print(table)
    if not plot(rows, bench.results / "optimizer.png"):
        print("no plot: matplotlib is not installed (extra `plot`)", file=sys.stderr)
    print(f"results: {bench.results}")
    return 0


def _split(row: Row) -> tuple[Row, Row]:
    """What was measured apart from what it was measured on."""
    case = ("group", "quick", "name", "in", "out", "pairs", "rank", "optimizer")
    return (
        {key: value for key, value in row.items() if key in case},
        {key: value for key, value in row.items() if key not in case},
    )


if __name__ == "__main__":
    sys.exit(main())
