"""The error of `loft-jax plan` for GPUs: the peak of real train steps beside the estimate.

Llamas of 0.1, 0.5 and 1.3 billion weights train two steps of LoFT on the first GPU, in bfloat16 and
float32 and with batches of two sizes, each in a process of its own. What the process held of the
GPU at its peak is compared with the total of the plan of the same configuration. "Reserved" is what
the compiler of the device itself says of the same program: arguments and temporaries.

    python -m benchmarks.plan_error         # 11 cases at once, on a GPU of 80 GB
    python -m benchmarks.plan_error --tiny  # a small case, also on a CPU, whose peak is not known

Prints a line of JSON for each case, with all figures in bytes, and a table in MiB.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

# Hidden size, MLP features, layers, heads.
MODELS = {"0.1B": (768, 2048, 12, 12), "0.5B": (1024, 4096, 24, 16), "1.3B": (2048, 5632, 22, 32)}
TINY = (32, 64, 2, 2)
STEPS = 2  # the second one starts from what the first one has left


@dataclass(frozen=True)
class Case:
    """One configuration of a run."""

    model: str
    dtype: str
    batch: str
    remat: str = "dots"


CASES = (
    Case("1.3B", "bfloat16", "4x1024"),
    Case("1.3B", "bfloat16", "2x512"),
    Case("1.3B", "float32", "2x512"),
    Case("0.5B", "bfloat16", "4x1024"),
    Case("0.5B", "bfloat16", "4x1024", "full"),
    Case("0.5B", "float32", "4x1024"),
    Case("0.5B", "float32", "2x512"),
    Case("0.1B", "bfloat16", "4x1024"),
    Case("0.1B", "bfloat16", "2x512"),
    Case("0.1B", "float32", "4x1024"),
    Case("0.1B", "float32", "2x512"),
)


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        tiny: Only a model of a few thousand weights, with short rows.
        workers: Number of cases measured at once; together they must fit the GPU.
        case: One case as JSON, in this process; by default all.
    """

    tiny: bool = False
    workers: int = len(CASES)
    case: str = ""


def measure(case: Case) -> dict[str, Any]:
    """Trains one case on the first device of this process, and plans it."""
    import jax

    from loft_jax.data import DataConfig
    from loft_jax.training.config import FinetuneConfig, ModelConfig, ScheduleConfig
    from loft_jax.training.plan import plan_step

    hidden, mlp, layers, heads = MODELS.get(case.model, TINY)
    rows, length = map(int, case.batch.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        sizes = {
            "model_type": "llama",
            "vocab_size": 32_000 if case.model in MODELS else 400,
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "tie_word_embeddings": False,
        }
        Path(folder, "config.json").write_text(json.dumps(sizes))
        config = FinetuneConfig(
            ModelConfig(folder, case.dtype, case.dtype, remat=case.remat),  # type: ignore[arg-type]  # checked there
            DataConfig("", max_length=length),
            "",
            schedule=ScheduleConfig(batch_size=rows),
        )
        measured = train(config)
        plan = plan_step(config, "h100")
    names = ("weights", "adapter", "optimizer_state", "other", "temporaries", "total", "seconds")
    estimated = {name: getattr(plan, name) for name in names}
    device = jax.devices()[0].device_kind
    return {**dataclasses.asdict(case), "device": device, **measured, "estimated": estimated}


def train(config: Any) -> dict[str, Any]:
    """Runs the step of `finetune`, on weights that are all the same, and reads the peak."""
    import jax
    import jax.numpy as jnp

    from loft_jax.lora.targets import scaling_of, stack_axis_of
    from loft_jax.tasks.causal_lm import CausalLM
    from loft_jax.training.mesh import make_mesh
    from loft_jax.training.model import abstract_model, trained_variables
    from loft_jax.training.optimizer import make_optimizer, make_schedule
    from loft_jax.training.partition import split_model
    from loft_jax.training.plan import plan_model
    from loft_jax.training.shardings import step_shardings
    from loft_jax.training.step import initial_state, make_step

    task = CausalLM()
    model = abstract_model(*plan_model(config.model.path), config, task)
    parts = split_model(model, trained_variables(config.method))
    tx = make_optimizer(
        config, make_schedule(config.schedule, 1000), scaling_of(model), stack_axis_of(model)
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    shardings = step_shardings(parts, tx, model.table, mesh)
    step: Any = make_step(parts, task.loss, tx, 1, shardings)

    def filled(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.full(leaf.shape, 0.01, leaf.dtype)

    def drawn(leaf: Any) -> jax.Array:
        return 0.02 * jax.random.normal(jax.random.key(1), leaf.shape, leaf.dtype)

    def start() -> Any:
        own = parts._replace(
            params=jax.tree.map(drawn, parts.params), streams=jax.tree.map(filled, parts.streams)
        )
        return initial_state(own, tx)

    frozen = jax.device_put(jax.tree.map(filled, parts.frozen), shardings.frozen)
    state = jax.jit(start, out_shardings=shardings.state)()
    rows, length = config.schedule.batch_size, config.data.max_length
    batch = {
        name: jnp.ones(shape.shape, shape.dtype)
        for name, shape in task.shapes(rows, length).items()
    }
    batch = jax.device_put(batch, shardings.batch)
    compiled = step.lower(state, frozen, batch).compile()
    for _ in range(STEPS):
        state, metrics = compiled(state, frozen, batch)
    jax.block_until_ready((state.params, metrics))
    reserved = compiled.memory_analysis()
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "peak": stats.get("peak_bytes_in_use"),
        "held": stats.get("bytes_in_use"),
        "arguments": reserved.argument_size_in_bytes,
        "device_temporaries": reserved.temp_size_in_bytes,
        "results": reserved.output_size_in_bytes - reserved.alias_size_in_bytes,
        "code": reserved.generated_code_size_in_bytes,
        "loss": float(metrics["loss"]),
    }


def run(case: Case) -> dict[str, Any]:
    """Measures one case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.plan_error"]
    command += ["--case", json.dumps(dataclasses.asdict(case))]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        line = {**dataclasses.asdict(case), "failed": done.returncode}
    else:
        line = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(line), flush=True)
    return line


def table(lines: list[dict[str, Any]]) -> str:
    """The cases as Markdown, in MiB."""
    rows = [
        "| model | dtype | batch | remat | measured | reserved | estimated | ratio |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for line in lines:
        cells = [line[name] for name in ("model", "dtype", "batch", "remat")]
        if "failed" in line:
            cells += [f"failed with exit code {line['failed']}", "", "", ""]
        else:
            reserved = line["arguments"] + line["device_temporaries"] + line["results"]
            estimate, peak = line["estimated"]["total"], line["peak"]
            cells.append("not known" if peak is None else f"{peak / 2**20:,.0f}")
            cells += [f"{reserved / 2**20:,.0f}", f"{estimate / 2**20:,.0f}"]
            cells.append(f"{estimate / (peak or reserved):.3f}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main(options: Options) -> None:
    """Measures all cases and prints them."""
    if options.case:
        print(json.dumps(measure(Case(**json.loads(options.case)))))
        return
    chosen = [Case("tiny", "float32", "2x16")] if options.tiny else CASES
    with ThreadPoolExecutor(options.workers) as pool:
        lines = list(pool.map(run, chosen))
    print(table(lines))


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.plan_error", description=__doc__))
