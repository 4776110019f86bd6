"""What LoFT costs on one GPU: its update beside AdamW's, and whole training steps of a 1B Llama.

The programs of a case are compiled, several at once, and its contestants take turns: a ratio is the
median over rounds of the ratio to the first of them within a round. Beside each update stands what
share of the card's roofline it reaches: the time that its bytes take at the card's own rate of
copying, or its floating-point operations at the card's own rate of float32 products, whichever is
longer, over the time it took. Bytes are those of gradients, states, parameters and updates, each
read or written once; operations those of the full second moment and its direction, which are nearly
all. At the end the fused kernel (`loft_jax.optim.fused_direction`) is compared with plain JAX on
the card.

    python -m benchmarks.gpu          # compiling takes most of the time, a minute or two a case
    python -m benchmarks.gpu --quick  # tiny sizes, on any device: its numbers mean nothing

Cases come in the order of what they tell. Each adds a JSON line a row to `gpu.jsonl` in the folder
of results and prints its table as soon as it is done. A case that has lines of this revision and
this card is not measured again: stop it at any time and start it again.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks.history import RESULTS, History, Row, table
from benchmarks.optimizer.contestants import Contestant, make_optimizer
from benchmarks.optimizer.shapes import llama_shapes, pair_shapes, random_like
from benchmarks.optimizer.train import TINY, random_batch
from benchmarks.optimizer.turns import Turn, take_turns, timing
from loft_jax import LoRAConfig, add_lora
from loft_jax.methods import Full
from loft_jax.models.llama import Llama, LlamaConfig
from loft_jax.optim.full_moment import FullMoment
from loft_jax.optim.fused_direction import on_cuda, on_tpu
from loft_jax.optim.linear_algebra import FactorMatrix, orthonormal_basis
from loft_jax.optim.packed_matrices import packed_size, symmetric_squares
from loft_jax.optim.pairs import Factor, FactorGroup
from loft_jax.optim.second_moments import AdamStep, SecondMomentState
from loft_jax.tasks.causal_lm import CausalLM
from loft_jax.training.model import trained_variables
from loft_jax.training.partition import split_model
from loft_jax.training.step import initial_state, make_step

RANK = 16
UPDATES: tuple[Contestant, ...] = (
    "adamw", "loft", "loft-fused", "loft-factored", "loft-alternate", "loft-alternate-fused",
    "loft-alternate-factored",
)  # fmt: skip
STEPS: tuple[Contestant, ...] = ("adamw", "loft-factored", "loft", "loft-fused")
# Too little memory; no kernel for the card, or none any more.
_CANNOT = (RuntimeError, NotImplementedError, ValueError)
# Of the kernel's error: stack, rows, columns, rank.
KERNELS = ((8, 1024, 1024, 16), (1, 1000, 1030, 5), (1, 1000, 1030, 64))

LLAMA_1B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Options:
    """Measure updates and training steps on the first device.

    Args:
        quick: Tiny sizes and few rounds, to see that it runs.
        rounds: Turns of each contestant of an update.
        train_rounds: Steps of each contestant of a training case.
        rows: Rows of a training batch.
        length: Tokens of a row.
        results: Folder of the results.
    """

    quick: bool = False
    rounds: int = 20
    train_rounds: int = 10
    rows: int = 8
    length: int = 512
    results: Path = RESULTS


class Job(NamedTuple):
    """A program that is compiled while others are, and what it is called with."""

    name: str
    call: Future[Any]
    start: Callable[[], Any]
    """Makes the first state."""
    step: Callable[..., Any]
    """From the program and a state to (result, next state)."""
    bytes: int
    operations: float = 0.0


class Rates(NamedTuple):
    """What the card reaches: bytes a second of a copy, operations a second of a product."""

    copy: float
    product: float


def main(options: Options) -> None:
    """Measures all cases and prints them."""
    if options.quick:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    history = History(options.results, "gpu")
    rates = Rates(
        copy_rate(2**20 if options.quick else 2**30), product_rate(64 if options.quick else 8192)
    )
    print(
        f"{jax.devices()[0].device_kind}: copies {rates.copy / 1e12:.2f} TB/s, multiplies float32 "
        f"at {rates.product / 1e12:.1f} TFLOP/s",
        flush=True,
    )
    done = {
        entry.case["name"]
        for entry in history.read()
        if all(entry.made_with[key] == history.made_with[key] for key in ("revision", "device"))
        and entry.case["quick"] == options.quick
    }
    with ThreadPoolExecutor() as pool:
        for case, begin in cases(pool, options).items():
            if case in done:
                print(f"\n{case}: measured before", flush=True)
                continue
            rows = list(measured(case, begin(), options, rates))
            for name, row in rows:
                about = {"name": case, "rank": RANK, "optimizer": name, "quick": options.quick}
                history.append(about, {**rates._asdict(), **row})
            print("\n".join([f"\n{case}", "", *shown(rows)]), flush=True)
    print()
    for sizes in ((2, 48, 32, 4),) if options.quick else KERNELS:
        try:
            print(f"kernel, {sizes}: {kernel_error(*sizes):.1e} from plain JAX", flush=True)
        except _CANNOT as error:
            _tell(f"kernel, {sizes}", error)


def _tell(what: str, error: Exception) -> None:
    print(f"{what} cannot run: {str(error).partition(chr(10))[0]}", flush=True)


def _compiled(pool: ThreadPoolExecutor, lower: Callable[[], Any]) -> Future[Any]:
    """Traces here, one program after the other, and compiles in a thread."""
    try:
        lowered = lower()
    except _CANNOT as error:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        return failed
    return pool.submit(lowered.compile)


def copy_rate(size: int) -> float:
    """Bytes a second that a copy of `size` float32 numbers reads and writes on the device."""
    x = jnp.arange(size, dtype=jnp.float32)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(copy(x))
    start = time.perf_counter()
    for _ in range(10):
        x = copy(x)
    jax.block_until_ready(x)
    return 10 * 2 * 4 * size / (time.perf_counter() - start)


def product_rate(size: int) -> float:
    """Operations a second of a product of two (size, size) matrices in all bits of float32."""
    x = jnp.ones((size, size), jnp.float32) / size
    multiply = jax.jit(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    y = jax.block_until_ready(multiply(x, x))
    start = time.perf_counter()
    for _ in range(3):
        y = multiply(x, y)
    jax.block_until_ready(y)
    return 3 * 2 * size**3 / (time.perf_counter() - start)


def kernel_error(stack: int, rows: int, columns: int, rank: int) -> float:
    """The largest difference of a direction by the kernel from plain JAX, over its largest element.

    On CPUs the kernel for GPUs is interpreted.
    """
    factor, p, step = direction_arguments(stack, rows, columns, rank, rank_last=True)
    interpreted = functools.partial(on_cuda, interpret=True)
    kernel = {"gpu": on_cuda, "tpu": on_tpu}.get(jax.default_backend(), interpreted)
    numbers = jnp.array([step.correction**-0.5, step.eps, step.limit])
    given = FactorMatrix(p[None]), step.mu, step.basis.q, numbers
    found = step.basis.from_coordinates(step.mu.like(jax.jit(kernel)(*given))).array
    expected = jax.jit(functools.partial(direction, FullMoment(), factor))(p, step)
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


def direction(
    second_moment: FullMoment, factor: FactorGroup, p: jax.Array, step: AdamStep
) -> jax.Array:
    """Adam's direction of a factor, (1, stack, rows, rank) or (1, stack, rank, rows)."""
    return second_moment.direction(factor, SecondMomentState([p], []), step).array


def direction_arguments(
    stack: int, rows: int, columns: int, rank: int, *, rank_last: bool
) -> tuple[FactorGroup, jax.Array, AdamStep]:
    """A factor A if rank_last, else B; its second moments as of rank + 3 gradients; the rest."""
    keys = iter(jax.random.split(jax.random.key(0), rank + 5))

    def laid_out(x: jax.Array, last: bool) -> FactorMatrix:
        return FactorMatrix(x if last else jnp.swapaxes(x, -1, -2), last)

    def normal(length: int) -> jax.Array:
        return jax.random.normal(next(keys), (1, stack, length, rank))

    mu = laid_out(normal(rows), rank_last)
    basis = orthonormal_basis(laid_out(normal(columns), not rank_last))
    squares = (symmetric_squares(FactorMatrix(normal(rows))).array for _ in range(rank + 3))
    p = laid_out(sum(squares, jnp.zeros(())) / (rank + 3), rank_last).array[0]
    factor = FactorGroup((Factor(0, "", (stack,), (0,), (rows,), rank_last=rank_last),))
    return factor, p, AdamStep(mu, basis, jnp.float32(0.5), jnp.float32(1e-8), jnp.float32(3.0))


def cases(pool: ThreadPoolExecutor, options: Options) -> dict[str, Callable[[], list[Job]]]:
    """What begins the compilation of each case, by its name."""
    name, train = train_case(pool, options)
    return {**direction_cases(pool, options), name: train, **update_cases(pool, options)}


def direction_cases(
    pool: ThreadPoolExecutor, options: Options
) -> dict[str, Callable[[], list[Job]]]:
    """Adam's direction with the full second moment, of either factor, in plain JAX and fused."""
    stack, m, n, rank = (2, 48, 32, 4) if options.quick else (16, 2048, 8192, RANK)

    def begin(rows: int, columns: int, *, rank_last: bool) -> list[Job]:
        factor, *given = direction_arguments(stack, rows, columns, rank, rank_last=rank_last)

        def job(name: Contestant, *, fused: bool) -> Job:
            find = functools.partial(direction, FullMoment(fused), factor)
            call = _compiled(pool, lambda: jax.jit(find).lower(*given))
            size = stack * ((rows + columns) * rank + rows * (rank + packed_size(rank)))
            products = 2 * (packed_size(rank) + 2 * rank) * stack * rows * columns
            step = functools.partial(_direction_step, given)
            return Job(name, call, lambda: None, step, 4 * size, products)

        return [job("loft", fused=False), job("loft-fused", fused=True)]

    layers = f"{stack} of {m}x{n}"
    return {
        f"direction of A, {layers}": functools.partial(begin, m, n, rank_last=True),
        f"direction of B, {layers}": functools.partial(begin, n, m, rank_last=False),
    }


def _direction_step(given: list[Any], call: Callable[..., Any], _: None) -> tuple[Any, None]:
    return call(*given), None


def update_cases(pool: ThreadPoolExecutor, options: Options) -> dict[str, Callable[[], list[Job]]]:
    """The optimizer updates."""
    if options.quick:
        shapes = {"2 pairs 48x32": pair_shapes(48, 32, 4, 2)}
    else:
        shapes = {
            "8 pairs 1024x1024": pair_shapes(1024, 1024, RANK, 8),
            "one pair 4096x11008": pair_shapes(4096, 11008, RANK, 1),
            "Llama-2-7B, 224 pairs": llama_shapes(4096, 11008, 32, RANK, stacked=False),
            "Llama-2-7B, 7 stacks of 32": llama_shapes(4096, 11008, 32, RANK, stacked=True),
        }

    def begin(case: str) -> list[Job]:
        names: tuple[Contestant, ...] = UPDATES
        if case.endswith("224 pairs"):
            names = STEPS
        elif "Llama" not in case:
            names = (*UPDATES, "dense")
        return [_update_job(pool, name, shapes[case]) for name in names]

    return {case: functools.partial(begin, case) for case in shapes}


def _update_job(pool: ThreadPoolExecutor, name: Contestant, shapes: Any) -> Job:
    tx = make_optimizer(name)
    state = jax.eval_shape(tx.init, shapes)
    update = jax.jit(tx.update, donate_argnums=1)
    call = _compiled(pool, lambda: update.lower(shapes, state, shapes))
    arrays: dict[str, Any] = {}

    def start() -> Any:
        arrays.update(params=random_like(shapes, 0), gradients=random_like(shapes, 1))
        return tx.init(arrays["params"])

    def step(call: Callable[..., Any], state: Any) -> tuple[Any, Any]:
        return call(arrays["gradients"], state, arrays["params"])

    # Gradients and parameters are read, the updates written, the state both.
    size = 3 * _bytes(shapes) + 2 * _bytes(state)
    return Job(name, call, start, step, size, operations(name, shapes))


def operations(name: Contestant, shapes: Any) -> float:
    """Floating-point operations of the full second moment in an update; of the others, none.

    A direction takes `2 (q + 2 r)` an element of W; a change of basis `2 q²` a row of p.
    """
    if name not in ("loft", "loft-fused", "loft-alternate", "loft-alternate-fused"):
        return 0.0
    directions = 1 if "alternate" in name else 2
    total = 0.0
    for pair in jax.tree.leaves(shapes, is_leaf=lambda x: "lora_a" in x):
        *stack, m, r = pair["lora_a"].shape
        n, q = pair["lora_b"].shape[-1], packed_size(r)
        of_layer = directions * 2 * (q + 2 * r) * m * n + 2 * q * q * (m + n)
        total += math.prod(stack) * of_layer
    return total


def train_case(pool: ThreadPoolExecutor, options: Options) -> tuple[str, Callable[[], list[Job]]]:
    """The training steps: LoRA by each optimizer, and all weights."""
    config = TINY if options.quick else LLAMA_1B
    rows, length = (2, 16) if options.quick else (options.rows, options.length)
    name = "tiny Llama" if options.quick else "Llama of 1.2B weights, bfloat16"

    @functools.cache
    def parts(*, full: bool) -> Any:
        kept = jnp.float32 if full else jnp.bfloat16  # what is trained is kept in float32
        model = Llama(config, dtype=jnp.bfloat16, param_dtype=kept, rngs=nnx.Rngs(0))
        if not full:
            add_lora(model, LoRAConfig(rank=4 if options.quick else RANK), rngs=nnx.Rngs(1))
        model.train()
        return split_model(model, trained_variables(Full()) if full else nnx.LoRAParam)

    def job(label: str, optimizer: Contestant, *, full: bool) -> Job:
        batch = random_batch(rows, length, config.vocab_size)
        tx, split = make_optimizer(optimizer), parts(full=full)
        shapes = jax.eval_shape(functools.partial(initial_state, split, tx))
        jitted: Any = make_step(split, CausalLM().loss, tx)
        call = _compiled(pool, lambda: jitted.lower(shapes, split.frozen, batch))

        def step(call: Callable[..., Any], state: Any) -> tuple[Any, Any]:
            state, metrics = call(state, split.frozen, batch)
            return metrics, state

        begin = functools.partial(initial_state, split, tx)
        return Job(label, call, begin, step, 0)

    def begin() -> list[Job]:
        lora = [job(name, name, full=False) for name in STEPS]
        return [*lora, job("full", "adamw", full=True)]

    return f"{name}, batch {rows}x{length}", begin


def measured(
    case: str, jobs: list[Job], options: Options, rates: Rates
) -> Iterator[tuple[str, Row]]:
    """Times the contestants of a case by turns."""
    turns = {}
    memory: dict[str, Row] = {}
    for job in jobs:
        try:
            call = job.call.result()
            turns[job.name] = Turn(functools.partial(job.step, call), job.start())
            turns[job.name](1)
        except _CANNOT as error:
            turns.pop(job.name, None)
            _tell(f"{job.name} of {case}", error)
            continue
        found = call.memory_analysis()
        reserved = found.argument_size_in_bytes + found.output_size_in_bytes
        reserved += found.temp_size_in_bytes - found.alias_size_in_bytes
        memory[job.name] = {"temp_bytes": found.temp_size_in_bytes, "peak_bytes": reserved}
    update = bool(jobs[0].bytes)
    rounds = 2 if options.quick else options.rounds if update else options.train_rounds
    times = take_turns(turns, rounds, 30.0 if update else math.inf, repeat=update)  # type: ignore[arg-type]  # names of a job
    first = next(iter(times.values()), [])
    for job in jobs:
        if job.name not in turns:
            continue
        turns[job.name].check(f"{job.name} of {case}")
        row = memory[job.name] | timing(times, job.name)  # type: ignore[arg-type]  # as above
        ratios = [x / y for x, y in zip(times[job.name], first, strict=True)]  # type: ignore[index]  # as above
        row["to_first"] = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        if job.bytes:
            least = max(job.bytes / rates.copy, job.operations / rates.product)
            row |= {"bytes": job.bytes, "operations": job.operations}
            row |= {"of_roofline": least / row["seconds"]}
        yield job.name, row


def shown(rows: list[tuple[str, Row]]) -> list[str]:
    """The rows of a case as a table."""
    first = rows[0][0] if rows else ""
    head = ["", "ms", f"time / {first}", "of the roofline", "temporaries MiB", "peak MiB"]
    lines = []
    for name, row in rows:
        low, middle, high = row["to_first"]
        lines.append(
            (
                name,
                f"{1e3 * row['seconds']:.3f}",
                f"{middle:.3f} [{low:.3f}, {high:.3f}]",
                f"{row['of_roofline']:.2f}" if "of_roofline" in row else "",
                f"{row['temp_bytes'] / 2**20:,.1f}",
                f"{row['peak_bytes'] / 2**20:,.1f}",
            )
        )
    return table(head, lines)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.gpu", description=__doc__))
