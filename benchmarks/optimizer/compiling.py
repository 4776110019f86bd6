"""Compiling ahead of time, with what that takes."""

import time
from typing import Any, NamedTuple

import jax

from benchmarks.history import Row
from benchmarks.optimizer.contestants import Contestant, make_optimizer
from benchmarks.optimizer.shapes import base_bytes
from loft_jax import state_bytes


class Compiled(NamedTuple):
    """A jitted function compiled ahead of time, with what that took.

    Attributes:
        call: The compiled function.
        costs: `trace_seconds`, `compile_seconds`, `temp_bytes` and `peak_bytes` (arguments,
            results and temporaries together, donated ones once).
    """

    call: jax.stages.Compiled
    costs: Row


def compile_update(name: Contestant, shapes: Any) -> Compiled:
    """Compiles an update with donated state, from shapes alone.

    Args:
        name: Of the contestant.
        shapes: Its parameters.

    Returns:
        The update, from (gradients, state, parameters) to (updates, state); and the costs of
        `compile_cold` with `state_bytes`.
    """
    tx = make_optimizer(name)
    state = jax.eval_shape(tx.init, shapes)
    call, costs = compile_cold(jax.jit(tx.update, donate_argnums=1), shapes, state, shapes)
    return Compiled(call, costs | {"state_bytes": state_bytes(tx, shapes)})


def compile_cold(jitted: Any, *arguments: Any) -> Compiled:
    """Traces and compiles with nothing left of what was compiled before.

    Args:
        jitted: A function under `jax.jit`.
        arguments: Its arguments, or their shapes.

    Returns:
        The compiled function with its costs.
    """
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jitted.lower(*arguments)
    traced = time.perf_counter()
    call = lowered.compile()
    done = time.perf_counter()
    memory = call.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    costs = {
        "trace_seconds": traced - start,
        "compile_seconds": done - traced,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak,
    }
    return Compiled(call, costs)


def against_base(shapes: Any, row: Row) -> Row:
    """A row with its temporaries as a share of the base weight in bfloat16."""
    size = base_bytes(shapes)
    return row | {"base_bytes": size, "temp_share": row["temp_bytes"] / size}
