"""The Optax chain of a run: method and learning rate schedule by name."""

from typing import assert_never

import optax

from loft_jax.optim import (
    alt_lora_plus,
    loft,
    loft_muon,
    lora_fa,
    lora_plus,
    reflora,
    reflora_s,
    riemannian_lora,
)
from loft_jax.optim.pairs import Scaling
from loft_jax.training.config import FinetuneConfig

# Muon's updates as large as AdamW's (Liu et al., arXiv 2502.16982): one learning rate for both.
_RMS_OF_ADAMW = 0.2


def make_schedule(config: FinetuneConfig, steps: int) -> optax.Schedule:
    """The learning rate by step: linear warmup from zero, then the named course.

    Args:
        config: Its learning_rate, schedule and warmup_steps are used.
        steps: Steps of the whole run.

    Returns:
        An Optax schedule.

    Example:
        >>> from loft_jax.data import DataConfig
        >>> config = FinetuneConfig("model", DataConfig("rows.jsonl"), "runs/first", warmup_steps=3)
        >>> [round(1e4 * float(make_schedule(config, 8)(step)), 2) for step in (0, 1, 2, 8)]
        [1.0, 2.0, 3.0, 0.0]
    """
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps)
    rest = max(1, steps - warmup)
    course = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    # The first step is not lost: it takes 1 / warmup of the peak.
    rise = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    return optax.join_schedules([rise, course], [warmup]) if warmup else course


def make_optimizer(
    config: FinetuneConfig, schedule: optax.Schedule, scaling: Scaling
) -> optax.GradientTransformation:
    """The optimizer of a method; every method clips by the same max_grad_norm.

    Args:
        config: Its method, Adam's numbers and the settings of the method are used.
        schedule: Learning rate by step.
        scaling: The s of `W = s A B` by path of a pair, for methods that project on what A and B
            span.

    Returns:
        A gradient transformation over the trained parameters.

    Example:
        >>> from loft_jax.data import DataConfig
        >>> config = FinetuneConfig("model", DataConfig("rows.jsonl"), "runs/first", method="lora")
        >>> tx = make_optimizer(config, make_schedule(config, steps=10), scaling=1.0)
    """
    adam = (schedule, config.b1, config.b2, config.eps, config.weight_decay)
    clip = config.max_grad_norm or None
    tx: optax.GradientTransformation
    match config.method:
        case "loft":  # the first three clip by themselves
            return loft(
                *adam,
                max_grad_norm=clip,
                second_moment=config.second_moment,
                move=config.move,
                state_dtype=config.state_dtype,
                balance=config.balance,
                scaling=scaling,
            )
        case "loft-muon":
            return loft_muon(
                schedule,
                weight_decay=config.weight_decay,
                consistent_rms=_RMS_OF_ADAMW,
                adam_b1=config.b1,
                adam_b2=config.b2,
                eps=config.eps,
                max_grad_norm=clip,
                move=config.move,
                scaling=scaling,
            )
        case "lora-fa":
            return lora_fa(*adam, max_grad_norm=clip, scaling=scaling)
        case "lora-plus":
            tx = lora_plus(*adam, ratio=config.lora_plus_ratio)
        case "riemannian":
            tx = riemannian_lora(*adam, damping=config.damping)
        case "altlora-plus":
            tx = alt_lora_plus(*adam, scaling=scaling)
        case "reflora":
            tx = reflora(*adam, warmup_steps=config.reflora_warmup)
        case "reflora-s":
            tx = reflora_s(*adam, warmup_steps=config.reflora_warmup)
        case "lora" | "rslora" | "dora" | "pissa" | "full":
            tx = optax.adamw(*adam[:-1], weight_decay=config.weight_decay)
        case _:
            assert_never(config.method)
    return tx if clip is None else optax.chain(optax.clip_by_global_norm(clip), tx)
