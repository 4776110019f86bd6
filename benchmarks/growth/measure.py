"""Measures updates at the points of a figure."""

import gc
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.growth.sizes import OPTIMIZERS, Point, Size, floor, points
from benchmarks.history import RESULTS, Row
from benchmarks.optimizer.compiling import compile_cold
from benchmarks.optimizer.contestants import Contestant, make_optimizer
from benchmarks.optimizer.shapes import pair_shapes, random_like
from benchmarks.optimizer.turns import Turn, take_turns, timing
from loft_jax import state_shardings
from loft_jax.training.collectives import find_collectives


@dataclass(frozen=True)
class Options:
    """Measure how an update's time and state grow.

    Args:
        against: What grows.
        rounds: Turns of each contestant at a point, at most.
        seconds: Time for the turns of a point; they end early, but not before three rounds.
        most_seconds: Of an update; where, by the point before, it takes longer, it is skipped.
        memory_gib: That the program of an update may hold; above it, it is skipped.
        results: Folder of the rows: add to those that are kept, or start others.
        page: Markdown page to write, with its figures beside it; by default `growth.md` in the
            folder of results.
        quick: Tiny sizes, to see that it runs: its numbers mean nothing.
    """

    against: tuple[Size, ...] = get_args(Size)
    rounds: int = 12
    seconds: float = 3.0
    most_seconds: float = 4.0
    memory_gib: float = 8.0
    results: Path = RESULTS
    page: Path | None = None
    quick: bool = False


def measured(point: Point, names: Sequence[Contestant], options: Options) -> dict[Contestant, Row]:
    """Compiles and times the updates of a point by turns, on all devices of this process.

    Args:
        point: What is updated; its devices are those of the process.
        names: Of the contestants.
        options: rounds, seconds and memory_gib are used.

    Returns:
        A row a contestant.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    # On a CPU two updates in flight would compete for the same cores.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mesh = Mesh(np.array(jax.devices()[: point.devices]), ("rows",))

    def place(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> NamedSharding:
        axes: list[str | None] = [None] * len(shape.shape)
        axes[-2 if path[-1].key == "lora_a" else -1] = "rows"
        return NamedSharding(mesh, PartitionSpec(*axes))

    shapes = pair_shapes(point.width, point.width, point.rank, point.layers, stacked=point.stacked)
    places = jax.tree_util.tree_map_with_path(place, shapes)
    params, gradients = (jax.device_put(random_like(shapes, seed), places) for seed in (0, 1))
    rows: dict[Contestant, Row] = {}
    turns: dict[Contestant, Turn] = {}
    for name in names:
        tx = make_optimizer(name)
        layout = state_shardings(tx, shapes, places)
        call, row = compile_cold(
            jax.jit(
                tx.update,
                donate_argnums=1,
                in_shardings=(places, layout, places),
                out_shardings=(places, layout),
            ),
            shapes,
            state := jax.eval_shape(tx.init, shapes),
            shapes,
        )
        row["state_bytes"] = sum(
            math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize
            for x, where in zip(jax.tree.leaves(state), jax.tree.leaves(layout), strict=True)
        )
        row["sent_bytes"] = sum(found.bytes for found in find_collectives(call.as_text() or ""))
        rows[name] = row
        needed = row["peak_bytes"] * point.devices / 2**30
        if needed > options.memory_gib:
            row["skipped"] = f"needs {needed:.1f} GiB, over the {options.memory_gib:g} GiB allowed"
            continue

        def step(state: Any, call: Any = call) -> tuple[Any, Any]:
            updates, state = call(gradients, state, params)
            if point.devices > 1:  # of several runs at once, devices can wait for each other
                jax.block_until_ready((updates, state))
            return updates, state

        turns[name] = Turn(step, jax.jit(tx.init, out_shardings=layout)(params))
    times = take_turns(turns, options.rounds, options.seconds)
    for name in turns:
        rows[name] |= timing(times, name)
        turns[name].check(name)
    return rows


def _start(devices: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def sweep(size: Size, options: Options) -> Iterator[tuple[Point, Contestant, Row]]:
    """Measures the points of a figure.

    Args:
        size: What grows.
        options: All but `against` and where things are written are used.

    Yields:
        A row for each point and contestant; those that are left out have `skipped`, the reason.
    """
    known: dict[Contestant, float] = {}  # seconds for an operation, at the point before
    for point in points(size, options.quick):
        rows: dict[Contestant, Row] = {}
        for name in OPTIMIZERS:
            seconds = known.get(name, 0.0) * floor(name, point)[0] * point.devices
            if seconds > options.most_seconds:
                allowed = f"over the {options.most_seconds:g} s allowed"
                rows[name] = {"skipped": f"would take about {seconds:.1f} s, {allowed}"}
        names = [name for name in OPTIMIZERS if name not in rows]
        if size == "devices":  # JAX counts them as it starts
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, spawn, _start, (point.devices,)) as pool:
                rows |= pool.submit(measured, point, names, options).result()
        else:
            rows |= measured(point, names, options)
        for name in OPTIMIZERS:
            if "seconds" in rows[name]:
                known[name] = rows[name]["seconds"] / (floor(name, point)[0] * point.devices)
            yield point, name, rows[name]
        gc.collect()  # the arrays of a point go before the next one comes
