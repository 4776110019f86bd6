"""The Optax chain of a run: its learning rate schedule and the optimizer of its method."""

import optax

from loft_jax.methods import AdamW, Common
from loft_jax.optim.pairs import Scaling, StackAxis
from loft_jax.training.config import FinetuneConfig, ScheduleConfig


def make_schedule(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """Makes the learning rate schedule: linear warmup, then the shape named.

    Args:
        config: Its learning_rate, shape and warmup_steps are used.
        steps: Number of steps of the whole run.

    Returns:
        An Optax schedule.

    Example:
        >>> schedule = make_schedule(ScheduleConfig(warmup_steps=3), 8)
        >>> [round(1e4 * float(schedule(step)), 2) for step in (0, 1, 2, 8)]
        [1.0, 2.0, 3.0, 0.0]
    """
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps)
    rest = max(1, steps - warmup)
    course = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.shape]
    # The first step is not wasted: its learning rate is peak / warmup.
    rise = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    return optax.join_schedules([rise, course], [warmup]) if warmup else course


def make_optimizer(
    config: FinetuneConfig,
    schedule: optax.Schedule,
    scaling: Scaling,
    stack_axis: StackAxis = None,
) -> optax.GradientTransformation:
    """Makes the optimizer of a run; every method clips by max_grad_norm.

    Args:
        config: Its method, Adam's settings and the initialization of its factors are used.
        schedule: Learning rate by step.
        scaling: The s of `W = s A B` by the path of a pair, for methods that project on the spans
            of A and B.
        stack_axis: The stacked axes by the path of a pair; None takes leading ones.

    Returns:
        A gradient transformation over the trained parameters.

    Example:
        >>> from loft_jax.data import DataConfig
        >>> from loft_jax.training.config import ModelConfig
        >>> config = FinetuneConfig(ModelConfig("model"), DataConfig("rows.jsonl"), "runs/first")
        >>> tx = make_optimizer(config, make_schedule(config.schedule, steps=10), scaling=1.0)
    """
    given = config.optimizer
    adam = AdamW(schedule, given.b1, given.b2, given.eps, given.weight_decay)
    common = Common(adam, given.max_grad_norm or None, scaling, stack_axis, config.lora.init)
    return config.method.optimizer(common)
