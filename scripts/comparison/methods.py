"""The methods that are compared, by name: a method of a run with its settings, or an ablation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import jax
import optax

from comparison.ablations import ABLATIONS
from comparison.tasks import UNCLIPPED, WITHOUT_RANK
from loft_jax.evaluation.comparison import Cell
from loft_jax.optim.pairs import Scaling
from loft_jax.training.config import FinetuneConfig, Method
from loft_jax.training.optimizer import make_optimizer

MakeOptimizer = Callable[[FinetuneConfig, optax.Schedule, Scaling], optax.GradientTransformation]

_SETTINGS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in get_args(Method)},
    "loft-factored": {"method": "loft", "second_moment": "factored"},
    "loft-diagonal": {"method": "loft", "second_moment": "diagonal"},
    "loft-balanced": {"method": "loft", "balance": True},
    "reflora-balanced": {"method": "reflora", "init": "balanced"},
    "full-linear": {"method": "full"},
    **{f"{method}-unclipped": {"method": method, "max_grad_norm": 0.0} for method in UNCLIPPED},
    **{name: {"method": "loft"} for name in ABLATIONS},
}

METHODS = tuple(_SETTINGS)
"""All names."""

# Of the steps of a run, those of plain LoRA before RefLoRA balances: runs are shorter here than
# those that the usual hundred steps are meant for.
_REFLORA_WARMUP = 6


def configured(
    config: FinetuneConfig, cell: Cell, *, reflora_warmup_steps: int | None = None
) -> FinetuneConfig:
    """The run of a cell.

    Args:
        config: Of the task.
        cell: Which one.
        reflora_warmup_steps: Steps before RefLoRA balances; by default a sixth of the run, and none
            where both factors are drawn.

    Returns:
        The configuration.
    """
    settings = dict(_SETTINGS[cell.method])
    if settings["method"] in ("reflora", "reflora-s") and "init" not in settings:
        sixth = config.steps // _REFLORA_WARMUP
        settings["reflora_warmup_steps"] = (
            sixth if reflora_warmup_steps is None else reflora_warmup_steps
        )
    if cell.method not in WITHOUT_RANK:
        settings |= {"rank": cell.rank, "alpha": cell.alpha}
    return replace(
        config,
        **settings,
        learning_rate=cell.learning_rate,
        eps=cell.eps,
        seed=cell.seed,
    )


def optimizer_of(method: str) -> MakeOptimizer:
    """How the optimizer of a method is made."""
    return {**ABLATIONS, "full-linear": _of_linear_layers}.get(method, make_optimizer)


def _of_linear_layers(
    config: FinetuneConfig, schedule: optax.Schedule, scaling: Scaling
) -> optax.GradientTransformation:
    """Full fine-tuning of what adapters stand on, and of nothing else."""

    def kinds(params: optax.Params) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: "linear" if "kernel" in jax.tree_util.keystr(path) else "other", params
        )

    optimizer = make_optimizer(config, schedule, scaling)
    return optax.partition({"linear": optimizer, "other": optax.set_to_zero()}, kinds)
