"""The methods that are compared, by name: a method of a run with its settings, or an ablation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import optax

from experiments.ablations import ABLATIONS
from experiments.log import Cell
from experiments.peers import adapre_lora, lora_pro, lora_rite, riemannion
from experiments.tasks import UNCLIPPED, WITHOUT_RANK
from loft_jax import methods
from loft_jax.methods import Full, LoFT, LoRA, Method, RefLoRA
from loft_jax.optim.pairs import Scaling
from loft_jax.training.config import FinetuneConfig
from loft_jax.training.optimizer import make_optimizer

MakeOptimizer = Callable[[FinetuneConfig, optax.Schedule, Scaling], optax.GradientTransformation]

# With this, one learning rate fits Muon and AdamW (Liu et al., arXiv 2502.16982).
_RMS_OF_ADAMW = 0.2


def _adamw_like(peer: Callable[..., optax.GradientTransformation]) -> MakeOptimizer:
    def make(
        config: FinetuneConfig, schedule: optax.Schedule, scaling: Scaling
    ) -> optax.GradientTransformation:
        given = config.optimizer
        adam = (given.b1, given.b2, given.eps, given.weight_decay)
        return _clipped(peer(schedule, *adam, scaling=scaling), config)

    return make


def _riemannion(
    config: FinetuneConfig, schedule: optax.Schedule, scaling: Scaling
) -> optax.GradientTransformation:
    tx = riemannion(
        schedule,
        weight_decay=config.optimizer.weight_decay,
        consistent_rms=_RMS_OF_ADAMW,
        adam_b1=config.optimizer.b1,
        adam_b2=config.optimizer.b2,
        eps=config.optimizer.eps,
        scaling=scaling,
    )
    return _clipped(tx, config)


def _clipped(
    tx: optax.GradientTransformation, config: FinetuneConfig
) -> optax.GradientTransformation:
    if not (norm := config.optimizer.max_grad_norm):
        return tx
    return optax.chain(optax.clip_by_global_norm(norm), tx)


PEERS: dict[str, MakeOptimizer] = {
    "lora-pro": _adamw_like(lora_pro),
    "riemannion": _riemannion,
    "adapre-lora": _adamw_like(adapre_lora),
    "lora-rite": _adamw_like(lora_rite),
}
"""Optimizers of published methods that the package has not."""

_METHODS: dict[str, Method] = {
    **{name: method() for name, method in methods.METHODS.items()},
    "loft": LoFT("full"),
    "loft-factored": LoFT("factored"),
    "loft-diagonal": LoFT("diagonal"),
    "loft-balanced": LoFT("full", balance=True),
    "loft-alternate": LoFT("full", move="alternate"),
    "loft-alternate-factored": LoFT("factored", move="alternate"),
    "reflora-balanced": RefLoRA(),
    "full-linear": Full(),
    **{f"{name}-unclipped": methods.METHODS[name]() for name in UNCLIPPED},
    "loft-unclipped": LoFT("full"),
    **{name: LoFT() for name in ABLATIONS},
    **{name: LoRA() for name in PEERS},
}

METHODS = tuple(_METHODS)
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
    method, lora = _METHODS[cell.method], config.lora
    optimizer = replace(config.optimizer, eps=cell.eps)
    if cell.method.endswith("-balanced") and isinstance(method, RefLoRA):
        lora = replace(lora, init="balanced")
    elif isinstance(method, RefLoRA):
        sixth = config.schedule.steps // _REFLORA_WARMUP
        steps = sixth if reflora_warmup_steps is None else reflora_warmup_steps
        method = replace(method, warmup_steps=steps)
    if cell.method.endswith("-unclipped"):
        optimizer = replace(optimizer, max_grad_norm=0.0)
    if cell.method not in WITHOUT_RANK:
        lora = replace(lora, rank=cell.rank, alpha=cell.alpha)
    return replace(
        config,
        method=method,
        lora=lora,
        optimizer=optimizer,
        schedule=replace(config.schedule, learning_rate=cell.learning_rate),
        seed=cell.seed,
    )


def optimizer_of(method: str) -> MakeOptimizer:
    """How the optimizer of a method is made."""
    own = {**ABLATIONS, **PEERS, "full-linear": _of_linear_layers}
    return own.get(method, make_optimizer)


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
