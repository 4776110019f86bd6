"""What LoFT costs on one GPU: its update beside AdamW's, and whole training steps of a 1B Llama.

All programs are compiled first, several at once; then the contestants of each case take turns, and
a ratio is the median over rounds of the ratio within a round. Beside each update stands what share
of the card's own rate of copying it reaches, counting each byte of gradients, states, parameters
and updates read or written once, and nothing else: below 1 the rest goes to arithmetic, to
intermediate arrays and to starting kernels.

    python -m benchmarks.gpu          # some five minutes on an H100
    python -m benchmarks.gpu --quick  # tiny sizes, on any device: its numbers mean nothing

Adds one JSON line a measured row to `gpu.jsonl` in the folder of results, and prints tables.
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
from loft_jax.tasks.causal_lm import CausalLM
from loft_jax.training.model import trained_variables
from loft_jax.training.partition import split_model
from loft_jax.training.step import initial_state, make_step

RANK = 16
UPDATES: tuple[Contestant, ...] = (
    "adamw", "loft", "loft-factored", "loft-alternate", "loft-alternate-factored",
)  # fmt: skip
STEPS: tuple[Contestant, ...] = ("adamw", "loft-factored", "loft")

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


def main(options: Options) -> None:
    """Measures all cases and prints them."""
    if options.quick:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    history = History(options.results, "gpu")
    rate = copy_rate(2**20 if options.quick else 2**30)
    print(f"{jax.devices()[0].device_kind}: copies {rate / 1e12:.2f} TB/s", flush=True)
    with ThreadPoolExecutor(8) as pool:
        # Tracing is done here, one after the other; compiling is done by the threads.
        cases = {**update_jobs(pool, options), **train_jobs(pool, options)}
        for case, jobs in cases.items():
            rows = list(measured(case, jobs, options, rate))
            for name, row in rows:
                about = {"name": case, "rank": RANK, "optimizer": name, "quick": options.quick}
                history.append(about, {"copy_rate": rate, **row})
            print("\n".join([f"\n{case}", "", *shown(rows)]), flush=True)


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


def update_jobs(pool: ThreadPoolExecutor, options: Options) -> dict[str, list[Job]]:
    """The optimizer updates by case, their compilation begun."""
    if options.quick:
        shapes = {"2 pairs 48x32": pair_shapes(48, 32, 4, 2)}
    else:
        shapes = {
            "8 pairs 1024x1024": pair_shapes(1024, 1024, RANK, 8),
            "one pair 4096x11008": pair_shapes(4096, 11008, RANK, 1),
            "Llama-2-7B, 7 stacks of 32": llama_shapes(4096, 11008, 32, RANK, stacked=True),
            "Llama-2-7B, 224 pairs": llama_shapes(4096, 11008, 32, RANK, stacked=False),
        }
    found = {}
    for case, of_case in shapes.items():
        names: tuple[Contestant, ...] = UPDATES
        if case.endswith("224 pairs"):
            names = STEPS
        elif "Llama" not in case:
            names = (*UPDATES, "dense")
        found[case] = [_update_job(pool, name, of_case) for name in names]
    return found


def _update_job(pool: ThreadPoolExecutor, name: Contestant, shapes: Any) -> Job:
    tx = make_optimizer(name)
    state = jax.eval_shape(tx.init, shapes)
    lowered = jax.jit(tx.update, donate_argnums=1).lower(shapes, state, shapes)
    arrays: dict[str, Any] = {}

    def start() -> Any:
        arrays.update(params=random_like(shapes, 0), gradients=random_like(shapes, 1))
        return tx.init(arrays["params"])

    def step(call: Callable[..., Any], state: Any) -> tuple[Any, Any]:
        return call(arrays["gradients"], state, arrays["params"])

    # Gradients and parameters are read, the updates written, the state both.
    size = 3 * _bytes(shapes) + 2 * _bytes(state)
    return Job(name, pool.submit(lowered.compile), start, step, size)


def train_jobs(pool: ThreadPoolExecutor, options: Options) -> dict[str, list[Job]]:
    """The training steps, their compilation begun: LoRA by each optimizer, and all weights."""
    config = TINY if options.quick else LLAMA_1B
    rows, length = (2, 16) if options.quick else (options.rows, options.length)
    name = "tiny Llama" if options.quick else "Llama of 1.2B weights, bfloat16"
    batch = random_batch(rows, length, config.vocab_size)

    @functools.cache
    def parts(*, full: bool) -> Any:
        kept = jnp.float32 if full else jnp.bfloat16  # what is trained is kept in float32
        model = Llama(config, dtype=jnp.bfloat16, param_dtype=kept, rngs=nnx.Rngs(0))
        if not full:
            add_lora(model, LoRAConfig(rank=4 if options.quick else RANK), rngs=nnx.Rngs(1))
        model.train()
        return split_model(model, trained_variables(Full()) if full else nnx.LoRAParam)

    def job(label: str, optimizer: Contestant, *, full: bool) -> Job:
        tx, split = make_optimizer(optimizer), parts(full=full)
        shapes = jax.eval_shape(functools.partial(initial_state, split, tx))
        jitted: Any = make_step(split, CausalLM().loss, tx)
        lowered = jitted.lower(shapes, split.frozen, batch)

        def step(call: Callable[..., Any], state: Any) -> tuple[Any, Any]:
            state, metrics = call(state, split.frozen, batch)
            return metrics, state

        begin = functools.partial(initial_state, split, tx)
        return Job(label, pool.submit(lowered.compile), begin, step, 0)

    jobs = [job(name, name, full=False) for name in STEPS] + [job("full", "adamw", full=True)]
    return {f"{name}, batch {rows}x{length}": jobs}


def measured(
    case: str, jobs: list[Job], options: Options, rate: float
) -> Iterator[tuple[str, Row]]:
    """Times the contestants of a case by turns."""
    turns = {}
    memory: dict[str, Row] = {}
    for job in jobs:
        call = job.call.result()
        found = call.memory_analysis()
        reserved = found.argument_size_in_bytes + found.output_size_in_bytes
        reserved += found.temp_size_in_bytes - found.alias_size_in_bytes
        memory[job.name] = {"temp_bytes": found.temp_size_in_bytes, "peak_bytes": reserved}
        turns[job.name] = Turn(functools.partial(job.step, call), job.start())
    update = bool(jobs[0].bytes)
    rounds = 2 if options.quick else options.rounds if update else options.train_rounds
    times = take_turns(turns, rounds, 30.0 if update else math.inf, repeat=update)  # type: ignore[arg-type]  # names of a job
    for job in jobs:
        turns[job.name].check(f"{job.name} of {case}")
        row = memory[job.name] | timing(times, job.name)  # type: ignore[arg-type]  # as above
        if job.bytes:
            row |= {"bytes": job.bytes, "of_copy_rate": job.bytes / row["seconds"] / rate}
        yield job.name, row


def shown(rows: list[tuple[str, Row]]) -> list[str]:
    """The rows of a case as a table."""
    head = ["optimizer", "ms", "time / adamw", "of the copy rate", "temporaries MiB", "peak MiB"]
    lines = []
    for name, row in rows:
        low, high = row["to_adamw_quartiles"]
        lines.append(
            (
                name,
                f"{1e3 * row['seconds']:.3f}",
                f"{row['to_adamw']:.3f} [{low:.3f}, {high:.3f}]",
                f"{row['of_copy_rate']:.2f}" if "of_copy_rate" in row else "",
                f"{row['temp_bytes'] / 2**20:,.1f}",
                f"{row['peak_bytes'] / 2**20:,.1f}",
            )
        )
    return table(head, lines)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.gpu", description=__doc__))
