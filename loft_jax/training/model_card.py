"""Writes model cards: what was trained, on what and how, as the Hugging Face hub shows it."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import loft_jax
from loft_jax.tasks.task import Task
from loft_jax.training.config import ExportConfig, FinetuneConfig
from loft_jax.training.config_io import config_to_dict

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILES = (
    *(".arrow", ".bz2", ".csv", ".gz", ".json", ".jsonl", ".parquet", ".tsv", ".txt", ".xz"),
    *(".bin", ".gguf", ".pt", ".safetensors", ".zip", ".zst"),
)
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "image-classification": "image-classification",  # for which PEFT has no name
}


def model_card(
    config: FinetuneConfig, task: Task, step: int, history: Sequence[Mapping[str, float]]
) -> str:
    """Describes a trained adapter or model.

    Args:
        config: Of the run.
        task: Of the run.
        step: The step after which it was exported.
        history: Rows of the run's `metrics.jsonl`.

    Returns:
        Markdown after the hub's metadata in YAML, which are those that PEFT writes. Of an absolute
        path it has the last name alone, and nothing of `config.logging`.
    """
    config = _without_places(config)
    base = config.export.base_model_name or config.model.path
    schedule, evaluation = config.schedule, config.evaluation
    kind = "An adapter for" if config.method.adapts else "A fine-tuning of"
    named = f"`{base}`" if base else "a model"
    rows = {
        "base model": base and f"`{base}`",
        "task": task.name,
        "method": config.method.name,
        "data": config.data.path and f"`{config.data.path}`",
        "preset": config.data.preset,
        "held-out examples": evaluation.path and f"`{evaluation.path}`",
        "steps": f"{step}, of {schedule.batch_size} rows each",
        "learning rate": f"{schedule.learning_rate:g}, {schedule.shape}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    # Trained again, it is another adapter, which must not replace this one on the hub.
    here = dataclasses.replace(config, export=ExportConfig(config.export.base_model_name))
    fields = {name: value for name, value in config_to_dict(here).items() if name != "logging"}
    settings = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return f"""---
{yaml.safe_dump(_metadata(config, task, base), sort_keys=False, allow_unicode=True)}---

# {Path(config.output).name}

{kind} {named}, trained with loft_jax {loft_jax.__version__}.

| | |
| --- | --- |
{table}
{_figures(step, history)}
## Train it again

With the settings below as `config.yaml`:

```console
$ loft-jax finetune --config config.yaml --output runs/again
```

```yaml
{settings}```
"""


def _metadata(config: FinetuneConfig, task: Task, base: str) -> dict[str, Any]:
    adapts = config.method.adapts
    tags = {"loft-jax", *(["lora"] if adapts else [])}
    metadata: dict[str, Any] = {}
    if _is_hub_id(base):  # the hub refuses paths
        metadata["base_model"] = base
        tags.add(f"base_model:{'adapter' if adapts else 'finetune'}:{base}")
    if _is_hub_id(config.data.path):
        metadata["datasets"] = [config.data.path]
    metadata["library_name"] = "peft" if adapts else "transformers"
    if pipeline := _PIPELINES.get(task.peft_type or task.head):
        metadata["pipeline_tag"] = pipeline
    return {**metadata, "tags": sorted(tags)}


def _is_hub_id(name: str) -> bool:
    is_file = name.lower().endswith(_FILES)
    return bool(_HUB_ID.fullmatch(name)) and not is_file and not Path(name).exists()


def _without_places(config: FinetuneConfig) -> FinetuneConfig:
    """Gives a configuration whose absolute paths are their last names."""

    def named(path: str) -> str:
        return Path(path).name if Path(path).is_absolute() else path

    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=named(config.model.path)),
        data=dataclasses.replace(config.data, path=named(config.data.path)),
        evaluation=dataclasses.replace(config.evaluation, path=named(config.evaluation.path)),
        lora=dataclasses.replace(config.lora, adapter=named(config.lora.adapter)),
        output=named(config.output),
    )


def _figures(step: int, history: Sequence[Mapping[str, float]]) -> str:
    """Gives a table of the figures before training and after the exported step."""
    before, after = (
        {
            name.removeprefix("eval_"): value
            for row in history
            if row["step"] == at
            for name, value in row.items()
            if name.startswith(("eval_", "train_loss"))
        }
        for at in (0, step)
    )
    if not after:
        return ""
    lines = [
        f"| {name} | {before[name]:.4f} | {value:.4f} |"
        if name in before
        else f"| {name} | | {value:.4f} |"
        for name, value in after.items()
    ]
    return "\n".join(["", "| | before | after |", "| --- | ---: | ---: |", *lines, ""])
