"""loft-jax plan."""

import contextlib
import itertools
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import tyro
from tqdm import tqdm

from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.methods import LoFT, LoRA, Method
from loft_jax.training.config import (
    AdapterConfig,
    FinetuneConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TaskConfig,
)
from loft_jax.training.topology import gpu_count

_FLAT = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Plan:
    """Report the memory that a train step takes of each TPU or GPU; none of them is needed.

    The step is compiled. For GPUs, its temporaries are an estimate. No weights are read: the model
    may also be a config.json or a well-known name. A setting applies to all given methods that have
    it.

    Args:
        topology: GPUs by name (a100-40gb, a100-80gb, h100, h200, rtx-3090, rtx-4090), with their
            number if there are several: h100 8xh100. Or slices of TPUs, by generation (v4, v5e,
            v5p, v6e) and grid of chips: v5e:2x4 v5p:2x2x4.
        model: The base model.
        method: Methods to compare.
        task: The task.
        lora: The adapters.
        batch: Number of rows of a step, over all chips, and of tokens of a row or, of images, of
            pixels of a side.
        mesh: How the work is split over the chips.
        slices: Number of such slices of TPUs, joined by a slower network.
        offload_optimizer: Keep the optimizer state in host memory between updates.
        accumulation_steps: Number of parts of the batch, computed one after another.
    """

    topology: tuple[str, ...]
    model: Annotated[ModelConfig, _FLAT] = field(
        default_factory=lambda: ModelConfig(tyro.MISSING, remat="full")
    )
    method: Annotated[tuple[Method, ...], _FLAT] = (LoRA(), LoFT())
    task: Annotated[TaskConfig, _FLAT] = field(default_factory=TaskConfig)
    lora: Annotated[AdapterConfig, _FLAT] = field(default_factory=AdapterConfig)
    batch: str = "16x256"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    slices: int = 1
    offload_optimizer: bool = False
    accumulation_steps: int = 1

    def __call__(self) -> int:
        """Runs the command."""
        from loft_jax.training.plan import check_plan, plan_step, plan_table

        if not (self.topology and self.method):
            raise InputError("topology or method is empty, expected one of each at least")
        # Compiling must not occupy a chip that is present.
        jax.config.update("jax_platforms", "cpu")
        if (most := max(map(gpu_count, self.topology))) > 1:
            with contextlib.suppress(RuntimeError):  # JAX is in use; the topology says what it has
                jax.config.update("jax_num_cpu_devices", most)
        cases = list(itertools.product(self.topology, map(self._run, self.method)))
        for topology, run in cases:
            check_plan(run, topology, self.slices)
        plans = []
        try:
            with tqdm(total=len(cases), unit="step", disable=None, leave=False) as bar:
                for topology, run in cases:
                    bar.set_description(f"compiling for {topology}: {run.method.name}")
                    with _ticking(bar):
                        plans.append(plan_step(run, topology, self.slices))
                    bar.update()
        finally:  # each took a minute or more, so finished ones are shown
            if plans:
                print(plan_table(plans))
        return 0

    def _run(self, method: Method) -> FinetuneConfig:
        """Makes the run whose step is compiled, with one of the methods."""
        if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", self.batch)):
            raise InputError(f"batch is {self.batch!r}, expected rows x tokens, as in 16x256")
        rows, tokens = map(int, match.groups())
        return FinetuneConfig(
            self.model,
            DataConfig("", max_length=tokens),
            output="",
            task=self.task,
            method=method,
            lora=self.lora,
            schedule=ScheduleConfig(batch_size=rows, accumulation_steps=self.accumulation_steps),
            optimizer=OptimizerConfig(offload=self.offload_optimizer),
            mesh=self.mesh,
        )


@contextlib.contextmanager
def _ticking(bar: Any) -> Iterator[None]:
    """Shows the time on a bar every second: the compiler says nothing until it is done."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(1):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
