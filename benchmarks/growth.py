r"""How the cost of an update grows: with the rank, the width, the layers and the devices.

For LoFT with the exact second moment, along the tangent space and alternating, for LoFT with the
factored one, and for AdamW on the factors (LoRA): the time of a jitted update, and the bytes of the
optimizer's state on a device, over sizes of which one grows:

- `rank`: one pair of a square weight.
- `width`: one pair of a square weight, at rank 16.
- `layers`: as one stack of pairs, and as separate pairs.
- `devices`: a stack of layers whose number grows with that of the devices, the rows of A and the
  columns of B split over these: the same work for each of them.

**The floor.** Let W be (m, n), and `q = r (r + 1) / 2` the numbers of a symmetric matrix. The
exact direction has an inner product of q numbers and one of r for each element of W, and adds each
element to r sums: `2 (q + 2 r) m n` operations, for each factor that moves, both or one. Its state
moves to another basis by two products of (r, r) matrices for each of the m + n rows, `4 r³`
operations. So the time is quadratic in the width, as W is, and quadratic in the rank, cubic where
the width is not much larger than the rank. Factored, all is products of (rows, r) by (r, r), `2 r²`
operations a row each, and AdamW has 2 r numbers a row to move: linear in the width, quadratic and
linear in the rank. All are linear in the layers. The states are `q + 2 r`, `1 + 2 r` and `2 r`
numbers a row, linear in the width; the factored one has two (r, r) matrices a pair besides, which
are whole on each device.

A slope is that of the straight line through the logarithms, by least squares: 2 means quadratic.
The floor's is that of the same line through its operations or numbers at the same sizes. "Last" are
the slopes between the two largest sizes: small updates grow less than the floor does, since what
takes time there is to start the program and its loops. Figures have the floors dashed, from the
largest size down; both moves of the exact second moment have the same state.

**Devices.** They are threads on the cores of one machine, which all devices share, so that an
update takes the time of the work of all of them. Its time is therefore divided by their number: it
stays the same as long as the work of each device does, which is the floor. "Sent" are the results
of collectives on a device.

Contestants take turns, as in `benchmarks.optimizer`. A point is left out where its program would
hold more memory, or an update would take longer, than the options say. Adds a JSON line a row to
`growth.jsonl` in the folder of results, and writes the latest run of each size as a page with a
figure each.

    python -m benchmarks.growth
    python -m benchmarks.growth --against rank devices
    python -m benchmarks.growth --quick --results runs/quick
"""

import gc
import math
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from benchmarks.history import RESULTS, Entry, History, Row, table
from benchmarks.optimizer.compiling import compile_cold
from benchmarks.optimizer.contestants import Contestant, make_optimizer
from benchmarks.optimizer.plot import save
from benchmarks.optimizer.shapes import pair_shapes, random_like
from benchmarks.optimizer.turns import Turn, take_turns, timing
from loft_jax import state_shardings
from loft_jax.errors import InputError
from loft_jax.training.collectives import find_collectives

Size = Literal["rank", "width", "layers", "devices"]

OPTIMIZERS: tuple[Contestant, ...] = ("adamw", "loft-factored", "loft-alternate", "loft")


class Point(NamedTuple):
    """What is updated: pairs of square weights, on some devices."""

    rank: int
    width: int
    layers: int = 1
    stacked: bool = True
    devices: int = 1


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


def latest(entries: Iterable[Entry]) -> dict[Size, list[Entry]]:
    """The entries of the latest run of each size."""
    runs: dict[Size, dict[str, list[Entry]]] = {size: {} for size in get_args(Size)}
    for entry in entries:
        runs[entry.case["against"]].setdefault(entry.made_with["date"], []).append(entry)
    return {size: found[max(found)] for size, found in runs.items() if found}


class Line(NamedTuple):
    """A contestant's points in a figure, those that were measured.

    Attributes:
        label: Its name, and how layers are kept where that differs.
        sizes: What grows.
        seconds: Of an update, over the number of devices.
        state: Bytes on a device.
        rows: What was measured.
        floors: Operations and numbers at the same points.
    """

    label: str
    sizes: list[int]
    seconds: list[float]
    state: list[int]
    rows: list[Row]
    floors: list[tuple[float, float]]


def lines(size: Size, entries: Sequence[Entry]) -> list[Line]:
    """The lines of a figure, in the order of the contestants."""
    found: dict[str, Line] = {}
    for case, row, _ in entries:
        if "seconds" in row:
            point = Point(*(case[name] for name in Point._fields))
            label = case["optimizer"]
            if size == "layers":
                label += ", stacked" if point.stacked else ", separate"
            line = found.setdefault(label, Line(label, [], [], [], [], []))
            line.sizes.append(case[size])
            line.seconds.append(row["seconds"] / point.devices)
            line.state.append(row["state_bytes"])
            line.rows.append(row)
            line.floors.append(floor(case["optimizer"], point))
    return list(found.values())


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the straight line through logarithms, by least squares.

    Example:
        >>> round(slope([1, 2, 4], [3, 12, 48]), 6)  # quadratic
        2.0
    """
    x, y = np.log(sizes), np.log(values)
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x @ x))


_WHAT: dict[Size, str] = {
    "rank": "One pair of {width}x{width}.",
    "width": "One pair of width x width, rank {rank}.",
    "layers": "Pairs of {width}x{width}, rank {rank}, as one stack and as separate leaves.",
    "devices": "A stack of two layers a device, {width}x{width}, rank {rank}; ms are over devices.",
}


def page(found: dict[Size, list[Entry]], name: str) -> str:
    """The page.

    Args:
        found: From `latest`.
        name: What the names of its figures begin with.

    Returns:
        Markdown.
    """
    about = (__doc__ or "").split("\n\n")
    text = ["# How cost grows", "", *"\n\n".join(about[1:-2]).splitlines(), ""]
    text += ["```console", "$ python -m benchmarks.growth --page docs/evidence/growth.md", "```"]
    for size, entries in found.items():
        case, made = entries[0].case, entries[0].made_with
        text += ["", f"## {size.capitalize()}", ""]
        if case["quick"]:
            text += ["Sizes are those of `--quick`: these numbers mean nothing.", ""]
        machine = f"{made['cores']} cores, {made['machine']}"
        text += [f"{_WHAT[size].format(**case)} Measured on {machine},"]
        text += [f"with jax {made['jax']}, at revision {made['revision']}.", ""]
        text += [f"![Time and state over {size}]({name}-{size}.png)", ""]
        drawn = lines(size, entries)
        text += [*_slopes(size, drawn), "", *_times(size, drawn)]
        for entry in entries:
            if "skipped" in entry.measured:
                what = f"{entry.case['optimizer']} at {size} {entry.case[size]}"
                text += ["", f"Left out: {what}, {entry.measured['skipped']}."]
    return "\n".join(text) + "\n"


def _slopes(size: Size, drawn: Sequence[Line]) -> list[str]:
    head = ["optimizer", size, "ms", "slope", "floor", "last", "floor"]
    head += ["state MB", "slope", "floor", "trace + compile s"]
    head += ["sent MB"] if size == "devices" else []
    rows = []
    for line in drawn:
        operations, numbers = zip(*line.floors, strict=True)
        compiled = [row["trace_seconds"] + row["compile_seconds"] for row in line.rows]
        cells = [line.label, _range(line.sizes), _range([1e3 * x for x in line.seconds])]
        for values in (line.seconds, operations):
            cells.append(_slope(line.sizes, values))
        for values in (line.seconds, operations):
            cells.append(_slope(line.sizes[-2:], values[-2:]))
        cells.append(_range([x / 1e6 for x in line.state]))
        cells += [_slope(line.sizes, values) for values in (line.state, numbers)]
        cells.append(_range(compiled))
        if size == "devices":
            cells.append(_range([row["sent_bytes"] / 1e6 for row in line.rows]))
        rows.append(cells)
    return table(head, rows)


def _range(values: Sequence[float]) -> str:
    first, last = (f"{value:.3g}" for value in (values[0], values[-1]))
    return f"{first} to {last}"


def _slope(sizes: Sequence[float], values: Sequence[float]) -> str:
    # Adding zero makes 0 of -0.
    return f"{round(slope(sizes, values), 2) + 0.0:.2f}" if len(set(sizes)) > 1 else "-"


def _times(size: Size, drawn: Sequence[Line]) -> list[str]:
    """Milliseconds at each point."""
    sizes = sorted({x for line in drawn for x in line.sizes})
    times = [dict(zip(line.sizes, line.seconds, strict=True)) for line in drawn]
    rows = [[str(x), *(f"{1e3 * t[x]:.3g}" if x in t else "-" for t in times)] for x in sizes]
    return table([f"ms at {size}", *(line.label for line in drawn)], rows)


def draw(size: Size, drawn: Sequence[Line], path: Path) -> bool:
    """Draws time and state, with the floors' slopes from the largest size down.

    Args:
        size: What grows.
        drawn: From `lines`.
        path: PNG file to write.

    Returns:
        Whether matplotlib is installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, line in enumerate(drawn):
        operations, numbers = zip(*line.floors, strict=True)
        for axes, values, least in ((left, line.seconds, operations), (right, line.state, numbers)):
            style = "s:" if line.label.endswith("separate") else "o-"
            color = f"C{place % len(OPTIMIZERS)}"
            axes.plot(line.sizes, values, style, color=color, label=line.label, markersize=4)
            if not line.label.endswith("separate"):
                floors = [values[-1] * x / least[-1] for x in least]
                axes.plot(line.sizes, floors, "--", color=color, linewidth=0.8)
    over = " / devices" if size == "devices" else ""
    left.set_ylabel(f"seconds of an update{over}")
    right.set_ylabel("bytes of state on a device")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel=size)
        axes.set_xticks(sorted({x for line in drawn for x in line.sizes}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    save(figure, path)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, adds what was measured to the results, and writes the page.

    Args:
        arguments: As typed; by default those of the process.

    Returns:
        The exit code.
    """
    about = (__doc__ or "").partition("\n")[0]
    options = tyro.cli(
        Options, args=arguments, prog="python -m benchmarks.growth", description=about
    )
    jax.config.update("jax_platforms", "cpu")
    history = History(options.results, "growth")
    target = options.page or options.results / "growth.md"
    try:
        for size in options.against:
            rows = sweep(size, options)
            for point, name, row in tqdm(rows, desc=size, unit="row"):
                case = {"against": size, "quick": options.quick, **point._asdict()}
                history.append(case | {"optimizer": name}, row)
        found = latest(history.read())
        text = page(found, target.stem)
        target.write_text(text, encoding="utf-8")
    except (InputError, OSError) as error:
        print(f"growth: {error}", file=sys.stderr)
        return 2
    print(text)
    for size, entries in found.items():
        if not draw(size, lines(size, entries), target.with_name(f"{target.stem}-{size}.png")):
            print("no figures: matplotlib is not installed (extra `plot`)", file=sys.stderr)
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
