"""The comparison without a language model: a matrix of low rank, fitted from its entries.

The setting is that of LoFT's authors (their notebook on matrix factorization): a target `A B` with
normal factors, the mean squared error over all entries, a bias besides, and factors that start as
two linear layers do, so that no product is zero.
"""

import dataclasses
import time
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.log import Cell, Result
from experiments.methods import configured, optimizer_of
from experiments.runs import PACKAGES, moved
from experiments.tasks import Sweep, Task
from loft_jax.data import DataConfig
from loft_jax.optim import state_bytes
from loft_jax.training.config import (
    FinetuneConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)

_STRETCHES = 20

# Of the error at the start.
_CONVERGED = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixTask(Task):
    """A matrix to fit.

    Args:
        shape: Of the matrix.
        target_rank: Its rank.
    """

    shape: tuple[int, int]
    target_rank: int


class MatrixRuns:
    """Runs of one task, all steps of a run in one compiled loop."""

    def __init__(self, task: MatrixTask) -> None:
        """Compiles nothing yet.

        Args:
            task: Which one.
        """
        self.task = task
        self._config = FinetuneConfig(
            ModelConfig(""),
            DataConfig(""),
            "",
            schedule=ScheduleConfig(shape="constant", steps=task.steps),
            optimizer=OptimizerConfig(max_grad_norm=0),
        )
        self._loops: dict[Any, tuple[Any, float]] = {}

    def __call__(self, cell: Cell, *, test: bool) -> Result:
        """Fits and measures.

        Args:
            cell: What to run.
            test: There is one error, that of all entries; it counts for validation and test.

        Returns:
            The result: the `loss`, in the geometric mean over the run, since at the end all that
            converges is at rounding; the `steps` at which it was above a millionth of the first;
            and the relative `distance` of the weight from that which AdamW on the full weight
            comes to, from the same start at the same rate.
        """
        config = configured(self._config, cell, reflora_warmup_steps=0)
        params, target = _problem(self.task, cell)
        loop, compiling = self._compiled(config, cell)
        began = time.perf_counter()
        trained, losses = jax.block_until_ready(
            loop(jnp.float32(cell.learning_rate), params, target)
        )
        seconds = time.perf_counter() - began
        losses = np.maximum(np.asarray(losses, np.float64), 1e-30)
        weight, full = _weight(trained, _scaling(cell)), self._full_weight(cell)
        distance = float(jnp.linalg.norm(weight - full) / jnp.linalg.norm(full))
        measures = {"loss": np.inf}
        if np.isfinite(losses).all():
            steps = float((losses > _CONVERGED * losses[0]).sum())
            measures = {"loss": _typical(losses), "steps": steps, "distance": distance}
        found = loop.memory_analysis()
        tx = optimizer_of(cell.method)(config, optax.constant_schedule(1.0), _scaling(cell))
        return Result(
            cell,
            train=tuple(
                float(f"{_typical(part):.5g}") for part in np.array_split(losses[:-1], _STRETCHES)
            ),
            validation=measures,
            test=measures if test else {},
            cost={
                "step_seconds": round(seconds / self.task.steps, 6),
                "compile_seconds": round(compiling, 2),
                "trained_parameters": moved(params, trained),
                "state_bytes": state_bytes(tx, params),
                "temporary_bytes": found.temp_size_in_bytes if found else 0,
            },
            made_with={
                **{name: version(name) for name in PACKAGES},
                "task": self.task.digest,
                "steps": self.task.steps,
            },
        )

    def _compiled(self, config: FinetuneConfig, cell: Cell) -> tuple[Any, float]:
        """The loop of a method, for every learning rate and seed, and the seconds it took."""
        key = (cell.method, cell.rank, cell.eps, cell.alpha)
        if key not in self._loops:
            began = time.perf_counter()
            problem = jax.eval_shape(lambda: _problem(self.task, cell))
            compiled = self._loop(config, cell).lower(jnp.float32(1), *problem).compile()
            self._loops[key] = compiled, time.perf_counter() - began
        return self._loops[key]

    def _loop(self, config: FinetuneConfig, cell: Cell) -> Any:
        optimizer, scaling = optimizer_of(cell.method), _scaling(cell)

        @jax.jit
        def loop(rate: jax.Array, params: Any, target: jax.Array) -> tuple[Any, jax.Array]:
            tx = optimizer(config, lambda count: rate, scaling)

            def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
                params, state = carry
                loss, grads = jax.value_and_grad(_loss)(params, scaling, target)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), loss

            start = params, tx.init(params)
            (params, _), losses = jax.lax.scan(step, start, length=self.task.steps)
            return params, jnp.append(losses, _loss(params, scaling, target))

        return loop

    def _full_weight(self, cell: Cell) -> jax.Array:
        """What AdamW on the full weight comes to."""
        cell = dataclasses.replace(cell, method="full", rank=0, alpha=None)
        loop, _ = self._compiled(configured(self._config, cell), cell)
        trained, _ = loop(jnp.float32(cell.learning_rate), *_problem(self.task, cell))
        return _weight(trained, 1.0)


def _problem(task: MatrixTask, cell: Cell) -> tuple[dict[str, jax.Array], jax.Array]:
    """Start and target; the full weight starts as the product of factors of the target's rank."""
    m, n = task.shape
    rank = cell.rank or task.target_rank
    keys = iter(jax.random.split(jax.random.key(cell.seed), 5))

    def uniform(fan_in: int, *shape: int) -> jax.Array:
        bound = fan_in**-0.5
        return jax.random.uniform(next(keys), shape, minval=-bound, maxval=bound)

    target = jax.random.normal(next(keys), (m, task.target_rank)) @ jax.random.normal(
        next(keys), (task.target_rank, n)
    )
    params = {"lora_a": uniform(m, m, rank), "lora_b": uniform(rank, rank, n)}
    bias = uniform(rank, n)
    if not cell.rank:
        params = {"weight": params["lora_a"] @ params["lora_b"]}
    return {**params, "bias": bias}, target


def _typical(losses: np.ndarray) -> float:
    """The geometric mean."""
    return float(np.exp(np.log(losses).mean()))


def _scaling(cell: Cell) -> float:
    return 1.0 if cell.alpha is None else cell.alpha / cell.rank


def _loss(params: dict[str, jax.Array], scaling: float, target: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(_weight(params, scaling) + params["bias"] - target))


def _weight(params: dict[str, jax.Array], scaling: float) -> jax.Array:
    if "weight" in params:
        return params["weight"]
    return scaling * params["lora_a"] @ params["lora_b"]


ON_MATRICES = (
    "lora", "lora-plus", "lora-fa", "riemannian", "reflora", "reflora-s",
    "loft", "loft-factored", "loft-diagonal", "loft-balanced", "loft-muon",
    "loft-alternate", "loft-alternate-factored", "full",
)  # fmt: skip
WITHOUT_PARTS = (
    "loft-without-scaling", "loft-without-first-calibration",
    "loft-without-second-calibration", "loft-without-calibration", "loft-without-bound",
    "loft-overlap-twice", "loft-overlap-halved", "loft-overlap-longer", "loft-retracted",
)  # fmt: skip
MATRIX_METHODS = (*ON_MATRICES, *WITHOUT_PARTS)
"""Methods that are optimizers of factors, without a clip."""

_NOTE = (
    "One error, of all entries, with nothing held out. The loss is its geometric mean over "
    "the run, as at the end all that converges is at rounding; steps are those with an error "
    "above a millionth of the first. No clip, a constant rate; factors start as linear layers "
    "do, their product not at zero, so that another alpha is another start. The distance is "
    "that of the weight from the one which AdamW on the full weight comes to at the rate of "
    "the row: at rates that are too small it is a distance from what has not arrived."
)

MATRIX_TASKS = {
    task.name: task
    for task in (
        MatrixTask(
            name="matrix",
            title="Matrix factorization, 1024 x 512 of rank 8",
            shape=(1024, 512),
            target_rank=8,
            steps=300,
            note=_NOTE,
            methods=ON_MATRICES,
            ranks=(8,),
            rates=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
            more=(
                Sweep(WITHOUT_PARTS, (8,)),
                *(Sweep(("lora", "loft", "loft-diagonal"), (8,), alpha=a) for a in (1.0, 64.0)),
            ),
            eps=1e-4,
            seeds=(0, 1, 2),
            measure="steps",
            always_tests=True,
        ),
        MatrixTask(
            name="square",
            title="Full rank, 13 x 13",
            shape=(13, 13),
            target_rank=13,
            steps=200,
            note=_NOTE,
            methods=ON_MATRICES,
            ranks=(13,),
            rates=(1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
            more=(Sweep(WITHOUT_PARTS, (13,)),),
            seeds=(0, 1, 2),
            measure="steps",
            always_tests=True,
        ),
    )
}
"""Tasks by name."""
