"""How many kernels an update starts on an NVIDIA GPU, compiled ahead of time; no GPU is needed.

A GPU takes some microseconds to start a kernel, which is as long as most kernels of an update run:
their number is what an update costs beside a small model. Steps of loops are counted as often as
they are made. Beside them: the temporaries, and the seconds that XLA compiled for on this machine,
without trying kernels out, as it does where there is a card.

    pip install "jax[cuda13]"
    python -m benchmarks.gpu_program
"""

import collections
import os
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import tyro

from benchmarks.history import table
from benchmarks.optimizer.contestants import Contestant, make_optimizer
from benchmarks.optimizer.shapes import llama_shapes

# What XLA knows of an H200 by asking it.
_CARD = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 62914560
  memory_bandwidth: 4800000000000 device_memory_size: 150000000000
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 8 } runtime_version { major: 13 }
"""

# What starts no kernel.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


@dataclass(frozen=True)
class Options:
    """Compile updates of a Llama with a stack for each linear layer, for one H200.

    Args:
        optimizers: Which ones.
        hidden: Width of the model.
        intermediate: Width of the MLP.
        layers: How many.
        rank: Of the adapters.
    """

    optimizers: tuple[Contestant, ...] = ("adamw", "loft-factored", "loft", "loft-fused")
    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    rank: int = 16


def main(options: Options) -> None:
    """Compiles and prints."""
    # JAX asks libraries of CUDA for their versions, which they tell only where there is a card.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    from jax.experimental.topologies import get_topology_desc

    device = get_topology_desc("1x1x1", "cuda", topology="1x1x1", target_config=_CARD).devices[0]
    shapes = llama_shapes(
        options.hidden, options.intermediate, options.layers, options.rank, stacked=True
    )
    rows = []
    for name in options.optimizers:
        began = time.perf_counter()
        program = compiled(name, shapes, device)
        seconds = time.perf_counter() - began
        kernels = sum(kernel_counts(program.as_text()).values())
        temporaries = program.memory_analysis().temp_size_in_bytes / 2**20
        rows.append((name, f"{kernels:,}", f"{temporaries:,.0f}", f"{seconds:.0f}"))
    print("\n".join(table(("optimizer", "kernels", "temporaries MiB", "compiled in s"), rows)))


def compiled(name: Contestant, shapes: Any, device: jax.Device) -> Any:
    """The update of an optimizer, for a device that need not be there."""
    tx = make_optimizer(name)
    where = jax.sharding.SingleDeviceSharding(device)

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    given = placed((shapes, jax.eval_shape(tx.init, shapes), shapes))
    card = jax.sharding.AbstractDevice(device.device_kind, None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=card)):
        return jax.jit(tx.update, donate_argnums=1).lower(*given).compile()


def kernel_counts(program: str) -> collections.Counter[str]:
    """How often each kind of kernel is started.

    Args:
        program: Compiled, as text of HLO.

    Returns:
        Starts by the name of the operation; of a loop without a known count, those of one step.
    """
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = bodies.setdefault("ENTRY" if head[1] else head[2], [])
        elif line.startswith("  "):
            lines.append(line)

    counts: collections.Counter[str] = collections.Counter()

    def count(body: str, times: int) -> None:
        for line in bodies[body]:
            if (
                not (operation := re.search(r" = .*? ([a-z][\w\-]*)\(", line))
                or operation[1] in _FREE
            ):
                continue
            if operation[1] == "while":
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                count(_named(r"body=", line), times * (int(known[1]) if known else 1))
            elif operation[1] == "call":
                count(_named(r"to_apply=", line), times)
            else:
                counts[operation[1]] += times

    count("ENTRY", 1)
    return counts


def _named(what: str, line: str) -> str:
    found = re.search(what + r"%?([\w.\-]+)", line)
    assert found
    return found[1]


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.gpu_program", description=__doc__))
