"""What files, modules and tensors of an adapter are called in PEFT's format."""

from collections.abc import Callable, Iterable

from flax import nnx

from loft_jax.errors import InputError, shown
from loft_jax.lora.axes import WeightAxes
from loft_jax.models.family import flat_parameters

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

NameRule = Callable[[str, int | None], str]
"""Name in PyTorch of the module at a dotted path, given its number in a stack or None."""

_SHOWN = 5


def module_names(
    model: nnx.Module, path: str, axes: WeightAxes, hf_name: NameRule | None
) -> tuple[str, ...]:
    """PyTorch's names of the modules that one layer of the model stands for.

    Args:
        model: Whose `hf_name` is the rule where none is given.
        path: Of the layer, dotted.
        axes: Of its weight.
        hf_name: The rule, or None.

    Returns:
        A name for each layer of the stack; one for a layer that is none.

    Raises:
        InputError: PEFT has no place for the layer: a batch axis, a stack without a rule, a stack
            of stacks, or the whole model.
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
    """What a file calls a tensor of an adapter.

    Args:
        name: Of the module, in PyTorch.
        factor: `"A"`, `"B"` or `"magnitude"`.
        layer: That the module is; embeddings have names of their own.

    Returns:
        The name, as `base_model.model.model.layers.0.mlp.up_proj.lora_A.weight`.
    """
    if factor == "magnitude":
        return f"{PREFIX}{name}.lora_magnitude_vector"
    if isinstance(layer, nnx.Embed):
        return f"{PREFIX}{name}.lora_embedding_{factor}"
    return f"{PREFIX}{name}.lora_{factor}.weight"


def saved_tensors(model: nnx.Module, module: str) -> dict[str, tuple[str, bool]]:
    """The parameters of a module that an adapter holds whole.

    Args:
        model: Whose table of parameters is the rule; without one, names are ours and kernels are
            transposed.
        module: Its dotted path.

    Returns:
        By dotted path of ours, the tensor's name in a file, and whether it is transposed there.

    Raises:
        InputError: The model has no such module, or none with parameters.
    """
    table = getattr(model, "table", None)
    found: dict[str, tuple[str, bool]] = {}
    for path in flat_parameters(model, nnx.Param):
        if path.startswith(f"{module}."):
            if table is not None:
                tensor = table.tensor(path)
                found[path] = (f"{PREFIX}{tensor.name}", tensor.transposed)
            else:
                owner, _, name = path.rpartition(".")
                last = "bias" if name == "bias" else "weight"
                found[path] = (f"{PREFIX}{owner}.{last}", name == "kernel")
    if not found:
        raise InputError(f"modules_to_save: {shown(module)} has no parameters in the model")
    return found


def listed(names: Iterable[str]) -> str:
    """The first few of some names, for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(shown, names[:_SHOWN])) + more
