"""The Optax chain of a run: method and learning rate schedule by name."""

import optax

from loft_jax.optim.loft import loft
from loft_jax.optim.pairs import Scaling
from loft_jax.training.config import FinetuneConfig


def make_schedule(config: FinetuneConfig, steps: int) -> optax.Schedule:
    """The learning rate by step: linear warmup from zero, then the named course.

    Args:
        config: Its learning_rate, schedule and warmup_steps are used.
        steps: Steps of the whole run.

    Returns:
        An Optax schedule.
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
        config: Its method, Adam's numbers and LoFT's settings are used.
        schedule: Learning rate by step.
        scaling: The s of `W = s A B` by path of a pair; LoFT alone uses it.

    Returns:
        A gradient transformation over the trained parameters.
    """
    clip = config.max_grad_norm or None
    if config.method == "loft":
        return loft(
            schedule,
            config.b1,
            config.b2,
            config.eps,
            config.weight_decay,
            max_grad_norm=clip,
            second_moment=config.second_moment,
            state_dtype=config.state_dtype,
            balance=config.balance,
            scaling=scaling,
        )
    adamw = optax.adamw(
        schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay
    )
    return adamw if clip is None else optax.chain(optax.clip_by_global_norm(clip), adamw)
