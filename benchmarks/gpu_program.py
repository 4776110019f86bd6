"""How many kernels an update starts on an NVIDIA GPU, compiled ahead of time; no GPU is needed.

A GPU takes some microseconds to start a kernel, however small. Steps of loops are counted as often
as they are made, and of a choice the branch with more kernels. Beside them: the temporaries, and
the seconds that tracing and compiling took on this machine, where XLA cannot try kernels out, as it
does with a card.

    pip install "jax[cuda13]"
    python -m benchmarks.gpu_program
"""

import collections
import functools
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

# What starts no kernel; what `...-done` waits for is counted where it starts.
_FREE = re.compile("parameter|constant|tuple|get-tuple-element|bitcast|after-all|.*-done")


@dataclass(frozen=True)
class Options:
    """Compile updates of a Llama for one H200.

    Args:
        optimizers: Which ones.
        hidden: Width of the model.
        intermediate: Width of the MLP.
        layers: How many.
        rank: Of the adapters.
        stacked: A stack of pairs for each linear layer; otherwise each layer has pairs of its own.
    """

    optimizers: tuple[Contestant, ...] = ("adamw", "loft-factored", "loft", "loft-fused")
    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    rank: int = 16
    stacked: bool = True


def main(options: Options) -> None:
    """Compiles and prints."""
    # JAX asks libraries of CUDA for their versions, which they tell only where there is a card.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    from jax.experimental.topologies import get_topology_desc

    device = get_topology_desc("1x1x1", "cuda", topology="1x1x1", target_config=_CARD).devices[0]
    sizes = options.hidden, options.intermediate, options.layers, options.rank
    shapes = llama_shapes(*sizes, stacked=options.stacked)
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

    @functools.cache
    def counts(body: str) -> collections.Counter[str]:
        found: collections.Counter[str] = collections.Counter()
        for line in bodies[body]:
            operation = re.search(r" = .*? ([a-z][\w\-]*)\(", line)
            if not operation or _FREE.fullmatch(operation[1]):
                continue
            called = [counts(name) for name in _called(operation[1], line)]
            if operation[1] == "while":
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                steps = int(known[1]) if known else 1
                found.update({name: steps * k for name, k in called[0].items()})
            elif called:
                found.update(max(called, key=lambda kernels: sum(kernels.values())))
            else:
                found[operation[1]] += 1
        return found

    return counts("ENTRY")


def _called(operation: str, line: str) -> list[str]:
    """The computations that an operation runs, other than those of its own kernel."""
    names = {
        "while": "body", "call": "to_apply", "async-start": "calls",
        "conditional": "(?:branch_computations|true_computation|false_computation)",
    }  # fmt: skip
    if not (name := names.get(operation)):
        return []
    found = re.findall(name + r"=(\{[^}]*\}|[^,\s]+)", line)
    return re.findall(r"[\w.\-]+", " ".join(found))


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.gpu_program", description=__doc__))
