"""Names of files, modules and tensors in PEFT's format."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from flax import nnx

from loft_jax.errors import InputError, shown
from loft_jax.lora.axes import WeightAxes
from loft_jax.models.family import ParameterTable, flat_parameters
from loft_jax.models.registry import family_of

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

NameRule = Callable[[str, int | None], str | Sequence[str]]
"""Maps the dotted path of a module and its number in a stack, or None, to its name in PyTorch.

In a tree of factors, the outputs of one module may be those of several in PyTorch, in equal parts:
keys and values, for instance. The rule then gives all their names.
"""

_SHOWN = 5

# A path that has the number of a layer as a step.
_NUMBER = re.compile(r"(.+?\.)(\d+)\.(.+)")


class FamilyNames:
    """Hugging Face's names of the modules of a family, a `NameRule`.

    Args:
        model_type: Hugging Face's name of the family.

    Raises:
        InputError: There is no such family.

    Example:
        >>> names = FamilyNames("llama")
        >>> names("layers.mlp.up_proj", 3), names("layers.3.mlp.up_proj", None)
        ('model.layers.3.mlp.up_proj', 'model.layers.3.mlp.up_proj')
    """

    def __init__(self, model_type: str) -> None:
        family = family_of(model_type)
        config = next(iter(family.sizes.values()))  # names are those of every size
        self._model_type = model_type
        self._tables = [model.parameter_table(config) for model in family.models.values()]

    def __call__(self, path: str, number: int | None) -> str:
        """Gives the name of a module; its path may have the number of its layer in it."""
        table, module, inside = self._find(path)
        return table.module_name(module, inside if number is None else number)

    def is_embedding(self, path: str) -> bool:
        """Whether a module is an embedding."""
        table, module, _ = self._find(path)
        return table.weight(module).endswith(".embedding")

    def _find(self, path: str) -> tuple[ParameterTable, str, int | None]:
        """Finds the table that has a module, its path there and the number in the given one."""
        apart = _NUMBER.fullmatch(path)
        for table in self._tables:
            if path in table.modules:
                return table, path, None
            if apart and (module := f"{apart[1]}{apart[3]}") in table.modules:
                return table, module, int(apart[2])
        known = sorted({module for table in self._tables for module in table.modules})
        near = difflib.get_close_matches(path, known, n=_SHOWN) or known
        raise InputError(
            f"{path}: {self._model_type} has no such module; it has {listed(near)}; pass a "
            "function as hf_name to name other paths"
        )


def name_rule(hf_name: NameRule | str | None) -> NameRule | None:
    """Gives the rule that a caller names, a function or the `model_type` of a family."""
    return FamilyNames(hf_name) if isinstance(hf_name, str) else hf_name


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
        raise InputError(f"{path or 'the model'}: has a batch axis, which PEFT has no place for")
    if len(axes.stack) > 1:
        raise InputError(
            f"{path or 'the model'}: is a stack of stacks {axes.stack}, which has no layer numbers"
        )
    names: tuple[str, ...]
    if not axes.stack:
        names = (_one(path, rule(path, None)) if rule else path,)
    elif rule is None:
        raise InputError(f"{path}: is a stack of {axes.stack[0]} layers, pass hf_name to name them")
    else:
        names = tuple(_one(path, rule(path, index)) for index in range(axes.stack[0]))
    if not all(names):
        raise InputError("the layer is the whole model: PEFT adapts modules inside one")
    return names


def _one(path: str, name: str | Sequence[str]) -> str:
    if not isinstance(name, str):
        raise InputError(f"{path}: hf_name gives {shown(name)}, expected one name for this layer")
    return name


def tensor_name(name: str, factor: str, *, embedding: bool) -> str:
    """Gives the name of a tensor of an adapter in a file.

    Args:
        name: Name of the module in PyTorch.
        factor: `"A"`, `"B"` or `"magnitude"`.
        embedding: Whether the module is an embedding, whose factors have other names.

    Returns:
        The name, for example `base_model.model.model.layers.0.mlp.up_proj.lora_A.weight`.
    """
    if factor == "magnitude":
        return f"{PREFIX}{name}.lora_magnitude_vector"
    if embedding:
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
