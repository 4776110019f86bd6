"""Plans the memory of a run on each chip with XLA's compilers; no TPU or GPU is needed.

The compiled step is the one that trains: model, optimizer, sharding rules and step are those of
`loft_jax.training`, with shapes instead of arrays. A TPU will hold what the compiler reserves for
it. For GPUs the step is compiled for CPUs: arguments are the same, temporaries are an estimate.
"""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax.errors import InputError
from loft_jax.hub import load_model_config
from loft_jax.lora.targets import scaling_of, stack_axis_of
from loft_jax.methods import Method, settings_of
from loft_jax.models.family import Family, PretrainedConfig
from loft_jax.models.registry import WELL_KNOWN
from loft_jax.tasks.task import Task
from loft_jax.training.collectives import Collective, find_collectives
from loft_jax.training.config import FinetuneConfig
from loft_jax.training.mesh import check_batch, make_mesh
from loft_jax.training.model import abstract_model, task_of, trained_variables, with_precision
from loft_jax.training.optimizer import make_optimizer, make_schedule
from loft_jax.training.partition import ModelPartition, split_model
from loft_jax.training.shardings import step_shardings
from loft_jax.training.step import HOST_MEMORY, StepShardings, TrainState, initial_state, make_step
from loft_jax.training.topology import Topology, chip_of, load_topology

Tree = Any

# CPUs multiply bfloat16 matrices as float32. Copies of all layers in float32, which the compiler
# would make before the loop over them, would be counted among the temporaries.
_AS_ON_GPUS: Any = {
    "xla_allow_excess_precision": False,
    "xla_backend_optimization_level": 0,  # the code is not run
    "xla_llvm_disable_expensive_passes": True,
    "xla_disable_hlo_passes": (
        "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
    ),
}


@dataclass(frozen=True)
class StepPlan:
    """The memory of one chip during a step, in bytes; the parts add up to the total.

    Args:
        config: The run whose step was compiled.
        topology: The slice, for example "v5e:2x4", or GPUs, for example "8xh100".
        mesh: Sizes of (data, fsdp, tensor).
        memory: Memory of the chip.
        weights: Base weights, trained or not.
        adapter: LoRA factors, and a head that trains with them.
        optimizer_state: Moments, bases, counters; without what is kept in host memory.
        other: The batch, metrics, and the padding that the compiler adds to the arrays above.
        temporaries: Activations, gradients, gathered weights. None if the step does not fit.
        program: The compiled code, which is in the memory of TPUs too. None if the step does not
            fit.
        collectives: Messages between chips, by kind. None if the step does not fit, or if this
            jaxlib cannot read the program that libtpu has made.
        seconds: Time taken to trace and compile.
        shortage: The compiler's message if the step does not fit, else empty.
    """

    config: FinetuneConfig
    topology: str
    mesh: tuple[int, int, int]
    memory: int
    weights: int
    adapter: int
    optimizer_state: int
    other: int
    temporaries: int | None
    program: int | None
    collectives: tuple[Collective, ...] | None
    seconds: float
    shortage: str = ""

    @property
    def is_estimate(self) -> bool:
        """Whether the compiler was another than that of the chip, as it is for GPUs."""
        return chip_of(self.topology).platform == "gpu"

    @property
    def total(self) -> int | None:
        """The memory of all parts; None if the step does not fit."""
        if self.temporaries is None or self.program is None:
            return None
        stored = self.weights + self.adapter + self.optimizer_state + self.other
        return stored + self.temporaries + self.program


def plan_step(config: FinetuneConfig, topology: str, slices: int = 1) -> StepPlan:
    """Compiles a train step ahead of time, for TPUs or GPUs that need not be present.

    A model of 7 billion weights takes one to two minutes. Nothing of its size is allocated, and
    neither weights nor examples are read: a row has `data.max_length` tokens.

    Args:
        config: The run. The path of its model may also be a config.json or one of the names in
            `WELL_KNOWN`.
        topology: Generation and grid of TPU chips, for example "v5e:2x4", or GPUs of one host, for
            example "h100" or "8xh100".
        slices: Number of such slices of TPUs, joined by a slower network.

    Returns:
        The memory of a chip.

    Raises:
        InputError: The model, topology, batch, mesh or target modules are wrong, libtpu is not
            installed, or JAX has fewer CPU devices than the topology has GPUs.

    Example:
        >>> from loft_jax.data import DataConfig
        >>> from loft_jax.training.config import ModelConfig
        >>> run = FinetuneConfig(ModelConfig("config.json"), DataConfig("rows.jsonl"), "runs/first")
        >>> plan = plan_step(run, "v5e:2x4")  # doctest: +SKIP
        >>> plan.total < plan.memory  # doctest: +SKIP
        True
    """
    task, parts, tx, shardings, chips, batch = _prepare(config, topology, slices)
    is_gpu = chips.chip.platform == "gpu"
    if is_gpu and config.model.quantization == "nf4":
        # CPUs would hold a matrix of each of the 16 values. Dequantized layers are as large as
        # those of 8-bit integers.
        model = dataclasses.replace(config.model, quantization="int8")
        plan = plan_step(dataclasses.replace(config, model=model), topology)
        weights = _bytes_on_a_device(parts.frozen, shardings.frozen)
        return dataclasses.replace(plan, config=config, weights=weights)
    step: Any = make_step(parts, task.loss, tx, config.schedule.accumulation_steps, shardings)
    state = _abstract_state(parts, tx)

    start = time.perf_counter()
    lowered = step.lower(state, parts.frozen, batch)
    try:
        with _uncached():
            options = _AS_ON_GPUS if is_gpu else None
            compiled, shortage = lowered.compile(compiler_options=options), ""
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        compiled, shortage = None, str(error).partition("\n")[0]
    seconds = time.perf_counter() - start

    stored = [
        _bytes_on_a_device(*pair)
        for pair in (
            (parts.frozen, shardings.frozen),
            (state.params, shardings.state.params),
            (state.opt_state, shardings.state.opt_state),
        )
    ]
    frozen, trained, optimizer_state = stored
    full = not config.method.adapts
    found: tuple[Collective, ...] | None = None
    other, temporaries, program = 0, None, None
    if compiled is not None:
        memory = compiled.memory_analysis()
        # The state is donated: its result takes the memory of the argument.
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        arguments = memory.argument_size_in_bytes
        temporaries = memory.temp_size_in_bytes
        if is_gpu:
            temporaries -= _float32_copy(compiled.as_text() or "")
            # CPUs count the state in host memory too.
            arguments -= _bytes_on_a_device(state.opt_state, shardings.state.opt_state, HOST_MEMORY)
        other = arguments - sum(stored) + results
        program = memory.generated_code_size_in_bytes
        found = _collectives(compiled)
    return StepPlan(
        config=config,
        topology=topology,
        mesh=config.mesh.sizes(len(chips.devices)),
        memory=chips.chip.memory,
        weights=frozen + trained if full else frozen,
        adapter=0 if full else trained,
        optimizer_state=optimizer_state,
        other=other,
        temporaries=temporaries,
        program=program,
        collectives=found,
        seconds=seconds,
        shortage=shortage,
    )


def check_plan(config: FinetuneConfig, topology: str, slices: int = 1) -> None:
    """Checks the arguments of `plan_step` without compiling, in seconds.

    Args:
        config: As for `plan_step`.
        topology: As for `plan_step`.
        slices: As for `plan_step`.

    Raises:
        InputError: As `plan_step`.
    """
    _prepare(config, topology, slices)


class _Prepared(NamedTuple):
    """The inputs of the compilation of a step."""

    task: Task
    parts: ModelPartition
    tx: optax.GradientTransformation
    shardings: StepShardings
    topology: Topology
    batch: dict[str, jax.ShapeDtypeStruct]


def _prepare(config: FinetuneConfig, topology: str, slices: int) -> _Prepared:
    config = with_precision(config, chip_of(topology).platform)
    rows, accumulation_steps = config.schedule.batch_size, config.schedule.accumulation_steps
    family, sizes = plan_model(config.model.path)
    task = task_of(config, family, sizes)
    model = abstract_model(family, sizes, config, task)
    chips = load_topology(topology, slices)
    mesh = make_mesh(config.mesh, chips.devices)
    check_batch(rows, accumulation_steps, mesh)
    parts = split_model(model, trained_variables(config.method, task.head_modules(model)))
    schedule = make_schedule(config.schedule, config.schedule.steps or 1000)
    tx = make_optimizer(config, schedule, scaling_of(model), stack_axis_of(model))
    offload = config.optimizer.offload
    shardings = step_shardings(parts, tx, model.table, mesh, offload_optimizer=offload)
    length = config.data.max_length
    if sizes.max_length is not None and length > sizes.max_length:
        raise InputError(
            f"data.max_length is {length}, expected {sizes.max_length} at most, the positions of "
            "the model"
        )
    batch = task.shapes(rows, length)
    return _Prepared(task, parts, tx, shardings, chips, batch)


def plan_model(name: str) -> tuple[Family, PretrainedConfig]:
    """Finds the family and the configuration of a model.

    Args:
        name: Path or name of the model, as for `plan_step`.

    Returns:
        Its family and its configuration.

    Raises:
        InputError: There is no such model, or its family is not known.
    """
    if name.lower() in WELL_KNOWN and not Path(name).exists():
        return WELL_KNOWN[name.lower()]
    try:
        return load_model_config(name)
    except InputError as error:
        raise InputError(f"{error}; known by name: {', '.join(WELL_KNOWN)}") from error


def plan_table(plans: Sequence[StepPlan]) -> str:
    """Formats plans as a table, one in each row, compared with LoRA on the same chips.

    Args:
        plans: Plans of one model and batch.

    Returns:
        A table in MiB for each chip, with a ~ before estimates, and the collectives below it.
    """
    head = ["topology", "mesh", "method", "weights", "adapter", "optimizer", "other", "temporaries"]
    rows = [[*head, "program", "total", "of chip", "over lora", "compiled in"]]
    notes = []
    for plan in plans:
        compared = (p for p in plans if p.config.method.name == "lora" and _compared(p, plan))
        base = next(compared, None)
        sizes = (plan.weights, plan.adapter, plan.optimizer_state, plan.other)
        row = [plan.topology, "x".join(map(str, plan.mesh)), plan_method(plan.config.method)]
        row += [f"{size / 2**20:,.1f}" for size in sizes]
        if plan.total is None or plan.temporaries is None or plan.program is None:
            row += ["does not fit", "", "", "", ""]
            notes.append(f"{row[0]} {row[2]}: {plan.shortage}")
        else:
            row += [f"{n / 2**20:,.1f}" for n in (plan.temporaries, plan.program, plan.total)]
            if plan.is_estimate:
                row[-3::2] = [f"~{cell}" for cell in row[-3::2]]
            fits = "" if plan.total <= plan.memory else ", does not fit"
            row.append(f"{plan.total / plan.memory:.1%} of {plan.memory / 2**30:.0f} GiB{fits}")
            over = ""
            if base is not None and base is not plan and base.total is not None:
                more = plan.total - base.total
                over = f"{more / 2**20:+,.1f} ({more / base.total:+.1%})"
            row.append(over)
            notes.append(f"{row[0]} {row[2]}: {_kinds(plan.collectives)}")
        rows.append([*row, f"{plan.seconds:.0f} s"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(
        [
            "MiB on each chip; mesh: data x fsdp x tensor",
            *lines,
            "",
            "collectives in the program (results on a chip; those of a layer count once):",
            *notes,
            *([_ESTIMATED] if any(plan.is_estimate for plan in plans) else []),
        ]
    )


_ESTIMATED = """
~ is an estimate: the step was compiled for CPUs. On an H100 it was 0 to 8 % too low. JAX takes
three quarters of a GPU's memory, or what the variable XLA_PYTHON_CLIENT_MEM_FRACTION says."""


def _kinds(collectives: Sequence[Collective] | None) -> str:
    if collectives is None:
        return "unknown, this jaxlib cannot read the compiled program"
    kinds = [f"{c.count} {c.kind} ({c.bytes / 2**20:,.1f} MiB)" for c in collectives]
    return ", ".join(kinds) or "none"


def plan_method(method: Method) -> str:
    """Names a method with those of its settings that differ from their defaults."""
    usual = settings_of(type(method))
    changed = {
        name: getattr(method, name) for name in usual if getattr(method, name) != usual[name]
    }
    settings = (v if isinstance(v, str) else f"{name} {v}" for name, v in changed.items())
    return " ".join([method.name, *settings])


def _compared(one: StepPlan, other: StepPlan) -> bool:
    """Whether two plans differ by method alone."""
    configs = [dataclasses.replace(plan.config, method=one.config.method) for plan in (one, other)]
    return configs[0] == configs[1] and (one.topology, one.mesh) == (other.topology, other.mesh)


def _abstract_state(parts: ModelPartition, tx: optax.GradientTransformation) -> TrainState:
    def start(params: Tree, streams: Tree) -> TrainState:
        return initial_state(parts._replace(params=params, streams=streams), tx)

    return jax.eval_shape(start, parts.params, parts.streams)


def _collectives(compiled: jax.stages.Compiled) -> tuple[Collective, ...] | None:
    try:
        return tuple(find_collectives(compiled.as_text() or ""))
    except jax.errors.JaxRuntimeError:
        # libtpu may be newer than jaxlib, and write operations in forms that jaxlib does not know,
        # such as fused asynchronous collectives of v5p.
        return None


def _float32_copy(program: str) -> int:
    """Counts the bytes of the largest weight that a program for CPUs copies to float32.

    CPUs multiply bfloat16 matrices as float32. The largest is the head, which is copied while the
    logits are held; GPUs multiply it as it is.

    Args:
        program: From `compiled.as_text()`.

    Returns:
        The bytes of the copy; 0 if there is none.

    Example:
        >>> _float32_copy("%wrapped_convert.3 = f32[64,100]{1,0} fusion(%frozen__lm_head__.1), ...")
        25600
    """
    shapes = re.findall(r"%wrapped_convert\S* = f32\[([\d,]+)\]\S* fusion\(%frozen", program)
    return max((4 * math.prod(map(int, shape.split(","))) for shape in shapes), default=0)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Keeps programs out of JAX's persistent cache: they cannot be read without their chips."""
    setting = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, setting)
    jax.config.update(setting, math.inf)
    try:
        yield
    finally:
        jax.config.update(setting, before)


def _bytes_on_a_device(tree: Tree, shardings: Tree, kind: str | None = None) -> int:
    """Counts the bytes of one device; of a kind of memory, by default all but that of the host."""
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * _bits(leaf.dtype) // 8
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
        if (sharding.memory_kind == kind if kind else sharding.memory_kind != HOST_MEMORY)
    )


def _bits(dtype: Any) -> int:
    """Gives the number of bits of one element; TPUs pack elements smaller than a byte."""
    return jnp.iinfo(dtype).bits if dtype in (jnp.int4, jnp.uint4) else dtype.itemsize * 8
