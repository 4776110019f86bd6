"""The adapter that a run goes on from: its settings, its labels, its factors."""

import functools
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from loft_jax.errors import InputError, shown
from loft_jax.hub import load_model_config, load_peft_adapter
from loft_jax.hub.peft_base import check_folder, read_labels
from loft_jax.hub.peft_config import PeftConfig
from loft_jax.hub.peft_names import CONFIG_NAME
from loft_jax.lora import lora_layers
from loft_jax.models.family import PretrainedModel
from loft_jax.tasks.task import Task
from loft_jax.training.checksum import json_checksum, tree_checksum
from loft_jax.training.config import AdapterConfig, FinetuneConfig

Model = TypeVar("Model", bound=PretrainedModel)


def check_start(config: FinetuneConfig) -> None:
    """Refuses an adapter that a run cannot go on from, before data and weights are read.

    Args:
        config: Of the run; without `lora.adapter` there is nothing to check.

    Raises:
        InputError: There is no such adapter, it holds more than the run would train, a setting of
            the run says otherwise than the adapter, or the run would overwrite it.
    """
    if not config.lora.adapter:
        return
    folder, method = Path(config.lora.adapter), config.method
    check_folder(folder)
    if config.output and folder.resolve() == Path(config.output, "adapter").resolve():
        raise InputError(
            f"lora.adapter is {shown(str(folder))}, which this run replaces by its own; expected "
            "another output"
        )
    found = PeftConfig.read(folder / CONFIG_NAME)
    for name, own in _settings(found).items():
        given = getattr(config.lora, name)
        if given == getattr(AdapterConfig(), name):
            continue
        same = functools.partial(_layers, config) if name == "layers" else _comparable
        if same(given) != same(own):
            raise InputError(
                f"lora.{name} is {shown(given)}, but {folder / CONFIG_NAME} has {shown(own)}; "
                "expected one of the two"
            )
    for name, word, has in (
        ("use_dora", "DoRA", found.use_dora),
        ("use_rslora", "rsLoRA", found.use_rslora),
    ):
        wanted = bool(method.lora.get(name))
        if wanted and not has:
            raise InputError(f"method is {method.name}, but the adapter in {folder} has no {word}")
        if has and not wanted and name == "use_dora":  # rsLoRA is a scaling, which all can have
            raise InputError(
                f"method is {method.name}, but the adapter in {folder} has DoRA; expected method "
                "dora"
            )
    if found.bias != "none":
        raise InputError(
            f"{folder}: bias is {shown(found.bias)}, and no method trains biases; expected an "
            "adapter without them, or to merge it into its base first"
        )


def _settings(found: PeftConfig) -> dict[str, Any]:
    """Gives the fields of `AdapterConfig` that an adapter has settled, as it has them."""
    settings = found.settings

    def names(key: str) -> tuple[str, ...]:
        value = settings.get(key) or ()
        return (value,) if isinstance(value, str) else tuple(value)

    numbers = settings.get("layers_to_transform")
    numbers = [numbers] if isinstance(numbers, int) else numbers or []
    return {
        "rank": settings["r"],
        "alpha": float(settings["lora_alpha"]),
        "target_modules": names("target_modules"),
        "exclude_modules": names("exclude_modules"),
        "layers": ",".join(map(str, numbers)),
        "rank_pattern": dict(settings.get("rank_pattern") or {}),
        "alpha_pattern": dict(settings.get("alpha_pattern") or {}),
    }


def _comparable(value: Any) -> Any:
    """Gives names in one order, since an adapter may have them in any."""
    return sorted(value) if isinstance(value, tuple) else value


def _layers(config: FinetuneConfig, text: str) -> list[int]:
    """Gives the numbers of layers, all of them for an empty text, as far as the model is named."""
    count: Any = 0
    if config.model.path:
        _, sizes = load_model_config(config.model.path)
        count = getattr(sizes, "num_hidden_layers", None) or getattr(sizes, "n_layer", 0)
    numbers = AdapterConfig(layers=text).layer_numbers() or range(count)
    return sorted({number + count if number < 0 else number for number in numbers})


def known_labels(config: FinetuneConfig) -> tuple[str, ...]:
    """Gives the labels of the adapter that a run goes on from, in the order of its logits.

    Args:
        config: Of the run.

    Returns:
        Their names; empty without an adapter, or if it has none.
    """
    return read_labels(Path(config.lora.adapter)) if config.lora.adapter else ()


def load_start(model: Model, config: FinetuneConfig, task: Task) -> Model:
    """Adds the adapter that a run goes on from to its base model, in place.

    Args:
        model: The base model.
        config: Its adapter, dropout and seed are used.
        task: Of the run.

    Returns:
        The same model, with factors in float32.

    Raises:
        InputError: The adapter cannot be read, is for another base model or for other labels, or
            holds modules whole that the run would not train.
    """
    folder = Path(config.lora.adapter)
    labels = known_labels(config)
    if task.labels is not None and labels and labels != tuple(task.labels):
        raise InputError(
            f"{folder}: is for the labels {shown(list(labels))}, and the examples have "
            f"{shown(list(task.labels))}; expected the same ones"
        )
    dropout, rngs = config.lora.dropout, nnx.Rngs(config.seed)
    load_peft_adapter(folder, model, dtype=jnp.float32, dropout=dropout, rngs=rngs)
    heads = task.head_modules(model)
    saved = PeftConfig.read(folder / CONFIG_NAME).modules_to_save
    if other := [name for name in saved if not any(_is_end(name, head) for head in heads)]:
        raise InputError(
            f"{folder}: modules_to_save are {shown(other)}, which the run would not train; "
            "expected an adapter of factors, or to merge it into its base first"
        )
    return model


def _is_end(name: str, path: str) -> bool:
    return f".{path}".endswith(f".{name}") or f".{name}".endswith(f".{path}")


def start_fingerprint(model: PretrainedModel) -> str:
    """Computes a checksum of the adapter of a model, independent of its path and of the mesh.

    Args:
        model: As a run starts to train it.

    Returns:
        32 hexadecimal digits, from every bit of the factors, and from their scalings.
    """
    layers = lora_layers(model)
    factors = {
        f"{path}.{name}": getattr(layer, name).get_value()
        for path, layer in layers.items()
        for name in ("lora_a", "lora_b", "lora_magnitude")
        if getattr(layer, name) is not None
    }
    scalings = {path: layer.lora_scaling for path, layer in layers.items()}
    return json_checksum((scalings, tree_checksum(factors)))
