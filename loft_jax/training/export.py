"""Exports a trained model: restores it from a checkpoint, and writes it for other libraries."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from loft_jax.errors import InputError, explained
from loft_jax.files import replacing
from loft_jax.hub import save_peft_adapter, save_pretrained
from loft_jax.hub.repository import push_folder
from loft_jax.hub.tokenizer_folder import save_processor
from loft_jax.models.family import PretrainedModel
from loft_jax.tasks.causal_lm import CausalLM
from loft_jax.tasks.registry import TASKS
from loft_jax.tasks.task import Given, Task
from loft_jax.training.checkpoint import Checkpoints
from loft_jax.training.config import FinetuneConfig
from loft_jax.training.config_io import checked_fields, config_from_dict
from loft_jax.training.distributed import is_main
from loft_jax.training.metrics import read_metrics
from loft_jax.training.model import (
    adapted,
    base_fingerprint,
    check_fingerprints,
    load_base,
    trained_variables,
    with_precision,
)
from loft_jax.training.model_card import model_card
from loft_jax.training.partition import split_model
from loft_jax.training.start_adapter import start_fingerprint

CARD_NAME = "README.md"
"""The file that the Hugging Face hub shows."""


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
        if run["task"]["name"] not in TASKS or not config.model.path:
            raise InputError(
                f"{checkpoints.folder / str(step)}: its model or its loss was given as an object "
                "in Python; expected a run of a named task, and the path of its model as "
                "model.path in config.yaml"
            )
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
    config: FinetuneConfig,
    task: Task,
    folder: str | os.PathLike[str],
    *,
    step: int,
    run: str | os.PathLike[str],
    chats: bool,
) -> Path:
    """Writes the trained adapter to `adapter/` in PEFT's format, or all weights to `model/`.

    Tokenizer or image processor and a model card are written beside the weights. If the
    configuration names a repository, the folder is uploaded to it.

    Args:
        model: The trained model.
        processor: Tokenizer or image processor of the base model; None if there is none.
        config: Of the run.
        task: Of the run.
        folder: Where `adapter/` or `model/` goes.
        step: The step that the model is of.
        run: Folder of the run, whose `metrics.jsonl` has the figures for the model card.
        chats: Whether it was trained on conversations. Beside an adapter or a generating model that
            was not, the tokenizer has no chat template, so that nobody is led to ask it by one.

    Returns:
        The folder that was written.

    Raises:
        InputError: The folder cannot be written, or the upload failed.
    """
    target = Path(folder) / ("adapter" if config.method.adapts else "model")
    card = ""
    if is_main():
        card = model_card(config, task, step, read_metrics(Path(run) / "metrics.jsonl"))
    if isinstance(task, CausalLM) and not chats and processor is not None:
        processor = copy.copy(processor)
        processor.chat_template = None
    if config.method.adapts:
        if is_main():  # before the adapter, which is complete when its configuration is there
            with explained(f"{target}: cannot write the adapter"):
                save_processor(target, processor)
            _write_card(target, card)
        save_peft_adapter(
            target,
            model,
            base_model=config.export.base_model_name or config.model.path or None,
            task_type=task.peft_type,
            modules_to_save=task.head_modules(model),
            labels=task.labels or (),
        )
    else:
        save_pretrained(target, model, processor, base_model=config.model.path or None)
        if is_main():
            _write_card(target, card)
    publish(target, config)
    return target


def publish(folder: Path, config: FinetuneConfig) -> None:
    """Uploads what was written, if the configuration names a repository.

    Args:
        folder: What `export_trained` wrote.
        config: Of the run.

    Raises:
        InputError: The upload failed.
    """
    if config.export.push_to_hub and is_main():
        push_folder(folder, config.export.push_to_hub)


def _write_card(folder: Path, card: str) -> None:
    with explained(f"{folder}: cannot write the model card"), replacing(folder / CARD_NAME) as file:
        file.write_text(card, encoding="utf-8")
