"""The model that an adapter in PEFT's format needs: its base, and its head."""

import json
import os
from pathlib import Path
from typing import Any

from loft_jax.errors import InputError, explained, naming, shown
from loft_jax.files import MOST_CONFIG, inside, read_text
from loft_jax.hub.peft_config import PeftConfig
from loft_jax.hub.peft_file import AdapterFile
from loft_jax.hub.peft_names import CONFIG_NAME, LABELS_NAME, PREFIX, WEIGHTS_NAME
from loft_jax.models.family import Family, Head


def base_model_of(folder: str | os.PathLike[str]) -> str:
    """Reads the base model that an adapter names: a path or a hub id.

    Args:
        folder: Of the adapter.

    Returns:
        Its `base_model_name_or_path`.

    Raises:
        InputError: The configuration is missing or damaged, or names no base model.
    """
    check_folder(Path(folder))
    path = Path(folder) / CONFIG_NAME
    name = PeftConfig.read(inside(path.parent, path.name)).settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"{path}: base_model_name_or_path is {shown(name)}; name the base model")
    return name


def head_of(
    folder: str | os.PathLike[str], family: Family, config: Any
) -> tuple[Head, tuple[str, ...]]:
    """Finds the head that a model needs for an adapter.

    Args:
        folder: Of the adapter.
        family: Of its base model.
        config: Of its base model.

    Returns:
        The kind of head, from PEFT's task or, for images, which it has no task for, from the
        family; and its labels: as many as the tensor that the adapter holds whole has outputs. None
        for a language model.

    Raises:
        InputError: The adapter is missing or damaged, is for a head that the family has not, or
            lacks the head that its task needs.
    """
    check_folder(Path(folder))
    settings = PeftConfig.read(inside(Path(folder), CONFIG_NAME)).settings
    head: Head = "sequence-classification"
    if settings.get("task_type") != "SEQ_CLS":
        if "image-classification" not in family.models:
            return "causal-lm", ()
        head = "image-classification"
    with naming(folder):
        model = family.model(head)
    kernels = [
        tensor
        for path, tensor in model.parameter_table(config).tensors.items()
        if path.startswith(f"{model.output_modules[-1]}.") and path.endswith(".kernel")
    ]
    name = kernels[-1].name  # of the layers of a head, the last gives the logits
    file = AdapterFile(Path(folder) / WEIGHTS_NAME)
    shape = file.shapes.get(f"{PREFIX}{name}")
    if shape is None and head == "image-classification":  # that of the base was not trained
        shape = (len(config.labels),)
    if shape is None:
        raise InputError(f"{file.path}: tensor {PREFIX + name!r} is missing, the head's")
    return head, _labels(Path(folder), shape[0], config)


def _labels(folder: Path, count: int, config: Any) -> tuple[str, ...]:
    """Gives an adapter's labels; without a file of them, as PEFT writes it, they are the base's."""
    if found := read_labels(folder):
        if len(found) != count:
            raise InputError(
                f"{folder / LABELS_NAME}: holds {shown(list(found))}, expected {count} labels"
            )
        return found
    unnamed = tuple(f"LABEL_{number}" for number in range(count))
    return config.labels if len(config.labels) == count else unnamed


def read_labels(folder: Path) -> tuple[str, ...]:
    """Reads the names of an adapter's labels.

    Args:
        folder: Of the adapter.

    Returns:
        The names in the order of the logits; empty if there is no file of them.

    Raises:
        InputError: The file is damaged.
    """
    path = folder / LABELS_NAME
    if not path.exists():
        return ()
    text = read_text(inside(folder, LABELS_NAME), "labels", most_bytes=MOST_CONFIG)
    with explained(f"{path}: cannot be read as JSON"):
        found = json.loads(text)
    named = isinstance(found, list) and all(isinstance(name, str) for name in found)
    if not named or not found or len(set(found)) != len(found):
        raise InputError(f"{path}: holds {shown(found)}, expected different texts")
    return tuple(found)


def check_folder(folder: Path) -> None:
    """Checks that there is a folder, which is not one around that of an adapter.

    Raises:
        InputError: There is none, or it is that of a run, of `export` or of PEFT's named adapters.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected a PEFT adapter")
    if not (folder / CONFIG_NAME).exists():
        inner = sorted(file.parent for file in folder.glob(f"*/{CONFIG_NAME}"))
        if inner:
            raise InputError(f"{folder}: is not an adapter, but has one in {inner[0]}")
