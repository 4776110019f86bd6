"""Exports a trained model: restores it from a checkpoint, and writes it for other libraries."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from loft_jax.errors import explained
from loft_jax.hub import save_peft_adapter, save_pretrained
from loft_jax.methods import Method
from loft_jax.models.family import PretrainedModel
from loft_jax.tasks.registry import TASKS
from loft_jax.tasks.task import Given, Task
from loft_jax.training.checkpoint import Checkpoints
from loft_jax.training.config import FinetuneConfig
from loft_jax.training.config_io import checked_fields, config_from_dict
from loft_jax.training.model import (
    adapted,
    base_fingerprint,
    check_fingerprints,
    load_base,
    trained_variables,
    with_precision,
)
from loft_jax.training.partition import split_model
from loft_jax.training.start_adapter import start_fingerprint


def trained_with(run: Mapping[str, Any], where: str) -> FinetuneConfig:
    """Gives the configuration that a checkpoint was made with; `config.yaml` may have changed.

    Args:
        run: The plain values of the checkpoint.
        where: The checkpoint, for messages.

    Returns:
        The configuration, with its precision resolved.

    Raises:
        InputError: There is no configuration, or one of its fields is wrong.
    """
    return with_precision(config_from_dict(checked_fields(run.get("config"), where)))


def restore_model(
    config: FinetuneConfig, checkpoints: Checkpoints, step: int
) -> tuple[PretrainedModel, Task]:
    """Restores the model of a run as it was at one of its checkpoints.

    Args:
        config: From `trained_with`; the paths of its model and of the adapter that it went on from
            may have changed.
        checkpoints: Of the run.
        step: One of `checkpoints.steps()`.

    Returns:
        The model with its trained parameters, and the task that it was trained on.

    Raises:
        InputError: The checkpoint cannot be read or is damaged, or the base model is not the one
            that the run was started with.
    """
    with explained(f"{checkpoints.folder / str(step)}: does not say what it was trained on"):
        run = checkpoints.run_of(step)
        saved, settings = run["fingerprints"], run["task"]["settings"]
        task = TASKS[run["task"]["name"]].make(Given(config.data, **settings))
    base = load_base(config, task)
    with explained(f"{checkpoints.folder / str(step)}: does not say what it was trained on"):
        check_fingerprints(saved, {"model": base_fingerprint(base)}, doing="export")
    model = adapted(base, config, task)
    if config.lora.adapter:
        start = {"lora.adapter": start_fingerprint(model)}
        check_fingerprints(saved, start, doing="export")
    parts = split_model(model, trained_variables(config.method, task.head_modules(model)))
    here = SingleDeviceSharding(jax.local_devices()[0])  # whatever mesh it was saved from
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), parts.params
    )
    return parts.merged(checkpoints.restore_params(step, like), parts.streams), task


def export_trained(
    model: PretrainedModel,
    processor: Any,
    method: Method,
    task: Task,
    folder: str | os.PathLike[str],
    *,
    base_model: str,
) -> Path:
    """Writes the trained adapter to `adapter/` in PEFT's format, or all weights to `model/`.

    Args:
        model: The trained model.
        processor: Tokenizer or image processor of the base model, written with a whole model.
        method: Of the run.
        task: Of the run.
        folder: Where `adapter/` or `model/` goes.
        base_model: Name or path of the base model, as users give it.

    Returns:
        The folder that was written.
    """
    if method.adapts:
        save_peft_adapter(
            Path(folder) / "adapter",
            model,
            base_model=base_model,
            task_type=task.peft_type,
            modules_to_save=task.head_modules(model),
            labels=task.labels or (),
        )
        return Path(folder) / "adapter"
    save_pretrained(Path(folder) / "model", model, processor, base_model=base_model)
    return Path(folder) / "model"
