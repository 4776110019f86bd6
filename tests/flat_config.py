"""Configurations of runs by the names of their flags, for tests that set a few of them."""

import dataclasses
from typing import get_type_hints

from loft_jax.cli.method_flags import make_methods
from loft_jax.methods import METHODS
from loft_jax.training import config as configs
from loft_jax.training.config import FinetuneConfig

SECTIONS = {
    "model": configs.ModelConfig,
    "task": configs.TaskConfig,
    "lora": configs.AdapterConfig,
    "optimizer": configs.OptimizerConfig,
    "schedule": configs.ScheduleConfig,
    "evaluation": configs.EvaluationConfig,
    "checkpoint": configs.CheckpointConfig,
    "logging": configs.LoggingConfig,
    "export": configs.ExportConfig,
}


def fields_by_flag(cls):
    """The fields of a class by the names of their flags, with underscores."""
    hints = get_type_hints(cls, include_extras=True)
    names = {}
    for field in dataclasses.fields(cls):
        told = getattr(hints[field.name], "__metadata__", ())
        names[told[0].name.replace("-", "_") if told else field.name] = field.name
    return names


SETTINGS = {flag: name for cls in METHODS.values() for flag, name in fields_by_flag(cls).items()}


def flat_config(*, method="loft", **flags):
    """A configuration of a run.

    Args:
        method: Its name.
        flags: Values by the names of flags, with underscores, each of which goes to its place; and
            `data`, `mesh`, `output`, `seed`.
    """
    settings = {SETTINGS[flag]: flags.pop(flag) for flag in [*flags] if flag in SETTINGS}
    sections = {}
    for section, cls in SECTIONS.items():
        own = {flag: name for flag, name in fields_by_flag(cls).items() if flag in flags}
        sections[section] = cls(**{name: flags.pop(flag) for flag, name in own.items()})
    return FinetuneConfig(**sections, **flags, method=make_methods([method], settings)[0])
