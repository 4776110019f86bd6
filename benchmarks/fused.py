"""What the fused kernel takes of a TPU chip beside plain JAX, compiled ahead of time.

For a direction of each side, by libtpu for one chip of v5e: the program, the temporaries, the
compiler's own estimate of the cycles of the operations in it (each once, however often its loop
runs; it has none for a kernel), and the bytes an element of W that arrays of the size of a tile of
D write to the memory of the chip and read from it. Arrays that the compiler keeps in the vector
memory (`S(1)` in the layout) are counted apart. Plain JAX is also compiled with products of three
passes of bfloat16 in the place of six. No TPU is needed, and no time is measured.

    python -m benchmarks.fused
"""

import functools
import itertools
import math
import re
import sys
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import tyro

from benchmarks.history import table
from loft_jax.optim import full_moment
from loft_jax.optim.fused_direction import on_tpu
from loft_jax.optim.linear_algebra import Basis, FactorMatrix
from loft_jax.optim.packed_matrices import packed_size
from loft_jax.optim.second_moments import AdamStep
from loft_jax.training.topology import load_topology

# Layers, rows, columns, rank.
CASES = ((1, 4096, 11008, 16), (8, 1024, 1024, 16))


# By what a direction is made.
PLAIN, THREE, KERNEL = "plain JAX", "plain JAX, three passes", "kernel"


def compiled(sizes: tuple[int, int, int, int], rank_last: bool, by: str) -> Any:
    """One direction, of a factor A if rank_last, else of a factor B."""
    layers, m, n, r = sizes
    device = load_topology("v5e:2x2").devices[0]

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        where = jax.sharding.SingleDeviceSharding(device)
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=where)

    def laid_out(n: int, k: int, last: bool) -> FactorMatrix:
        return FactorMatrix(shape(1, layers, *((n, k) if last else (k, n))), last)  # type: ignore[arg-type]

    p = laid_out(m, packed_size(r), rank_last)
    mu, q = laid_out(m, r, rank_last), laid_out(n, r, not rank_last)
    if by == KERNEL:
        return jax.jit(on_tpu).lower(p, mu, q, shape(3)).compile()
    step = AdamStep(mu, Basis(q, shape(), shape()), *[shape() for _ in range(3)])  # type: ignore[arg-type]
    precision = jax.lax.Precision.HIGH if by == THREE else jax.lax.Precision.HIGHEST
    product = functools.partial(jnp.matmul, precision=precision)
    with mock.patch.object(full_moment, "matmul", product):
        # Another function for each, since what is traced once is not traced again.
        plain = functools.partial(full_moment._direction, elements=full_moment._TILE_ELEMENTS)
        return jax.jit(plain).lower(p, mu, q, step).compile()


def tile_bytes(text: str, rows: int, columns: int) -> tuple[int, int]:
    """Bytes an element of W that its tiles are written and read: of the chip, and of its VMEM.

    Args:
        text: The program.
        rows: Of W, all in a tile.
        columns: Of W, some in a tile.
    """
    found = {False: 0, True: 0}
    for computation in re.split(r"\n(?=%|ENTRY)", text):
        if "fusion" in computation.partition("(")[0] or "fused" in computation.partition("(")[0]:
            continue  # what a fusion has inside is in no memory
        results = r"= f32\[([\d,]+)\]\{([^}]*)\} (?:fusion|convolution|copy|custom-call)\("
        for dims, layout in re.findall(results, computation):
            long = [size for size in map(int, dims.split(",")) if size > 1]
            if len(long) == 2 and rows in long and columns % (math.prod(long) // rows) == 0:
                tile = math.prod(long) // rows
                if tile >= full_moment._FEWEST_COLUMNS and tile < columns:
                    found["S(1)" in layout] += 8
    return found[False], found[True]


def main() -> None:
    """Compiles all cases and prints them."""
    jax.config.update("jax_platforms", "cpu")  # compiling must not take a TPU that is there
    lines = []
    for (layers, m, n, r), rank_last, by in itertools.product(
        CASES, (True, False), (PLAIN, THREE, KERNEL)
    ):
        program = compiled((layers, m, n, r), rank_last, by)
        memory, text = program.memory_analysis(), program.as_text()
        of_chip, of_vmem = tile_bytes(text, m, n)
        cycles = sum(int(found) for found in re.findall(r'"estimated_cycles":"(\d+)"', text))
        lines.append(
            (
                f"{layers} x {m}x{n}, r {r}, {'A' if rank_last else 'B'}",
                by,
                f"{memory.generated_code_size_in_bytes / 2**20:.2f}",
                f"{memory.temp_size_in_bytes / 2**20:.2f}",
                "" if by == KERNEL else f"{cycles:,}",
                str(of_chip),
                str(of_vmem),
            )
        )
        print(*lines[-1], sep=", ", file=sys.stderr, flush=True)
    head = ("direction", "by", "program MiB", "temporaries MiB", "modelled cycles",
            "HBM bytes / element", "VMEM bytes / element")  # fmt: skip
    print("\n".join(table(head, lines)))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.fused", description=__doc__)
