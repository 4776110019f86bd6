"""What a run will take of each chip, answered by the TPU compiler before there is a TPU.

The step that is compiled is the one that trains: model, optimizer, sharding rules and step are
those of `loft_jax.training`, over shapes instead of arrays. What the compiler reserves for it is
what a chip will hold.
"""

import contextlib
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.hub import load_model_config
from loft_jax.models import Quantization, Remat
from loft_jax.models.family import Family, ModelConfig
from loft_jax.models.registry import WELL_KNOWN
from loft_jax.tasks.registry import TASKS, make_task
from loft_jax.tasks.task import Task
from loft_jax.training.collectives import Collective, find_collectives
from loft_jax.training.config import FinetuneConfig, MeshConfig, Method, SecondMoment, StateDtype
from loft_jax.training.mesh import check_batch, make_mesh
from loft_jax.training.model import abstract_model, scaling_of, trained_kind
from loft_jax.training.optimizer import make_optimizer, make_schedule
from loft_jax.training.parts import Parts, split_model
from loft_jax.training.shardings import step_shardings
from loft_jax.training.step import HOST_MEMORY, StepShardings, TrainState, initial_state, make_step
from loft_jax.training.topology import Topology, load_topology

Tree = Any


@dataclass(frozen=True)
class PlanConfig:
    """One step to compile: bfloat16 weights and computation, float32 adapters.

    Args:
        model: A config.json, a folder that has one, a GGUF file, a model on the Hugging Face hub,
            or one of the names in `WELL_KNOWN`. No weights are read.
        topology: Generation and grid of chips, as in "v5e:2x4".
        method: "loft"; "lora" is AdamW on the factors; "full" is AdamW on all weights, then stored
            in float32.
        rank: Rank of the adapters.
        batch: Rows of a step, over all chips, and tokens of a row, as in "16x256".
        target_modules: Names of the modules that get an adapter, one regular expression, or
            "all-linear".
        second_moment: LoFT's.
        state_dtype: What LoFT's second moment is stored in.
        quantization: What the base model's kernels are stored in.
        mesh: How the chips share the work.
        slices: How many such slices, joined by a slower network.
        offload_optimizer: Keep the optimizer's state in the memory of the hosts between updates.
        accumulation_steps: Parts of the batch, computed one after the other.
        remat: What the backward pass computes again.
    """

    model: str
    topology: str
    method: Method = "loft"
    rank: int = 16
    batch: str = "16x256"
    target_modules: tuple[str, ...] = ("all-linear",)
    second_moment: SecondMoment = "factored"
    state_dtype: StateDtype = "float32"
    quantization: Quantization = "none"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    slices: int = 1
    offload_optimizer: bool = False
    accumulation_steps: int = 1
    remat: Remat = "full"


@dataclass(frozen=True)
class StepPlan:
    """What one chip holds during a step, in bytes. The parts add up to the total.

    Args:
        config: What was compiled.
        mesh: Sizes of (data, fsdp, tensor).
        memory: HBM of the chip.
        weights: Base weights; for method "full", the trained ones.
        adapter: LoRA factors.
        optimizer_state: Moments, bases, counters; what is kept in the memory of the host apart.
        other: The batch, metrics, and what the compiler pads the arrays above with.
        temporaries: Activations, gradients, gathered weights. None when the step does not fit.
        program: The compiled code, which lies in HBM too. None when the step does not fit.
        collectives: Messages between chips, by kind. None when the step does not fit, or when this
            jaxlib cannot read the program that libtpu has made.
        seconds: Taken to trace and compile.
        shortage: The compiler's words when the step does not fit; else empty.
    """

    config: PlanConfig
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
    def total(self) -> int | None:
        """All that the chip holds; None when the step does not fit."""
        if self.temporaries is None or self.program is None:
            return None
        stored = self.weights + self.adapter + self.optimizer_state + self.other
        return stored + self.temporaries + self.program


def plan_step(config: PlanConfig) -> StepPlan:
    """Compiles a train step ahead of time for TPUs that are not there.

    A model of 7 billion weights takes one to two minutes; nothing of its size is allocated.

    Args:
        config: What to compile.

    Returns:
        What a chip would hold.

    Raises:
        InputError: Something given is wrong (model, topology, batch, mesh, target modules), or
            there is no libtpu.

    Example:
        >>> plan = plan_step(PlanConfig("config.json", "v5e:2x4"))  # doctest: +SKIP
        >>> plan.total < plan.memory  # doctest: +SKIP
        True
    """
    task, parts, tx, shardings, topology, batch = _prepare(config)
    step: Any = make_step(parts, task.loss, tx, config.accumulation_steps, shardings)
    state = _abstract_state(parts, tx)

    start = time.perf_counter()
    lowered = step.lower(state, parts.frozen, batch)
    try:
        with _uncached():
            compiled, shortage = lowered.compile(), ""
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
    full = config.method == "full"
    found: tuple[Collective, ...] | None = None
    other, temporaries, program = 0, None, None
    if compiled is not None:
        memory = compiled.memory_analysis()
        # The state is donated: what is given back lies where it was taken from.
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        other = memory.argument_size_in_bytes - sum(stored) + results
        temporaries = memory.temp_size_in_bytes
        program = memory.generated_code_size_in_bytes
        found = _collectives(compiled)
    return StepPlan(
        config=config,
        mesh=config.mesh.sizes(len(topology.devices)),
        memory=topology.chip.memory,
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


def check_plan(config: PlanConfig) -> None:
    """Finds what is wrong in seconds, so that no minutes are spent on plans beside it.

    Args:
        config: As for `plan_step`.

    Raises:
        InputError: As `plan_step`.

    Example:
        >>> check_plan(PlanConfig("config.json", "v5e:2x4"))  # doctest: +SKIP
    """
    _prepare(config)


class _Prepared(NamedTuple):
    """All that a step is compiled from."""

    task: Task
    parts: Parts
    tx: optax.GradientTransformation
    shardings: StepShardings
    topology: Topology
    batch: dict[str, jax.ShapeDtypeStruct]


def _prepare(config: PlanConfig) -> _Prepared:
    rows, tokens = _batch_sizes(config.batch)
    run = FinetuneConfig(
        model=config.model,
        data=DataConfig("", max_length=tokens),
        output="",
        method=config.method,
        rank=config.rank,
        target_modules=config.target_modules,
        batch_size=rows,
        accumulation_steps=config.accumulation_steps,
        dtype="bfloat16",
        remat=config.remat,
        quantization=config.quantization,
        **_loft_settings(config),
    )
    family, sizes = plan_model(config.model)
    task = _task_of(family, sizes)
    model = abstract_model(family, sizes, run, task)
    topology = load_topology(config.topology, config.slices)
    mesh = make_mesh(config.mesh, topology.devices)
    check_batch(rows, config.accumulation_steps, mesh)
    parts = split_model(model, trained_kind(config.method, task.head_modules(model)))
    tx = make_optimizer(run, make_schedule(run, steps=1000), scaling_of(model))
    shardings = step_shardings(
        parts, tx, model.table, mesh, offload_optimizer=config.offload_optimizer
    )
    return _Prepared(task, parts, tx, shardings, topology, task.shapes(rows, tokens))


def _task_of(family: Family, sizes: ModelConfig) -> Task:
    """The first task that the family has a model for."""
    name = next(name for name, task in TASKS.items() if task.head in family.models)
    return make_task(name, None, DataConfig(""), labels=getattr(sizes, "labels", ()))


def plan_model(name: str) -> tuple[Family, ModelConfig]:
    """The family and the sizes of a model.

    Args:
        name: As `PlanConfig.model`.

    Returns:
        Its family and its configuration.

    Raises:
        InputError: No such model, or one of a family that is not known.
    """
    if name.lower() in WELL_KNOWN:
        return WELL_KNOWN[name.lower()]
    try:
        return load_model_config(name)
    except InputError as error:
        raise InputError(f"{error}; known by name: {', '.join(WELL_KNOWN)}") from error


def plan_table(plans: Sequence[StepPlan]) -> str:
    """Plans as text, one a line, each compared with LoRA on the same slice, and with the chip.

    Args:
        plans: Of one model and batch.

    Returns:
        A table in MiB a chip, and the collectives below it.
    """
    head = ["topology", "mesh", "method", "weights", "adapter", "optimizer", "other", "temporaries"]
    rows = [[*head, "program", "total", "of chip", "over lora", "compiled in"]]
    notes = []
    for plan in plans:
        config = plan.config
        base = next(
            (p for p in plans if p.config.method == "lora" and _compared(p) == _compared(plan)),
            None,
        )
        sizes = (plan.weights, plan.adapter, plan.optimizer_state, plan.other)
        row = [config.topology, "x".join(map(str, plan.mesh)), plan_method(config)]
        row += [f"{size / 2**20:,.1f}" for size in sizes]
        if plan.total is None or plan.temporaries is None or plan.program is None:
            row += ["does not fit", "", "", "", ""]
            notes.append(f"{row[0]} {row[2]}: {plan.shortage}")
        else:
            row += [f"{n / 2**20:,.1f}" for n in (plan.temporaries, plan.program, plan.total)]
            row.append(f"{plan.total / plan.memory:.1%} of {plan.memory / 2**30:.0f} GiB")
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
        ]
    )


def _kinds(collectives: Sequence[Collective] | None) -> str:
    if collectives is None:
        return "unknown, this jaxlib cannot read the compiled program"
    kinds = [f"{c.count} {c.kind} ({c.bytes / 2**20:,.1f} MiB)" for c in collectives]
    return ", ".join(kinds) or "none"


def plan_method(config: PlanConfig) -> str:
    """A method as tables name it: with LoFT's second moment where it is not the usual one."""
    usual = {"second_moment": PlanConfig.second_moment, "state_dtype": PlanConfig.state_dtype}
    settings = [v for name, v in _loft_settings(config).items() if v != usual[name]]
    return " ".join([config.method, *settings])


def _loft_settings(config: PlanConfig) -> dict[str, Any]:
    """The settings of a run that only LoFT has."""
    if config.method != "loft":
        return {}
    return {"second_moment": config.second_moment, "state_dtype": config.state_dtype}


def _compared(plan: StepPlan) -> tuple[Any, ...]:
    config = plan.config
    return config.topology, plan.mesh, config.rank, config.batch, config.target_modules


def _batch_sizes(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise InputError(f"batch is {text!r}, expected rows x tokens, as in 16x256")
    rows, tokens = map(int, match.groups())
    return rows, tokens


def _abstract_state(parts: Parts, tx: optax.GradientTransformation) -> TrainState:
    def start(params: Tree, streams: Tree) -> TrainState:
        return initial_state(parts._replace(params=params, streams=streams), tx)

    return jax.eval_shape(start, parts.params, parts.streams)


def _collectives(compiled: jax.stages.Compiled) -> tuple[Collective, ...] | None:
    try:
        return tuple(find_collectives(compiled.as_text() or ""))
    except jax.errors.JaxRuntimeError:
        # libtpu may be newer than jaxlib, and write operations in forms that it does not know:
        # fused asynchronous collectives of v5p, for one.
        return None


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Keeps programs out of JAX's persistent cache: without their chips, none can be read back."""
    setting = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, setting)
    jax.config.update(setting, math.inf)
    try:
        yield
    finally:
        jax.config.update(setting, before)


def _bytes_on_a_device(tree: Tree, shardings: Tree) -> int:
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * _bits(leaf.dtype) // 8
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
        if sharding.memory_kind != HOST_MEMORY
    )


def _bits(dtype: Any) -> int:
    """Of one number; TPUs pack those of less than a byte."""
    return jnp.iinfo(dtype).bits if dtype in (jnp.int4, jnp.uint4) else dtype.itemsize * 8
