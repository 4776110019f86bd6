"""Names of files, modules and tensors in PEFT's format."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from flax import nnx

from loft_jax.errors import InputError, shown
from loft_jax.lora.axes import WeightAxes
from loft_jax.models.family import flat_parameters

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LABELS_NAME = "labels.json"
"""Names of a classifier's labels in the order of its logits, a file that PEFT does not have."""
PREFIX = "base_model.model."

FACTOR = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+)\."
    r"(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embed>[AB])|lora_(?P<dora>magnitude)_vector)"
)
"""Names of tensors of an adapter: the module, and which of its factors, or its magnitude."""

NameRule = Callable[[str, int | None], str]
"""Maps the dotted path of a module and its number in a stack, or None, to its name in PyTorch."""

_SHOWN = 5


def module_names(
    model: nnx.Module, path: str, axes: WeightAxes, hf_name: NameRule | None
) -> tuple[str, ...]:
    """Gives PyTorch's names of the modules that one layer of the model represents.

    Args:
        model: Its `hf_name` is the rule if none is given.
        path: Dotted path of the layer.
        axes: Axes of its weight.
        hf_name: The rule, or None.

    Returns:
        One name for each layer of a stack, and one for a layer that is not stacked.

    Raises:
        InputError: PEFT's format cannot hold the layer: it has a batch axis, is a stack without a
            rule or a stack of stacks, or is the whole model.
    """
    rule = hf_name or getattr(model, "hf_name", None)
    if axes.batch:
        raise InputError(f"{path}: has a batch axis, which PEFT has no place for")
    if len(axes.stack) > 1:
        raise InputError(f"{path}: is a stack of stacks {axes.stack}, which has no layer numbers")
    names: tuple[str, ...]
    if not axes.stack:
        names = (rule(path, None) if rule else path,)
    elif rule is None:
        raise InputError(f"{path}: is a stack of {axes.stack[0]} layers, pass hf_name to name them")
    else:
        names = tuple(rule(path, index) for index in range(axes.stack[0]))
    if not all(names):
        raise InputError("the layer is the whole model: PEFT adapts modules inside one")
    return names


def tensor_name(name: str, factor: str, layer: nnx.Module) -> str:
    """Gives the name of a tensor of an adapter in a file.

    Args:
        name: Name of the module in PyTorch.
        factor: `"A"`, `"B"` or `"magnitude"`.
        layer: The layer of the module; the factors of embeddings have other names.

    Returns:
        The name, for example `base_model.model.model.layers.0.mlp.up_proj.lora_A.weight`.
    """
    if factor == "magnitude":
        return f"{PREFIX}{name}.lora_magnitude_vector"
    if isinstance(layer, nnx.Embed):
        return f"{PREFIX}{name}.lora_embedding_{factor}"
    return f"{PREFIX}{name}.lora_{factor}.weight"


class Place(NamedTuple):
    """The place of a tensor of PyTorch in a model.

    Attributes:
        path: Dotted path of our parameter.
        number: Its number in the stack; None if the parameter is not stacked.
        transposed: Whether the tensor is transposed.
    """

    path: str
    number: int | None
    transposed: bool


def tensor_places(model: nnx.Module) -> dict[str, Place]:
    """Finds the places of all parameters of a model, without adapters, by name in PyTorch.

    Args:
        model: Its parameter table gives the names. Without one, names are ours and kernels are
            transposed.

    Returns:
        A place for every tensor, in the order of the parameters and their layers.
    """
    table = getattr(model, "table", None)
    places: dict[str, Place] = {}
    for path, parameter in flat_parameters(
        model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    ).items():
        if table is None:
            owner, _, name = path.rpartition(".")
            last = "bias" if name == "bias" else "weight"
            places[f"{owner}.{last}"] = Place(path, None, name == "kernel")
            continue
        tensor = table.tensor(path)
        for number in range(parameter.shape[0]) if tensor.stacked else (None,):
            places[tensor.name.format(number)] = Place(path, number, tensor.transposed)
    return places


def listed(names: Iterable[str]) -> str:
    """Formats the first few of some names for a message, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(shown, names[:_SHOWN])) + more
