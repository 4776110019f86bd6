"""The `compile` group: whole models, shapes only."""

import itertools
from collections.abc import Iterator

from tqdm import tqdm

from benchmarks.history import Row
from benchmarks.optimizer.compiling import against_base, compile_update
from benchmarks.optimizer.contestants import DENSE
from benchmarks.optimizer.settings import RANK, Bench
from benchmarks.optimizer.shapes import llama_shapes, pair_shapes


def compile_rows(bench: Bench) -> Iterator[Row]:
    """Measures trace and compile time and the planned memory of updates of whole models.

    Args:
        bench: Its optimizers and quick are used.

    Yields:
        A row for each case and contestant.
    """
    rank = 4 if bench.quick else RANK
    hidden, intermediate, layers = (32, 48, 2) if bench.quick else (4096, 11008, 32)
    cases = {
        "one pair": pair_shapes(hidden, intermediate, rank, 1),
        "Llama-2-7B separate": llama_shapes(hidden, intermediate, layers, rank, stacked=False),
        "Llama-2-7B stacked": llama_shapes(hidden, intermediate, layers, rank, stacked=True),
    }
    todo = [
        (case, name)
        for case, name in itertools.product(cases, bench.optimizers)
        if not (name in DENSE and case.endswith("stacked"))
    ]
    with tqdm(todo, desc="compile", unit="row") as bar:
        for case, name in bar:
            bar.set_postfix_str(f"{case}, {name}")
            shapes = cases[case]
            row = compile_update(name, shapes).costs
            yield {"name": case, "rank": rank, "optimizer": name} | against_base(shapes, row)
