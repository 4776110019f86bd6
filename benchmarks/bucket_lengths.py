"""Measures how long a run compiles whose batches have several lengths.

A step is two programs, of which the optimizer's is shared by all lengths. That is compared with a
program of the whole step for each length.

    python -m benchmarks.bucket_lengths
"""

import functools
import time
from dataclasses import dataclass
from typing import Any

import jax
import tyro
from flax import nnx

from benchmarks.history import table
from benchmarks.optimizer.contestants import Contestant, make_optimizer
from benchmarks.optimizer.settings import RANK, Bench
from benchmarks.optimizer.train import load_model, random_batch
from loft_jax import LoRAConfig, add_lora
from loft_jax.tasks.causal_lm import CausalLM
from loft_jax.training.partition import split_model
from loft_jax.training.step import initial_state, make_step


@dataclass(frozen=True)
class Options:
    """What to compile."""

    lengths: tuple[int, ...] = (32, 64, 96, 128)
    """Lengths of the batches."""
    rows: int = 4
    """Rows of the batches."""
    optimizers: tuple[Contestant, ...] = ("adamw", "loft-factored", "loft")
    """Optimizers of the step."""
    model: str = Bench.model
    """Model; where the file is missing, the same sizes with random weights."""
    quick: bool = False
    """A tiny model, to see that it runs: its numbers mean nothing."""


def main(options: Options) -> None:
    """Measures all optimizers, and prints a table."""
    jax.config.update("jax_enable_compilation_cache", False)
    model, _ = load_model(Bench(model=options.model, quick=options.quick))
    add_lora(model, LoRAConfig(rank=4 if options.quick else RANK), rngs=nnx.Rngs(0))
    model.train()
    parts = split_model(model, nnx.LoRAParam)
    batches = [random_batch(options.rows, n, model.config.vocab_size) for n in options.lengths]
    lines = []
    for name in options.optimizers:
        tx = make_optimizer(name)
        state = jax.eval_shape(functools.partial(initial_state, parts, tx))
        step = make_step(parts, CausalLM().loss, tx)
        arguments = [(state.params, state.streams, parts.frozen, batch) for batch in batches]
        *sums, _ = jax.eval_shape(step.gradients, *arguments[0])
        gradients = sum(compile_seconds(step.gradients, *given) for given in arguments)
        update = compile_seconds(step.update, state, *sums)
        whole = sum(compile_seconds(step, state, parts.frozen, batch) for batch in batches)
        cells = (gradients, update, whole)
        lines.append([name, *(f"{x:.1f}" for x in cells), f"{(gradients + update) / whole:.2f}"])
    head = ("optimizer", "gradients s", "update s", "a program a length s", "ratio")
    print("\n".join(table(head, lines)))


def compile_seconds(jitted: Any, *arguments: Any) -> float:
    """Traces and compiles with nothing left of what was compiled before.

    Args:
        jitted: What can be lowered.
        arguments: Its arguments, or their shapes.

    Returns:
        CPU seconds of the process, which other programs on the machine lengthen little.
    """
    jax.clear_caches()
    start = time.process_time()
    jitted.lower(*arguments).compile()
    return time.process_time() - start


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.bucket_lengths", description=__doc__))
