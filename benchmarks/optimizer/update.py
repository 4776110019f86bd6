"""The `update` group: one shape, many contestants."""

import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from benchmarks.history import Row
from benchmarks.optimizer.compiling import against_base, compile_update
from benchmarks.optimizer.contestants import Contestant, make_optimizer
from benchmarks.optimizer.settings import Bench
from benchmarks.optimizer.shapes import pair_shapes, random_like
from benchmarks.optimizer.turns import Turn, take_turns, timing


def update_rows(bench: Bench) -> Iterator[Row]:
    """Measures updates over shapes and ranks.

    Args:
        bench: Its shapes, ranks, rounds, seconds, memory_gib and optimizers are used.

    Yields:
        A row for each case and contestant.
    """
    cases = [
        (shape, rank)
        for shape, rank in itertools.product(bench.sizes(), bench.ranks)
        if rank <= min(shape[:2])
    ]
    with tqdm(total=len(cases) * len(bench.optimizers), desc="update", unit="row") as bar:
        for (m, n, pairs), rank in cases:
            bar.set_postfix_str(f"{m}x{n} x {pairs}, r {rank}")
            case = {"in": m, "out": n, "pairs": pairs, "rank": rank}
            shapes = pair_shapes(m, n, rank, pairs)
            for row in _update_case(bench, shapes, bar):
                yield case | against_base(shapes, row)
            gc.collect()  # the arrays of a case go before the next one comes


def _update_case(bench: Bench, shapes: Any, bar: "tqdm[Any]") -> Iterator[Row]:
    rows: dict[Contestant, Row] = {}
    turns: dict[Contestant, Turn] = {}
    params, gradients = random_like(shapes, 0), random_like(shapes, 1)

    def step(call: Callable[..., Any], state: Any) -> tuple[Any, Any]:
        updates, state = call(gradients, state, params)
        return updates, state

    for name in bench.optimizers:
        call, rows[name] = compile_update(name, shapes)
        needed = rows[name]["peak_bytes"] / 2**30
        if needed > bench.memory_gib:
            reason = f"needs {needed:.1f} GiB, over the {bench.memory_gib:g} GiB that are allowed"
            rows[name]["skipped"] = reason
        else:
            state = make_optimizer(name).init(params)
            turns[name] = Turn(functools.partial(step, call), state)
        bar.update()
    times = take_turns(turns, bench.rounds, bench.seconds)
    for name in turns:
        rows[name] |= timing(times, name)
        turns[name].check(name)
    for name, row in rows.items():
        yield {"optimizer": name} | row
